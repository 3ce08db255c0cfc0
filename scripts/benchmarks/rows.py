"""A measurement is a row: two figures, their ratio, and how large that may be. Printed as it comes, kept as JSON."""

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

from flux.errors import UserError
from flux.image_io.output import write_exclusive

LIBRARIES = ("torch", "diffusers", "transformers", "triton", "torchao")
ROUNDING = 0.1  # what two results in bfloat16 may be apart, relative L2, after some dozen layers; mistakes are far above
SCALES = {
    "s": ((1, "s"), (1e-3, "ms"), (1e-6, "µs")),
    "B": ((1e9, "GB"), (1e6, "MB"), (1e3, "kB"), (1, "B")),
}  # other units are written as they are


@dataclass(frozen=True)
class Row:
    """What ours takes and what `theirs` does, in `unit`; lower is better."""

    name: str
    unit: str  # s, B, B/pixel, kernels, FLOP, or "" for a number
    ours: float
    theirs: float | None = None
    against: str = "diffusers"  # whose figure `theirs` is
    goal: float | None = None  # of ours / theirs, at most
    limit: float | None = None  # of ours itself, at most
    runs: int | None = None  # of which the figures are medians; None: the same in every run
    difference: float | None = None  # of what the two computed and should be the same, relative L2

    @property
    def ratio(self) -> float | None:
        return None if self.theirs is None else self.ours / self.theirs

    @property
    def comparable(self) -> bool:
        return self.difference is None or self.difference < ROUNDING

    @property
    def reached(self) -> bool | None:
        """Whether the goal, or the limit, is; None where there is none. What computes something else has reached nothing."""
        if not self.comparable:
            return False
        if self.goal is not None:
            return self.ratio <= self.goal
        return None if self.limit is None else self.ours <= self.limit

    def cells(self) -> tuple[str, ...]:
        theirs = "" if self.theirs is None else f"{self.against} {shown(self.theirs, self.unit)}"
        goal = "" if self.goal is None else f"≤ {self.goal:.2f}"
        goal = goal if self.limit is None else f"≤ {shown(self.limit, self.unit)}"
        ratio = (
            ""
            if self.ratio is None
            else f"{self.ratio:.3f}"
            if self.ratio < 0.1
            else f"{self.ratio:.2f}"
        )
        if not self.comparable:
            goal = f"not comparable, the results are {self.difference:.2g} apart"
        elif self.reached is False:
            goal += ", missed"
        return self.name, shown(self.ours, self.unit), theirs, ratio, goal


def shown(value: float, unit: str) -> str:
    """With three digits, in the multiple of its unit that suits it."""
    if unit not in SCALES:
        return f"{value:,.0f} {unit}".strip() if value >= 100 else f"{value:.3g} {unit}".strip()
    scale, name = next(
        ((scale, name) for scale, name in SCALES[unit] if value >= scale), SCALES[unit][-1]
    )
    return f"{value / scale:.0f} {name}" if value >= 100 * scale else f"{value / scale:.3g} {name}"


@dataclass
class Report:
    """What was measured, by which command, where and when."""

    command: str
    device: str
    date: str = field(default_factory=lambda: date.today().isoformat())
    machine: dict = field(default_factory=lambda: machine())
    versions: dict = field(default_factory=lambda: versions())
    rows: list[Row] = field(default_factory=list)
    losses: list[dict] = field(default_factory=list)  # of the lossy modes, against float32

    def print_heading(self) -> None:
        named = ", ".join(f"{name} {number}" for name, number in self.versions.items())
        print(
            f"`{self.command}` · {self.date} · {self.device} · {self.machine['processor']}, {self.machine['cores']} cores, "
            f"{self.machine['threads']} threads · {named}"
        )

    def print_losses(self, losses: Iterable[NamedTuple]) -> None:
        """A line a mode, as soon as it is there."""
        for loss in losses:
            if not self.losses:
                print(f"\n| {' | '.join(loss._fields)} |\n|{'---|' * len(loss)}")
            self.losses.append(
                {
                    name: None if value == math.inf else value
                    for name, value in loss._asdict().items()
                }
            )
            print(
                f"| {' | '.join(f'{value:.3g}' if isinstance(value, float) else str(value) for value in loss)} |",
                flush=True,
            )

    def print_rows(self, rows: Iterable[Row]) -> None:
        """Each as soon as it is there, and the goals that were missed."""
        print("\n| what | ours | against | ratio | goal |\n|---|---|---|---|---|")
        for row in rows:
            self.rows.append(row)
            print(f"| {' | '.join(row.cells())} |", flush=True)
        missed = [f"{row.name}, against {row.against}" for row in self.rows if row.reached is False]
        aims = sum(row.reached is not None for row in self.rows)
        if aims:
            print(
                f"\n{aims - len(missed)} of {aims} goals reached"
                + "".join(f"\n- missed: {name}" for name in missed)
            )

    def save(self, path: Path) -> Path:
        """Under a new name, whole or not at all."""
        rows = [asdict(row) | {"ratio": row.ratio, "reached": row.reached} for row in self.rows]
        text = json.dumps(asdict(self) | {"rows": rows}, indent=1, ensure_ascii=False) + "\n"
        return write_exclusive(path, lambda file: file.write(text.encode()))


def check_json(path: Path) -> None:
    """Refuse, before anything is measured, a file that could not be written."""
    if path.suffix != ".json":
        raise UserError(f"--json {path}: the name of a JSON file ends in .json")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"--json {path}: cannot be written there ({error.strerror}); choose another folder"
        ) from None
    if not os.access(path.parent, os.W_OK):
        raise UserError(f"--json {path}: that folder cannot be written to; choose another")


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
    return {"Python": platform.python_version()} | {
        name: v for name in LIBRARIES if (v := installed(name))
    }


def installed(library: str) -> str | None:
    """Its version, if it is there."""
    try:
        return version(library)
    except PackageNotFoundError:
        return None


def processor() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next(
        (line.split(": ")[1] for line in lines if line.startswith("model name")),
        platform.processor(),
    )
