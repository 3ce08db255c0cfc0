"""Map the tensors of weight files: their memory is the pages of the files, read when touched.

Where the system cannot read a page, it ends the process. So what can be foreseen is an error
before: a file that became shorter, or other than it was, is refused when it is used again
(`require_unchanged`), and files on a network are read, where a copy is made anyway.
"""

import errno
import mmap
import os
import warnings
from collections.abc import Iterable, Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flux.errors import UserError
from flux.plain_files import require_plain_file
from flux.weights.files import TensorInfo

# fmt: off
TORCH_DTYPES = {  # of safetensors' dtypes; torch has no whole elements of F4 and F6
    "F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16,
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8,
    "U64": torch.uint64, "U32": torch.uint32, "U16": torch.uint16, "U8": torch.uint8,
    "BOOL": torch.bool, "C64": torch.complex64,
    "F8_E4M3": torch.float8_e4m3fn, "F8_E5M2": torch.float8_e5m2, "F8_E8M0": torch.float8_e8m0fnu,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz, "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
}
# fmt: on
MAPPING_PROBLEMS = {
    errno.ENOMEM: "a limit on this process' memory (`ulimit -v`) is smaller than the file",
    errno.ENODEV: "its file system cannot map files; copy it to a local disk",
}


NETWORK = ("nfs", "cifs", "smb", "fuse.", "afs", "ceph", "lustre", "beegfs", "glusterfs", "gpfs")


