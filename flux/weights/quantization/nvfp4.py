"""NVFP4: 4-bit floats, in blocks of 16 along a row, each with a float8 scale, and one float32 scale for all of them.

weight = number · (weight_scale of its block · weight_scale_2). A file has, for a layer L of (out, in) weights:

    L.weight            U8       (out, in/2)     two numbers a byte
    L.weight_scale      F8_E4M3  (out, in/16)    of a block
    L.weight_scale_2    F32      ()              of the whole weight
    L.input_scale       F32      ()              of what is multiplied with it, where hardware computes in 4 bits; may be absent

There are two layouts. Black Forest Labs' files and ComfyUI's are `swizzled`: the even column is in a byte's high half, and the
scales lie as cuBLAS reads them, in tiles of 128 rows and 4 blocks, padded to whole tiles. NVIDIA's ModelOpt and diffusers
have the even column in the low half and the scales in rows. Both use the same names, and for most sizes the same shapes: only
metadata (`_quantization_metadata`, `.comfy_quant`), which the first have and the others lack, tells them apart.
"""

import torch
from einops import rearrange
from torch import Tensor

from flux.errors import UserError
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.nf4 import lookup

BLOCK = 16


class NVFP4Linear(QuantizedLinear):
    """0.5625 bytes a weight. UserError unless in_features is a multiple of 16."""

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
                f"a layer of {in_features} inputs cannot be NVFP4, which has blocks of {BLOCK} along a row."
            )
        self.swizzled = swizzled
        rows, blocks = out_features, in_features // BLOCK
        if swizzled:
            rows, blocks = -(-rows // 128) * 128, -(-blocks // 4) * 4
        self.register_buffer(
            "weight", torch.empty(out_features, in_features // 2, dtype=torch.uint8)
        )
        self.register_buffer("weight_scale", torch.empty(rows, blocks, dtype=torch.float8_e4m3fn))
        self.register_buffer("weight_scale_2", torch.empty(()))
        self.register_buffer("input_scale", torch.empty(()) if input_scale else None)

    def dequantize(self) -> Tensor:
        scale = self.weight_scale.float()
        if self.swizzled:
            scale = unswizzled(scale)[: self.out_features, : self.in_features // BLOCK]
        scale = scale * self.weight_scale_2  # (out, in/16)
        values = lookup(
            self.weight, e2m1(self.weight.device), high_first=self.swizzled
        )  # (out, in)
        return (
            values.unflatten(1, (-1, BLOCK)).mul_(scale[..., None]).flatten(1)
        )  # in place, since nothing else is as large


def unswizzled(scale: Tensor) -> Tensor:
    """(128·a, 4·b) scales, from the order in which cuBLAS reads them ("1D Block Scaling Factors Layout") to that of the blocks.

    A tile is 32 lines of 16: line i has four scales each of rows i, i + 32, i + 64, i + 96.
    """
    tiles = "(a b row32 row4 column4) -> (a row4 row32) (b column4)"
    return rearrange(scale.flatten(), tiles, b=scale.shape[1] // 4, row32=32, row4=4, column4=4)


def e2m1(device: torch.device) -> Tensor:
    """The values of the 16 4-bit floats, of a sign, two bits of exponent and one of mantissa (OCP MX 1.0, 5.3.3).

    They are 0, 0.5, 1, 1.5, 2, 3, 4, 6 and the negatives; computed, since a table would be copied to the device at every use.
    """
    bits = torch.arange(8, device=device)
    quarters = torch.where(bits < 2, 2 * bits, (2 + bits % 2) << (bits // 2)).float()
    return torch.cat([quarters, -quarters]) / 4
