"""Inputs of FLUX 3's transformer."""

import torch
from torch import Tensor

from flux.transformer3 import Flux3Config


def grid(rows: int, columns: int, number: int = 0) -> Tensor:
    """Return positions of an image: halved rows and columns, and the number of a reference."""
    places = torch.cartesian_prod(torch.arange(rows) / 2, torch.arange(columns) / 2)
    ids = torch.zeros(len(places), 4)
    ids[:, 1:3], ids[:, 3] = places, -number
    return ids


def inputs(
    config: Flux3Config, dtype: torch.dtype = torch.float32, references: bool = True
) -> dict[str, Tensor]:
    """Return a batch of two, each at its own time, with two references of other sizes.

    bfloat16 rounds both times, and 1000 t once more.
    """
    generator = torch.Generator().manual_seed(0)

    def draw(length: int, channels: int) -> Tensor:
        return torch.randn(2, length, channels, generator=generator).to(dtype)

    out = dict(img=draw(15, config.in_channels), txt=draw(7, config.context_dim))
    out["img_ids"], out["txt_ids"] = grid(3, 5), torch.zeros(7, 4)
    out["txt_ids"][:, 3] = torch.arange(7)
    out["t"] = torch.tensor([0.90453, 0.7672])
    if references:
        out["references"] = draw(16, config.in_channels)
        out["reference_ids"] = torch.cat([grid(2, 4, 1), grid(4, 2, 2)])
    if config.flow_map:
        out["target"] = torch.tensor([0.8431, 0.6972])
    return out
