"""flux.autoencoder against diffusers' AutoencoderKL and AutoencoderKLFlux2, live, with the same random weights.

Around diffusers' networks stands what its pipelines do to latents: packing, scaling, batch-norm statistics.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from support.load_script import script
from torch import Tensor, nn

import flux
from flux import autoencoder
from flux.autoencoder import AutoEncoder, AutoEncoderConfig, pack, tiles, unpack
from flux.errors import UserError
from flux.parity.hooks import watching
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

FLUX1 = AutoEncoderConfig()
FLUX2 = AutoEncoderConfig(z_channels=32, scale_factor=None, shift_factor=None)
TINY = {
    "flux.1": replace(FLUX1, ch=32),
    "flux.2": replace(FLUX2, ch=32),
    "flux.2, small decoder": replace(FLUX2, ch=32, decoder_ch=24, norm_groups=8),
}
either_order = pytest.mark.parametrize(
    "order", [torch.contiguous_format, torch.channels_last], ids=["nchw", "nhwc"]
)
every_model = pytest.mark.parametrize("config", TINY.values(), ids=TINY.keys())


def picture(batch: int, height: int, width: int) -> Tensor:
    return torch.rand(batch, 3, height, width, generator=torch.Generator().manual_seed(0)) * 2 - 1


def latents(config: AutoEncoderConfig, batch: int, height: int, width: int) -> Tensor:
    return torch.randn(
        batch, config.latent_channels, height, width, generator=torch.Generator().manual_seed(0)
    )


def reference(ours: AutoEncoder) -> nn.Module:
    return loaded(
        diffusers_autoencoder(ours.config), autoencoder_to_diffusers(ours.state_dict(), ours.config)
    )


@either_order
@every_model
@torch.no_grad()
def test_encode_equals_diffusers(config, order):
    """Their attention multiplies by Linears and ours by convolutions, which sum in another order."""
    ours, pixels = randomise(AutoEncoder(config)).to(memory_format=order), picture(2, 48, 80)
    encoded, expected = ours.encode(pixels), diffusers_encode(reference(ours), pixels)
    assert encoded.shape == (2, config.latent_channels, 3, 5) and expected.std() > 0.1
    assert max_error(encoded, expected) <= 5e-6


@either_order
@every_model
@torch.no_grad()
def test_decode_equals_diffusers(config, order):
    """In channels_last, group norm and convolutions sum in another order: seen are 2e-6, and 1e-6 without."""
    ours, given = randomise(AutoEncoder(config)).to(memory_format=order), latents(config, 2, 3, 5)
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


@either_order
@every_model
@torch.no_grad()
def test_a_picture_does_not_depend_on_its_batch(config, order):
    """To the bit, whatever the others are."""
    ours = randomise(AutoEncoder(config)).to(memory_format=order)
    pixels, given = picture(3, 32, 48), latents(config, 3, 2, 3)
    encoded, decoded = ours.encode(pixels), ours.decode(given)
    for row in range(3):
        assert torch.equal(ours.encode(pixels[row : row + 1]), encoded[row : row + 1])
        assert torch.equal(ours.decode(given[row : row + 1]), decoded[row : row + 1])


@torch.no_grad()
def test_running_statistics_are_read_and_never_updated():
    ours = randomise(AutoEncoder(TINY["flux.2"])).train()
    before = {name: buffer.clone() for name, buffer in ours.named_buffers()}
    ours.decode(ours.encode(picture(2, 32, 32)))
    assert len(before) == 3 and all(
        torch.equal(buffer, before[name]) for name, buffer in ours.named_buffers()
    )


@pytest.mark.parametrize(
    "config, tensors, parameters",
    [
        (FLUX1, 244, 83_819_683),
        (FLUX2, 251, 84_046_115),
        (replace(FLUX2, decoder_ch=96), 251, 62_373_091),
    ],
    ids=["flux.1", "flux.2", "flux.2, small decoder"],
)
def test_full_size_tensors_equal_diffusers(config, tensors, parameters):
    with torch.device("meta"):
        module = AutoEncoder(config)
    ours, theirs = module.state_dict(), diffusers_autoencoder(config).state_dict()
    assert (len(ours), sum(parameter.numel() for parameter in module.parameters())) == (
        tensors,
        parameters,
    )
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
    assert {name: shape + (1, 1) * (name in attention) for name, shape in names.items()} == shapes(
        ours
    )


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


@either_order
@pytest.mark.parametrize("size", [(1, 1), (5, 4)])
@torch.enable_grad()
def test_upsampled_convolution_is_that_of_the_nearest_neighbours(size, order):
    """And so are its gradients; here in float64."""
    conv = (
        randomise(autoencoder.FusedUpsampleConv(6, 6, 3, padding=1))
        .double()
        .to(memory_format=order)
        .requires_grad_(True)
    )
    x = torch.randn(
        2,
        6,
        *size,
        dtype=torch.float64,
        generator=torch.Generator().manual_seed(0),
        requires_grad=True,
    )
    by_hand = F.conv2d(
        x.repeat_interleave(2, 2).repeat_interleave(2, 3), conv.weight, conv.bias, padding=1
    )
    assert max_error(conv(x), by_hand) <= 1e-14
    back = torch.randn(
        by_hand.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)
    )
    given = x, conv.weight, conv.bias
    for ours, expected in zip(
        torch.autograd.grad(conv(x), given, back),
        torch.autograd.grad(by_hand, given, back),
        strict=True,
    ):
        assert max_error(ours, expected) <= 1e-14


# ---------------------------------------------------------------------------------------------------------- memory


@pytest.fixture(scope="module")
def measure():
    return script("benchmarks/measure")


@pytest.mark.parametrize(
    "config",
    [FLUX1, FLUX2, replace(FLUX2, decoder_ch=96)],
    ids=["flux.1", "flux.2", "small decoder"],
)
def test_decoding_takes_two_thirds_of_the_memory_of_diffusers(config, measure):
    """At full size and 512x512 in bfloat16, counted without weights. Four pictures take what one does, and their pixels.

    1537 bytes a pixel in diffusers: three tensors of 256 channels. Two are enough; the rest is latents and stripes.
    """
    with torch.device("meta"):
        ours = AutoEncoder(config).bfloat16().to(memory_format=torch.channels_last)
        given = torch.empty(4, config.latent_channels, 32, 32, dtype=torch.bfloat16)
    theirs = diffusers_autoencoder(config).bfloat16()
    one, four = (measure.peak_bytes(lambda n=n: ours.decode(given[:n])) for n in (1, 4))
    assert one <= 0.67 * measure.peak_bytes(lambda: theirs.decode(unpack(given[:1])).sample)
    assert four <= 1.03 * one


@either_order
@every_model
@torch.no_grad()
def test_stripes_change_nothing(config, order, monkeypatch):
    """In stripes of a few rows, down to one: equal to the rounding of sums, which is all that diffusers' test allows."""
    ours, given = randomise(AutoEncoder(config)).to(memory_format=order), latents(config, 1, 3, 5)
    whole, cut = ours.decode(given), []
    real = autoencoder.striped
    monkeypatch.setattr(
        autoencoder, "striped", lambda *args, **named: cut.append(args[3]) or real(*args, **named)
    )
    monkeypatch.setattr(autoencoder, "STRIPE", 2**13)
    monkeypatch.setattr(autoencoder, "CACHED", 2**10)
    assert max_error(ours.decode(given), whole) <= 5e-6
    assert len(cut) >= 4 and max(cut) > 8


