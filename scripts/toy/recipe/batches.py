"""Batches: images of one size, windows of them, or edits with equally many references.

Each time that an image is seen, its caption is written anew: other words, and others left out.
"""

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from flux import toy
from flux.training.checkpoint import load_tensors
from recipe.latents import EDITS, SCENES, edits, images, is_alone
from recipe.text import Tokenizer, Words

Text = Callable[[int, np.random.Generator], str]  # the caption of a row, or its instruction

BATCH = {0: 32, 1: 16, 2: 10}  # by the number of references: steps take about the same time
SHARE = {"edits-1": 0.15, "families": 0.2, "edits-2": 0.05}  # of the steps; the rest are of scenes
# rows and columns of tokens: for a word, one object, two, two
WINDOWS = np.array([(6, 14), (10, 10), (10, 16), (16, 10)])
WINDOWED = 0.6  # of the steps: the place of a thing is decided in whole images
STRANGE = 0.12  # of the captions of one thing are of what the world lacks
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

    def __init__(self, run: Path, words: Tokenizer, device: torch.device, edited: bool = True):
        shares = [SHARE[kind] for kind in EDITS] if edited else []
        scenes = [scene_file(run, width, height) for width, height in SCENES]
        numbers = np.array(list(map(len, scenes)), float)
        self.kinds = scenes + [edit_file(run, kind) for kind in EDITS if edited]
        self.odds = np.concatenate([(1 - sum(shares)) * numbers / numbers.sum(), shares])
        self.words, self.device = words, device

    def __call__(self, step: int) -> Batch:
        rng, device = np.random.default_rng((2, step)), self.device
        kind = self.kinds[rng.choice(len(self.kinds), p=self.odds)]
        rows, (top, left), (h, w) = kind.some(BATCH[kind.references], rng)
        empty = self.words([""])
        each = [empty if rng.random() < DROPPED else self.captioned(kind, row, rng) for row in rows]
        words = {name: torch.cat([x[name] for x in each]).to(device) for name in empty}
        images, tokens = kind.tensors["images"][rows], np.s_[top : top + h, left : left + w]
        latents, things, covered = (
            kind.tensors[name][images].to(device) for name in ("latents", "things", "covered")
        )
        latents = latents[..., *tokens].float()
        references = latents[:, 1:] if kind.references else None
        things, covered = things[..., *tokens].flatten(1), covered[..., *tokens, :].flatten(1, -2)
        return Batch(latents[:, 0], words, references, things, covered, (top, left))

    def captioned(self, kind: "LatentFile", row: int, rng: np.random.Generator) -> Words:
        """Return the words of a text of a row; rare words have many tokens, and may not fit."""
        return self.words.first_that_fits(kind.text(row, rng) for _ in itertools.count())


def scene_file(run: Path, width: int, height: int) -> "LatentFile":
    layouts = list(itertools.islice(images(width, height), SCENES[width, height]))
    path = run / f"latents-{width}x{height}.safetensors"
    return LatentFile(path, lambda row, rng: caption(layouts[row], rng))


def edit_file(run: Path, kind: str) -> "LatentFile":
    some = [edit for edit, _ in itertools.islice(edits(kind), EDITS[kind])]
    return LatentFile(run / f"{kind}.safetensors", lambda row, rng: toy.reworded(some[row], rng))


def caption(layout: toy.Layout, rng: np.random.Generator) -> str:
    """Return a new caption of a layout. None of the fixed open prompts is used."""
    while True:
        scene = toy.leave_open(toy.describe(layout), rng)
        if is_alone(scene) and rng.random() < STRANGE:
            return toy.strange(scene, rng)
        text = toy.worded(scene, rng)
        if toy.plain_words(text) not in toy.fixed_prompts():
            return text


class LatentFile:
    """All images of one size, or all edits of a kind."""

    def __init__(self, path: Path, text: Text):
        self.tensors, self.text = load_tensors(path), text
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
