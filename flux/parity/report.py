"""A comparison as a page to look at: one HTML file that needs nothing else, and its plots as PNG.

The page has no script, and what it shows is in it: drawings as SVG, pictures as data URIs, the style sheet in its head. It
is well-formed XML besides, so that it can be read by programs.
"""

import base64
import io
import math
import re
import tempfile
from collections.abc import Iterable, Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.nn.functional import adaptive_max_pool2d

from flux.errors import UserError
from flux.image_io import output as images
from flux.parity import charts
from flux.parity.capture_file import Capture, token_norms
from flux.parity.compare import Row, first_over, unmatched, verdict
from flux.parity.page import PAGE, facts, figure, many, number, said, section, style
from flux.parity.plots import Drawing, shade

OPEN = 200  # rows that are all shown at once; of more, only the part with the first one over budget


def write(
    a: Capture, b: Capture, rows: Sequence[Row], path: str | Path, png: str | Path | None = None
) -> list[Path]:
    """Write the page, and the plots and pictures into the folder `png`; returns the files, none of which was there before.

    `rows` are `compare(a, b)`. UserError if there are none, or where nothing can be written.
    """
    path, folder = Path(path), png and Path(png)
    check_output(path, folder)
    if not rows:
        raise UserError(
            f"{a.path} and {b.path}: no tensor was compared, so that there is nothing to report"
        )
    text, drawings, pictures = page(a, b, rows)
    files = {path: text.encode()}
    if folder:
        files |= {folder / f"{name}.png": drawing.png() for name, drawing in drawings.items()}
        files |= {folder / f"{name}.png": png_of(picture) for name, picture in pictures.items()}
    return [
        images.write_exclusive(target, lambda file, data=data: file.write(data))
        for target, data in files.items()
    ]


def check_output(path: Path, folder: Path | None) -> None:
    """Refuse, before any work is done, what could not be written."""
    if path.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {path}: a report is a web page; give it the suffix .html")
    for flag, place in (("--output", path.parent), ("--png", folder)):
        try:
            if place is not None:
                place.mkdir(parents=True, exist_ok=True)
                with tempfile.NamedTemporaryFile(dir=place):
                    pass
        except OSError as error:
            raise UserError(
                f"{flag} {place}: cannot be written there ({error.strerror}); choose another folder"
            ) from None


def page(
    a: Capture, b: Capture, rows: Sequence[Row]
) -> tuple[str, dict[str, Drawing], dict[str, Image.Image]]:
    """The HTML, the drawings and the pictures in it."""
    first = first_over(rows)
    found = token_errors(a, b, first) if first and first.errors else None
    drawings = {
        "depth": charts.depth(rows),
        "steps": charts.over_steps(rows),
        "blocks": charts.blocks(rows),
        "tokens": charts.tokens(found) if found is not None else None,
    }
    drawings = {name: drawing for name, drawing in drawings.items() if drawing}
    pictures, about = pictures_of(a, b)
    parts = [
        heading(a, b, rows),
        figure("Error against depth", DEPTH, drawings.get("depth")),
        failing(first, drawings.get("tokens")),
        figure("Blocks over steps", BLOCKS, drawings.get("blocks")),
        figure("Error against step", STEPS, drawings.get("steps")),
        gallery(pictures, about),
        recipes(a, b),
        listing(rows),
    ]
    body = "\n".join(filter(None, parts))
    return (
        PAGE.format(title=f"parity: {said(a.path.name)}", style=style(), body=body),
        drawings,
        pictures,
    )


DEPTH = (
    "Relative L2 to the reference of every tensor in the order of execution. Lines join the outputs of the blocks. Where the "
    "line leaves the floor is where the two part."
)
BLOCKS = "Each cell is the tensor of a block, at one step, that comes nearest to its budget or goes farthest beyond it."
STEPS = "How far rounding, or a fault, has grown from step to step. The largest is of any tensor that the step computes."

# ---------------------------------------------------------------- the verdict


