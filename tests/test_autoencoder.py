"""flux.autoencoder against diffusers' AutoencoderKL and AutoencoderKLFlux2, live, with the same random weights.

Around diffusers' networks stands what its pipelines do to latents: packing, scaling, batch-norm statistics.
"""

from dataclasses import replace

import pytest
import torch
from reference import (
    autoencoder_to_diffusers,
    diffusers_autoencoder,
    diffusers_decode,
    diffusers_encode,
    loaded,
    max_error,
    randomise,
    shapes,
)
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder, AutoEncoderConfig, from_diffusers, pack, unpack
from flux.weights import load_module

FLUX1 = AutoEncoderConfig()
FLUX2 = AutoEncoderConfig(z_channels=32, scale_factor=None, shift_factor=None)
TINY = {
    "flux.1": replace(FLUX1, ch=32),
    "flux.2": replace(FLUX2, ch=32),
    "flux.2, small decoder": replace(FLUX2, ch=32, decoder_ch=24, norm_groups=8),
}
every_model = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())


def picture(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents(config: AutoEncoderConfig, batch: int, height: int, width: int) -> Tensor:
    return torch.randn(batch, config.latent_channels, height, width, generator=torch.Generator().manual_seed(0))


def reference(ours: AutoEncoder) -> nn.Module:
    return loaded(diffusers_autoencoder(ours.config), autoencoder_to_diffusers(ours.state_dict(), ours.config))


@every_model
@torch.no_grad()
def test_encode_equals_diffusers(config):
    """Their attention multiplies by Linears and ours by convolutions, which sum in another order."""
    ours, pixels = randomise(AutoEncoder(config)), picture(2, 48, 80)
    encoded, expected = ours.encode(pixels), diffusers_encode(reference(ours), pixels)
    assert encoded.shape == (2, config.latent_channels, 3, 5) and expected.std() > 0.1
    assert max_error(encoded, expected) <= 5e-6


@every_model
@torch.no_grad()
def test_decode_equals_diffusers(config):
    ours, given = randomise(AutoEncoder(config)), latents(config, 2, 3, 5)
    decoded, expected = ours.decode(given), diffusers_decode(reference(ours), given)
    assert decoded.shape == (2, 3, 48, 80) and expected.std() > 0.1
    assert max_error(decoded, expected) <= 5e-6


@pytest.mark.parametrize("side", [(16, 16), (32, 80), (48, 16)])
@every_model
@torch.no_grad()
def test_there_and_back_keeps_the_shape(config, side):
    ours, pixels = randomise(AutoEncoder(config)), picture(1, *side)
    assert ours.decode(ours.encode(pixels)).shape == pixels.shape


@every_model
@torch.no_grad()
def test_denormalise_undoes_normalise(config):
    ours, given = randomise(AutoEncoder(config)), latents(config, 2, 3, 5)
    assert max_error(ours.denormalise(given), given) > 0.1
    assert max_error(ours.normalise(ours.denormalise(given)), given) <= 2e-6


def test_pack_puts_a_square_into_channels_and_unpack_undoes_it():
    """Channel c·4 + row·2 + column."""
    x = torch.arange(2 * 3 * 4 * 6.0).reshape(2, 3, 4, 6)
    packed = pack(x)
    assert packed.shape == (2, 12, 2, 3)
    for c, row, column in ((0, 0, 1), (1, 1, 0), (2, 1, 1)):
        assert torch.equal(packed[:, 4 * c + 2 * row + column], x[:, c, row::2, column::2])
    assert torch.equal(unpack(packed), x)


@every_model
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(config):
    ours, pixels, given = randomise(AutoEncoder(config)), picture(2, 32, 48), latents(config, 2, 2, 3)
    encoded, decoded = ours.encode(pixels), ours.decode(given)
    for row in range(2):
        assert max_error(ours.encode(pixels[row : row + 1]), encoded[row : row + 1]) <= 5e-6
        assert max_error(ours.decode(given[row : row + 1]), decoded[row : row + 1]) <= 5e-6


@torch.no_grad()
def test_running_statistics_are_read_and_never_updated():
    ours = randomise(AutoEncoder(TINY["flux.2"])).train()
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    ours.decode(ours.encode(picture(2, 32, 32)))
    assert len(before) == 3 and all(torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers())


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [(FLUX1, 244, 83_819_683), (FLUX2, 251, 84_046_115), (replace(FLUX2, decoder_ch=96), 251, 62_373_091)],
    ids=["flux.1", "flux.2", "flux.2, small decoder"],
)
def test_full_size_tensors_equal_diffusers(config, tensors, parameters):
    with torch.device("meta"):
        module = AutoEncoder(config)
    ours, theirs = module.state_dict(), diffusers_autoencoder(config).state_dict()
    assert (len(ours), sum(parameter.numel() for parameter in module.parameters())) == (tensors, parameters)
    assert shapes(autoencoder_to_diffusers(ours, config)) == shapes(theirs)


@pytest.mark.parametrize("config", [FLUX1, FLUX2], ids=["flux.1", "flux.2"])
def test_every_name_of_diffusers_is_one_of_ours(config):
    with torch.device("meta"):
        ours = AutoEncoder(config).state_dict()
    theirs = diffusers_autoencoder(config).state_dict()
    names = {from_diffusers(name): tuple(tensor.shape) for name, tensor in theirs.items()}
    assert len(names) == len(theirs)
    attention = {name for name, tensor in ours.items() if ".attn_1." in name and tensor.ndim == 4}
    assert len(attention) == 8
    assert {name: shape + (1, 1) * (name in attention) for name, shape in names.items()} == shapes(ours)


@torch.no_grad()
def test_file_that_diffusers_saved_decodes_the_same(tmp_path):
    """The names alone could be a bijection and still exchange two tensors of one shape."""
    config = TINY["flux.2"]
    theirs = reference(randomise(AutoEncoder(config)))
    theirs.save_pretrained(tmp_path)
    with torch.device("meta"):
        ours = AutoEncoder(config)
    load_module(ours, [tmp_path / "diffusion_pytorch_model.safetensors"], rename=from_diffusers)
    given, pixels = latents(config, 1, 2, 3), picture(1, 32, 48)
    assert max_error(ours.decode(given), diffusers_decode(theirs, given)) <= 5e-6
    assert max_error(ours.encode(pixels), diffusers_encode(theirs, pixels)) <= 5e-6
