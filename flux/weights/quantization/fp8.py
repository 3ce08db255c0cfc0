"""Weights in float8, with a scale for the whole, for each row or for none of it, or for each block of 128x128.

A file has, for a layer L:

    L.weight            F8_E4M3 (out, in), sometimes F8_E5M2
    L.weight_scale      F32 () in the files of Black Forest Labs and of ComfyUI, (out,) in those of diffusers; absent from files
                        that were merely cast
    L.input_scale       F32 (): what to divide activations by before they are rounded to float8; only `enable_fp8_matmul` reads it
    L.weight_scale_inv  F32 or BF16 (out/128, in/128), rounded up: in Hugging Face's files
"""

import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.weights.quantization.linear import QuantizedLinear

LARGEST = 448.0  # of float8_e4m3fn


class FP8Linear(QuantizedLinear):
    """One byte a weight. `scale` and `input_scale` are the shapes of these tensors, None where there is none."""

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale: tuple[int, ...] | None = (),
        input_scale: tuple[int, ...] | None = None,
        full_precision: bool = False,
    ):
        super().__init__(in_features, out_features, bias)
        self.full_precision = (
            full_precision  # whoever made the file does not want activations in float8 here
        )
        self.fp8_matmul = False  # set by `enable_fp8_matmul`
        self.register_buffer("weight", torch.empty(out_features, in_features, dtype=dtype))
        self.register_buffer("weight_scale", None if scale is None else torch.empty(scale))
        self.register_buffer(
            "input_scale", None if input_scale is None else torch.empty(input_scale)
        )

    def dequantize(self) -> Tensor:
        weight = self.weight.float()  # a copy, which may be changed
        return (
            weight
            if self.weight_scale is None
            else weight.mul_(self.weight_scale.float().reshape(-1, 1))
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.scaled_mm(x) if self.fp8_matmul else super().forward(x)

    def scaled_mm(self, x: Tensor) -> Tensor:
        """As `forward`, with the activations in float8 too, so that the hardware's float8 matrix product can be used.

        They are divided by the `input_scale` or, where there is none, each token by its largest value over 448. The product is
        summed in float32, multiplied by both scales, and rounded once.
        """
        rows = x.reshape(-1, self.in_features).float()  # (n, in)
        if self.input_scale is None:
            scale = rows.abs().amax(dim=1, keepdim=True).clamp(min=1e-12) / LARGEST  # (n, 1)
        else:
            scale = self.input_scale.float().reshape(1, 1)
        quantised = (rows / scale).clamp_(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
        weight_scale = (
            scale.new_ones(1, 1)
            if self.weight_scale is None
            else self.weight_scale.float().reshape(1, -1)
        )
        if (
            scale.numel() > 1 or weight_scale.numel() > 1
        ):  # scales go by rows on both sides, or on neither
            scale = scale.expand(len(rows), 1).contiguous()
            weight_scale = weight_scale.expand(1, self.out_features).contiguous()
        if (
            scale.numel() > 1 and x.is_cpu and torch.__version__ < "2.13"
        ):  # whose CPU kernel knows one scale for all alone
            y = F.linear(quantised.float(), self.weight.float()) * scale * weight_scale
            y = (y if self.bias is None else y + self.bias.float()).to(x.dtype)  # (n, out)
        else:
            y = torch._scaled_mm(
                quantised, self.weight.t(), scale, weight_scale, self.bias, out_dtype=x.dtype
            )  # (n, out)
        return y.reshape(*x.shape[:-1], self.out_features)


class BlockFP8Linear(QuantizedLinear):
    """One byte a weight, and a scale for each block of 128x128; the last row and column of blocks may be cut short.

    In spite of its name, `weight_scale_inv` is what the weights are multiplied by.
    """

    BLOCK = 128

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        self.register_buffer(
            "weight", torch.empty(out_features, in_features, dtype=torch.float8_e4m3fn)
        )
        self.register_buffer(
            "weight_scale_inv",
            torch.empty(-(-out_features // self.BLOCK), -(-in_features // self.BLOCK)),
        )

    def dequantize(self) -> Tensor:
        rows = self.weight_scale_inv.float().repeat_interleave(self.BLOCK, dim=0)[
            : self.out_features
        ]
        return self.weight.float().mul_(
            rows.repeat_interleave(self.BLOCK, dim=1)[:, : self.in_features]
        )


def enable_fp8_matmul(module: nn.Module, device: torch.device | None = None) -> list[str]:
    """Have the FP8Linears of a loaded module multiply in float8; the paths of those quantised layers that cannot are returned,
    and a warning says why.

    It is faster, and lossy: activations are rounded to 3 bits of mantissa. Needs CUDA of capability 8.9 (Ada, Hopper) or above
    and bfloat16; elsewhere a warning says so, once, and nothing changes. (On the CPU it works, for tests, and gains nothing.)
    `device`: where it will compute, if that is not where the weights are now.
    """
    layers = {
        path: layer for path, layer in module.named_modules() if isinstance(layer, QuantizedLinear)
    }
    if layers and (lack := _lack(device or next(iter(layers.values())).weight.device, module)):
        warnings.warn(
            f"float8 matrix products need {lack}: weights are made whole instead", stacklevel=2
        )
        return list(layers)
    obstacles = {path: found for path, layer in layers.items() if (found := _obstacle(layer))}
    for path in layers.keys() - obstacles.keys():
        layer = layers[path]
        layer.fp8_matmul = True
        if layer.input_scale is not None and layer.input_scale == 1:
            layer.input_scale = None  # ComfyUI writes 1 where nothing was measured
    if obstacles:
        reasons = ", ".join(
            f"{count} {obstacle}" for obstacle, count in Counter(obstacles.values()).items()
        )
        warnings.warn(
            f"{len(obstacles)} of the {len(layers)} quantised layers of {type(module).__name__} are made whole, not "
            f"multiplied in float8: {reasons}",
            stacklevel=2,
        )
    return list(obstacles)


def _obstacle(layer: QuantizedLinear) -> str | None:
    """Why a layer cannot multiply in float8, if so."""
    if not isinstance(layer, FP8Linear):
        return "with scales of blocks" if isinstance(layer, BlockFP8Linear) else "in another format"
    if layer.weight.dtype != torch.float8_e4m3fn:
        return f"in {str(layer.weight.dtype).removeprefix('torch.')}"
    if layer.in_features % 16 or layer.out_features % 16:  # as the hardware's kernels ask
        return "with a side that is no multiple of 16"
    return "whose file asks for whole activations" if layer.full_precision else None


def _lack(device: torch.device, module: nn.Module) -> str | None:
    """What is missing for float8 matrix products, if anything is."""
    if device.type == "cpu":
        return None
    if (
        device.type != "cuda"
        or torch.version.hip
        or torch.cuda.get_device_capability(device) < (8, 9)
    ):
        return f"an NVIDIA GPU of compute capability 8.9 or above, which {device} is not"
    dtype = next((parameter.dtype for parameter in module.parameters()), torch.bfloat16)
    return None if dtype == torch.bfloat16 else f"bfloat16, not {dtype}"
