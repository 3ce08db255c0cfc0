"""Verdicts: whether a picture is what a caption or an edit asks for. What is seen in it does not depend on what was asked."""

from collections.abc import Iterable, Sequence

import numpy as np

from flux.toy.drawing import place
from flux.toy.looking import look
from flux.toy.scenes import RELATIONS, Edit, Item, Layout, Object, Scene, Word

ATTRIBUTES = ("background", "colour", "shape", "pattern", "size", "place", "relation", "letters")
NEAR = 0.08  # over the shorter side: how far from where it belongs the thing of an edit may be


def check(picture: np.ndarray, scene: Scene) -> dict[str, bool]:
    """Measure a picture (H, W, 3) uint8 against a scene: right or wrong in what the scene names, and in `all`."""
    layout = look(picture)
    right = _compare(layout, scene.objects, scene.background)
    if scene.relation:
        right["relation"] = _related(picture, *_of(scene.objects, layout), scene.relation)
    return right | {"all": all(right.values())}


def check_edit(picture: np.ndarray, edit: Edit) -> dict[str, bool]:
    """Measure a picture (H, W, 3) uint8 against the one that an edit asks for.

    Things are where they were, but for one that was added: it is where the instruction says.
    """
    layout = look(picture)
    things = [item.thing for item in edit.after.items]
    right = _compare(layout, things, edit.after.background)
    seen = _of(things, layout)
    pairs = list(zip(edit.after.items, seen, strict=True))
    kept = pairs[1:] if edit.kind == "add" else pairs  # what is added comes first
    right["place"] = all(_close(picture, wanted, item) for wanted, item in kept)
    if edit.kind == "add":
        (relation,) = (relation for relation in RELATIONS if f" {relation} " in edit.instruction)
        right["relation"] = _related(picture, *seen, relation)
    return right | {"all": all(right.values())}


def letters_right(picture: np.ndarray, word: Word) -> int:
    """How many of a word's letters are where they belong in it."""
    lines = [item.thing for item in look(picture).items if isinstance(item.thing, Word)]
    letters = next((line.letters for line in lines if line.colour == word.colour), "")
    return sum(a == b for a, b in zip(letters, word.letters, strict=False))


def score(pictures: Iterable[np.ndarray], scenes: Iterable[Scene]) -> dict[str, float]:
    """The share of pictures that are right, attribute by attribute (of those whose scenes name it), and in all.

    "each letter" is the share of all letters.
    """
    pairs = list(zip(pictures, scenes, strict=True))
    shares = _shares([check(picture, scene) for picture, scene in pairs])
    words = [
        (picture, thing)
        for picture, scene in pairs
        for thing in scene.objects
        if isinstance(thing, Word)
    ]
    if words:
        shares["each letter"] = sum(letters_right(*pair) for pair in words) / sum(
            len(word.letters) for _, word in words
        )
    return shares


def score_edits(pictures: Iterable[np.ndarray], edits: Iterable[Edit]) -> dict[str, float]:
    """The share of pictures that are right, attribute by attribute, and in all."""
    return _shares(
        [check_edit(picture, edit) for picture, edit in zip(pictures, edits, strict=True)]
    )


def _shares(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    columns = {
        name: [verdict[name] for verdict in verdicts if name in verdict]
        for name in (*ATTRIBUTES, "all")
    }
    return {name: float(np.mean(column)) for name, column in columns.items() if column}


def _compare(
    layout: Layout, things: Sequence[Object | Word], background: str | None
) -> dict[str, bool]:
    """Background, colours, and what things say of themselves, which are told by their colours. None asks for nothing."""
    right = {"background": layout.background == background} if background else {}
    right["colour"] = sorted(item.thing.colour for item in layout.items) == sorted(
        thing.colour for thing in things
    )
    seen = _of(things, layout)
    for name in ("shape", "pattern", "size", "place", "letters"):
        said = [
            (getattr(thing, name, None), item) for thing, item in zip(things, seen, strict=True)
        ]
        named = [
            item is not None and getattr(item.thing, name, None) == value
            for value, item in said
            if value is not None
        ]
        if named:
            right[name] = all(named)
    return right


def _of(things: Sequence[Object | Word], layout: Layout) -> list[Item | None]:
    """What is seen in the colour of each; None if nothing is."""
    seen = {item.thing.colour: item for item in layout.items}
    return [seen.get(thing.colour) for thing in things]


def _related(picture: np.ndarray, first: Item | None, second: Item | None, relation: str) -> bool:
    """The first lies where the relation says, seen from the second, and clearly further that way than across it."""
    if first is None or second is None:
        return False
    height, width = picture.shape[:2]
    (dx, dy), x, y = (
        RELATIONS[relation],
        (first.x - second.x) * width,
        (first.y - second.y) * height,
    )
    return bool(x * dx + y * dy > 1.3 * abs(x * dy + y * dx))


def _close(picture: np.ndarray, wanted: Item, seen: Item | None) -> bool:
    """A thing is seen where an item is drawn, within NEAR."""
    height, width = picture.shape[:2]
    x, y, _ = place(wanted, width, height)
    return seen is not None and bool(
        np.hypot(seen.x * width - x, seen.y * height - y) <= NEAR * min(width, height)
    )
