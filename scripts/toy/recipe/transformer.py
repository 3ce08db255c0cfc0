"""Train the transformer with its text encoder."""

from pathlib import Path

import torch
from torch import Tensor

from flux import transformer
from recipe.attention import attention
from recipe.batches import Batches
from recipe.neighbours import neighbours_loss
from recipe.networks import EDGES, RATE, Networks, changed_loss, flow_loss, shown_loss
from recipe.samples import Sampler
from recipe.trainer import COOLING, TimedTrainer, device_of, optimizers

SHOWN = 0.2  # weight of `shown_loss`, and of `changed_loss` for edits of one image
NEIGHBOURS = 0.1  # weight of `neighbours_loss`, for a new T5


def train_transformer(
    run: Path,
    networks: Networks,
    sampler: Sampler,
    minutes: float,
    compiled: bool,
    cooling: float = COOLING,
) -> None:
    """Train on the files of `encode_all` in the run's folder.

    cooling: share of the minutes in which the learning rate falls.
    """
    if device_of(networks).type == "cpu":
        transformer.attention = attention
    if compiled:
        torch._dynamo.config.cache_size_limit = 64
        networks.compile_blocks()
    batches = Batches(run, sampler.words, device_of(networks), edited=sampler.edits)
    path = run / "transformer.safetensors"

    def loss(step: int) -> Tensor:
        batch = batches(step)
        features = networks.text(**batch.words)
        flow = flow_loss(networks, batch.latents, features, batch.references, batch.corner)
        shown = networks.shown(networks.hidden)
        loss = flow + SHOWN * shown_loss(shown, batch.things, batch.covered)
        if batch.references is not None and batch.references.shape[1] == 1:
            loss = loss + SHOWN * changed_loss(shown, batch.latents, batch.references[:, 0])
        if networks.text.near:
            loss = loss + NEIGHBOURS * neighbours_loss(
                networks.text, features.tokens, batch.words["t5"]
            )
        return loss

    trainer = TimedTrainer(
        networks,
        optimizers(networks, RATE, RATE / 3, EDGES),
        path,
        minutes,
        ema=0.999,
        cooling=cooling,
    )
    trainer.run(
        loss, every_minutes=8, sheet=lambda: sampler.sheet(networks, path.with_suffix(".png"))
    )
