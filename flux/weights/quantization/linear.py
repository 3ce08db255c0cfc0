"""A Linear whose weight stays as small in memory as it is in its file."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantizedLinear(nn.Module):
    """Keep the weight as its file stores it, and dequantize it each time it is used.

    Buffers have the file's names, shapes and dtypes. Only one layer is dequantized at a time. The
    weight is computed in float32 and rounded once, to the dtype of the input. The bias is never
    quantized. A subclass for each format says how its tensors make a weight.
    """

    few_scales: tuple[str, ...] = ()  # names of the scales that `check_scales` reads
    weight: Tensor

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias: nn.Parameter | None = None
        if bias:
            self.bias = nn.Parameter(torch.empty(out_features))

    def hold(
        self, name: str, shape: tuple[int, ...] | None, dtype: torch.dtype = torch.float32
    ) -> None:
        """Register a tensor of the file as a buffer; None if the file has no such tensor."""
        self.register_buffer(name, None if shape is None else torch.empty(shape, dtype=dtype))

    def dequantize(self) -> Tensor:
        """Return the weight: (out_features, in_features), float32."""
        return self.rounded_weight(torch.float32)

    def rounded_weight(self, dtype: torch.dtype) -> Tensor:
        """Return the weight in another dtype, each number rounded once.

        A subclass has this method or `dequantize`. Where its numbers are exact in every dtype, the
        product of a number and a float32 scale is rounded as it is written: no matrix in float32
        is needed.
        """
        return self.dequantize().to(dtype)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.rounded_weight(x.dtype), self.bias)

    def differentiable(self, x: Tensor) -> Tensor:
        """Run `forward` with a gradient for x, in autocast's dtype if autocast is on.

        The backward pass dequantizes the weight again.
        """
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out = _LinearWithoutSavedWeight.apply(x.to(dtype), self)
        return out if self.bias is None else out + self.bias.to(dtype)

    def to_linear(self, weight: Tensor) -> nn.Linear:
        """Return a frozen Linear with this weight instead of the layer's, and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta")
        linear.weight = nn.Parameter(weight, requires_grad=False)
        linear.register_parameter("bias", self.bias)
        return linear.train(self.training)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """Run `.to()`, `.half()` and the like: a dtype is for the bias alone, a device for all."""
        as_in_file = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, before in as_in_file.items():
            after = self._buffers[name]
            if before is not None and after is not None and after.dtype != before.dtype:
                self._buffers[name] = before.to(after.device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


class _LinearWithoutSavedWeight(torch.autograd.Function):
    """x Wᵀ, without W in the graph: dequantized weights of all layers are 2 to 4 times the file."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.rounded_weight(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.rounded_weight(gradient.dtype), None
