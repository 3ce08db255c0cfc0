"""FLUX.1 Redux's two networks: SigLIP sees a picture, and Redux turns what it saw into text tokens for the transformer.

    picture -> to_siglip -> pixels (B, 3, 384, 384) -> SigLIP -> (B, 729, 1152) -> Redux -> text tokens (B, 729, 4096)

SigLIP is the image half of Zhai et al. 2023 (arXiv:2303.15343). Module paths are the keys of the released files, in
SigLIP's `image_encoder/model.safetensors` after a common `vision_model.`
"""

from dataclasses import dataclass

import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn

from flux.image_io.output import to_pixels


@dataclass(frozen=True)
class SigLIPConfig:
    """Sizes of the image encoder; the defaults are SigLIP so400m-patch14-384."""

    image_size: int = 384
    patch_size: int = 14
    hidden_size: int = 1152
    num_heads: int = 16
    mlp_size: int = 4304
    depth: int = 27
    eps: float = 1e-6


@dataclass(frozen=True)
class ReduxConfig:
    """Widths of the adapter, from SigLIP's to that of the transformer's text tokens."""

    siglip_dim: int = 1152
    hidden_dim: int = 12288
    context_dim: int = 4096


def to_siglip(picture: Image.Image, size: int = SigLIPConfig.image_size) -> Tensor:
    """An RGB picture of any shape -> (1, 3, size, size) in [-1, 1]: squeezed into the square, as SigLIP was trained."""
    return to_pixels(picture.resize((size, size), Image.Resampling.BICUBIC))


class SigLIP(nn.Module):
    """Pixels (B, 3, H, W) of the size in the config to one hidden state a patch (B, L, D), row by row, normalised."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.config = config
        # 384 is no multiple of 14: there are 27x27 patches, and the last 6 rows and columns of pixels are not seen.
        num_patches = (config.image_size // config.patch_size) ** 2
        self.embeddings = nn.ModuleDict(
            dict(
                patch_embedding=nn.Conv2d(
                    3, config.hidden_size, config.patch_size, stride=config.patch_size
                ),
                position_embedding=nn.Embedding(num_patches, config.hidden_size),
            )
        )
        self.encoder = nn.ModuleDict(
            dict(layers=nn.ModuleList(Block(config) for _ in range(config.depth)))
        )
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.eps)

    def forward(self, pixels: Tensor) -> Tensor:
        x = rearrange(self.embeddings.patch_embedding(pixels), "b d h w -> b (h w) d")  # (B, L, D)
        x = x + self.embeddings.position_embedding.weight
        for block in self.encoder.layers:
            x = block(x)
        return self.post_layernorm(x)


class Block(nn.Module):
    """Attention, then an MLP, each on a normalised copy of the residual stream."""

    def __init__(self, config: SigLIPConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.self_attn = SelfAttention(config.hidden_size, config.num_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.eps)
        self.mlp = MLP(config.hidden_size, config.mlp_size)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class SelfAttention(nn.Module):
    """Every patch attends to every patch."""

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
        x = F.scaled_dot_product_attention(q, k, v)
        return self.out_proj(rearrange(x, "b h l d -> b l (h d)"))  # (B, L, D)


class MLP(nn.Module):
    """Two linear layers around the tanh form of GELU."""

    def __init__(self, hidden_size: int, mlp_size: int):
        super().__init__()
        self.fc1 = nn.Linear(hidden_size, mlp_size)
        self.fc2 = nn.Linear(mlp_size, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class Redux(nn.Module):
    """SigLIP's hidden states (B, L, siglip_dim) to as many text tokens (B, L, context_dim), which follow the prompt's."""

    def __init__(self, config: ReduxConfig):
        super().__init__()
        self.config = config
        self.redux_up = nn.Linear(config.siglip_dim, config.hidden_dim)
        self.redux_down = nn.Linear(config.hidden_dim, config.context_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.redux_down(F.silu(self.redux_up(x)))


def siglip_ignore_keys(name: str) -> bool:
    """The pooling head; in files of the whole SigLIP, its text half; and positions, which are just counted."""
    others = ("head.", "text_model.", "logit_scale", "logit_bias")
    return name.startswith(others) or name.endswith("embeddings.position_ids")
