"""Draw the rows of a comparison: error along the run, by step, by block and by token."""

import io
import math
import re
from collections.abc import Sequence

import numpy as np

from flux.errors import UserError, install_command
from flux.parity.compare import Row, first_over

STEP = re.compile(r"step\.([0-9]{1,6})/")
OVER = "#d55e00"  # vermilion and blues of Okabe and Ito, which every colour vision can tell apart
COLOURS = ("#0072b2", "#cc79a7", "#009e73")
PLAIN = {"parse_math": False}  # a "$" in a file's names is not mathematics
MOST_BLOCKS = 400  # in one figure, which holds them in a readable size


def check_matplotlib() -> None:
    """Raise UserError if matplotlib is not installed."""
    try:
        import matplotlib.figure  # noqa: F401
    except ImportError as error:
        raise UserError(
            f"A report needs matplotlib ({error!s:.80}). Run `{install_command('plots')}`."
        ) from None


def step_of(row: Row) -> int | None:
    found = STEP.match(row.name)
    return int(found[1]) if found else None


def block_of(row: Row) -> str:
    """Return the block of a tensor of a step: `double_blocks.3`, `negative/img_in`, `velocity`."""
    place = STEP.sub("", row.name)
    negative = "negative/" if place.startswith("negative/") else ""
    name = r"(content_mode_blocks\.\w+|[^./]+)(\.\d+(?=[./]))?"
    block = re.match(name, place.removeprefix("negative/"))
    return negative + (block[0] if block else place)


def label_of(name: str, length: int = 30) -> str:
    """Return a name from a file as ASCII that fits into a figure, whose font lacks most others."""
    text = ascii(name)[1:-1]
    return text if len(text) <= length else f"{text[: length - 3]}..."


def error_of(row: Row) -> float:
    """Return the relative L2; infinity where shapes differ or NaN is misplaced."""
    if row.errors is None or row.errors.misplaced:
        return math.inf
    return row.errors.relative_l2


# ---------------------------------------------------------------- figures


def along_run(rows: Sequence[Row]) -> bytes:
    """Draw the relative L2 of every tensor against its place in the network.

    Of the steps, the first, the last and the one with the first tensor over tolerance are drawn.
    """
    first = first_over(rows)
    steps = sorted({step for row in rows if (step := step_of(row)) is not None})
    drawn = [None, *steps[:1], *steps[-1:]] + ([step_of(first)] if first else [])
    rows = [row for row in rows if step_of(row) in drawn]
    places = list(dict.fromkeys(STEP.sub("step/", row.name) for row in rows))
    position = {place: x for x, place in enumerate(places)}
    figure, axes = _axes(11, 4.5)
    plot = _LogPlot(axes, rows)
    for step, colour in zip(sorted({step for step in drawn if step is not None}), COLOURS):
        chosen = [row for row in rows if step_of(row) == step]
        xs = [position[STEP.sub("step/", row.name)] for row in chosen]
        plot.points(xs, chosen, colour, f"step {step}")
    others = [row for row in rows if step_of(row) is None]
    plot.points([position[row.name] for row in others], others, "#555555", "outside of the steps")
    xs = [position[STEP.sub("step/", row.name)] for row in rows]
    axes.scatter(xs, [row.tolerance or math.nan for row in rows], 12, "k", "_", label="tolerance")
    starts = [x for x, place in enumerate(places) if x == 0 or _part(place) != _part(places[x - 1])]
    axes.set_xticks(
        starts, [label_of(_part(places[x])) for x in starts], rotation=30, ha="right", **PLAIN
    )
    if first:
        x = position[STEP.sub("step/", first.name)]
        axes.axvline(x, color=OVER, lw=0.8)
        axes.set_title(
            f"first over tolerance: {label_of(first.name, 80)}", color=OVER, fontsize=10, **PLAIN
        )
    return plot.finish(figure, "order of execution")


def _part(place: str) -> str:
    """Return the part of the run: `text`, `decoder`, or the kind of block in a step."""
    return re.split(r"[/.]", place.removeprefix("step/"))[0]


def by_step(rows: Sequence[Row]) -> bytes | None:
    """Draw the relative L2 of each step's latents, velocity and worst tensor; None: no steps."""
    inside = [row for row in rows if step_of(row) is not None]
    if not inside:
        return None
    worst: dict[int, Row] = {}
    for row in inside:
        step = step_of(row) or 0
        worst[step] = max(worst.get(step, row), row, key=error_of)
    curves = {"worst tensor of the step": list(worst.values())}
    for tap in ("latents", "velocity"):
        curves[tap] = [row for row in inside if re.fullmatch(rf"step\.\d+/{tap}", row.name)]
    figure, axes = _axes(11, 3.5)
    plot = _LogPlot(axes, inside)
    for (name, curve), colour in zip(curves.items(), ("#555555", *COLOURS)):
        if curve:
            plot.points([step_of(row) for row in curve], curve, colour, name, line="-")
    axes.xaxis.get_major_locator().set_params(integer=True)
    return plot.finish(figure, "step")


