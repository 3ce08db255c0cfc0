"""The grammar of the embedded models' world: captions, edits, and what they mean.

    caption    = objects [" on " a colour " background"]
    objects    = object [" " place] | object " " relation " " object | word [" " place]
    word       = 'the word "' LETTERS '" in ' colour
    object     = a [size " "] [pattern " "] colour " " shape
    a          = "an " before a vowel | "a "
    size       = "small" | "medium" | "large"
    pattern    = "striped" | "hatched" | "dotted" | "checkered"
    colour     = "red" | "orange" | "yellow" | "green" | "blue"
               | "purple" | "pink" | "white" | "gray" | "black"
    shape      = "circle" | "square" | "triangle" | "star" | "ring" | "cross" | "heart" | "moon"
    place      = "in the center"
               | "at the " ("top" | "bottom" | "left" | "right" | "top left" | "top right" | ...)
    relation   = "above" | "below" | "to the left of" | "to the right of"
    LETTERS    = one to four capitals

Letters are only at the top, in the center, or at the bottom. Two things never have the same colour,
nor that of the background. An object without a pattern is plain, and one with a pattern is not
small. Everything else that a caption leaves open is drawn at random; what a caption names can be
drawn in one way only. A caption may also leave open a colour ("a star"), a shape ("something red"),
a relation ("a star and a ring") and a number ("stars"), and two or three things may be alike ("two
red stars"); three are small and stand in a row. `wording.py` has the words that people use for all
of this. An edit is an instruction, the layouts of its images, and the layout of the result.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

COLOURS = {
    "red": (215, 35, 35),
    "orange": (250, 140, 20),
    "yellow": (250, 225, 50),
    "green": (40, 150, 60),
    "blue": (35, 75, 215),
    "purple": (125, 45, 165),
    "pink": (250, 150, 190),
    "white": (250, 250, 250),
    "gray": (130, 130, 130),
    "black": (15, 15, 15),
}
SHAPES = ("circle", "square", "triangle", "star", "ring", "cross", "heart", "moon")
PATTERNS = ("striped", "hatched", "dotted", "checkered")
SIZES = {"small": 0.105, "medium": 0.147, "large": 0.206}  # radius over the shorter side
ROWS = {"top": 0.25, "": 0.5, "bottom": 0.75}  # centres, over the height
COLUMNS = {"left": 0.25, "": 0.5, "right": 0.75}  # centres, over the width
# "" is the centre
PLACES = {f"{row} {column}".strip(): (row, column) for row in ROWS for column in COLUMNS}
RELATIONS = {  # first minus second
    "above": (0, -1),
    "below": (0, 1),
    "to the left of": (-1, 0),
    "to the right of": (1, 0),
}
BESIDE = ("to the left of", "to the right of")  # either is "next to"
LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"


# ---------------------------------------------------------------- captions


@dataclass(frozen=True)
class Object:
    """One thing in an image.

    An attribute that the caption leaves open is None; an open shape or colour is empty.
    """

    shape: str
    colour: str
    size: str | None = None
    pattern: str = ""
    place: str | None = None

    def __str__(self) -> str:
        words = [self.size, self.pattern, self.colour, self.shape or "shape"]
        return a(" ".join(w for w in words if w)) + at(self.place)


@dataclass(frozen=True)
class Word:
    """Written letters at the top, in the center, or at the bottom."""

    letters: str
    colour: str
    place: str | None = None

    def __str__(self) -> str:
        return f'the word "{self.letters}" in {self.colour}' + at(self.place)


@dataclass(frozen=True)
class Scene:
    """The content of a caption: an object, a word, or two objects in a relation; a background.

    A relation may be "next to": either side. `count`: so many objects are alike, one to three.
    None: two or three.
    """

    objects: tuple[Object | Word, ...]
    relation: str | None = None
    background: str | None = None
    count: int | None = 1

    def __str__(self) -> str:
        text = f" {self.relation or 'and'} ".join(map(str, self.objects))
        if self.count != 1:
            number = {None: "", 2: "two ", 3: "three "}[self.count]
            text = plural(number + text.split(" ", 1)[1])
            text += " side by side" if self.relation else ""
        return text + (f" on {a(self.background)} background" if self.background else "")


def named(thing: Object | Word, name: str) -> str | None:
    """Return an attribute that the caption names, or None."""
    value = getattr(thing, name, None)
    return None if value == "" and name in ("shape", "colour") else value


def a(words: str) -> str:
    """Put the indefinite article before the words."""
    return f"an {words}" if words[0] in "aeiou" else f"a {words}"


def plural(words: str) -> str:
    """Put the last word into the plural."""
    return words + ("es" if words.endswith(("s", "x", "sh")) else "s")


def nearest_place(x: float, y: float) -> str:
    """Return the place whose centre is nearest to a point, over width and height."""
    row = min(ROWS, key=lambda row: abs(ROWS[row] - y))
    column = min(COLUMNS, key=lambda column: abs(COLUMNS[column] - x))
    return f"{row} {column}".strip()


def at(place: str | None) -> str:
    if place is None:
        return ""
    return f" at the {place}" if place else " in the center"


def random_scene(rng: np.random.Generator, complete: bool = False) -> Scene:
    """Draw a scene from the grammar. `complete`: the caption names every attribute."""

    def said(chance):
        return complete or rng.random() < chance

    kind = rng.choice(["single", "pair", "word"], p=[0.35, 0.45, 0.2])
    *colours, background = pick(rng, COLOURS, 3)
    background = background if said(0.9) else None
    if kind == "word":
        letters = "".join(pick(rng, LETTERS) for _ in range(rng.integers(1, 5)))
        return Scene(
            (Word(letters, colours[0], pick(rng, ("top", "", "bottom")) if said(0.75) else None),),
            None,
            background,
        )
    objects = []
    for colour in colours[: 2 if kind == "pair" else 1]:
        pattern = pick(rng, PATTERNS) if rng.random() < 0.5 else ""
        objects.append(
            Object(
                pick(rng, SHAPES), colour, pick(rng, sizes(pattern)) if said(0.7) else None, pattern
            )
        )
    if kind == "single" and said(0.75):
        objects = [replace(objects[0], place=pick(rng, PLACES))]
    return Scene(tuple(objects), pick(rng, RELATIONS) if kind == "pair" else None, background)


def alike(rng: np.random.Generator) -> Scene:
    """Draw a scene of two or three things that are alike; everything is named."""
    colour, background = pick(rng, COLOURS, 2)
    if rng.random() < 0.4:
        return Scene((Object(pick(rng, SHAPES), colour, "small"),), None, background, 3)
    pattern = pick(rng, PATTERNS) if rng.random() < 0.25 else ""
    thing = Object(pick(rng, SHAPES), colour, pick(rng, sizes(pattern)), pattern)
    return Scene((thing,), None, background, 2)


def sizes(pattern: str) -> list[str]:
    """Return the sizes of an object with this pattern: a pattern needs room."""
    return [size for size in SIZES if not (pattern and size == "small")]


def held_out(scene: Scene) -> bool:
    """Return whether a scene is held out of training.

    One in twelve combinations (colour, shape, background) and one in twelve words are held out, by
    arithmetic, not by chance. A single letter is not. A scene with an open background names no
    combination, but its drawing may show one.
    """
    return any(_held(thing, scene.background) for thing in scene.objects)


def _held(thing: Object | Word, background: str | None) -> bool:
    if isinstance(thing, Word):
        return (
            len(thing.letters) > 1
            and sum(n * LETTERS.index(c) for n, c in enumerate(thing.letters, 1)) % 12 == 0
        )
    if not (thing.colour and thing.shape):
        return False
    colours = list(COLOURS)
    number = colours.index(thing.colour) + 3 * SHAPES.index(thing.shape)
    return background is not None and (number + 7 * colours.index(background)) % 12 == 0


def scenes(seed: int, held: bool | None, complete: bool = False) -> Iterator[Scene]:
    """Yield scenes without end: those held out of training (True), the others, or all (None)."""
    rng = np.random.default_rng(seed)
    while True:
        scene = random_scene(rng, complete)
        if held is None or held_out(scene) == held:
            yield scene


def pick(rng: np.random.Generator, some: Iterable, count: int | None = None):
    """Draw one of some, or `count` different ones."""
    some = list(some)
    if count is None:
        return some[rng.integers(len(some))]
    return [some[i] for i in rng.permutation(len(some))[:count]]


# ---------------------------------------------------------------- layouts: nothing is open


@dataclass(frozen=True)
class Item:
    """A thing at its centre (over width and height), with its radius (over the shorter side).

    The radius of a word is 0. The size is None only where an instruction leaves it open.
    """

    thing: Object | Word
    x: float
    y: float
    radius: float


@dataclass(frozen=True)
class Layout:
    """The things and the background of an image."""

    items: tuple[Item, ...]
    background: str


def arrange(scene: Scene, rng: np.random.Generator) -> Layout:
    """Return a layout of the scene. Open attributes are drawn at random."""
    taken = [scene.background, *(thing.colour for thing in scene.objects)]
    background = scene.background or pick(rng, [c for c in COLOURS if c not in taken])
    count = scene.count or int(rng.integers(2, 4))
    centres, items = iter(_centres(scene, count, rng)), []
    for thing in scene.objects:
        if isinstance(thing, Word):
            (_, y), *_ = centres
            items.append(Item(replace(thing, place=None), 0.5, y, 0.0))
            continue
        size = thing.size or ("small" if count == 3 else pick(rng, sizes(thing.pattern)))
        taken += [background, *(item.thing.colour for item in items)]
        colour = thing.colour or pick(rng, [c for c in COLOURS if c not in taken])
        shape = thing.shape or pick(rng, SHAPES)
        thing = replace(thing, size=size, colour=colour, shape=shape, place=None)
        items += [Item(thing, *next(centres), SIZES[size]) for _ in range(count)]
    return Layout(tuple(items), background)


ROW_OF_THREE = (0.1875, 0.5, 0.8125)  # centres, over the width


def _centres(scene: Scene, count: int, rng: np.random.Generator) -> list[tuple[float, float]]:
    """Return the centres over width and height: at places, or around the middle."""
    if count == 3:
        return [(x, 0.5) for x in ROW_OF_THREE]
    relation = scene.relation
    if relation == "next to":
        relation = pick(rng, BESIDE)
    elif relation is None and len(scene.objects) * count == 2:
        relation = pick(rng, RELATIONS)
    if relation is None:
        place = scene.objects[0].place
        row, column = PLACES[pick(rng, PLACES) if place is None else place]
        return [(COLUMNS[column], ROWS[row])]
    dx, dy = RELATIONS[relation]
    return [(0.5 + sign * dx / 4, 0.5 + sign * dy / 4) for sign in (1, -1)]


def shows_held_out(layout: Layout) -> bool:
    """Return whether an image shows a held-out combination or word."""
    return any(_held(item.thing, layout.background) for item in layout.items)


# ---------------------------------------------------------------- edits


@dataclass(frozen=True)
class Edit:
    """An instruction, the layouts of its images, and the layout of the result."""

    instruction: str
    before: tuple[Layout, ...]
    after: Layout
    kind: str

    def __str__(self) -> str:
        return self.instruction


def random_edit(rng: np.random.Generator) -> Edit:
    """Draw an edit of one of ten kinds."""
    return pick(rng, EDITS)(rng)


def edits(seed: int, held: bool | None) -> Iterator[Edit]:
    """Yield edits without end.

    held: True: the result has a held-out combination. False: no image has one. None: all edits.
    """
    rng = np.random.default_rng(seed)
    while True:
        edit = random_edit(rng)
        layouts = [edit.after] if held else [edit.after, *edit.before]
        shown = any(map(shows_held_out, layouts))
        if held is None or shown == held:
            yield edit


def families(seed: int) -> Iterator[list[Edit]]:
    """Yield families of edits without end: the same few images, now about one thing, now the other.

    Each thing of a layout gets another colour, size, pattern and shape, where possible, and its old
    one back. And it is removed.
    """
    rng = np.random.default_rng(seed)
    while True:
        layout, family = _some_layout(rng, pair=True), []
        for number, item in enumerate(layout.items):
            for attribute, choices in _CHOICES.items():
                if values := choices(layout, _object(item.thing)):
                    there = _changed(layout, number, attribute, pick(rng, values))
                    family += [
                        there,
                        _changed(there.after, number, attribute, getattr(item.thing, attribute)),
                    ]
            family.append(_removed(layout, number))
        yield family


def _some_layout(rng: np.random.Generator, pair: bool | None = None) -> Layout:
    """Draw a layout without words: of two objects (True), of one (False), or of either (None).

    Two objects have different shapes, so that an instruction can name one of them.
    """
    while True:
        scene = random_scene(rng)
        if pair is not None and pair != (len(scene.objects) == 2):
            continue
        if len(_shapes(scene.objects)) == len(scene.objects):
            return arrange(scene, rng)


def _object(thing: Object | Word) -> Object:
    """Return a thing that is known to be an object: an edit changes no words."""
    assert isinstance(thing, Object)
    return thing


def _shapes(things: Iterable[Object | Word]) -> set[str]:
    """Return the shapes of the things; a word has none."""
    return {thing.shape for thing in things if isinstance(thing, Object)}


def _free_colours(layout: Layout) -> list[str]:
    taken = {layout.background, *(item.thing.colour for item in layout.items)}
    return [colour for colour in COLOURS if colour not in taken]


# The new values of an attribute of an object. A small object can only be plain.
_CHOICES: dict[str, Callable[[Layout, Object], list[str]]] = {
    "colour": lambda layout, thing: _free_colours(layout),
    "size": lambda layout, thing: [size for size in sizes(thing.pattern) if size != thing.size],
    "pattern": lambda layout, thing: [
        p for p in ("", *PATTERNS) if p != thing.pattern and thing.size in sizes(p)
    ],
    "shape": lambda layout, thing: [
        s for s in SHAPES if s not in _shapes(item.thing for item in layout.items)
    ],
}


def _change(rng: np.random.Generator, attribute: str) -> Edit:
    """Give one object another colour, size, pattern or shape."""
    values: list[str] = []
    while not values:
        layout = _some_layout(rng)
        number = int(rng.integers(len(layout.items)))
        values = _CHOICES[attribute](layout, _object(layout.items[number].thing))
    return _changed(layout, number, attribute, pick(rng, values))


def _changed(layout: Layout, number: int, attribute: str, value: str) -> Edit:
    item = layout.items[number]
    thing = _object(item.thing)
    radius = SIZES[value] if attribute == "size" else item.radius
    changed = replace(item, thing=replace(thing, **{attribute: value}), radius=radius)
    items = layout.items[:number] + (changed,) + layout.items[number + 1 :]
    shape = thing.shape
    text = (
        f"turn the {shape} into {a(value)}"
        if attribute == "shape"
        else f"make the {shape} {value or 'plain'}"
    )
    return Edit(text, (layout,), replace(layout, items=items), attribute)


def _new_background(rng: np.random.Generator) -> Edit:
    layout = _some_layout(rng)
    colour = pick(rng, _free_colours(layout))
    shapes = " and the ".join(_object(item.thing).shape for item in layout.items)
    text = pick(rng, [f"make the background {colour}", f"the {shapes} on {a(colour)} background"])
    return Edit(text, (layout,), replace(layout, background=colour), "background")


def _add(rng: np.random.Generator) -> Edit:
    """Lay out a pair, and leave its first object out before: there is room for it."""
    scene = random_scene(rng)
    while scene.relation is None or len(_shapes(scene.objects)) == 1:
        scene = random_scene(rng)
    layout = arrange(scene, rng)
    new, old = map(_object, scene.objects)
    text = f"put {new} {scene.relation} {pick(rng, ['it', f'the {old.shape}'])}"
    first, second = layout.items
    said = replace(first, thing=replace(_object(first.thing), size=new.size))
    return Edit(
        text, (replace(layout, items=(second,)),), replace(layout, items=(said, second)), "add"
    )


def _remove(rng: np.random.Generator) -> Edit:
    return _removed(_some_layout(rng, pair=True), int(rng.integers(2)))


def _removed(layout: Layout, number: int) -> Edit:
    return Edit(
        f"remove the {_object(layout.items[number].thing).shape}",
        (layout,),
        replace(layout, items=(layout.items[1 - number],)),
        "remove",
    )


_ORDER = ("first", "second")


def _two_images(
    rng: np.random.Generator, colour: Callable[[Layout], str]
) -> tuple[tuple[Layout, Layout], int]:
    """Draw two layouts of one thing each, in different shapes.

    Return them, and the number of the one that can take the other's `colour`.
    """
    while True:
        layouts = (_some_layout(rng, pair=False), _some_layout(rng, pair=False))
        which = int(rng.integers(2))
        (item,), (other,) = layouts[which].items, layouts[1 - which].items
        new = colour(layouts[1 - which]) not in (item.thing.colour, layouts[which].background)
        if new and _object(item.thing).shape != _object(other.thing).shape:
            return layouts, which


def _onto(rng: np.random.Generator) -> Edit:
    """Put the thing of one image on the background of the other."""
    layouts, which = _two_images(rng, lambda layout: layout.background)
    (item,), background = layouts[which].items, layouts[1 - which].background
    first, second = _ORDER[which], _ORDER[1 - which]
    shape = _object(item.thing).shape
    text = f"the {shape} of the {first} picture on the background of the {second}"
    return Edit(text, layouts, Layout((item,), background), "two images: background")


def _painted(rng: np.random.Generator) -> Edit:
    """Paint the thing of one image in the colour of the other's."""
    layouts, which = _two_images(rng, lambda layout: layout.items[0].thing.colour)
    (item,), (other,) = layouts[which].items, layouts[1 - which].items
    first = f"the {_object(item.thing).shape} of the {_ORDER[which]} picture"
    text = f"{first} in the color of the {_object(other.thing).shape}"
    painted = replace(item, thing=replace(item.thing, colour=other.thing.colour))
    return Edit(text, layouts, replace(layouts[which], items=(painted,)), "two images: colour")


