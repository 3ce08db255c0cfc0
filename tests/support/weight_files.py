"""Write sound, hollow and damaged weight files; read refusals and the memory of this process."""

import json
import os
import struct
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.load_script import script

from flux.errors import UserError

measure = script("benchmarks/measure")


def saved(path: Path, tensors: dict[str, torch.Tensor], **metadata: str) -> Path:
    save_file(
        {name: tensor.contiguous() for name, tensor in tensors.items()}, path, metadata or None
    )
    return path


def raw(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(call, *arguments, **options) -> str:
    """Return the message of the UserError that a call raises; it must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


def hollow(
    path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", bits: int = 16
) -> Path:
    """Write a file of the full size that takes no space on disk: a true header, and a hole."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * bits // 8
        header[name] = entry(dtype, list(shape), position, position + size)
        position += size
    raw(path, header)
    os.truncate(path, path.stat().st_size + position)
    return path


def anonymous_memory() -> int:
    """Return the bytes of this process that no file backs (Linux only)."""
    return measure.proc("status")["RssAnon"]