def heading(a: Capture, b: Capture, rows: Sequence[Row]) -> str:
    """The verdict, the figures behind it, and what the reader should know before believing them."""
    first, over = first_over(rows), sum(row.over for row in rows)
    equal = sum(
        row.errors is not None and row.errors.ulp == (0, 0, 0) and row.ratio == 0 for row in rows
    )
    text = verdict(rows)
    sign, word = ("over", "Over budget") if first else ("fine", "Within budget")
    nearest = max(rows, key=lambda row: row.ratio)
    largest = (
        "–"
        if math.isinf(nearest.ratio) and nearest.errors is None
        else number(nearest.ratio, ".3g") + "×"
    )
    tiles = [
        ("tensors compared", f"{len(rows):,}"),
        ("over budget", f"{over:,}"),
        ("equal", f"{equal:,}"),
    ]
    tiles += [("largest multiple of a budget", largest)]
    stopped = [
        f"{said(x.path)} stopped early: {said(x.recipe['stopped'])}"
        for x in (a, b)
        if x.recipe.get("stopped")
    ]
    lost = [(x.path, names) for x, names in zip((a, b), unmatched(a, b)) if names]

    def few(names):
        return said(", ".join(names[:3])) + " …" * (len(names) > 3)

    notes = [
        f"{many(len(names), 'tensor')} in {said(path)} alone: {few(names)}" for path, names in lost
    ]
    where = (
        f'<p class="where"><span>first over budget</span><a href="#first"><code>{said(first.name)}</code></a></p>'
        if first
        else ""
    )
    return f"""<header>
<p class="eyebrow">flux parity</p>
<h1 class="{sign}">{word}</h1>
{where}<p class="verdict">{said(text[:1].upper() + text[1:])}.</p>
<p class="sides"><span>A, judged</span><code>{said(a.path)}</code><span>B, the reference</span><code>{said(b.path)}</code></p>
{facts(tiles)}{"".join(f'<p class="note">{note}</p>' for note in stopped + notes)}
</header>"""


def failing(row: Row | None, drawing: Drawing | None) -> str:
    """All that is known of the first tensor over budget."""
    if row is None:
        return ""
    shape = [
        ("shape", "×".join(map(str, row.shape)) or "one number"),
        ("dtype", row.dtype),
        ("kept", row.kind),
    ]
    if row.errors is None:
        body = f'<div class="card">{facts(shape)}<p>It {said(row.fault)}.</p></div>'
        return section("The first tensor over budget", body, f"<code>{said(row.name)}</code>")
    e = row.errors
    values = [
        ("relative L2", number(e.relative_l2)),
        ("budget", number(row.tolerance)),
        ("multiple of it", number(row.ratio, ".3g")),
        ("worst token", f"{number(e.worst_token)} at {e.worst_token_at}"),
        ("|a| / |b|", number(e.norm_ratio, ".6g")),
        ("largest |a − b|", f"{number(e.max_abs)} at {e.worst_index}"),
        ("cosine", number(e.cosine, ".9f")),
        ("1 − PCC", number(1 - e.pcc)),
        ("ULP p50, p99, max", ", ".join(f"{n:,}" for n in e.ulp)),
        ("NaN or infinite", f"{e.nonfinite:,}, misplaced {e.misplaced:,}"),
        *shape,
    ]
    map_of_it = "<p>Its tokens do not lie on the latent grid, or were not kept.</p>"
    if drawing:
        caption = "Relative L2 of each token on the picture's latent grid, on a logarithmic scale of its own."
        map_of_it = f"<figure>{drawing.svg()}<figcaption>{caption}</figcaption></figure>"
    body = f'<div class="card split">{map_of_it}{facts(values)}</div>'
    return section("The first tensor over budget", body, f"<code>{said(row.name)}</code>")


def token_errors(a: Capture, b: Capture, row: Row) -> np.ndarray | None:
    """(rows, columns), relative L2 of each token of an image tensor, as `compare` reckons it; None of any other.

    Of a decoder's (B, C, H, W), of each pixel, and where they are many the worst of neighbours. Of a batch, the worst.
    """
    name, ids = (
        row.name,
        next((x.tensors["ids/img"] for x in (b, a) if "ids/img" in x.tensors.names), None),
    )
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
    """As the worst token's in `compare`: where the norm is less than a tenth of the average, that counts in its place."""
    finite = norm.isfinite() & distance.isfinite()
    floor = norm[finite].double().square().mean().sqrt() / 10 if finite.any() else torch.tensor(0.0)
    found = distance.double() / norm.double().clamp(min=floor) if floor else distance.double()
    return found.where(finite, math.inf)


