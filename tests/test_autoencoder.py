"""flux.autoencoder against diffusers' AutoencoderKL and AutoencoderKLFlux2, live, to the bit.

Both have the same random weights. The reference adds what diffusers' pipelines do to latents.
"""

import pytest
import torch
from support.autoencoders import FLUX1, FLUX2, SMALL_DECODER, TINY, random_latents, random_pixels
from torch import nn

from flux.autoencoder import AutoEncoder, pack, unpack
from flux.parity.reference import (
    autoencoder_to_diffusers,
    diffusers_autoencoder,
    diffusers_decode,
    diffusers_encode,
    loaded,
    max_error,
    randomise,
    shapes,
)
from flux.weights.diffusers_names import from_diffusers
from flux.weights.load import load_module

SIZES = [(1, 1), (2, 3), (5, 3), (8, 4)]  # height and width in latents
every_model = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())
every_full_size = pytest.mark.parametrize(
    "config", [FLUX1, FLUX2, SMALL_DECODER], ids=["flux.1", "flux.2", "small decoder"]
)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


def reference(ours: AutoEncoder) -> nn.Module:
    state = autoencoder_to_diffusers(ours.state_dict(), ours.config)
    return loaded(diffusers_autoencoder(ours.config), state)


@every_dtype
@every_model
@torch.no_grad()
def test_encode_equals_diffusers_to_the_bit(config, dtype):
    ours = randomise(AutoEncoder(config)).to(dtype)
    theirs = reference(ours)
    for batch in (1, 2):
        for h, w in SIZES:
            pixels = random_pixels(batch, 16 * h, 16 * w).to(dtype)
            encoded = ours.encode(pixels)
            assert encoded.dtype == dtype
            assert encoded.shape == (batch, config.latent_channels, h, w)
            assert torch.equal(encoded, diffusers_encode(theirs, pixels))


@every_dtype
@every_model
@torch.no_grad()
def test_decode_equals_diffusers_to_the_bit(config, dtype):
    ours = randomise(AutoEncoder(config)).to(dtype)
    theirs = reference(ours)
    for batch in (1, 2):
        for h, w in SIZES:
            latents = random_latents(config, batch, h, w).to(dtype)
            decoded = ours.decode(latents)
            assert decoded.dtype == dtype
            assert decoded.shape == (batch, 3, 16 * h, 16 * w)
            assert decoded.float().std() > 0.1
            assert torch.equal(decoded, diffusers_decode(theirs, latents))


@pytest.mark.slow
@every_full_size
@torch.no_grad()
def test_full_width_equals_diffusers_to_the_bit(config):
    ours = randomise(AutoEncoder(config))
    for dtype in (torch.float32, torch.bfloat16):
        theirs = reference(ours.to(dtype))
        pixels, latents = random_pixels(1, 48, 32), random_latents(config, 2, 3, 2)
        pixels, latents = pixels.to(dtype), latents.to(dtype)
        assert torch.equal(ours.encode(pixels), diffusers_encode(theirs, pixels))
        assert torch.equal(ours.decode(latents), diffusers_decode(theirs, latents))


@every_model
@torch.no_grad()
def test_denormalise_undoes_normalise(config):
    ours, latents = randomise(AutoEncoder(config)), random_latents(config, 2, 3, 5)
    assert max_error(ours.denormalise(latents), latents) > 0.1
    assert max_error(ours.normalise(ours.denormalise(latents)), latents) <= 2e-6


def test_pack_moves_patches_into_channels_and_unpack_undoes_it():
    """Channel c·4 + row·2 + column."""
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    packed = pack(x)
    assert packed.shape == (2, 12, 2, 3)
    for c, row, column in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        assert torch.equal(packed[:, 4 * c + 2 * row + column], x[:, c, row::2, column::2])
    assert torch.equal(unpack(packed), x)


@torch.no_grad()
def test_running_statistics_are_never_updated():
    ours = randomise(AutoEncoder(TINY["flux.2"])).train()
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    ours.decode(ours.encode(random_pixels(2, 32, 32)))
    assert len(before) == 3
    for name, buffer in ours.named_buffers():
        assert torch.equal(buffer, before[name]), name


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [(FLUX1, 244, 83_819_683), (FLUX2, 251, 84_046_115), (SMALL_DECODER, 251, 62_373_091)],
    ids=["flux.1", "flux.2", "small decoder"],
)
def test_full_size_tensors_equal_diffusers(config, tensors, parameters):
    with torch.device("meta"):
        module = AutoEncoder(config)
    ours, theirs = module.state_dict(), diffusers_autoencoder(config).state_dict()
    assert len(ours) == tensors
    assert sum(parameter.numel() for parameter in module.parameters()) == parameters
    assert shapes(autoencoder_to_diffusers(ours, config)) == shapes(theirs)


@pytest.mark.parametrize("config", [FLUX1, FLUX2], ids=["flux.1", "flux.2"])
def test_every_diffusers_name_maps_to_ours(config):
    with torch.device("meta"):
        ours = AutoEncoder(config).state_dict()
    theirs = diffusers_autoencoder(config).state_dict()
    names = {from_diffusers(name): tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(names) == len(theirs)
    attention = {name for name, tensor in ours.items() if ".attn_1." in name and tensor.ndim == 4}
    assert len(attention) == 8
    for name in attention:  # Linears there, 1x1 convolutions here
        names[name] += (1, 1)
    assert names == shapes(ours)


@torch.no_grad()
def test_file_saved_by_diffusers_gives_the_same_images(tmp_path):
    """A map of names alone could still exchange two tensors of one shape."""
    config = TINY["flux.2"]
    theirs = reference(randomise(AutoEncoder(config)))
    theirs.save_pretrained(tmp_path)
    with torch.device("meta"):
        ours = AutoEncoder(config)
    load_module(ours, [tmp_path / "diffusion_pytorch_model.safetensors"], rename=from_diffusers)
    latents, pixels = random_latents(config, 1, 2, 3), random_pixels(1, 32, 48)
    assert torch.equal(ours.decode(latents), diffusers_decode(theirs, latents))
    assert torch.equal(ours.encode(pixels), diffusers_encode(theirs, pixels))


@every_model
def test_gradients_equal_diffusers(config):
    ours = randomise(AutoEncoder(config)).requires_grad_(True)
    theirs = reference(ours).requires_grad_(True)
    latents, target = random_latents(config, 2, 2, 3), random_pixels(2, 32, 48)
    (ours.decode(latents) - target).square().mean().backward()
    (diffusers_decode(theirs, latents) - target).square().mean().backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    translated = autoencoder_to_diffusers(grads, config)
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    assert translated.keys() == expected.keys() and len(grads) > 100
    # some gradients, such as that of the keys' bias, are 0 but for rounding
    largest = max(grad.abs().max() for grad in expected.values())
    for name, grad in expected.items():
        assert (translated[name] - grad).abs().max() <= 2e-6 * largest, name
