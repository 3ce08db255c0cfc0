"""Choose the device and the dtype; measure the free memory of device, machine and container."""

import importlib.util
import math
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch

from flux.errors import UserError

DEVICE_TYPES = ("cuda", "mps", "cpu")


class FreeMemory(NamedTuple):
    """Free memory in bytes."""

    device_type: str  # one of DEVICE_TYPES
    device: float
    host: float = math.inf  # ignored if device and host share one memory


def choose_device(device: str | None) -> torch.device:
    """Return the requested device, by default the best one; UserError if it does not exist."""
    if device is None:
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        wanted = torch.device(device)
        if wanted.type not in DEVICE_TYPES or (wanted.type == "cpu" and wanted.index):
            raise RuntimeError
        torch.empty(1, device=device)
        return torch.device(device)
    except (RuntimeError, AssertionError, NotImplementedError, TypeError):
        available = ["cpu", *(f"cuda:{i}" for i in range(torch.cuda.device_count()))]
        if torch.backends.mps.is_available():
            available.append("mps")
        raise UserError(
            f"device: {device} is not available. Choose from {', '.join(available)}."
        ) from None


def can_compile(device: torch.device) -> bool:
    """Return whether torch.compile has what it needs: Triton on a GPU, a C++ compiler on a CPU."""
    if device.type == "cuda":
        return importlib.util.find_spec("triton") is not None
    if device.type != "cpu":
        return False
    compilers = (os.environ.get("CXX", "c++"), "g++", "clang++")
    return any(shutil.which(compiler) is not None for compiler in compilers)


def choose_dtype(device: torch.device) -> torch.dtype:
    """Return bfloat16 where the device computes in it, else float32 with a warning.

    The networks overflow in float16. A CPU without bfloat16 instructions is about ten times slower
    in bfloat16 than in float32.
    """
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        ampere = torch.cuda.get_device_capability(device) >= (8, 0)
        has_bfloat16 = ampere or torch.version.hip is not None
    elif device.type == "mps":
        name = "macOS before version 14"
        has_bfloat16 = torch.backends.mps.is_macos_or_newer(14, 0)
    else:
        name = "this CPU"
        mkldnn = torch.backends.mkldnn.is_available()
        has_bfloat16 = mkldnn and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    if has_bfloat16:
        return torch.bfloat16
    warnings.warn(
        f"{name} does not compute in bfloat16, and the networks overflow in float16: float32 is "
        "used, which takes twice the memory. bfloat16 (`dtype`) takes half, and is slow",
        stacklevel=3,
    )
    return torch.float32


@contextmanager
def no_tf32() -> Iterator[None]:
    """Compute float32 in float32 on a GPU too.

    torch lets cuDNN convolve in TF32 by default, with 10 bits of mantissa: latents and pixels would
    be off by about 1e-3. The settings of the process are restored.
    """
    operations = torch.backends.cudnn.conv, torch.backends.cuda.matmul  # type: ignore[attr-defined]
    before = [operation.fp32_precision for operation in operations]
    try:
        for operation in operations:
            operation.fp32_precision = "ieee"
        yield
    finally:
        for operation, precision in zip(operations, before, strict=True):
            operation.fp32_precision = precision


def available_memory(device: torch.device) -> FreeMemory:
    """Return the free memory of `device` and of the host."""
    return FreeMemory(device.type, free_memory(device), free_memory(torch.device("cpu")))


def free_memory(device: torch.device) -> float:
    """Return the bytes that weights and activations may take, PyTorch's unused cache included."""
    if device.type == "cuda":
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + unused
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.current_allocated_memory()
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # of torchrun, on this machine
    return min(_machine_memory(), _container_memory()) / processes


def _machine_memory(meminfo: Path = Path("/proc/meminfo")) -> float:
    """Return the bytes that the host can give without swapping.

    Three quarters of the machine's memory where /proc/meminfo does not exist.
    """
    try:
        lines = dict(line.split(":") for line in meminfo.read_text().splitlines())
        return int(lines["MemAvailable"].split()[0]) * 1024
    except (OSError, KeyError, ValueError):
        if not hasattr(os, "sysconf"):
            return math.inf
        return 0.75 * os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _container_memory(group: Path = Path("/sys/fs/cgroup")) -> float:
    """Return the bytes left below the container's limit; infinity without a limit.

    The pages of files do not count as used, since the kernel can drop them.
    """
    try:
        limit = int((group / "memory.max").read_text())  # "max" if there is no limit
        used = int((group / "memory.current").read_text())
        lines = (group / "memory.stat").read_text().splitlines()
        pages = dict(line.split() for line in lines)
        return max(0, limit - used + int(pages["active_file"]) + int(pages["inactive_file"]))
    except (OSError, KeyError, ValueError):
        return math.inf
