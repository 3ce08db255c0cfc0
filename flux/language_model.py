"""The text encoder of FLUX.2 and FLUX 3: the first layers of Qwen3, Mistral Small or Qwen3-VL.

FLUX.2 concatenates the hidden states after three layers along channels: layers 9, 18, 27 of Qwen3's
36, or 10, 20, 30 of Mistral's 40. FLUX 3 takes eight: layers 4, 8, ... 32 of Qwen3-VL's 36, whose
text path is Qwen3. Everything above the last of them is left out: no final norm, no language-model
head, no image encoder. Module paths are the keys of the released files without their prefix
(`model.`, `language_model.model.` or `model.language_model.`).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class LanguageModelConfig:
    """Sizes of the language model. The defaults are Qwen3 4B."""

    layers: tuple[int, ...] = (9, 18, 27)  # layers whose hidden states are returned, from 1
    vocab_size: int = 151936
    hidden_size: int = 2560
    mlp_size: int = 9728
    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    theta: float = 1_000_000.0  # base of the rotary embedding's frequencies
    eps: float = 1e-6
    qk_norm: bool = True  # Qwen3 normalizes queries and keys; Mistral does not
    padding_position: int | None = None  # of every padding token; None: positions count padding

    @property
    def features(self) -> int:
        """Channels of the result."""
        return len(self.layers) * self.hidden_size


class LanguageModel(nn.Module):
    """Encode token ids as the concatenated hidden states after `config.layers`."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(max(config.layers)))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Token ids (B, L), True on real tokens (B, L) -> hidden states (B, L, len(layers)·D).

        Rows of padding are computed too, since the transformer attends to them: they see the real
        tokens before them. Where there are none (Mistral pads on the left), attention gives zero.
        """
        length = ids.shape[1]
        causal = torch.ones(length, length, dtype=torch.bool, device=ids.device).tril()  # (L, L)
        visible = causal & mask[:, None, None, :]  # (B, 1, L, L)
        blind = ~visible.any(dim=-1, keepdim=True)  # (B, 1, L, 1)
        x = self.embed_tokens(ids)  # (B, L, D)
        position = torch.arange(length, device=ids.device)  # (L,)
        if self.config.padding_position is not None:
            position = position.where(mask, self.config.padding_position)[:, None]  # (B, 1, L)
        rope = rotary_embedding(position, self.config.head_dim, self.config.theta)
        rope = rope.to(x.dtype)  # (2, [B, 1,] L, d), rounded here, as in transformers
        hidden_states = []
        for number, layer in enumerate(self.layers, start=1):
            x = layer(x, rope, visible, blind)
            if number in self.config.layers:
                hidden_states.append(x)
        return torch.cat(hidden_states, dim=-1)  # (B, L, len(layers)·D)


class Layer(nn.Module):
    """Causal self-attention, then a gated MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, rope: Tensor, visible: Tensor, blind: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), rope, visible, blind)
        x = x + self.mlp(self.post_attention_layernorm(x))
        return x  # (B, L, D)


class Attention(nn.Module):
    """Grouped-query attention: each key and value head serves several query heads."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.head_dim = config.head_dim
        self.groups = config.num_heads // config.num_kv_heads
        query_size = config.num_heads * config.head_dim
        kv_size = config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        self.qk_norm = config.qk_norm
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.eps)
            self.k_norm = RMSNorm(config.head_dim, config.eps)

    def forward(self, x: Tensor, rope: Tensor, visible: Tensor, blind: Tensor) -> Tensor:
        q = rearrange(self.q_proj(x), "b l (h d) -> b l h d", d=self.head_dim)
        k = rearrange(self.k_proj(x), "b l (h d) -> b l h d", d=self.head_dim)
        v = rearrange(self.v_proj(x), "b l (h d) -> b h l d", d=self.head_dim)
        if self.qk_norm:
            q, k = self.q_norm(q), self.k_norm(k)
        q, k = q.transpose(1, 2), k.transpose(1, 2)  # (B, heads, L, d) each, as v
        cos, sin = rope  # ([B, 1,] L, d) each
        q = q * cos + rotate_half(q) * sin
        k = k * cos + rotate_half(k) * sin
        k = k.repeat_interleave(self.groups, dim=1)  # (B, num_heads, L, d)
        v = v.repeat_interleave(self.groups, dim=1)  # (B, num_heads, L, d)
        x = F.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        x = x.masked_fill(blind, 0)  # NaN, by some backends
        return self.o_proj(rearrange(x, "b h l d -> b l (h d)"))  # (B, L, D)


class MLP(nn.Module):
    """SwiGLU (Shazeer 2020, arXiv:2002.05202)."""

    def __init__(self, config: LanguageModelConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.mlp_size, bias=False)
        self.down_proj = nn.Linear(config.mlp_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.gate_proj(x)) * self.up_proj(x)  # (B, L, mlp_size)
        return self.down_proj(x)  # (B, L, D)


class RMSNorm(nn.Module):
    """Normalize in float32, round to the input's dtype, then scale by the weight."""

    def __init__(self, size: int, eps: float):
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * F.rms_norm(x, x.shape[-1:], eps=self.eps)  # the shape of x


def rotary_embedding(position: Tensor, dim: int, theta: float) -> Tensor:
    """Return cosines and sines of position · theta^(-2i/dim): (..., L) -> (2, ..., L, dim) float32.

    Channels i and i + dim/2 share an angle.
    """
    exponent = torch.arange(0, dim, 2, device=position.device).float() / dim
    frequency = 1 / theta**exponent  # (dim/2,)
    half = position.float()[..., None] * frequency  # (..., L, dim/2)
    angle = torch.cat([half, half], dim=-1)  # (..., L, dim)
    return torch.stack([angle.cos(), angle.sin()])


def rotate_half(x: Tensor) -> Tensor:
    """Turn channel pairs (i, i + d/2) by 90 degrees. FLUX's transformer pairs (2i, 2i + 1)."""
    a, b = x.chunk(2, dim=-1)
    return torch.cat([-b, a], dim=-1)
