"""`--quantize fp8|int8|int4`: the large Linears of a network made small when it is loaded, each weight rounded to nearest.

Plain PyTorch, because rounding a matrix is three lines, and torchao's tensor subclasses would put a second system of modules,
names and versions between the reader and the weights. Nothing is calibrated: the same weights give the same result, always.
"""

from collections.abc import Callable, Set
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.errors import UserError
from flux.weights.quantization.fp8 import LARGEST, FP8Linear
from flux.weights.quantization.linear import QuantizedLinear
from flux.weights.quantization.nf4 import lookup

# What stays as it is in a transformer, a part of a path each: what comes in and goes out, and what time and guidance do to
# every token. Black Forest Labs' own FP8 files keep the same. Embeddings and norms are no Linears, in no network.
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
    }
)
SMALL = 2**14  # a weight of fewer numbers stays too: there is nothing to gain
ROWS = 1024  # that are rounded at a time, which bounds what is held in float32 meanwhile
GROUP = 32  # numbers that share a scale in int4


def quantize_(
    module: nn.Module,
    kind: str,
    keep: Set[str] = SKIPPED,
    device: torch.device | str | None = None,
    change: Callable[..., None] | None = None,
) -> None:
    """Replace the large Linears of `module`, except below the names in `keep`, by ones of a kind of `SCHEMES`, on `device`.

    One after the other, the old one let go: never two copies of the whole. So a mapped file is read once, and a model that fits
    a device only when it is small gets there; what is not replaced stays where it is. On the meta device, only shapes change.
    `change`, which merges LoRAs, is done first; it calls its `each` with the path of a layer when that is as it shall be.
    UserError for another kind, and for weights that were quantised before.
    """
    if kind not in SCHEMES:
        raise UserError(f"--quantize {kind!s:.40} is unknown; choose from {', '.join(SCHEMES)}.")
    if before := next(
        (layer for layer in module.modules() if isinstance(layer, QuantizedLinear)), None
    ):
        raise UserError(
            f"the weights are quantised already ({type(before).__name__}): leave --quantize {kind} out."
        )
    paths = large_linears(module, keep)

    def shrink(path: str) -> None:
        if path in paths:
            paths.remove(path)
            module.set_submodule(path, quantize_linear(module.get_submodule(path), kind, device))

    if change:
        change(module, each=shrink)
    for path in list(paths):
        shrink(path)


def large_linears(module: nn.Module, keep: Set[str] = SKIPPED) -> list[str]:
    """The paths of the Linears that `quantize_` replaces."""
    linears = [
        (path, layer) for path, layer in module.named_modules() if isinstance(layer, nn.Linear)
    ]
    return [
        path
        for path, layer in linears
        if layer.weight.numel() >= SMALL and keep.isdisjoint(path.split("."))
    ]


@torch.no_grad()
def quantize_linear(
    linear: nn.Linear, kind: str, device: torch.device | str | None = None
) -> QuantizedLinear:
    """One Linear of a kind, frozen. The bias is kept."""
    make, encode = SCHEMES[kind]
    device = torch.device(device or linear.weight.device)
    with torch.device("meta"):
        small = make(linear.in_features, linear.out_features, linear.bias is not None)
    if linear.bias is not None:
        small.bias = nn.Parameter(linear.bias.to(device), requires_grad=False)
    if device.type != "meta":
        pieces = [encode(rows.to(device, torch.float32)) for rows in linear.weight.split(ROWS)]
        small.weight, small.weight_scale = map(torch.cat, zip(*pieces, strict=True))
    return small.train(linear.training)


@torch.no_grad()
def dequantized(layer: QuantizedLinear, dtype: torch.dtype) -> nn.Linear:
    """The Linear that computes the same, its weight rounded to `dtype`: what a LoRA can be merged into. Of any format."""
    return layer.to_linear(layer.dequantize().to(dtype))


# ---------------------------------------------------------------------------------------------------------- kinds


class Kind(NamedTuple):
    make: Callable[[int, int, bool], QuantizedLinear]  # (in_features, out_features, bias)
    encode: Callable[
        [Tensor], tuple[Tensor, Tensor]
    ]  # rows (n, in), float32 -> their part of `weight` and of `weight_scale`


def encode_fp8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """1 byte a weight, and 4 a row: float8_e4m3fn, the largest of each row 448. The error is at most 1/16 of a weight."""
    scale = weight.abs().amax(dim=1, keepdim=True) / LARGEST  # (n, 1)
    return _divided(weight, scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def encode_int8(weight: Tensor) -> tuple[Tensor, Tensor]:
    """1 byte a weight, and 4 a row: -127 to 127. The error is at most half the row's scale, which is its largest over 127."""
    scale = weight.abs().amax(dim=1, keepdim=True) / 127  # (n, 1)
    return _divided(weight, scale).round().clamp(-127, 127).to(torch.int8), scale


def encode_int4(weight: Tensor) -> tuple[Tensor, Tensor]:
    """0.5625 bytes a weight: -8 to 7, two a byte, the first in the high half; a bfloat16 scale for 32. Rows are padded to that.

    The largest of a group, whatever its sign, becomes -8, as in GGUF's Q4_0: 8.6 % error on normal numbers. From -7 to 7 it
    would be 9.7 %; with a minimum beside the scale, for 64, which takes as many bytes, 9.0 %.
    """
    groups = F.pad(weight, (0, -weight.shape[1] % GROUP)).unflatten(
        1, (-1, GROUP)
    )  # (n, groups, 32)
    largest = groups.gather(-1, groups.abs().argmax(dim=-1, keepdim=True))  # (n, groups, 1)
    scale = (largest / -8).bfloat16()  # rounded first, since this is what will be multiplied
    codes = (_divided(groups, scale.float()).round().clamp(-8, 7) + 8).to(torch.uint8).flatten(1)
    return codes[:, ::2] << 4 | codes[:, 1::2], scale.squeeze(-1)


def _divided(weight: Tensor, scale: Tensor) -> Tensor:
    return weight / torch.where(scale == 0, 1, scale)  # 0 where all that share it are 0


def fp8_by_rows(in_features: int, out_features: int, bias: bool) -> FP8Linear:
    return FP8Linear(in_features, out_features, bias, scale=(out_features, 1))


class Int8Linear(QuantizedLinear):
    """What `encode_int8` makes."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=torch.int8))
        self.register_buffer("weight_scale", torch.empty(out_features, 1))

    def dequantize(self) -> Tensor:
        return self.weight.float() * self.weight_scale


class Int4Linear(QuantizedLinear):
    """What `encode_int4` makes."""

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        groups = -(-in_features // GROUP)
        self.register_buffer(
            "weight", torch.empty(out_features, groups * GROUP // 2, dtype=torch.uint8)
        )
        self.register_buffer(
            "weight_scale", torch.empty(out_features, groups, dtype=torch.bfloat16)
        )

    def dequantize(self) -> Tensor:
        values = lookup(self.weight, torch.arange(-8.0, 8.0, device=self.weight.device)).unflatten(
            1, (-1, GROUP)
        )
        return values.mul_(self.weight_scale.float()[..., None]).flatten(1)[:, : self.in_features]


SCHEMES = {
    "fp8": Kind(fp8_by_rows, encode_fp8),
    "int8": Kind(Int8Linear, encode_int8),
    "int4": Kind(Int4Linear, encode_int4),
}