def _described(rng: np.random.Generator) -> Edit:
    """Describe the result. Before, one of its things is another, or is missing."""
    scene = random_scene(rng, complete=True)
    while isinstance(scene.objects[0], Word):
        scene = random_scene(rng, complete=True)
    layout = arrange(scene, rng)
    number = int(rng.integers(len(layout.items)))
    item, colour = layout.items[number], pick(rng, _free_colours(layout))
    recoloured = replace(_object(item.thing), colour=colour)
    others = [recoloured, replace(recoloured, shape=pick(rng, SHAPES)), None]
    other = pick(rng, others[: 1 + len(layout.items)])  # something is left
    items = () if other is None else (replace(item, thing=other),)
    before = replace(layout, items=layout.items[:number] + items + layout.items[number + 1 :])
    return Edit(str(scene), (before,), layout, "described")


EDITS = (  # a new background, a new object and a full description are twice as frequent
    *(partial(_change, attribute=attribute) for attribute in _CHOICES),
    _new_background,
    _new_background,
    _add,
    _add,
    _described,
    _described,
    _remove,
    _onto,
    _painted,
)

_NAMES = [*SHAPES, *COLOURS, *SIZES, *PATTERNS, *PLACES, *RELATIONS]
_OTHER = (
    "a an the at in of on it and into center background word make plain put remove turn "
    "color picture first second"
)
WORDS = set(" ".join([*_NAMES, _OTHER]).split())


def unknown_words(prompt: str) -> list[str]:
    """Return the words that the grammar lacks, in order. One to four capitals are known."""
    words = (w.strip(".,;:!?\"'()") for w in prompt.split())

    def known(w):
        return w.lower() in WORDS or (len(w) <= 4 and all(c in LETTERS for c in w))

    return list(dict.fromkeys(w.lower() for w in words if w and not known(w)))
