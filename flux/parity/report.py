"""Write a comparison as one HTML page that needs no other file: figures are embedded as PNG.

The page has no script, every text from a file is escaped, and the page is well-formed XML.
"""

import base64
import io
import math
import re
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from html import escape
from itertools import groupby
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from flux.atomic_files import make_folder
from flux.errors import UserError, WriteError
from flux.image_io.output import write_exclusive
from flux.parity import figures
from flux.parity.capture_file import Capture, token_norms
from flux.parity.compare import (
    INCOMPLETE,
    Row,
    about_copies,
    about_tolerances,
    coverage,
    exit_code,
    first_over,
    format_ulp,
    verdict,
)

IMAGE = "image"
OPEN = 200  # show all rows at once up to this number, else those of the first part over tolerance


def write(
    a: Capture,
    b: Capture,
    rows: Sequence[Row],
    path: str | Path,
    png: str | Path | None = None,
    missing: Sequence[str] = (),
) -> list[Path]:
    """Write the page, and its figures and images into the folder `png`. Return the new files.

    `path`: an .html file, or a folder. `rows`: of `compare(a, b)`, and `missing` of the function
    of that name. UserError without rows, without
    matplotlib, and where files cannot be written. Existing files are never overwritten.
    """
    path, folder = page_path(path), Path(png) if png else None
    check_output(path, folder)
    if not rows:
        raise UserError(f"{a.path}: no tensor was compared with {b.path}. There is no report.")
    text, pngs = page(a, b, rows, missing)
    files = {path: text.encode()}
    if folder:
        files |= {folder / f"{name}.png": data for name, data in pngs.items()}
    written: list[Path] = []
    try:
        for target, data in files.items():
            written.append(write_exclusive(target, partial(_write_bytes, data)))
    except OSError as error:
        for target in written:  # all or nothing
            target.unlink()
        raise WriteError(
            f"output: {path} cannot be written ({error.strerror}). Make room, or choose another "
            "folder."
        ) from None
    return written


def _write_bytes(data: bytes, file: BinaryIO) -> None:
    file.write(data)


def page_path(path: str | Path) -> Path:
    """Return the page's file: report.html inside of a folder."""
    path = Path(path)
    return path / "report.html" if path.is_dir() or not path.suffix else path


def check_output(path: str | Path, folder: str | Path | None = None) -> None:
    """Raise UserError if matplotlib is missing or a file cannot be written."""
    figures.check_matplotlib()
    path = page_path(path)
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"output: must be an .html file or a folder (got {path}).")
    for field, place in (("output", path.parent), ("png", Path(folder) if folder else None)):
        try:
            if place is not None:
                make_folder(place)
                with tempfile.NamedTemporaryFile(dir=place):
                    pass
        except OSError as error:
            raise UserError(
                f"{field}: cannot write to {place} ({error.strerror}). Choose another folder."
            ) from None


def page(
    a: Capture, b: Capture, rows: Sequence[Row], missing: Sequence[str] = ()
) -> tuple[str, dict[str, bytes]]:
    """Return the HTML, and its figures and images as PNG by name."""
    first = first_over(rows)
    grid = token_errors(a, b, first) if first and first.errors else None
    drawn = {
        "depth": figures.along_run(rows),
        "tokens": None if grid is None else figures.by_token(grid),
        "blocks": figures.by_block(rows),
        "steps": figures.by_step(rows),
    }
    images, about = images_of(a, b)
    pngs = {name: data for name, data in drawn.items() if data}
    pngs |= {name: png_of(image) for name, image in images.items()}
    shown = "".join(img(pngs, name, IMAGE_NAMES[name]) for name in images)
    body = [
        heading(a, b, rows, missing),
        section("Error along the run", ALONG_RUN, img(pngs, "depth")),
        first_over_tolerance(first, img(pngs, "tokens")),
        section("Blocks by steps", BY_BLOCK, img(pngs, "blocks")) if "blocks" in pngs else "",
        section("Error by step", BY_STEP, img(pngs, "steps")) if "steps" in pngs else "",
        section("The images", escaped(about), f'<div class="images">{shown}</div>'),
        recipes(a, b),
        all_rows(rows),
    ]
    title = f"parity: {escaped(a.path.name)}"
    return PAGE.format(title=title, body="\n".join(filter(None, body))), pngs


