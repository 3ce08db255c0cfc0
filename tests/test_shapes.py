"""flux.shapes: the captions, the drawing and the check that measures the embedded model.

The truth: the grammar as its docstring has it, areas from school, and pictures that are drawn right, or wrong in one thing.
"""

import re
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest

from flux import shapes
from flux.shapes import COLOURS, PLACES, RELATIONS, SHAPES, SIZES, Object, Scene, check, draw, held_out, scenes, unknown_words

DRAWN = [(128, 128), (160, 96), (192, 192)]  # width, height


def some(count: int, seed: int = 0, held: bool | None = None, complete: bool = True, pair: bool | None = None) -> list[Scene]:
    wanted = (s for s in scenes(seed, held, complete) if pair is None or (s.relation is not None) == pair)
    return list(islice(wanted, count))


# ---------------------------------------------------------------------------------------------------------- grammar


def grammar() -> re.Pattern:
    any_of = lambda words: "(?:" + "|".join(sorted(words, key=len, reverse=True)) + ")"  # noqa: E731
    a = "(?:an(?= orange)|a(?! orange))"
    thing = f"{a} (?:{any_of(SIZES)} )?({any_of(COLOURS)}) {any_of(SHAPES)}"
    place = f"(?: in the center| at the {any_of(place for place in PLACES if place)})?"
    two = f"{thing} {any_of(RELATIONS)} {thing}"
    return re.compile(f"(?:{thing}{place}|{two})(?: on {a} ({any_of(COLOURS)}) background)?")


@pytest.mark.parametrize("complete", [True, False])
def test_captions_follow_the_grammar_in_known_words(complete):
    captions = [str(scene) for scene in some(300, complete=complete)]
    for caption in captions:
        found = grammar().fullmatch(caption)
        colours = [colour for colour in found.groups() if colour]
        assert len(set(colours)) == len(colours) and unknown_words(caption) == []
    text = " ".join(captions)
    assert all(word in text for word in (*SHAPES, *COLOURS, *SIZES, *PLACES, *RELATIONS, "center", "background"))


def test_captions_to_the_letter():
    ring = Object("ring", "blue", "large")
    assert str(Scene((Object("star", "yellow", "small"), ring), "above", "white")) == (
        "a small yellow star above a large blue ring on a white background"
    )
    assert str(Scene((replace(ring, size=None, place=""),))) == "a blue ring in the center"
    assert str(Scene((Object("ring", "orange", None),), None, "orange")) == "an orange ring on an orange background"
    cornered = Scene((replace(ring, place="top left"),), None, "red")
    assert str(cornered) == "a large blue ring at the top left on a red background"


def test_complete_scenes_name_everything():
    for scene in some(100, complete=True):
        assert scene.background and all(o.size for o in scene.objects)
        assert (scene.relation is None) == (len(scene.objects) == 1) == (scene.objects[0].place is not None)


def test_unknown_words():
    assert unknown_words("A Dragon, above a BLUE ring; dragon and 'knight'!") == ["dragon", "and", "knight"]
    assert unknown_words("") == unknown_words(" ... !") == unknown_words("An orange cross, at the top right.") == []


# ---------------------------------------------------------------------------------------------------------- held out


def test_one_combination_in_twelve_is_held_out():
    every = [Scene((Object(s, c),), None, b) for s, c, b in product(SHAPES, COLOURS, COLOURS) if c != b]
    assert 1 / 14 < np.mean([held_out(scene) for scene in every]) < 1 / 10
    for words in (SHAPES, COLOURS):  # and nothing is held out altogether
        for word in words:
            mine = [held_out(scene) for scene in every if word in str(scene).split()]
            assert 0 < sum(mine) < len(mine) / 3


def test_held_out_scenes_never_appear_in_training():
    trained, held = some(500, held=False, complete=False), some(100, held=True, complete=False)
    combinations = {c for scene in trained for c in scene.combinations}
    assert not any(held_out(scene) for scene in trained) and all(held_out(scene) for scene in held)
    assert all(any(c not in combinations for c in scene.combinations) for scene in held)
    assert not {str(scene) for scene in trained} & {str(scene) for scene in held}


def test_scenes_and_pictures_follow_from_their_seeds():
    assert some(20, seed=3) == some(20, seed=3) != some(20, seed=4)
    (scene,) = some(1)
    first, again, other = (draw(scene, 64, 48, np.random.default_rng(seed)) for seed in (1, 1, 2))
    assert first.shape == (48, 64, 3) and first.dtype == np.uint8
    assert np.array_equal(first, again) and not np.array_equal(first, other)


# ---------------------------------------------------------------------------------------------------------- drawing


@pytest.mark.parametrize("shape, area", [
    ("circle", np.pi * 0.95**2), ("square", 1.7**2), ("ring", np.pi * (1 - 0.54**2)), ("triangle", 3 * 3**0.5 / 4 * 1.2**2),
    ("star", 10 * 1.2 * 0.5 * np.sin(np.pi / 5) / 2), ("cross", 2 * 0.66 * 2 - 0.66**2),
])  # fmt: skip
def test_shapes_have_their_area_and_their_centre_of_mass(shape, area):
    covered = shapes.coverage(shape, 150, 130, 80, 300, 260)
    ys, xs = np.mgrid[:260, :300] + 0.5
    assert covered.sum() / 80**2 == pytest.approx(area, rel=0.005) == shapes.AREAS[shape]
    centre = (xs * covered).sum() / covered.sum(), (ys * covered).sum() / covered.sum()
    assert centre == pytest.approx((150, 130), abs=0.1)


