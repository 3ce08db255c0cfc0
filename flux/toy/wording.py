"""The words that people use for the scenes and edits of the grammar.

`worded` writes a scene as somebody would type it: with or without articles, in sentences or after
commas, with synonyms and either spelling. `reworded` does the same for an instruction. `leave_open`
drops what people leave out. `describe` returns the scene that a layout shows.
"""

import re
from dataclasses import replace

import numpy as np

from flux.toy.scenes import (
    BESIDE,
    RELATIONS,
    Edit,
    Layout,
    Object,
    Scene,
    Word,
    a,
    nearest_place,
    pick,
    plural,
)

SYNONYMS = {
    "circle": ("disc", "disk", "dot", "ball"),
    "square": ("box", "block"),
    "ring": ("hoop", "donut"),
    "cross": ("plus", "plus sign"),
    "moon": ("crescent", "crescent moon"),
    "heart": ("love heart",),
    "gray": ("grey",),
    "purple": ("violet",),
    "red": ("crimson", "scarlet"),
    "small": ("tiny", "little", "mini"),
    "medium": ("medium-sized", "middle-sized", "mid-sized"),
    "large": ("big", "huge", "giant"),
    "striped": ("stripy", "stripey"),
    "dotted": ("spotted", "polka-dotted", "spotty"),
    "checkered": ("checked", "chequered", "checkerboard"),
    "hatched": ("cross-hatched", "crosshatched"),
    "plain": ("solid",),
    "color": ("colour",),
    "picture": ("image",),
}
WITH = {  # patterns behind the thing
    "striped": "with stripes",
    "dotted": "with dots",
    "checkered": "with checks",
    "hatched": "with hatching",
}
RELATED = {
    "above": ("above", "over", "on top of", "on"),
    "below": ("below", "under", "beneath", "underneath"),
    "to the left of": ("to the left of", "left of", "on the left of"),
    "to the right of": ("to the right of", "right of", "on the right of"),
}
NEXT_TO = ("next to", "beside", "by", "alongside")
TOGETHER = ("and", "with", "and", ",")
OPENERS = (
    "a picture of", "an image of", "a drawing of", "draw", "a photo of", "please draw", "show me",
    "picture of", "there is", "i want", "make", "paint", "generate", "an illustration of",
)  # fmt: skip
BACKGROUNDS = (
    "on a {} background", "on {}", "in front of a {} background", "against a {} background",
    "with a {} background", "on a background of {}", "over a {} background", "on a {} backdrop",
)  # fmt: skip
CENTRE = (
    "in the center", "in the centre", "in the middle", "at the center",
    "in the middle of the image", "centered", "centred",
)  # fmt: skip
SIDES = {
    "top": ("at the top", "on top", "near the top", "in the upper part", "at the very top"),
    "bottom": ("at the bottom", "near the bottom", "in the lower part", "down at the bottom"),
    "left": ("at the left", "on the left", "to the left", "on the left side"),
    "right": ("at the right", "on the right", "to the right", "on the right side"),
}
CORNERS = (
    "at the {row} {column}", "in the {row} {column} corner", "in the {row} {column}",
    "on the {row} {column}", "in the {upper} {column} corner", "at the {upper} {column}",
)  # fmt: skip
UPPER = {"top": "upper", "bottom": "lower"}
UNNAMED = ("shape", "thing", "something", "object")
# of things that the world lacks; the fixed prompts name others
STRANGE = (
    "cat", "dog", "house", "tree", "car", "person", "woman", "man", "flower", "bird", "fish",
    "mountain", "castle", "robot", "boat", "apple", "face", "city", "horse", "dragon", "sword",
    "sun", "cloud", "train", "bicycle", "chair", "table", "book", "guitar", "rose", "lake",
    "astronaut", "landscape", "portrait", "forest", "beach", "king", "child", "shoe", "cup of tea",
    "hat", "piano", "lion", "spaceship", "bridge", "bottle", "cake", "river", "frog", "elephant",
    "hello world", "test", "something nice", "a beautiful day", "masterpiece, best quality",
    "sunset over the sea", "girl with a pearl earring", "logo", "pizza", "hexagon", "cube", "line",
    "pentagon", "diamond", "arrow", "oval", "rectangle", "sphere", "letter", "number seven",
)  # fmt: skip
STRANGE_COLOURS = ("brown", "golden", "turquoise", "beige", "silver", "shiny", "bright", "dark")
NUMBERS = {None: ("", "some ", "several "), 2: ("two ", "2 ", "a pair of "), 3: ("three ", "3 ")}
SIDE_BY_SIDE = (" side by side", " next to each other", " beside each other")