def block_ratios(rows: Sequence[Row]) -> tuple[list[str], list[int], np.ndarray]:
    """Return blocks, steps and the largest multiple of a tolerance, (blocks, steps), NaN: none."""
    inside = [row for row in rows if step_of(row) is not None]
    blocks = list(dict.fromkeys(map(block_of, inside)))
    steps = sorted({step_of(row) or 0 for row in inside})
    ratios = np.full((len(blocks), len(steps)), math.nan)
    for row in inside:
        at = blocks.index(block_of(row)), steps.index(step_of(row) or 0)
        ratio = math.inf if math.isinf(error_of(row)) else row.ratio
        ratios[at] = np.fmax(ratios[at], max(ratio, 1 + 1e-9) if row.over else ratio)
    return blocks, steps, ratios


def by_block(rows: Sequence[Row]) -> bytes | None:
    """Draw `block_ratios` as a heat map; None without steps, and for too many blocks."""
    from matplotlib.colors import LogNorm

    blocks, steps, ratios = block_ratios(rows)
    if not 0 < len(blocks) <= MOST_BLOCKS:
        return None
    figure, axes = _axes(min(3 + 0.6 * len(steps), 11), 2 + 0.2 * len(blocks))
    image = axes.imshow(
        np.clip(ratios, 1e-3, 1e3), "cividis", norm=LogNorm(1e-3, 1e3), aspect="auto"
    )
    over = np.argwhere(ratios > 1)
    axes.scatter(over[:, 1], over[:, 0], 20, OVER, "D", edgecolors="white")
    axes.set_yticks(range(len(blocks)), map(label_of, blocks), fontsize=8, **PLAIN)
    axes.set_xticks(range(len(steps)), steps)
    axes.set_xlabel("step")
    figure.colorbar(image, label="multiple of the tolerance")
    return _png(figure)


def by_token(errors: np.ndarray) -> bytes:
    """Draw the relative L2 of the tokens on the image's grid, (rows, columns)."""
    from matplotlib.colors import LogNorm

    finite = errors[np.isfinite(errors) & (errors > 0)]
    low, high = (finite.min(), finite.max()) if finite.size else (1e-8, 1.0)
    figure, axes = _axes(5, 4)
    low = min(low, high / 10)
    norm = LogNorm(low, high)
    image = axes.imshow(np.clip(errors, low, high), "cividis", norm=norm)
    row, column = np.unravel_index(np.argmax(errors), errors.shape)
    axes.plot(column, row, "s", color=OVER, fillstyle="none", markersize=10)
    axes.set_title(f"worst token: row {row}, column {column}", fontsize=10)
    figure.colorbar(image, label="relative L2")
    return _png(figure)


# ---------------------------------------------------------------- shared


class _LogPlot:
    """A logarithmic axis of relative L2, with a rail below for 0 and one above for infinity."""

    def __init__(self, axes, rows: Sequence[Row]):
        values = [error_of(row) for row in rows] + [row.tolerance for row in rows]
        logs = [math.log10(value) for value in values if 1e-30 < value < 1e30] or [-8, 0]
        self.axes, self.zero = axes, 10.0 ** (math.floor(min(logs)) - 1)
        self.infinity = 10.0 ** (math.ceil(max(logs)) + 1)
        axes.set_yscale("log")
        axes.set_ylim(self.zero / 3, self.infinity * 3)
        for value, name in ((self.zero, "equal"), (self.infinity, "NaN or shape")):
            axes.axhline(value, color="#bbbbbb", lw=0.6)
            axes.annotate(name, (0, value), xycoords=("axes fraction", "data"), fontsize=8)

    def points(self, xs, rows: Sequence[Row], colour: str, label: str, line: str = "") -> None:
        ys = [min(max(error_of(row), self.zero), self.infinity) for row in rows]
        self.axes.plot(xs, ys, ls=line or "none", marker=".", color=colour, label=label, lw=1)
        over = [(x, y) for x, y, row in zip(xs, ys, rows) if row.over]
        if over:
            self.axes.plot(*zip(*over), "D", color=OVER, markersize=5)

    def finish(self, figure, label: str) -> bytes:
        self.axes.set_xlabel(label)
        self.axes.set_ylabel("relative L2")
        self.axes.plot([], [], "D", color=OVER, label="over tolerance")
        figure.legend(loc="outside upper center", ncols=6, fontsize=8, frameon=False)
        return _png(figure)


def _axes(width: float, height: float):
    """Return a figure of this size in inches and its axes, without pyplot's global state."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def _png(figure) -> bytes:
    file = io.BytesIO()
    figure.savefig(file, format="png", dpi=130)
    return file.getvalue()
