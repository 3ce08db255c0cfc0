"""The README's parity table as Markdown, and whether the one that is shown agrees with the one that is measured.

Each number is a bound: an error, rounded up to one digit, or a correlation, rounded down likewise; 0 is equality to the bit.
Processors sum in different orders, which changes an error of rounding, but not its size, and never a 0 of equal operations in
equal order. So two tables agree if they are 0 in the same places and within a factor elsewhere. Only golden tensors come from
one processor whoever compares with them: there, any two errors agree that are within what tests/test_golden.py allows.
"""

import math
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from flux.errors import UserError
from flux.parity.compare import errors

BEGIN, END = (
    "<!-- written by: python scripts/parity.py table --write -->",
    "<!-- end of what is written -->",
)
SINGLE = (
    "float32",
    "against",
    "max abs",
    "relative L2",
    "PCC",
    "golden: max abs",
    "golden: relative L2",
    "golden: PCC",
)
HALF = (
    "bfloat16",
    "against",
    "numerics",
    "max abs",
    "relative L2",
    "PCC",
    "ours to float32",
    "theirs to float32",
)
FACTORS = {"float32": 5, "bfloat16": 3}
ROUNDING = {
    "PCC": 2e-6,
    "golden: max abs": 1e-4,
    "golden: relative L2": 1e-5,
    "golden: PCC": 2e-6,
}  # agrees with 0


class Figures(NamedTuple):
    max_abs: float
    relative_l2: float
    pcc: float


@dataclass(frozen=True)
class Single:
    """A network or pipeline in float32."""

    what: str
    against: str  # the library that answered live
    live: Figures
    golden: Figures | None  # to what it answered once

    @property
    def cells(self) -> list[str]:
        return [
            self.what,
            self.against,
            *shown(self.live),
            *(shown(self.golden) if self.golden else ["–"] * 3),
        ]


@dataclass(frozen=True)
class Half:
    """A network or pipeline in bfloat16, against its reference in bfloat16."""

    what: str
    against: str
    numerics: str  # "" where there is no choice
    live: Figures
    ours: float  # relative L2 to the reference in float32, with the same rounded weights and inputs
    theirs: float  # of the reference in bfloat16 itself

    @property
    def cells(self) -> list[str]:
        return [
            self.what,
            self.against,
            self.numerics or "–",
            *shown(self.live),
            number(self.ours),
            number(self.theirs),
        ]


def figures(what: str, pairs: Iterable[tuple[Tensor, Tensor]]) -> Figures:
    """The worst of several tensors, each ours and the reference's; UserError if any has NaN or infinities."""
    found = [errors(ours, reference) for ours, reference in pairs]
    if any(e.nonfinite or e.misplaced for e in found):
        raise UserError(
            f"{what} gives NaN or infinity, here or in the reference: there is nothing to compare"
        )
    return Figures(
        max(e.max_abs for e in found), max(e.relative_l2 for e in found), min(e.pcc for e in found)
    )


# ---------------------------------------------------------------- to read


def markdown(lines: Sequence[Single | Half], ran_on: str) -> str:
    """Two tables, one a precision, and what they were measured on."""
    kinds = ((SINGLE, Single), (HALF, Half))
    tables = [
        [head, ["---"] * len(head), *(x.cells for x in lines if isinstance(x, kind))]
        for head, kind in kinds
    ]
    return "\n\n".join(
        ["\n".join(f"| {' | '.join(row)} |" for row in table) for table in tables]
        + [f"({ran_on}.)"]
    )


def shown(found: Figures) -> list[str]:
    pcc = f"{1 - bound(1 - found.pcc):.6f}".rstrip("0").rstrip(".")
    return [number(found.max_abs), number(found.relative_l2), pcc]


def number(x: float) -> str:
    return f"{bound(x):g}".replace("e-0", "e-")


def bound(x: float) -> float:
    """The least number of one digit that is no less, but for what floats are off."""
    if x <= 0:
        return 0.0
    power = math.floor(math.log10(x))
    return float(f"{math.ceil(x / 10.0**power - 1e-9)}e{power}")


# ---------------------------------------------------------------- to check


def differences(shown: str, measured: str) -> list[str]:
    """What one table says and the other does not, a sentence each. Text outside tables may differ."""
    a, b = cells(shown), cells(measured)
    lost = [f"{row}, {column}: is in one table only" for row, column in a.keys() ^ b.keys()]
    apart = [place for place in a.keys() & b.keys() if not agree(*place, a[place], b[place])]
    return sorted(
        lost
        + [
            f"{row}, {column}: {a[row, column]} is shown, and {b[row, column]} found"
            for row, column in apart
        ]
    )


def agree(row: str, column: str, a: str, b: str) -> bool:
    if a == b:
        return True
    try:
        low, high = sorted(1 - float(x) if column.endswith("PCC") else float(x) for x in (a, b))
    except ValueError:  # words
        return False
    return high <= ROUNDING.get(column, 0) or 0 < high <= FACTORS[row.split()[0]] * low * (1 + 1e-6)


def cells(text: str) -> dict[tuple[str, str], str]:
    """(row, column) -> cell, of all tables; a row is called by its table, what it is of, and its numerics."""
    out, head = {}, None
    for line in text.splitlines():
        row = (
            [cell.strip() for cell in line.strip("| ").split(" | ")]
            if line.startswith("| ")
            else None
        )
        if row is None:
            head = None
        elif head is None:
            head = row
        elif set(row) != {"---"}:
            name = " ".join(
                [
                    head[0],
                    row[0],
                    *(cell for column, cell in zip(head, row) if column == "numerics"),
                ]
            )
            out |= {(name, column): cell for column, cell in zip(head, row, strict=True)}
    return out


# ---------------------------------------------------------------- in the README


def find(readme: Path) -> tuple[str, str, str]:
    """What is before the table, the table, and what is after it."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(
            f"{readme} has no place for the table: put the lines {BEGIN} and {END} where it belongs"
        )
    return before + begin, table.strip("\n"), end + after


def write(readme: Path, table: str) -> None:
    """In the place of the one that is there; the whole file is replaced at once."""
    before, _, after = find(readme)
    part = readme.with_name(f".{readme.name}.part")
    try:
        part.write_text(f"{before}\n\n{table}\n\n{after}", encoding="utf-8")
        shutil.copymode(readme, part)
        os.replace(part, readme)
    finally:
        part.unlink(missing_ok=True)
