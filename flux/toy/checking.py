"""Verdicts: whether an image is what a caption or an edit requests.

The layout that is found in an image does not depend on the request.
"""

import itertools
from collections.abc import Iterable, Sequence

import numpy as np

from flux.toy.drawing import place
from flux.toy.looking import look, whole
from flux.toy.scenes import BESIDE, RELATIONS, Edit, Item, Layout, Object, Scene, Word, named

ATTRIBUTES = ("background", "colour", "shape", "pattern", "size", "place", "relation", "letters")
OF_THINGS = ("shape", "pattern", "size", "place", "letters")  # attributes of one thing, but colour
MOST = 4  # things in an image, up to which all matches are tried
NEAR = 0.08  # largest distance of a thing from its position in an edit, over the shorter side


def check(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Measure an image (H, W, 3) uint8 against a scene.

    Return True or False for each attribute that the scene names, and for "all".
    """
    layout = look(image)
    counts = (2, 3) if scene.count is None else (scene.count,)
    count = len(layout.items) if len(layout.items) in counts else counts[0]
    things = scene.objects * count
    seen = _of(things, layout)
    right = _compare(layout, things, seen, scene.background)
    if scene.relation:
        first, second, *_ = seen
        relations = BESIDE if scene.relation == "next to" else (scene.relation,)
        right["relation"] = any(_related(image, first, second, name) for name in relations)
    return right | {"all": all(right.values())}


def check_edit(image: np.ndarray, edit: Edit) -> dict[str, bool]:
    """Measure an image (H, W, 3) uint8 against the result of an edit.

    Things must stay where they were. A new thing must be where the instruction says.
    """
    layout = look(image)
    things = [item.thing for item in edit.after.items]
    seen = _of(things, layout)
    right = _compare(layout, things, seen, edit.after.background)
    pairs = list(zip(edit.after.items, seen, strict=True))
    kept = pairs[1:] if edit.kind == "add" else pairs  # the new thing comes first
    right["place"] = all(_close(image, wanted, item) for wanted, item in kept)
    if edit.kind == "add":
        (relation,) = (relation for relation in RELATIONS if f" {relation} " in edit.instruction)
        first, second = seen
        right["relation"] = _related(image, first, second, relation)
    return right | {"all": all(right.values())}


def shows_a_whole_thing(image: np.ndarray) -> bool:
    """Return whether an image (H, W, 3) uint8 shows a known shape or word."""
    return any(whole(item) for item in look(image).items)


def letters_right(image: np.ndarray, word: Word) -> int:
    """Return how many of a word's letters are at their position."""
    lines = [item.thing for item in look(image).items if isinstance(item.thing, Word)]
    letters = next((line.letters for line in lines if line.colour == word.colour), "")
    return sum(a == b for a, b in zip(letters, word.letters, strict=False))


def score(images: Iterable[np.ndarray], scenes: Iterable[Scene]) -> dict[str, float]:
    """Return the share of images that are right in each attribute, and in "all".

    An attribute counts where the scene names it. "each letter" is the share of all letters.
    """
    pairs = list(zip(images, scenes, strict=True))
    shares = _shares([check(image, scene) for image, scene in pairs])
    words = [
        (image, thing)
        for image, scene in pairs
        for thing in scene.objects
        if isinstance(thing, Word)
    ]
    if words:
        right = sum(letters_right(*pair) for pair in words)
        shares["each letter"] = right / sum(len(word.letters) for _, word in words)
    return shares


def score_edits(images: Iterable[np.ndarray], edits: Iterable[Edit]) -> dict[str, float]:
    """Return the share of images that are right in each attribute, and in "all"."""
    return _shares([check_edit(image, edit) for image, edit in zip(images, edits, strict=True)])


def _shares(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    shares = {}
    for name in (*ATTRIBUTES, "all"):
        column = [verdict[name] for verdict in verdicts if name in verdict]
        if column:
            shares[name] = float(np.mean(column))
    return shares


def _compare(
    layout: Layout,
    things: Sequence[Object | Word],
    seen: Sequence[Item | None],
    background: str | None,
) -> dict[str, bool]:
    """Compare background, colours and attributes with the items of `_of`. None fits all.

    The colours are right if there are as many things as named, each in its colour.
    """
    right = {"background": layout.background == background} if background else {}
    right["colour"] = len(things) == len(layout.items) and all(
        item is not None and named(thing, "colour") in (None, item.thing.colour)
        for thing, item in zip(things, seen, strict=True)
    )
    for name in OF_THINGS:
        matches = []
        for thing, item in zip(things, seen, strict=True):
            value = named(thing, name)
            if value is not None:
                matches.append(item is not None and getattr(item.thing, name, None) == value)
        if matches:
            right[name] = all(matches)
    return right


def _of(things: Sequence[Object | Word], layout: Layout) -> list[Item | None]:
    """Return the item of the layout for each thing, or None: the items that agree most.

    A colour counts more than all else.
    """

    def agreement(items: Sequence[Item | None]) -> int:
        return sum(_agrees(*pair) for pair in zip(things, items, strict=True))

    padded: list[Item | None] = [*layout.items, *[None] * len(things)]
    if len(layout.items) > MOST:  # of a broken image; permutations would be too many
        seen = {item.thing.colour: item for item in layout.items}
        return [seen.get(thing.colour) for thing in things]
    return max(map(list, itertools.permutations(padded, len(things))), key=agreement)


def _agrees(thing: Object | Word, item: Item | None) -> int:
    """Return how well an item agrees with a thing; 0 where its colour is another."""
    if item is None or named(thing, "colour") not in (None, item.thing.colour):
        return 0
    said = [name for name in OF_THINGS if named(thing, name) is not None]
    return 10 + sum(getattr(item.thing, name, None) == named(thing, name) for name in said)


def _related(image: np.ndarray, first: Item | None, second: Item | None, relation: str) -> bool:
    """Return whether the first item is in this relation to the second, clearly more than across."""
    if first is None or second is None:
        return False
    height, width = image.shape[:2]
    dx, dy = RELATIONS[relation]
    x, y = (first.x - second.x) * width, (first.y - second.y) * height
    return bool(x * dx + y * dy > 1.3 * abs(x * dy + y * dx))


def _close(image: np.ndarray, wanted: Item, seen: Item | None) -> bool:
    """Return whether an item is seen within NEAR of its position."""
    height, width = image.shape[:2]
    x, y, _ = place(wanted, width, height)
    if seen is None:
        return False
    distance = np.hypot(seen.x * width - x, seen.y * height - y)
    return bool(distance <= NEAR * min(width, height))
