"""The NSFW classifier of BFL's pipelines: a ViT that tells "normal" images from "nsfw" ones.

    image -> preprocess -> pixels (B, 3, 224, 224)
    pixels -> ImageClassifier -> logits (B, 2)

The network is the ViT of Dosovitskiy et al. 2020 (arXiv:2010.11929). Module paths are the keys of
the released file, model.safetensors of Falconsai/nsfw_image_detection (Apache-2.0). Its card says:
98 % of its own test images are classified rightly. It says nothing of drawings, or of groups of
people.
"""

from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor, nn


@dataclass(frozen=True)
class ViTConfig:
    """Sizes under the names of the file's config.json. The defaults are ViT-base, patch 16."""

    image_size: int = 224  # pixels
    patch_size: int = 16  # pixels
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_attention_heads: int = 12
    num_hidden_layers: int = 12
    layer_norm_eps: float = 1e-12


def preprocess(image: Image.Image, size: int = ViTConfig.image_size) -> Tensor:
    """RGB image of any shape -> (1, 3, size, size) in [-1, 1]; the image is squeezed to a square.

    The arithmetic is that of transformers' ViTImageProcessor, to the bit.
    """
    image = image.resize((size, size), Image.Resampling.BILINEAR)
    pixels = rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w")
    return (pixels.float() / 255 - 0.5) / 0.5


class ImageClassifier(nn.Module):
    def __init__(self, config: ViTConfig, num_labels: int = 2):
        super().__init__()
        self.vit = ViT(config)
        self.classifier = nn.Linear(config.hidden_size, num_labels)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, image_size, image_size) in [-1, 1] -> logits (B, num_labels)."""
        return self.classifier(self.vit(pixels)[:, 0])


class ViT(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        self.embeddings = Embeddings(config)
        self.encoder = nn.ModuleDict(
            {"layer": nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))}
        )
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)

    def forward(self, pixels: Tensor) -> Tensor:
        """Pixels (B, 3, image_size, image_size) -> hidden states (B, 1 + patches, D)."""
        x = self.embeddings(pixels)
        for layer in self.encoder["layer"]:  # type: ignore[attr-defined]
            x = layer(x)
        return self.layernorm(x)


class Embeddings(nn.Module):
    """A learned class token, then a vector for each patch; to each, a vector for its position."""

    def __init__(self, config: ViTConfig):
        super().__init__()
        d, patch = config.hidden_size, config.patch_size
        patches = (config.image_size // patch) ** 2
        self.cls_token = nn.Parameter(torch.empty(1, 1, d))
        self.position_embeddings = nn.Parameter(torch.empty(1, 1 + patches, d))
        self.patch_embeddings = nn.ModuleDict(
            {"projection": nn.Conv2d(3, d, kernel_size=patch, stride=patch)}
        )

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch_embeddings["projection"](pixels).flatten(2).mT  # (B, patches, D)
        x = torch.cat([self.cls_token.expand(len(x), -1, -1), x], 1)
        return x + self.position_embeddings


class Layer(nn.Module):
    def __init__(self, config: ViTConfig):
        super().__init__()
        d, mlp = config.hidden_size, config.intermediate_size
        self.layernorm_before = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.attention = Attention(d, config.num_attention_heads)
        self.layernorm_after = nn.LayerNorm(d, eps=config.layer_norm_eps)
        self.intermediate = nn.ModuleDict({"dense": nn.Linear(d, mlp)})
        self.output = nn.ModuleDict({"dense": nn.Linear(mlp, d)})

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.layernorm_before(x))
        hidden = F.gelu(self.intermediate["dense"](self.layernorm_after(x)))
        return x + self.output["dense"](hidden)


class Attention(nn.Module):
    def __init__(self, d: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        names = ("query", "key", "value")
        self.attention = nn.ModuleDict({name: nn.Linear(d, d) for name in names})
        self.output = nn.ModuleDict({"dense": nn.Linear(d, d)})

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            rearrange(self.attention[name](x), "b n (h d) -> b h n d", h=self.num_heads)
            for name in ("query", "key", "value")
        )
        x = F.scaled_dot_product_attention(q, k, v)
        return self.output["dense"](rearrange(x, "b h n d -> b n (h d)"))
