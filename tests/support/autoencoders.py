"""Tiny autoencoders of each kind, and what they encode and decode."""

from dataclasses import replace

import torch
from torch import Tensor

from flux.autoencoder import AutoEncoderConfig

FLUX1 = AutoEncoderConfig()
FLUX2 = AutoEncoderConfig(z_channels=32, scale_factor=None, shift_factor=None)
SMALL_DECODER = replace(FLUX2, decoder_ch=96)
TINY = {
    "flux.1": replace(FLUX1, ch=32),
    "flux.2": replace(FLUX2, ch=32),
    "flux.2, small decoder": replace(FLUX2, ch=32, decoder_ch=24, norm_groups=8),
}


def random_pixels(batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.rand(batch, 3, height, width, generator=generator) * 2 - 1


def random_latents(config: AutoEncoderConfig, batch: int, height: int, width: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(batch, config.latent_channels, height, width, generator=generator)
