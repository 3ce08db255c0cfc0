"""Map the tensors of weight files: their memory is the pages of the files, read when touched."""

import errno
import mmap
import warnings
from collections.abc import Iterator, Mapping
from math import prod
from pathlib import Path

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


def map_tensors(infos: Mapping[str, TensorInfo]) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, of the files' dtypes, whose memory is the pages of their file.

    Quantized tensors of GGUF are bytes: `gguf.stored`. A tensor that is joined of rows is a copy.
    UserError if a file cannot be mapped, or is shorter than when its header was read.
    """
    pages: dict[Path, mmap.mmap] = {}
    for name, info in infos.items():
        parts = [_map_tensor(rows.info, pages)[rows.start : rows.stop] for rows in info.rows]
        # float8 cannot be concatenated
        joined = torch.cat([part.view(torch.uint8) for part in parts]) if parts else None
        yield name, _map_tensor(info, pages) if joined is None else joined.view(parts[0].dtype)


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
