"""Rows of a comparison -> drawings: error against depth and against step, blocks over steps, and one tensor's tokens.

Each draws nothing but what the rows say, and gives None where they say nothing of the kind.
"""

import math
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import groupby

import numpy as np

from flux.parity.compare import Row, first_over
from flux.parity.plots import (
    EDGES,
    SHADES,
    WITHIN,
    Box,
    Diamond,
    Dots,
    Drawing,
    Label,
    Line,
    LogScale,
    shade,
)

WIDTH, LEFT, RIGHT = 1080, 62, 16
STEP = re.compile(r"step\.(\d+)/")
SERIES = "latents", "velocity"  # of a step

# ---------------------------------------------------------------- names


def step_of(row: Row) -> int | None:
    found = STEP.match(row.name)
    return int(found[1]) if found else None


def place_of(row: Row) -> str:
    """The name without the number of its step: where in the network, whenever."""
    return STEP.sub("step/", row.name)


def section_of(name: str) -> str:
    """Of a place, the first part; `double_blocks` where a port's names begin with their modules."""
    return re.split(r"[/.]", name)[0]


def block_of(name: str) -> str:
    """The block that a tensor of a step lies in: `double_blocks.3`, `img_in`, `negative/final_layer`, `velocity`."""
    place = STEP.sub("", name)
    negative, place = place.startswith("negative/"), place.removeprefix("negative/")
    return "negative/" * negative + re.match(r"[^./]+(\.\d+(?=[./]))?", place)[0]


def shown(row: Row) -> float:
    """What a chart shows: the relative L2, and no number where that would not say it all."""
    told = (
        row.errors is not None
        and not row.errors.misplaced
        and math.isfinite(row.errors.relative_l2)
    )
    return row.errors.relative_l2 if told else math.inf


def described(row: Row) -> str:
    if row.errors is None:
        return f"{row.name}: {row.fault}"
    wrong = (
        f", {row.errors.misplaced:,} NaN or infinities misplaced" if row.errors.misplaced else ""
    )
    return f"{row.name}: {row.errors.relative_l2:.2e}, {row.ratio:.2g} of its budget{wrong}"


# ---------------------------------------------------------------- the frame of a chart


def frame(
    title: str, rows: Sequence[Row], height: float, top: float, low: float
) -> tuple[Drawing, LogScale]:
    """The axis of relative L2, wide enough for all errors and budgets, and its two rails where they are needed."""
    out, errors = Drawing(title, WIDTH, height), [shown(row) for row in rows]
    y = LogScale.around([*errors, *(row.tolerance for row in rows)], top, height - low)
    for tick in y.ticks():
        out.shapes += [Line([(LEFT, y(tick)), (WIDTH - RIGHT, y(tick))], "grid", 1)]
        out.shapes += [Label(LEFT - 8, y(tick) + 4, power(tick), anchor="end")]
    for value, name in ((0.0, "equal"), (math.inf, "NaN, shape")):
        if value in errors:
            out.shapes += [Label(LEFT - 8, y(value) + 4, name, anchor="end")]
    return out, y


def power(value: float) -> str:
    """1e-4; 1 and 10 as they are."""
    return (
        f"{value:g}"
        if 1 <= value <= 100
        else re.sub(r"e([+-])0*", r"e\1", f"{value:.0e}").replace("+", "")
    )


def budget_line(
    rows: Sequence[Row], x: Callable[[Row], float], half: float, y: LogScale
) -> list[Line]:
    """Level along each tensor; nothing for those that are allowed nothing. Corners only, since most budgets are alike."""
    lines = []
    for allowed, run in groupby(rows, key=lambda row: row.tolerance > 0):
        points = [
            (x(row) + side * half, y(row.tolerance)) for row in run if allowed for side in (-1, 1)
        ]
        inner = zip(points, points[1:], points[2:])
        corners = [b for a, b, c in inner if not a[1] == b[1] == c[1]]
        lines += (
            [Line([points[0], *corners, points[-1]], "ink", 1.2, dashed=True)] if points else []
        )
    return lines