def test_colours_of_a_picture_are_those_that_are_named():
    picture = draw(Scene((Object("square", "red", "large", ""),), None, "blue"), 96, 96, np.random.default_rng(0))
    assert tuple(picture[48, 48]) == COLOURS["red"] and tuple(picture[0, 0]) == tuple(picture[-1, -1]) == COLOURS["blue"]


# ---------------------------------------------------------------------------------------------------------- checking


@pytest.mark.parametrize("held", [True, False])
@pytest.mark.parametrize("width, height", DRAWN)
def test_what_is_drawn_is_found_right(width, height, held):
    rng = np.random.default_rng(width)
    verdicts = [check(draw(s, width, height, rng), s) for s in some(34, seed=width, held=held, complete=False)]
    assert np.mean([verdict["all"] for verdict in verdicts]) >= 0.99


def wrongs(scene: Scene) -> list[tuple[str, Scene]]:
    """Each attribute, and the scene with only this one changed. A colour is changed below: what it had is then missing."""
    first, *rest = scene.objects
    change = lambda **new: replace(scene, objects=(replace(first, **new), *rest))  # noqa: E731
    used = {scene.background, *(o.colour for o in scene.objects)}
    out = [
        ("background", replace(scene, background=next(c for c in COLOURS if c not in used))),
        ("shape", change(shape=after(SHAPES, first.shape))),
        ("size", change(size=after(SIZES, first.size))),
    ]
    if scene.relation:
        swapped = {"above": "below", "below": "above", "to the left of": "to the right of", "to the right of": "to the left of"}
        turned = {"above": "to the left of", "below": "to the right of", "to the left of": "below", "to the right of": "above"}
        return out + [("relation", replace(scene, relation=other[scene.relation])) for other in (swapped, turned)]
    return [*out, ("place", change(place=after(PLACES, first.place)))]


def after(words, word: str) -> str:
    words = list(words)
    return words[(words.index(word) + 1) % len(words)]


@pytest.mark.parametrize("pair", [True, False])
def test_one_wrong_attribute_is_found_and_no_other(pair):
    rng, verdicts = np.random.default_rng(1), {}
    for scene in some(12, seed=1, pair=pair):
        for attribute, wrong in wrongs(scene):
            verdict = check(draw(wrong, 128, 128, rng), scene)
            false = {name for name, right in verdict.items() if not right}
            verdicts.setdefault(attribute, []).append(false == {attribute, "all"})
    assert verdicts.keys() == {"background", "shape", "size", "relation" if pair else "place"}
    assert all(all(found) for found in verdicts.values()), verdicts


def test_every_shape_is_told_from_every_other():
    for drawn, size in product(SHAPES, SIZES):
        scene = Scene((Object(drawn, "red", size, ""),), None, "white")
        picture = draw(scene, 128, 128, np.random.default_rng(0))
        for said in SHAPES:
            assert check(picture, replace(scene, objects=(replace(scene.objects[0], shape=said),)))["shape"] == (said == drawn)


def test_wrong_colour_is_found_and_what_is_missing_has_no_attribute():
    for scene in some(12, seed=2):
        free = [c for c in COLOURS if c not in {scene.background, *(o.colour for o in scene.objects)}]
        wrong = replace(scene, objects=(replace(scene.objects[0], colour=free[0]), *scene.objects[1:]))
        verdict = check(draw(wrong, 128, 128, np.random.default_rng(0)), scene)
        assert verdict["background"] and not any(right for name, right in verdict.items() if name != "background")


def test_empty_pictures_and_things_too_many_are_wrong():
    for scene in some(6, seed=3):
        empty = np.broadcast_to(np.uint8(COLOURS[scene.background]), (128, 128, 3))
        verdict = check(empty, scene)
        assert verdict["background"] and not verdict["colour"] and not verdict["all"]
    scene = Scene((Object("circle", "red", "large", "right"),), None, "white")
    picture = draw(scene, 128, 128, np.random.default_rng(0))
    assert check(picture, scene)["all"]
    picture[40:60, 10:30] = COLOURS["green"]
    false = {name for name, right in check(picture, scene).items() if not right}
    assert false == {"colour", "all"}


def test_noise_and_extreme_pictures_have_a_verdict():
    (scene,) = some(1, pair=True)
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    for picture in (noise, np.zeros((64, 64, 3), np.uint8), np.full((16, 256, 3), 255, np.uint8)):
        verdict = check(picture, scene)
        assert verdict.keys() == {*shapes.ATTRIBUTES, "all"} and not verdict["all"]


def test_check_leaves_the_picture_alone_and_repeats_itself():
    (scene,) = some(1, seed=5)
    picture = draw(scene, 128, 128, np.random.default_rng(0))
    before = picture.copy()
    assert check(picture, scene) == check(picture, scene) and np.array_equal(picture, before)
