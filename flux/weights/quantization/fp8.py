"""FP8: one byte a weight, with one scale for the matrix, for each row, for each block, or none.

Both float8 types are specified by "OCP 8-bit Floating Point Specification (OFP8)". A file has, for
a layer L:

    L.weight            F8_E4M3 (out, in), sometimes F8_E5M2
    L.weight_scale      F32 () in files of Black Forest Labs and ComfyUI, (out,) in diffusers';
                        absent after a plain cast
    L.input_scale       F32 (): divides the activations before they are rounded to float8; only
                        `enable_fp8_matmul` reads it
    L.weight_scale_inv  F32 or BF16 (ceil(out/128), ceil(in/128)): Hugging Face's fine-grained FP8
"""

import math
import warnings
from collections import Counter

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.weights.quantization.linear import QuantizedLinear

E4M3_MAX = 448.0  # of float8_e4m3fn


class FP8Linear(QuantizedLinear):
    """A float8 weight, and its scale: of the matrix, of each row, or none.

    Each weight is one byte: float8_e4m3fn (4 bits of exponent, 3 of mantissa) or float8_e5m2.
    weight = value * weight_scale. Without a scale, the value is the weight.
    Black Forest Labs, ComfyUI and diffusers write such files; their README and loaders say how.
    """

    few_scales = ("weight_scale",)
    weight_scale: Tensor | None
    input_scale: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        dtype: torch.dtype = torch.float8_e4m3fn,
        scale: tuple[int, ...] | None = (),  # the shape of weight_scale; None: there is none
        input_scale: tuple[int, ...] | None = None,  # the shape of input_scale
        full_precision: bool = False,
    ):
        super().__init__(in_features, out_features, bias)
        self.full_precision = full_precision  # the file asks not to round activations to float8
        self.fp8_matmul = False  # set by `enable_fp8_matmul`
        self.hold("weight", (out_features, in_features), dtype)
        self.hold("weight_scale", scale)
        self.hold("input_scale", input_scale)

    def forward(self, x: Tensor) -> Tensor:
        if self.fp8_matmul:
            return self.scaled_mm(x)
        if self.scales_product(x):
            return self.scaled_product(x)
        return F.linear(x, self.rounded_weight(x.dtype), self.bias)

    def scales_product(self, x: Tensor) -> bool:
        """Return whether to scale the product, which is smaller than the weight.

        A GPU takes as long as its memory. On a CPU, results equal those of the dequantized weight
        to the bit. A compiler scales the weight as it converts the weight. float16 would overflow.
        """
        return (
            self.weight_scale is not None
            and x.numel() < self.in_features**2
            and x.dtype == torch.bfloat16
            and not (x.is_cpu or torch.is_grad_enabled() or torch.compiler.is_compiling())
        )

    def scaled_product(self, x: Tensor) -> Tensor:
        """Return (x value^T) * weight_scale + bias, without gradients.

        The values are exact in bfloat16, while their products with a scale are not. Instead the
        matrix product is rounded, before it is scaled in float32 and rounded again.
        """
        assert self.weight_scale is not None
        y = F.linear(x, self.weight.to(x.dtype))
        scale = self.weight_scale.float().reshape(-1)  # (out,) or (1,)
        return y.mul_(scale) if self.bias is None else torch.addcmul(self.bias, y, scale, out=y)

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        weight = self.weight.to(dtype)  # a copy, and exact: float8 has fewer bits
        if self.weight_scale is None:
            return weight
        return weight.mul_(self.weight_scale.float().reshape(-1, 1))  # in float32, rounded once

    def scaled_mm(self, x: Tensor) -> Tensor:
        """Multiply with activations in float8 too, by the hardware's float8 matrix product.

        Activations are divided by `input_scale` or, without one, each token by its largest value
        over 448. The product is summed in float32, multiplied by both scales, and rounded once.
        """
        rows = x.reshape(-1, self.in_features)  # (n, in)
        if self.input_scale is None:
            largest = torch.linalg.vector_norm(rows, math.inf, dim=1, keepdim=True)  # (n, 1)
            scale = largest.float().clamp(min=1e-12) / E4M3_MAX
        else:
            scale = self.input_scale.float().reshape(1, 1)
        quantized = quotient_in_float8(rows, scale, clamp=self.input_scale is not None)
        if self.weight_scale is None:
            weight_scale = scale.new_ones(1, 1)
        else:
            weight_scale = self.weight_scale.float().reshape(1, -1)
        by_row = scale.numel() > 1 or weight_scale.numel() > 1
        if by_row:  # torch._scaled_mm takes scales by row on both sides, or on neither
            scale = scale.expand(len(rows), 1).contiguous()
            weight_scale = weight_scale.expand(1, self.out_features).contiguous()
        if by_row and x.is_cpu and torch.__version__ < "2.13":  # its CPU kernel has no such scales
            y = F.linear(quantized.float(), self.weight.float()) * scale * weight_scale
            y = (y if self.bias is None else y + self.bias.float()).to(x.dtype)  # (n, out)
        else:
            y = torch._scaled_mm(
                quantized, self.weight.t(), scale, weight_scale, self.bias, out_dtype=x.dtype
            )  # (n, out)
        return y.reshape(*x.shape[:-1], self.out_features)


