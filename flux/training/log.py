"""The reports of a training run: lines on the terminal, a CSV file, and a chart of the loss."""

import csv
import importlib.util
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from flux.training.distributed import rank

WINDOW = 50  # steps of the moving mean in the chart


def report(text: str) -> None:
    """Print a line to standard error from the first process, without breaking a progress bar."""
    if rank() == 0:
        tqdm.write(text, file=sys.stderr)


class CSVLog:
    """A CSV file whose first column is a step number. Only the first process writes the file."""

    def __init__(self, path: Path, columns: Sequence[str], step: int = 0):
        """Drop rows after `step`: they belong to a stopped run, whose steps are repeated."""
        self.path = path if rank() == 0 else Path(os.devnull)
        self.columns = list(columns)
        rows = list(csv.reader(self.path.open(errors="replace"))) if self.path.exists() else []
        self.rows = [row for row in rows if self._is_valid(row) and int(row[0]) <= step]
        if self.path.is_char_device() or rows == [self.columns, *self.rows]:
            return
        unfinished = self.path.with_suffix(".part")
        with unfinished.open("w", newline="") as file:
            csv.writer(file).writerows([self.columns, *self.rows])
        unfinished.replace(self.path)

    def _is_valid(self, row: list[str]) -> bool:
        """Return whether the row has a step and finite numbers."""
        if len(row) != len(self.columns) or not row[0].isdecimal():
            return False
        try:
            return all(math.isfinite(float(cell)) for cell in row)
        except ValueError:
            return False

    def add(self, step: int, *numbers: float) -> None:
        """Append a row to the file."""
        self.rows.append([str(step), *(f"{number:.6g}" for number in numbers)])
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(self.rows[-1])

    def column(self, name: str) -> list[float]:
        """Return the numbers of one column."""
        place = self.columns.index(name)
        return [float(row[place]) for row in self.rows]


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
    axes.set_title(f"step {steps[-1]:.0f}, mean loss {means[-1]:.4f}", fontsize="medium")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path)
