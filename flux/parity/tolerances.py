"""Measure how far rounding alone moves each tensor of a float32 capture.

Precisions are bfloat16, float16, and float32 with float8 weights.

A port in bfloat16 is right if it is about as far from float32 as bfloat16 itself is. Two distances
are measured:

    local        one module on its recorded inputs (`replay.replay_module`)
    accumulated  a run from the prompt on, as a port is compared with the capture

Both are stored in the capture's header under "rounding", for each precision on its own. A run is
allowed FACTOR times the distance of its own precision.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flux.errors import NonFiniteError, UserError
from flux.hooks import check_patterns
from flux.parity.capture import Request
from flux.parity.capture_file import Capture, amend
from flux.parity.capture_metadata import Rounding
from flux.parity.compare import FACTOR, Row
from flux.parity.modules import Modules, in_dtype
from flux.parity.replay import check_model, module_runs, replay_module, run_and_compare
from flux.pipeline import Pipeline
from flux.runtime.terminal import printable

PRECISIONS = ("bfloat16", "float16", "float8")


# ---------------------------------------------------------------- measure


def measure_rounding(
    capture: Capture, pipe: Pipeline, request: Request, precision: str, only: Sequence[str] = ()
) -> dict[str, Rounding]:
    """Measure the rounding of each tensor of a float32 capture whose name matches `only`.

    UserError if the capture is not in float32, or of another model.
    """
    check_model(capture, pipe)
    if capture.recipe["dtype"] != "float32":
        raise UserError(
            f"{capture.path}: must be in float32 (got {capture.recipe['dtype']}). "
            'Capture it with `dtype="float32"`'
        )
    check_patterns(only, capture.names)
    coarse = in_precision(pipe, precision)
    modules = Modules(coarse)
    local = _relative_l2(
        row for each in module_runs(capture, only) for row in replay_module(capture, modules, each)
    )
    accumulated: dict[str, float | None] = {}
    try:
        accumulated = _relative_l2(run_and_compare(capture, coarse, request, only))
    except NonFiniteError:  # float16 ends at 65504: later tensors get no tolerance
        pass
    names = [name for name in capture.names if name in local or name in accumulated]
    return {name: Rounding(local.get(name), accumulated.get(name)) for name in names}


def _relative_l2(rows: Iterable[Row]) -> dict[str, float | None]:
    found: dict[str, float | None] = {}
    for row in rows:
        e = row.errors
        if e is not None and not e.misplaced and math.isfinite(e.relative_l2):
            found[row.name] = e.relative_l2
        else:
            found[row.name] = None
    return found


def in_precision(pipe: Pipeline, precision: str) -> Pipeline:
    """Return the pipeline in another precision.

    "float8" computes in float32, with the matrices of the blocks rounded to float8.
    """
    if precision not in PRECISIONS:
        raise UserError(
            f"precision: unknown (got {precision}, expected one of {', '.join(PRECISIONS)})"
        )
    if precision == "float8":
        return in_dtype(pipe, torch.float32, to_float8)
    return in_dtype(pipe, getattr(torch, precision))


def to_float8(matrix: Tensor) -> Tensor:
    """Round to float8_e4m3fn with one scale, which maps the largest value to the largest float8."""
    scale = matrix.abs().max() / torch.finfo(torch.float8_e4m3fn).max
    if not scale > 0:
        return matrix
    return (matrix / scale).to(torch.float8_e4m3fn).to(matrix.dtype) * scale


# ---------------------------------------------------------------- store and read


def store_rounding(path: str | Path, measured: Mapping[str, Mapping[str, Rounding]]) -> None:
    """Store measurements (precision -> name -> rounding) in a capture, beside older ones."""

    def write(document: dict) -> None:
        stored = document.setdefault("rounding", {})
        for precision, tensors in measured.items():
            for name, rounding in tensors.items():
                if name not in document["tensors"]:
                    raise UserError(f"{path}: has no tensor {name} to store rounding for.")
                stored.setdefault(precision, {})[name] = list(rounding)

    amend(Path(path), write)


def stored_rounding(capture: Capture) -> dict[str, dict[str, Rounding]]:
    """Return what `store_rounding` had stored when the capture was opened."""
    return capture.rounding


def measured_tolerances(capture: Capture, precision: str, local: bool = False) -> dict[str, float]:
    """Return FACTOR times the measured rounding, by name; `local` is for `replay_modules`."""
    stored = capture.rounding.get(precision)
    if not stored:
        raise UserError(
            f"{capture.path}: has no measured rounding in {precision}. "
            "Run `scripts/parity.py calibrate`"
        )
    found = {}
    for name, rounding in stored.items():
        value = rounding.local if local else rounding.accumulated
        if value is not None:
            found[name] = FACTOR * value
    return found


# ---------------------------------------------------------------- format


def format_ratio(rows: Sequence[Row], capture: Capture, precision: str, local: bool = False) -> str:
    """Return the largest error in units of the measured rounding, as a sentence.

    Tensors that are not rounded, such as ids and noise, are left out.
    """
    allowed = measured_tolerances(capture, precision, local)
    ratios = [
        (FACTOR * row.errors.relative_l2 / allowed[row.name], row.name)
        for row in rows
        if row.errors and allowed.get(row.name)
    ]
    if not ratios:
        return f"no compared tensor is rounded in {precision}"
    largest, name = max(ratios)
    return (
        f"within {largest:.2g}x of {precision} rounding; the largest ratio is at {printable(name)}"
    )


def format_table(measured: Mapping[str, Mapping[str, Rounding]]) -> str:
    """Return one line a tensor: local and accumulated relative L2 in each precision."""

    def cell(value: float | None) -> str:
        return "" if value is None else f"{value:.1e}"

    lines = ["".join(f"{precision:>10} {'in a run':>9}" for precision in measured) + "  name"]
    for name in dict.fromkeys(name for tensors in measured.values() for name in tensors):
        pairs = [tensors.get(name, Rounding(None, None)) for tensors in measured.values()]
        cells = [f"{cell(p.local):>10} {cell(p.accumulated):>9}" for p in pairs]
        lines.append("".join(cells) + f"  {printable(name)}")
    return "\n".join(lines)
