"""flux.toy: the captions, the edits and the drawings of the embedded models' world.

They are compared with the grammar of the docstring, with areas, and with their instructions.
"""

import re
from collections import Counter
from dataclasses import replace
from itertools import chain, combinations, islice, permutations, product

import numpy as np
import pytest

from flux.toy import (
    COLOURS,
    PATTERNS,
    PLACES,
    RELATIONS,
    SHAPES,
    SIZES,
    Layout,
    Object,
    Scene,
    Word,
    drawing,
    families,
)
from flux.toy.drawing import coverage, draw, ink
from flux.toy.scenes import (
    LETTERS,
    ROWS,
    Item,
    arrange,
    edits,
    held_out,
    scenes,
    shows_held_out,
    sizes,
    unknown_words,
)


def some(
    count: int, seed: int = 0, held: bool | None = None, complete: bool = False
) -> list[Scene]:
    return list(islice(scenes(seed, held, complete), count))


# ------------------------------------------------------------------ captions


def any_of(words) -> str:
    return "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"


A = "(?:an(?= orange)|a(?! orange))"
COLOUR = f"({any_of(COLOURS)})"
LOOKS = f"(?:(?:{any_of(SIZES)} )?{COLOUR}|(?:(?:medium|large) )?{any_of(PATTERNS)} {COLOUR})"
THING = f"{A} {LOOKS} {any_of(SHAPES)}"
PLACE = f"(?: in the center| at the {any_of(place for place in PLACES if place)})?"
LINE = f'the word "[A-Z]{{1,4}}" in {COLOUR}(?: in the center| at the (?:top|bottom))?'
THINGS = f"{THING}{PLACE}|{LINE}|{THING} {any_of(RELATIONS)} {THING}"
CAPTION = re.compile(f"(?:{THINGS})(?: on {A} ({any_of(COLOURS)}) background)?")


@pytest.mark.parametrize("complete", [True, False])
def test_captions_follow_the_grammar_in_known_words(complete):
    captions = [str(scene) for scene in some(400, complete=complete)]
    for caption in captions:
        colours = [colour for colour in CAPTION.fullmatch(caption).groups() if colour]
        assert len(set(colours)) == len(colours) and unknown_words(caption) == []
    text = " ".join(captions)
    names = (*SHAPES, *COLOURS, *SIZES, *PATTERNS, *PLACES, *RELATIONS, "center", "background")
    assert all(word in text for word in names)
    assert set(LETTERS) <= set(text)


def test_captions_are_exact():
    ring = Object("ring", "blue", "large", "dotted")
    assert str(Scene((Object("star", "yellow", "small"), ring), "above", "white")) == (
        "a small yellow star above a large dotted blue ring on a white background"
    )
    assert (
        str(Scene((replace(ring, size=None, pattern="", place=""),))) == "a blue ring in the center"
    )
    assert (
        str(Scene((Object("moon", "orange"),), None, "orange"))
        == "an orange moon on an orange background"
    )
    cornered = Scene((replace(ring, place="top left"),), None, "red")
    assert str(cornered) == "a large dotted blue ring at the top left on a red background"
    assert (
        str(Scene((Word("CAT", "red", "bottom"),), None, "gray"))
        == 'the word "CAT" in red at the bottom on a gray background'
    )


def test_complete_scenes_name_every_attribute():
    for scene in some(100, complete=True):
        assert scene.background and all(
            thing.size for thing in scene.objects if isinstance(thing, Object)
        )
        assert (
            (scene.relation is None)
            == (len(scene.objects) == 1)
            == (scene.objects[0].place is not None)
        )


def test_unknown_words_are_those_outside_the_grammar():
    assert unknown_words("A Dragon, above a BLUE ring; dragon and 'knight'!") == [
        "dragon",
        "knight",
    ]
    for known in ("", " ... !", "An orange cross, at the top right.", 'the word "WXYZ" in red'):
        assert unknown_words(known) == []
    assert unknown_words('the word "HELLO" in Red') == ["hello"]


# ------------------------------------------------------------------ held out


def test_one_combination_in_twelve_is_held_out():
    every = [
        Scene((Object(s, c),), None, b) for s, c, b in product(SHAPES, COLOURS, COLOURS) if c != b
    ]
    assert 1 / 14 < np.mean([held_out(scene) for scene in every]) < 1 / 10
    for names in (SHAPES, COLOURS):  # no name is held out altogether
        for name in names:
            mine = [held_out(scene) for scene in every if name in str(scene).split()]
            assert 0 < sum(mine) < len(mine) / 3
    words = [
        held_out(Scene((Word("".join(letters), "red"),))) for letters in product(LETTERS, repeat=3)
    ]
    assert 1 / 13 < np.mean(words) < 1 / 11
    assert not any(held_out(Scene((Word(letter, "red"),))) for letter in LETTERS)