@torch.no_grad()
def test_norm_of_what_hardly_varies_is_finite():
    """A flat group's variance is 0 but for rounding, which may be negative."""
    ours = randomise(autoencoder.GroupNorm(4, 16, eps=1e-6))
    for value in (0.1, 77.7, -1e4):
        x = torch.full((1, 16, 24, 40), value).contiguous(memory_format=torch.channels_last)
        assert ours(x).isfinite().all()


def test_a_hook_sees_whole_tensors(monkeypatch):
    """Whatever it is on: each module runs once."""
    monkeypatch.setattr(autoencoder, "STRIPE", 2**13)
    ours, seen = randomise(AutoEncoder(TINY["flux.2"])), []
    for name, module in ours.decoder.named_modules():
        module.register_forward_hook(lambda *_, name=name: seen.append(name))
    with torch.no_grad():
        ours.decode(latents(ours.config, 1, 3, 5))
    callable_ = [
        name for name, m in ours.decoder.named_modules() if type(m).forward is not nn.Module.forward
    ]
    assert (
        sorted(seen) == sorted(callable_)
        and "up.0.block.0.conv1" in seen
        and "up.1.upsample.conv" in seen
    )


@every_model
def test_gradients_equal_diffusers(config):
    """Of all that trains: nothing that is overwritten on the way is missed on the way back."""
    ours, given = randomise(AutoEncoder(config)).requires_grad_(True), latents(config, 2, 2, 3)
    theirs = reference(randomise(AutoEncoder(config))).requires_grad_(True)
    target = picture(2, 32, 48)
    (ours.decode(given) - target).square().mean().backward()
    (diffusers_decode(theirs, given) - target).square().mean().backward()
    grads = {name: p.grad for name, p in ours.named_parameters() if p.grad is not None}
    expected = {name: p.grad for name, p in theirs.named_parameters() if p.grad is not None}
    translated = autoencoder_to_diffusers(grads, config)
    assert translated.keys() == expected.keys() and len(grads) > 100
    largest = max(
        grad.abs().max() for grad in expected.values()
    )  # some are 0 but for rounding: the keys' bias
    assert all(
        (translated[name] - grad).abs().max() <= 2e-5 * largest for name, grad in expected.items()
    )