def spatial(name: str, shape: Sequence[int]) -> bool:
    """(B, C, h, w), and not the (B, heads, N, d) of attention."""
    picture = name.startswith(("decoder/", "encoder.")) and "/attention/" not in name
    return len(shape) == 4 and (picture or name in ("noise", "pixels") or name.endswith("/latents"))


def on_grid(found: Tensor, name: str, ids: Tensor | None) -> np.ndarray | None:
    """(B, N) tokens, with text before them or references after them or neither -> (rows, columns) of the picture's own."""
    text = (
        name.startswith("text/")
        or "txt" in name
        or re.search(r"double_blocks\.\d+/(in|out)\.1$", name)
    )
    if text or found.ndim != 2 or ids is None or ids.ndim != 2 or ids.shape[1] < 3:
        return None
    own, count = (
        ids[ids[:, 0] == 0].long(),
        found.shape[1],
    )  # (t, row, column): t of the picture that is made is 0
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


# ---------------------------------------------------------------- the pictures


def pictures_of(a: Capture, b: Capture) -> tuple[dict[str, Image.Image], str]:
    """Both pictures and their difference, as far as there are any, and a sentence about them."""
    arrays = {}
    for side, capture in (("a", a), ("b", b)):
        record = capture.records.get("picture")
        if (
            record
            and record.kind == "full"
            and record.dtype == "U8"
            and len(record.shape) == 3
            and record.shape[2] == 3
        ):
            arrays[f"picture-{side}"] = capture.tensors["picture"].numpy()
    pictures = {name: Image.fromarray(array) for name, array in arrays.items()}
    if len(arrays) < 2:
        missing = [
            str(x.path) for side, x in (("a", a), ("b", b)) if f"picture-{side}" not in arrays
        ]
        return (
            pictures,
            f"No whole picture is in {' or in '.join(missing)}: capture it with --keep full.",
        )
    x, y = (array.astype(np.int64) for array in arrays.values())
    if x.shape != y.shape:
        sizes = " and ".join(f"{w}×{h}" for h, w, _ in (x.shape, y.shape))
        return (
            pictures,
            f"The pictures are {sizes} pixels: pictures of different size have no difference to show.",
        )
    distance = np.abs(x - y)
    most = int(distance.max(initial=0))
    if not most:
        return pictures, "The pictures are equal in every pixel."
    times = 255 // most
    pictures["difference"] = Image.fromarray((distance * times).astype(np.uint8))
    share, psnr = (distance > 0).mean(), 10 * math.log10(255**2 / (distance**2).mean())
    levels = (
        f"{many(most, 'level')} of 255 at most, in {share:.2g} of the values; PSNR {psnr:.1f} dB"
    )
    return pictures, f"They differ by {levels}. The difference is |A − B|, {times} times as bright."


def gallery(pictures: dict[str, Image.Image], about: str) -> str:
    names = {
        "picture-a": "A, judged",
        "picture-b": "B, the reference",
        "difference": "their difference, amplified",
    }
    shown = "".join(
        f'<figure><img src="data:image/png;base64,{base64.b64encode(png_of(picture)).decode()}" alt="{names[name]}" '
        f'width="{picture.width}" height="{picture.height}"/><figcaption>{names[name]}</figcaption></figure>'
        for name, picture in pictures.items()
    )
    return section(
        "The pictures", f'<div class="card pictures">{shown}</div>' if shown else "", said(about)
    )


def png_of(picture: Image.Image) -> bytes:
    file = io.BytesIO()
    picture.save(file, "PNG")
    return file.getvalue()


# ---------------------------------------------------------------- the recipes


