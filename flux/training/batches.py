"""Batches of cached samples, as functions of their number and the seed of the run."""

from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from flux import conditioning
from flux.text_encoder import TextFeatures
from flux.training.dataset import CachedSample, load_cached, text_tokens
from flux.training.loss import Batch, seeded_generator


def collate(samples: Sequence[CachedSample], axes: int, flux3: bool = False) -> Batch:
    """Load samples of one shape as a batch.

    axes: number of position coordinates. flux3: number the references as FLUX 3 does.
    """
    latents = torch.stack([load_cached(s.latents)["latents"] for s in samples])
    batch = Batch(latents, load_features(samples), channels=load_channels(samples))
    references = [load_references(s, axes, flux3) for s in samples if s.references]
    if not references:
        return batch
    tokens = torch.cat([tokens for tokens, _ in references])
    return batch._replace(references=tokens, reference_ids=references[0][1])


def load_features(samples: Sequence[CachedSample]) -> TextFeatures:
    """Load the text features: (B, T, D) and, for FLUX.1, the pooled (B, V)."""
    texts = [load_cached(s.features) for s in samples]
    pooled = torch.stack([x["pooled"] for x in texts]) if "pooled" in texts[0] else None
    return TextFeatures(torch.stack([x["tokens"] for x in texts]), pooled)


def load_channels(samples: Sequence[CachedSample]) -> Tensor | None:
    """Load the extra input channels (B, L, C') of Fill, Canny and Depth."""
    files = [s.channels for s in samples if s.channels]
    return torch.stack([load_cached(file)["channels"] for file in files]) if files else None


def load_references(sample: CachedSample, axes: int, flux3: bool = False) -> tuple[Tensor, Tensor]:
    """Load the tokens (1, R, C) and ids (R, axes) of the references of a sample that has any."""
    latents = [load_cached(file)["latents"][None] for file in sample.references]
    return conditioning.reference_tokens(latents, axes, flux3)


def epoch_batches(
    shapes: Sequence[Hashable], batch_size: int, seed: int, epoch: int
) -> list[list[int]]:
    """Return the sample numbers of each batch of an epoch. Samples of a batch have one shape.

    Every sample is there. The last batch of a shape is filled up with the first samples of the
    shape.
    """
    generator = seeded_generator(seed, epoch)
    by_shape = defaultdict(list)
    for number in torch.randperm(len(shapes), generator=generator).tolist():
        by_shape[shapes[number]].append(number)
    batches = []
    for numbers in by_shape.values():
        for start in range(0, len(numbers), batch_size):
            rows = range(start, start + batch_size)
            batches.append([numbers[row % len(numbers)] for row in rows])
    return [batches[k] for k in torch.randperm(len(batches), generator=generator).tolist()]


@dataclass
class BatchSampler:
    """`sampler(n)` returns batch n = 0, 1, ... of a run, a function of n and the seed only.

    Captions of a batch have one length, in tokens. If the empty caption has another length, as in
    FLUX 3, all captions of a batch are dropped or none.
    """

    samples: Sequence[CachedSample]
    batch_size: int
    seed: int
    axes: int  # number of position coordinates
    empty: Path  # cached features of the empty caption
    caption_dropout: float = 0.0  # share of captions replaced by `empty`, for CFG
    flux3: bool = False  # number the references as FLUX 3 does
    _epoch: tuple[int, list[list[int]]] = (-1, [])  # the last epoch, and its batches

    def __call__(self, number: int) -> tuple[Batch, Tensor, Tensor]:
        """Return a batch, normal numbers (B,) for its times, and its noise (B, C, h, w)."""
        epoch, place = divmod(number, self.batches_per_epoch)
        samples = [self.samples[row] for row in self._batches(epoch)[place]]
        generator = seeded_generator(self.seed, number, 0)
        draws = torch.rand(self.batch_size, generator=generator)
        if self.caption_dropout and samples[0].text_tokens != self.empty_tokens:
            draws = draws[:1].expand(self.batch_size)
        for row in (draws < self.caption_dropout).nonzero().flatten().tolist():
            samples[row] = samples[row]._replace(features=self.empty)
        batch = collate(samples, self.axes, self.flux3)
        normal = torch.randn(self.batch_size, generator=generator)
        noise = torch.randn(batch.latents.shape, generator=generator)
        return batch, normal, noise

    @cached_property
    def batches_per_epoch(self) -> int:
        return len(self._batches(0))

    @cached_property
    def empty_tokens(self) -> int:
        """The text tokens of the empty caption."""
        return text_tokens(self.empty)

    def _batches(self, epoch: int) -> list[list[int]]:
        if self._epoch[0] != epoch:
            shapes = [(sample.shape, sample.text_tokens) for sample in self.samples]
            self._epoch = epoch, epoch_batches(shapes, self.batch_size, self.seed, epoch)
        return self._epoch[1]

    def empty_features(self) -> TextFeatures:
        """Return the text features (1, ...) of the empty caption."""
        return load_features([self.samples[0]._replace(features=self.empty)])
