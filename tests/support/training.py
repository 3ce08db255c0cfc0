"""Tiny networks and batches for tests of training."""

from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from flux import sampling
from flux.parity.reference import FLUX1_TINY, FLUX2_TINY, FLUX3_TINY, KLEIN_TINY, randomise
from flux.text_encoder import TextFeatures
from flux.training import loss
from flux.training.checkpoint import optimizer_tensors
from flux.training.networks import Network, new_network
from flux.training.trainer import Trainer, make_optimizer, warmup_cosine
from flux.transformer import FluxConfig
from flux.transformer3 import Flux3Config

CPU = torch.device("cpu")
CONFIGS = {"flux.1": FLUX1_TINY, "flux.2": FLUX2_TINY, "klein": KLEIN_TINY, "flux.3": FLUX3_TINY}
every_family = pytest.mark.parametrize("family", CONFIGS)


def random(*shape: int, seed: int = 0) -> Tensor:
    """Return normal numbers, a function of the shape and the seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def random_network(family: str) -> Network:
    """Return a network of a family of CONFIGS with random weights."""
    return randomise(new_network(CONFIGS[family]))


def random_batch(
    config: FluxConfig | Flux3Config, rows: int = 2, references: bool = False
) -> loss.Batch:
    """Return 3x4 latent tokens and 7 text tokens, optionally with 2x3 reference tokens."""
    axes, flux3 = len(config.axes_dim), isinstance(config, Flux3Config)
    vector_dim = None if flux3 else config.vector_dim
    channels = config.in_channels if flux3 else config.out_channels
    pooled = random(rows, vector_dim) if vector_dim else None
    features = TextFeatures(random(rows, 7, config.context_dim), pooled)
    batch = loss.Batch(random(rows, channels, 3, 4), features)
    if not references:
        return batch
    ids = sampling.image_ids(2, 3, axes, t=10 if axes == 4 else 1)
    if flux3:
        ids = sampling.flux3_image_ids(2, 3, 1)
    tokens = random(rows, 6, channels, seed=1)
    return batch._replace(references=tokens, reference_ids=ids)


def network_loss(network: Network, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return the rectified-flow loss of a network on `random_batch`; `seed` draws the noise.

    FLUX 3 gets references, so that all of its weights have a part in the loss.
    """
    batch = random_batch(network.config, references=isinstance(network.config, Flux3Config))
    noise = random(2, *batch.latents.shape[1:], seed=seed)
    with loss.autocast_matmul(CPU, dtype):
        velocity = partial(loss.predict_velocity, network, batch, 1.0)
        return loss.rectified_flow_loss(velocity, batch.latents, torch.tensor([0.3, 0.8]), noise)


# -------------------------------------------------------------------------------------- trainers

RUN = {"model": "a", "batch_size": 2}


def make_trainer(path: Path, ema: float | None = 0.9, config=RUN, **options) -> Trainer:
    """Return a trainer of a small MLP: 6 steps, 2 of them warm-up, at a rate of 0.05."""
    torch.manual_seed(3)
    module = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1))
    optimizer = make_optimizer("adamw", module.parameters(), 0.05)
    schedule = warmup_cosine(6, 2)
    return Trainer(module, path, config, [optimizer], schedule, ema_decay=ema, **options)


def make_loss(trainer: Trainer, number: int) -> Callable[[], Tensor]:
    return lambda: (trainer.module(random(5, 4, seed=number)) - number).square().mean()


def take_steps(trainer: Trainer, start: int, stop: int) -> list[tuple[float, float]]:
    """Take steps of two losses each; return losses and norms of the gradients."""
    results = []
    for n in range(start, stop):
        losses = [make_loss(trainer, 2 * n), make_loss(trainer, 2 * n + 1)]
        results.append(trainer.update(losses))
    return results


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Return a copy of everything that a checkpoint holds."""
    tensors = dict(trainer.module.named_parameters())
    tensors |= {f"ema.{name}": x for name, x in trainer.ema.items()}
    tensors |= {f"optimizer.{n}": x for n, x in optimizer_tensors(trainer.optimizers).items()}
    return {name: x.detach().clone() for name, x in tensors.items()}


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