# ---------------------------------------------------------------------------------------------------------- tiles


@pytest.mark.parametrize(
    "size, tile, overlap",
    [(1, 8, 3), (8, 8, 3), (9, 8, 3), (8, 9, 8), (31, 8, 7), (40, 8, 4), (64, 24, 1)],
)
def test_tiles_share_what_is_asked_and_their_weights_sum_to_one(size, tile, overlap):
    total, ends = torch.zeros(16 * size), []
    made = tiles(size, tile, overlap)
    for start, weights in made:
        assert len(weights) == 16 * min(tile, size) and weights.min() >= 0
        assert all(end - start >= overlap for end in ends[-1:])
        total[16 * start : 16 * (start + tile)] += weights
        ends.append(start + min(tile, size))
    assert made[0][0] == 0 and ends[-1] == size and (total - 1).abs().max() <= 2e-7
    assert (len(made) == 1) == (size <= tile)


@either_order
@torch.no_grad()
def test_one_tile_is_the_whole(order):
    ours = randomise(AutoEncoder(TINY["flux.2"])).to(memory_format=order)
    given = latents(ours.config, 2, 3, 5)
    for tile in (5, 64):
        assert torch.equal(ours.decode_tiled(given, tile, 2), ours.decode(given))
    assert ours.decode_tiled(given, 3, 1).shape == (2, 3, 48, 80)


@pytest.mark.parametrize("tile, overlap", [(8, 0), (8, 8), (8, -1), (0, 0)])
def test_tiles_that_cannot_be_are_told(tile, overlap):
    with pytest.raises(UserError, match=f"tiles of {tile} latents that overlap by {overlap}"):
        AutoEncoder(TINY["flux.2"]).decode_tiled(torch.zeros(1, 128, 4, 4), tile, overlap)


@torch.inference_mode()
def test_tiles_leave_no_seams():
    """On the trained toy: where tiles begin and end, the error grows no faster than elsewhere; without blending, 9 times.

    Seen: 0.93 of it, and 0.093 from the whole, of a range of 2, in tiles of 8 latents; 0.064 in 12, and 0.049 in 16.
    """
    ours = flux.load(device="cpu").autoencoder()
    y, x = torch.meshgrid(torch.linspace(-1, 1, 384), torch.linspace(-1, 1, 384), indexing="ij")
    pixels = torch.stack([x, y, torch.sin(4 * (x + y))])[None]
    given = ours.encode(pixels)
    errors = [
        ours.decode_tiled(given, tile, overlap) - ours.decode(given)
        for tile, overlap in ((8, 4), (12, 4), (16, 8))
    ]
    large, medium, small = (error.square().mean().sqrt() for error in errors)
    assert 0.11 > large > medium > small > 0.01
    steps = errors[0].diff(dim=3).abs().mean((0, 1, 2))  # (383,) at each column
    seams = [
        16 * n - 1 for start, weights in tiles(24, 8, 4) for n in (start, start + 8) if 0 < n < 24
    ]
    assert len(seams) >= 8 and steps[seams].mean() <= 1.5 * steps.mean()


def test_memory_of_tiles_is_that_of_one(measure):
    with torch.device("meta"):
        ours = AutoEncoder(FLUX2).bfloat16().to(memory_format=torch.channels_last)
        given = torch.empty(1, 128, 96, 96, dtype=torch.bfloat16)
    one = measure.peak_bytes(lambda: ours.decode(given[:, :, :32, :32]))
    canvas = 3 * 4 * (16 * 96) ** 2
    assert measure.peak_bytes(lambda: ours.decode_tiled(given, 32, 8)) <= one + 2 * canvas


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_being_watched_moves_no_bit_of_a_picture_that_is_decoded_in_stripes(dtype, monkeypatch):
    """Stripes have the size that they have in use; watched, nothing is cut, so that hooks see whole tensors."""
    model = flux.load(device="cpu", dtype=dtype).autoencoder()
    given, cut, striped = latents(model.config, 1, 40, 33).to(dtype), [], autoencoder.striped
    monkeypatch.setattr(
        autoencoder, "striped", lambda *args, **named: cut.append(1) or striped(*args, **named)
    )
    with torch.inference_mode():
        plain, stripes = model.decode(given), len(cut)
        with watching({"": model}, lambda name, tensor: None):
            watched = model.decode(given)
    assert stripes > 0 and len(cut) == stripes and torch.equal(plain, watched)
