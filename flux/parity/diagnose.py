"""Name the bug of a port: recompute its first wrong tensor with each known bug.

Only the port's tensor and the reference's recorded tensors are read. So what the port computed
before that tensor does not matter. `rerun.py` recomputes, `known_bugs.py` lists the bugs.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flux.errors import UserError
from flux.parity.capture_file import Capture, reduce
from flux.parity.compare import Row, errors, precision_of, verdict
from flux.parity.known_bugs import KNOWN_BUGS
from flux.parity.known_bugs3 import KNOWN_BUGS3
from flux.parity.rerun import KnownBug, Rerun, reruns
from flux.pipeline import Pipeline
from flux.runtime.terminal import printable

# A match must be this many times nearer to the bug's tensor than to the reference's.
# A wrong epsilon moves a tensor by about ten times its rounding, no more.
MARGIN = 5
LISTED = 5  # trials in the text


@dataclass(frozen=True)
class Trial:
    """One known bug, tried."""

    bug: KnownBug
    distance: float  # relative L2 of the port's tensor to the tensor with the bug
    matches: bool
    variant: str = ""  # of a bug that can be made in several ways

    @property
    def description(self) -> str:
        return self.bug.description.replace("{}", self.variant)


@dataclass(frozen=True)
class Diagnosis:
    rows: Sequence[Row]
    row: Row  # of the first tensor over its tolerance
    trials: list[Trial]  # one for each bug that applies: the match first, then the nearest
    baseline_error: float | None  # relative L2 of our own result, where over the tolerance
    known: int = len(KNOWN_BUGS)  # bugs of the model's family

    @property
    def bug(self) -> KnownBug | None:
        return self.trials[0].bug if self.trials and self.trials[0].matches else None


def diagnose(
    rows: Sequence[Row], port: Capture, reference: Capture, pipe: Pipeline
) -> Diagnosis | None:
    """Return the known bug whose effect on the port's tensor matches, and the others tried.

    None if no row is over its tolerance. `pipe` must have the weights of the reference. A bug
    matches if the port's tensor is within tolerance of the bug's tensor and clearly nearer to it
    than to the reference.
    """
    index = next((index for index, row in enumerate(rows) if row.over), None)
    if index is None:
        return None
    row, baseline_error = rows[index], None
    best: dict[KnownBug, Trial] = {}
    bugs = KNOWN_BUGS3 if pipe.spec.flux3 else KNOWN_BUGS
    if (row.errors is not None or is_other_shape(row, port)) and row.kind != "statistics":
        previous = rows[index - 1].name if index else None
        candidates = reruns(row.name, reference, pipe, previous)
        baseline_error = _baseline_error(candidates[0], row.tolerance)
        for rerun in candidates:
            for bug in bugs:
                trial = _try(bug, rerun, port, row)
                if trial is not None:
                    best[bug] = min(trial, best.get(bug, trial), key=_rank)
            if any(trial.matches for trial in best.values()):
                break
    return Diagnosis(rows, row, sorted(best.values(), key=_rank), baseline_error, len(bugs))


def is_other_shape(row: Row, port: Capture) -> bool:
    """Whether the port's tensor is there in full, in another shape than the reference's."""
    record = port.records.get(row.name)
    return record is not None and record.kind == "full" and record.shape != row.shape


def _rank(trial: Trial) -> tuple[bool, float]:
    return not trial.matches, trial.distance


def _try(bug: KnownBug, rerun: Rerun, port: Capture, row: Row) -> Trial | None:
    """None where the bug does not apply or changes nothing, or the capture lacks an input.

    A bug whose tensors have other shapes here cannot be the cause either.
    """
    if not re.search(bug.where, row.name):
        return None
    try:
        computed = bug.compute(rerun)
    except torch.OutOfMemoryError:
        raise
    except (LookupError, UserError, RuntimeError):
        return None
    variants = {"": computed} if isinstance(computed, Tensor) else computed
    trials = [_judge(bug, text, tensor, rerun, port, row) for text, tensor in variants.items()]
    return min((trial for trial in trials if trial is not None), key=_rank, default=None)


def _judge(
    bug: KnownBug, variant: str, tensor: Tensor, rerun: Rerun, port: Capture, row: Row
) -> Trial | None:
    if tuple(tensor.shape) != port.records[row.name].shape:
        return None
    if precision_of(port) in variant:  # such a port rounds everywhere: that is no bug
        return None
    if rerun.unpatched is not None and tensor.equal(rerun.unpatched):
        return None
    found = errors(port.tensors[row.name], reduce(row.name, tensor, port.kind(row.name)))
    to_reference = row.errors
    nearer = (
        to_reference is None  # of another shape
        or MARGIN * found.relative_l2 <= to_reference.relative_l2
        or to_reference.misplaced > 0
    )
    return Trial(bug, found.relative_l2, nearer and not found.over(row.tolerance), variant)


def _baseline_error(rerun: Rerun, tolerance: float) -> float | None:
    """Without a bug, the reference's weights should give the reference's tensor."""
    if rerun.unpatched is None or rerun.reference.kind(rerun.name) != "full":
        return None
    found = errors(rerun.unpatched, rerun.expected)
    return found.relative_l2 if found.over(tolerance) else None


# ---------------------------------------------------------------- format


def format_diagnosis(diagnosis: Diagnosis) -> str:
    """Return the verdict, the bug or that none matches, and the nearest trials."""
    row, bug, trials = diagnosis.row, diagnosis.bug, diagnosis.trials
    lines = [verdict(diagnosis.rows), ""]
    if bug is not None:
        to_reference = "another shape than"
        if row.errors is not None:
            to_reference = f"{row.errors.relative_l2:.1e} to"
        lines.append(
            f"cause: {bug.name}: {trials[0].description} (relative L2 {trials[0].distance:.1e} "
            f"to the result with this bug, {to_reference} the reference)"
        )
    else:
        reason = _why_no_match(diagnosis)
        lines.append(f"none of the {diagnosis.known} known bugs matches{reason}")
    if diagnosis.baseline_error is not None:
        lines.append(
            f"note: without any bug, these weights give {printable(row.name)} with relative L2 "
            f"{diagnosis.baseline_error:.1e} to the reference. They are not the weights that the "
            "reference was captured with"
        )
    if trials:
        lines += ["", f"tried {len(trials)} bugs; relative L2 of the port's tensor to each result:"]
    for trial in trials[:LISTED]:
        lines.append(f"{trial.distance:9.1e}  {trial.bug.name}: {trial.description}")
    return "\n".join(lines)


def _why_no_match(diagnosis: Diagnosis) -> str:
    row = diagnosis.row
    if row.errors is None:
        return f": {printable(row.name)} {printable(row.fault)}"
    if not diagnosis.trials:
        return ": none applies here. Capture every tensor of both sides in full to try more"
    return f": the nearest is at relative L2 {diagnosis.trials[0].distance:.1e}"