def map_tensors(
    infos: Mapping[str, TensorInfo], *, copied: bool = False
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, of the files' dtypes, whose memory is the pages of their file.

    Quantized tensors of GGUF are bytes: `gguf.stored`. A tensor that is joined of rows is a copy.
    copied: the caller copies each tensor and drops it. Then files on a network are read.
    UserError if a file cannot be mapped or read, or is shorter than when its header was read.
    """
    pages: dict[Path, mmap.mmap] = {}
    read = {path for path in {i.file for i in infos.values()} if copied and is_on_network(path)}

    def tensor_of(info: TensorInfo) -> Tensor:
        return _read_tensor(info) if info.file in read else _map_tensor(info, pages)

    for name, info in infos.items():
        parts = [tensor_of(rows.info)[rows.start : rows.stop] for rows in info.rows]
        # float8 cannot be concatenated
        joined = torch.cat([part.view(torch.uint8) for part in parts]) if parts else None
        yield name, tensor_of(info) if joined is None else joined.view(parts[0].dtype)


def meta_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yield names, and tensors without values, for which `map_tensors` would read nothing."""
    for file in {info.file for info in infos.values()}:
        map_file(file)  # raises an error that would come later
    for name, info in infos.items():
        yield name, torch.empty(info.shape, dtype=_torch_dtype(info), device="meta")


def map_tensor(info: TensorInfo) -> Tensor:
    """Map one tensor, as `map_tensors` does."""
    ((_, tensor),) = map_tensors({info.name: info})
    return tensor


def _map_tensor(info: TensorInfo, pages: dict[Path, mmap.mmap]) -> Tensor:
    if info.file not in pages:
        pages[info.file] = map_file(info.file)
    dtype = _torch_dtype(info)
    size = prod(info.shape) * dtype.itemsize
    if info.begin + size > len(pages[info.file]):
        raise UserError(f"{info.file} was changed while it was read; run again.")
    if size == 0:
        return torch.empty(info.shape, dtype=dtype)
    with warnings.catch_warnings():  # of a read-only map
        warnings.filterwarnings("ignore", "The given buffer is not writable")
        raw = torch.frombuffer(pages[info.file], dtype=torch.uint8, count=size, offset=info.begin)
    return raw.view(dtype).view(info.shape)


def _read_tensor(info: TensorInfo) -> Tensor:
    """Read one tensor into memory: an input/output error is an error, where a map has none."""
    dtype = _torch_dtype(info)
    raw = torch.empty(prod(info.shape) * dtype.itemsize, dtype=torch.uint8)
    try:
        with require_plain_file(info.file, "a file of weights").open("rb", buffering=0) as file:
            file.seek(info.begin)
            rest = raw.numpy().data
            while rest and (count := file.readinto(rest)):
                rest = rest[count:]
    except OSError as error:
        raise UserError(f"{info.file} cannot be read: {error.strerror}.") from error
    if rest:
        raise UserError(f"{info.file} was changed while it was read; run again.")
    return raw.view(dtype).view(info.shape)


def _torch_dtype(info: TensorInfo) -> torch.dtype:
    if dtype := TORCH_DTYPES.get(info.dtype):
        return dtype
    raise UserError(f"{info.file} has {info.name!r:.120} in {info.dtype}, which torch lacks.")


def map_file(path: Path) -> mmap.mmap:
    """Map a file. What is written to a private map stays in memory, and does not reach the file.

    Systems refuse a private map of a file that is larger than memory. That file's map is read-only:
    a write to its tensors ends the process.
    """
    try:
        with require_plain_file(path, "a file of weights").open("rb") as file:
            try:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            except OSError:
                return mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    except UserError:
        raise
    except OSError as error:
        reason = MAPPING_PROBLEMS.get(error.errno or 0, error.strerror)
        raise UserError(f"{path} cannot be mapped: {reason}.") from error
    except (ValueError, OverflowError) as error:  # an empty file; larger than any address
        raise UserError(f"{path} cannot be mapped: {error}.") from error


# ---------------------------------------------------------------- files that change


class FileState(NamedTuple):
    """What tells whether a file is the same as before."""

    device: int
    inode: int
    size: int
    modified: int  # ns


def file_states(files: Iterable[Path]) -> dict[Path, FileState]:
    """Return the states of those files that are there."""
    states = {}
    for path in files:
        try:
            found = path.stat()
        except OSError:
            continue
        states[path] = FileState(found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns)
    return states


def require_unchanged(states: Mapping[Path, FileState], *, mapped: bool = False) -> None:
    """Raise UserError if a file is not as it was when `states` were taken. It may be missing.

    mapped: it was mapped then. A file that was replaced since is used on as it was: only its name
    has gone. But if a file was changed in place, its weights would change, and the end of a file
    that became shorter would end the process.
    """
    for path, found in file_states(states).items():
        replaced = found[:2] != states[path][:2]
        if found != states[path] and not (mapped and replaced):
            raise UserError(f"{path}: was changed while it was used. Load the model again.")


# ---------------------------------------------------------------- files on a network


def is_on_network(path: Path) -> bool:
    """Return whether a file lies on a file system that can fail while it is read (on Linux)."""
    try:
        device = path.stat().st_dev
    except OSError:
        return False
    return file_system(os.major(device), os.minor(device)).startswith(NETWORK)


@cache
def file_system(major: int, minor: int) -> str:
    """Return the type of the file system with this device number; "" if it is not known.

    The format of /proc/self/mountinfo: https://man7.org/linux/man-pages/man5/proc.5.html
    """
    try:
        lines = Path("/proc/self/mountinfo").read_text(errors="replace").splitlines()
    except OSError:
        return ""
    return _type_of(lines, f"{major}:{minor}")


def _type_of(mountinfo: Iterable[str], device: str) -> str:
    for line in mountinfo:
        mount, _, kind = line.partition(" - ")
        if mount.split(" ")[2:3] == [device]:
            return kind.split(" ")[0]
    return ""


def warn_of_network(files: Iterable[Path]) -> None:
    """Warn of files that stay mapped on a network."""
    for path in dict.fromkeys(files):
        if is_on_network(path):
            warnings.warn(
                f"{path} lies on a network: if its server cannot be reached, the process ends "
                "without a message. A copy on a local disk is safe, and faster",
                stacklevel=3,
            )
            return