ALONG_RUN = "Relative L2 of every tensor to the reference, in the order of execution."
BY_BLOCK = "In each cell, the tensor with the largest multiple of its tolerance."
BY_STEP = "The growth of rounding, or of a fault, from step to step."
IMAGE_NAMES = {"image-a": "A, judged", "image-b": "B, the reference", "difference": "difference"}
COLUMNS = (
    "rel. L2",
    "tolerance",
    "× tolerance",
    "worst token",
    "|a|/|b| − 1",
    "max |a − b|",
    "1 − PCC",
    "ULP p50 / p99 / max",
)
PAGE = """<!DOCTYPE html>
<html lang="en"><head><meta charset="utf-8"/>
<meta name="viewport" content="width=device-width, initial-scale=1"/>
<title>{title}</title><style>
body {{ font: 15px/1.5 system-ui, sans-serif; max-width: 1200px; margin: 2em auto; padding: 0 1em }}
code, td, tbody th {{ font-family: ui-monospace, monospace; font-size: 13px }}
table {{ border-collapse: collapse }}
th, td {{ padding: 2px 8px; text-align: left; border-top: 1px solid #ddd; overflow-wrap: anywhere }}
.over {{ color: #d55e00; font-weight: 600 }}
.rows td {{ text-align: right; white-space: nowrap }}
.scroll {{ overflow-x: auto }}
img {{ max-width: 100% }}
figure {{ margin: 0 }}
.images figure {{ display: inline-block; margin: 0 1em 1em 0 }}
@media (max-width: 700px) {{
  body {{ margin: 1em auto }}
  .chart {{ overflow-x: auto }}
  .chart img {{ max-width: none; width: 860px }}
}}
</style></head>
<body>
{body}
</body></html>
"""


# ---------------------------------------------------------------- text


def escaped(value: object) -> str:
    """Return text without markup, control characters and halves of surrogate pairs."""
    allowed = "[^\t\n\r\x20-\ud7ff\ue000-\ufffd\U00010000-\U0010ffff]"
    return escape(re.sub(allowed, "\ufffd", str(value)))


def number(value: float, form: str = ".2e") -> str:
    """Return 0 for exactly 0, and a dash for an unknown number."""
    if math.isnan(value):
        return "–"
    if math.isinf(value):
        return "∞"
    return "0" if value == 0 else format(value, form)


def section(title: str, text: str, body: str) -> str:
    return f"<section><h2>{title}</h2><p>{text}</p>{body}</section>"


def table(lines: Iterable[tuple[str, str]]) -> str:
    rows = "".join(
        f'<tr><th scope="row">{escaped(name)}</th><td>{escaped(value)}</td></tr>'
        for name, value in lines
    )
    return f'<div class="scroll"><table><tbody>{rows}</tbody></table></div>'


def img(pngs: dict[str, bytes], name: str, caption: str = "") -> str:
    if name not in pngs:
        return ""
    data = base64.b64encode(pngs[name]).decode()
    kind = "" if caption else ' class="chart"'  # which scrolls on a small screen
    return (
        f'<figure{kind}><img alt="{escaped(caption or name)}" src="data:image/png;base64,{data}"/>'
        f"<figcaption>{escaped(caption)}</figcaption></figure>"
    )


# ---------------------------------------------------------------- the verdict


