"""A row of a measurement: two figures, their ratio, a goal. Rows are printed and kept as JSON."""

import json
import math
import os
import platform
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import NamedTuple

import torch
from modules.command_line import show

from flux.errors import UserError
from flux.image_io.output import write_exclusive

LIBRARIES = ("torch", "diffusers", "transformers", "triton", "torchao")
# relative L2 of two results in bfloat16 after some dozen layers, at most; mistakes are far above
ROUNDING = 0.1
SCALES = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
}  # other units stand as they are


@dataclass(frozen=True)
class Row:
    """Our figure and `theirs`, in `unit`; lower is better."""

    name: str
    unit: str  # s, B, B/pixel, or "" for a number
    ours: float
    theirs: float | None = None
    against: str = "diffusers"  # the owner of the figure `theirs`
    goal: float | None = None  # of ours / theirs, at most
    limit: float | None = None  # of ours itself, at most
    runs: int | None = None  # the figures are medians of them; None: the same in every run
    difference: float | None = None  # relative L2 of the two results

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def comparable(self) -> bool:
        return self.difference is None or self.difference < ROUNDING

    @property
    def reached(self) -> bool | None:
        """Return whether the goal or limit is reached, or None. Unequal results reach no goal."""
        if not self.comparable:
            return False
        if self.goal is not None:
            return self.ratio <= self.goal
        return None if self.limit is None else self.ours <= self.limit

    def cells(self) -> tuple[str, ...]:
        """Return the row's cells: name, our figure, the other figure, ratio, goal."""
        theirs = ratio = goal = ""
        if self.theirs is not None:
            theirs = f"{self.against} {shown(self.theirs, self.unit)}"
        if self.ratio is not None:
            ratio = f"{self.ratio:.3f}" if self.ratio < 0.1 else f"{self.ratio:.2f}"
        if self.goal is not None:
            goal = f"≤ {self.goal:.2f}"
        if self.limit is not None:
            goal = f"≤ {shown(self.limit, self.unit)}"
        if not self.comparable:
            goal = f"not comparable, the results are {self.difference:.2g} apart"
        elif self.reached is False:
            goal += ", missed"
        return self.name, shown(self.ours, self.unit), theirs, ratio, goal


def shown(value: float, unit: str) -> str:
    """Return the value with three digits, in the multiple of its unit that suits it."""
    scales = SCALES.get(unit, ((1, unit),))
    scale, name = next((pair for pair in scales if value >= pair[0]), scales[-1])
    number = f"{value / scale:,.0f}" if value >= 100 * scale else f"{value / scale:.3g}"
    return f"{number} {name}".strip()


@dataclass
class Report:
    """All rows, with the command, the machine, the versions and the date."""

    command: str
    device: str
    date: str = field(default_factory=lambda: date.today().isoformat())
    machine: dict = field(default_factory=lambda: machine())
    versions: dict = field(default_factory=lambda: versions())
    rows: list[Row] = field(default_factory=list)
    losses: list[dict] = field(default_factory=list)  # of the lossy modes

    def print_heading(self) -> None:
        libraries = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        cores = f"{self.machine['cores']} cores, {self.machine['threads']} threads"
        machine = f"{self.machine['processor']}, {cores}"
        show(f"`{self.command}` · {self.date} · {self.device} · {machine} · {libraries}")

    def print_losses(self, losses: Iterable[NamedTuple]) -> None:
        """Print one line for each mode as soon as it is measured."""
        for loss in losses:
            if not self.losses:
                show("", f"| {' | '.join(loss._fields)} |", f"|{'---|' * len(loss)}")
            kept, cells = {}, []
            for name, value in loss._asdict().items():
                kept[name] = None if value == math.inf else value
                cells.append(f"{value:.3g}" if isinstance(value, float) else str(value))
            self.losses.append(kept)
            show(f"| {' | '.join(cells)} |")

    def print_rows(self, rows: Iterable[Row]) -> None:
        """Print each row as soon as it is measured, then the goals that were missed."""
        show("", "| what | ours | against | ratio | goal |", "|---|---|---|---|---|")
        for row in rows:
            self.rows.append(row)
            show(f"| {' | '.join(row.cells())} |")
        goals = [row for row in self.rows if row.reached is not None]
        missed = [row for row in goals if not row.reached]
        if goals:
            show("", f"{len(goals) - len(missed)} of {len(goals)} goals reached")
            for row in missed:
                show(f"- missed: {row.name}, against {row.against}")

    def save(self, path: Path) -> Path:
        """Write a JSON file under a new name, completely or not at all, and return its path."""
        rows = [asdict(row) | {"ratio": row.ratio, "reached": row.reached} for row in self.rows]
        text = json.dumps(asdict(self) | {"rows": rows}, indent=1, ensure_ascii=False) + "\n"
        return write_exclusive(path, lambda file: file.write(text.encode()))


def check_json(path: Path) -> None:
    """Raise UserError, before anything is measured, if the file could not be written."""
    if path.suffix != ".json":
        raise UserError(f"--json: must end in .json (got {path})")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--json: {path} cannot be written ({error.strerror}). Choose another folder."
        ) from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json: the folder of {path} is not writable. Choose another.")


def machine() -> dict:
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    system = f"{platform.system()} {platform.machine()}"
    return {
        "processor": processor(),
        "cores": cores,
        "threads": torch.get_num_threads(),
        "system": system,
    }


def versions() -> dict[str, str]:
    found = {"Python": platform.python_version()}
    for name in LIBRARIES:
        if number := installed(name):
            found[name] = number
    return found


def installed(library: str) -> str | None:
    """Return the library's version, or None if it is not installed."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    for line in info.read_text().splitlines() if info.exists() else []:
        if line.startswith("model name"):
            return line.split(": ")[1]
    return platform.processor()
