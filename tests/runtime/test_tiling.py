"""flux.runtime.tiling: images that are decoded in tiles."""

import pytest
import torch
from support.autoencoders import FLUX2, TINY, random_latents
from support.load_script import script

import flux
from flux.autoencoder import AutoEncoder
from flux.errors import UserError
from flux.parity.reference import randomise
from flux.runtime.tiling import decode_tiled, tiles


def test_tiles_overlap_as_requested_and_their_weights_sum_to_one():
    for size, tile_size, overlap in (
        (1, 8, 3), (8, 8, 3), (9, 8, 3), (8, 9, 8), (31, 8, 7), (40, 8, 4), (64, 24, 1)
    ):  # fmt: skip
        total, ends = torch.zeros(16 * size), []
        made = tiles(size, tile_size, overlap)
        for start, weights in made:
            assert len(weights) == 16 * min(tile_size, size) and weights.min() >= 0
            assert all(end - start >= overlap for end in ends[-1:])
            total[16 * start : 16 * (start + tile_size)] += weights
            ends.append(start + min(tile_size, size))
        assert made[0][0] == 0 and ends[-1] == size
        assert (total - 1).abs().max() <= 2e-7
        assert (len(made) == 1) == (size <= tile_size)


@torch.no_grad()
def test_one_tile_equals_decode_to_the_bit():
    ours = randomise(AutoEncoder(TINY["flux.2"]))
    latents = random_latents(ours.config, 2, 3, 5)
    for tile_size in (5, 64):
        assert torch.equal(decode_tiled(ours, latents, tile_size, 2), ours.decode(latents))
    assert decode_tiled(ours, latents, 3, 1).shape == (2, 3, 48, 80)


def test_impossible_overlap_is_refused():
    for tile_size, overlap in ((8, 0), (8, 8), (8, -1), (0, 0)):
        with pytest.raises(UserError, match=rf"overlap: .*got {overlap} of {tile_size} latents"):
            decode_tiled(None, torch.zeros(1, 128, 4, 4), tile_size, overlap)


@pytest.mark.slow
@torch.inference_mode()
def test_tiles_leave_no_seams():
    """Hold the error of the trained toy: no larger at tile borders than elsewhere.

    Without blending, the error grows 9 times as fast there. Errors of a range of 2: 0.093 in tiles
    of 8 latents, 0.064 in 12, 0.049 in 16.
    """
    ours = flux.load(device="cpu").autoencoder()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 384), torch.linspace(-1, 1, 384), indexing="ij")
    latents = ours.encode(torch.stack([x, y, torch.sin(4 * (x + y))])[None])
    decoded = ours.decode(latents)
    errors = [decode_tiled(ours, latents, *tile) - decoded for tile in ((8, 4), (12, 4), (16, 8))]
    large, medium, small = (error.square().mean().sqrt() for error in errors)
    assert 0.11 > large > medium > small > 0.01
    steps = errors[0].diff(dim=3).abs().mean((0, 1, 2))  # (383,) at each column
    seams = []
    for start, _ in tiles(24, 8, 4):
        seams += [16 * n - 1 for n in (start, start + 8) if 0 < n < 24]
    assert len(seams) >= 8 and steps[seams].mean() <= 1.5 * steps.mean()


@pytest.mark.slow
def test_memory_of_tiles_is_that_of_one():
    peak_bytes = script("benchmarks/measure").peak_bytes
    with torch.device("meta"):
        ours = AutoEncoder(FLUX2).bfloat16()
        latents = torch.empty(1, 128, 96, 96, dtype=torch.bfloat16)
    one = peak_bytes(lambda: ours.decode(latents[:, :, :32, :32]))
    canvas = 3 * 4 * (16 * 96) ** 2
    assert peak_bytes(lambda: decode_tiled(ours, latents, 32, 8)) <= one + 2 * canvas
