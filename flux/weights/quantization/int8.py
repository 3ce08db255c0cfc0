"""INT8: whole numbers from -128 to 127, with one scale for the matrix or for each row.

A file has, for a layer L:

    L.weight         I8   (out, in)
    L.weight_scale   F32  () or (out, 1)
    L.comfy_quant    U8   JSON: {"format": "int8_tensorwise"}, for ConvRot also
                          {"convrot": true, "convrot_groupsize": 256}

ComfyUI writes the JSON for scales of either shape; other programs write none.
ConvRot (arXiv:2512.03673) turns the weights before they are rounded: each run of `group` weights
of a row is multiplied by a regular Hadamard matrix, which spreads outliers over the run.
"""

import torch
from torch import Tensor

from flux.weights.quantization.linear import QuantizedLinear

GROUP = 256  # of ConvRot where the JSON names none
ROWS = 1024  # turned at a time


class Int8Linear(QuantizedLinear):
    """A weight of whole numbers: weight = number * weight_scale, turned back if `group` is given.

    The activations stay in the dtype of the input (W8A16).
    `group` must be a power of 4 that divides in_features.
    """

    few_scales = ("weight_scale",)
    weight_scale: Tensor
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scale: tuple[int, ...] | None = None,  # the shape of weight_scale; None: (out, 1)
        group: int | None = None,  # of ConvRot
        input_scale: tuple[int, ...] | None = None,  # of a tensor that is not used
    ):
        super().__init__(in_features, out_features, bias)
        self.group = group
        self.hold("weight", (out_features, in_features), torch.int8)
        self.hold("weight_scale", (out_features, 1) if scale is None else scale)
        self.hold("input_scale", input_scale)

    def dequantize(self) -> Tensor:
        weight = self.weight.float()
        if self.group:  # before the scale, because sums of whole numbers are exact
            for rows in weight.split(ROWS):  # in place: nothing else is as large
                rows.copy_(hadamard(rows, self.group))
        return weight.mul_(self.weight_scale.float().reshape(-1, 1))


def hadamard(weight: Tensor, group: int) -> Tensor:
    """Multiply each run of `group` numbers of a row by the regular Hadamard matrix: (out, in).

    The matrix is a Kronecker power of H4 / 2, its own transpose and its own inverse. The rows of
    H4 are 1 1 1 -1, 1 1 -1 1, 1 -1 1 1 and -1 1 1 1, so that H4 x = sum(x) - 2 reverse(x).
    """
    steps = hadamard_steps(group)
    assert steps
    runs = weight.reshape(len(weight), -1, *[4] * steps)
    for axis in range(2, 2 + steps):
        runs = runs.sum(axis, keepdim=True) - 2 * runs.flip(axis)
    return runs.reshape(weight.shape) / 2**steps


def hadamard_steps(group: int) -> int | None:
    """Return the power of 4 that `group` is; None if it is none, or no whole number from 4 on."""
    if type(group) is not int or group < 4 or group.bit_count() != 1:
        return None
    steps, odd = divmod(group.bit_length() - 1, 2)
    return None if odd else steps
