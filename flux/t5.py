"""The encoder of T5 v1.1, which turns FLUX.1's prompt into text tokens (Raffel et al. 2020, arXiv:1910.10683).

Module paths are the keys of the released `text_encoder_2/` files, old names such as `DenseReluDense` included.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder; the defaults are T5 v1.1 XXL."""

    vocab_size: int = 32128
    hidden_size: int = 4096
    head_dim: int = 64
    num_heads: int = 64
    mlp_size: int = 10240
    depth: int = 24
    num_buckets: int = 32
    max_distance: int = 128
    eps: float = 1e-6


class T5(nn.Module):
    """Token ids (B, L) to the final hidden states (B, L, D). There is no mask: pads attend and are attended to."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = nn.ModuleDict(
            dict(
                block=nn.ModuleList(Block(config, first=i == 0) for i in range(config.depth)),
                final_layer_norm=RMSNorm(config.hidden_size, config.eps),
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        bias = self.position_bias(torch.arange(ids.shape[1], device=ids.device))  # (1, H, L, L)
        x = self.shared(ids)  # (B, L, D)
        for block in self.encoder.block:
            x = block(x, bias)
        return self.encoder.final_layer_norm(x)

    def position_bias(self, position: Tensor) -> Tensor:
        """What each head adds to each pair's logits (1, H, L, L): layer 0 owns the table, all layers use it."""
        table = self.encoder.block[0].layer[0].SelfAttention.relative_attention_bias
        offset = position[None, :] - position[:, None]  # (L, L), query by key
        bias = table(
            relative_position_bucket(offset, self.config.num_buckets, self.config.max_distance)
        )  # (L, L, H)
        return rearrange(
            bias, "query key head -> 1 head query key"
        ).contiguous()  # fused kernels read it by rows


class Block(nn.Module):
    """Attention, then a gated MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: T5Config, first: bool):
        super().__init__()
        self.layer = nn.ModuleList(
            [
                nn.ModuleDict(
                    dict(
                        SelfAttention=SelfAttention(config, owns_bias=first),
                        layer_norm=RMSNorm(config.hidden_size, config.eps),
                    )
                ),
                nn.ModuleDict(
                    dict(
                        DenseReluDense=GatedMLP(config.hidden_size, config.mlp_size),
                        layer_norm=RMSNorm(config.hidden_size, config.eps),
                    )
                ),
            ]
        )

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        attention, mlp = self.layer
        x = x + attention.SelfAttention(attention.layer_norm(x), bias)
        return x + mlp.DenseReluDense(mlp.layer_norm(x))


class SelfAttention(nn.Module):
    """Bidirectional attention with an additive position bias (1, H, L, L)."""

    def __init__(self, config: T5Config, owns_bias: bool):
        super().__init__()
        self.num_heads = config.num_heads
        inner_size = config.num_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.k = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.v = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.o = nn.Linear(inner_size, config.hidden_size, bias=False)
        if owns_bias:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q, k, v = (
            rearrange(y, "b l (h d) -> b h l d", h=self.num_heads)
            for y in (self.q(x), self.k(x), self.v(x))
        )
        x = F.scaled_dot_product_attention(
            q, k, v, attn_mask=bias, scale=1.0
        )  # T5's weights absorb 1/sqrt(d)
        return self.o(rearrange(x, "b h l d -> b l (h d)"))  # (B, L, D)


class GatedMLP(nn.Module):
    """GEGLU with the tanh form of GELU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.wi_0 = nn.Linear(hidden_size, mlp_size, bias=False)
        self.wi_1 = nn.Linear(hidden_size, mlp_size, bias=False)
        self.wo = nn.Linear(mlp_size, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.wo(F.gelu(self.wi_0(x), approximate="tanh") * self.wi_1(x))


class RMSNorm(nn.Module):
    """Root mean square norm in float32; the result is rounded to the weight's dtype before it is scaled, not after."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(
            self.weight.dtype
        )


def relative_position_bucket(offset: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """The bucket of each offset, key position - query position: int64 in [0, num_buckets), in the shape of `offset`.

    The lower half of the buckets is for keys at or before the query, the upper half for keys after it. In each half
    the first distances have a bucket of their own, and the rest grow geometrically to an open last one.
    """
    half = num_buckets // 2
    exact = half // 2
    wide = half - exact
    # Integer edges, not the usual logarithm: distance 64 lies on an edge, where a device's last bit would move it.
    edges = [
        *range(1, exact),
        *(math.ceil(exact * (max_distance / exact) ** (i / wide)) for i in range(wide)),
    ]
    bucket = torch.bucketize(offset.abs(), torch.tensor(edges, device=offset.device), right=True)
    return bucket + half * (offset > 0)