def test_held_out_scenes_never_appear_in_training():
    def parts(scene: Scene) -> set:
        return {
            getattr(o, "letters", (o.colour, getattr(o, "shape", ""), scene.background))
            for o in scene.objects
        }

    trained, held = some(800, held=False), some(150, held=True)
    seen = set().union(*map(parts, trained))
    assert not any(map(held_out, trained)) and all(map(held_out, held))
    assert all(parts(scene) - seen for scene in held)
    for edit in islice(edits(0, held=False), 100):
        assert not any(map(shows_held_out, (edit.after, *edit.before)))


def test_equal_seeds_give_equal_scenes_edits_and_drawings():
    assert some(20, seed=3) == some(20, seed=3) != some(20, seed=4)
    assert (
        list(islice(edits(3, None), 20))
        == list(islice(edits(3, None), 20))
        != list(islice(edits(4, None), 20))
    )
    (scene,) = some(1)
    first, again, other = (draw(scene, 64, 48, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (48, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# ------------------------------------------------------------------ layouts


def test_layouts_follow_scenes_and_leave_nothing_open():
    rng = np.random.default_rng(0)
    for scene in some(200):
        layout = arrange(scene, rng)
        assert layout.background == scene.background or scene.background is None
        assert layout.background not in [thing.colour for thing in scene.objects]
        for said, item in zip(scene.objects, layout.items, strict=True):
            assert item.thing == replace(
                said, place=None, **({"size": item.thing.size} if isinstance(said, Object) else {})
            )
            if isinstance(said, Object):
                assert (
                    said.size in (None, item.thing.size) and item.radius == SIZES[item.thing.size]
                )
                assert item.thing.size in sizes(item.thing.pattern)


@pytest.mark.parametrize("width, height", [(256, 256), (128, 128), (256, 160), (160, 320)])
def test_things_stay_inside_and_apart(width, height):
    """No thing crosses the border, and no pixel belongs to two things."""
    rng = np.random.default_rng(0)
    for scene in some(60):
        covered = [ink(item, width, height) for item in arrange(scene, rng).items]
        everything = np.sum(covered, axis=0)
        assert everything.max() <= 1
        for edge in (everything[0], everything[-1], everything[:, 0], everything[:, -1]):
            assert not (edge > 0.5).any()


# ------------------------------------------------------------------ edits


def test_edits_change_only_the_thing_of_their_instruction():
    kinds = Counter()
    for edit in chain(islice(edits(5, None), 400), *islice(families(5), 10)):
        kinds[edit.kind] += 1
        assert unknown_words(edit.instruction) == [] and edit.after not in edit.before
        words = edit.instruction.split()
        before, after = edit.before[0].items, edit.after.items
        same = [item for item in before if item in after]
        if edit.kind in ("colour", "size", "pattern", "shape"):
            (old,), (new,) = (
                [item for item in items if item not in same] for items in (before, after)
            )
            value = getattr(new.thing, edit.kind)
            assert replace(old.thing, **{edit.kind: value}) == new.thing and (old.x, old.y) == (
                new.x,
                new.y,
            )
            assert words[-1] == (value or "plain") and old.thing.shape in words
        elif edit.kind == "background":
            assert before == after and edit.after.background in words
        elif edit.kind == "described":
            assert edit.instruction.endswith(f"{edit.after.background} background")
            assert (
                len(set(after) - set(before)) == 1
                and edit.before[0].background == edit.after.background
            )
        elif edit.kind == "remove":
            (gone,) = set(before) - set(after)
            assert words == ["remove", "the", gone.thing.shape] and set(after) < set(before)
        elif edit.kind == "add":
            (new,) = set(after) - set(before)
            assert edit.instruction.startswith(f"put {new.thing} ") and set(before) < set(after)
        else:
            which = ("first", "second").index(
                next(word for word in words if word in ("first", "second"))
            )
            (item,), (other,) = edit.before[which].items, edit.before[1 - which].items
            colour = edit.kind == "two images: colour"
            wanted = (
                replace(item, thing=replace(item.thing, colour=other.thing.colour))
                if colour
                else item
            )
            assert edit.after == Layout(
                (wanted,), edit.before[which if colour else 1 - which].background
            )
            assert words[1] == item.thing.shape
    assert len(kinds) == 10 and min(kinds.values()) > 15


def test_families_change_each_of_two_things_of_the_same_images():
    for family in islice(families(0), 50):
        layout = family[0].before[0]
        ways = {(edit.before[0], edit.after) for edit in family}
        # an image for each thing without it, and with four changes; and the first one
        assert len(ways) == len(family) and len(set(chain(*ways))) <= 11
        for one, other in permutations(layout.items):
            changes = [
                edit for edit in family if edit.before == (layout,) and one not in edit.after.items
            ]
            assert all(other in edit.after.items for edit in changes)
            assert {"colour", "shape", "remove"} < {edit.kind for edit in changes} and len(
                changes
            ) >= 4
        assert all((edit.after, edit.before[0]) in ways for edit in family if edit.kind != "remove")


# ------------------------------------------------------------------ drawing


def lens(a: float, b: float, d: float) -> float:
    """Return the common area of discs of radii a and b whose centres are d apart."""
    alpha = np.arccos((d * d + a * a - b * b) / (2 * d * a))
    beta = np.arccos((d * d + b * b - a * a) / (2 * d * b))
    return a * a * (alpha - np.sin(2 * alpha) / 2) + b * b * (beta - np.sin(2 * beta) / 2)


@pytest.mark.parametrize(
    "shape, area",
    [
        ("circle", np.pi * 0.95**2),
        ("square", 1.7**2),
        ("ring", np.pi * (1 - 0.48**2)),
        ("triangle", 3 * 3**0.5 / 4 * 1.2**2),
        ("star", 10 * 1.2 * 0.55 * np.sin(np.pi / 5) / 2),
        ("cross", 2 * 0.72 * 2 - 0.72**2),
        ("moon", np.pi * 1.05**2 - lens(1.05, 0.8, 0.55)),
        ("heart", None),
    ],
)
def test_shapes_have_their_area_and_centre(shape, area):
    covered = coverage(shape, 150, 130, 80, 300, 260)
    ys, xs = np.mgrid[:260, :300] + 0.5
    assert area is None or covered.sum() / 80**2 == pytest.approx(area, rel=0.005)
    centre = (xs * covered).sum() / covered.sum(), (ys * covered).sum() / covered.sum()
    assert centre == pytest.approx((150, 130), abs={"moon": 8, "heart": 18}.get(shape, 0.1))
    reach = np.abs(np.argwhere(covered > 0.5) + 0.5 - (130, 150)).max() / 80
    assert 0.8 < reach <= 1.21


@pytest.mark.parametrize(
    "pattern, share",
    [("striped", 0.5), ("hatched", 0.5), ("checkered", 0.5), ("dotted", 1 - np.pi * 0.09)],
)
def test_patterns_cover_their_share_and_are_fixed_in_the_image(pattern, share):
    here, there = (coverage("square", x, 240, 160, 480, 480, pattern) for x in (200, 230))
    inside = np.s_[120:360, 120:320]  # inside the rims of both; six periods of 40
    assert here[inside].mean() == pytest.approx(share, abs=0.02)
    assert np.array_equal(here[inside], there[inside])


@pytest.mark.parametrize("shape, pattern", product(SHAPES, PATTERNS))
def test_patterned_shapes_keep_their_outlines(shape, pattern):
    plain, patterned = (coverage(shape, 128, 128, 53, 256, 256, p) for p in ("", pattern))
    assert (patterned <= plain).all()
    edge = (plain > 0) & (plain < 1)
    assert np.array_equal(patterned[edge], plain[edge])


def test_letters_differ_and_fill_their_squares():
    glyphs = drawing.GLYPHS
    assert list(glyphs) == list(LETTERS) and all(glyph.shape == (7, 5) for glyph in glyphs.values())
    assert all((a != b).sum() >= 2 for a, b in combinations(glyphs.values(), 2))
    assert all(glyph[0].any() and glyph[-1].any() for glyph in glyphs.values())  # full height
    page = ink(Item(Word("HI", "red"), 0.5, ROWS["top"], 0), 256, 256)
    squares = page.reshape(32, 8, 32, 8)
    assert set(np.unique(page)) == {0, 1} and page.sum() == 64 * (
        glyphs["H"].sum() + glyphs["I"].sum()
    )
    assert page[:, :128].any() and page[:, 128:].any() and not page[128:].any()
    assert np.array_equal(squares.max((1, 3)), squares.min((1, 3)))  # squares of 8 pixels


def test_colours_of_an_image_are_those_of_the_scene():
    image = draw(
        Scene((Object("square", "red", "large", "", ""),), None, "blue"),
        96,
        96,
        np.random.default_rng(0),
    )
    assert (
        tuple(image[48, 48]) == COLOURS["red"]
        and tuple(image[0, 0]) == tuple(image[-1, -1]) == COLOURS["blue"]
    )
