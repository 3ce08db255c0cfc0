"""The reports of a training run: lines on the terminal, a CSV file, and a chart of the loss."""

import importlib.util
import math
import os
import sys
from array import array
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from flux.atomic_files import write_atomically
from flux.errors import UserError
from flux.plain_files import read_plain_file
from flux.runtime.terminal import printable
from flux.training.distributed import rank

MAX_LOG = 2**28  # bytes: four million rows
WINDOW = 50  # steps of the moving mean in the chart


quiet = False  # print errors alone


def report(text: str, always: bool = False) -> None:
    """Print a line to standard error from the first process, without breaking a progress bar.

    Control characters, in a file's name for example, are shown escaped. `always`: even if `quiet`.
    """
    if rank() == 0 and sys.stderr is not None and (always or not quiet):
        with suppress(OSError):  # nobody can be told
            tqdm.write(printable(text), file=sys.stderr)


class CSVLog:
    """A CSV file whose first column is a step number. Only the first process writes the file."""

    def __init__(self, path: Path, columns: Sequence[str], step: int = 0):
        """Read the rows of a stopped run, but for those after `step`, which is repeated.

        A half-written last row is dropped. UserError if the file is anything but such a log.
        """
        self.path = path if rank() == 0 else Path(os.devnull)
        self.columns = list(columns)
        self.numbers = [array("d") for _ in columns]
        if rank() == 0:
            self._read(step)

    def _read(self, step: int) -> None:
        content = b""
        if os.path.lexists(self.path):  # a broken link is told
            content = read_plain_file(self.path, MAX_LOG, "another folder")
        # a killed process leaves its last row without an end
        *lines, rest = content.decode(errors="replace").replace("\r\n", "\n").split("\n")
        header = ",".join(self.columns)
        names = lines[0].split(",") if lines else self.columns
        if (
            names[0] != self.columns[0]
            or len(names) != len(self.columns)
            or not (lines or header.startswith(rest))
        ):
            raise UserError(
                f"{self.path}: is not the log of a run, which begins with {header}. "
                "Move the file away, or use another folder."
            )
        kept = [header]
        for number, line in enumerate(lines[1:], start=2):
            row = self._row(line)
            if row is None:
                raise UserError(
                    f"{self.path}, line {number}: is no step, or no later step than the line "
                    f"before (got {line!r:.80}). Delete the line, or move the file away."
                )
            if row[0] <= step:
                kept.append(line)
                self._append(row)
        text = "".join(f"{line}\r\n" for line in kept).encode()
        if text != content:
            with write_atomically(self.path) as unfinished:
                unfinished.write_bytes(text)

    def _row(self, line: str) -> list[float] | None:
        """Return the numbers of a line, if they are finite and the step is later than the last."""
        cells = line.split(",")
        try:
            row = [float(cell) for cell in cells]
        except ValueError:
            return None
        last = self.numbers[0][-1] if self.numbers[0] else -1
        sound = len(row) == len(self.columns) and cells[0].isdecimal() and row[0] > last
        return row if sound and all(map(math.isfinite, row)) else None

    def _append(self, row: Sequence[float]) -> None:
        for numbers, number in zip(self.numbers, row, strict=True):
            numbers.append(number)

    def add(self, step: int, *numbers: float) -> None:
        """Append a row to the file."""
        cells = [str(step), *(f"{number:.6g}" for number in numbers)]
        self._append([float(cell) for cell in cells])
        with self.path.open("a", newline="") as file:
            file.write(",".join(cells) + "\r\n")

    def column(self, name: str) -> list[float]:
        """Return the numbers of one column."""
        return list(self.numbers[self.columns.index(name)])


def can_plot() -> bool:
    """Return whether matplotlib is installed."""
    return importlib.util.find_spec("matplotlib") is not None


def plot_loss(log: CSVLog, path: Path) -> None:
    """Draw the "loss" column and its mean over the last 50 steps into a PNG file.

    The loss of one step depends mostly on the times that were drawn; the mean shows the progress.
    """
    from matplotlib.figure import Figure  # slow to import

    steps, losses = log.column(log.columns[0]), log.column("loss")
    means = [fmean(losses[max(0, i + 1 - WINDOW) : i + 1]) for i in range(len(losses))]
    figure = Figure(figsize=(6.4, 3), dpi=200, layout="constrained")
    axes = figure.add_subplot()
    axes.semilogy(steps, losses, linewidth=0.5, alpha=0.5, label="loss")
    axes.semilogy(steps, means, label=f"mean of {WINDOW} steps")
    axes.set_xlabel("step")
    axes.set_ylabel("loss")
    axes.set_title(f"step {steps[-1]:.0f}, mean loss {means[-1]:.4f}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    with write_atomically(path, wait=True) as unfinished:
        figure.savefig(unfinished, format="png")
