"""Attention for training on a CPU.

The backward pass of torch's fused attention takes longer there than all matrix products together.
"""

import torch
from torch import Tensor

from flux import transformer
from flux.transformer import KVCache


class Attention(torch.autograd.Function):
    """softmax(q kᵀ / √d) v of (N, L, d), in bfloat16. Only the probabilities are kept."""

    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.bfloat16().contiguous() for x in (q * q.shape[-1] ** -0.5, k, v))
        weights = (q @ k.mT).softmax(-1)
        ctx.save_for_backward(q, k, v, weights)
        return weights @ v

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v, weights = ctx.saved_tensors
        gradient = gradient.bfloat16().contiguous()
        inner = torch._softmax_backward_data(gradient @ v.mT, weights, -1, torch.bfloat16)
        return (inner @ k) * q.shape[-1] ** -0.5, inner.mT @ q, weights.mT @ gradient


plain = transformer.attention


@torch.compiler.disable  # its kernels are torch's own
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor,
    cache: KVCache | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Compute the transformer's `attention`, (B, N, H, d) each -> (B, N, D).

    Without autocast, or with a cache or a mask, run the transformer's own function.
    """
    if cache is not None or mask is not None or not torch.is_autocast_enabled("cpu"):
        return plain(q, k, v, rope, cache, mask)
    q, k = transformer.apply_rope(q, rope), transformer.apply_rope(k, rope)
    heads = [x.transpose(1, 2).flatten(0, 1) for x in (q, k, v)]  # (B H, N, d)
    return Attention.apply(*heads).unflatten(0, (len(q), -1)).transpose(1, 2).flatten(2)
