"""Name the mistake: the first tensor over budget, computed again with each known mistake, until one gives what the port has.

Only the port's tensor is read, and else what the reference recorded, so that what the port did before plays no part. The
runs are in case.py, the mistakes in mistakes.py.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass

from flux.errors import UserError
from flux.parity.capture_file import Capture, reduce
from flux.parity.compare import Row, errors, verdict
from flux.parity.known_bugs import MISTAKES, Mistake
from flux.parity.rerun import Case, cases
from flux.pipeline import Pipeline

CLEARLY = 5  # times nearer to the mistake than to the reference; a wrong eps is some ten times rounding, and no more
SHOWN = 5  # trials


@dataclass(frozen=True)
class Trial:
    mistake: Mistake
    residual: float  # relative L2 of the port's tensor to what the mistake gives
    fits: bool


@dataclass(frozen=True)
class Diagnosis:
    rows: Sequence[Row]
    row: Row  # of the first tensor over budget
    trials: list[
        Trial
    ]  # what fits first, then the nearest; one for each mistake that could be made there
    unsound: (
        float | None
    )  # relative L2 to the reference of what we compute without a mistake, where that is over budget

    @property
    def cause(self) -> Mistake | None:
        return self.trials[0].mistake if self.trials and self.trials[0].fits else None


def diagnose(
    rows: Sequence[Row], port: Capture, reference: Capture, pipe: Pipeline
) -> Diagnosis | None:
    """What is wrong with the first tensor over budget of a comparison; None if there is none.

    `pipe` has the weights that the reference was captured with. A mistake fits if the port is within budget of what it
    gives, and clearly nearer to that than to the reference.
    """
    place = next((place for place, row in enumerate(rows) if row.over), None)
    if place is None:
        return None
    row, best, unsound = rows[place], {}, None
    if row.errors is not None and row.kind != "statistics":
        tried = cases(row.name, reference, pipe, before=rows[place - 1].name if place else None)
        unsound = unsoundness(tried[0], row.budget)
        for case in tried:
            for trial in filter(None, (attempt(mistake, case, port, row) for mistake in MISTAKES)):
                best[trial.mistake] = min(trial, best.get(trial.mistake, trial), key=order)
            if any(trial.fits for trial in best.values()):
                break
    return Diagnosis(rows, row, sorted(best.values(), key=order), unsound)


def order(trial: Trial) -> tuple[bool, float]:
    return not trial.fits, trial.residual


def attempt(mistake: Mistake, case: Case, port: Capture, row: Row) -> Trial | None:
    """None where the mistake cannot be made or makes no difference, or the capture lacks what it takes."""
    if not re.search(mistake.where, row.name):
        return None
    try:
        tensor = mistake.wrong(case)
    except (LookupError, UserError):
        return None
    if tuple(tensor.shape) != row.shape or (case.honest is not None and tensor.equal(case.honest)):
        return None
    found = errors(port.tensors[row.name], reduce(row.name, tensor, port.kind(row.name)))
    near = CLEARLY * found.relative_l2 <= row.errors.relative_l2 or row.errors.misplaced > 0
    return Trial(mistake, found.relative_l2, near and not found.over(row.budget))


def unsoundness(case: Case, budget: float) -> float | None:
    """Without a mistake, the reference's weights give the reference's tensor."""
    if case.honest is None or case.reference.kind(case.name) != "full":
        return None
    found = errors(case.honest, case.truth)
    return found.relative_l2 if found.over(budget) else None


# ---------------------------------------------------------------- to read


def told(diagnosis: Diagnosis) -> str:
    """The verdict, the cause or that none fits, and the nearest of what was tried."""
    row, cause, trials = diagnosis.row, diagnosis.cause, diagnosis.trials
    lines = [verdict(diagnosis.rows), ""]
    if cause:
        against = f"relative L2 {trials[0].residual:.1e} to that, and {row.errors.relative_l2:.1e} to what it should be"
        lines += [f"cause: {cause.name}: {cause.sentence} ({against})"]
    else:
        lines += [
            f"none of the {len(MISTAKES)} known mistakes explains it" + unexplained(diagnosis)
        ]
    if diagnosis.unsound is not None:
        lines += [
            f"note: without any mistake, these weights give {row.name} with relative L2 {diagnosis.unsound:.1e} to the "
            "reference: they are not what it was captured with"
        ]
    if trials:
        lines += ["", f"tried {len(trials)}; relative L2 of the port to each:"]
    return "\n".join([*lines, *map(line, trials[:SHOWN])])


def unexplained(diagnosis: Diagnosis) -> str:
    row = diagnosis.row
    if row.errors is None:
        return f": it {row.fault}"
    if not diagnosis.trials:
        return ": there is nothing to try; captures with every tensor in full, of both sides, tell more"
    return f": the nearest is still {diagnosis.trials[0].residual:.1e} away"


def line(trial: Trial) -> str:
    return f"{trial.residual:9.1e}  {trial.mistake.name}: {trial.mistake.sentence}"