def heading(a: Capture, b: Capture, rows: Sequence[Row], missing: Sequence[str] = ()) -> str:
    """Return the verdict, the two files, and what limits the comparison."""
    first, text = first_over(rows), verdict(rows, missing)
    notes = [coverage(rows, b, a), about_copies(rows, a, b), about_tolerances(rows, a, b)]
    for capture in (a, b):
        if "stopped" in capture.recipe:
            notes.append(f"{capture.path} stopped early: {capture.recipe['stopped']}")
    titles = {0: "Within tolerance", 1: "Nothing was compared", INCOMPLETE: "Incomplete"}
    code = exit_code(rows, missing)
    title, mark = "Over tolerance" if first else titles[code], ' class="over"' if code else ""
    head = f"<h1{mark}>{title}</h1>"
    link = f'<p><a href="#first"><code>{escaped(first.name)}</code></a></p>' if first else ""
    lines = "".join(f'<p class="note">{escaped(note)}</p>' for note in notes if note)
    return (
        f"<header>{head}{link}<p>{escaped(text[:1].upper() + text[1:])}.</p>"
        f"<p>A, judged: <code>{escaped(a.path)}</code><br/>"
        f"B, the reference: <code>{escaped(b.path)}</code></p>{lines}</header>"
    )


def first_over_tolerance(row: Row | None, figure: str) -> str:
    """Return every number of the first tensor over tolerance, and the map of its tokens."""
    if row is None:
        return ""
    facts = [("shape", "×".join(map(str, row.shape))), ("dtype", row.dtype), ("stored", row.kind)]
    if row.errors is None:
        facts.append(("fault", row.fault))
    else:
        e = row.errors
        facts += [
            ("relative L2", number(e.relative_l2)),
            ("tolerance", number(row.tolerance)),
            ("multiple of the tolerance", number(row.ratio, ".3g")),
            ("worst token", f"{number(e.worst_token)} at {e.worst_token_at}"),
            ("|a| / |b|", number(e.norm_ratio, ".6g")),
            ("largest |a − b|", f"{number(e.max_abs)} at {e.worst_index}"),
            ("cosine", number(e.cosine, ".9f")),
            ("1 − PCC", number(1 - e.pcc)),
            ("ULP p50, p99, max", ", ".join(f"{n:,}" for n in e.ulp)),
            ("NaN or infinite", f"{e.nonfinite:,}, misplaced {e.misplaced:,}"),
        ]
    missing = "<p>Its tokens are not on the latent grid, or were not stored.</p>"
    name = f"<code>{escaped(row.name)}</code>"
    return section("The first tensor over tolerance", name, table(facts) + (figure or missing))


# ---------------------------------------------------------------- tokens


def token_errors(a: Capture, b: Capture, row: Row) -> np.ndarray | None:
    """Return the relative L2 of each token of an image, (rows, columns); None of other tensors.

    Of a decoder's (B, C, H, W): of each pixel, pooled to at most 64 x 64. Of a batch: the worst.
    """
    name, ids = row.name, None
    for capture in (a, b):
        if "ids/img" in capture.tensors.names:
            ids = image_positions(capture.tensors)
    if row.kind in ("slice", "statistics"):
        return None
    if spatial(name, row.shape):
        if row.kind != "full":
            return None
        x, y = (c.tensors[name].double().movedim(1, -1) for c in (a, b))  # (B, H, W, C)
        found = relative((x - y).norm(dim=-1), y.norm(dim=-1)).amax(0)
        most = [min(size, 64) for size in found.shape]
        return adaptive_max_pool2d(found[None], most)[0].numpy()
    if row.kind == "full":
        x, y = (c.tensors[name].double() for c in (a, b))
        found = relative(token_norms(x - y), token_norms(y))
    else:
        x, y = (
            c.tokens(name) if c.kind(name) == "probe" else token_norms(c.tensors[name])
            for c in (a, b)
        )
        found = relative((x - y).abs(), y)
    return on_grid(found, name, ids)


