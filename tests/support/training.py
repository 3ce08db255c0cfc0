"""Tiny networks and batches for tests of training."""

from functools import partial

import pytest
import torch
from torch import Tensor

from flux import sampling
from flux.parity.reference import FLUX1_TINY, FLUX2_TINY, KLEIN_TINY
from flux.text_encoder import TextFeatures
from flux.training import loss
from flux.transformer import Flux, FluxConfig

CPU = torch.device("cpu")
CONFIGS = {"flux.1": FLUX1_TINY, "flux.2": FLUX2_TINY, "klein": KLEIN_TINY}
every_family = pytest.mark.parametrize("family", CONFIGS)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, a function of the shape and the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def random_batch(config: FluxConfig, rows: int = 2, references: bool = False) -> loss.Batch:
    """Return 3x4 latent tokens and 7 text tokens, optionally with 2x3 reference tokens."""
    axes = len(config.axes_dim)
    pooled = random(rows, config.vector_dim) if config.vector_dim else None
    features = TextFeatures(random(rows, 7, config.context_dim), pooled)
    batch = loss.Batch(random(rows, config.out_channels, 3, 4), features)
    if not references:
        return batch
    ids = sampling.image_ids(2, 3, axes, t=10 if axes == 4 else 1)
    tokens = random(rows, 6, config.out_channels, seed=1)
    return batch._replace(references=tokens, reference_ids=ids)


def network_loss(network: Flux, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rectified-flow loss of a network on `random_batch`; `seed` draws the noise."""
    batch = random_batch(network.config)
    noise = random(2, *batch.latents.shape[1:], seed=seed)
    with loss.autocast_matmul(CPU, dtype):
        velocity = partial(loss.predict_velocity, network, batch, 1.0)
        return loss.rectified_flow_loss(velocity, batch.latents, torch.tensor([0.3, 0.8]), noise)
