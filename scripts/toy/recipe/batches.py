"""Batches: images of one size, windows of them, or edits with equally many references."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux.training.checkpoint import load_tensors
from recipe.latents import EDITS, SCENES
from recipe.text import Words

BATCH = {0: 32, 1: 16, 2: 10}  # by the number of references: steps take about the same time
SHARE = {"edits-1": 0.2, "families": 0.3, "edits-2": 0.05}  # of the steps; the rest are of scenes
# rows and columns of tokens: for a word, one object, two, two
WINDOWS = np.array([(6, 14), (10, 10), (10, 16), (16, 10)])
WINDOWED = 0.85  # of the steps
DROPPED = 0.1  # of the captions: guidance needs predictions without a caption


class Batch(NamedTuple):
    latents: Tensor  # (B, C, h, w)
    words: Words  # (B, T) each
    references: Tensor | None  # the images before an edit, (B, R, C, h, w)
    things: Tensor  # of the tokens of the image and then of the references, (B, L + R)
    covered: Tensor  # the share of their parts that is covered, (B, L + R, 16)
    corner: tuple[int, int] = (0, 0)  # row and column of the first token in its image


class Batches:
    """Batches by their number. A share DROPPED of the captions is replaced by `empty`.

    Most batches are windows of images around their things: the background is most of the
    computation, and teaches little. Tokens keep their coordinates. `edited`: with edits.
    """

    def __init__(self, run: Path, empty: Words, edited: bool = True):
        shares = [SHARE[kind] for kind in EDITS] if edited else []
        scenes = [
            LatentFile(run / f"latents-{width}x{height}.safetensors") for width, height in SCENES
        ]
        sizes = np.array(list(map(len, scenes)), float)
        self.kinds = scenes + [LatentFile(run / f"{kind}.safetensors") for kind in EDITS if edited]
        self.odds = np.concatenate([(1 - sum(shares)) * sizes / sizes.sum(), shares])
        self.empty = empty

    def __call__(self, step: int) -> Batch:
        rng, device = np.random.default_rng((2, step)), next(iter(self.empty.values())).device
        kind = self.kinds[rng.choice(len(self.kinds), p=self.odds)]
        rows, (top, left), (h, w) = kind.some(BATCH[kind.references], rng)
        drop = torch.from_numpy(rng.random(len(rows)) < DROPPED)[:, None].to(device)
        words = {
            name: torch.where(drop, empty, kind.tensors[name][rows].to(device))
            for name, empty in self.empty.items()
        }
        images, tokens = kind.tensors["images"][rows], np.s_[top : top + h, left : left + w]
        latents, things, covered = (
            kind.tensors[name][images].to(device) for name in ("latents", "things", "covered")
        )
        latents = latents[..., *tokens].float()
        references = latents[:, 1:] if kind.references else None
        things, covered = things[..., *tokens].flatten(1), covered[..., *tokens, :].flatten(1, -2)
        return Batch(latents[:, 0], words, references, things, covered, (top, left))


class LatentFile:
    """All images of one size, or all edits of a kind."""

    def __init__(self, path: Path):
        self.tensors = load_tensors(path)
        self.sides = np.array(self.tensors["latents"].shape[-2:])
        self.references = self.tensors["images"].shape[1] - 1
        boxes = self.tensors["boxes"].numpy()[self.tensors["images"].numpy()]  # (N, 1 + R, 4)
        self.boxes = np.concatenate([boxes[..., :2].min(1), boxes[..., 2:].max(1)], -1)
        # two tokens to spare, where possible: a window must not reveal the position of its things
        sizes = np.minimum(self.boxes[:, 2:] - self.boxes[:, :2] + 2, self.sides)
        fits = (sizes[:, None] <= WINDOWS).all(-1) & (WINDOWS <= self.sides).all(-1)  # (N, windows)
        self.kinds = np.where(fits.any(1), fits.argmax(1), -1)

    def __len__(self) -> int:
        return len(self.boxes)

    def some(
        self, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Draw rows, and the corner and size of a window that holds all their things."""
        one = rng.integers(len(self))
        kind, first, behind = self.kinds[one], self.boxes[one, :2], self.boxes[one, 2:]
        if kind < 0 or rng.random() > WINDOWED:
            return rng.integers(0, len(self), count), (0, 0), tuple(self.sides)
        corner = rng.integers(
            np.maximum(behind - WINDOWS[kind], 0), np.minimum(first, self.sides - WINDOWS[kind]) + 1
        )
        end = corner + WINDOWS[kind]
        inside = (self.boxes[:, :2] >= corner).all(1) & (self.boxes[:, 2:] <= end).all(1)
        rows = rng.choice(np.flatnonzero(inside & (self.kinds == kind)), count)
        return rows, tuple(corner.tolist()), tuple(WINDOWS[kind])
