"""Compare two tensors, or two captures, and find the first tensor over its tolerance.

A tensor passes if its relative L2 is within the tolerance, its worst token within GUARD times the
tolerance, the ratio of the norms within the tolerance of 1, and NaN and infinity are in the same
places. The first argument is judged, the second is the reference.
"""

import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from hashlib import sha256

import numpy as np
import torch
from torch import Tensor

from flux.errors import UserError
from flux.hooks import check_patterns, matches
from flux.parity.capture_file import (
    DTYPES,
    PROBE,
    SLICE,
    Capture,
    Kind,
    positions,
    raw,
    reduce,
    statistics,
    token_norms,
)
from flux.runtime.terminal import printable

TOLERANCES = {  # relative L2 by dtype; 0 for integers
    "F64": 1e-12,
    "F32": 1e-4,
    "F16": 3e-3,
    "BF16": 2e-2,
    "F8_E4M3": 0.1,
    "F8_E5M2": 0.2,
    "U8": 1 / 128,
}
INTEGERS = ("BOOL", "I8", "U8", "I16", "I32", "I64")
NORM_ROUNDING = 2e-6  # of a token's norm, summed in float32 in the order of the tensor's memory
INCOMPLETE = 3  # exit code: no tensor is over its tolerance, but not every tensor was compared
GUARD = 10  # the worst token may err ten times as much as the tensor
FACTOR = 2  # another order of rounding errs about as much as ours, in another direction
PRECISIONS = {  # as a recipe spells a dtype -> as safetensors does; float8: of weights alone
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "float8": "F8_E4M3",
}
AGREE = (  # keys of the recipe that must be equal
    "model",
    "mode",
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "steps",
    "guidance",
    "true_cfg_scale",
    "seed",
    "images",
)
COARSEST_FIRST = (
    "BOOL",
    "I8",
    "U8",
    "F8_E5M2",
    "F8_E4M3",
    "BF16",
    "F16",
    "I16",
    "I32",
    "F32",
    "I64",
    "F64",
)
LEAST_FIRST = ("statistics", "slice", "probe", "full")


@dataclass(frozen=True)
class Errors:
    """Differences of a tensor from its reference; all but the last two are of finite values."""

    relative_l2: float  # |a - b| / |b|; |a| where the reference is all zero
    worst_token: float  # the largest relative L2 of a token
    worst_token_at: tuple[int, ...]  # (batch, token)
    norm_ratio: float  # |a| / |b|
    max_abs: float
    worst_index: tuple[int, ...]  # of max_abs
    cosine: float
    pcc: float  # Pearson's correlation
    ulp: tuple[int, int, int]  # median, 99th percentile, maximum, in the coarser dtype
    nonfinite: int  # NaN and infinities in the reference
    misplaced: int  # places where only one of the two has NaN, +infinity or -infinity

    def over(self, tolerance: float) -> bool:
        guarded = self.worst_token <= GUARD * tolerance and abs(self.norm_ratio - 1) <= tolerance
        return self.misplaced > 0 or not (self.relative_l2 <= tolerance and guarded)


