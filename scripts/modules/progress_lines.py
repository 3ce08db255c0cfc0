"""Lines about long work, for logs: a terminal has progress bars for steps and downloads."""

import sys
import time
from collections.abc import Callable

from flux.progress import duration

EVERY = 10.0  # seconds between lines, at least; shorter work is not told
SHARE = 0.05  # and this share of the time so far, for work of hours
ON_TERMINALS = ("GB", "prompts")  # units of work that has no bar


class ProgressLines:
    """A listener for `flux.progress.listen`: writes a line at most every ten seconds."""

    def __init__(self, write: Callable[[str], object]):
        self.write = write
        self.what, self.done = "", 0.0
        self.began = self.said = 0.0

    def __call__(self, what: str, done: float, total: float, unit: str) -> None:
        now = time.monotonic()
        if what != self.what or done < self.done:  # the next piece of work
            self.what, self.began, self.said, self.first = what, now, now, done
        self.done = done
        if now - self.said < max(EVERY, SHARE * (now - self.began)):
            return
        self.said = now
        is_terminal = sys.stderr is not None and sys.stderr.isatty()
        if not is_terminal or (total and unit in ON_TERMINALS):
            self._write(f"{what}: {amount(done, total, unit)}{self._left(now, done, total)}")

    def _left(self, now: float, done: float, total: float) -> str:
        """Return how long the rest will take, by the rate so far."""
        if not total or done <= self.first:
            return ""
        seconds = (now - self.began) * (total - done) / (done - self.first)
        return f", {duration(seconds)} left"

    def _write(self, line: str) -> None:
        if "tqdm" not in sys.modules:
            self.write(line)
            return
        from tqdm import tqdm

        with tqdm.external_write_mode():  # no bar in the middle of the line
            self.write(line)


def amount(done: float, total: float, unit: str) -> str:
    """Return "12 of 50 steps", or "1.5 of 23.8 GB"."""
    shown = [f"{number:.1f}" if unit == "GB" else f"{number:,.0f}" for number in (done, total)]
    return f"{shown[0]} of {shown[1]} {unit}" if total else f"{shown[0]} {unit}"
