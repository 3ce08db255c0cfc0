"""Quantize the large Linears of a network to fp8, int8 or int4 when it is loaded.

Each weight is rounded to the nearest number; nothing is calibrated, so the same weights always
give the same result. The code is plain PyTorch: rounding a matrix takes three lines, and torchao's
tensor subclasses would be a second system of modules and names.
"""

from collections.abc import Callable, Set
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.errors import UserError
from flux.weights.quantization.fp8 import E4M3_MAX, FP8Linear
from flux.weights.quantization.int8 import Int8Linear
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.nf4 import lookup

# Parts of paths in a transformer that stay as they are: inputs, outputs, time, guidance and
# modulation, which act on every token. Black Forest Labs' FP8 files keep the same layers.
SKIPPED = frozenset(
    {
        "img_in",
        "txt_in",
        "time_in",
        "guidance_in",
        "vector_in",
        "final_layer",
        "img_mod",
        "txt_mod",
        "modulation",  # FLUX.1
        "double_stream_modulation_img",
        "double_stream_modulation_txt",
        "single_stream_modulation",  # FLUX.2
        "ref_time_in",
        "emb_in",
        "early_stream_modulations",
        "single_stream_modulations",  # FLUX 3
    }
)
SMALL = 2**14  # a Linear with fewer weights is skipped too: it saves nothing
ROWS = 1024  # rounded at a time, which bounds the memory for float32 copies
GROUP = 32  # weights that share a scale in int4


def quantize_(
    module: nn.Module,
    scheme: str,
    skip: Set[str] = SKIPPED,
    device: torch.device | str | None = None,
    transform: Callable[..., None] | None = None,
) -> None:
    """Replace the large Linears of `module` by those of a scheme in `SCHEMES`, on `device`.

    Layers are replaced one by one, and each old one is freed: there are never two copies of the
    module. So a mapped file is read once, and the device holds only what is quantized; all else
    stays where it is. On the meta device only shapes change.

    skip: parts of paths whose Linears stay.
    transform: merges LoRAs; called first, as transform(module, each=function). It calls each(path)
        after it has changed a layer, so that the layer is quantized at once.

    UserError for an unknown scheme, and for a module that has quantized layers already.
    """
    if scheme not in SCHEMES:
        raise UserError(
            f"quantize: unknown scheme (got {scheme!s:.40}). Choose from {', '.join(SCHEMES)}."
        )
    for layer in module.modules():
        if isinstance(layer, QuantizedLinear):
            raise UserError(
                f"quantize: the weights are quantized already ({type(layer).__name__}). "
                f'Leave `quantize="{scheme}"` out.'
            )
    paths = large_linears(module, skip)

    def replace(path: str) -> None:
        if path in paths:
            paths.remove(path)
            linear = module.get_submodule(path)
            assert isinstance(linear, nn.Linear)
            module.set_submodule(path, quantize_linear(linear, scheme, device))

    if transform:
        transform(module, each=replace)
    for path in list(paths):
        replace(path)


def large_linears(module: nn.Module, skip: Set[str] = SKIPPED) -> list[str]:
    """Return the paths of the Linears that `quantize_` replaces."""
    return [
        path
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
        and layer.weight.numel() >= SMALL
        and skip.isdisjoint(path.split("."))
    ]


@torch.no_grad()
def quantize_linear(
    linear: nn.Linear, scheme: str, device: torch.device | str | None = None
) -> QuantizedLinear:
    """Return one Linear, quantized and frozen. The bias is kept."""
    make, encode = SCHEMES[scheme]
    device = torch.device(device or linear.weight.device)
    with torch.device("meta"):
        quantized = make(linear.in_features, linear.out_features, linear.bias is not None)
    if linear.bias is not None:
        quantized.bias = nn.Parameter(linear.bias.to(device), requires_grad=False)
    if device.type != "meta":
        weights, scales = [], []
        for rows in linear.weight.split(ROWS):
            weight, scale = encode(rows.to(device, torch.float32))
            weights.append(weight)
            scales.append(scale)
        quantized.weight, quantized.weight_scale = torch.cat(weights), torch.cat(scales)
    return quantized.train(linear.training)


