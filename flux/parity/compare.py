"""Two tensors -> errors; two captures -> rows in the order of execution, and the first that is over its budget.

The verdict is the relative L2, guarded by the worst token's and by the ratio of the norms; NaN and infinity must match in
place. The first argument is judged, the second is the reference.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch
from torch import Tensor

from flux.errors import UserError
from flux.parity.capture_file import (
    DTYPES,
    Capture,
    Kind,
    positions,
    reduce,
    statistics,
    token_norms,
)
from flux.parity.hooks import check_patterns, matches

BUDGETS = {
    "F64": 1e-12,
    "F32": 1e-4,
    "F16": 3e-3,
    "BF16": 2e-2,
    "F8_E4M3": 0.1,
    "F8_E5M2": 0.2,
    "U8": 1 / 128,
}  # else 0
GUARD = 10  # a token may err ten times as much as the whole
AGREE = (
    "model",
    "mode",
    "prompt",
    "negative_prompt",
    "width",
    "height",
    "steps",
    "guidance",
    "cfg_scale",
    "seed",
    "pictures",
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
    """How far a tensor is from a reference. All but the last two are of the values that are finite in both."""

    relative_l2: float  # |a - b| / |b|; of a reference that is all zero, |a|
    worst_token: float  # the largest relative L2 of a token
    worst_token_at: tuple[int, ...]  # (batch, token)
    norm_ratio: float  # |a| / |b|
    max_abs: float
    worst_index: tuple[int, ...]  # where that is
    cosine: float
    pcc: float  # Pearson's correlation
    ulp: tuple[int, int, int]  # p50, p99 and the largest, in the coarser of the two dtypes
    nonfinite: int  # of the reference: NaN and infinities
    misplaced: int  # places at which only one is NaN, +infinity or -infinity

    def over(self, budget: float) -> bool:
        guarded = self.worst_token <= GUARD * budget and abs(self.norm_ratio - 1) <= budget
        return self.misplaced > 0 or not (self.relative_l2 <= budget and guarded)


@dataclass(frozen=True)
class Row:
    """One tensor of two captures."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # the coarser of both
    kind: Kind  # the lesser of both
    budget: float
    errors: Errors | None  # None where they cannot be compared, for which `fault` says why
    fault: str = ""

    @property
    def over(self) -> bool:
        return self.errors is None or self.errors.over(self.budget)

    @property
    def ratio(self) -> float:
        """Relative L2 to the budget."""
        if self.errors is None:
            return math.inf
        return (
            self.errors.relative_l2 / self.budget
            if self.budget
            else math.inf
            if self.errors.relative_l2
            else 0.0
        )


# ---------------------------------------------------------------- two tensors


def errors(a: Tensor, b: Tensor) -> Errors:
    """Of two tensors of one shape, of any dtypes."""
    a, b = a.detach().cpu(), b.detach().cpu()
    x, y = a.double(), b.double()
    finite = x.isfinite() & y.isfinite()
    alike, nonfinite = (x == y) | (x.isnan() & y.isnan()), int((~y.isfinite()).sum())
    x, y = x.where(finite, 0), y.where(finite, 0)
    distance = x - y
    worst = int(distance.abs().argmax()) if distance.numel() else 0
    worst_token, token = _worst_token(token_norms(distance), token_norms(y))
    centred = ((z - z.sum() / finite.sum().clamp(min=1)).where(finite, 0) for z in (x, y))
    return Errors(
        relative_l2=_relative(distance.norm().item(), y.norm().item()),
        worst_token=worst_token,
        worst_token_at=token,
        norm_ratio=_norm_ratio(x.norm().item(), y.norm().item()),
        max_abs=distance.abs().max().item() if distance.numel() else 0.0,
        worst_index=_place(worst, b.shape),
        cosine=_cosine(x, y),
        pcc=_cosine(*centred),
        ulp=_ulp(a[finite], b[finite]),
        nonfinite=nonfinite,
        misplaced=int((~finite & ~alike).sum()),
    )


def _relative(distance: float, norm: float) -> float:
    return distance / norm if norm else distance


def _norm_ratio(a: float, b: float) -> float:
    return a / b if b else 1.0 if a == 0 else math.inf


def _cosine(x: Tensor, y: Tensor) -> float:
    """1 of two that are all zero, 0 where only one is."""
    norms = x.norm().item() * y.norm().item()
    return min((x * y).sum().item() / norms, 1.0) if norms else float(x.norm() == y.norm())


def _worst_token(distance: Tensor, norm: Tensor) -> tuple[float, tuple[int, ...]]:
    """The largest |a - b| / |b| of a token; where |b| is less than a tenth of the average, that counts in its place."""
    if not norm.numel():
        return 0.0, ()
    floor = norm.double().square().mean().sqrt() / 10
    ratio = distance.double() / norm.double().clamp(min=floor) if floor else distance.double()
    return ratio.max().item(), _place(int(ratio.argmax()), ratio.shape)


