"""Verdicts: whether an image is what a caption or an edit requests.

The layout that is found in an image does not depend on the request.
"""

from collections.abc import Iterable, Sequence

import numpy as np

from flux.toy.drawing import place
from flux.toy.looking import look
from flux.toy.scenes import RELATIONS, Edit, Item, Layout, Object, Scene, Word

ATTRIBUTES = ("background", "colour", "shape", "pattern", "size", "place", "relation", "letters")
NEAR = 0.08  # largest distance of a thing from its position in an edit, over the shorter side


def check(image: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Measure an image (H, W, 3) uint8 against a scene.

    Return True or False for each attribute that the scene names, and for "all".
    """
    layout = look(image)
    right = _compare(layout, scene.objects, scene.background)
    if scene.relation:
        first, second = _of(scene.objects, layout)
        right["relation"] = _related(image, first, second, scene.relation)
    return right | {"all": all(right.values())}


def check_edit(image: np.ndarray, edit: Edit) -> dict[str, bool]:
    """Measure an image (H, W, 3) uint8 against the result of an edit.

    Things must stay where they were. A new thing must be where the instruction says.
    """
    layout = look(image)
    things = [item.thing for item in edit.after.items]
    right = _compare(layout, things, edit.after.background)
    seen = _of(things, layout)
    pairs = list(zip(edit.after.items, seen, strict=True))
    kept = pairs[1:] if edit.kind == "add" else pairs  # the new thing comes first
    right["place"] = all(_close(image, wanted, item) for wanted, item in kept)
    if edit.kind == "add":
        (relation,) = (relation for relation in RELATIONS if f" {relation} " in edit.instruction)
        first, second = seen
        right["relation"] = _related(image, first, second, relation)
    return right | {"all": all(right.values())}


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
    layout: Layout, things: Sequence[Object | Word], background: str | None
) -> dict[str, bool]:
    """Compare background, colours and attributes. Things are matched by colour; None fits all."""
    right = {"background": layout.background == background} if background else {}
    right["colour"] = sorted(item.thing.colour for item in layout.items) == sorted(
        thing.colour for thing in things
    )
    seen = _of(things, layout)
    for name in ("shape", "pattern", "size", "place", "letters"):
        matches = []
        for thing, item in zip(things, seen, strict=True):
            value = getattr(thing, name, None)
            if value is not None:
                matches.append(item is not None and getattr(item.thing, name, None) == value)
        if matches:
            right[name] = all(matches)
    return right


def _of(things: Sequence[Object | Word], layout: Layout) -> list[Item | None]:
    """Return the item of the layout in the colour of each thing, or None."""
    seen = {item.thing.colour: item for item in layout.items}
    return [seen.get(thing.colour) for thing in things]


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