def legend(entries: Iterable[tuple[str, str]], y: float) -> list:
    """(colour, text) in one line from the left; the colour `budget` is a dashed line, and `over` a diamond."""
    shapes, x = [], LEFT
    for colour, text in entries:
        sign = Dots([(x + 6, y - 4)], colour, 7)
        if colour == "over":
            sign = Diamond(x + 6, y - 4, "")
        if colour == "budget":
            sign = Line([(x - 4, y - 4), (x + 12, y - 4)], "ink", 1.2, dashed=True)
        shapes += [sign, Label(x + 18, y, text, "ink")]
        x += 18 + 6.2 * len(text) + 24
    return shapes


# ---------------------------------------------------------------- error against depth


def chosen(rows: Sequence[Row]) -> dict[int | None, str]:
    """Step -> colour, of the steps that are drawn; None is for what lies outside of all."""
    steps, first = sorted({step for row in rows if (step := step_of(row))}), first_over(rows)
    colours: dict[int | None, str] = {None: "first"}
    if steps:
        colours[steps[-1]] = "last"
        colours |= {step_of(first): "middle"} if first and step_of(first) else {}
        colours[steps[0]] = "first"
    return colours


def depth(rows: Sequence[Row]) -> Drawing:
    """Every tensor outside of the steps, and those of up to three steps: the first, the first over budget, the last."""
    first, colours = first_over(rows), chosen(rows)
    rows = [row for row in rows if step_of(row) in colours]
    places = list(dict.fromkeys(map(place_of, rows)))
    half = (WIDTH - RIGHT - LEFT) / len(places) / 2
    xs = {place: LEFT + half * (2 * index + 1) for index, place in enumerate(places)}
    out, y = frame("Relative L2 of every tensor, in the order of execution", rows, 432, 82, 74)
    out.shapes += sections(places, half, 60, y.bottom + 26)
    for step, colour in colours.items():
        mine = [row for row in rows if step_of(row) == step]
        spine = [
            row
            for row in mine
            if step
            and re.search(r"/[^/.]+\.\d+/out(\.0)?$", row.name)
            and 0 < shown(row) < math.inf
        ]
        out.shapes += [
            Dots([(xs[place_of(row)], y(shown(row))) for row in mine if not row.over], colour, 2.6)
        ]
        out.shapes += (
            [Line([(xs[place_of(row)], y(shown(row))) for row in spine], colour, 1.6)]
            if len(spine) > 1
            else []
        )
    earliest = {place_of(row): row for row in reversed(rows)}
    out.shapes += budget_line(
        [earliest[place] for place in places], lambda row: xs[place_of(row)], half, y
    )
    for row in filter(lambda row: row.over, rows):
        hollow = colours[step_of(row)] != "first"
        out.shapes += [
            Diamond(xs[place_of(row)], y(shown(row)), described(row), 3 if hollow else 4, hollow)
        ]
    if first:
        x = xs[place_of(first)]
        out.shapes += [Line([(x, 62), (x, y.bottom)], "over", 1)]
        side, anchor = (6, "start") if x < WIDTH / 2 else (-6, "end")
        out.shapes += [Label(x + side, 40, f"first over budget: {first.name}", "over", 12, anchor)]
    names = [(colours[step], f"step {step}") for step in sorted(filter(None, colours))] or [
        ("first", "tensors")
    ]
    over = [("over", f"over budget{', hollow in later steps' * (len(names) > 1)}")] * (
        first is not None
    )
    out.shapes += legend([*names, *over, ("budget", "budget")], 14)
    return out


def sections(places: Sequence[str], half: float, top: float, bottom: float) -> list:
    """Dividers between the parts of a run, named above, and between the blocks of a step, named below where there is room."""
    shapes, at = [], 0
    for name, group in groupby(places, key=section_of):
        group = list(group)
        left, width = LEFT + 2 * half * at, 2 * half * len(group)
        shapes += [Line([(left, top), (left, bottom - 26)], "grid", 1)] if at else []
        shapes += fitting({"step": "each step"}.get(name, name), left, width, top - 4, "ink")
        inside = 0
        for block, tensors in groupby(
            group, key=lambda place: block_of(place.removeprefix("step/"))
        ):
            count = len(list(tensors))
            if name == "step" and re.search(r"\.\d+$", block):
                start = left + 2 * half * inside
                shapes += [Line([(start, bottom - 26), (start, bottom - 20)], "muted", 1)]
                shapes += fitting(
                    block.rpartition(".")[2], start, 2 * half * count, bottom + 10, "muted"
                )
            inside += count
        shapes += kinds(group, left, half, bottom + 26) if name == "step" else []
        at += len(group)
    return shapes


