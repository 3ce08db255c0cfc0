"""CLIP ViT-L/14's text encoder: FLUX.1's prompt as one pooled vector (Radford et al. 2021).

The paper is arXiv:2103.00020. Module paths are the keys of the released `text_encoder/` files.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class CLIPConfig:
    """Sizes of the text encoder. The defaults are CLIP ViT-L/14."""

    vocab_size: int = 49408
    hidden_size: int = 768
    num_heads: int = 12
    mlp_size: int = 3072
    depth: int = 12
    max_length: int = 77  # tokens
    eos_id: int = 49407  # the token that ends a text
    eps: float = 1e-5


class CLIP(nn.Module):
    """Encode token ids as one vector: the hidden state of the end of the text."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.config = config
        self.text_model = TextModel(config)

    def forward(self, ids: Tensor) -> Tensor:
        """Token ids (B, L), L <= max_length, an end of text in each -> pooled vector (B, D)."""
        return self.text_model(ids)


class TextModel(nn.Module):
    """Embeddings, blocks, norm, then the hidden state of the end of the text."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.eos_id = config.eos_id
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.eps)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)  # (B, L, D)
        x = self.encoder(x)
        x = self.final_layer_norm(x)
        # The tokenizer pads with the end-of-text token: argmax finds the first one.
        end = (ids == self.eos_id).int().argmax(dim=1)  # (B,)
        return x[torch.arange(len(ids), device=ids.device), end]  # (B, D)


class Embeddings(nn.Module):
    """A vector for each token plus a vector for each position."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_length, config.hidden_size)

    def forward(self, ids: Tensor) -> Tensor:
        position = torch.arange(ids.shape[1], device=ids.device)  # (L,)
        return self.token_embedding(ids) + self.position_embedding(position)  # (B, L, D)


class Encoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x  # (B, L, D)


class Block(nn.Module):
    """Causal self-attention, then an MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.self_attn = SelfAttention(config)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        x = x + self.mlp(self.layer_norm2(x))
        return x  # (B, L, D)


class SelfAttention(nn.Module):
    """Causal attention. Padding needs no mask: it follows the end of the text."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.num_heads = config.num_heads
        self.q_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.k_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.v_proj = nn.Linear(config.hidden_size, config.hidden_size)
        self.out_proj = nn.Linear(config.hidden_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        q = rearrange(self.q_proj(x), "b l (h d) -> b h l d", h=self.num_heads)
        k = rearrange(self.k_proj(x), "b l (h d) -> b h l d", h=self.num_heads)
        v = rearrange(self.v_proj(x), "b l (h d) -> b h l d", h=self.num_heads)
        x = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))  # (B, L, D)


class MLP(nn.Module):
    """Two linear layers around the sigmoid approximation of GELU that CLIP was trained with."""

    def __init__(self, config: CLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)  # (B, L, mlp_size)
        x = x * torch.sigmoid(1.702 * x)
        return self.fc2(x)  # (B, L, D)
