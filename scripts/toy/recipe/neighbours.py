"""Pretrain T5: its tokens learn their neighbours. (FLUX.1's T5 is pretrained by filling gaps.)"""

import math
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors import safe_open
from torch import Tensor, nn

from recipe.latents import SCENES
from recipe.networks import EDGES, RATE
from recipe.text import NEAR, TextEncoder
from recipe.trainer import TimedTrainer, device_of, optimizers

CAPTIONS = 64  # a step


def train_neighbours(run: Path, text: TextEncoder, minutes: float) -> None:
    """Train T5 on the captions in the files of `encode_all`."""
    ids = torch.cat(
        [captions(run / f"latents-{width}x{height}.safetensors") for width, height in SCENES]
    )
    device, model = device_of(text), nn.ModuleDict({"t5": text.t5, "near": text.near})

    def loss(step: int) -> Tensor:
        some = ids[torch.randint(len(ids), (CAPTIONS,))].to(device)
        return neighbours_loss(text, text.t5(some), some)

    trainer = TimedTrainer(
        model,
        optimizers(model, RATE, RATE / 3, EDGES),
        run / "neighbours.safetensors",
        minutes,
        ema=0.99,
    )
    trainer.run(loss)


def captions(path: Path) -> Tensor:
    """Return T5's ids (N, T). The latents in the same file are some hundred megabytes."""
    with safe_open(path, framework="pt") as file:
        return file.get_tensor("t5")


def neighbours_loss(text: TextEncoder, tokens: Tensor, ids: Tensor) -> Tensor:
    """Return the cross-entropy, in nats, of predicting the tokens at the distances NEAR.

    tokens: last hidden states (B, T, D) of the ids (B, T). Pads do not count.

    FLUX.1's transformer does not know the position of a text token: which letter is the first, or
    what is red, is only in the token itself. Velocities alone take thousands of steps to teach T5
    that tokens have an order.
    """
    table, reach = text.t5.shared.weight.detach(), max(NEAR)  # training the table gains nothing
    windows = F.pad(ids, (reach, reach)).unfold(1, 2 * reach + 1, 1)  # (B, T, 2 reach + 1)
    windows = windows[..., [reach + offset for offset in NEAR]]  # (B, T, n)
    windows = windows.masked_fill((ids == 0)[..., None], -100)  # which cross_entropy leaves out
    predicted = rearrange(text.near(tokens), "b t (n d) -> (b t n) d", n=len(NEAR))
    logits = (predicted @ table.to(predicted.dtype).T).float()  # (B T n, vocabulary)
    return F.cross_entropy(logits / math.sqrt(table.shape[1]), windows.flatten())
