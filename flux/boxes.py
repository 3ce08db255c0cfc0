"""Bounding boxes for FLUX 3: rows of JSON after the caption, as the model was trained on.

    a <cat> on a sofa [{"id": "cat", "bbox": [100, 200, 556, 900], "desc": "a gray cat"}]

The caption cites each row's id. A box is [y_min, x_min, y_max, x_max] on a canvas of 0 to 1000,
from the top left. Boxes are text alone: they say where things should be, and mask nothing.
"""

import json
import re
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from flux.arguments import shown
from flux.errors import UserError
from flux.plain_files import MAX_JSON, parse_json, read_plain_file

CANVAS = 1000
NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]*")
ORIGIN = re.compile(r"ref_image_(\d{1,2})|target")
BOXES = ("bbox", "src_bbox", "tgt_bbox")
ORDER = "y_min, x_min, y_max, x_max, as shares of the height and width from 0 to 1"


def parse_box(text: str) -> dict[str, Any]:
    """Parse "NAME:X0,Y0,X1,Y1[:DESCRIPTION]", shares of the width and height from 0 to 1."""
    name, _, rest = text.partition(":")
    numbers, _, description = rest.partition(":")
    try:
        x0, y0, x1, y1 = map(float, numbers.split(","))
    except ValueError:
        raise UserError(
            f"box: must be NAME:X0,Y0,X1,Y1 or NAME:X0,Y0,X1,Y1:DESCRIPTION (got {text!r:.120})."
        ) from None
    return {"id": name.strip(), "bbox": [y0, x0, y1, x1], "desc": description.strip()}


def read_boxes(path: Path) -> list[dict[str, Any]]:
    """Read a JSON list of boxes: see `box_rows`. UserError if the file has no such list."""
    try:
        content = parse_json(read_plain_file(path, MAX_JSON, "a list of boxes"))
    except ValueError as error:
        raise UserError(f"boxes: {path} is not JSON ({error}).") from None
    except OSError as error:
        raise UserError(f"boxes: {path} cannot be read ({error.strerror}).") from None
    if not (isinstance(content, list) and all(isinstance(row, dict) for row in content)):
        raise UserError(
            f'boxes: {path} must hold a list, such as [{{"id": "cat", "bbox": [...]}}].'
        )
    return content


def box_rows(boxes: Sequence[Mapping[str, Any]], images: int = 0) -> list[dict[str, Any]]:
    """Return the rows of the model's table.

    boxes: {"id", "bbox", "desc"} for something to make; for an edit {"id", "from", "src_bbox",
        "tgt_bbox", "desc"}, where "from" is "ref_image_0" and so on, or "target" without a source.
        A source without a target is removed. Boxes are [y_min, x_min, y_max, x_max], from 0 to 1.
        Without an id, a box is called obj_1, obj_2 and so on.
    images: the number of references.
    UserError for a box outside of the image or without area, and for a name that occurs twice.
    """
    rows: list[dict[str, Any]] = []
    for number, box in enumerate(boxes, start=1):
        name = box.get("id") or f"obj_{number}"
        if not (isinstance(name, str) and NAME.fullmatch(name)):
            raise UserError(
                f"boxes: the name of box {number} must be letters, digits and _ (got "
                f"{shown(name)}). Use a name such as cat_1."
            )
        if any(row["id"] == name for row in rows):
            raise UserError(f"boxes: two boxes are called {name!r:.60}. Rename one.")
        description = box.get("desc") or ""
        if not isinstance(description, str):
            raise UserError(f"boxes: the description of {name} must be text.")
        places = {key: _to_canvas(name, box[key]) for key in BOXES if box.get(key) is not None}
        if "bbox" in places and len(places) == 1 and not box.get("from"):
            rows.append({"id": name, **places, "desc": description})
            continue
        if "bbox" in places or not places:
            raise UserError(f"boxes: {name} must have `bbox`, or `src_bbox` and `tgt_bbox`.")
        origin = box.get("from") or ("ref_image_0" if "src_bbox" in places else "target")
        _check_origin(name, origin, "src_bbox" in places, images)
        row = {"id": name, "from": origin, "src_bbox": None, "tgt_bbox": None}
        rows.append(row | places | {"desc": description})
    return rows


def add_boxes(prompt: str, boxes: Sequence[Mapping[str, Any]], images: int = 0) -> str:
    """Return the prompt with the rows of boxes after it; warn if it does not cite one of them."""
    rows = box_rows(boxes, images)
    uncited = [f"<{row['id']}>" for row in rows if f"<{row['id']}>" not in prompt]
    if uncited:
        warnings.warn(
            f"the prompt does not say {', '.join(uncited)}, as the captions of the training do "
            "where they name the thing in a box",
            stacklevel=2,
        )
    return f"{prompt.rstrip()} {json.dumps(rows, ensure_ascii=False)}"


def _to_canvas(name: str, box: Any) -> list[int]:
    """Return a box from 0 to 1 on the canvas. Halves are rounded to even numbers."""
    sound = isinstance(box, Sequence) and not isinstance(box, str) and len(box) == 4
    numbers = sound and all(isinstance(x, int | float) and not isinstance(x, bool) for x in box)
    if not (numbers and all(0 <= x <= 1 for x in box)):
        raise UserError(f"boxes: the box of {name} must be {ORDER} (got {shown(box)}).")
    y0, x0, y1, x1 = (round(x * CANVAS) for x in map(float, box))
    if y0 >= y1 or x0 >= x1:
        raise UserError(
            f"boxes: the box of {name} has no area (got {shown(box)}). It must be {ORDER}."
        )
    return [y0, x0, y1, x1]


def _check_origin(name: str, origin: Any, has_source: bool, images: int) -> None:
    found = ORIGIN.fullmatch(origin) if isinstance(origin, str) else None
    if not found or (origin == "target") == has_source:
        raise UserError(
            f'boxes: `from` of {name} must be "ref_image_0" and so on with `src_bbox`, and '
            f'"target" without (got {shown(origin)}).'
        )
    if has_source and int(found[1]) >= images:
        raise UserError(
            f"boxes: {name} comes from {origin}, but there are {images} images, counted from 0."
        )
