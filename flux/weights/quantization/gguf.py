"""GGUF, the files of llama.cpp and of ComfyUI-GGUF: their header, their tensors, and their quantised weights made whole.

    infos, metadata = read_header(path)         # "Q4_K", (out, in): checked against the size of the file
    weight = tensors(path)[name]                # mapped: (out, bytes per row) uint8
    decode(weight, "Q4_K", (out, in))           # (out, in) float32

A quantised row is cut into blocks of 32 or 256 neighbouring weights. Each is packed for itself: a weight is a small integer
times a scale, plus a minimum in some kinds; in the K-quants, the scales and minima of groups are small integers times a scale.
The arithmetic is ggml's, in float32, to the last bit (diffusers computes in float16, which rounds more).
Container: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; blocks: src/ggml-common.h and src/ggml-quants.c there.
"""

import struct
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor

from flux.errors import UserError
from flux.weights.files import MAX_HEADER, TensorInfo
from flux.weights.quantization.linear import QuantizedLinear

# ---------------------------------------------------------------------------------------------------------- blocks
# Each decoder: blocks (n, bytes) uint8 -> (n, weights) float32. Its comment lists the bytes of a block; "4 x 32 of 2 bits" are
# 32 bytes, whose lowest 2 bits are the first 32 numbers, the next 2 bits the next 32, and so on.


def as_float16(b: Tensor) -> Tensor:
    """Two bytes (n, 2), a float16 -> (n, 1) float32."""
    return b.contiguous().view(torch.float16).float()


def unpack_bits(b: Tensor, bits: int) -> Tensor:
    """Bytes (..., k), each cut into fields, the lowest bits first -> (..., 8/bits, k)."""
    return torch.stack([(b >> low) & (2**bits - 1) for low in range(0, 8, bits)], dim=-2)


def unpack_runs(b: Tensor, bits: int, length: int) -> Tensor:
    """Bytes (n, bytes) -> (n, weights): the first fields of `length` bytes, their second fields, ...; then the next bytes."""
    return unpack_bits(b.unflatten(1, (-1, length)), bits).flatten(1)


def centered(q: Tensor, zero: int) -> Tensor:
    """What is stored as q is q - zero, from -zero up: int8."""
    return q.view(torch.int8) - zero


