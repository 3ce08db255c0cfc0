"""Previews: what the network predicts during a run, and the map from latents to colours."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import flux
from flux import preview, toy
from flux.errors import UserError
from flux.image_io.output import to_pixels

PROMPT = "a red circle on a blue background"
SIZE = dict(width=64, height=64)
both = pytest.mark.parametrize("name", ["flux.2-tiny", "flux.1-tiny"])


@pytest.fixture(scope="module")
def pipes():
    return {name: flux.load(name, device="cpu") for name in ("flux.1-tiny", "flux.2-tiny")}


def test_fit_finds_the_map_of_channels_that_are_linear_in_colours():
    """Six channels of three colours, and two of noise; numpy's least squares agrees."""
    colours = torch.rand(1, 3, 32, 32) * 2 - 1
    mixed = torch.einsum("b c h w, c z -> b z h w", colours, torch.randn(3, 6)) + torch.randn(
        6, 1, 1
    )
    channels = torch.cat([mixed + 0.01 * torch.randn_like(mixed), 5 * torch.randn(1, 2, 32, 32)], 1)
    weight, bias = preview.fit(channels, colours)
    x, y = channels[0].flatten(1).T.double(), colours[0].flatten(1).T.double()
    ones = torch.cat([x, torch.ones(len(x), 1)], 1).numpy()
    best = ones @ np.linalg.lstsq(ones, y.numpy(), rcond=None)[0]
    assert np.abs(best - y.numpy()).max() < 0.1  # or the test would prove nothing
    found = (x.float() @ weight + bias).numpy()
    # the ridge moves it: seen 0.03 of a range of 2
    assert np.abs(found - best).max() < 0.06


@both
def test_colours_are_the_mean_colours_of_an_image(pipes, name):
    pipe, random = pipes[name], np.random.default_rng(0)
    scene = next(toy.scenes(0, held=None))
    image = Image.fromarray(toy.draw(scene, 256, 256, random))
    pixels = F.avg_pool2d(to_pixels(image), 8)
    found = flux.Preview(pipe).colours(pipe.to_latents(image))
    assert found.shape == pixels.shape == (1, 3, 32, 32)
    error, signal = (found - pixels).square().mean().sqrt(), pixels.std()
    assert signal > 0.2 and error < 0.4 * signal, (error, signal)
    assert (found.flip(1) - pixels).square().mean().sqrt() > 2 * error  # BGR


@both
def test_run_is_the_same_and_each_step_predicts_the_image(pipes, name):
    """x0 = x - t velocity, with x and t of the step before."""
    pipe = pipes[name]
    look, features = flux.Preview(pipe), pipe.encode(PROMPT)
    plain = pipe.sample(features, [0], **SIZE, steps=3)
    velocity = pipe.velocity(features, **SIZE)
    predicted, seen = [], []

    def after_step(step, t, latents):
        predicted.append(pipe.now.denoised())
        seen.append((t, latents))
        (image,) = look()
        assert image.size == (64, 64)

    observed = pipe.sample(features, [0], **SIZE, steps=3, callback=after_step)
    assert torch.equal(observed, plain)
    assert torch.equal(predicted[-1], plain)  # Euler's last step goes all the way
    for (t, x), x0 in zip(seen, predicted[1:]):
        assert (x0 - (x - t * velocity(x, t))).abs().max() < 1e-4  # seen: 2e-6


def test_previews_of_a_batch_are_of_its_images(pipes):
    pipe, found = pipes["flux.2-tiny"], []
    look, features = flux.Preview(pipe), pipe.encode(PROMPT)
    latents = pipe.sample(
        features, [0, 1], **SIZE, steps=2, callback=lambda *_: found.append(look())
    )
    assert [len(images) for images in found] == [2, 2]
    means = look.colours(latents).clamp(-1, 1).mean((2, 3)).numpy()
    for number, image in enumerate(found[-1]):
        distances = np.abs(np.asarray(image).mean((0, 1)) / 127.5 - 1 - means).max(1)
        # interpolation keeps the mean nearly: seen 0.02, and 0.5 to the other image
        assert distances[number] < 0.1 < distances[1 - number]


def test_what_a_mask_protects_is_the_input_in_a_preview(pipes):
    pipe = pipes["flux.2-tiny"]
    image = Image.new("RGB", (64, 64), "red")
    mask = Image.new("L", (64, 64))
    mask.paste(255, (0, 0, 32, 64))
    conditions = pipe.condition(flux.ImageInputs((image,), mask, strength=1.0))
    found = []
    pipe.sample(
        pipe.encode(PROMPT),
        [0],
        steps=2,
        conditions=conditions,
        callback=lambda *_: found.append(pipe.now.denoised()),
    )
    protected = conditions.mask[0, 0] == 0
    assert 0 < protected.sum() < protected.numel()
    for latents in found:
        assert torch.equal(latents[0][:, protected], conditions.init[0][:, protected])


def test_preview_between_runs_is_an_error(pipes):
    pipe = pipes["flux.2-tiny"]
    look = flux.Preview(pipe)
    for _ in range(2):
        with pytest.raises(UserError, match="preview: nothing is sampled now"):
            look()
        pipe(PROMPT, **SIZE, steps=1)
