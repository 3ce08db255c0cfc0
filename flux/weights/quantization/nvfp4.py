"""NVFP4: 4-bit floats with a float8 scale for 16 weights, and one float32 scale for the matrix.

A file has, for a layer L:

    L.weight            U8       (out, in/2)     two numbers a byte
    L.weight_scale      F8_E4M3  (out, in/16)    of each block of 16 along a row
    L.weight_scale_2    F32      ()              of the matrix
    L.input_scale       F32      ()              of activations, if hardware multiplies in 4
                                                 bits; may be absent

There are two layouts under the same names and, for most sizes, of the same shapes.
Files of Black Forest Labs and ComfyUI are `swizzled`: the even column is in a byte's high half,
and scales lie in cuBLAS's order, in tiles of 128 rows and 4 blocks, padded to full tiles.
NVIDIA's ModelOpt and diffusers put the even column in the low half, and scales in rows.
Only metadata tells them apart: the first have `_quantization_metadata` or `.comfy_quant`.
"""

import torch
from einops import rearrange
from torch import Tensor

from flux.errors import UserError
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.nf4 import lookup

BLOCK = 16


class NVFP4Linear(QuantizedLinear):
    """A weight of 4-bit floats: 0.5625 bytes each.

    Each number is an E2M1: sign, 2 bits of exponent, 1 of mantissa (OCP MX 1.0, section 5.3.3).
    weight = number * (weight_scale of its block * weight_scale_2).
    cuBLAS's manual specifies the order of swizzled scales ("1D Block Scaling Factors Layout").
    UserError unless in_features is a multiple of 16.
    """

    few_scales = ("weight_scale_2",)
    weight_scale: Tensor
    weight_scale_2: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        swizzled: bool,
        input_scale: bool = True,
    ):
        super().__init__(in_features, out_features, bias)
        if in_features % BLOCK:
            raise UserError(
                f"a layer of {in_features} inputs cannot be NVFP4, which has blocks of {BLOCK} "
                "along a row."
            )
        self.swizzled = swizzled
        rows, blocks = out_features, in_features // BLOCK
        if swizzled:
            rows, blocks = -(-rows // 128) * 128, -(-blocks // 4) * 4
        self.hold("weight", (out_features, in_features // 2), torch.uint8)
        self.hold("weight_scale", (rows, blocks), torch.float8_e4m3fn)
        self.hold("weight_scale_2", ())
        self.hold("input_scale", () if input_scale else None)

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        scale = self.weight_scale.float()
        if self.swizzled:
            scale = unswizzled(scale)[: self.out_features, : self.in_features // BLOCK]
        scale = scale * self.weight_scale_2  # (out, in/16)
        numbers = e2m1(self.weight.device).to(dtype)
        values = lookup(self.weight, numbers, high_first=self.swizzled)
        blocks = values.unflatten(1, (-1, BLOCK))  # (out, in/16, 16)
        return blocks.mul_(scale[..., None]).flatten(1)  # in place: nothing else is as large


def unswizzled(scale: Tensor) -> Tensor:
    """Put (128·a, 4·b) scales from cuBLAS's order into the order of the blocks.

    A tile is 32 lines of 16: line i has four scales each of rows i, i + 32, i + 64, i + 96.
    """
    tiles = "(a b row32 row4 column4) -> (a row4 row32) (b column4)"
    return rearrange(scale.flatten(), tiles, b=scale.shape[1] // 4, row32=32, row4=4, column4=4)


def e2m1(device: torch.device) -> Tensor:
    """Return the 16 values of an E2M1: 0, 0.5, 1, 1.5, 2, 3, 4, 6, and their negatives.

    They are computed, because each use would copy a table to the device.
    """
    bits = torch.arange(8, device=device)
    quarters = torch.where(bits < 2, 2 * bits, (2 + bits % 2) << (bits // 2)).float()
    return torch.cat([quarters, -quarters]) / 4
