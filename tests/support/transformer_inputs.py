"""Inputs of a transformer, for its tests and for scripts/dev/golden.py."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from flux.transformer import FluxConfig


def grid(t: int, rows: int, columns: int) -> Tensor:
    return torch.cartesian_prod(torch.tensor([t]), torch.arange(rows), torch.arange(columns))


def inputs(config: FluxConfig, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    """Return a batch of two, each at its own time, with reference images of other sizes.

    At these times of released schedules, diffusers and BFL round 1000 t to different values.
    """
    img_ids, txt_ids = (
        torch.cat([grid(0, 3, 5), grid(1, 2, 4)]),
        torch.zeros(7, 3, dtype=torch.long),
    )
    if config.shared_modulation:
        img_ids = pad(torch.cat([grid(0, 3, 5), grid(10, 2, 4), grid(20, 4, 2)]), (0, 1))
        txt_ids = pad(torch.arange(7)[:, None], (3, 0))
    generator = torch.Generator().manual_seed(0)
    out = dict(
        img=torch.randn(2, len(img_ids), config.in_channels, generator=generator).to(dtype),
        txt=torch.randn(2, len(txt_ids), config.context_dim, generator=generator).to(dtype),
        img_ids=img_ids,
        txt_ids=txt_ids,
        t=torch.tensor([0.90453, 0.7672]),
    )
    if config.guidance:
        out["guidance"] = torch.tensor([3.5, 2.5])
    if config.vector_dim is not None:
        out["vector"] = torch.randn(2, config.vector_dim, generator=generator).to(dtype)
    return out
