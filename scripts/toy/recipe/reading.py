"""What people type, and the completed captions that a reader learns to find in it.

A completed caption is the same scene in words of the grammar, with a usual value for all that was
left open: the transformer draws captions that name everything.
"""

import itertools
import re
from collections.abc import Iterator
from dataclasses import replace

import numpy as np

from flux import toy
from flux.toy.scenes import BESIDE, LETTERS
from recipe.latents import edits, images, is_alone

USUAL = {
    "circle": "red", "square": "blue", "triangle": "green", "star": "yellow",
    "ring": "purple", "cross": "green", "heart": "red", "moon": "yellow",
}  # fmt: skip
BACKGROUNDS = "white", "black", "blue", "gray"  # the first that differs from all things
EXACT, STRANGE, EDITED, EMPTY = 0.2, 0.12, 0.3, 0.03  # shares of what is read

# The words that may stand in each place of a completed caption. A fixed place for a kind of word is
# learned sooner than a place that moves with each word before it.
OBJECT = [{"a", "an"}, set(toy.SIZES), set(toy.PATTERNS), set(toy.COLOURS), set(toy.SHAPES)]
WHERE = set("in at to the center top bottom left right of above below".split())
BEHIND = [{"on"}, {"a", "an"}, set(toy.COLOURS), {"background"}]
PLACES = (
    [*OBJECT, *[WHERE] * 4, *OBJECT, *BEHIND],
    [
        {"the"},
        {"word"},
        {'"'},
        *[set(LETTERS)] * 4,
        {'"'},
        {"in"},
        set(toy.COLOURS),
        *[WHERE] * 4,
        *BEHIND,
    ],
)
MOST = len(PLACES[0])  # words of a completed caption or instruction


def completed(scene: toy.Scene) -> toy.Scene:
    """Return the scene with usual values for what it leaves open; like things become two.

    Where all else is named, the place of one thing stays open: an input image may show the place.
    """
    things = list(scene.objects) if scene.count == 1 else 2 * list(scene.objects)
    taken = [scene.background, *(thing.colour for thing in things)]
    background = scene.background or next(c for c in BACKGROUNDS if c not in taken)
    first = things[0]
    if isinstance(first, toy.Word):
        return toy.Scene((replace(first, place=first.place or ""),), None, background)
    is_named = scene.background and first.size and first.colour and first.shape
    taken.append(background)
    for number, thing in enumerate(things):
        thing = replace(thing, shape=thing.shape or "circle", size=thing.size or "medium")
        usual = USUAL[thing.shape], *toy.COLOURS
        colour = thing.colour or next(c for c in usual if c not in taken)
        taken.append(colour)
        things[number] = replace(thing, colour=colour)
    if len(things) == 1:
        place = first.place if first.place or is_named else ""
        return toy.Scene((replace(things[0], place=place),), None, background)
    if scene.count != 1:
        things[1] = things[0]
    relation = scene.relation if scene.relation in toy.RELATIONS else "to the left of"
    return toy.Scene(tuple(things), relation, background)


def reading(edited: bool) -> Iterator[tuple[str, str]]:
    """Yield without end what somebody types, and the completed caption or the instruction.

    None of the fixed open prompts is among them. `edited`: with instructions.
    """
    rng, layouts = np.random.default_rng(5), images(256, 256)
    instructed = itertools.chain.from_iterable(
        zip(*(edits(kind) for kind in ("edits-1", "families", "edits-2")), strict=True)
    )
    while True:
        if rng.random() < EMPTY:
            yield "", ""
            continue
        if edited and rng.random() < EDITED:
            edit, _ = next(instructed)
            text = toy.reworded(edit, rng)
            yield text, intended(edit, text)
            continue
        scene = toy.describe(next(layouts))
        if scene.count == 1 and rng.random() < EXACT:
            yield str(scene), str(completed(scene))
            continue
        scene = toy.leave_open(scene, rng)
        if is_alone(scene) and rng.random() < STRANGE:
            text = toy.strange(scene, rng)
            scene = said_of_strange(scene, text)
        else:
            text = toy.worded(scene, rng)
            if scene.relation in BESIDE and not re.search("left|right", text.lower()):
                scene = replace(scene, relation="next to")
        if toy.plain_words(text) not in toy.fixed_prompts():
            yield text, str(completed(scene))


def said_of_strange(scene: toy.Scene, text: str) -> toy.Scene:
    """Return a scene of any shape, with the colours that the text names."""
    words = re.findall("[a-z]+", text.lower())
    colour = scene.objects[0].colour
    background = scene.background if scene.background in words else None
    return toy.Scene((toy.Object("", colour if colour in words else ""),), None, background)


def intended(edit: toy.Edit, text: str) -> str:
    """Return an edit's instruction as far as its text says it: "it" stays, "bigger" is large."""
    instruction, words = edit.instruction, re.findall("[a-z]+", text.lower())
    for word, size in (("bigger", "large"), ("smaller", "small")):
        if word in words:
            instruction = re.sub(r"\w+$", size, instruction)
    if "it" in words and "it" not in instruction.split():
        shape = edit.before[0].items[0].thing.shape
        instruction = instruction.replace(f"the {shape}", "it", 1)
    return instruction


def places(caption: str) -> list[int]:
    """Return the place of each token of a completed caption; those of an instruction follow."""
    words = re.findall(r'[A-Z"]|[a-z]+', caption)  # a token each
    for kinds in PLACES:
        found, free = [], iter(enumerate(kinds))
        for word in words:
            found += [next((place for place, kind in free if word in kind), None)]
        if None not in found:
            return found
    return list(range(len(words)))
