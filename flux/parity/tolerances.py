"""How far rounding alone moves each tensor: the same network in bfloat16 and float16, and with float8 weights, against the
float32 run in a capture.

A port in bfloat16 is right if it is about as far from float32 as bfloat16 itself is. Two distances are measured:

    local        the module alone, on the recorded inputs (`replay.forced`): what one module's rounding does
    accumulated  in a run of its own from the prompt on: what a port is found at when it is compared with the capture

Both are kept in the capture's header, under "rounding", and ALLOWED times the accumulated one as the tensor's budget.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flux.errors import NonFiniteError, UserError
from flux.parity.capture import Request
from flux.parity.capture_file import KEY, Capture, amend
from flux.parity.compare import Row
from flux.parity.hooks import check_patterns
from flux.parity.modules import Modules, in_dtype
from flux.parity.replay import against, check_model, local, recorded
from flux.pipeline import Pipeline
from flux.weights.files import read_header

ALLOWED = 2  # times what was measured: a second way to round errs about as much as the first, in another direction
PRECISIONS = ("bfloat16", "float16", "float8")


class Rounding(NamedTuple):
    """Relative L2 to float32; None where it was not measured, or where NaN and infinity came out."""

    local: float | None
    accumulated: float | None


# ---------------------------------------------------------------- measuring


def measure(
    capture: Capture, pipe: Pipeline, request: Request, precision: str, only: Sequence[str] = ()
) -> dict[str, Rounding]:
    """Of each tensor of a float32 capture that fits `only`; UserError if it is in another dtype, or of another model."""
    check_model(capture, pipe)
    if capture.recipe["dtype"] != "float32":
        fault = f"{capture.path} is in {capture.recipe['dtype']}, and rounding is measured against float32"
        raise UserError(f"{fault}: capture it with --dtype float32")
    check_patterns(only, capture.names)
    twin = rounded(pipe, precision)
    modules = Modules(twin)
    alone = _relative(
        row for each in recorded(capture, only) for row in local(capture, modules, each)
    )
    accumulated: dict[str, float | None] = {}
    try:
        accumulated = _relative(against(capture, twin, request, only))
    except NonFiniteError:  # float16 ends at 65504: what comes after has no budget
        pass
    names = [name for name in capture.names if name in alone or name in accumulated]
    return {name: Rounding(alone.get(name), accumulated.get(name)) for name in names}


def _relative(rows: Iterable[Row]) -> dict[str, float | None]:
    def usable(e):
        return e is not None and not e.misplaced and math.isfinite(e.relative_l2)

    return {row.name: row.errors.relative_l2 if usable(row.errors) else None for row in rows}


def rounded(pipe: Pipeline, precision: str) -> Pipeline:
    """The same pipeline in another precision; "float8": computing in float32, with the matrices in its blocks rounded."""
    if precision not in PRECISIONS:
        raise UserError(f"--precision {precision}: choose from {', '.join(PRECISIONS)}")
    if precision == "float8":
        return in_dtype(pipe, torch.float32, to_float8)
    return in_dtype(pipe, getattr(torch, precision))


def to_float8(matrix: Tensor) -> Tensor:
    """To the nearest float8_e4m3fn, with one scale a matrix, by which its largest value becomes the largest float8."""
    scale = matrix.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    if not scale > 0:
        return matrix
    return (matrix / scale).to(torch.float8_e4m3fn).to(matrix.dtype) * scale


# ---------------------------------------------------------------- keeping


def store(path: str | Path, measured: Mapping[str, Mapping[str, Rounding]], budget: str) -> None:
    """Keep what was measured, by precision and name, in a capture, with the budgets that follow for one of the precisions."""

    def write(document: dict) -> None:
        document["rounding"] = document.get("rounding", {}) | measured
        for name, rounding in measured[budget].items():
            if rounding.accumulated is not None:
                document["tensors"][name]["budget"] = ALLOWED * rounding.accumulated

    amend(Path(path), write)


def stored(capture: Capture) -> dict[str, dict[str, Rounding]]:
    """What `store` kept: precision -> name -> rounding."""
    _, metadata = read_header(capture.path)
    kept = json.loads(metadata.get(KEY, "{}")).get("rounding", {})
    return {
        precision: {name: Rounding(*pair) for name, pair in tensors.items()}
        for precision, tensors in kept.items()
    }


def budgets(capture: Capture, precision: str, alone: bool = False) -> dict[str, float]:
    """ALLOWED times the rounding that was measured, by name, for `compare` or, `alone`, for `replay.forced`."""
    found = stored(capture).get(precision)
    if not found:
        raise UserError(
            f"{capture.path} knows no rounding in {precision}: measure it with `parity.py budgets`"
        )
    pairs = {
        name: rounding.local if alone else rounding.accumulated for name, rounding in found.items()
    }
    return {name: ALLOWED * value for name, value in pairs.items() if value is not None}


# ---------------------------------------------------------------- saying


def within(rows: Sequence[Row], capture: Capture, precision: str, alone: bool = False) -> str:
    """How many times the rounding that was measured: "within 1.3x of bfloat16 rounding; the most is at ...".

    Tensors that do not round, such as ids and noise, are left out.
    """
    allowed = budgets(capture, precision, alone)
    times = [
        (ALLOWED * row.errors.relative_l2 / allowed[row.name], row.name)
        for row in rows
        if row.errors and allowed.get(row.name)
    ]
    if not times:
        return f"nothing here rounds in {precision}"
    most, name = max(times)
    return f"within {most:.2g}x of {precision} rounding; the most is at {name}"


def table(measured: Mapping[str, Mapping[str, Rounding]]) -> str:
    """A line a tensor: local and accumulated relative L2 in each precision."""
    names = list(dict.fromkeys(name for tensors in measured.values() for name in tensors))

    def shown(value):
        return "" if value is None else f"{value:.1e}"

    head = "".join(f"{precision:>10} {'in a run':>9}" for precision in measured)
    lines = [head + "  name"]
    for name in names:
        pairs = [tensors.get(name, Rounding(None, None)) for tensors in measured.values()]
        lines.append(
            "".join(f"{shown(p.local):>10} {shown(p.accumulated):>9}" for p in pairs) + f"  {name}"
        )
    return "\n".join(lines)
