"""FLUX.1 Redux's two networks: SigLIP encodes an image, Redux maps the result to text tokens.

    image -> preprocess_for_siglip -> pixels (B, 3, 384, 384)
    pixels -> SigLIP -> hidden states (B, 729, 1152)
    hidden states -> Redux -> text tokens (B, 729, 4096)

SigLIP is the image encoder of Zhai et al. 2023 (arXiv:2303.15343). Module paths are the keys of the
released files; in SigLIP's `image_encoder/model.safetensors` they follow the prefix `vision_model.`
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of the image encoder. The defaults are SigLIP so400m-patch14-384."""

    image_size: int = 384  # pixels
    patch_size: int = 14  # pixels
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_size: int = 4304
    depth: int = 27
    eps: float = 1e-6


@dataclass(frozen=True)
class ReduxConfig:
    """Widths of Redux, from SigLIP's hidden states to the transformer's text tokens."""

    siglip_dim: int = 1152
    hidden_dim: int = 12288
    context_dim: int = 4096


def preprocess_for_siglip(image: Image.Image, size: int = SigLIPConfig.image_size) -> Tensor:
    """RGB image of any shape -> (1, 3, size, size) in [-1, 1].

    The image is squeezed into a square, as in SigLIP's training.
    """
    image = image.resize((size, size), Image.Resampling.BICUBIC)
    pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w")
    return pixels.float() / 127.5 - 1


class SigLIP(nn.Module):
    """Encode an image as one hidden state for each patch."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.config = config
        self.embeddings = Embeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, image_size, image_size) in [-1, 1] -> hidden states (B, L, D)."""
        x = self.embeddings(pixels)  # (B, L, D)
        x = self.encoder(x)
        return self.post_layernorm(x)


class Embeddings(nn.Module):
    """A vector for each patch of pixels plus a vector for each position.

    384 is no multiple of 14: there are 27x27 patches, and the last 6 rows and columns of pixels are
    not used.
    """

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        size = config.patch_size
        num_patches = (config.image_size // size) ** 2
        self.patch_embedding = nn.Conv2d(3, config.hidden_size, kernel_size=size, stride=size)
        self.position_embedding = nn.Embedding(num_patches, config.hidden_size)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embedding(pixels)  # (B, D, h, w)
        x = rearrange(x, "b d h w -> b (h w) d")  # (B, L, D), row by row
        position = torch.arange(x.shape[1], device=x.device)  # (L,)
        return x + self.position_embedding(position)  # (B, L, D)


class Encoder(nn.Module):
    """The blocks, one after the other."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.layers = nn.ModuleList(Block(config) for _ in range(config.depth))

    def forward(self, x: Tensor) -> Tensor:
        for block in self.layers:
            x = block(x)
        return x  # (B, L, D)


class Block(nn.Module):
    """Self-attention, then an MLP, each on a normalized copy of the residual stream."""

    def __init__(self, config: SigLIPConfig):
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
    """Attention of every patch to every patch."""

    def __init__(self, config: SigLIPConfig):
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
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))  # (B, L, D)


class MLP(nn.Module):
    """Two linear layers around the tanh form of GELU."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.fc1 = nn.Linear(config.hidden_size, config.mlp_size)
        self.fc2 = nn.Linear(config.mlp_size, config.hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.fc1(x), approximate="tanh")  # (B, L, mlp_size)
        return self.fc2(x)  # (B, L, D)


class Redux(nn.Module):
    """Map SigLIP's hidden states to as many text tokens, which follow those of the prompt."""

    def __init__(self, config: ReduxConfig):
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.siglip_dim, config.hidden_dim)
        self.redux_down = nn.Linear(config.hidden_dim, config.context_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.silu(self.redux_up(x))  # (B, L, siglip_dim) -> (B, L, hidden_dim)
        return self.redux_down(x)  # (B, L, context_dim)


def siglip_ignore_keys(name: str) -> bool:
    """Return whether a tensor of a SigLIP file belongs to no part of `SigLIP`.

    These are the pooling head; the text encoder, in files of all of SigLIP; and the numbers 0, 1,
    ... of the positions.
    """
    parts = ("head.", "text_model.", "logit_scale", "logit_bias")
    return name.startswith(parts) or name.endswith("embeddings.position_ids")
