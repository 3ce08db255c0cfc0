"""A Linear whose weight stays as small in memory as it is in its file."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class QuantizedLinear(nn.Module):
    """Keeps its weight as the file does, in buffers of the file's names, shapes and types; makes it whole when it is used.

    So only one layer is whole at a time. The weight is computed in float32 and rounded once, to the dtype of the input.
    The bias is never quantised. Each format is a subclass, which says how its tensors make a weight.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool):
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.bias = nn.Parameter(torch.empty(out_features)) if bias else None

    def dequantize(self) -> Tensor:
        """The weight: (out_features, in_features), float32."""
        raise NotImplementedError

    def to_linear(self, weight: Tensor) -> nn.Linear:
        """A frozen Linear with this weight in place of its own, and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta").train(
            self.training
        )
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

    def differentiable(self, x: Tensor) -> Tensor:
        """As `forward`, in autocast's dtype if it is on, with a gradient for x: the weight is made whole anew for that."""
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        out = _Product.apply(x.to(dtype), self)
        return out if self.bias is None else out + self.bias.to(dtype)

    def _apply(self, fn, recurse: bool = True) -> nn.Module:
        """What `.to()`, `.half()` and the like call: a dtype is for the bias alone, a device for all."""
        as_in_file = dict(self._buffers)
        super()._apply(fn, recurse)
        for name, buffer in as_in_file.items():
            if buffer is not None and self._buffers[name].dtype != buffer.dtype:
                self._buffers[name] = buffer.to(self._buffers[name].device)
        return self

    def extra_repr(self) -> str:
        return f"{self.in_features} -> {self.out_features}, bias={self.bias is not None}"


class _Product(torch.autograd.Function):
    """x Wᵀ. A graph that kept W would in the end keep the whole network's, twice or four times as large as the file."""

    @staticmethod
    def forward(ctx, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, layer.dequantize().to(x.dtype))

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient @ ctx.layer.dequantize().to(gradient.dtype), None
