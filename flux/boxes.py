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
FIELDS = ("id", "from", *BOXES, "desc")
SAME = 0.9  # overlap from which on two boxes are of one thing
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
    except UserError:  # which is a ValueError
        raise
    except ValueError as error:
        raise UserError(f"boxes: {path} is not JSON ({error}).") from None
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
    UserError for a box outside of the image or without area, for a name that occurs twice, and for
    a field that is none of these.
    """
    rows: list[dict[str, Any]] = []
    for number, box in enumerate(boxes, start=1):
        if not isinstance(box, Mapping) or box.keys() - FIELDS:
            raise UserError(
                f"boxes: box {number} must have fields of {', '.join(FIELDS)} alone (got "
                f"{shown(box)})."
            )
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
    """Return the prompt with the rows of boxes after it; warn if it does not cite one of them.

    UserError if the prompt ends in rows already.
    """
    rows = box_rows(boxes, images)
    refuse_rows(prompt)
    uncited = [f"<{row['id']}>" for row in rows if f"<{row['id']}>" not in prompt]
    if uncited:
        warnings.warn(
            f"the prompt does not say {', '.join(uncited)}, as the captions of the training do "
            "where they name the thing in a box",
            stacklevel=2,
        )
    return f"{prompt.rstrip()} {json.dumps(rows, ensure_ascii=False)}"


def refuse_rows(prompt: str) -> None:
    """Raise UserError for a prompt that ends in rows, next to which boxes have no place."""
    if rows_of(prompt):
        raise UserError("boxes: the prompt ends in rows of its own. Leave one of both out.")


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
            f"boxes: {name} comes from {origin}, which would be image {int(found[1]) + 1} of "
            f"{images}. `from` counts images from 0."
        )


# ------------------------------------------------------------------ captions that others wrote


def split_caption(text: str) -> tuple[str, list[Any] | None]:
    """Return the caption, and the JSON list that ends the text; None without such a list.

    A list of lists is no table, and would take long to find in a text of many brackets. One half of
    a surrogate pair, which JSON can spell, is no text.
    """
    for found in reversed(list(re.finditer(r"\[(?!\s*\[)", text))):
        try:
            rows = json.loads(text[found.start() :])
            json.dumps(rows, ensure_ascii=False).encode()
        except (ValueError, RecursionError):
            continue
        return text[: found.start()].rstrip(), rows
    return text.strip(), None


def rows_of(prompt: str) -> list[dict[str, Any]]:
    """Return the rows that end a prompt; none if it ends in no list, or in a list of others."""
    rows = split_caption(prompt)[1] or []
    return rows if all(isinstance(row, dict) and "id" in row for row in rows) else []


def reconcile(text: str, locked: Sequence[Mapping[str, Any]]) -> str:
    """Return a caption that a language model wrote, with the user's boxes in its rows.

    locked: the user's rows, of `box_rows`. They come first and keep their boxes; the model may
    describe them. If the model made a new row of nearly the same box, the row's name becomes the
    locked one. Its other rows follow if they are sound and the caption cites them.
    This is the procedure of Black Forest Labs' code and of diffusers.
    """
    caption, answered = split_caption(text)
    rows = [row for row in answered or [] if isinstance(row, dict)]
    for old, new in _renamed(rows, locked).items():
        caption = caption.replace(f"<{old}>", f"<{new}>")
    described = {row["id"]: row.get("desc") for row in rows if isinstance(row.get("id"), str)}
    merged = []
    for row in locked:
        description = described.get(row["id"])
        said = description.strip() if isinstance(description, str) else ""
        merged.append({**row, "desc": said or row.get("desc", "")})
    for row in rows:
        sound = sound_row(row, caption)
        if sound and all(sound["id"] != other["id"] for other in merged):
            merged.append(sound)
    return f"{caption} {json.dumps(merged, ensure_ascii=False)}"


def _renamed(rows: list[dict], locked: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """Rename the first row whose box is that of a locked row which the answer lacks."""
    names: dict[str, str] = {}
    present, taken = [row.get("id") for row in rows], {row["id"] for row in locked}
    for lock in locked:
        place = _place(lock)
        if lock["id"] in present or place is None:
            continue
        for row in rows:
            old, box = row.get("id"), _place(row)
            if not isinstance(old, str) or old in names or old in taken or not is_on_canvas(box):
                continue
            if overlap(box, place) >= SAME:
                names[old] = lock["id"]
                break
    for row in rows:
        if isinstance(row.get("id"), str):
            row["id"] = names.get(row["id"], row["id"])
    return names


def _place(row: Mapping[str, Any]) -> Any:
    return row.get("bbox") or row.get("tgt_bbox") or row.get("src_bbox")


def sound_row(row: Any, caption: str) -> dict[str, Any] | None:
    """Return a row of an answer, in order, if the caption cites it and it has a place."""
    if not isinstance(row, dict):
        return None
    name, description = row.get("id"), row.get("desc")
    if not (isinstance(name, str) and NAME.fullmatch(name) and f"<{name}>" in caption):
        return None
    if not (isinstance(description, str) and description.strip()):
        return None
    if is_on_canvas(row.get("bbox")):
        return {"id": name, "bbox": list(row["bbox"]), "desc": description.strip()}
    origin, source, target = row.get("from"), row.get("src_bbox"), row.get("tgt_bbox")
    places = [box for box in (source, target) if box is not None]
    if not places or not all(map(is_on_canvas, places)):
        return None
    known = isinstance(origin, str) and re.fullmatch(r"ref_image_\d+|target", origin)
    if not known or (origin == "target") == (source is not None):
        return None
    moved = {"src_bbox": source, "tgt_bbox": target}
    return {"id": name, "from": origin, **moved, "desc": description.strip()}


def is_on_canvas(box: Any) -> bool:
    """Return whether this is a box on the canvas of 0 to 1000, not one in shares of the image."""
    if not isinstance(box, list | tuple) or len(box) != 4:
        return False
    if not all(isinstance(x, int | float) and not isinstance(x, bool) for x in box):
        return False
    y0, x0, y1, x1 = box
    return 0 <= y0 < y1 <= CANVAS and 0 <= x0 < x1 <= CANVAS and max(box) > 1


def overlap(a: Sequence[float], b: Sequence[float]) -> float:
    """Return the area of the intersection of two boxes over that of their union."""
    height, width = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    inner = max(0, height) * max(0, width)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - inner
    return inner / union if union > 0 else 0.0
