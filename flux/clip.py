"""CLIP ViT-L/14's text encoder: FLUX.1's prompt as one pooled vector (Radford et al. 2021, arXiv:2103.00020).

Module paths are the keys of the released `text_encoder/` files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the text encoder; the defaults are CLIP ViT-L/14."""

    vocab_size: int = 49408
    hidden_size: int = 768
    num_heads: int = 12
    mlp_size: int = 3072
    depth: int = 12
    max_length: int = 77
    eos_id: int = 49407
    eps: float = 1e-5


class CLIP(nn.Module):
    """Token ids (B, L), with an end of text in every row and L at most `max_length`, to the pooled vector (B, D)."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = nn.ModuleDict(
            dict(
                embeddings=nn.ModuleDict(
                    dict(
                        token_embedding=nn.Embedding(config.vocab_size, config.hidden_size),
                        position_embedding=nn.Embedding(config.max_length, config.hidden_size),
                    )
                ),
                encoder=nn.ModuleDict(
                    dict(layers=nn.ModuleList(Block(config) for _ in range(config.depth)))
                ),
                final_layer_norm=nn.LayerNorm(config.hidden_size, eps=config.eps),
            )
        )

    def forward(self, ids: Tensor) -> Tensor:
        embeddings = self.text_model.embeddings
        x = (
            embeddings.token_embedding(ids) + embeddings.position_embedding.weight[: ids.shape[1]]
        )  # (B, L, D)
        for block in self.text_model.encoder.layers:
            x = block(x)
        # The tokenizer pads with the end of text itself; argmax finds the first, which ends the prompt.
        end = (ids == self.config.eos_id).int().argmax(dim=1)  # (B,)
        x = x[torch.arange(len(ids), device=ids.device), end]  # (B, D)
        return self.text_model.final_layer_norm(x)


class Block(nn.Module):
    """Causal attention, then an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Causal attention. Padding needs no mask: it follows the token that is read, which cannot see it."""

    def __init__(self, hidden_size: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj = nn.Linear(hidden_size, hidden_size)
        self.k_proj = nn.Linear(hidden_size, hidden_size)
        self.v_proj = nn.Linear(hidden_size, hidden_size)
        self.out_proj = nn.Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        qkv = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # (B, L, D) each
        q, k, v = (rearrange(y, "b l (h d) -> b h l d", h=self.num_heads) for y in qkv)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))  # (B, L, D)


class MLP(nn.Module):
    """Two linear layers around the sigmoid approximation of GELU that CLIP was trained with."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (B, L, mlp_size)
        return self.fc2(x * torch.sigmoid(1.702 * x))