def kinds(group: Sequence[str], left: float, half: float, y: float) -> list[Label]:
    """Below the numbers of blocks, what they are: `double_blocks`, `single_blocks`."""
    labels = []
    for kind in dict.fromkeys(
        block_of(place.removeprefix("step/")).rpartition(".")[0] for place in group
    ):
        at = [i for i, place in enumerate(group) if kind and place.startswith(f"step/{kind}.")]
        labels += (
            fitting(kind, left + 2 * half * at[0], 2 * half * (at[-1] + 1 - at[0]), y, "muted")
            if at
            else []
        )
    return labels


def fitting(text: str, left: float, width: float, y: float, colour: str) -> list[Label]:
    return (
        [Label(left + width / 2, y, text, colour, anchor="middle")]
        if width > 6.2 * len(text) + 4
        else []
    )


# ---------------------------------------------------------------- error against step


def over_steps(rows: Sequence[Row]) -> Drawing | None:
    """The latents and velocity of each step, and the largest relative L2 of any tensor in it."""
    inside = [row for row in rows if step_of(row)]
    steps = sorted(set(map(step_of, inside)))
    if not steps:
        return None
    largest: dict[int, Row] = {}
    for row in inside:
        largest[step_of(row)] = max(largest.get(step_of(row), row), row, key=shown)
    curves = {"largest of all": [largest[step] for step in steps]}
    for tap in SERIES:
        if found := [row for row in inside if re.fullmatch(rf"step\.\d+/{tap}", row.name)]:
            curves[tap] = found
    rows = [row for curve in curves.values() for row in curve]
    out, y = frame("Relative L2 of what each step computes", rows, 330, 60, 62)
    end = WIDTH - 150
    apiece = (end - LEFT - 24) / max(steps[-1] - steps[0], 1)

    def x(row):
        return LEFT + 24 + (step_of(row) - steps[0]) * apiece

    for step in steps[:: math.ceil(len(steps) / 25)]:
        out.shapes += [
            Label(LEFT + 24 + (step - steps[0]) * apiece, y.bottom + 40, str(step), anchor="middle")
        ]
    out.shapes += [Label((LEFT + end) / 2, y.bottom + 58, "step", anchor="middle")]
    colours = dict(zip(("largest of all", *SERIES), ("muted", "first", "last")))
    ends = []
    for name, curve in curves.items():
        finite = [row for row in curve if 0 < shown(row) < math.inf]
        out.shapes += (
            [Line([(x(row), y(shown(row))) for row in finite], colours[name], 1.8)]
            if len(finite) > 1
            else []
        )
        out.shapes += [
            Dots([(x(row), y(shown(row))) for row in curve if not row.over], colours[name], 6)
        ]
        out.shapes += [
            Diamond(x(row), y(shown(row)), described(row), 5) for row in curve if row.over
        ]
        ends.append((y(shown(curve[-1])) + 4, x(curve[-1]) + 12, name, colours[name]))
    out.shapes += [
        Label(left, height, name, colour, 12) for height, left, name, colour in apart(ends)
    ]
    allowed = next(name for name in (*SERIES, *curves) if name in curves)
    out.shapes += budget_line(curves[allowed], x, min(apiece / 2, 24), y)
    over = [("over", "over budget")] * any(row.over for row in rows)
    out.shapes += legend([*over, ("budget", f"budget of {allowed}")], 14)
    return out


def apart(labels: list[tuple], least: float = 14) -> list[tuple]:
    """Labels beside each other's ends, moved down until none covers another."""
    out: list[tuple] = []
    for height, *rest in sorted(labels):
        out.append((max(height, out[-1][0] + least) if out else height, *rest))
    return out


# ---------------------------------------------------------------- blocks over steps