# ---------------------------------------------------------------- what is said


def describe(layout: Layout) -> Scene:
    """Return the scene of a layout, with all that can be said about it."""
    things, items = [item.thing for item in layout.items], layout.items
    if len(items) == 1:
        place = nearest_place(items[0].x, items[0].y)
        return Scene((replace(things[0], place=place),), None, layout.background)
    if things[0] == things[1]:
        relation = "next to" if len(items) == 2 and items[0].y == items[1].y else None
        return Scene((things[0],), relation, layout.background, len(items))
    sign = np.sign([items[0].x - items[1].x, items[0].y - items[1].y])
    (relation,) = (name for name, step in RELATIONS.items() if (sign == step).all())
    return Scene(tuple(things), relation, layout.background)


def leave_open(scene: Scene, rng: np.random.Generator) -> Scene:
    """Drop attributes of a scene at random, often most of them: a pattern is always named."""
    much = rng.random() < 0.35  # is said about some scenes

    def said(chance: float, less: float) -> bool:
        return bool(rng.random() < (chance if much else less))

    background = scene.background if said(0.9, 0.55) else None
    relation = scene.relation if said(1.0, 0.7) and (scene.count == 1 or said(0.4, 0.3)) else None
    count = scene.count if scene.count == 1 or said(1.0, 0.85) else None
    objects: list[Object | Word] = []
    for thing in scene.objects:
        if isinstance(thing, Object):
            thing = replace(thing, size=thing.size if said(0.8, 0.3) else None)
            if not much and rng.random() < 0.25:
                keeps_shape = rng.random() < 0.65
                thing = replace(thing, colour="") if keeps_shape else replace(thing, shape="")
        place = thing.place if said(0.8, 0.3) else None
        objects.append(replace(thing, place=place))
    return Scene(tuple(objects), relation, background, count)


# ---------------------------------------------------------------- how people say it


