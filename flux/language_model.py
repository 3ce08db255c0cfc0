"""The text encoder of FLUX.2: the trunk of Qwen3 or Mistral Small, read in the middle.

FLUX.2 takes the hidden states after three layers (9, 18, 27 of Qwen3's 36; 10, 20, 30 of Mistral's 40), side by side in
channels. Nothing above the last of them is built, loaded or run: no final norm, no language-model head.
Attribute names are the keys of the released files, less the prefix (`model.`, `language_model.model.`) that each carries.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class LanguageModelConfig:
    """`qk_norm` is the only switch between the two: Qwen3 normalises queries and keys, Mistral does not."""

    layers: tuple[int, ...] = (
        9,
        18,
        27,
    )  # hidden states that are read, counted from 1; the trunk ends at the last
    vocab_size: int = 151936
    hidden_size: int = 2560
    mlp_size: int = 9728
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    theta: float = 1_000_000.0
    eps: float = 1e-6
    qk_norm: bool = True

    @property
    def features(self) -> int:
        return len(self.layers) * self.hidden_size


class LanguageModel(nn.Module):
    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(max(config.layers)))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """(B, L) token ids, (B, L) True on real tokens -> (B, L, len(layers)·D).

        A padded row is computed too, since the transformer attends to it: it sees the real tokens before it. Where there are
        none (Mistral pads on the left), its attention is zero, as in PyTorch's SDPA. Positions count padding.
        """
        visible = torch.ones(
            ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device
        ).tril()  # (L, L)
        visible = visible & mask[:, None, None, :]  # (B, 1, L, L)
        rope = rope_table(ids.shape[1], self.config.head_dim, self.config.theta, ids.device)
        x = self.embed_tokens(ids)  # (B, L, D)
        rope = rope.to(x.dtype)  # the released code rounds the tables, not the rotated values
        read = []
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, rope, visible)
            if number in self.config.layers:
                read.append(x)
        return torch.cat(read, dim=-1)  # (B, L, len(layers)·D)


class Layer(nn.Module):
    def __init__(self, c: LanguageModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.self_attn = Attention(c)
        self.post_attention_layernorm = RMSNorm(c.hidden_size, c.eps)
        self.mlp = MLP(c)

    def forward(self, x: Tensor, rope: Tensor, visible: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible)
        return x + self.mlp(self.post_attention_layernorm(x))


class Attention(nn.Module):
    """Grouped queries: each of the fewer key and value heads serves several query heads."""

    def __init__(self, c: LanguageModelConfig):
        super().__init__()
        self.head_dim = c.head_dim
        self.groups = c.num_heads // c.num_kv_heads
        self.q_proj = nn.Linear(c.hidden_size, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.eps)
            self.k_norm = RMSNorm(c.head_dim, c.eps)

    def forward(self, x: Tensor, rope: Tensor, visible: Tensor) -> Tensor:
        q, k, v = (
            rearrange(f(x), "b l (h d) -> b h l d", d=self.head_dim)
            for f in (self.q_proj, self.k_proj, self.v_proj)
        )
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = rotate(q, rope), rotate(k, rope)
        k, v = (
            k.repeat_interleave(self.groups, dim=1),
            v.repeat_interleave(self.groups, dim=1),
        )  # (B, num_heads, L, d)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        return self.o_proj(rearrange(out, "b h l d -> b l (h d)"))


class MLP(nn.Module):
    def __init__(self, c: LanguageModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(c.hidden_size, c.mlp_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.mlp_size, bias=False)
        self.down_proj = nn.Linear(c.mlp_size, c.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class RMSNorm(nn.Module):
    def __init__(self, dim: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(dim))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # normalised in float32, rounded, and scaled then: in bf16 that order can be seen
        wide = x.float()
        normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * normed.to(x.dtype)


def rope_table(length: int, dim: int, theta: float, device: torch.device) -> Tensor:
    """(2, L, dim) float32: cosines and sines of position · theta^(-2i/dim), the dim/2 angles twice over."""
    frequency = 1 / theta ** (
        torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    )  # (dim/2,)
    angle = torch.outer(torch.arange(length, dtype=torch.float32, device=device), frequency).repeat(
        1, 2
    )  # (L, dim)
    return torch.stack([angle.cos(), angle.sin()])


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns channel i against channel i + dim/2: halves, where the FLUX transformer turns neighbours."""
    cos, sin = rope  # (L, d)
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