def scaled(q: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """q · scale + shift: (n, weights) with (n, groups) scales and shifts, each for its share of the weights."""
    weights = (
        q.unflatten(1, (scale.shape[1], -1)).float().mul_(scale[..., None])
    )  # in place: nothing else is as large
    return (weights if shift is None else weights.add_(shift[..., None])).flatten(1)


def q8_0(b: Tensor) -> Tensor:
    # 2: scale; 32: weights
    d, q = b.split([2, 32], dim=1)
    return scaled(q.view(torch.int8), as_float16(d))


def q4_0(b: Tensor) -> Tensor:
    # 2: scale; 16: weights, 2 x 16 of 4 bits
    d, q = b.split([2, 16], dim=1)
    return scaled(centered(unpack_runs(q, 4, 16), 8), as_float16(d))


def q4_1(b: Tensor) -> Tensor:
    # 2: scale; 2: minimum; 16: weights, 2 x 16 of 4 bits
    d, m, q = b.split([2, 2, 16], dim=1)
    return scaled(unpack_runs(q, 4, 16), as_float16(d), as_float16(m))


def q5_0(b: Tensor) -> Tensor:
    # 2: scale; 4: the weights' bit 4, in their order; 16: their bits 0-3, 2 x 16 of 4 bits
    d, high, low = b.split([2, 4, 16], dim=1)
    return scaled(
        centered(unpack_runs(low, 4, 16) | unpack_runs(high, 1, 1) << 4, 16), as_float16(d)
    )


def q5_1(b: Tensor) -> Tensor:
    # 2: scale; 2: minimum; 4: the weights' bit 4, in their order; 16: their bits 0-3, 2 x 16 of 4 bits
    d, m, high, low = b.split([2, 2, 4, 16], dim=1)
    return scaled(
        unpack_runs(low, 4, 16) | unpack_runs(high, 1, 1) << 4, as_float16(d), as_float16(m)
    )


def q2_k(b: Tensor) -> Tensor:
    # 16: of each of 16 groups, scale (low 4 bits) and minimum (high); 64: weights, twice 4 x 32 of 2 bits; 2, 2: scales of both
    groups, q, d, dm = b.split([16, 64, 2, 2], dim=1)
    scale, minimum = unpack_bits(groups, 4).unbind(1)  # (n, 16) each
    return scaled(unpack_runs(q, 2, 32), as_float16(d) * scale, -as_float16(dm) * minimum)


def q3_k(b: Tensor) -> Tensor:
    # 32: the weights' bit 2, 8 x 32 of 1 bit; 64: their bits 0-1, twice 4 x 32 of 2 bits;
    # 12: scales of 16 groups, 2 x 8 of their bits 0-3, then 4 x 4 of their bits 4-5; 2: the scales' scale
    high, low, scale_low, scale_high, d = b.split([32, 64, 8, 4, 2], dim=1)
    scale = unpack_runs(scale_low, 4, 8) | unpack_runs(scale_high, 2, 4) << 4  # (n, 16)
    q = unpack_runs(low, 2, 32) | unpack_runs(high, 1, 32) << 2
    return scaled(centered(q, 4), as_float16(d) * centered(scale, 32))


def q4_k(b: Tensor) -> Tensor:
    # 2, 2: scales of the scales and of the minima; 12: scales and minima of 8 groups; 128: weights, four times 2 x 32 of 4 bits
    d, dm, groups, q = b.split([2, 2, 12, 128], dim=1)
    scale, minimum = scales_and_minima(groups)
    return scaled(unpack_runs(q, 4, 32), as_float16(d) * scale, -as_float16(dm) * minimum)


def q5_k(b: Tensor) -> Tensor:
    # 2, 2, 12: as in Q4_K; 32: the weights' bit 4, 8 x 32 of 1 bit; 128: their bits 0-3, four times 2 x 32 of 4 bits
    d, dm, groups, high, low = b.split([2, 2, 12, 32, 128], dim=1)
    scale, minimum = scales_and_minima(groups)
    return scaled(
        unpack_runs(low, 4, 32) | unpack_runs(high, 1, 32) << 4,
        as_float16(d) * scale,
        -as_float16(dm) * minimum,
    )


def q6_k(b: Tensor) -> Tensor:
    # 128: the weights' bits 0-3, twice 2 x 64 of 4 bits; 64: their bits 4-5, twice 4 x 32 of 2 bits;
    # 16: scales of 16 groups; 2: the scales' scale
    low, high, scale, d = b.split([128, 64, 16, 2], dim=1)
    q = unpack_runs(low, 4, 64) | unpack_runs(high, 2, 32) << 4
    return scaled(centered(q, 32), as_float16(d) * scale.view(torch.int8))


def scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """Of eight groups, 6 bits each: (n, 12) bytes -> (n, 8), (n, 8).

    The first four scales are the low 6 bits of bytes 0-3, the first four minima those of bytes 4-7. The high 2 bits there are
    bits 4-5 of the last four, whose bits 0-3 share bytes 8-11: low the scales, high the minima.
    """
    scale, minimum, rest = b.unflatten(1, (3, 4)).unbind(1)  # (n, 4) each
    scales = torch.cat([scale & 63, rest & 15 | scale >> 6 << 4], dim=1)
    return scales, torch.cat([minimum & 63, rest >> 4 | minimum >> 6 << 4], dim=1)


def iq4_nl(b: Tensor) -> Tensor:
    # 2: scale; 16: weights, 2 x 16 of 4 bits
    d, q = b.split([2, 16], dim=1)
    return scaled(iq4_lookup(unpack_runs(q, 4, 16)), as_float16(d))


def iq4_xs(b: Tensor) -> Tensor:
    # 2: the scales' scale; 2, 4: bits 4-5, then bits 0-3 of the scales of 8 groups, in their order;
    # 128: weights, eight times 2 x 16 of 4 bits
    d, scale_high, scale_low, q = b.split([2, 2, 4, 128], dim=1)
    scale = unpack_runs(scale_low, 4, 1) | unpack_runs(scale_high, 2, 1) << 4  # (n, 8)
    return scaled(iq4_lookup(unpack_runs(q, 4, 16)), as_float16(d) * centered(scale, 32))


def iq4_lookup(q: Tensor) -> Tensor:
    """4 bits -> one of 16 integers, denser around zero."""
    values = (
        iq4_table if torch.compiler.is_compiling() else cached_iq4_table
    )  # the compiler keeps constants by itself
    return values(q.device).index_select(0, q.flatten().int()).view_as(q)


def iq4_table(device: torch.device) -> Tensor:
    """`kvalues_iq4nl` in ggml-common.h: (16,) int8."""
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    return torch.tensor(values, dtype=torch.int8, device=device)


cached_iq4_table = cache(iq4_table)  # since a copy to a GPU waits for all that it was asked before


class Block(NamedTuple):
    weights: int
    bytes: int
    decode: Callable[[Tensor], Tensor]


BLOCKS = {
    "Q4_0": Block(32, 18, q4_0),
    "Q4_1": Block(32, 20, q4_1),
    "Q5_0": Block(32, 22, q5_0),
    "Q5_1": Block(32, 24, q5_1),
    "Q8_0": Block(32, 34, q8_0),
    "Q2_K": Block(256, 84, q2_k),
    "Q3_K": Block(256, 110, q3_k),
    "Q4_K": Block(256, 144, q4_k),
    "Q5_K": Block(256, 176, q5_k),
    "Q6_K": Block(256, 210, q6_k),
    "IQ4_NL": Block(32, 18, iq4_nl),
    "IQ4_XS": Block(256, 136, iq4_xs),
}


def decode(raw: Tensor, kind: str, shape: Sequence[int]) -> Tensor:
    """The bytes of a tensor of this shape -> the tensor, float32, on their device."""
    return BLOCKS[kind].decode(raw.reshape(-1, BLOCKS[kind].bytes)).view(shape)


class GGUFLinear(QuantizedLinear):
    """`kind` is one of BLOCKS."""

    def __init__(self, in_features: int, out_features: int, bias: bool, kind: str):
        super().__init__(in_features, out_features, bias)
        self.kind = kind
        self.register_buffer(
            "weight",
            torch.empty(stored_shape(kind, (out_features, in_features)), dtype=torch.uint8),
        )

    def dequantize(self) -> Tensor:
        return decode(self.weight, self.kind, (self.out_features, self.in_features))


# ---------------------------------------------------------------------------------------------------------- files

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
TYPES = {  # enum ggml_type
    0: "F32",
    1: "F16",
    2: "Q4_0",
    3: "Q4_1",
    6: "Q5_0",
    7: "Q5_1",
    8: "Q8_0",
    10: "Q2_K",
    11: "Q3_K",
    12: "Q4_K",
    13: "Q5_K",
    14: "Q6_K",
    20: "IQ4_NL",
    23: "IQ4_XS",
    30: "BF16",
}
NUMBERS = {  # enum gguf_type -> struct's code
    0: "B",
    1: "b",
    2: "H",
    3: "h",
    4: "I",
    5: "i",
    6: "f",
    7: "?",
    10: "Q",
    11: "q",
    12: "d",
}
TEXT, LIST = 8, 9


class Header(NamedTuple):
    infos: dict[str, TensorInfo]
    begins: dict[str, int]  # where in the file
    metadata: dict[str, str | int | float]


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str | int | float]]:
    """Name -> info, and the metadata less its lists, of a GGUF file, which is not loaded; UserError if it is anything else.

    Shapes are in torch's order, and those of whole tensors; dtypes are the names in PLAIN and BLOCKS.
    """
    header = _read(Path(path))
    return header.infos, header.metadata