@torch.no_grad()
def dequantized(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """Return the Linear that computes the same, its weight rounded to `dtype`.

    A LoRA can be merged into that Linear. The layer may be of any format.
    """
    return layer.to_linear(layer.dequantize().to(dtype))


# ---------------------------------------------------------------- schemes
# Each encoder: rows (n, in), float32 -> their part of `weight` and of `weight_scale`.


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to float8_e4m3fn, with a scale that makes the largest of each row 448.

    1 byte a weight, and 4 a row. The error is at most 1/16 of a weight.
    """
    scale = weight.abs().amax(dim=1, keepdim=True) / E4M3_MAX  # (n, 1)
    rounded = _divide(weight, scale).clamp(-E4M3_MAX, E4M3_MAX)
    return rounded.to(torch.float8_e4m3fn), scale


def encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to -127 ... 127, with a scale that makes the largest of each row 127.

    1 byte a weight, and 4 a row. The error is at most half the row's scale.
    """
    scale = weight.abs().amax(dim=1, keepdim=True) / 127  # (n, 1)
    return _divide(weight, scale).round().clamp(-127, 127).to(torch.int8), scale


def encode_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Round to -8 ... 7, two a byte, the first in the high half; a bfloat16 scale for 32 weights.

    0.5625 bytes a weight. Rows are padded to a multiple of 32. The largest of a group, whatever its
    sign, becomes -8, as in GGUF's Q4_0: 8.6 % error on normal numbers. From -7 to 7 the error is
    9.7 %; with a minimum next to the scale, for 64 weights and as many bytes, 9.0 %.
    """
    padded = F.pad(weight, (0, -weight.shape[1] % GROUP))
    groups = padded.unflatten(1, (-1, GROUP))  # (n, groups, 32)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))  # (n, groups, 1)
    scale = (largest / -8).bfloat16()  # rounded first, because the rounded scale multiplies
    numbers = _divide(groups, scale.float()).round().clamp(-8, 7) + 8
    numbers = numbers.to(torch.uint8).flatten(1)  # (n, groups * 32)
    return numbers[:, ::2] << 4 | numbers[:, 1::2], scale.squeeze(-1)


def _divide(weight: Tensor, scale: Tensor) -> Tensor:
    return weight / torch.where(scale == 0, 1, scale)  # 0 where all weights of a scale are 0


def fp8_by_row(in_features: int, out_features: int, bias: bool) -> FP8Linear:
    return FP8Linear(in_features, out_features, bias, scale=(out_features, 1))


class Int4Linear(QuantizedLinear):
    """The weight that `encode_int4` makes: weight = (number - 8) * weight_scale of its group."""

    weight_scale: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        groups = -(-in_features // GROUP)
        self.hold("weight", (out_features, groups * GROUP // 2), torch.uint8)
        self.hold("weight_scale", (out_features, groups), torch.bfloat16)

    def dequantize(self) -> Tensor:
        values = lookup(self.weight, torch.arange(-8.0, 8.0, device=self.weight.device))
        groups = values.unflatten(1, (-1, GROUP))  # (out, groups, 32)
        return groups.mul_(self.weight_scale.float()[..., None]).flatten(1)[:, : self.in_features]


class Scheme(NamedTuple):
    make: Callable[[int, int, bool], QuantizedLinear]  # (in_features, out_features, bias)
    encode: Callable[[Tensor], tuple[Tensor, Tensor]]


SCHEMES = {
    "fp8": Scheme(fp8_by_row, encode_fp8),
    "int8": Scheme(Int8Linear, encode_int8),
    "int4": Scheme(Int4Linear, encode_int4),
}
