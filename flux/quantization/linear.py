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

    def plain(self, weight: Tensor) -> nn.Linear:
        """A frozen Linear with this weight in place of its own, and the same bias."""
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device="meta").train(self.training)
        linear.weight, linear.bias = nn.Parameter(weight, requires_grad=False), self.bias
        return linear

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.dequantize().to(x.dtype), self.bias)

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
