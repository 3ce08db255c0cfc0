"""What a run of scripts/train.py says, on the terminal and in its folder."""

import csv
import math
import os
import sys
from pathlib import Path
from statistics import fmean

from tqdm import tqdm

from flux.parity.plots import Drawing, Label, Line, LogScale
from flux.training import distributed as processes


def say(text: str) -> None:
    if processes.rank() == 0:
        tqdm.write(text, file=sys.stderr)


def _is_of_a_step(row: list[str]) -> bool:
    try:
        return (
            len(row) == len(Log.NAMES)
            and row[0].isdecimal()
            and all(math.isfinite(float(cell)) for cell in row)
        )
    except ValueError:
        return False


class Log:
    """loss.csv, a row a step, and the picture of it."""

    NAMES = ("step", "loss", "gradient", "rate", "seconds", "pictures_a_second")

    def __init__(self, path: Path, step: int):
        """Rows after `step` are of a run that was stopped, and whose steps come again. One process of several has a log."""
        self.path = path if processes.rank() == 0 else Path(os.devnull)
        rows = list(csv.reader(self.path.open(errors="replace"))) if self.path.exists() else []
        self.rows = [row for row in rows[1:] if _is_of_a_step(row) and int(row[0]) <= step]
        if self.path.is_char_device() or rows == [list(self.NAMES), *self.rows]:
            return
        beside = self.path.with_suffix(".part")
        with beside.open("w", newline="") as file:
            csv.writer(file).writerows([self.NAMES, *self.rows])
        beside.replace(self.path)

    def add(self, step: int, *numbers: float) -> None:
        self.rows.append([str(step), *(f"{number:.6g}" for number in numbers)])
        with self.path.open("a", newline="") as file:
            csv.writer(file).writerow(self.rows[-1])

    def plot(self) -> None:
        """Each step's loss, which mostly tells how hard its times were, and their mean over the last fifty."""
        losses = [float(row[1]) for row in self.rows]
        means = [fmean(losses[max(0, i - 49) : i + 1]) for i in range(len(losses))]
        scale = LogScale.around(losses, 30, 260)

        def x(i):
            return 60 + 560 * i / max(1, len(losses) - 1)

        shapes = [Line([(60, scale(tick)), (620, scale(tick))], "grid") for tick in scale.ticks()]
        shapes += [Label(54, scale(tick) + 4, f"{tick:g}", anchor="end") for tick in scale.ticks()]
        for values, colour, width in ((losses, "w3", 1), (means, "first", 2)):
            shapes.append(
                Line([(x(i), scale(value)) for i, value in enumerate(values)], colour, width)
            )
        shapes.append(
            Label(620, 285, f"step {self.rows[-1][0]}, mean loss {means[-1]:.4f}", anchor="end")
        )
        self.path.with_suffix(".png").write_bytes(Drawing("loss", 640, 300, shapes).png())