def quotient_in_float8(x: Tensor, scale: Tensor, clamp: bool) -> Tensor:
    """Return x / scale, computed in float32, in float8; beyond 448 it would be NaN.

    x is clamped in its own dtype, which changes no byte: whatever is near 448 is rounded to 448.
    """
    if clamp:
        bound = (E4M3_MAX * scale).to(x.dtype)
        x = x.clamp(-bound, bound)
    if torch.compiler.is_compiling():  # one kernel, however it is written
        return (x / scale).to(torch.float8_e4m3fn)
    out = torch.empty(x.shape, dtype=torch.float8_e4m3fn, device=x.device)
    return torch.div(x, scale, out=out)


class BlockFP8Linear(QuantizedLinear):
    """A float8 weight with a scale for each block of 128x128; the last blocks may be cut short.

    weight = value * weight_scale_inv of its block. In spite of the name, the scale multiplies.
    DeepSeek-V3 introduced the format; transformers specifies it as FineGrainedFP8Config, and
    Qwen/Qwen3-4B-FP8 is such a file.
    """

    BLOCK = 128
    few_scales = ("weight_scale_inv",)
    weight_scale_inv: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__(in_features, out_features, bias)
        blocks = -(-out_features // self.BLOCK), -(-in_features // self.BLOCK)
        self.hold("weight", (out_features, in_features), torch.float8_e4m3fn)
        self.hold("weight_scale_inv", blocks)

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        scale = self.weight_scale_inv.float()
        scale = scale.repeat_interleave(self.BLOCK, dim=0)[: self.out_features]
        scale = scale.repeat_interleave(self.BLOCK, dim=1)[:, : self.in_features]
        return self.weight.to(dtype).mul_(scale)


# ---------------------------------------------------------------- matrix products in float8


def enable_fp8_matmul(module: nn.Module, device: torch.device | None = None) -> list[str]:
    """Let the FP8Linears of a loaded module multiply in float8; return the layers that cannot.

    The products are faster, and lossy: activations are rounded to 3 bits of mantissa. They need
    CUDA of compute capability 8.9 (Ada, Hopper) or above, and bfloat16. Elsewhere nothing changes,
    and one warning says why. On the CPU they work, for tests, and are not faster.

    device: where the module will run, if its weights are elsewhere now.
    """
    layers = {  # without the parts of others, which are dequantized together
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, QuantizedLinear) and ".parts." not in path
    }
    if not layers:
        return []
    device = device or next(next(iter(layers.values())).buffers()).device
    if requirement := _unmet_requirement(device, module):
        warnings.warn(
            f"float8 matrix products need {requirement}: weights are dequantized instead",
            stacklevel=2,
        )
        return list(layers)
    unsuitable = {}
    for path, layer in layers.items():
        if reason := _unsuitable(layer):
            unsuitable[path] = reason
            continue
        assert isinstance(layer, FP8Linear)
        layer.fp8_matmul = True
        if layer.input_scale is not None and layer.input_scale == 1:
            layer.input_scale = None  # ComfyUI writes 1 where nothing was measured
    if unsuitable:
        counts = Counter(unsuitable.values()).items()
        warnings.warn(
            f"{len(unsuitable)} of the {len(layers)} quantized layers of {type(module).__name__} "
            "are dequantized, not multiplied in float8: "
            + ", ".join(f"{count} {reason}" for reason, count in counts),
            stacklevel=2,
        )
    return list(unsuitable)


def _unsuitable(layer: QuantizedLinear) -> str | None:
    """Return why a layer cannot multiply in float8; None if it can."""
    if isinstance(layer, BlockFP8Linear):
        return "with scales of blocks"
    if not isinstance(layer, FP8Linear):
        return "in another format"
    if layer.input_scale is not None and not layer.input_scale.is_meta:
        if not 0 < layer.input_scale.item() < math.inf:
            return "with a scale of activations that is not above 0"
    if layer.weight.dtype != torch.float8_e4m3fn:
        return f"in {str(layer.weight.dtype).removeprefix('torch.')}"
    if layer.in_features % 16 or layer.out_features % 16:  # the hardware's kernels need multiples
        return "with a side that is not a multiple of 16"
    return "whose file asks for activations in full precision" if layer.full_precision else None


def _unmet_requirement(device: torch.device, module: nn.Module) -> str | None:
    """Return what float8 matrix products need and do not have here; None if nothing is missing."""
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
