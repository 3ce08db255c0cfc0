"""Memory of a function: bytes that its tensors hold, and what the system says of the process.

`peak_bytes` is the same on every machine and in every run, so that tests can compare it. It works
on the meta device too, where a full-size model takes no memory.
"""

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch

from flux.runtime.activation_memory import peak_bytes

__all__ = ["Resident", "peak_bytes", "peak_memory", "proc", "resident"]


def peak_memory(function: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Return the bytes that `function` took on a device at most, workspaces included.

    On CUDA the allocator counts; on a CPU the kernel does (Linux only). On a CPU, run `function`
    once before, so that libraries are loaded, and start Python with MALLOC_MMAP_THRESHOLD_=65536.
    Otherwise the memory that malloc keeps for later counts too.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM
    before = resident().all
    function()
    return proc("status")["VmHWM"] - before


class Resident(NamedTuple):
    """Bytes of this process in memory. Those that are not anonymous are pages of files."""

    all: int
    anonymous: int


def resident() -> Resident:
    """Return the bytes as the kernel counts them (Linux only)."""
    sizes = proc("smaps_rollup")
    return Resident(sizes["Rss"], sizes["Anonymous"])


def proc(name: str) -> dict[str, int]:
    """Return the fields in kB of /proc/self/`name` (`status`, `smaps_rollup`), in bytes."""
    sizes = {}
    for line in Path("/proc/self", name).read_text().splitlines():
        words = line.split()
        if words[-1] == "kB":
            sizes[words[0].rstrip(":")] = 1024 * int(words[1])
    return sizes
