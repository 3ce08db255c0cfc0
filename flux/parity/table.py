"""The parity tables as Markdown, and whether the tables in a README agree with measured ones.

Each number is a bound: an error rounded up to one digit, a correlation rounded down. 0 is equality
to the bit. Two tables agree if they have 0 in the same places and are within a factor elsewhere:
processors sum in different orders, which changes an error of rounding, but not its size. Golden
tensors come from one processor: two of their errors agree if tests/test_golden.py allows both.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from torch import Tensor

from flux.atomic_files import write_atomically
from flux.errors import UserError
from flux.parity.compare import errors

BEGIN, END = (
    "<!-- written by: python scripts/parity.py table --write -->",
    "<!-- end of what is written -->",
)
FLOAT32_HEAD = (
    "float32",
    "against",
    "max abs",
    "relative L2",
    "PCC",
    "golden: max abs",
    "golden: relative L2",
    "golden: PCC",
)
BFLOAT16_HEAD = (
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
}  # errors up to this agree with 0


class Figures(NamedTuple):
    max_abs: float
    relative_l2: float
    pcc: float


@dataclass(frozen=True)
class Float32Row:
    """A network or pipeline in float32."""

    what: str
    against: str  # the library that ran live
    live: Figures
    golden: Figures | None  # against its stored outputs

    @property
    def cells(self) -> list[str]:
        return [
            self.what,
            self.against,
            *shown(self.live),
            *(shown(self.golden) if self.golden else ["–"] * 3),
        ]


@dataclass(frozen=True)
class BFloat16Row:
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
    """Return the worst figures of pairs (ours, the reference's). UserError for NaN and infinity."""
    found = [errors(ours, reference) for ours, reference in pairs]
    if any(e.nonfinite or e.misplaced for e in found):
        raise UserError(
            f"{what}: has NaN or infinity, here or in the reference. There is nothing to compare."
        )
    return Figures(
        max(e.max_abs for e in found), max(e.relative_l2 for e in found), min(e.pcc for e in found)
    )


# ---------------------------------------------------------------- format


def markdown(lines: Sequence[Float32Row | BFloat16Row], ran_on: str) -> str:
    """Return one table for each precision, and what they were measured with."""
    kinds = ((FLOAT32_HEAD, Float32Row), (BFLOAT16_HEAD, BFloat16Row))
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
    """Return the least number of one digit that is not smaller, up to float rounding."""
    if x <= 0:
        return 0.0
    power = math.floor(math.log10(x))
    return float(f"{math.ceil(x / 10.0**power - 1e-9)}e{power}")


# ---------------------------------------------------------------- compare


def differences(shown: str, measured: str) -> list[str]:
    """Return one sentence for each cell that differs. Text outside of tables is ignored."""
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
    """Return (row, column) -> cell of all tables. A row's name has its table and its numerics."""
    out: dict[tuple[str, str], str] = {}
    head: list[str] | None = None
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


# ---------------------------------------------------------------- write


def find(readme: Path) -> tuple[str, str, str]:
    """Return the text before the tables, the tables, and the text after them."""
    before, begin, rest = readme.read_text(encoding="utf-8").partition(BEGIN)
    table, end, after = rest.partition(END)
    if not (begin and end):
        raise UserError(
            f"{readme}: has no place for the tables. Put the lines {BEGIN} and {END} "
            "where they belong."
        )
    return before + begin, table.strip("\n"), end + after


def write(readme: Path, table: str) -> None:
    """Replace the tables. The file is replaced at once, or stays as it is."""
    with write_atomically(readme) as unfinished:
        before, _, after = find(readme)
        unfinished.write_text(f"{before}\n\n{table}\n\n{after}", encoding="utf-8")
