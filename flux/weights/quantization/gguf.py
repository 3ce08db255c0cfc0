"""GGUF, the files of llama.cpp and ComfyUI-GGUF: headers, tensors, and quantized weights.

    infos, metadata = read_header(path)  # "Q4_K", (out, in): checked against the file's size
    weight = tensors(path)[name]         # mapped: (out, bytes per row) uint8
    decode(weight, "Q4_K", (out, in))    # (out, in) float32

A quantized row is cut into blocks of 32 or 256 neighbouring weights, each packed separately.
A weight is a small integer times a scale, plus a minimum in some types. In the K-quants, the scales
and minima of groups are small integers times a scale too.
The arithmetic is ggml's, in float32, to the last bit (diffusers computes in float16).
The container is specified by https://github.com/ggml-org/ggml/blob/master/docs/gguf.md, the blocks
by src/ggml-common.h and src/ggml-quants.c in that repository.
"""

import struct
from collections.abc import Callable, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from flux.errors import UserError
from flux.plain_files import require_plain_file
from flux.weights.files import MAX_DIMENSIONS, MAX_HEADER, MAX_TENSORS, TensorInfo
from flux.weights.mapping import map_tensors
from flux.weights.quantization.linear import QuantizedLinear

# ---------------------------------------------------------------- blocks
# Each decoder: blocks (n, bytes) uint8 -> (n, weights) float32. Its comment lists the bytes of a
# block. "4 x 32 of 2 bits" are 32 bytes: their lowest 2 bits are the first 32 numbers, the next 2
# bits the next 32, and so on.


def as_float16(b: Tensor) -> Tensor:
    """Read float16 from two bytes: (n, 2) -> (n, 1) float32."""
    return b.contiguous().view(torch.float16).float()


def unpack_bits(b: Tensor, bits: int) -> Tensor:
    """Cut each byte into numbers of `bits` bits, the lowest first: (..., k) -> (..., 8/bits, k)."""
    return torch.stack([(b >> low) & (2**bits - 1) for low in range(0, 8, bits)], dim=-2)


def unpack_runs(b: Tensor, bits: int, length: int) -> Tensor:
    """Cut bytes into numbers, `length` bytes at a time: (n, bytes) -> (n, weights).

    The order is the first numbers of these bytes, then their second numbers, and so on.
    """
    return unpack_bits(b.unflatten(1, (-1, length)), bits).flatten(1)


def centered(q: Tensor, zero: int) -> Tensor:
    """Return the signed number q - zero, which is stored as q: int8."""
    return q.view(torch.int8) - zero


def scaled(q: Tensor, scale: Tensor, shift: Tensor | None = None) -> Tensor:
    """Return q · scale + shift: q (n, weights); scale, shift (n, groups) for equal shares of q."""
    groups = q.unflatten(1, (scale.shape[1], -1)).float()  # (n, groups, weights in a group)
    groups.mul_(scale[..., None])  # in place: nothing else is as large
    if shift is not None:
        groups.add_(shift[..., None])
    return groups.flatten(1)


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
    # 2: scale; 2: minimum; 4: the weights' bit 4, in their order;
    # 16: their bits 0-3, 2 x 16 of 4 bits
    d, m, high, low = b.split([2, 2, 4, 16], dim=1)
    return scaled(
        unpack_runs(low, 4, 16) | unpack_runs(high, 1, 1) << 4, as_float16(d), as_float16(m)
    )


def q2_k(b: Tensor) -> Tensor:
    # 16: of each of 16 groups, scale (low 4 bits) and minimum (high 4 bits);
    # 64: weights, twice 4 x 32 of 2 bits; 2, 2: scales of the scales and of the minima
    groups, q, d, dm = b.split([16, 64, 2, 2], dim=1)
    scale, minimum = unpack_bits(groups, 4).unbind(1)  # (n, 16) each
    return scaled(unpack_runs(q, 2, 32), as_float16(d) * scale, -as_float16(dm) * minimum)


def q3_k(b: Tensor) -> Tensor:
    # 32: the weights' bit 2, 8 x 32 of 1 bit; 64: their bits 0-1, twice 4 x 32 of 2 bits;
    # 12: scales of 16 groups, 2 x 8 of their bits 0-3, then 4 x 4 of their bits 4-5;
    # 2: the scales' scale
    high, low, scale_low, scale_high, d = b.split([32, 64, 8, 4, 2], dim=1)
    scale = unpack_runs(scale_low, 4, 8) | unpack_runs(scale_high, 2, 4) << 4  # (n, 16)
    q = unpack_runs(low, 2, 32) | unpack_runs(high, 1, 32) << 2
    return scaled(centered(q, 4), as_float16(d) * centered(scale, 32))