def tensors(path: Path) -> dict[str, Tensor]:
    """Every tensor, mapped: in its own dtype or, if it is quantised, as bytes, (..., bytes per row) uint8."""
    path = Path(path)
    header = _read(path)
    try:  # not shared: a write would stay in memory, and not reach the file
        pages = torch.from_file(
            str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
        )
    except (OSError, RuntimeError) as error:
        raise UserError(f"{path} cannot be mapped: {error!s:.120}.") from error

    def mapped(info: TensorInfo) -> Tensor:
        begin = header.begins[info.name]
        raw = pages[begin : begin + _size(info.dtype, info.shape)]
        if info.dtype in PLAIN:
            return raw.view(PLAIN[info.dtype]).view(info.shape)
        return raw.view(stored_shape(info.dtype, info.shape))

    return {name: mapped(info) for name, info in header.infos.items()}


def stored_shape(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape, in bytes, in which a tensor of this shape is kept."""
    return *shape[:-1], shape[-1] // BLOCKS[kind].weights * BLOCKS[kind].bytes


def _size(kind: str, shape: Sequence[int]) -> int:
    return prod(shape) * PLAIN[kind].itemsize if kind in PLAIN else prod(stored_shape(kind, shape))


class _Fields:
    """What a header is made of, one after the other, little-endian; ValueError rather than a byte past its end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size

    def take(self, size: int) -> bytes:
        if self.file.tell() + size > (limit := min(self.size, MAX_HEADER)):
            what = f"its header has no end within the first {limit:,} bytes"
            raise ValueError(f"is truncated or damaged: {what}; download it again")
        return self.file.read(size)

    def number(self, code: str) -> int | float:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode(errors="replace")

    def scalar(self, kind: int) -> str | int | float:
        if kind != TEXT and kind not in NUMBERS:
            raise ValueError(
                f"has a damaged header, with a value of type {kind}; download it again"
            )
        return self.text() if kind == TEXT else self.number(NUMBERS[kind])

    def value(self) -> str | int | float | None:
        """None for a list, such as a language model's vocabulary: it is passed over."""
        if (kind := self.number("I")) != LIST:
            return self.scalar(kind)
        kind, count = self.number("I"), self.number("Q")
        if kind in NUMBERS:
            self.take(count * struct.calcsize(NUMBERS[kind]))
        else:
            for _ in range(count):
                self.scalar(kind)
        return None

    def tensor(self, path: Path) -> tuple[TensorInfo, int]:
        """What is said of a tensor, and how far from the end of the header it begins."""
        name = self.text()
        if (dimensions := self.number("I")) > 4:
            raise ValueError(
                f"has a damaged header: tensor {name!r:.120} has {dimensions:,} dimensions; download it again"
            )
        shape = tuple(self.number("Q") for _ in range(dimensions))[::-1]
        number, begin = self.number("I"), self.number("Q")
        if (kind := TYPES.get(number)) is None:
            raise ValueError(
                f"keeps {name!r:.120} in ggml's type {number}, which is not read; get the model as Q8_0 or Q4_K"
            )
        if 0 in shape or (kind in BLOCKS and (not shape or shape[-1] % BLOCKS[kind].weights)):
            what = f"tensor {name!r:.120}, {kind} of shape {shape}, is not made of whole blocks"
            raise ValueError(f"has a damaged header: {what}; download it again")
        return TensorInfo(kind, shape, path, name), begin


def _read(path: Path) -> Header:
    try:
        if not path.is_file():
            raise ValueError("is not a file")
        with path.open("rb") as file:
            return _parse(_Fields(file, path.stat().st_size), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise UserError(f"{path} {error}.") from error


def _parse(fields: _Fields, path: Path) -> Header:
    """ValueError for what is wrong. The tensors must lie in the header's order and without holes, as llama.cpp too demands."""
    if fields.take(4) != b"GGUF":
        raise ValueError("is not a GGUF file")
    if (version := fields.number("I")) not in (2, 3):
        raise ValueError(
            f"is GGUF of version {version}, or big-endian; only 2 and 3, little-endian, are read"
        )
    tensor_count, value_count = fields.number("Q"), fields.number("Q")
    metadata = {fields.text(): fields.value() for _ in range(value_count)}
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(
            f"has a damaged header, with an alignment of {alignment!s:.40}; download it again"
        )

    infos, begins, end = {}, {}, 0
    for _ in range(tensor_count):
        info, begin = fields.tensor(path)
        if info.name in infos or begin != end + -end % alignment:
            fault = (
                "comes twice"
                if info.name in infos
                else "does not begin where the one before it ends"
            )
            raise ValueError(
                f"has a damaged header: tensor {info.name!r:.120} {fault}; download it again"
            )
        infos[info.name], begins[info.name], end = (
            info,
            begin,
            begin + _size(info.dtype, info.shape),
        )
    if not infos:
        raise ValueError("holds no tensors")
    start = fields.file.tell()
    start += -start % alignment
    if not start + end <= fields.size <= start + end + -end % alignment:
        fault = "is truncated" if fields.size < start + end else "goes on after its end"
        raise ValueError(
            f"{fault}: {start + end:,} bytes expected, {fields.size:,} found; download it again"
        )
    known = {key: value for key, value in metadata.items() if value is not None}
    return Header(infos, {name: start + begin for name, begin in begins.items()}, known)
