"""flux.toy.looking and checking: the layout that is found in an image, and the verdict.

Images are drawn right, also blurred, noisy or compressed; or wrong in one thing that is known.
"""

import io
from dataclasses import replace
from itertools import islice, product

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from flux import toy
from flux.toy import (
    COLOURS,
    PATTERNS,
    PLACES,
    SHAPES,
    SIZES,
    Edit,
    Item,
    Layout,
    Object,
    Scene,
    Word,
    check,
    check_edit,
    draw,
    drawing,
    edits,
    letters_right,
    look,
    scenes,
)
from flux.toy.scenes import COLUMNS, LETTERS, ROWS, arrange, sizes


def drawn(layout: Layout | Scene, size: int = 256, seed: int = 0) -> np.ndarray:
    return draw(layout, size, size, np.random.default_rng(seed))


def soft(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Blur with a Gaussian of one pixel, and add noise of six grey levels."""
    weights = np.exp(-np.square(np.arange(-4, 5)) / 2)
    padded = np.pad(image.astype(np.float32), ((4, 4), (4, 4), (0, 0)), mode="edge")
    height, width = image.shape[:2]
    rows = sum(w * padded[i : i + height] for i, w in enumerate(weights / weights.sum()))
    both = sum(w * rows[:, i : i + width] for i, w in enumerate(weights / weights.sum()))
    return np.rint(both + rng.normal(0, 6, both.shape)).clip(0, 255).astype(np.uint8)


def jpeg(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    file = io.BytesIO()
    Image.fromarray(image).save(file, "jpeg", quality=75)
    return np.asarray(Image.open(file))


WAYS = {"as drawn": lambda image, rng: image, "soft": soft, "jpeg": jpeg}


# ------------------------------------------------------------------ right images


def plain(layout: Layout) -> bool:
    return not any(getattr(item.thing, "pattern", "") for item in layout.items)


@pytest.mark.slow
@pytest.mark.parametrize(
    "way, size, least",
    [("as drawn", 256, 1), ("as drawn", 128, 1), ("soft", 256, 1), ("jpeg", 256, 0.98)],
)
def test_right_drawings_are_right(way, size, least, count=30):
    rng = np.random.default_rng(size)
    laid = [(scene, arrange(scene, rng)) for scene in islice(scenes(size, None), count)]
    right = []
    for scene, layout in laid:
        if size > 128 or plain(layout):
            right.append(check(WAYS[way](drawn(layout, size), rng), scene)["all"])
    for edit in islice(edits(size, None), count // 2):
        if size > 128 or plain(edit.after):
            right.append(check_edit(WAYS[way](drawn(edit.after, size), rng), edit)["all"])
    assert np.mean(right) >= least


@pytest.mark.slow
@pytest.mark.parametrize("width, height", [(256, 192), (160, 320), (512, 512)])
def test_drawings_of_other_sizes_are_right(width, height):
    rng = np.random.default_rng(0)
    for scene in islice(scenes(8, None), 8):
        assert check(draw(scene, width, height, rng), scene)["all"], scene


def test_look_finds_the_layout_of_a_drawing():
    rng = np.random.default_rng(0)
    for scene in islice(scenes(9, None), 12):
        layout = arrange(scene, rng)
        seen = look(drawn(layout))
        assert seen.background == layout.background
        assert {str(replace(item.thing, place=None)) for item in seen.items} == {
            str(item.thing) for item in layout.items
        }
        for item in layout.items:
            (found,) = (other for other in seen.items if other.thing.colour == item.thing.colour)
            if isinstance(item.thing, Object):
                x, y, radius = drawing.place(item, 256, 256)
                assert (found.x * 256, found.y * 256, found.radius * 256) == pytest.approx(
                    (x, y, radius), abs=1.0
                )


# ------------------------------------------------------------------ one thing wrong


def with_item(layout: Layout, number: int, **thing) -> Layout:
    """Change one thing of a layout. Its radius follows its size."""
    items = list(layout.items)
    changed = replace(items[number].thing, **thing)
    items[number] = replace(
        items[number],
        thing=changed,
        radius=SIZES[changed.size] if isinstance(changed, Object) else 0.0,
    )
    return replace(layout, items=tuple(items))


def mirrored(layout: Layout) -> Layout:
    """Exchange the positions of both things."""
    a, b = layout.items
    return replace(layout, items=(replace(a, x=b.x, y=b.y), replace(b, x=a.x, y=a.y)))


def free_colour(layout: Layout, rng: np.random.Generator) -> str:
    taken = [layout.background, *(item.thing.colour for item in layout.items)]
    return str(rng.choice([colour for colour in COLOURS if colour not in taken]))


def wrong_words(letters: str, rng: np.random.Generator) -> list[str]:
    """Change, drop and add one letter, and exchange two."""
    n, new = rng.integers(len(letters)), str(rng.choice(list(LETTERS)))
    words = {
        letters[:n] + new + letters[n + 1 :],
        letters[:n] + letters[n + 1 :],
        letters[:n] + new + letters[n:],
    }
    words |= {letters[: n - 1] + letters[n] + letters[n - 1] + letters[n + 1 :]} if n else set()
    return sorted(word for word in words if word != letters and 1 <= len(word) <= 4)


def wrongs(scene: Scene, layout: Layout, rng: np.random.Generator):
    """Yield a change, the attributes that it makes wrong, and the layout with this change alone."""
    yield "background", {"background"}, replace(layout, background=free_colour(layout, rng))
    for number, (said, item) in enumerate(zip(scene.objects, layout.items, strict=True)):
        thing = item.thing
        yield "colour", None, with_item(layout, number, colour=free_colour(layout, rng))
        if isinstance(thing, Word):
            for word in wrong_words(thing.letters, rng):
                yield "letters", {"letters"}, with_item(layout, number, letters=word)
        else:
            for shape in SHAPES:
                if shape != thing.shape:
                    yield "shape", {"shape"}, with_item(layout, number, shape=shape)
            for pattern in ("", *PATTERNS):
                if pattern != thing.pattern and thing.size in sizes(pattern):
                    yield "pattern", {"pattern"}, with_item(layout, number, pattern=pattern)
            for size in sizes(thing.pattern):
                if size != thing.size and said.size:
                    yield "size", {"size"}, with_item(layout, number, size=size)
        if said.place is not None:
            for place, (row, column) in PLACES.items():
                if place != said.place and (isinstance(thing, Object) or place in ROWS):
                    yield (
                        "place",
                        {"place"},
                        replace(layout, items=(replace(item, x=COLUMNS[column], y=ROWS[row]),)),
                    )
    if scene.relation:
        yield "relation", {"relation"}, mirrored(layout)


@pytest.mark.slow
def test_one_thing_wrong_is_found_and_no_other():
    rng, verdicts = np.random.default_rng(1), {}
    for scene in islice(scenes(2, None, complete=True), 16):
        every = list(wrongs(scene, arrange(scene, rng), rng))
        for change in toy.ATTRIBUTES:
            cases = [(attributes, wrong) for name, attributes, wrong in every if name == change]
            for n in rng.permutation(len(cases))[:2]:
                attributes, wrong = cases[n]
                false = {name for name, right in check(drawn(wrong), scene).items() if not right}
                found = false == attributes | {"all"} if attributes else {"colour", "all"} <= false
                verdicts.setdefault(change, []).append(found)
    assert verdicts.keys() == set(toy.ATTRIBUTES) and min(map(len, verdicts.values())) >= 3
    assert all(all(found) for found in verdicts.values()), verdicts


@pytest.mark.slow
def test_every_shape_and_pattern_is_recognised():
    """Exactly one thing is found: no thing looks like two."""
    for size, shape, pattern in product(SIZES, SHAPES, ("", *PATTERNS)):
        if size in sizes(pattern):
            thing = Object(shape, "red", size, pattern)
            (item,) = look(drawn(Layout((Item(thing, 0.5, 0.5, SIZES[size]),), "white"))).items
            assert item.thing == replace(thing, place="")


def pairs(count: int, seed: int = 0) -> list[tuple[Scene, Layout]]:
    rng = np.random.default_rng(seed)
    found = (
        (scene, arrange(scene, rng))
        for scene in scenes(seed, None, complete=True)
        if scene.relation
    )
    return list(islice(found, count))


@pytest.mark.slow
def test_exchanged_colours_and_patterns_are_wrong():
    for scene, layout in pairs(8):
        (a, b) = (item.thing for item in layout.items)
        if replace(a, colour="") != replace(b, colour=""):
            swapped = with_item(with_item(layout, 0, colour=b.colour), 1, colour=a.colour)
            assert not check(drawn(swapped), scene)["all"]
        if a.pattern != b.pattern and "small" not in (a.size, b.size):
            swapped = with_item(with_item(layout, 0, pattern=b.pattern), 1, pattern=a.pattern)
            assert not check(drawn(swapped), scene)["pattern"]


@pytest.mark.slow
def test_missing_and_extra_things_are_wrong():
    rng = np.random.default_rng(2)
    for scene, layout in pairs(5):
        for number in (0, 1):
            fewer = check(drawn(replace(layout, items=layout.items[number : number + 1])), scene)
            assert not fewer["colour"] and not fewer["relation"] and not fewer["all"]
        for colour in (free_colour(layout, rng), scene.objects[0].colour):  # a new or a used one
            x, y = (0.12, 0.12) if scene.relation in ("above", "below") else (0.12, 0.88)
            third = Item(Object(str(rng.choice(SHAPES)), colour, "small"), x, y, SIZES["small"])
            more = check(drawn(replace(layout, items=(*layout.items, third))), scene)
            assert not more["all"]
            assert colour == scene.objects[0].colour or not more["colour"]


@pytest.mark.slow
@pytest.mark.parametrize("side", ["left", "right", "upper", "lower"])
def test_half_a_thing_is_wrong(side):
    rng = np.random.default_rng(3)
    singles = (scene for scene in scenes(3, None, complete=True) if not scene.relation)
    for scene in islice(singles, 8):
        layout = arrange(scene, rng)
        image = drawn(layout)
        thing = np.argwhere((image != image[0, 0]).any(-1))
        (top, left), (bottom, right) = thing.min(0), thing.max(0) + 1
        y, x = (top + bottom) // 2, (left + right) // 2
        erased = {
            "left": np.s_[:, :x],
            "right": np.s_[:, x:],
            "upper": np.s_[:y],
            "lower": np.s_[y:],
        }[side]
        image[erased] = image[0, 0]
        verdict = check(image, scene)
        assert verdict["background"] and not verdict["all"]
        assert not verdict.get("shape") and not verdict.get("letters")


# ------------------------------------------------------------------ words


@pytest.mark.slow
def test_every_letter_is_read():
    for start in range(0, 26, 2):
        for letters in (
            LETTERS[start : start + 2],
            LETTERS[start],
            LETTERS[start + 1],
            LETTERS[start : start + 3][::-1] + "I",
        ):
            word = Word(letters, "blue", "top")
            image = soft(drawn(Scene((word,), None, "yellow")), np.random.default_rng(start))
            assert check(image, Scene((word,), None, "yellow"))["all"]
            assert letters_right(image, word) == len(letters)


def test_letters_count_at_their_position_only():
    image = drawn(Scene((Word("FLUX", "black"),), None, "white"))
    for said, count in {"FLUX": 4, "FLAX": 3, "LFUX": 2, "FLU": 3, "LUX": 0, "JAZZ": 0}.items():
        assert letters_right(image, Word(said, "black")) == count
        assert check(image, Scene((Word(said, "black"),)))["letters"] == (said == "FLUX")
    assert letters_right(image, Word("FLUX", "red")) == 0


def test_spoilt_letter_is_wrong():
    """A letter may miss up to three of its squares, and no two letters are closer than two."""
    glyphs = {letter: drawing.GLYPHS[letter] > 0 for letter in LETTERS}
    assert min((glyphs[a] ^ glyphs[b]).sum() for a, b in product(LETTERS, LETTERS) if a < b) >= 2
    image = drawn(Scene((Word("HE", "black"),), None, "white"))
    assert letters_right(image, Word("HE", "black")) == 2
    ink = np.argwhere((image == 15).all(-1))
    (top, left), bottom = ink.min(0), ink[:, 0].max() + 1
    image[top + 28 : bottom, left : left + 41] = 250  # the lower half of the H
    assert letters_right(image, Word("HE", "black")) == 1


# ------------------------------------------------------------------ edits


def size_of(radius: float) -> str:
    return min(SIZES, key=lambda size: abs(SIZES[size] - radius))


def wrong_results(edit: Edit, rng: np.random.Generator):
    """Yield a change, and the layout with this change alone."""
    after = edit.after
    yield "background", replace(after, background=free_colour(after, rng))
    if edit.before[0] != after:
        yield "nothing done", edit.before[0]
    third = Item(Object("ring", free_colour(after, rng)), 0.1, 0.1, SIZES["small"])
    yield "third", replace(after, items=(*after.items, third))
    for number, item in enumerate(after.items):
        x, y = item.x - np.sign(item.x - 0.5 + 1e-9) * 0.15, item.y
        away = after.items[:number] + (replace(item, x=x, y=y),) + after.items[number + 1 :]
        if edit.kind != "add" or number == 1:
            yield "place", replace(after, items=away)
        size = item.thing.size or size_of(item.radius)
        thing = replace(item.thing, size=size)
        others = after.items[:number], after.items[number + 1 :]
        sized = replace(after, items=(*others[0], replace(item, thing=thing), *others[1]))
        shape = str(rng.choice([shape for shape in SHAPES if shape != thing.shape]))
        pattern = str(rng.choice([p for p in ("", *PATTERNS) if p != thing.pattern]))
        yield "colour", with_item(sized, number, colour=free_colour(after, rng))
        yield "shape", with_item(sized, number, shape=shape)
        yield "pattern", with_item(sized, number, pattern=pattern)
        if item.thing.size and len(sizes(thing.pattern)) > 1:
            size = str(rng.choice([size for size in sizes(thing.pattern) if size != thing.size]))
            yield "size", with_item(sized, number, size=size)
        yield "colour", replace(after, items=after.items[:number] + after.items[number + 1 :])
    if edit.kind == "add":
        yield "relation", mirrored(after)


@pytest.mark.slow
def test_one_thing_wrong_in_an_edit_is_found():
    rng, verdicts = np.random.default_rng(4), {}
    for edit in islice(edits(4, None), 14):
        for change, wrong in wrong_results(edit, rng):
            verdict = check_edit(drawn(wrong), edit)
            verdicts.setdefault(change, []).append(not verdict["all"] and not verdict.get(change))
    assert verdicts.keys() == {*toy.ATTRIBUTES, "nothing done", "third"} - {"letters"}
    assert all(all(found) for found in verdicts.values()), verdicts


def test_new_thing_may_have_any_open_size_and_any_position_in_its_relation():
    old = Item(Object("star", "red", "medium"), 0.5, 0.75, SIZES["medium"])
    new = Item(Object("ring", "blue"), 0.5, 0.25, SIZES["small"])
    edit = Edit(
        "put a blue ring above the star",
        (Layout((old,), "white"),),
        Layout((new, old), "white"),
        "add",
    )
    for size, x in product(SIZES, (0.45, 0.55)):
        moved = replace(new, x=x, radius=SIZES[size])
        assert check_edit(drawn(replace(edit.after, items=(moved, old))), edit)["all"]
    beside = check_edit(drawn(replace(edit.after, items=(replace(new, x=0.15, y=0.6), old))), edit)
    assert {name for name, right in beside.items() if not right} == {"relation", "all"}
    said = replace(
        edit,
        after=replace(
            edit.after, items=(replace(new, thing=replace(new.thing, size="large")), old)
        ),
    )
    assert not check_edit(drawn(edit.after), said)["size"]


# ------------------------------------------------------------------ any image


@settings(max_examples=20, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    sides=st.sampled_from([(64, 64), (16, 256), (128, 128), (40, 24)]),
    kind=st.sampled_from(["noise", "flat", "boxes"]),
)
@pytest.mark.slow
def test_any_image_has_a_verdict(seed, sides, kind):
    rng = np.random.default_rng(seed)
    scene, edit = next(scenes(seed, None)), next(edits(seed, None))
    image = np.broadcast_to(rng.integers(0, 256, 3, np.uint8), (*sides, 3)).copy()
    if kind == "noise":
        image = rng.integers(0, 256, (*sides, 3), np.uint8)
    for _ in range(6 if kind == "boxes" else 0):
        top, left = (rng.integers(0, side) for side in sides)
        bottom, right = top + rng.integers(1, 40), left + rng.integers(1, 40)
        image[top:bottom, left:right] = rng.integers(0, 256, 3)
    before = image.copy()
    verdict = check(image, scene)
    assert verdict == check(image, scene) and np.array_equal(image, before)
    assert not verdict["all"] and not check_edit(image, edit)["all"]
    assert all(type(right) is bool for right in verdict.values())


def test_verdict_has_the_attributes_of_the_caption():
    def seen(*objects, **other):
        return check(drawn(Scene((Object("ring", "red"),))), Scene(objects, **other)).keys()

    assert seen(Object("ring", "red")) == {"colour", "shape", "pattern", "all"}
    assert seen(Object("ring", "red", "small", "", "top"), background="blue") == {
        "background",
        "colour",
        "shape",
        "pattern",
        "size",
        "place",
        "all",
    }
    assert seen(Word("AB", "red", "")) == {"colour", "letters", "place", "all"}
    assert "relation" in seen(Object("ring", "red"), Object("star", "blue"), relation="above")


def test_scores_are_shares_of_right_images():
    good = Scene((Object("ring", "red"),), None, "white")
    bad = Scene((Object("star", "red"),), None, "white")
    words = Scene((Word("AB", "blue"),)), Scene((Word("AC", "blue"),))
    ring, letters = drawn(good), drawn(words[0])
    assert toy.score([ring, ring, letters, letters], [good, bad, *words]) == {
        "background": 1,
        "colour": 1,
        "shape": 0.5,
        "pattern": 1,
        "letters": 0.5,
        "all": 0.5,
        "each letter": 0.75,
    }
    edit = next(edits(0, None))
    assert toy.score_edits([drawn(edit.after), ring], [edit, edit])["all"] == 0.5