def q4_k(b: Tensor) -> Tensor:
    # 2, 2: scales of the scales and of the minima; 12: scales and minima of 8 groups;
    # 128: weights, four times 2 x 32 of 4 bits
    d, dm, groups, q = b.split([2, 2, 12, 128], dim=1)
    scale, minimum = scales_and_minima(groups)
    return scaled(unpack_runs(q, 4, 32), as_float16(d) * scale, -as_float16(dm) * minimum)


def q5_k(b: Tensor) -> Tensor:
    # 2, 2, 12: as in Q4_K; 32: the weights' bit 4, 8 x 32 of 1 bit;
    # 128: their bits 0-3, four times 2 x 32 of 4 bits
    d, dm, groups, high, low = b.split([2, 2, 12, 32, 128], dim=1)
    scale, minimum = scales_and_minima(groups)
    return scaled(
        unpack_runs(low, 4, 32) | unpack_runs(high, 1, 32) << 4,
        as_float16(d) * scale,
        -as_float16(dm) * minimum,
    )


def q6_k(b: Tensor) -> Tensor:
    # 128: the weights' bits 0-3, twice 2 x 64 of 4 bits;
    # 64: their bits 4-5, twice 4 x 32 of 2 bits; 16: scales of 16 groups; 2: the scales' scale
    low, high, scale, d = b.split([128, 64, 16, 2], dim=1)
    q = unpack_runs(low, 4, 64) | unpack_runs(high, 2, 32) << 4
    return scaled(centered(q, 32), as_float16(d) * scale.view(torch.int8))


def scales_and_minima(b: Tensor) -> tuple[Tensor, Tensor]:
    """Unpack the 6-bit scales and minima of eight groups: (n, 12) bytes -> (n, 8), (n, 8).

    Of groups 0-3, scales are the low 6 bits of bytes 0-3, and minima those of bytes 4-7.
    Of groups 4-7, bits 4-5 are the high 2 bits of the same bytes. Their bits 0-3 are in bytes 8-11:
    scales in the low half, minima in the high half.
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
    """Replace 4-bit numbers by 16 integers, denser around zero: int8, of q's shape."""
    # torch.compile keeps constants by itself, and cannot trace a cache
    table = iq4_table if torch.compiler.is_compiling() else cached_iq4_table
    return table(q.device).index_select(0, q.flatten().int()).view_as(q)


def iq4_table(device: torch.device) -> Tensor:
    """Return `kvalues_iq4nl` of ggml-common.h: (16,) int8."""
    values = (-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113)
    return torch.tensor(values, dtype=torch.int8, device=device)


cached_iq4_table = cache(iq4_table)  # a copy to a GPU would wait for all work before it


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
    """Decode the bytes of a tensor of this shape: float32, on the device of `raw`."""
    return BLOCKS[kind].decode(raw.reshape(-1, BLOCKS[kind].bytes)).view(shape)


