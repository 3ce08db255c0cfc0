"""The encoder of T5 v1.1: FLUX.1's prompt as text tokens (Raffel et al. 2020, arXiv:1910.10683).

Module paths are the keys of the released `text_encoder_2/` files, old names such as
`DenseReluDense` included.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class T5Config:
    """Sizes of the encoder. The defaults are T5 v1.1 XXL."""

    vocab_size: int = 32128
    hidden_size: int = 4096
    head_dim: int = 64
    num_heads: int = 64
    mlp_size: int = 10240
    depth: int = 24
    num_buckets: int = 32  # of relative positions
    max_distance: int = 128  # from here on, all distances share one bucket
    eps: float = 1e-6


class T5(nn.Module):
    """Encode token ids. There is no mask: padding attends and is attended to."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.shared = nn.Embedding(config.vocab_size, config.hidden_size)
        self.encoder = Encoder(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L) -> hidden states (B, L, D)."""
        x = self.shared(ids)  # (B, L, D)
        return self.encoder(x)


class Encoder(nn.Module):
    """The blocks, one after the other, and a norm. All blocks use one position bias."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.block = nn.ModuleList(Block(config, i == 0) for i in range(config.depth))
        self.final_layer_norm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        bias = self.position_bias(x.shape[1], x.device)  # (1, H, L, L)
        for block in self.block:
            x = block(x, bias)
        return self.final_layer_norm(x)  # (B, L, D)

    def position_bias(self, length: int, device: torch.device | str) -> Tensor:
        """Return what each head adds to the logit of each (query, key): (1, H, L, L).

        Block 0 owns the table.
        """
        table = self.block[0].get_submodule("layer.0.SelfAttention.relative_attention_bias")
        position = torch.arange(length, device=device)  # (L,)
        offset = position[None, :] - position[:, None]  # (L, L): key - query
        bucket = relative_position_bucket(offset, self.config.num_buckets, self.config.max_distance)
        return rearrange(table(bucket), "q k h -> 1 h q k").contiguous()  # (1, H, L, L)


class Block(nn.Module):
    """Self-attention, then a gated MLP."""

    def __init__(self, config: T5Config, has_bias_table: bool):
        super().__init__()
        self.layer = nn.ModuleList([AttentionLayer(config, has_bias_table), MLPLayer(config)])

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        x = self.layer[0](x, bias)
        x = self.layer[1](x)
        return x  # (B, L, D)


class AttentionLayer(nn.Module):
    """Self-attention on a normalized copy of the residual stream."""

    def __init__(self, config: T5Config, has_bias_table: bool):
        super().__init__()
        self.SelfAttention = SelfAttention(config, has_bias_table)
        self.layer_norm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        return x + self.SelfAttention(self.layer_norm(x), bias)  # (B, L, D)


class MLPLayer(nn.Module):
    """A gated MLP on a normalized copy of the residual stream."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.DenseReluDense = GatedMLP(config)
        self.layer_norm = RMSNorm(config.hidden_size, config.eps)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.DenseReluDense(self.layer_norm(x))  # (B, L, D)


class SelfAttention(nn.Module):
    """Bidirectional attention with a position bias and without the scale 1/sqrt(head_dim)."""

    def __init__(self, config: T5Config, has_bias_table: bool):
        super().__init__()
        self.num_heads = config.num_heads
        inner_size = config.num_heads * config.head_dim
        self.q = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.k = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.v = nn.Linear(config.hidden_size, inner_size, bias=False)
        self.o = nn.Linear(inner_size, config.hidden_size, bias=False)
        if has_bias_table:
            self.relative_attention_bias = nn.Embedding(config.num_buckets, config.num_heads)

    def forward(self, x: Tensor, bias: Tensor) -> Tensor:
        q = rearrange(self.q(x), "b l (h d) -> b h l d", h=self.num_heads)
        k = rearrange(self.k(x), "b l (h d) -> b h l d", h=self.num_heads)
        v = rearrange(self.v(x), "b l (h d) -> b h l d", h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)
        x = rearrange(x, "b h l d -> b l (h d)")  # (B, L, H·d)
        return self.o(x)  # (B, L, D)


class GatedMLP(nn.Module):
    """GEGLU (Shazeer 2020, arXiv:2002.05202) with the tanh form of GELU."""

    def __init__(self, config: T5Config):
        super().__init__()
        self.wi_0 = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.wi_1 = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.wo = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = gelu_new(self.wi_0(x)) * self.wi_1(x)  # (B, L, mlp_size)
        return self.wo(x)  # (B, L, D)


class RMSNorm(nn.Module):
    """Normalize in float32, round to the weight's dtype, then scale by the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        x = F.rms_norm(x, x.shape[-1:], eps=self.eps)
        return self.weight * x.to(self.weight.dtype)  # (B, L, D)


def gelu_new(x: Tensor) -> Tensor:
    """GELU in its tanh form, step by step: in bfloat16 `F.gelu` would round differently."""
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


def relative_position_bucket(offset: Tensor, num_buckets: int, max_distance: int) -> Tensor:
    """Return the bucket in [0, num_buckets) of each offset, key position - query position.

    The lower half of the buckets is for keys at or before the query, the upper half for keys after
    it. In each half the first distances have a bucket each. The others grow geometrically up to
    `max_distance`.
    """
    half = num_buckets // 2
    exact = half // 2
    log = half - exact
    # Integer edges instead of the usual logarithm: distance 64 lies on an edge, where the last bit
    # of a device's logarithm would decide.
    edges = list(range(1, exact))
    edges += [math.ceil(exact * (max_distance / exact) ** (i / log)) for i in range(log)]
    bucket = torch.bucketize(offset.abs(), torch.tensor(edges, device=offset.device), right=True)
    return bucket + half * (offset > 0)
