"""A fixed set of prompts that leave much open, in words that people type; training leaves them out.

`open_prompts()` returns more than 400, in thirteen forms; some are written by rule, some by hand.
Each has the scene that it requests: all that is named must be right, with no more and no fewer
things. `strange_prompts()` are about what the world lacks.
"""

import re
from functools import cache, partial
from typing import NamedTuple

import numpy as np

from flux.toy.scenes import (
    COLOURS,
    PATTERNS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Object,
    Scene,
    Word,
    pick,
)
from flux.toy.wording import worded

SOME_LETTERS = "ABDEGKLMNORSTU"
EACH = 30  # prompts of a form that are written by rule


class OpenPrompt(NamedTuple):
    """A prompt in a form, and the scene that it requests."""

    form: str
    text: str
    scene: Scene


def one(colour: str, shape: str, background: str | None = None, **more) -> Scene:
    """Return a scene of one object, or of `count` like ones."""
    count = more.pop("count", 1)
    return Scene((Object(shape, colour, **more),), None, background, count)


def two(first: tuple[str, str], second: tuple[str, str], relation: str | None = None) -> Scene:
    """Return a scene of two objects, each a colour and a shape."""
    return Scene(tuple(Object(shape, colour) for colour, shape in (first, second)), relation)


BY_HAND = {
    "colour, shape and background": {
        "a red circle on white": one("red", "circle", "white"),
        "a green square on a white background": one("green", "square", "white"),
        "a blue star in front of a yellow background": one("blue", "star", "yellow"),
        "Black heart on pink.": one("black", "heart", "pink"),
        "an orange moon against a black background": one("orange", "moon", "black"),
        "white background, purple cross": one("purple", "cross", "white"),
    },
    "colour and shape": {
        "a red circle": one("red", "circle"),
        "red circle": one("red", "circle"),
        "A blue star.": one("blue", "star"),
        "the yellow triangle": one("yellow", "triangle"),
        "BLACK SQUARE": one("black", "square"),
        "grey ring": one("gray", "ring"),
        "a violet box": one("purple", "square"),
        "pink disc": one("pink", "circle"),
    },
    "shape only": {
        "a circle": one("", "circle"),
        "circle": one("", "circle"),
        "Star": one("", "star"),
        "a heart": one("", "heart"),
        "a crescent moon": one("", "moon"),
        "a picture of a triangle": one("", "triangle"),
        "draw a ring": one("", "ring"),
    },
    "colour only": {
        "red": one("red", ""),
        "something blue": one("blue", ""),
        "a yellow thing": one("yellow", ""),
        "green shape": one("green", ""),
    },
    "size only": {
        "a big red circle": one("red", "circle", size="large"),
        "a tiny star": one("", "star", size="small"),
        "a huge blue heart": one("blue", "heart", size="large"),
        "little green box": one("green", "square", size="small"),
        "a medium-sized ring": one("", "ring", size="medium"),
    },
    "place only": {
        "a red circle in the middle": one("red", "circle", place=""),
        "a star at the top": one("", "star", place="top"),
        "a blue square in the upper left corner": one("blue", "square", place="top left"),
        "pink heart, bottom right": one("pink", "heart", place="bottom right"),
        "a green triangle on the left": one("green", "triangle", place="left"),
        "black moon in the centre": one("black", "moon", place=""),
    },
    "two things without places": {
        "a red circle and a blue square": two(("red", "circle"), ("blue", "square")),
        "a star and a heart": two(("", "star"), ("", "heart")),
        "yellow moon, green ring": two(("yellow", "moon"), ("green", "ring")),
        "a black cross with a white triangle": two(("black", "cross"), ("white", "triangle")),
    },
    "two things beside or over each other": {
        "a red circle next to a blue square": two(("red", "circle"), ("blue", "square"), "next to"),
        "a star beside a heart": two(("", "star"), ("", "heart"), "next to"),
        "a green ring over a pink cross": two(("green", "ring"), ("pink", "cross"), "above"),
        "a moon under a yellow star": two(("", "moon"), ("yellow", "star"), "below"),
        "an orange box left of a gray disk": two(
            ("orange", "square"), ("gray", "circle"), "to the left of"
        ),
    },
    "counts": {
        "two red circles": one("red", "circle", count=2),
        "three stars": one("", "star", count=3),
        "2 blue squares": one("blue", "square", count=2),
        "hearts": one("", "heart", count=None),
        "three small green rings in a row": one("green", "ring", size="small", count=3),
        "a pair of yellow triangles": one("yellow", "triangle", count=2),
    },
    "words": {
        'the word "HI" in red': Scene((Word("HI", "red"),)),
        '"CAT" in blue': Scene((Word("CAT", "blue"),)),
        'green text "OK"': Scene((Word("OK", "green"),)),
    },
}