class GGUFLinear(QuantizedLinear):
    """A weight in one of ggml's block types; `kind` is a key of `BLOCKS`, such as "Q4_K".

    The bytes of a row are its blocks, one after another, as in the file.
    A block has one or two float16 scales, and integers of 2 to 8 bits for its weights.
    The decoder of the type computes the weights; ggml-common.h specifies the bytes of a block.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, kind: str):
        super().__init__(in_features, out_features, bias)
        self.kind = kind
        shape = stored_shape(kind, (out_features, in_features))
        self.hold("weight", shape, torch.uint8)

    def dequantize(self) -> Tensor:
        return decode(self.weight, self.kind, (self.out_features, self.in_features))


class GGUFEmbedding(GGUFLinear):
    """An embedding in one of ggml's block types: rows are decoded when their ids are used.

    Its `in_features` and `out_features` are the sizes of a row and of the vocabulary.
    """

    def __init__(self, num_embeddings: int, embedding_dim: int, kind: str):
        super().__init__(embedding_dim, num_embeddings, False, kind)
        self.dtype = torch.float32  # of the rows that `forward` returns

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (...) -> their rows (..., embedding_dim)."""
        if self.weight.dim() == 1:  # rows share blocks
            return self.dequantize()[ids].to(self.dtype)
        return decode(self.weight[ids], self.kind, (*ids.shape, self.in_features)).to(self.dtype)

    def to_linear(self, weight: Tensor) -> nn.Embedding:  # type: ignore[override]
        """Return a frozen Embedding with this weight."""
        return nn.Embedding.from_pretrained(weight).train(self.training)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Run `.to()`, `.half()` and the like: a dtype is for the rows, a device for the blocks."""
        self.dtype = fn(torch.empty(0, dtype=self.dtype)).dtype
        return super()._apply(fn, recurse)


# ---------------------------------------------------------------- files

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
# fmt: off
TYPES = {  # enum ggml_type
    0: "F32", 1: "F16", 30: "BF16",
    2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0",
    10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K",
    20: "IQ4_NL", 23: "IQ4_XS",
}
NUMBERS = {  # enum gguf_type -> the format character of `struct`
    0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d",
}
# fmt: on
STRING, ARRAY = 8, 9  # enum gguf_type
# ComfyUI-GGUF stores a matrix with short rows in rows of whole blocks, and its shape under this key
# and the tensor's name.
ORIGINAL_SHAPE = "comfy.gguf.orig_shape."
SPLIT_COUNT = "split.count"  # of the files of a model, in the metadata of each
MAX_STRINGS = 1_000_000  # of all arrays; Mistral's vocabulary and merges are some 400,000


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str | int | float]]:
    """Return a file's tensors by name, and its metadata without arrays; load no weights.

    Shapes are in torch's order, and those of dequantized tensors; dtypes are keys of `PLAIN` and
    `BLOCKS`. UserError if the file is anything else than GGUF, or damaged.
    """
    path = Path(path)
    try:
        with require_plain_file(path, "a GGUF file").open("rb") as file:
            return _parse(_Fields(file, path.stat().st_size), path)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{path} {error}.") from error


def read_arrays(path: Path, prefix: str) -> dict[str, list]:
    """Return the arrays of a file's metadata whose names begin so, such as a tokenizer's."""
    read_header(path)  # raises UserError for a damaged file
    arrays: dict[str, list] = {}
    with path.open("rb") as file:
        fields = _Fields(file, path.stat().st_size)
        fields.take(16)  # the magic number, the version, and the number of tensors
        for _ in range(fields.integer("Q")):
            name, kind = fields.text(), fields.integer("I")
            if kind != ARRAY:
                fields.scalar(kind)
                continue
            kind, count = fields.integer("I"), fields.integer("Q")
            values = [fields.scalar(kind) for _ in range(count)]
            if name.startswith(prefix):
                arrays[name.removeprefix(prefix)] = values
    return arrays


def tensors(path: Path) -> dict[str, Tensor]:
    """Map every tensor: in its dtype or, if quantized, as bytes (..., bytes per row) uint8."""
    infos, _ = read_header(path)
    return dict(map_tensors({name: stored(info) for name, info in infos.items()}))


def stored(info: TensorInfo) -> TensorInfo:
    """Describe a tensor as it is stored: a quantized one is bytes, (..., bytes per row) uint8."""
    rows = tuple(part._replace(info=stored(part.info)) for part in info.rows)
    if info.dtype not in BLOCKS:
        return info._replace(rows=rows)
    return info._replace(dtype="U8", shape=stored_shape(info.dtype, info.shape), rows=rows)


def stored_shape(kind: str, shape: Sequence[int]) -> tuple[int, ...]:
    """Return the shape, in bytes, of a stored tensor that has this shape when dequantized.

    It has one dimension if rows share blocks (`ORIGINAL_SHAPE`).
    """
    block = BLOCKS[kind]
    if shape[-1] % block.weights:
        return (prod(shape) // block.weights * block.bytes,)
    return *shape[:-1], shape[-1] // block.weights * block.bytes


def _size(kind: str, shape: Sequence[int]) -> int:
    """Return the bytes of a tensor."""
    return prod(shape) * PLAIN[kind].itemsize if kind in PLAIN else prod(stored_shape(kind, shape))


def _parse(
    fields: "_Fields", path: Path
) -> tuple[dict[str, TensorInfo], dict[str, str | int | float]]:
    """Parse a header; ValueError if it is damaged.

    Tensors must lie in the header's order and without holes, as llama.cpp demands too.
    """
    if fields.take(4) != b"GGUF":
        raise ValueError("is not a GGUF file")
    if (version := fields.integer("I")) not in (2, 3):
        raise ValueError(
            f"is GGUF of version {version}, or big-endian; only 2 and 3, little-endian, are "
            "supported"
        )
    tensor_count, value_count = fields.integer("Q"), fields.integer("Q")
    if max(tensor_count, value_count) > MAX_TENSORS:
        raise ValueError(
            f"has a damaged header, with {tensor_count:,} tensors and {value_count:,} values (at "
            f"most {MAX_TENSORS:,}); download it again"
        )
    metadata: dict[str, str | int | float | None] = {}
    shapes: dict[str, tuple[int, ...]] = {}  # of tensors that are stored in another shape
    for _ in range(value_count):
        if (name := fields.text()) in metadata:
            raise ValueError(
                f"has a damaged header: value {name!r:.120} comes twice; download it again"
            )
        metadata[name] = fields.value()
        if name.startswith(ORIGINAL_SHAPE):
            shapes[name.removeprefix(ORIGINAL_SHAPE)] = fields.last_integers
    alignment = metadata.get("general.alignment", 32)
    if type(alignment) is not int or alignment < 8 or alignment & (alignment - 1):
        raise ValueError(
            f"has a damaged header, with an alignment of {alignment!s:.40}; download it again"
        )

    infos, end = {}, 0
    for _ in range(tensor_count):
        info = fields.tensor(path)
        problem = None
        if info.name in infos:
            problem = "comes twice"
        elif info.begin != end + -end % alignment:
            problem = "does not begin where the one before it ends"
        if problem:
            raise ValueError(
                f"has a damaged header: tensor {info.name!r:.120} {problem}; download it again"
            )
        infos[info.name] = info
        end = info.begin + _size(info.dtype, info.shape)
        if info.name in shapes:
            infos[info.name] = _reshaped(info, shapes[info.name])
    if not infos and SPLIT_COUNT not in metadata:  # the first part of a split file may hold none
        raise ValueError("holds no tensors")
    start = fields.file.tell()
    start += -start % alignment
    if not start + end <= fields.size <= start + end + -end % alignment:
        problem = "is truncated" if fields.size < start + end else "goes on after its end"
        raise ValueError(
            f"{problem}: {start + end:,} bytes expected, {fields.size:,} found; download it again"
        )
    infos = {name: info._replace(begin=start + info.begin) for name, info in infos.items()}
    return infos, {k: v for k, v in metadata.items() if v is not None}


def _reshaped(info: TensorInfo, shape: tuple[int, ...]) -> TensorInfo:
    """Return the tensor with its original shape; ValueError if the file cannot have this shape."""
    if prod(shape) != prod(info.shape) or min(shape, default=0) < 1:
        raise ValueError(
            f"has a damaged header: tensor {info.name!r:.120} of shape {info.shape} cannot have "
            f"the {ORIGINAL_SHAPE}* {shape!s:.120}; download it again"
        )
    return info._replace(shape=shape)


class _Fields:
    """Read the fields of a header one by one, little-endian; ValueError past the file's end."""

    def __init__(self, file: BinaryIO, size: int):
        self.file, self.size = file, size
        self.strings = 0  # of all arrays so far
        self.last_integers: tuple[int, ...] = ()  # of the last array, if it is a short one

    def take(self, size: int) -> bytes:
        if self.file.tell() + size > (limit := min(self.size, MAX_HEADER)):
            raise ValueError(
                "is truncated or damaged: its header has no end within the first "
                f"{limit:,} bytes; download it again"
            )
        return self.file.read(size)

    def integer(self, code: str) -> int:
        return int(self.number(code))

    def number(self, code: str) -> int | float:
        return struct.unpack(f"<{code}", self.take(struct.calcsize(f"<{code}")))[0]

    def text(self) -> str:
        return self.take(self.integer("Q")).decode(errors="replace")

    def scalar(self, kind: int) -> str | int | float:
        if kind == STRING:
            return self.text()
        if kind not in NUMBERS:
            raise ValueError(
                f"has a damaged header, with a value of type {kind}; download it again"
            )
        return self.number(NUMBERS[kind])

    def value(self) -> str | int | float | None:
        """Read a value; skip an array, such as a language model's vocabulary, and return None."""
        if (kind := self.integer("I")) != ARRAY:
            return self.scalar(kind)
        kind, count = self.integer("I"), self.integer("Q")
        self.last_integers = ()
        if kind in NUMBERS:
            data = self.take(count * struct.calcsize(NUMBERS[kind]))
            if count <= MAX_DIMENSIONS and NUMBERS[kind] in "bBhHiIqQ":
                self.last_integers = struct.unpack(f"<{count}{NUMBERS[kind]}", data)
            return None
        for _ in range(count):
            self.strings += 1
            if self.strings > MAX_STRINGS:
                raise ValueError(
                    f"has a damaged header, with arrays of more than {MAX_STRINGS:,} strings; "
                    "download it again"
                )
            self.scalar(kind)
        return None

    def tensor(self, path: Path) -> TensorInfo:
        """Read a tensor's entry, whose bytes begin so many after the end of the header."""
        name = self.text()
        if (dimensions := self.integer("I")) > 4:
            raise ValueError(
                f"has a damaged header: tensor {name!r:.120} has {dimensions:,} dimensions; "
                "download it again"
            )
        shape = tuple(self.integer("Q") for _ in range(dimensions))[::-1]
        number, begin = self.integer("I"), self.integer("Q")
        if (kind := TYPES.get(number)) is None:
            raise ValueError(
                f"stores {name!r:.120} in ggml's type {number}, which is not supported; get the "
                "model as Q8_0 or Q4_K"
            )
        if 0 in shape or (kind in BLOCKS and (not shape or shape[-1] % BLOCKS[kind].weights)):
            raise ValueError(
                f"has a damaged header: tensor {name!r:.120}, {kind} of shape {shape}, is not made "
                "of whole blocks; download it again"
            )
        return TensorInfo(kind, shape, path, name, begin)
