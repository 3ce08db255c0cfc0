"""Tensors are the pages of their file, also of a file that is larger than memory.

The truth is what `safetensors` itself reads. A sparse file has its full size and takes no space.
"""

import errno
import json
import mmap
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.weight_files import anonymous_memory, entry, hollow, raw, refusal, saved

import flux
from flux.configs import TINY1
from flux.transformer import Flux, SingleStreamBlock
from flux.weights import mapping
from flux.weights.files import read_header
from flux.weights.load import init_empty
from flux.weights.mapping import TORCH_DTYPES, map_tensors

linux = pytest.mark.skipif(not Path("/proc/meminfo").exists(), reason="needs Linux' /proc")


def mapped(path: Path) -> dict[str, torch.Tensor]:
    return dict(map_tensors(read_header(path)[0]))


def as_bytes(tensor: torch.Tensor) -> bytes:
    return tensor.reshape(-1).view(torch.uint8).numpy().tobytes()


def every_dtype() -> dict[str, torch.Tensor]:
    """Return random bytes as each dtype; also a scalar, nothing, and an odd number of bytes."""
    generator = torch.Generator().manual_seed(0)
    tensors = {"odd": torch.tensor([1, 2, 3], dtype=torch.uint8), "scalar": torch.tensor(2.5)}
    for name, dtype in TORCH_DTYPES.items():
        shape = (3, 5 * dtype.itemsize)
        if dtype == torch.bool:
            tensors[name] = torch.randint(0, 2, shape, generator=generator).bool()
        else:
            random = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
            tensors[name] = random.view(dtype)
    return tensors | {"empty": torch.empty(2, 0, 3)}


@pytest.mark.parametrize("read_only", [False, True])
def test_every_dtype_is_mapped_as_safetensors_reads_it(tmp_path, monkeypatch, recwarn, read_only):
    if read_only:
        refuse_private_maps(monkeypatch)
    save_file(every_dtype(), path := tmp_path / "x.safetensors")
    found, expected = mapped(path), load_file(path)
    assert found.keys() == expected.keys() == every_dtype().keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and found[name].shape == tensor.shape
        assert as_bytes(found[name]) == as_bytes(tensor)
    assert not recwarn.list


def refuse_private_maps(monkeypatch) -> None:
    def read_only(*arguments, access):
        if access != mmap.ACCESS_READ:
            raise OSError(errno.ENOMEM, "Cannot allocate memory")
        return private(*arguments, access=access)

    private = mmap.mmap
    monkeypatch.setattr(mapping.mmap, "mmap", read_only)


def test_bytes_that_are_not_aligned_are_read_in_place(tmp_path):
    """Some programs do not pad the header, or store bytes before larger numbers."""
    values = torch.tensor([1.5, -2.25, 3.0])
    for padding in range(8):
        header = json.dumps({"x": entry("F32", [3], 0, 12)}).encode() + b" " * padding
        tensor = mapped(raw(tmp_path / "x", header, values.numpy().tobytes()))["x"]
        assert torch.equal(tensor, values) and torch.equal(tensor @ tensor, values @ values)


def test_writes_stay_in_memory(tmp_path):
    path = saved(tmp_path / "x.safetensors", {"x": torch.ones(4)})
    tensor = mapped(path)["x"]
    tensor.add_(1)
    assert torch.equal(tensor, torch.full((4,), 2.0))
    assert torch.equal(load_file(path)["x"], torch.ones(4))


# ---------------------------------------------------------------- larger than memory


def memory_and_swap() -> int:
    """Return the bytes of memory and swap: the system refuses a private map of more."""
    fields = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
    return sum(int(fields[name].split()[0]) * 1024 for name in ("MemTotal", "SwapTotal"))


