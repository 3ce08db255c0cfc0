"""What a step learns from: images of one size, windows of them, or edits of as many images."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux.training.checkpoint import load_tensors
from recipe.latents import EDITS, SCENES
from recipe.text import Words

BATCH = {0: 32, 1: 16, 2: 10}  # by the number of references: so that steps take much the same time
SHARE = {"edits-1": 0.2, "families": 0.3, "edits-2": 0.05}  # of the steps; the rest are of scenes
WINDOWS = np.array(
    [(6, 14), (10, 10), (10, 16), (16, 10)]
)  # rows and columns of tokens: for a word, one object, two, two
WINDOWED = 0.85  # of the steps
DROPPED = 0.1  # of the captions: what guidance is away from is learnt of these


class Batch(NamedTuple):
    latents: Tensor  # (B, C, h, w)
    words: Words  # (B, T) each
    references: Tensor | None  # of edits, the images before, (B, R, C, h, w)
    things: Tensor  # what the tokens of the image and then of the references show, (B, L + R)
    covered: Tensor  # and how much of their parts, (B, L + R, 16)
    corner: tuple[int, int] = (0, 0)  # row and column of the first token in its image


class Batches:
    """By their number. A share DROPPED of the captions is left out, `empty` in their place.

    Mostly only a window of images is learnt from, around all that is in them: there is little to learn of the background, and
    it is most of what would be computed. Tokens keep their coordinates. Without `edited`, there are no edits.
    """

    def __init__(self, run: Path, empty: Words, edited: bool = True):
        shares = [SHARE[kind] for kind in EDITS] if edited else []
        scenes = [Images(run / f"latents-{width}x{height}.safetensors") for width, height in SCENES]
        sizes = np.array(list(map(len, scenes)), float)
        self.kinds = scenes + [Images(run / f"{kind}.safetensors") for kind in EDITS if edited]
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


class Images:
    """All of one size, or all edits of a kind."""

    def __init__(self, path: Path):
        self.tensors = load_tensors(path)
        self.sides = np.array(self.tensors["latents"].shape[-2:])
        self.references = self.tensors["images"].shape[1] - 1
        boxes = self.tensors["boxes"].numpy()[self.tensors["images"].numpy()]  # (N, 1 + R, 4)
        self.boxes = np.concatenate([boxes[..., :2].min(1), boxes[..., 2:].max(1)], -1)
        # There are two tokens to spare, if the image has as many: a window must not tell where in it things are.
        sizes = np.minimum(self.boxes[:, 2:] - self.boxes[:, :2] + 2, self.sides)
        fits = (sizes[:, None] <= WINDOWS).all(-1) & (WINDOWS <= self.sides).all(-1)  # (N, windows)
        self.kinds = np.where(fits.any(1), fits.argmax(1), -1)

    def __len__(self) -> int:
        return len(self.boxes)

    def some(
        self, count: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, tuple[int, int], tuple[int, int]]:
        """Rows, the corner of the window in which all that they show is, and its size; or of no window."""
        one = rng.integers(len(self))
        kind, first, behind = self.kinds[one], self.boxes[one, :2], self.boxes[one, 2:]
        if kind < 0 or rng.random() > WINDOWED:
            return rng.integers(0, len(self), count), (0, 0), tuple(self.sides)
        corner = rng.integers(
            np.maximum(behind - WINDOWS[kind], 0), np.minimum(first, self.sides - WINDOWS[kind]) + 1
        )
        inside = (self.boxes[:, :2] >= corner).all(1) & (
            self.boxes[:, 2:] <= corner + WINDOWS[kind]
        ).all(1)
        return (
            rng.choice(np.flatnonzero(inside & (self.kinds == kind)), count),
            tuple(corner.tolist()),
            tuple(WINDOWS[kind]),
        )