def _place(flat: int, shape: Sequence[int]) -> tuple[int, ...]:
    return tuple(map(int, np.unravel_index(flat, shape))) if math.prod(shape) else ()


def _ulp(a: Tensor, b: Tensor) -> tuple[int, int, int]:
    """How many numbers of the coarser dtype lie between, p50, p99 and at most; float64 is counted in float32."""
    dtype = min(
        a.dtype, b.dtype, torch.float32 if b.is_floating_point() else torch.int64, key=_fineness
    )
    steps = (_ordered(a.to(dtype)) - _ordered(b.to(dtype))).abs().sort().values
    return tuple(
        int(steps[int((len(steps) - 1) * share)]) if len(steps) else 0 for share in (0.5, 0.99, 1.0)
    )


def _ordered(x: Tensor) -> Tensor:
    """Floats -> int64, counted through zero, so that neighbours differ by one."""
    if not x.is_floating_point():
        return x.long()
    whole = {1: torch.int8, 2: torch.int16, 4: torch.int32}[x.itemsize]
    bits = x.view(whole).long()
    return torch.where(bits < 0, torch.iinfo(whole).min - bits, bits)


def _fineness(dtype: torch.dtype) -> int:
    return COARSEST_FIRST.index(DTYPES[dtype])


# ---------------------------------------------------------------- two captures


def compare(
    a: Capture,
    b: Capture,
    budget: float | Mapping[str, float] | None = None,
    only: Sequence[str] = (),
) -> list[Row]:
    """Every tensor that both have, in the order of `b`, the reference.

    `budget`: of all, or by name; else what was measured and stored with `b`; else BUDGETS of the coarser dtype.
    UserError if the captures are of different models, sizes, steps or prompts, or have no tensor in common.
    """
    check_alike(a, b)
    names = [name for name in b.names if name in a.records]
    if not names:
        few = [", ".join(x.names[:3]) for x in (a, b)]
        raise UserError(
            f"{a.path} ({few[0]}, ...) and {b.path} ({few[1]}, ...) have no tensor in common"
        )
    check_patterns(only, names)
    return [_row(name, a, b, budget) for name in names if matches(name, only)]


def check_alike(a: Capture, b: Capture) -> None:
    """Both recipes say the same of what was made, as far as they say anything."""
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
            f"{a.path} and {b.path} were not made of the same: {what}. Capture both with the same flags"
        )


def unmatched(a: Capture, b: Capture) -> tuple[list[str], list[str]]:
    """Names that only `a` has, and that only `b` has."""
    return [n for n in a.names if n not in b.records], [n for n in b.names if n not in a.records]


def first_over(rows: Sequence[Row]) -> Row | None:
    return next((row for row in rows if row.over), None)


def _row(name: str, a: Capture, b: Capture, budget: float | Mapping[str, float] | None) -> Row:
    ours, theirs = a.records[name], b.records[name]
    dtype = min(ours.dtype, theirs.dtype, key=COARSEST_FIRST.index)
    kinds = {ours.kind, theirs.kind}
    kind = "statistics" if kinds == {"slice", "probe"} else min(kinds, key=LEAST_FIRST.index)
    given = budget.get(name) if isinstance(budget, Mapping) else budget
    allowed = next(
        (x for x in (given, theirs.budget, _default_budget(dtype, a, b)) if x is not None), 0.0
    )
    row = Row(name, theirs.shape, dtype, kind, allowed, None)
    if ours.shape != theirs.shape:
        return replace(row, fault=f"is {ours.shape} and should be {theirs.shape}")
    if ours.sha256 and (ours.sha256, ours.dtype) == (theirs.sha256, theirs.dtype):
        nonfinite = theirs.statistics["nan"] + theirs.statistics["inf"]
        return replace(
            row, errors=Errors(0.0, 0.0, (), 1.0, 0.0, (), 1.0, 1.0, (0, 0, 0), nonfinite, 0)
        )
    if kind == "statistics":
        return replace(row, errors=_of_statistics(*(_statistics(x, name) for x in (a, b))))
    if kind == "probe":
        return replace(row, errors=_of_probes(name, a, b))
    return replace(row, errors=errors(*(_kept(x, name, kind) for x in (a, b))))


def _default_budget(dtype: str, *captures: Capture) -> float | None:
    """Of the coarser dtype: latents are float32 in a run in bfloat16 too, and no better for it."""
    runs = [
        DTYPES[getattr(torch, capture.recipe["dtype"])]
        for capture in captures
        if "dtype" in capture.recipe
    ]
    return BUDGETS.get(
        min([dtype, *runs], key=COARSEST_FIRST.index) if dtype.startswith(("F", "BF")) else dtype
    )


