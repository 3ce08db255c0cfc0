"""Round weights to the formats that other programs read: the layouts of published files.

`quantize.py` rounds to what is best inside this project; here a file's layout decides.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux.weights.quantization import mxfp8, nvfp4
from flux.weights.quantization.fp8 import E4M3_MAX, FP8Linear
from flux.weights.quantization.int8 import GROUP, Int8Linear, hadamard
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.mxfp8 import MXFP8Linear
from flux.weights.quantization.nvfp4 import NVFP4Linear
from flux.weights.quantization.quantize import encode_int8

E2M1_MAX = 6.0
ROWS = 1024  # rounded at a time; a multiple of the 128 rows of a tile


class Published(NamedTuple):
    """A format of files: its class, its encoder, and what a file declares of each layer."""

    make: Callable[[int, int, bool], QuantizedLinear]  # (in_features, out_features, bias)
    encode: Callable[[Tensor, Tensor], dict[str, Tensor]]  # see below
    note: dict
    multiple: int = 1  # in_features must be a multiple of this number


def encode(weight: Tensor, published: Published) -> dict[str, Tensor]:
    """Return the tensors of a layer, for its weight (out, in) of any float dtype."""
    largest = weight.abs().amax().float()
    parts = [published.encode(rows.float(), largest) for rows in weight.split(ROWS)]
    return {
        name: torch.cat([part[name] for part in parts]) if tensor.ndim else tensor
        for name, tensor in parts[0].items()
    }


# Each encoder: rows (n, in), float32, and the largest size in the matrix -> their part of the
# layer's tensors.


def encode_fp8(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """Round to float8_e4m3fn, with one scale, which makes the largest weight 448."""
    scale = largest / E4M3_MAX
    rounded = divide(weight, scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
    return {"weight": rounded, "weight_scale": scale}


def encode_int8_by_row(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    numbers, scale = encode_int8(weight)
    return {"weight": numbers, "weight_scale": scale}


def encode_convrot(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    return encode_int8_by_row(hadamard(weight, GROUP), largest)


def encode_mxfp8(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """Round to float8_e4m3fn, 32 weights by the smallest power of two that keeps them below 448."""
    blocks = weight.unflatten(1, (-1, mxfp8.BLOCK))  # (out, in/32, 32)
    fraction, exponent = torch.frexp(blocks.abs().amax(dim=-1) / E4M3_MAX)  # (out, in/32)
    exponent = torch.where(fraction > 0.5, exponent, exponent - 1).clamp(-127, 127)
    exponent = torch.where(fraction == 0, -127, exponent)
    rounded = torch.ldexp(blocks, -exponent[..., None]).clamp(-E4M3_MAX, E4M3_MAX)
    return {
        "weight": rounded.to(torch.float8_e4m3fn).flatten(1),
        "weight_scale": swizzled((exponent + 127).to(torch.uint8)),
    }


def encode_nvfp4(weight: Tensor, largest: Tensor) -> dict[str, Tensor]:
    """Round to E2M1, 16 weights by a float8 scale that makes the largest of them 6.

    The scale of the matrix makes the largest scale of a block 448. Ties go to the even code.
    """
    scale_2 = largest / (E4M3_MAX * E2M1_MAX)
    blocks = weight.unflatten(1, (-1, nvfp4.BLOCK))  # (out, in/16, 16)
    scale = divide(blocks.abs().amax(dim=-1) / E2M1_MAX, scale_2).to(torch.float8_e4m3fn)
    values = divide(blocks, (scale.float() * scale_2)[..., None])
    codes = e2m1_codes(values).flatten(1)
    return {
        "weight": codes[:, ::2] << 4 | codes[:, 1::2],
        "weight_scale": swizzled(scale.view(torch.uint8)).view(torch.float8_e4m3fn),
        "weight_scale_2": scale_2,
    }


def e2m1_codes(values: Tensor) -> Tensor:
    """Return the 4 bits of the nearest E2M1: they are 0.5 apart below 2, 1 below 4, and 2 above."""
    size = values.abs().clamp(max=E2M1_MAX)
    octave = (size >= 2).to(torch.uint8) + (size >= 4)
    step = torch.ldexp(torch.full_like(size, 0.5), octave)
    return (size / step).round().to(torch.uint8) + 2 * octave + 8 * (values < 0).to(torch.uint8)


def swizzled(scale: Tensor) -> Tensor:
    """Put (out, blocks) bytes into cuBLAS's order, in zero-padded tiles: undo `unswizzled`."""
    rows, blocks = scale.shape
    padded = F.pad(scale, (0, -blocks % 4, 0, -rows % 128))
    tiles = "(a row4 row32) (b column4) -> (a b row32 row4 column4)"
    return rearrange(padded, tiles, row4=4, row32=32, column4=4).view(padded.shape)


def divide(weight: Tensor, scale: Tensor) -> Tensor:
    return weight / torch.where(scale == 0, 1, scale)  # 0 where all weights of a scale are 0


INT8 = Published(Int8Linear, encode_int8_by_row, {"format": "int8_tensorwise", "per_row": True})
PUBLISHED = {
    "fp8": Published(FP8Linear, encode_fp8, {"format": "float8_e4m3fn"}),
    "int8": INT8,
    "int8-convrot": Published(
        partial(Int8Linear, group=GROUP),
        encode_convrot,
        INT8.note | {"convrot": True, "convrot_groupsize": GROUP},
        multiple=GROUP,
    ),
    "nvfp4": Published(
        partial(NVFP4Linear, swizzled=True, input_scale=False),
        encode_nvfp4,
        {"format": "nvfp4"},
        multiple=nvfp4.BLOCK,
    ),
    "mxfp8": Published(MXFP8Linear, encode_mxfp8, {"format": "mxfp8"}, multiple=mxfp8.BLOCK),
}


def published_format(format: str, in_features: int) -> Published | None:
    """Return how to write a layer; None if the format cannot hold it.

    ConvRot needs groups of 256: other layers become plain INT8, as other programs write them.
    """
    choice = PUBLISHED[format]
    if in_features % choice.multiple == 0:
        return choice
    return INT8 if format == "int8-convrot" else None