@cache
def open_prompts() -> tuple[OpenPrompt, ...]:
    """Return all prompts, always the same."""
    prompts = {
        form: [OpenPrompt(form, *pair) for pair in some.items()] for form, some in BY_HAND.items()
    }
    for form, some in _by_rule(np.random.default_rng(20)).items():
        prompts.setdefault(form, []).extend(OpenPrompt(form, *pair) for pair in some.items())
    return tuple(prompt for some in prompts.values() for prompt in some)


def strange_prompts() -> tuple[str, ...]:
    """Return prompts about what the world lacks."""
    return tuple(
        f"{before}{thing}{behind}" for before, behind in STRANGE_FORMS for thing in STRANGE_THINGS
    )


STRANGE_FORMS = (("a ", ""), ("", ""), ("a photo of a ", " on a blue background"), ("a red ", ""))
STRANGE_THINGS = (
    "kitten", "cottage", "bicycle wheel", "teapot", "violin", "volcano", "banana", "penguin",
    "lighthouse", "samurai", "sunflower", "tractor", "submarine", "cactus", "wizard", "snowman",
    "zebra", "octopus", "helicopter", "mushroom", "lamp", "clock", "parrot", "waterfall", "tiger",
)  # fmt: skip


@cache
def fixed_prompts() -> frozenset[str]:
    """Return the words of all prompts, as `plain_words` writes them."""
    return frozenset(plain_words(prompt.text) for prompt in open_prompts())


def plain_words(text: str) -> str:
    """Return a text in lower case, without articles at its start and marks at its end."""
    return re.sub(r"^(an?|the) ", "", text.lower().strip(" .,!"))


def _by_rule(rng: np.random.Generator) -> dict[str, dict[str, Scene]]:
    some = partial(pick, rng)

    def natural(scene: Scene) -> tuple[str, Scene]:
        return worded(scene, rng), scene

    def plain(scene: Scene) -> tuple[str, Scene]:
        return str(scene), scene

    def sentence(scene: Scene) -> tuple[str, Scene]:
        return f"Draw me a picture of {scene}, please.", scene

    def commas(scene: Scene) -> tuple[str, Scene]:
        (thing,) = scene.objects
        assert isinstance(thing, Object)
        return f"{thing.shape}, {thing.colour}, {scene.background} background", scene

    makers = {
        "colour, shape and background": lambda c: plain(one(c[0], some(SHAPES), c[1])),
        "colour and shape": lambda c: natural(one(c[0], some(SHAPES))),
        "shape only": lambda c: natural(one("", some(SHAPES))),
        "colour only": lambda c: natural(one(c[0], "")),
        "size only": lambda c: plain(one(c[0], some(SHAPES), size=some(SIZES))),
        "place only": lambda c: natural(one(c[0], some(SHAPES), place=some(PLACES))),
        "two things without places": lambda c: natural(
            two((c[0], some(SHAPES)), (c[1], some(SHAPES)))
        ),
        "two things beside or over each other": lambda c: natural(
            two((c[0], some(SHAPES)), (c[1], some(SHAPES)), some([*RELATIONS, "next to"]))
        ),
        "counts": lambda c: natural(one(c[0], some(SHAPES), count=some([2, 3]))),
        "words": lambda c: natural(Scene((Word("".join(map(some, 3 * [SOME_LETTERS])), c[0]),))),
        "after commas": lambda c: commas(one(c[0], some(SHAPES), c[1])),
        "in a sentence": lambda c: sentence(one(c[0], some(SHAPES), c[1])),
        "pattern": lambda c: natural(one(c[0], some(SHAPES), c[1], pattern=some(PATTERNS))),
    }  # fmt: skip
    found: dict[str, dict[str, Scene]] = {}
    for form, make in makers.items():
        written: dict[str, Scene] = {}
        for _ in range(1000):
            text, scene = make(pick(rng, COLOURS, 2))
            if len(written) < EACH and text not in BY_HAND.get(form, {}):
                written.setdefault(text, scene)
        found[form] = written
    return found
