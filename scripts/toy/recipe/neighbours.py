"""Pretrain T5: its tokens learn their neighbours. (FLUX.1's T5 is pretrained by filling gaps.)"""

import itertools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from recipe.batches import caption
from recipe.latents import images
from recipe.networks import EDGES, RATE
from recipe.text import NEAR, TextEncoder, Tokenizer
from recipe.trainer import TimedTrainer, device_of, optimizers

CAPTIONS = 64  # a step


def train_neighbours(run: Path, text: TextEncoder, words: Tokenizer, minutes: float) -> None:
    """Train T5 on captions as `Batches` writes them."""
    device, model = device_of(text), nn.ModuleDict({"t5": text.t5, "near": text.near})
    layouts = list(itertools.islice(images(256, 256), 4000))

    def loss(step: int) -> Tensor:
        rng = np.random.default_rng((4, step))
        some = (layouts[rng.integers(len(layouts))] for _ in itertools.count())
        captions = (caption(layout, rng) for layout in some)
        each = [words.first_that_fits(captions)["t5"] for _ in range(CAPTIONS)]
        ids = torch.cat(each).to(device)
        return neighbours_loss(text, text.t5(ids), ids)

    trainer = TimedTrainer(
        model,
        optimizers(model, RATE, RATE / 3, EDGES),
        run / "neighbours.safetensors",
        minutes,
        ema=0.99,
    )
    trainer.run(loss)


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