def recipes(a: Capture, b: Capture) -> str:
    """Both recipes, line by line; where they say different things, both are marked."""
    ours, theirs = (dict(flat(x.recipe)) for x in (a, b))
    keys = list(dict.fromkeys([*theirs, *ours]))
    if not keys:
        return section(
            "The recipes", "", "Neither file has a recipe: they were not written by parity.py."
        )
    lines = []
    for key in keys:
        values = [side.get(key, "–") for side in (ours, theirs)]
        differ = values[0] != values[1]
        cells = "".join(f"<td>{said(value)}</td>" for value in values)
        start, mark = ('<tr class="differs">', "≠") if differ else ("<tr>", "")
        lines.append(
            f'{start}<td class="mark">{mark}</td><th scope="row">{said(key)}</th>{cells}</tr>'
        )
    count = sum(line.startswith('<tr class="differs">') for line in lines)
    names = "".join(
        f'<th scope="col">{name}</th>' for name in ("what", "A, judged", "B, the reference")
    )
    text = (
        f"Lines that differ, marked with ≠: {count} of {len(lines)}."
        if count
        else "They are the same in every line."
    )
    table = f'<table class="recipe"><thead><tr><th></th>{names}</tr></thead><tbody>{"".join(lines)}</tbody></table>'
    return section("The recipes", f'<div class="card scroll">{table}</div>', text)


def flat(value: object, key: str = "") -> Iterable[tuple[str, str]]:
    """A recipe as lines: `versions.torch`, `files.transformer.0.sha256`."""
    if (
        isinstance(value, dict)
        or isinstance(value, list)
        and any(isinstance(item, dict) for item in value)
    ):
        for name, item in value.items() if isinstance(value, dict) else enumerate(value):
            yield from flat(item, f"{key}.{name}" if key else str(name))
    else:
        yield key, ", ".join(map(str, value)) if isinstance(value, list) else str(value)


# ---------------------------------------------------------------- all rows


def listing(rows: Sequence[Row]) -> str:
    """Every row, folded by the part of the run that it belongs to."""
    first, parts = first_over(rows), []
    for name, group in groupby(rows, key=lambda row: row.name.split("/")[0]):
        group = list(group)
        over = sum(row.over for row in group)
        opened = len(rows) <= OPEN or any(row is first for row in group)
        count = f'<b class="over">◆ {over:,} over budget</b>' if over else ""
        summary = f"<summary><code>{said(name)}</code><span>{many(len(group), 'tensor')}</span>{count}</summary>"
        lines = "".join(line(row, row is first) for row in group)
        body = f'<div class="scroll"><table class="rows">{HEAD}<tbody>{lines}</tbody></table></div>'
        start = '<details open="open">' if opened else "<details>"
        parts.append(f"{start}{summary}{body}</details>")
    text = "In the order of execution. A diamond marks what is over budget; p50, p99 and the largest are counted in ULP."
    return section("All tensors", f'<div class="card list">{"".join(parts)}</div>', text)


HEAD = (
    "<thead><tr><th></th><th scope='col'>tensor</th><th scope='col'>shape</th>"
    + "".join(
        f"<th scope='col' class='n'>{name}</th>"
        for name in (
            "rel. L2",
            "budget",
            "× budget",
            "worst token",
            "|a|/|b| − 1",
            "max |a − b|",
            "1 − PCC",
            "ULP",
        )
    )
    + "</tr></thead>"
)


def line(row: Row, first: bool) -> str:
    anchor = ' id="first"' if first else ""
    start = f'<tr class="over"{anchor}><td class="mark">◆</td>' if row.over else "<tr><td></td>"
    kept = f" {row.kind}" * (row.kind != "full")
    shape = "×".join(map(str, row.shape))
    start += f'<th scope="row">{said(row.name)}</th><td class="s">{shape} {row.dtype}{kept}</td>'
    if row.errors is None:
        return f'{start}<td colspan="8">{said(row.fault)}</td></tr>'
    e = row.errors
    broken = (
        f"<br/>{e.nonfinite:,} NaN or infinite, {e.misplaced:,} misplaced"
        if e.nonfinite or e.misplaced
        else ""
    )
    swatch = f'<i style="background:var(--{shade(row.ratio, row.over)})"></i>'
    values = (
        number(e.worst_token),
        number(e.norm_ratio - 1, "+.1e"),
        number(e.max_abs),
        number(1 - e.pcc),
    )
    ulp = " / ".join(f"{n:,}" if n < 10_000 else f"{n:.0e}" for n in e.ulp)
    cells = "".join(f"<td>{value}</td>" for value in (*values, ulp + broken))
    numbers = f"<td>{number(e.relative_l2)}</td><td>{number(row.tolerance)}</td><td>{swatch}{number(row.ratio, '.2g')}</td>"
    return f"{start}{numbers}{cells}</tr>"
