"""What the first process does for all, and what is refused when processes differ."""

import pytest
import torch
from support.process_cases import compare_values, decoded, first_computes, first_fails, refusals

from flux.errors import UserError
from flux.runtime import processes
from flux.runtime.processes import fingerprint


def test_first_process_computes_for_all(two):
    assert two(first_computes) == [[7, 1], [7, 0]]


def test_failure_of_the_first_is_raised_in_all(two):
    assert two(first_fails, UserError("seed: wrong")) == 2 * [("UserError", "seed: wrong")]
    assert two(first_fails, RuntimeError("broken")) == [
        ("RuntimeError", "broken"),
        ("RuntimeError", "process 0: broken"),
    ]


def test_values_that_differ_are_named(two):
    said = "parallel: process 1 has other files than process 0: a, only 0, only 1. Give all"
    assert all(text.startswith(said) for text in two(compare_values))


def test_images_are_decoded_in_turn(two):
    assert two(decoded) == [([0, 2], [0, 1, 2]), ([1], [0, 1, 2])]


def test_what_cannot_be_divided_is_refused(two):
    for few, replaced, gradients, mesh in two(refusals):
        assert few.startswith("parallel: 1 tokens cannot be divided over context=2")
        assert replaced.startswith("parallel: `transformer.attention` was replaced")
        assert gradients.startswith("gradients: are not recorded over several processes")
        assert mesh.startswith("parallel: context=3 needs 3 processes (got 2)")


def test_one_process_works_alone():
    assert processes.by_first(lambda: 5) == 5 and not processes.has_joined()
    assert (processes.rank(), processes.world_size()) == (0, 1)
    processes.require_equal("files", {"a": 1})
    assert processes.join("cpu") == "cpu" or processes.started_by_torchrun()


@pytest.mark.parametrize("device, words", [("cuda:1", "GPU of its own"), ("mps", "need CPUs")])
def test_devices_on_which_processes_cannot_meet_are_refused(device, words, monkeypatch):
    monkeypatch.setattr(processes, "choose_device", torch.device)
    for name in processes.TORCHRUN:
        monkeypatch.setenv(name, "2")
    with pytest.raises(UserError, match=f"device: .*{words}"):
        processes.join(device)


def test_fingerprint_tells_files_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(processes, "WHOLE", 10_000)
    monkeypatch.setattr(processes, "PART", 16)
    for size in (0, 5, 10_000, 50_000):
        data = bytes(range(251)) * 200
        path = tmp_path / "a"
        path.write_bytes(data[:size])
        first = fingerprint(path)
        path.write_bytes(data[: size + 1])
        assert fingerprint(path) != first
        path.write_bytes(bytes(255 - x for x in data[:size]))  # trained further
        assert size == 0 or fingerprint(path) != first
        path.write_bytes(data[:size])
        assert fingerprint(path) == first
