"""MXFP8: float8 with a power of two as the scale of 32 weights (OCP MX 1.0, section 5.2).

A file has, for a layer L:

    L.weight         F8_E4M3          (out, in)
    L.weight_scale   U8 or F8_E8M0    (out, in/32)   of each block of 32 along a row
    L.comfy_quant    U8               JSON: {"format": "mxfp8"}

Scales lie in cuBLAS's order, in tiles of 128 rows and 4 blocks, padded to full tiles.
Files that declare nothing are refused: their scales may as well lie in rows.
"""

import torch
from torch import Tensor

from flux.errors import UserError
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.nvfp4 import unswizzled

BLOCK = 32


class MXFP8Linear(QuantizedLinear):
    """A float8 weight with scales of blocks: 1.03 bytes each.

    weight = value * 2^(byte - 127), where the byte of its block is an E8M0; 255 is NaN.
    UserError unless in_features is a multiple of 32.
    """

    weight_scale: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scale_dtype: torch.dtype = torch.uint8,
    ):
        super().__init__(in_features, out_features, bias)
        if in_features % BLOCK:
            raise UserError(
                f"a layer of {in_features} inputs cannot be MXFP8, which has blocks of {BLOCK} "
                "along a row."
            )
        rows, blocks = -(-out_features // 128) * 128, -(-in_features // BLOCK // 4) * 4
        self.hold("weight", (out_features, in_features), torch.float8_e4m3fn)
        self.hold("weight_scale", (rows, blocks), scale_dtype)

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        bytes = unswizzled(self.weight_scale.view(torch.uint8))
        scale = bytes[: self.out_features, : self.in_features // BLOCK].contiguous()
        scale = scale.view(torch.float8_e8m0fnu).float()  # (out, in/32)
        blocks = self.weight.to(dtype).unflatten(1, (-1, BLOCK))  # (out, in/32, 32)
        return blocks.mul_(scale[..., None]).flatten(1)