def worded(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of a scene, in words that people use."""
    is_named = all(thing.colour and getattr(thing, "shape", "a word") for thing in scene.objects)
    if is_named and (scene.relation or len(scene.objects) == 1) and scene.count:
        if rng.random() < 0.25:
            return str(scene)
    plainly = rng.random() < 0.2  # single words after commas
    parts = _things(scene, rng, plainly)
    if scene.background:
        wording = "{} background" if plainly else pick(rng, BACKGROUNDS)
        if not plainly and rng.random() < 0.1:
            parts.insert(0, wording.format(_named(scene.background, rng)) + ",")
        else:
            parts.append(
                ("," if plainly else "") + " " + wording.format(_named(scene.background, rng))
            )
    text = " ".join(parts)
    if not plainly and rng.random() < 0.2:
        text = f"{pick(rng, OPENERS)} {text}"
    return _typed(text, rng)


def strange(scene: Scene, rng: np.random.Generator) -> str:
    """Return a caption of something that the world lacks, with what the scene says of its thing."""
    thing = scene.objects[0]
    colour = thing.colour if rng.random() < 0.4 else None
    if colour is None and rng.random() < 0.2:
        colour = pick(rng, STRANGE_COLOURS)
    what = pick(rng, STRANGE)
    if rng.random() < 0.15:
        letters = rng.integers(97, 123, rng.integers(3, 9))
        what = "".join(map(chr, letters))
    text = a(f"{colour} {what}" if colour else what) if rng.random() < 0.7 else what
    if scene.background and rng.random() < 0.3:
        text += " " + pick(rng, BACKGROUNDS).format(scene.background)
    if rng.random() < 0.3:
        text = f"{pick(rng, OPENERS)} {text}"
    return _typed(text, rng)


def _things(scene: Scene, rng: np.random.Generator, plainly: bool) -> list[str]:
    first = scene.objects[0]
    if scene.count != 1 and isinstance(first, Object):
        thing = _object(first, rng, plainly)
        number = pick(rng, NUMBERS[scene.count])
        behind = pick(rng, SIDE_BY_SIDE) if scene.relation else ""
        if scene.count == 3 and rng.random() < 0.2:
            behind = " in a row"
        return [number + _many(thing if plainly else thing.split(" ", 1)[1]) + behind]
    said = [
        _word(thing, rng) if isinstance(thing, Word) else _object(thing, rng, plainly)
        for thing in scene.objects
    ]
    if len(said) == 1:
        place = first.place
        where = [] if place is None else [_where(place, rng)]
        if plainly and where:
            return [f"{said[0]}, {where[0]}"]
        if where and rng.random() < 0.12:
            return [where[0] + ",", *said]
        return said + where
    relation = pick(rng, TOGETHER)
    if scene.relation:
        relation = pick(rng, RELATED.get(scene.relation, NEXT_TO))
        if scene.relation in BESIDE and rng.random() < 0.25:
            relation = pick(rng, NEXT_TO)
    return [said[0], relation, said[1]]


def _object(thing: Object, rng: np.random.Generator, plainly: bool) -> str:
    """Return words such as "a tiny red box with stripes"."""
    size = _named(thing.size, rng) if thing.size else ""
    colour = _named(thing.colour, rng) if thing.colour else ""
    shape = _named(thing.shape, rng) if thing.shape else pick(rng, UNNAMED)
    pattern, behind = _named(thing.pattern, rng) if thing.pattern else "", ""
    if thing.pattern and rng.random() < 0.2:
        pattern, behind = "", " " + WITH[thing.pattern]
    if plainly and rng.random() < 0.5:
        behind, size = behind + (f", {size}" if size else ""), ""
    if shape == "something":
        return " ".join(w for w in (shape, size, pattern, colour) if w) + behind
    if not thing.shape and plainly and colour:
        shape = ""
    adjectives = [size, pattern, colour]
    if rng.random() < 0.2:
        adjectives = [pattern, size, colour] if rng.random() < 0.5 else [size, colour, pattern]
    words = " ".join(w for w in (*adjectives, shape) if w)
    return (words if plainly else a(words)) + behind


def _word(thing: Word, rng: np.random.Generator) -> str:
    quoted = f'"{thing.letters}"' if rng.random() < 0.8 else thing.letters
    colour = _named(thing.colour, rng)
    forms = (
        f"the word {quoted} in {colour}", f"the word {quoted} in {colour}",
        f"the text {quoted} in {colour}", f"the {colour} word {quoted}", f"{quoted} in {colour}",
        f"{quoted} written in {colour}", f"the letters {quoted} in {colour}",
        f"{colour} text {quoted}", f"the word {quoted} in {colour} letters",
    )  # fmt: skip
    return pick(rng, forms)


def _where(place: str, rng: np.random.Generator) -> str:
    if not place:
        return pick(rng, CENTRE)
    if place in SIDES:
        return pick(rng, SIDES[place])
    row, column = place.split()
    return pick(rng, CORNERS).format(row=row, upper=UPPER[row], column=column)


def _named(word: str, rng: np.random.Generator) -> str:
    """Return a word or a synonym."""
    if word in SYNONYMS and rng.random() < 0.4:
        return pick(rng, SYNONYMS[word])
    return word


def _many(words: str) -> str:
    """Put the thing of these words into the plural, before "with" and commas."""
    head, *rest = re.split(r"( with |, )", words, maxsplit=1)
    return plural(head) + "".join(rest)


def _typed(text: str, rng: np.random.Generator) -> str:
    """Return a text as somebody types it: articles, capitals and a period vary."""
    text = re.sub(r"\s+", " ", text).replace(" ,", ",").strip(" ,")
    if rng.random() < 0.15:
        text = re.sub(r"\b(a|an|the) ", "", text)
    else:
        text = with_articles(text)
    chance = rng.random()
    if chance < 0.15 and text:
        text = text[0].upper() + text[1:]
    elif chance < 0.17 and len(text) < 24:
        text = text.upper()
    if rng.random() < 0.1:
        text += "."
    return text


def with_articles(text: str) -> str:
    """Choose between "a" and "an" by the next letter."""
    return re.sub(r"\ban? (?=([a-z]))", lambda m: "an " if m[1] in "aeiou" else "a ", text)


# ---------------------------------------------------------------- instructions

_REMOVE = ("remove", "delete", "erase", "take away", "get rid of", "drop")
_ADD = ("put", "add", "place", "draw", "insert")
_COLOUR = (
    "make the {shape} {value}",
    "change the {shape} to {value}",
    "paint the {shape} {value}",
    "turn the {shape} {value}",
    "recolor the {shape} {value}",
    "color the {shape} {value}",
    "the {shape} should be {value}",
    "make {shape} {value}",
    "change the color of the {shape} to {value}",
)
_SHAPE = (
    "turn the {shape} into {value}",
    "replace the {shape} with {value}",
    "change the {shape} to {value}",
    "change the {shape} into {value}",
    "make the {shape} {value}",
    "swap the {shape} for {value}",
)
_BACKGROUND = (
    "make the background {value}",
    "change the background to {value}",
    "turn the background {value}",
    "paint the background {value}",
    "the background should be {value}",
    "{value} background",
    "set the background to {value}",
    "use a {value} background",
    "change the background color to {value}",
)
_PATTERN = {
    "striped": ("add stripes to the {shape}", "give the {shape} stripes"),
    "dotted": ("add dots to the {shape}", "give the {shape} dots"),
    "checkered": ("give the {shape} checks",),
    "hatched": ("give the {shape} hatching", "add hatching to the {shape}"),
    "": ("remove the pattern from the {shape}", "the {shape} without a pattern"),
}


def reworded(edit: Edit, rng: np.random.Generator) -> str:
    """Return an instruction in words that people use."""
    text, kind = edit.instruction, edit.kind
    if rng.random() < 0.35:
        return text
    if kind == "described":
        return worded(describe(edit.after), rng)
    words = text.split()
    if kind in ("colour", "pattern", "size"):
        shape, value = words[2], words[3]
        forms = _COLOUR if kind == "colour" else ("make the {shape} {value}",)
        text = pick(rng, forms).format(shape=shape, value=value)
        if kind == "pattern" and rng.random() < 0.4:
            text = pick(rng, _PATTERN["" if value == "plain" else value]).format(shape=shape)
        if kind == "size" and rng.random() < 0.4:
            text = _resized(edit, shape)
    elif kind == "shape":
        text = pick(rng, _SHAPE).format(shape=words[2], value=a(words[-1]))
    elif kind == "remove":
        text = f"{pick(rng, _REMOVE)} the {words[-1]}"
    elif kind == "background" and text.startswith("make"):
        text = pick(rng, _BACKGROUND).format(value=words[-1])
    elif kind == "add":
        text = text.replace("put", pick(rng, _ADD), 1)
        relation = next(r for r in RELATIONS if f" {r} " in text)
        text = text.replace(relation, pick(rng, RELATED[relation][:3]))
    elif kind.startswith("two images") and rng.random() < 0.4:
        text = text.replace(" of the ", " from the ", 1)
        if kind.endswith("background"):
            text = f"put {text}"
    if len(edit.before) == 1:
        text = _pointed(text, edit.before[0], rng)
    text = re.sub(r"[a-z]+", lambda match: _named(match[0], rng), text)
    return _typed(text + (" please" if rng.random() < 0.04 else ""), rng)


def _resized(edit: Edit, shape: str) -> str:
    """Return an instruction that says only whether a thing grows."""
    pairs = zip(edit.before[0].items, edit.after.items, strict=True)
    (before, after) = next((b, c) for b, c in pairs if b != c)
    grows = after.radius > before.radius
    return f"make the {shape} {'bigger' if grows else 'smaller'}"


def _pointed(text: str, before: Layout, rng: np.random.Generator) -> str:
    """Name a thing with its colour, or an only thing "it"."""
    things = [item.thing for item in before.items if isinstance(item.thing, Object)]
    for thing in things:
        phrase = f"the {thing.shape}"
        if not re.search(rf"{phrase}\b", text):
            continue
        if len(before.items) == 1 and rng.random() < 0.15:
            return text.replace(phrase, "it", 1)
        if rng.random() < 0.2:
            return text.replace(phrase, f"the {thing.colour} {thing.shape}", 1)
    return text
