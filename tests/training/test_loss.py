"""flux.training.loss: the loss, the training times, and the velocity of a batch.

Compared with: float64 by hand, and diffusers.
"""

import math

import pytest
import torch
from support.training import random, random_batch
from torch import Tensor

from flux import sampling
from flux.configs import MODELS
from flux.parity.reference import (
    diffusers_pipeline,
    diffusers_velocity,
    max_error,
    networks,
    tiny_models,
)
from flux.training import loss


def test_rectified_flow_loss_is_the_mean_squared_error_of_the_velocity():
    latents, noise = random(3, 4, 2, 5), random(3, 4, 2, 5, seed=1)
    t = torch.tensor([0.1, 0.5, 0.9])

    def exact(x: Tensor, t: Tensor) -> Tensor:
        return (x - latents) / t[:, None, None, None]  # from x = (1 - t) · latents + t · noise

    assert loss.rectified_flow_loss(exact, latents, t, noise) < 1e-10
    wrong = random(3, 4, 2, 5, seed=2)
    expected = (wrong.double() - (noise.double() - latents.double())).square().mean()
    value = loss.rectified_flow_loss(lambda x, t: wrong, latents, t, noise)
    assert abs(value.item() / expected.item() - 1) < 1e-6


def test_shifted_times_are_logit_normal_and_shifted_as_in_the_sampler():
    normal, mu = random(100).double(), 1.3
    t = 1 / (1 + torch.exp(-normal))
    shifted = math.exp(mu) / (math.exp(mu) + 1 / t - 1)
    assert max_error(loss.shifted_times(normal, mu), shifted) < 1e-15


def test_schedule_mu_equals_the_samplers():
    """Values computed by BFL's and diffusers' samplers."""
    expected = {
        ("flux.1-dev", 4096): 1.15,
        ("flux.1-dev", 256): 0.5,
        ("flux.2-dev", 4096): 2.0233511571292637,
        ("flux.1-schnell", 4096): 0.0,
    }
    for (name, tokens), mu in expected.items():
        assert loss.schedule_mu(MODELS[name], tokens) == pytest.approx(mu, abs=1e-12), name


@pytest.mark.parametrize("model", ["flux.1-dev", "flux.2-dev", "flux.2-klein-4b"])
@pytest.mark.parametrize("references", [False, True])
def test_predict_velocity_equals_diffusers(model, references):
    spec = tiny_models(clip_eos=999)[model]
    parts = networks(spec)
    theirs, network = diffusers_pipeline(spec, parts).transformer, parts["transformer"]
    batch = random_batch(spec.transformer, references=references)
    x, t = random(2, spec.transformer.out_channels, 3, 4), torch.tensor([0.3, 0.8])
    axes = len(spec.transformer.axes_dim)
    img, ids = x.flatten(2).mT, sampling.image_ids(3, 4, axes)
    if references:
        img, ids = torch.cat([img, batch.references], dim=1), torch.cat([ids, batch.reference_ids])
    guidance = torch.tensor([1.7, 1.7]) if spec.transformer.guidance else None
    tokens, pooled = batch.features[:2]
    txt_ids = sampling.text_ids(7, axes)
    expected = diffusers_velocity(theirs, img, ids, tokens, txt_ids, t, guidance, pooled)
    ours = loss.predict_velocity(network, batch, 1.7, x, t)
    assert max_error(ours.flatten(2).mT, expected[:, :12]) < 2e-5


def test_seeded_generator_depends_on_all_numbers():
    def draw(*numbers: int) -> float:
        return torch.rand(1, generator=loss.seeded_generator(*numbers)).item()

    assert draw(1, 2) == draw(1, 2)
    assert len({draw(1, 2), draw(2, 1), draw(12), draw(1, 2, 0)}) == 4