def relative(distance: Tensor, norm: Tensor) -> Tensor:
    """Return |a - b| / |b| with |b| at least a tenth of the RMS norm, as `compare` does."""
    finite = norm.isfinite() & distance.isfinite()
    floor = norm[finite].double().square().mean().sqrt() / 10 if finite.any() else torch.tensor(0.0)
    found = distance.double() / norm.double().clamp(min=floor) if floor else distance.double()
    return found.where(finite, math.inf)


def spatial(name: str, shape: Sequence[int]) -> bool:
    """Return whether a tensor is (B, C, h, w), not attention's (B, heads, N, d)."""
    convolved = name.startswith(("decoder/", "encoder.")) and "/attention/" not in name
    latents = name in ("noise", "pixels") or name.endswith("/latents")
    return len(shape) == 4 and (convolved or latents)


def image_positions(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return positions (t, row, column, ...) of the image, then of references; t of an image is 0.

    FLUX 3 halves rows and columns, and tells references by the last axis, in ids of their own.
    """
    ids = tensors["ids/img"]
    if not ids.is_floating_point():
        return ids
    if "ids/references" in tensors:
        ids = torch.cat([ids, tensors["ids/references"]])
    return torch.cat([-ids[:, 3:], 2 * ids[:, 1:3]], dim=1)


def on_grid(found: Tensor, name: str, ids: Tensor | None) -> np.ndarray | None:
    """Map tokens (B, N) to the image's (rows, columns): text may precede, references follow."""
    text = (
        name.startswith("text/")
        or "txt" in name
        or "image_cond" in name  # references of FLUX 3, by themselves
        or re.search(r"double_blocks\.\d+/(in|out)\.1$", name)
    )
    if text or found.ndim != 2 or ids is None or ids.ndim != 2 or ids.shape[1] < 3:
        return None
    own = ids[ids[:, 0] == 0].long()  # (t, row, column): references have another t
    count = found.shape[1]
    joined = count > len(ids) and ("single_blocks" in name or "/attention/" in name)
    if not len(own) or not (joined or count in (len(own), len(ids))):
        return None
    rows, columns = (own[:, axis] - own[:, axis].min() for axis in (1, 2))
    size = int(rows.max()) + 1, int(columns.max()) + 1
    if size[0] * size[1] != len(own):
        return None
    before = count - len(ids) if joined else 0
    grid = torch.zeros(size, dtype=torch.float64)
    grid[rows, columns] = found.amax(0)[before : before + len(own)]
    return grid.numpy()


# ---------------------------------------------------------------- images


def images_of(a: Capture, b: Capture) -> tuple[dict[str, Image.Image], str]:
    """Return both images and their amplified difference, as far as stored, and a sentence."""
    arrays: dict[str, np.ndarray] = {}
    for side, capture in (("a", a), ("b", b)):
        record = capture.records.get(IMAGE)
        if record and (record.kind, record.dtype) == ("full", "U8") and record.shape[2:] == (3,):
            arrays[f"image-{side}"] = capture.tensors[IMAGE].numpy()
    images = {name: Image.fromarray(array) for name, array in arrays.items()}
    if len(arrays) < 2:
        missing = [str(x.path) for side, x in zip("ab", (a, b)) if f"image-{side}" not in arrays]
        return images, f'No image is in {" or in ".join(missing)}. Capture it with keep="full".'
    x, y = (array.astype(np.int64) for array in arrays.values())
    if x.shape != y.shape:
        sizes = " and ".join(f"{w}×{h}" for h, w, _ in (x.shape, y.shape))
        return images, f"The images are {sizes} pixels, so they have no difference to show."
    distance = np.abs(x - y)
    largest = int(distance.max(initial=0))
    if not largest:
        return images, "The images are equal in every pixel."
    factor = 255 // largest
    images["difference"] = Image.fromarray((distance * factor).astype(np.uint8))
    share, psnr = (distance > 0).mean(), 10 * math.log10(255**2 / (distance**2).mean())
    return images, (
        f"They differ by at most {largest} of 255, in {share:.2g} of the values; "
        f"PSNR {psnr:.1f} dB. The difference is |A − B|, {factor} times as bright."
    )


def png_of(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- recipes and rows


def recipes(a: Capture, b: Capture) -> str:
    """Return both recipes, line by line; lines that differ are marked."""
    ours, theirs = dict(flat(a.recipe)), dict(flat(b.recipe))
    lines, differing = [], 0
    for key in dict.fromkeys([*theirs, *ours]):
        x, y = ours.get(key, "–"), theirs.get(key, "–")
        differing += x != y
        mark, style = ("≠", ' class="over"') if x != y else ("", "")
        cells = "".join(f"<td>{escaped(text)}</td>" for text in (mark, x, y))
        lines.append(f'<tr{style}><th scope="row">{escaped(key)}</th>{cells}</tr>')
    text = f"Lines that differ, marked with ≠: {differing} of {len(lines)}."
    if not lines:
        text = "Neither file has a recipe."
    rows = f'<table class="recipe"><tbody>{"".join(lines)}</tbody></table>'
    body = f'<div class="scroll">{rows}</div>' if lines else ""
    return section("The recipes", text, body)


def flat(value: object, key: str = "") -> Iterator[tuple[str, str]]:
    """Yield a recipe as lines: `versions.torch`, `files.transformer.0.sha256`."""
    items: Iterable[tuple[object, object]] | None = None
    if isinstance(value, dict):
        items = value.items()
    elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
        items = enumerate(value)
    if items is not None:
        for name, item in items:
            yield from flat(item, f"{key}.{name}" if key else str(name))
    elif isinstance(value, list):
        yield key, ", ".join(map(str, value))
    else:
        yield key, str(value)


def all_rows(rows: Sequence[Row]) -> str:
    """Return every row, folded by the part of the run."""
    first, parts = first_over(rows), []
    head = "".join(f"<th>{name}</th>" for name in ("", "tensor", "shape", *COLUMNS))
    for name, grouped in groupby(rows, key=lambda row: row.name.split("/")[0]):
        group = list(grouped)
        over = sum(row.over for row in group)
        unfold = len(rows) <= OPEN or any(row is first for row in group)
        start = '<details open="open">' if unfold else "<details>"
        lines = "".join(row_line(row, row is first) for row in group)
        parts.append(
            f"{start}<summary>{escaped(name)}: {len(group):,} "
            f'tensors, {over:,} over tolerance</summary><div class="scroll"><table class="rows">'
            f"<thead><tr>{head}</tr></thead><tbody>{lines}</tbody></table></div></details>"
        )
    return section("All tensors", "In the order of execution.", "".join(parts))


def row_line(row: Row, is_first: bool) -> str:
    style = ' class="over"' if row.over else ""
    anchor = ' id="first"' if is_first else ""
    shape = f"{'×'.join(map(str, row.shape))} {row.dtype}"
    if row.kind != "full":
        shape += f" {row.kind}"
    mark = "◆" if row.over else ""
    cells = f'<td>{mark}</td><th scope="row">{escaped(row.name)}</th><td>{escaped(shape)}</td>'
    if row.errors is None:
        return f'<tr{style}{anchor}>{cells}<td colspan="8">{escaped(row.fault)}</td></tr>'
    e = row.errors
    broken = f" {e.nonfinite:,} NaN or infinite, {e.misplaced:,} misplaced"
    values = (
        number(e.relative_l2),
        number(row.tolerance),
        number(row.ratio, ".2g"),
        number(e.worst_token),
        number(e.norm_ratio - 1, "+.1e"),
        number(e.max_abs),
        number(1 - e.pcc),
        format_ulp(e) + (broken if e.nonfinite or e.misplaced else ""),
    )
    return f"<tr{style}{anchor}>{cells}{''.join(f'<td>{value}</td>' for value in values)}</tr>"