@linux
def test_file_larger_than_memory_is_mapped(tmp_path):
    columns = 2**20
    rows = 2 * memory_and_swap() // (2 * columns)
    path = hollow(tmp_path / "x.safetensors", {"x": (rows, columns), "last": (4,)})
    with path.open("r+b") as file:
        file.seek(-8, os.SEEK_END)
        file.write(torch.tensor([1, 2, 3, 4], dtype=torch.bfloat16).view(torch.uint8).numpy())
    before = anonymous_memory()
    found = mapped(path)
    assert found["x"].shape == (rows, columns) and not found["x"][rows // 2].any()
    assert found["last"].tolist() == [1, 2, 3, 4]
    assert anonymous_memory() - before < 2**25


@linux
@pytest.mark.slow
def test_transformer_larger_than_memory_is_streamed(tmp_path):
    """Memory is that of the two buffers of a block, whatever the size of the file."""
    config = replace(TINY1, hidden_size=1536, num_heads=12, axes_dim=(16, 56, 56), depth=1)
    block = 15 * config.hidden_size**2 * 2  # bytes of a single block's matrices
    config = replace(config, depth_single=memory_and_swap() // block + 1)
    shapes = {n: tuple(x.shape) for n, x in init_empty(lambda: Flux(config)).state_dict().items()}
    path = hollow(tmp_path / "huge.safetensors", shapes)
    assert path.stat().st_size > memory_and_swap()

    pipe = flux.load(
        "flux.1-tiny", transformer=path, offload="block", dtype=torch.bfloat16, device="cpu"
    )
    before, peak, velocities = anonymous_memory(), 0, []

    def watch(module, inputs, output):
        nonlocal peak
        if isinstance(module, SingleStreamBlock):
            peak = max(peak, anonymous_memory())
        if isinstance(module, Flux):
            velocities.append(output)

    handle = torch.nn.modules.module.register_module_forward_hook(watch)
    try:
        pipe("a red star on a white background", steps=1, guidance=1, width=64, height=64)
    finally:
        handle.remove()
    assert len(velocities) == 1
    buffers = 2 * 2 * 36 * config.hidden_size**2 * 2  # two, on two sides, of the double block
    assert 0 < peak - before < 1.2 * buffers + 2**28 < memory_and_swap() / 4


# ---------------------------------------------------------------- limits and failures


def run_limited(limit: str, size: int, code: str) -> subprocess.CompletedProcess:
    """Run Python with warnings as errors, and `size` bytes allowed after the imports."""
    program = f"""
import mmap, resource, sys
from pathlib import Path
import torch
from flux.errors import UserError
from flux.weights.files import read_header
from flux.weights.mapping import map_tensors
resource.setrlimit(resource.{limit}, ({size}, {size}))
try:
    {code}
except UserError as error:
    print(error)
"""
    command = [sys.executable, "-W", "error", "-c", program]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


@linux
@pytest.mark.parametrize(
    "limit, expected",
    [
        ("RLIMIT_DATA", "10000000000 7.0\n"),  # of writable memory: private maps are refused
        ("RLIMIT_AS", "cannot be mapped: a limit on this process' memory"),
    ],
)
def test_limit_on_memory_is_met_or_named(tmp_path, limit, expected):
    path = hollow(tmp_path / "x.safetensors", {"x": (5 * 10**9,)})
    with path.open("r+b") as file:
        file.seek(-2, os.SEEK_END)
        file.write(torch.tensor([7.0]).bfloat16().view(torch.uint8).numpy())
    code = f"x = dict(map_tensors(read_header(Path({str(path)!r}))[0]))['x']; "
    done = run_limited(limit, 8 * 10**9, code + "print(x.nbytes, x[-1].item())")
    assert done.returncode == 0 and expected in done.stdout, done.stderr


def test_file_that_changes_between_header_and_map_is_refused(tmp_path):
    path = saved(tmp_path / "x.safetensors", {"x": torch.ones(100)})
    infos, _ = read_header(path)
    os.truncate(path, path.stat().st_size - 4)
    assert "was changed while it was read" in refusal(dict, map_tensors(infos))
    os.truncate(path, 0)
    assert "cannot be mapped" in refusal(dict, map_tensors(infos))
    path.unlink()
    assert "does not exist" in refusal(dict, map_tensors(infos))
    path.mkdir()
    assert "is a folder" in refusal(dict, map_tensors(infos))


def test_file_system_without_maps_is_named(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENODEV, "No such device")

    path = saved(tmp_path / "x.safetensors", {"x": torch.ones(4)})
    monkeypatch.setattr(mapping.mmap, "mmap", refuse)
    assert "its file system cannot map files; copy it to a local disk" in refusal(mapped, path)


def test_dtype_that_torch_lacks_is_named(tmp_path):
    path = raw(tmp_path / "x.safetensors", {"x": entry("F4", [4], 0, 2)}, b"12")
    assert "has 'x' in F4, which torch lacks" in refusal(mapped, path)
