"""What a function costs, counted rather than timed: bytes held by tensors, kernels, and what the system says of memory.

The first two are the same on every machine and in every run, so that tests can hold them; they work on the meta device too,
where a model of full size costs nothing.
"""

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from flux.runtime.activation_memory import peak_bytes

__all__ = ["Resident", "kernels", "peak_bytes", "peak_memory", "proc", "resident"]


def kernels(function: Callable[[], object]) -> Counter[str]:
    """How often `function` calls each ATen operation that does work, without gradients; `.total()` is their number."""
    with torch.no_grad(), _Kernels() as called:
        function()
    return called.names


def peak_memory(function: Callable[[], object], device: str | torch.device = "cpu") -> int:
    """Bytes that `function` took on a device over what was there before, workspaces included.

    On CUDA the allocator counts; on the CPU, the kernel (Linux only). There, run `function` once before, so that libraries
    are loaded, and start Python with MALLOC_MMAP_THRESHOLD_=65536, or what malloc keeps for later is counted too.
    """
    if torch.device(device).type == "cuda":
        torch.cuda.synchronize(device)
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    Path("/proc/self/clear_refs").write_text("5")  # the highest resident size is that of now
    before = resident().all
    function()
    return proc("status")["VmHWM"] - before


class Resident(NamedTuple):
    """Bytes of this process in memory: `all`, of which `anonymous` are its own, and the rest pages of files."""

    all: int
    anonymous: int


def resident() -> Resident:
    """As the kernel counts them (Linux only)."""
    sizes = proc("smaps_rollup")
    return Resident(sizes["Rss"], sizes["Anonymous"])


def proc(name: str) -> dict[str, int]:
    """The bytes in one of the kernel's files on this process, `status` or `smaps_rollup`, by their names there."""
    fields = (line.split() for line in Path("/proc/self", name).read_text().splitlines())
    return {words[0].rstrip(":"): 1024 * int(words[1]) for words in fields if words[-1] == "kB"}


class _Kernels(TorchDispatchMode):
    FREE = {
        "aten::_unsafe_view",
        "aten::lift_fresh",
        "aten::empty.memory_format",
    }  # no views, but they move nothing either

    def __init__(self):
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if not function.is_view and function.name() not in self.FREE:
            self.names[function.name()] += 1
        return function(*args, **(kwargs or {}))
