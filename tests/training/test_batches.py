"""flux.training.batches: batches as functions of their number."""

import numpy as np
import pytest
import torch
from PIL import Image

import flux
from flux.training import batches, dataset
from flux.training.checkpoint import load_tensors
from flux.training.dataset import Sample


def test_epoch_batches_hold_all_samples_in_batches_of_one_shape():
    shapes = ["wide"] * 5 + ["tall"] * 3 + ["square"]
    epochs = [batches.epoch_batches(shapes, 2, seed=4, epoch=epoch) for epoch in range(3)]
    for epoch in epochs:
        assert {row for batch in epoch for row in batch} == set(range(9))
        assert all(len(batch) == 2 and len({shapes[row] for row in batch}) == 1 for batch in epoch)
        assert len(epoch) == 3 + 2 + 1
    assert epochs[0] != epochs[1] != epochs[2]
    assert epochs[1] == batches.epoch_batches(shapes, 2, seed=4, epoch=1)
    assert epochs[1] != batches.epoch_batches(shapes, 2, seed=5, epoch=1)


@pytest.fixture(scope="module")
def sampler(tmp_path_factory):
    """Three images of one size and one of another; half of the captions are dropped."""
    folder, rng = tmp_path_factory.mktemp("sampler"), np.random.default_rng(0)
    cache = dataset.Cache(folder / "cache", flux.load(device="cpu"), 64)
    cached = []
    for number, (width, height) in enumerate([(64, 64)] * 3 + [(96, 64)]):
        path = folder / f"{number}.png"
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)
        cached.append(cache.sample(Sample(path, f"a {number}")))
    return batches.BatchSampler(cached, 2, 7, 4, cache.features(""), 0.5)


def test_batch_depends_on_its_number_only(sampler):
    batch, normal, noise = sampler(5)
    torch.manual_seed(99)
    fresh = batches.BatchSampler(sampler.samples, 2, 7, 4, sampler.empty, 0.5)
    batch_again, normal_again, noise_again = fresh(5)
    assert torch.equal(batch.latents, batch_again.latents)
    assert torch.equal(batch.features.tokens, batch_again.features.tokens)
    assert torch.equal(normal, normal_again) and torch.equal(noise, noise_again)
    _, other_normal, other_noise = sampler(6)
    assert not torch.equal(normal, other_normal)
    assert noise.shape != other_noise.shape or not torch.equal(noise, other_noise)


def test_caption_dropout_replaces_the_requested_share(sampler):
    empty = load_tensors(sampler.empty)["tokens"]

    def dropped(sampler: batches.BatchSampler, count: int) -> list[bool]:
        rows = [row for n in range(count) for row in sampler(n)[0].features.tokens]
        return [torch.equal(row, empty) for row in rows]

    half = dropped(sampler, 100)
    assert len(half) == 200 and 70 <= sum(half) <= 130  # four standard deviations
    never = batches.BatchSampler(sampler.samples, 2, 7, 4, sampler.empty, 0.0)
    assert not any(dropped(never, 20))
    assert torch.equal(sampler.empty_features().tokens[0], empty)