def blocks(rows: Sequence[Row]) -> Drawing | None:
    """Of the tensors in a block at a step, the one nearest to its budget or farthest beyond it."""
    cells: dict[tuple[str, int], list[Row]] = {}
    for row in rows:
        if step := step_of(row):
            cells.setdefault((block_of(row.name), step), []).append(row)
    if not cells:
        return None
    names, steps = (
        list(dict.fromkeys(name for name, _ in cells)),
        sorted({step for _, step in cells}),
    )
    left, height = 12 + 6.4 * max(map(len, names)), 18 if len(names) <= 40 else 13
    width = min((WIDTH - RIGHT - left) / len(steps), 110)
    out = Drawing("Blocks over steps", WIDTH, 74 + height * len(names) + 8)
    out.shapes += scale_of_shades(left)
    for step in steps[:: math.ceil(len(steps) * 20 / (WIDTH - left)) or 1]:
        out.shapes += [
            Label(left + width * (steps.index(step) + 0.5), 68, str(step), anchor="middle")
        ]
    out.shapes += [Label(left - 8, 68, "step", anchor="end")]
    for line, name in enumerate(names):
        out.shapes += [
            Label(left - 8, 74 + height * (line + 0.5) + 4, name, "ink", min(11, height - 2), "end")
        ]
    for (name, step), inside in cells.items():
        worst = max(inside, key=lambda row: (row.over, math.isinf(shown(row)), row.ratio))
        x, y = left + width * steps.index(step), 74 + height * names.index(name)
        colour = shade(math.inf if math.isinf(shown(worst)) else worst.ratio, worst.over)
        out.shapes += [Box(x, y, width - 1, height - 1, colour, described(worst))]
        if worst.over:
            out.shapes += [
                Diamond(
                    x + (width - 1) / 2,
                    y + (height - 1) / 2,
                    described(worst),
                    min(width, height) / 4,
                )
            ]
    return out


def scale_of_shades(left: float) -> list:
    """Colours, from equal to a thousandfold of the budget."""
    entries = [
        ("equal", "equal"),
        *((shade(edge), f"{edge:g}") for edge in EDGES),
        (shade(math.inf), "more"),
    ]
    width = 42
    shapes: list = [
        Label(
            left,
            12,
            "largest relative L2 in a block, as a multiple of its budget; over budget with a diamond",
        )
    ]
    for index, (colour, text) in enumerate(entries):
        x = left + width * index + (10 if index > WITHIN else 0)
        shapes += [
            Box(x, 20, width - 1, 12, colour),
            Label(x + (width - 1) / 2, 45, text, size=10, anchor="middle"),
        ]
        shapes += [Diamond(x + (width - 1) / 2, 26, "", 3.5)] if index > WITHIN else []
    return shapes


# ---------------------------------------------------------------- the tokens of one tensor


def tokens(errors: np.ndarray) -> Drawing:
    """(rows, columns), the relative L2 of each place of the latent grid; the worst has a frame."""
    rows, columns = errors.shape
    cell = min(36.0, 480 / max(rows, columns))
    finite = errors[np.isfinite(errors) & (errors > 0)]
    high = math.log10(finite.max()) if finite.size else 0.0
    span = (
        max(high - math.log10(finite.min()), math.log10(2)) if finite.size else 1.0
    )  # what is alike shall look alike

    def index(value):
        return round((1 - (high - math.log10(value)) / span) * (SHADES - 1))

    out = Drawing("Relative L2 of each token", max(columns * cell + 2, 480), rows * cell + 62)
    gap = 1 if cell > 8 else 0
    for (row, column), value in np.ndenumerate(errors):
        colour = (
            "over" if not math.isfinite(value) else "equal" if value == 0 else f"t{index(value)}"
        )
        title = f"row {row}, column {column}: {value:.2e}"
        out.shapes += [
            Box(1 + column * cell, 1 + row * cell, cell - gap, cell - gap, colour, title)
        ]
    row, column = (
        int(i) for i in np.unravel_index(np.nan_to_num(errors, nan=math.inf).argmax(), errors.shape)
    )
    out.shapes += [
        Box(1 + column * cell, 1 + row * cell, cell - gap, cell - gap, "over", outline=True)
    ]
    below, width = rows * cell + 22, 30
    for i in range(SHADES):
        out.shapes += [Box(1 + i * width, below, width - 1, 12, f"t{i}")]
    if finite.size:
        out.shapes += [Label(1, below + 28, f"{10 ** (high - span):.1e}")]
        out.shapes += [Label(SHADES * width, below + 28, f"{finite.max():.1e}", anchor="end")]
    out.shapes += [Box(SHADES * width + 26, below, 12, 12, "over", outline=True)]
    out.shapes += [Label(SHADES * width + 46, below + 11, "the worst token", "ink")]
    return out