def _kept(capture: Capture, name: str, kind: Kind) -> Tensor:
    tensor = capture.tensors[name]
    return tensor if capture.kind(name) == kind else reduce(name, tensor, kind)


def _of_probes(name: str, a: Capture, b: Capture) -> Errors:
    """Of 4096 values, where the relative L2 is an estimate, and of all tokens' norms, of which the others follow."""
    found = errors(*(_kept(capture, name, "probe") for capture in (a, b)))
    x, y = (
        c.tokens(name) if c.kind(name) == "probe" else token_norms(c.tensors[name]) for c in (a, b)
    )
    finite = x.isfinite() & y.isfinite()
    torn = int((x.isfinite() != y.isfinite()).sum())
    x, y = x.where(finite, 0), y.where(finite, 0)
    worst_token, token = _worst_token((x - y).abs(), y)
    (flat,), shape = found.worst_index, b.records[name].shape
    return replace(
        found,
        worst_token=worst_token,
        worst_token_at=token,
        misplaced=max(found.misplaced, torn),
        norm_ratio=_norm_ratio(x.double().norm().item(), y.double().norm().item()),
        worst_index=_place(int(positions(name, math.prod(shape))[flat]), shape),
    )


def _statistics(capture: Capture, name: str) -> dict:
    return capture.records[name].statistics or statistics(capture.tensors[name])


def _of_statistics(a: dict, b: dict) -> Errors:
    """The norms' difference is the least that the relative L2 can be; of the rest nothing is known."""
    nan, norms = math.nan, (a.get("l2", 0.0), b.get("l2", 0.0))
    least = _relative(abs(norms[0] - norms[1]), norms[1])
    misplaced = abs(a["nan"] - b["nan"]) + abs(a["inf"] - b["inf"])
    nonfinite = b["nan"] + b["inf"]
    return Errors(
        least, least, (), _norm_ratio(*norms), nan, (), nan, nan, (0, 0, 0), nonfinite, misplaced
    )


# ---------------------------------------------------------------- to read


def verdict(rows: Sequence[Row]) -> str:
    """The first tensor over its budget, or how near the nearest comes to it."""
    if not rows:
        return "nothing was compared"
    row = first_over(rows)
    if row is None:
        nearest = max(rows, key=lambda row: row.ratio)
        if nearest.ratio == 0:
            return f"all {len(rows):,} tensors are equal"
        return f"all {len(rows):,} tensors are within budget; {nearest.name} comes nearest, at {nearest.ratio:.2g} of it"
    over = f"{sum(row.over for row in rows):,} of {len(rows):,} tensors are over budget; the first is {row.name}:"
    e = row.errors
    if e is None:
        return f"{over} {row.fault}"
    if e.misplaced:
        return f"{over} NaN or infinity in {e.misplaced:,} places where there should be none, or none where there should be"
    worst = f"worst token {e.worst_token_at} {e.worst_token:.2g}, |a|/|b| {e.norm_ratio:.6g}"
    return f"{over} relative L2 {e.relative_l2:.2g} of {row.budget:.2g}, {worst}, max abs {e.max_abs:.2g} at {e.worst_index}"


def table(rows: Sequence[Row]) -> str:
    """The verdict in one line, then all rows, in the order of execution."""
    head = f"{'':4} {'rel L2':>8} {'budget':>8} {'token':>8} {'|a|/|b|-1':>9} {'max abs':>8} {'1-PCC':>8} {'ULP':>19}  name"
    return "\n".join([verdict(rows), "", head, *map(_line, rows)])


def _line(row: Row) -> str:
    mark, e = "OVER" if row.over else "", row.errors
    kept = "" if row.kind == "full" else f" ({row.kind})"
    name = f"{row.name} {'x'.join(map(str, row.shape))} {row.dtype}{kept}"
    if e is None:
        return f"{mark:4} {row.name} {row.fault}"
    torn = (
        f" {e.nonfinite:,} NaN or infinite, {e.misplaced:,} misplaced"
        if e.nonfinite or e.misplaced
        else ""
    )
    ulp = "/".join(f"{n:,}" if n < 10_000 else f"{n:.0e}" for n in e.ulp)
    numbers = f"{e.relative_l2:8.1e} {row.budget:8.1e} {e.worst_token:8.1e} {e.norm_ratio - 1:9.1e} {e.max_abs:8.1e}"
    return f"{mark:4} {numbers} {1 - e.pcc:8.1e} {ulp:>19}  {name}{torn}"


def to_json(rows: Sequence[Row]) -> str:
    """A list of objects, fields as in `Row` and `Errors`; what is not a number is null."""

    def finite(x):
        return None if isinstance(x, float) and not math.isfinite(x) else x

    objects = [asdict(row) | {"over": row.over} for row in rows]
    for row in objects:
        row["errors"] = row["errors"] and {
            key: finite(value) for key, value in row["errors"].items()
        }
    return json.dumps(objects, indent=1, allow_nan=False)