@dataclass(frozen=True)
class Row:
    """The comparison of one tensor in two captures."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # the coarser of both
    kind: Kind  # the lesser of both
    tolerance: float
    errors: Errors | None  # None where they cannot be compared; `fault` says why
    fault: str = ""
    values: int = 0  # finite numbers that were compared; 0 where statistics alone are stored
    identical: bool = False  # the bytes are equal, or have the hash that the reference states

    @property
    def over(self) -> bool:
        return self.errors is None or self.errors.over(self.tolerance)

    @property
    def ratio(self) -> float:
        """Return relative L2 / tolerance."""
        if self.errors is None:
            return math.inf
        if self.tolerance:
            return self.errors.relative_l2 / self.tolerance
        return math.inf if self.errors.relative_l2 else 0.0


# ---------------------------------------------------------------- two tensors


def errors(a: Tensor, b: Tensor) -> Errors:
    """Compare two tensors of one shape, of any dtypes; `b` is the reference.

    UserError for tensors of different shapes.
    """
    if a.shape != b.shape:
        raise UserError(f"a: has another shape (got {tuple(a.shape)}, expected {tuple(b.shape)}).")
    a, b = a.detach().cpu(), b.detach().cpu()
    x, y = a.double(), b.double()
    finite = x.isfinite() & y.isfinite()
    alike, nonfinite = (x == y) | (x.isnan() & y.isnan()), int((~y.isfinite()).sum())
    x, y = x.where(finite, 0), y.where(finite, 0)
    distance = x - y
    if not (a.is_floating_point() or b.is_floating_point()):  # exact beyond 2^53
        distance = (a.long() - b.long()).double()
    scale = _scale(x, y)
    x, y, distance = x / scale, y / scale, distance / scale
    worst = int(distance.abs().argmax()) if distance.numel() else 0
    worst_token, token = _worst_token(token_norms(distance), token_norms(y))
    count = finite.sum().clamp(min=1)
    x_centred, y_centred = ((z - z.sum() / count).where(finite, 0) for z in (x, y))
    return Errors(
        relative_l2=_relative(distance.norm().item(), y.norm().item(), scale),
        worst_token=worst_token,
        worst_token_at=token,
        norm_ratio=_norm_ratio(x.norm().item(), y.norm().item()),
        max_abs=scale * distance.abs().max().item() if distance.numel() else 0.0,
        worst_index=_index(worst, b.shape),
        cosine=_cosine(x, y),
        pcc=_cosine(x_centred, y_centred),
        ulp=_ulp(a[finite], b[finite]),
        nonfinite=nonfinite,
        misplaced=int((~finite & ~alike).sum()),
    )


def _scale(x: Tensor, y: Tensor) -> float:
    """Return the largest value, by which both are divided where their squares would not be exact.

    The squares of 1e-200 are 0, and those of 1e200 are infinite.
    """
    largest = max((z.abs().max().item() for z in (x, y) if z.numel()), default=0.0)
    return 1.0 if largest == 0 or 1e-12 < largest < 1e12 else largest


def _relative(distance: float, norm: float, scale: float = 1.0) -> float:
    return distance / norm if norm else scale * distance


def _norm_ratio(a: float, b: float) -> float:
    if b:
        return a / b
    return 1.0 if a == 0 else math.inf


def _cosine(x: Tensor, y: Tensor) -> float:
    """Return 1 if both are all zero, 0 if only one is."""
    norms = x.norm().item() * y.norm().item()
    return min((x * y).sum().item() / norms, 1.0) if norms else float(x.norm() == y.norm())


def _worst_token(distance: Tensor, norm: Tensor) -> tuple[float, tuple[int, ...]]:
    """Return the largest |a - b| / |b| of a token, with |b| at least a tenth of the RMS norm."""
    if not norm.numel():
        return 0.0, ()
    floor = norm.double().square().mean().sqrt() / 10
    ratio = distance.double() / norm.double().clamp(min=floor) if floor else distance.double()
    return ratio.max().item(), _index(int(ratio.argmax()), ratio.shape)


def _index(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(flat, shape))) if math.prod(shape) else ()


def _ulp(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """Return the median, 99th percentile and maximum distance in units in the last place.

    The units are those of the coarser dtype; float64 is counted in float32.
    """
    finest = torch.float32 if b.is_floating_point() else torch.int64
    dtype = min(a.dtype, b.dtype, finest, key=_fineness)
    steps = (_ordered(a.to(dtype)) - _ordered(b.to(dtype))).abs().sort().values
    if not len(steps):
        return 0, 0, 0
    last = len(steps) - 1
    return int(steps[int(last * 0.5)]), int(steps[int(last * 0.99)]), int(steps[last])


def _ordered(x: Tensor) -> Tensor:
    """Map floats to int64 so that neighbouring floats differ by one, through zero."""
    if not x.is_floating_point():
        return x.long()
    integer = {1: torch.int8, 2: torch.int16, 4: torch.int32}[x.itemsize]
    bits = x.view(integer).long()
    return torch.where(bits < 0, torch.iinfo(integer).min - bits, bits)


def _fineness(dtype: torch.dtype) -> int:
    return COARSEST_FIRST.index(DTYPES[dtype])


# ---------------------------------------------------------------- two captures


def compare(
    a: Capture,
    b: Capture,
    tolerance: float | Mapping[str, float] | None = None,
    only: Sequence[str] = (),
    precision: str | None = None,
) -> list[Row]:
    """Compare every tensor that both captures have, in the order of `b`, the reference.

    `tolerance`: of all tensors, or by name. Default: FACTOR times the rounding that was measured in
    the precision of `a`, else TOLERANCES of the coarser dtype. `precision`: the one in which `a`
    was computed; default: `precision_of(a)`. UserError if the captures are of different models,
    sizes, steps or prompts, or have no tensor in common.
    """
    check_alike(a, b)
    runs = PRECISIONS[precision or precision_of(a)], PRECISIONS[precision_of(b)]
    names = [name for name in b.names if name in a.records]
    if not names:
        ours, theirs = (", ".join(x.names[:3]) for x in (a, b))
        raise UserError(
            f"{a.path}: has no tensor in common with {b.path} (got {ours}, ..., "
            f"expected {theirs}, ...). Save the port's tensors by the reference's names."
        )
    check_patterns(only, names)
    return [_row(name, a, b, tolerance, *runs) for name in names if matches(name, only)]


def precision_of(capture: Capture) -> str:
    """Return the precision of a run: what the recipe says, else the dtype of most tensors."""
    if capture.recipe.get("dtype") in PRECISIONS:
        return capture.recipe["dtype"]
    spelled = {value: key for key, value in PRECISIONS.items()}
    dtypes = [spelled[r.dtype] for r in capture.records.values() if r.dtype in spelled]
    return Counter(dtypes).most_common(1)[0][0] if dtypes else "float64"


def check_alike(a: Capture, b: Capture) -> None:
    """Raise UserError where both recipes have a key and disagree about it."""
    differ = [
        key
        for key in AGREE
        if key in a.recipe and key in b.recipe and a.recipe[key] != b.recipe[key]
    ]
    if differ:
        what = "; ".join(
            f"{key} is {a.recipe[key]!r:.60} and {b.recipe[key]!r:.60}" for key in differ
        )
        raise UserError(
            f"{a.path}: is of another run than {b.path}: {what}. "
            "Capture both with the same arguments."
        )


def unmatched(a: Capture, b: Capture) -> tuple[list[str], list[str]]:
    """Return the names that only `a` has, and those that only `b` has."""
    only_a = [name for name in a.names if name not in b.records]
    only_b = [name for name in b.names if name not in a.records]
    return only_a, only_b


def first_over(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.over), None)


def _row(
    name: str,
    a: Capture,
    b: Capture,
    tolerance: float | Mapping[str, float] | None,
    run_a: str,
    run_b: str,
) -> Row:
    """`run_a`, `run_b`: the dtypes in which the captures were computed."""
    ours, theirs = a.records[name], b.records[name]
    shape = theirs.shape
    dtype = min(ours.dtype, theirs.dtype, key=COARSEST_FIRST.index)
    kinds = {ours.kind, theirs.kind}
    kind = min(kinds, key=LEAST_FIRST.index)
    if kinds == {"slice", "probe"}:  # other values of the tensor are stored in each
        kind = "statistics"
    if isinstance(tolerance, Mapping):
        tolerance = tolerance.get(name)
    if tolerance is None:
        tolerance = measured_tolerance(b, name, _coarsest(ours.dtype, run_a))
    if tolerance is None:
        tolerance = _default_tolerance(dtype, theirs.dtype, run_a, run_b)
    row = Row(name, shape, dtype, kind, tolerance, None)
    if ours.shape != shape:
        reason = _why_shapes_differ(name, ours.shape, shape)
        return replace(row, fault=f"has shape {ours.shape} (expected {shape}){reason}")
    identical = _identical(name, a, b)
    if identical and kind == "full":
        found = _equal(b.tensors[name])
    elif kind == "statistics":
        found = _of_statistics(_statistics(a, name), _statistics(b, name), math.prod(shape))
    elif kind == "probe":
        found = _of_probes(name, a, b)
    elif kind == "slice":
        found = _of_slices(name, a, b)
    else:
        found = errors(a.tensors[name], b.tensors[name])
    values = _stored_values(kind, shape)
    if identical:  # all values have the hash of the reference's
        values = math.prod(shape)
    return replace(row, errors=found, values=max(values - found.nonfinite, 0), identical=identical)


def _why_shapes_differ(name: str, a: Sequence[int], b: Sequence[int]) -> str:
    """Say so where shapes look as those of another request do."""
    differ = [axis - len(b) for axis, (m, n) in enumerate(zip(a, b)) if m != n]
    if len(a) != len(b) or len(b) < 2 or not set(differ) <= {-3, -2, -1}:
        return ""
    if name == "image" or (len(b) == 4 and name.endswith(("noise", "latents", "pixels"))):
        return ": the images have different sizes"
    if len(b) < 3 and not name.startswith("ids/") or differ != [-2]:
        return ""
    if name.startswith(("text/", "ids/txt")) or "txt" in name:
        return ": the texts have different numbers of tokens"
    if "single_blocks" in name or "/attention/" in name:
        return ": the images have different sizes, or the texts different numbers of tokens"
    return ": the images have different sizes"


def _identical(name: str, a: Capture, b: Capture) -> bool:
    """Return whether all bytes of `a` are those of `b`, or have the hash that `b` states.

    What `a` states about its own tensor is no evidence: a port may have copied its metadata.
    """
    ours, theirs = a.records[name], b.records[name]
    if ours.kind != "full" or (ours.dtype, ours.shape) != (theirs.dtype, theirs.shape):
        return False
    x = a.tensors[name]
    if theirs.kind == "full":
        return torch.equal(_bytes(x), _bytes(b.tensors[name]))
    return sha256(raw(x)).hexdigest() == theirs.sha256


def _bytes(tensor: Tensor) -> Tensor:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8)


def _equal(tensor: Tensor) -> Errors:
    nonfinite = 0
    if tensor.is_floating_point():
        tensor = tensor.float() if tensor.itemsize == 1 else tensor  # float8 has no isfinite
        nonfinite = int((~tensor.isfinite()).sum())
    return Errors(0.0, 0.0, (), 1.0, 0.0, (), 1.0, 1.0, (0, 0, 0), nonfinite, 0)


def _stored_values(kind: Kind, shape: Sequence[int]) -> int:
    """Return how many values of a tensor are stored."""
    if kind == "statistics":
        return 0
    if kind == "probe":
        return PROBE
    return math.prod(min(n, SLICE) if kind == "slice" else n for n in shape)


def measured_tolerance(b: Capture, name: str, dtype: str, local: bool = False) -> float | None:
    """Return FACTOR times the rounding of a run in this dtype; None where it was not measured.

    `local`: of one module on its recorded inputs.
    """
    for precision, spelled in PRECISIONS.items():
        if spelled == dtype and name in b.rounding.get(precision, {}):
            rounding = b.rounding[precision][name]
            found = rounding.local if local else rounding.accumulated
            return None if found is None else FACTOR * found
    return None


def _coarsest(dtype: str, *runs: str) -> str:
    """Return the coarsest dtype of a tensor and its runs. Integers keep theirs."""
    return min(dtype, *runs, key=COARSEST_FIRST.index) if dtype.startswith(("F", "BF")) else dtype


def _default_tolerance(dtype: str, reference: str, *runs: str) -> float:
    """Return the tolerance of the coarser dtype of the tensor and the runs.

    A run in bfloat16 keeps its latents in float32; they are no more exact for it. Integers of the
    reference must be equal, in whatever dtype a port stores them; but an image (U8) is rounded.
    """
    if reference in INTEGERS:
        return TOLERANCES["U8"] if dtype == reference == "U8" else 0.0
    return TOLERANCES.get(_coarsest(dtype, *runs), 0.0)


def _stored(capture: Capture, name: str, kind: Kind) -> Tensor:
    tensor = capture.tensors[name]
    return tensor if capture.kind(name) == kind else reduce(name, tensor, kind)


def _of_probes(name: str, a: Capture, b: Capture) -> Errors:
    """Compare 4096 values, from which relative L2 is estimated, and the norms of all tokens."""
    found = errors(*(_stored(capture, name, "probe") for capture in (a, b)))
    x, y = (
        c.tokens(name) if c.kind(name) == "probe" else token_norms(c.tensors[name]) for c in (a, b)
    )
    finite = x.isfinite() & y.isfinite()
    moved = int((x.isfinite() != y.isfinite()).sum())
    x, y = x.where(finite, 0), y.where(finite, 0)
    x = x.where((x - y).abs() > NORM_ROUNDING * y, y)
    worst_token, token = _worst_token((x - y).abs(), y)
    (flat,), shape = found.worst_index, b.records[name].shape
    return replace(
        found,
        worst_token=worst_token,
        worst_token_at=token,
        misplaced=max(found.misplaced, moved),
        norm_ratio=_norm_ratio(x.double().norm().item(), y.double().norm().item()),
        worst_index=_index(int(positions(name, math.prod(shape))[flat]), shape),
    )


def _of_slices(name: str, a: Capture, b: Capture) -> Errors:
    """Compare a corner, and the statistics of the whole tensors."""
    found = errors(*(_stored(capture, name, "slice") for capture in (a, b)))
    size = math.prod(b.records[name].shape)
    whole = _of_statistics(_statistics(a, name), _statistics(b, name), size)
    return replace(
        found,
        relative_l2=max(found.relative_l2, whole.relative_l2),
        norm_ratio=whole.norm_ratio,
        misplaced=max(found.misplaced, whole.misplaced),
    )


def _statistics(capture: Capture, name: str) -> dict:
    """Return what is computed from the values, or else what the capture states."""
    if capture.kind(name) == "full":
        return statistics(capture.tensors[name])
    return capture.records[name].statistics or {}


def _of_statistics(a: dict, b: dict, size: int) -> Errors:
    """Return the least relative L2 that the statistics allow; other errors are unknown, NaN.

    For n values, |a - b| is at least as large as the difference of the norms, of the extremes, and
    of the means and standard deviations times sqrt(n).
    """
    nan, norm = math.nan, b.get("l2", 0.0)
    nonfinite = b["nan"] + b["inf"]
    root = math.sqrt(max(size - nonfinite, 0))
    weights = {"l2": 1.0, "min": 1.0, "max": 1.0, "mean": root, "std": root}
    differences = [w * abs(a.get(key, 0.0) - b.get(key, 0.0)) for key, w in weights.items()]
    least = nan if any(map(math.isnan, differences)) else _relative(max(differences), norm)
    if least < TOLERANCES["F64"]:  # sums of another order
        least = 0.0
    misplaced = abs(a["nan"] - b["nan"]) + abs(a["inf"] - b["inf"])
    ratio = _norm_ratio(a.get("l2", 0.0), norm)
    return Errors(least, least, (), ratio, nan, (), nan, nan, (0, 0, 0), nonfinite, misplaced)


# ---------------------------------------------------------------- text


def missing(rows: Sequence[Row], names: Sequence[str], only: Sequence[str] = ()) -> list[str]:
    """Return which of the names that should have been compared have no row.

    `names`: of the reference. Those that the patterns `only` do not select need no row.
    """
    compared = {row.name for row in rows}
    return [name for name in names if name not in compared and matches(name, only)]


def is_incomplete(rows: Sequence[Row], missing: Sequence[str] = ()) -> bool:
    """Return whether tensors are missing, or compared by less than all values or a sample of them.

    Corners and statistics can show a fault, but no equality: the rest of a tensor may be wrong.
    """
    partly = any(row.kind in ("statistics", "slice") and not row.identical for row in rows)
    return bool(missing) or partly


def exit_code(rows: Sequence[Row], missing: Sequence[str] = ()) -> int:
    """Return 1 if a tensor is over its tolerance or no value was compared, INCOMPLETE, or 0."""
    if first_over(rows) is not None or not any(row.values for row in rows):
        return 1
    return INCOMPLETE if is_incomplete(rows, missing) else 0


def verdict(rows: Sequence[Row], missing: Sequence[str] = ()) -> str:
    """Return one sentence: the first tensor over its tolerance, or the one nearest to it.

    `missing`: tensors of the reference that should have been compared and have no row.
    """
    row = first_over(rows)
    if row is not None:
        return _verdict_over(row, rows)
    compared = [row for row in rows if row.values]
    if not compared:
        return "nothing was compared" + _left_open(rows, missing)
    nearest = max(rows, key=lambda row: row.ratio)
    subject = f"all {len(compared):,} tensors are"
    if is_incomplete(rows, missing):
        count = len(rows) + len(missing)
        subject = f"incomplete: {len(compared):,} of {count:,} tensors are"
    if nearest.ratio:
        text = (
            f"{subject} within tolerance; "
            f"{printable(nearest.name)} comes nearest, at {nearest.ratio:.2g} of it"
        )
    elif all(row.identical for row in compared):
        text = f"{subject} equal to the bit"
    else:
        text = f"{subject} equal"
        in_value = sum(row.kind == "full" and not row.identical for row in compared)
        if in_value:
            text += f", {in_value:,} of them in value alone: dtypes or signs of zeros differ"
    return text + _left_open(rows, missing)


def _left_open(rows: Sequence[Row], missing: Sequence[str]) -> str:
    """Say how many tensors were compared in part only, or not at all."""
    partly = [row for row in rows if row.values and not row.identical]
    probes = sum(row.kind == "probe" for row in partly)
    corners = sum(row.kind == "slice" for row in partly)
    alone = sum(row.kind == "statistics" and not row.values for row in rows)
    empty = sum(row.kind != "statistics" and not row.values for row in rows)
    parts = (
        (probes, "compared by 4,096 values and the norms of all tokens"),
        (corners, "compared by a corner and statistics"),
        (alone, "not compared, because statistics alone are stored"),
        (empty, "not compared, because they have no finite values"),
        (len(missing), "not compared, because they are missing"),
    )
    return "".join(f"; {count:,} {text}" for count, text in parts if count)


def _verdict_over(row: Row, rows: Sequence[Row]) -> str:
    count = sum(row.over for row in rows)
    over = (
        f"{count:,} of {len(rows):,} tensors are over tolerance; "
        f"the first is {printable(row.name)}:"
    )
    e = row.errors
    if e is None:
        return f"{over} {printable(row.fault)}"
    if e.misplaced:
        return f"{over} NaN or infinity differs in {e.misplaced:,} places"
    return (
        f"{over} relative L2 {e.relative_l2:.2g} of {row.tolerance:.2g}, "
        f"worst token {e.worst_token_at} {e.worst_token:.2g}, |a|/|b| {e.norm_ratio:.6g}, "
        f"max abs {e.max_abs:.2g} at {e.worst_index}"
    )


def coverage(
    rows: Sequence[Row],
    reference: Capture,
    judged: Capture | None = None,
    only: Sequence[str] = (),
    missing: str = "were not computed",
) -> str:
    """Return how many of the reference's tensors have a row, and why the others have none.

    `judged`: the other capture; None for a run, whose `missing` tensors are described by a verb.
    `only`: the patterns of the comparison.
    """
    have = {row.name for row in rows}
    rest = [name for name in reference.names if name not in have]
    lost = [name for name in rest if judged is None or name not in judged.records]
    if judged is None:
        lost = [name for name in lost if matches(name, only)]
    reasons = [f"{len(rows):,} of the {len(reference.names):,} tensors of {reference.path}"]
    if lost:
        why = missing if judged is None else f"are not in {judged.path}"
        reasons.append(f"{len(lost):,} {why} ({_few(lost)})")
    if len(rest) > len(lost):
        reasons.append(f"{len(rest) - len(lost):,} are left out by the filter")
    if judged is not None:
        extra, _ = unmatched(judged, reference)
        if extra:
            reasons.append(f"{len(extra):,} are in {judged.path} alone ({_few(extra)})")
    return printable("compared: " + "; ".join(reasons))


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")


def about_copies(rows: Sequence[Row], a: Capture, b: Capture) -> str:
    """Return a caution where `a` may be a copy of `b`, else an empty text."""
    if not a.recipe or a.recipe != b.recipe or a.names != b.names:
        return ""
    if not all(row.identical for row in rows):
        return ""
    return (
        f"{a.path} has the recipe and all bytes of {b.path}: one file is a copy of the other, or "
        "the same code made both. That shows nothing about a port."
    )


def about_tolerances(
    rows: Sequence[Row], a: Capture, b: Capture, precision: str | None = None
) -> str:
    """Return a caution where `a` alone is the reason for a larger tolerance, else an empty text.

    The reason is the dtype of its tensors, or the dtype in which it says that it ran.
    """
    precision = precision or precision_of(a)
    runs = PRECISIONS[precision], PRECISIONS[precision_of(b)]

    def is_relaxed(row: Row) -> bool:
        if row.name in b.rounding.get(precision, {}):  # a measurement is the reason
            return False
        dtype = b.records[row.name].dtype
        given = _default_tolerance(row.dtype, dtype, *runs)
        return row.tolerance == given > _default_tolerance(dtype, dtype, runs[1])

    count = sum(map(is_relaxed, rows))
    if not count:
        return ""
    text = (
        f"{count:,} tensors were allowed more than the reference's dtype allows, because {a.path} "
        "has coarser ones, or says that it ran in a coarser one."
    )
    if precision != "float32" and precision not in b.rounding:
        text += (
            f" {b.path} has no measured tolerances of {precision}: rounding alone may exceed the "
            f"flat {TOLERANCES[PRECISIONS[precision]]:g} in late steps. "
            "`parity.py calibrate` measures them."
        )
    return text


def check_two_files(a: Capture, b: Capture) -> None:
    """Raise UserError if both are one file: it would equal itself whatever is in it."""
    if a.path.samefile(b.path):
        raise UserError(
            f"{a.path}: is the same file as {b.path}, and every file equals itself. "
            "Pass the port's own tensors."
        )


COLUMNS = (
    f"{'':4} {'rel L2':>8} {'tol.':>8} {'token':>8} {'|a|/|b|-1':>9} {'max abs':>8} {'1-PCC':>8} "
    f"{'ULP':>19}  name"
)


LEGEND = (  # of COLUMNS, once a table
    "rel L2: |a-b|/|b|; tol.: the largest allowed; token: rel L2 of the worst one; |a|/|b|: norms;",
    "1-PCC: one minus Pearson's correlation; ULP: |a-b| in units in the last place, p50/p99/max",
)


def table(rows: Sequence[Row], compared: str = "", missing: Sequence[str] = ()) -> str:
    """Return the verdict in one line, `coverage` in another, and all rows, as they were run."""
    head = [verdict(rows, missing), compared] if compared else [verdict(rows, missing)]
    return "\n".join([*head, "", *LEGEND, COLUMNS, *map(format_row, rows)])


def format_row(row: Row) -> str:
    mark, e = "OVER" if row.over else "", row.errors
    if e is None:
        return f"{mark:4} {printable(row.name)} {printable(row.fault)}"
    name = f"{printable(row.name)} {'x'.join(map(str, row.shape))} {row.dtype}"
    if row.kind != "full":
        name += f" ({row.kind})"
    if e.nonfinite or e.misplaced:
        name += f" {e.nonfinite:,} NaN or infinite, {e.misplaced:,} misplaced"
    return (
        f"{mark:4} {e.relative_l2:8.1e} {row.tolerance:8.1e} {e.worst_token:8.1e} "
        f"{e.norm_ratio - 1:9.1e} {e.max_abs:8.1e} {1 - e.pcc:8.1e} {format_ulp(e):>19}  {name}"
    )


def format_ulp(e: Errors) -> str:
    return "/".join(f"{n:,}" if n < 10_000 else f"{n:.0e}" for n in e.ulp)


def to_json(rows: Sequence[Row]) -> str:
    """Return a list of objects with the fields of `Row` and `Errors`; NaN and infinity are null."""
    objects = [_strict(asdict(row) | {"over": row.over}) for row in rows]
    return json.dumps(objects, indent=1, allow_nan=False)


def _strict(x):
    """Return what JSON can hold: it has no NaN and no infinity."""
    if isinstance(x, dict):
        return {key: _strict(value) for key, value in x.items()}
    return None if isinstance(x, float) and not math.isfinite(x) else x
