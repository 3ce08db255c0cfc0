"""The words that people type: every caption says what its scene says, in other words."""

import itertools
import re

import numpy as np
import pytest

from flux import toy
from flux.toy.open_prompts import STRANGE_THINGS
from flux.toy.scenes import COLOURS, PATTERNS, SHAPES, SIZES, Object, Scene, Word
from flux.toy.wording import NUMBERS, RELATED, STRANGE, SYNONYMS, with_articles

NAMES = {name: {name, *SYNONYMS.get(name, ())} for name in (*SHAPES, *COLOURS, *SIZES)}


def layouts(count: int, seed: int = 0):
    rng = np.random.default_rng(seed)
    for scene in itertools.islice(toy.scenes(seed, held=None), count):
        yield toy.arrange(toy.alike(rng) if rng.random() < 0.2 else scene, rng)


def test_described_scene_is_the_layouts():
    rng = np.random.default_rng(0)
    for layout in layouts(300):
        scene = toy.describe(layout)
        again = toy.arrange(scene, rng)
        assert again.background == layout.background
        if scene.count == 1:
            assert again == layout
        else:
            assert [item.thing for item in again.items] == [item.thing for item in layout.items]


def test_left_open_scene_says_nothing_else():
    rng, dropped = np.random.default_rng(0), set()
    for layout in layouts(500):
        full = toy.describe(layout)
        scene = toy.leave_open(full, rng)
        for name in ("relation", "background", "count"):
            assert getattr(scene, name) in (None, getattr(full, name))
            dropped |= {name} if getattr(scene, name) != getattr(full, name) else set()
        for thing, whole in zip(scene.objects, full.objects, strict=True):
            for name, value in vars(thing).items():
                assert value in (None, "", getattr(whole, name))
                dropped |= {name} if value != getattr(whole, name) else set()
    assert dropped == {"relation", "background", "count", "size", "place", "colour", "shape"}


def test_captions_name_what_the_scene_says_and_no_more():
    """Every colour, shape and size of a caption is one of its scene, and all of them are named."""
    rng = np.random.default_rng(1)
    for layout in layouts(1500):
        scene = toy.leave_open(toy.describe(layout), rng)
        text = f" {toy.worded(scene, rng).lower()} ".replace(" with dots", "")
        said = {scene.background}
        for thing in scene.objects:
            said |= {getattr(thing, name, None) for name in ("colour", "shape", "size")}
        for name, words in NAMES.items():
            pattern = rf"\b({'|'.join(map(re.escape, words))})(s|es)?\b"
            if name == "cross":
                pattern += "(?!-)"  # hatched things are "cross-hatched"
            there = re.search(pattern, text) is not None
            if name in said:
                assert there, (name, text)
            else:
                assert not there, (name, text, scene)


def test_captions_differ():
    rng = np.random.default_rng(2)
    scene = Scene((Object("circle", "red", "small", place="top left"),), None, "white")
    texts = {toy.worded(scene, rng) for _ in range(200)}
    assert len(texts) > 100 and str(scene) in texts


def test_articles_and_plurals():
    assert (
        with_articles("a orange star on an red background") == "an orange star on a red background"
    )
    rng = np.random.default_rng(3)
    for count in (2, 3, None):
        texts = {toy.worded(Scene((Object("cross", "red"),), count=count), rng) for _ in range(50)}
        numbers = [number.removeprefix("a ").strip() for number in NUMBERS[count]]
        for text in texts:
            assert re.search(r"(crosses|pluses|plus signs)\b", text, re.I), text
            assert any(number in text.lower() for number in numbers)


def test_relations_keep_their_direction():
    rng = np.random.default_rng(4)
    for relation, words in RELATED.items():
        scene = Scene((Object("star", "red"), Object("moon", "blue")), relation)
        for _ in range(60):
            text = toy.worded(scene, rng).lower()
            first, second = (min(text.find(w) for w in words if w in text) for words in (
                ("star",), ("moon", "crescent")))  # fmt: skip
            assert first < second
            others = {w for name, ws in RELATED.items() if name != relation for w in ws} - {
                *words,
                "on",
            }
            middle = text[first:second]
            assert not any(f" {other} " in middle for other in others), text


@pytest.mark.parametrize("kind", ["colour", "size", "shape", "pattern", "remove", "background"])
def test_instructions_name_the_new_value(kind):
    rng = np.random.default_rng(5)
    edits = (edit for edit in toy.edits(5, None) if edit.kind == kind)
    for edit in itertools.islice(edits, 60):
        text = toy.reworded(edit, rng).lower()
        if kind in ("colour", "background"):
            value = edit.instruction.split()[-1 if kind == "colour" else -1]
            value = value if value in COLOURS else edit.instruction.split()[-2]
            assert any(word in text for word in NAMES[value]), (edit.instruction, text)
        if kind == "remove":
            assert text.split()[0] in ("remove", "delete", "erase", "take", "get", "drop")
        if kind == "pattern" and "plain" not in edit.instruction:
            (value,) = set(edit.instruction.split()) & set(PATTERNS)
            assert text != "" and "plain" not in text and value


# ------------------------------------------------------------------ the fixed prompts


def test_open_prompts_are_many_and_their_drawings_are_right():
    prompts = toy.open_prompts()
    forms = {prompt.form for prompt in prompts}
    assert len(prompts) >= 400 and len(forms) >= 12 and len({p.text for p in prompts}) > 400
    rng = np.random.default_rng(0)
    for prompt in prompts[::9]:
        image = toy.draw(prompt.scene, 256, 256, rng)
        assert toy.check(image, prompt.scene)["all"], prompt


def test_check_of_an_open_prompt_counts_things():
    rng = np.random.default_rng(0)
    one, two, three, some = (
        Scene((Object("star", "red", "small"),), None, "white", count) for count in (1, 2, 3, None)
    )
    for drawn, count in ((one, 1), (two, 2), (three, 3)):
        image = toy.draw(drawn, 256, 256, rng)
        assert toy.check(image, drawn)["all"]
        for other in (one, two, three):
            assert toy.check(image, other)["all"] == (other is drawn)
        assert toy.check(image, some)["all"] == (count > 1)
    blank = np.full((256, 256, 3), 250, np.uint8)
    assert not toy.shows_a_whole_thing(blank)
    assert not toy.check(blank, Scene((Object("", ""),)))["all"]


def test_open_attributes_fit_all_and_named_ones_do_not():
    rng = np.random.default_rng(0)
    image = toy.draw(Scene((Object("star", "red"), Object("ring", "blue")), "above"), 256, 256, rng)
    for right in (
        Scene((Object("star", ""), Object("ring", ""))),
        Scene((Object("ring", ""), Object("star", ""))),
        Scene((Object("", "blue"), Object("", "red"))),
        Scene((Object("star", "red"), Object("ring", "")), "above"),
    ):
        assert toy.check(image, right)["all"], right
    for wrong in (
        Scene((Object("star", ""),)),
        Scene((Object("star", "blue"), Object("ring", "red"))),
        Scene((Object("star", ""), Object("star", ""))),
        Scene((Object("star", "red"), Object("ring", "")), "next to"),
        Scene((Word("HI", "red"),)),
    ):
        assert not toy.check(image, wrong)["all"], wrong


def test_training_names_other_strange_things_than_the_fixed_prompts():
    assert not set(STRANGE) & set(STRANGE_THINGS)


def test_training_uses_no_fixed_prompt():
    fixed = toy.fixed_prompts()
    assert toy.plain_words("A red circle.") in fixed and toy.plain_words("a red ring!") not in fixed
