"""flux.boxes: rows as diffusers writes and reconciles them, and refusals."""

import json
from copy import deepcopy

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from support.weight_files import refusal

from flux.boxes import (
    add_boxes,
    box_rows,
    is_on_canvas,
    parse_box,
    read_boxes,
    reconcile,
    split_caption,
)

NEW = [
    {"id": "cat_1", "bbox": [0.1, 0.2, 0.5555, 0.9], "desc": "a gray cat"},
    {"bbox": [0, 0, 0.3, 1]},
    {"id": "x", "bbox": [0.0005, 0.0015, 0.0025, 1.0], "desc": "Übung"},
]
EDITS = [
    {
        "id": "moved",
        "from": "ref_image_1",
        "src_bbox": [0, 0, 0.5, 0.5],
        "tgt_bbox": [0.5, 0, 1, 1],
    },
    {"id": "gone", "from": "ref_image_0", "src_bbox": [0, 0, 0.5, 0.5], "tgt_bbox": None},
    {
        "id": "made",
        "from": "target",
        "src_bbox": None,
        "tgt_bbox": [0.25, 0, 1, 1],
        "desc": "a hat",
    },
]


@pytest.mark.parametrize("boxes", [NEW, EDITS, [*NEW, *EDITS]], ids=["new", "edits", "both"])
def test_rows_equal_diffusers(boxes):
    from diffusers.modular_pipelines.flux3.prompt_upsampler import boxes_to_canvas

    assert box_rows(boxes, images=2) == boxes_to_canvas(boxes)


def test_caption_ends_with_the_rows_on_the_same_line():
    from diffusers.modular_pipelines.flux3.prompt_upsampler import split_caption

    text = add_boxes("a <cat_1> near a sign that says [SALE], <x> and <obj_2> \n", NEW)
    assert "\n" not in text and text.startswith("a <cat_1> near") and 'and <obj_2> [{"id"' in text
    caption, rows = split_caption(text)
    assert caption == "a <cat_1> near a sign that says [SALE], <x> and <obj_2>"
    assert rows[0] == {"id": "cat_1", "bbox": [100, 200, 556, 900], "desc": "a gray cat"}
    assert rows[1] == {"id": "obj_2", "bbox": [0, 0, 300, 1000], "desc": ""}
    assert rows[2]["bbox"] == [0, 2, 2, 1000] and "Übung" in text  # halves to even numbers
    with pytest.warns(UserWarning, match="does not say <obj_2>, <x>, as"):
        add_boxes("a <cat_1>", NEW)
    assert "the prompt ends in rows of its own" in refusal(add_boxes, text, NEW)
    numbers = "a <cat_1>, <x>, <obj_2> and the numbers [1, 2]"
    assert add_boxes(numbers, NEW).startswith(f'{numbers} [{{"id"')


def test_box_of_the_command_line_has_x_first():
    box = parse_box("cat:0.2,0.1,0.9,0.5555: a gray cat: asleep")
    assert box == {"id": "cat", "bbox": [0.1, 0.2, 0.5555, 0.9], "desc": "a gray cat: asleep"}
    assert parse_box("a:0,0,1,1")["desc"] == ""
    for text in ("cat", "cat:1,2,3", "cat:a,b,c,d", "cat:0,0,1,1,1", ""):
        assert refusal(parse_box, text).startswith("box: must be NAME:X0,Y0,X1,Y1")


@pytest.mark.parametrize(
    "box, said",
    [
        ({"bbox": [0, 0, 1.1, 1]}, "the box of obj_2 must be y_min"),
        ({"bbox": [-0.1, 0, 1, 1]}, "the box of obj_2 must be y_min"),
        ({"bbox": [0, 0, float("nan"), 1]}, "the box of obj_2 must be y_min"),
        ({"bbox": [0, 0, True, 1]}, "the box of obj_2 must be y_min"),
        ({"bbox": [0, 0, 1]}, "the box of obj_2 must be y_min"),
        ({"bbox": "0011"}, "the box of obj_2 must be y_min"),
        ({"bbox": [0.5, 0, 0.5, 1]}, "the box of obj_2 has no area"),
        ({"bbox": [0, 0.9, 1, 0.1]}, "the box of obj_2 has no area"),
        ({"id": "cat_1", "bbox": [0, 0, 1, 1]}, "two boxes are called 'cat_1'"),
        ({"id": "1 cat", "bbox": [0, 0, 1, 1]}, "the name of box 2 must be letters"),
        ({"id": 7, "bbox": [0, 0, 1, 1]}, "the name of box 2 must be letters"),
        ({"bbox": [0, 0, 1, 1], "desc": 3}, "the description of obj_2 must be text"),
        ({"bbox": [0, 0, 1, 1], "text": "gray"}, "box 2 must have fields of id, from"),
        ("cat", "box 2 must have fields of id, from"),
        ({}, "obj_2 must have `bbox`, or"),
        ({"bbox": [0, 0, 1, 1], "tgt_bbox": [0, 0, 1, 1]}, "obj_2 must have `bbox`, or"),
        ({"tgt_bbox": [0, 0, 1, 1], "from": "ref_image_0"}, "`from` of obj_2 must be"),
        ({"src_bbox": [0, 0, 1, 1], "from": "target"}, "`from` of obj_2 must be"),
        (
            {"src_bbox": [0, 0, 1, 1], "from": "ref_image_1"},
            "comes from ref_image_1, which would be image 2 of 1.",
        ),
    ],
)
def test_wrong_boxes_are_refused(box, said):
    first = {"id": "cat_1", "bbox": [0, 0, 1, 1]}
    assert said in refusal(box_rows, [first, box], images=1)


