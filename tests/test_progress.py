"""Long work is told to a listener, and a log gets a line about it now and then."""

import sys
import time
from types import SimpleNamespace

import pytest
from modules import progress_lines
from modules.progress_lines import ProgressLines

import flux
from flux import progress


@pytest.fixture
def told():
    """What a listener hears in this test."""
    heard: list[tuple] = []
    with progress.listen(lambda *what: heard.append(what)):
        yield heard


def test_nothing_is_told_without_a_listener():
    progress.tell("sampling", 1, 2, "steps")
    assert list(progress.counted("ab", "encoding", "prompts")) == ["a", "b"]
    with progress.polled("downloading", lambda: 1 / 0, "GB"):
        pass


def test_run_tells_of_loading_encoding_and_steps(told):
    pipe = flux.load(device="cpu", dtype=None)
    pipe.encode_ahead(["a red circle", "a blue ring"])
    pipe("a red circle", 64, 64, steps=2)
    kinds = list(dict.fromkeys((what, unit) for what, _, _, unit in told))
    assert ("encoding", "prompts") in kinds and ("sampling", "steps") in kinds
    assert ("loading flux-2-tiny.safetensors", "GB") in kinds
    of = {what: [event[1:3] for event in told if event[0] == what] for what, _ in kinds}
    assert of["encoding"] == [(1, 2), (2, 2)] and of["sampling"] == [(1, 2), (2, 2)]
    for done, total in (of[what][-1] for what, unit in kinds if unit == "GB"):
        assert done == pytest.approx(total) and total > 1e-4


def test_download_is_polled_and_ends_with_its_block(told, monkeypatch):
    monkeypatch.setattr(progress, "POLL", 0.01)
    sizes = iter(range(1, 10**6))
    with progress.polled("downloading x", lambda: next(sizes), "GB"):
        deadline = time.monotonic() + 20
        while len(told) < 3 and time.monotonic() < deadline:
            time.sleep(0.001)
    count = len(told)
    assert told[:2] == [("downloading x", 1, 0, "GB"), ("downloading x", 2, 0, "GB")]
    time.sleep(0.05)
    assert len(told) == count


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines(monkeypatch):
    """Lines, a clock, and the listener that writes them."""
    written: list[str] = []
    clock = Clock()
    monkeypatch.setattr(progress_lines, "time", SimpleNamespace(monotonic=clock))
    return written, clock, ProgressLines(written.append)


def run(clock: Clock, listener: ProgressLines, steps: int, seconds: float, unit="steps") -> None:
    for step in range(1, steps + 1):
        clock.now += seconds
        listener("sampling", step, steps, unit)


def test_short_work_is_not_told(lines):
    written, clock, listener = lines
    for _ in range(100):  # images of eight seconds each
        run(clock, listener, 8, 1.0)
    assert written == []


def test_long_work_has_a_line_every_ten_seconds(lines):
    written, clock, listener = lines
    run(clock, listener, 20, 4.0)
    assert written[0] == "sampling: 4 of 20 steps, 64 s left"
    assert written[1] == "sampling: 7 of 20 steps, 52 s left"
    assert len(written) == 6


def test_work_of_hours_has_few_lines(lines):
    written, clock, listener = lines
    run(clock, listener, 10_000, 1.0)
    assert 50 < len(written) < 150 and written[-1].startswith("sampling: 9,")


def test_unknown_total_and_sizes(lines):
    written, clock, listener = lines
    for size in (0.5, 1.25):
        clock.now += 20
        listener("downloading ae.safetensors", size, 0, "GB")
    assert written == ["downloading ae.safetensors: 1.2 GB"]
    shown = [progress.duration(seconds) for seconds in (40, 750, 9000, 200_000)]
    assert shown == ["40 s", "12 min", "2.5 h", "2.3 days"]


def test_terminal_gets_lines_only_for_work_without_a_bar(lines, monkeypatch):
    written, clock, listener = lines
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    run(clock, listener, 20, 4.0)
    assert written == []
    run(clock, listener, 20, 4.0, "GB")
    assert written[0].startswith("sampling: 4.0 of 20.0 GB")
