"""bench.py --parallel: the rows of two processes, in tiny sizes; flags that fit no process."""

import sys

import pytest
import torch
from support.load_script import script
from support.processes import Processes

bench = script("bench")  # which puts scripts/ on the path, where `benchmarks` is


def rows_of(sizes: str) -> list[tuple]:
    from benchmarks import several
    from benchmarks.setting import Setting

    several.RUNS = 1
    setting = Setting(torch.device("cpu"), rounds=1, width=256, sides=(64,), text=16)
    rows = several.parallel_rows(setting, several.sizes_of(sizes))
    return [(row.name, row.ours > 0, row.theirs > 0, row.comparable) for row in rows]


@pytest.mark.slow
def test_steps_over_two_processes_are_measured(tmp_path):
    with Processes(2, tmp_path) as two:
        found = two(rows_of, "context=2")
        assert found[0] == found[1] and all(all(row[1:]) for row in found[0])
        ways = [name.rpartition(", ")[2] for name, *_ in found[0]]
        assert ways == ["allgather", "ulysses", "sharded weights"] * 3
        ((first, *rest), _) = two(rows_of, "tensor=2")
        assert len(rest) == 2 and first[0].endswith("tensor=2") and all(first[1:])


@pytest.mark.parametrize(
    "flags, said",
    [
        (["--parallel", "context=2"], "needs several processes. Start it with `torchrun"),
        (["--parallel", "rings=2"], "must name axes with their sizes"),
        (["--parallel", "context=2", "--floor"], "--parallel: measures nothing else"),
    ],
)
def test_flags_that_measure_nothing_are_refused(flags, said, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["bench.py", *flags])
    assert bench.main(flags) == 2
    assert said in capsys.readouterr().err
