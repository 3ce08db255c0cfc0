"""scripts/benchmarks/measure.py: its counts of memory, against counts by hand."""

import mmap
import sys

import pytest
import torch
import torch.nn.functional as F
from support.load_script import script

KB = torch.ones(256)  # float32


@pytest.fixture(scope="module")
def measure():
    return script("benchmarks/measure")


def test_peak_counts_tensors_alive_at_one_time(measure):
    def function():
        a = KB + 1  # 1 KB
        b = a * 2  # 2
        del a
        c = torch.cat([b, b])  # 3
        del b
        return c + 1  # 4

    assert measure.peak_bytes(function) == 4096


def test_peak_counts_each_storage_once_and_no_earlier_one(measure):
    def function():
        tensor = KB.clone()  # 1 KB
        part = tensor.view(16, 16)[2:, :1]
        tensor.add_(1).relu_()
        return KB.view(-1), part

    assert measure.peak_bytes(function) == 1024
    assert measure.peak_bytes(lambda: KB.mul_(1)) == 0


def test_peak_does_not_add_up_over_rounds(measure):
    def function():
        for _ in range(10):
            (KB + 1).bfloat16()

    assert measure.peak_bytes(function) == 1024 + 512


def test_peak_on_the_meta_device_equals_the_cpu(measure):
    x, w = torch.ones(1, 8, 16, 16), torch.ones(4, 8, 3, 3)
    meta_x, meta_w = x.to("meta"), w.to("meta")

    def function(x, w):
        return F.silu(F.conv2d(x, w)) + 1

    expected = 2 * 4 * 4 * 14 * 14  # two images of 4 channels
    assert measure.peak_bytes(lambda: function(x, w)) == expected
    assert measure.peak_bytes(lambda: function(meta_x, meta_w)) == expected


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_resident_memory_grows_with_written_bytes(measure):
    def written(size):
        memory = mmap.mmap(-1, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # not malloc's
        return torch.frombuffer(memory, dtype=torch.uint8).fill_(1)

    before = measure.resident()
    kept = written(2**26)
    after = measure.resident()
    assert kept.numel() <= after.anonymous - before.anonymous + 2**20
    assert after.all >= after.anonymous
    assert measure.peak_memory(lambda: written(2**27)) >= 0.95 * 2**27