def test_boxes_of_a_file(tmp_path):
    path = tmp_path / "boxes.json"
    path.write_text(json.dumps(NEW))
    assert read_boxes(path) == NEW
    for content in ("{}", "[1]", "3"):
        path.write_text(content)
        assert "must hold a list" in refusal(read_boxes, path)
    path.write_text("[")
    assert "is not JSON" in refusal(read_boxes, path)
    assert "none.json: does not exist" in refusal(read_boxes, tmp_path / "none.json")


# ------------------------------------------------------------------ captions that others wrote


def test_table_is_split_from_its_caption():
    rows = [{"id": "a", "desc": "says [SALE]"}]
    text = f'a shop that says "[SALE]" {json.dumps(rows)}'
    assert split_caption(text) == ('a shop that says "[SALE]"', rows)
    half = r'a [{"id": "x", "desc": "\ud800"}]'  # which no encoder of text takes
    for alone in (' a shop that says "[SALE]" ', "a [1] b", "[[1]]", 'a [{"id": "x"', half):
        assert split_caption(alone) == (alone.strip(), None)
    assert split_caption("[" * 5000) == ("[" * 5000, None)


def test_boxes_on_the_canvas():
    sound = ([0.5, 0, 5, 5], [0, 0, 1000, 1000], (1, 2, 3, 4))
    wrong = ([0, 0, 1, 1], [0, 0, 1001, 5], [True, 0, 5, 5], [5, 0, 5, 5], [0, 0, 5], "0055", None)
    wrong += ([0, 0, float("nan"), 5], [0, 0, float("inf"), 5], [-1, 0, 5, 5], ["0", 0, 5, 5])
    assert all(map(is_on_canvas, sound)) and not any(map(is_on_canvas, wrong))


def test_locked_boxes_are_kept_and_described():
    """The answer calls the cat an animal, of nearly the same box; ghost_1 is not cited."""
    locked = [
        {"id": "cat_1", "bbox": [100, 200, 556, 900], "desc": ""},
        {"id": "obj_2", "bbox": [0, 0, 300, 1000], "desc": "sky"},
    ]
    answer = [
        {"id": "animal_1", "bbox": [101, 200, 556, 900], "desc": " a gray cat "},
        {"id": "obj_2", "bbox": [7, 7, 8, 8], "desc": "a red sky"},
        {"id": "ghost_1", "bbox": [1, 1, 20, 20], "desc": "a ghost"},
        {"id": "lamp_1", "bbox": [400, 0, 500, 90], "desc": "a lamp"},
    ]
    caption = "An <animal_1> by a <lamp_1> under <obj_2>"
    kept = reconcile(f"{caption} {json.dumps(answer)}", locked)
    said, rows = split_caption(kept)
    assert said == "An <cat_1> by a <lamp_1> under <obj_2>"
    assert rows == [
        {"id": "cat_1", "bbox": [100, 200, 556, 900], "desc": "a gray cat"},
        {"id": "obj_2", "bbox": [0, 0, 300, 1000], "desc": "a red sky"},
        {"id": "lamp_1", "bbox": [400, 0, 500, 90], "desc": "a lamp"},
    ]
    assert reconcile("A <cat_1>.", locked) == f"A <cat_1>. {json.dumps(locked)}"


NAMES = st.sampled_from(["a", "b", "cat_1", "1x", ""])
PLACES = st.sampled_from(
    [[0, 0, 500, 500], [0, 0, 500, 520], [9, 9, 9, 9], [0, 0, 1, 1], None, "x"]
)
ROWS = st.fixed_dictionaries(  # diffusers fails at rows without a name
    {"id": NAMES},
    optional={
        "bbox": PLACES,
        "from": st.sampled_from(["target", "ref_image_0", "ref_image_x", None]),
        "src_bbox": PLACES,
        "tgt_bbox": PLACES,
        "desc": st.sampled_from(["words", " ", None, 3]),
    },
)
LOCKED = st.lists(st.sampled_from(["a", "b", "cat_1"]), unique=True).map(
    lambda names: [
        {"id": name, "bbox": [0, 0, 500, 500 + 20 * i], "desc": "mine"}
        for i, name in enumerate(names)
    ]
)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.one_of(ROWS, st.just(3)), max_size=5), LOCKED)
def test_reconciled_answers_equal_diffusers(rows, locked):
    from diffusers.modular_pipelines.flux3.prompt_upsampler import reconcile_boxes

    text = f"an <a>, <b> and [<cat_1>] {json.dumps(rows)}"
    assert reconcile(text, deepcopy(locked)) == reconcile_boxes(text, deepcopy(locked))
