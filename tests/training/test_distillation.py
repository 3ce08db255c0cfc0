"""flux.training.distillation: the two losses, how a student begins, and what it learns.

The truth: float64 by hand, and the teacher in diffusers, whose two velocities are combined here in float64.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.weight_files import refusal
from torch import Tensor, nn

from flux import sampling
from flux.parity.reference import (
    KLEIN_TINY,
    SCHNELL_TINY,
    diffusers_transformer,
    diffusers_velocity,
    loaded,
    max_error,
    randomise,
    transformer_to_diffusers,
)
from flux.text_encoder import TextFeatures
from flux.training import distillation
from flux.training import trainer as training
from flux.transformer import Flux, FluxConfig

SMALL = replace(
    SCHNELL_TINY,
    in_channels=16,
    out_channels=16,
    hidden_size=64,
    depth=1,
    depth_single=2,
    axes_dim=(4, 6, 6),
)
every_family = pytest.mark.parametrize(
    "config", [SCHNELL_TINY, KLEIN_TINY], ids=["flux.1", "flux.2"]
)


def random(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed + 7 * sum(shape)))


def features(config: FluxConfig, rows: int, seed: int = 0) -> TextFeatures:
    pooled = random(rows, config.vector_dim, seed=seed) if config.vector_dim else None
    return TextFeatures(random(rows, 6, config.context_dim, seed=seed), pooled)


def a_batch(config: FluxConfig, rows: int = 3) -> training.Batch:
    return training.Batch(random(rows, config.out_channels, 2, 3), features(config, rows))


# ---------------------------------------------------------------------------------------------------------- the losses

G = torch.tensor([1.0, 2.5, 4.0])
T = torch.tensor([0.2, 0.5, 0.9])
LATENTS, NOISE, C, U = (random(3, 4, 2, 5, seed=seed) for seed in range(4))


def wide(x):
    return x.double()[:, None, None, None]


def fixed(v):
    return lambda x, t: v.float()


def test_distillation_is_lossless_for_the_guided_velocity_and_only_for_it():
    guided = (1 - wide(G)) * U.double() + wide(G) * C.double()

    def loss(v):
        return distillation.guidance_distillation_loss(
            fixed(v), fixed(C), fixed(U), G, LATENTS, T, NOISE
        ).item()

    assert loss(guided) < 1e-12
    others = {
        "c": C,
        "u": U,
        "other g": (1 - wide(G.flip(0))) * U + wide(G.flip(0)) * C,
        "c for u": guided - C + U,
    }
    for wrong in others.values():
        expected = (wrong.double() - guided).square().mean().item()
        assert expected > 0.1 and abs(loss(wrong) / expected - 1) < 1e-5


def test_all_are_asked_at_the_same_place():
    """x_t = (1 - t) · latents + t · noise, at its own time."""
    seen = []

    def asked(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return x

    distillation.guidance_distillation_loss(asked, asked, asked, G, LATENTS, T, NOISE)
    distillation.guided_flow_loss(asked, asked, G, LATENTS, T, NOISE)
    expected = (1 - wide(T)) * LATENTS.double() + wide(T) * NOISE.double()
    assert len(seen) == 5 and all(
        torch.equal(t, T) and max_error(x.double(), expected) < 1e-6 for x, t in seen
    )


def test_guided_flow_is_lossless_where_the_guided_velocity_holds_that_of_the_data():
    data = NOISE.double() - LATENTS.double()
    guided = U.double() + wide(G) * (data - U.double())

    def loss(v):
        return distillation.guided_flow_loss(fixed(v), fixed(U), G, LATENTS, T, NOISE).item()

    assert loss(guided) < 1e-12
    wrong = random(3, 4, 2, 5, seed=9)
    held = U.double() + (wrong.double() - U.double()) / wide(G)
    assert abs(loss(wrong) / (held - data).square().mean().item() - 1) < 1e-5
    assert loss(data) > 0.1  # what the plain loss teaches: not to be guided


def test_guided_flow_at_guidance_one_is_rectified_flow():
    v = fixed(random(3, 4, 2, 5, seed=9))
    ours = distillation.guided_flow_loss(v, fixed(U), torch.ones(3), LATENTS, T, NOISE)
    assert abs(ours.item() / training.rectified_flow_loss(v, LATENTS, T, NOISE).item() - 1) < 1e-6


@pytest.mark.parametrize("g", [1.0, 2.5, 4.0])
def test_guided_flow_learns_the_guidance_of_the_mean(g):
    """Of data that differ, a velocity learns their mean; here, guided: u + g · (mean - u), where the gradient is zero."""
    mean, u = (NOISE - LATENTS).mean(0), U[:1]
    v = (u + g * (mean - u)).requires_grad_()

    def of_all(x, t):
        return v.expand(3, -1, -1, -1)

    guidance = torch.full((3,), g)
    (gradient,) = torch.autograd.grad(
        distillation.guided_flow_loss(of_all, lambda x, t: u, guidance, LATENTS, T, NOISE), v
    )
    assert gradient.abs().max() < 1e-7
    (plain,) = torch.autograd.grad(training.rectified_flow_loss(of_all, LATENTS, T, NOISE), v)
    assert (plain.abs().max() < 1e-7) == (g == 1)


# ---------------------------------------------------------------------------------------------------------- the student


@every_family
def test_a_student_begins_as_its_teacher_whatever_it_is_told(config):
    teacher = randomise(Flux(config))
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    student, batch = distillation.student_of(teacher), a_batch(config)
    assert student.config == replace(config, guidance=True)
    expected = training.velocity(teacher, batch, 1.0, batch.latents, T)
    for told in (1.0, 3.5, G):
        assert torch.equal(training.velocity(student, batch, told, batch.latents, T), expected)
    loss, _ = distillation_loss(student, teacher, batch, torch.ones(3))
    assert loss < 1e-11 * expected.square().mean()  # u + 1 · (c - u) is c, rounded
    loss, _ = distillation_loss(student, teacher, batch, G)
    assert loss > 0.01
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    assert all(
        torch.equal(x, before[name]) for name, x in teacher.state_dict().items()
    )  # nothing is shared


def test_a_teacher_is_what_its_student_is_at_guidance_1():
    student, batch = randomise(Flux(replace(SMALL, guidance=True))), a_batch(SMALL)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    teacher = distillation.teacher_of(student)
    assert teacher.config == SMALL
    expected = training.velocity(student, batch, 1.0, batch.latents, T)
    # the same three vectors are added, in another order
    assert max_error(training.velocity(teacher, batch, 3.0, batch.latents, T), expected) < 1e-5
    assert max_error(training.velocity(student, batch, 3.0, batch.latents, T), expected) > 0.01
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


@pytest.mark.parametrize("config", [SCHNELL_TINY, replace(KLEIN_TINY, guidance=True)])
def test_only_a_student_of_flux1_can_be_made_a_teacher(config):
    assert "told its guidance" in refusal(distillation.teacher_of, Flux(config))


def test_a_student_of_a_bfloat16_teacher_is_float32():
    student = distillation.student_of(randomise(Flux(SMALL)).bfloat16())
    assert {p.dtype for p in student.parameters()} == {torch.float32} and all(
        p.requires_grad for p in student.parameters()
    )


def test_a_teacher_that_is_told_its_guidance_is_refused():
    told = refusal(distillation.student_of, Flux(replace(SMALL, guidance=True)))
    assert (
        told
        == "a teacher that is told its guidance was distilled already: choose one with classifier-free guidance"
    )


def distillation_loss(
    student: Flux, teacher: Flux, batch: training.Batch, guidance: Tensor, t=T, noise=None
):
    """The loss on a batch, and that batch without its captions."""
    noise = random(*batch.latents.shape, seed=5) if noise is None else noise
    blank = distillation.without_captions(batch, features(teacher.config, 1, seed=8))

    def of(network, batch, g):
        return partial(training.velocity, network, batch, g)

    with training.computing(torch.device("cpu"), torch.float32):
        asked = of(student, batch, guidance), of(teacher, batch, 1.0), of(teacher, blank, 1.0)
        return distillation.guidance_distillation_loss(
            *asked, guidance, batch.latents, t, noise
        ), blank


@every_family
def test_only_the_student_gets_a_gradient(config):
    teacher = randomise(Flux(config)).requires_grad_(True)
    student = distillation.student_of(teacher)
    loss, _ = distillation_loss(student, teacher, a_batch(config), G)
    loss.backward()
    assert all(p.grad is None for p in teacher.parameters())
    without = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    assert without == {  # what lies before a layer that is still zero
        name for name, _ in student.named_parameters() if name.startswith("guidance_in.in_layer.")
    }


def test_what_is_not_captioned_gets_no_gradient():
    scale = nn.Parameter(torch.ones(1))
    loss = distillation.guided_flow_loss(
        lambda x, t: C, lambda x, t: U * scale, G, LATENTS, T, NOISE
    )
    assert not loss.requires_grad


def test_all_is_replaced_by_the_empty_caption_but_the_pictures():
    batch, empty = a_batch(SMALL), features(SMALL, 1, seed=8)
    references = random(3, 6, 16), random(6, 3)
    blank = distillation.without_captions(
        batch._replace(references=references[0], reference_ids=references[1]), empty
    )
    for row in range(3):
        assert torch.equal(blank.features.tokens[row], empty.tokens[0]) and torch.equal(
            blank.features.pooled[row], empty.pooled[0]
        )
    assert blank.latents is batch.latents and (blank.references, blank.reference_ids) == references
    assert (
        distillation.without_captions(a_batch(KLEIN_TINY), features(KLEIN_TINY, 1)).features.pooled
        is None
    )


def test_guidance_is_drawn_evenly_by_seed_and_number():
    drawn = [distillation.draw_guidance(1.5, 5, 64, 3, number) for number in range(50)]
    assert all(torch.equal(distillation.draw_guidance(1.5, 5, 64, 3, n), drawn[n]) for n in (7, 0))
    assert not torch.equal(distillation.draw_guidance(1.5, 5, 64, 4, 0), drawn[0])
    counts = torch.cat(drawn).histc(7, 1.5, 5)
    assert (
        counts.sum() == 50 * 64 and (counts / 50 / 64 - 1 / 7).abs().max() < 0.03
    )  # five standard deviations
    assert torch.equal(distillation.draw_guidance(3.5, 3.5, 4, 0, 0), torch.full((4,), 3.5))


def test_a_student_learns_the_guided_velocity_of_its_teacher():
    """The error at each g, on draws that training never saw, against diffusers' two velocities, combined in float64.

    As a part of |c - u|: at first it is g - 1, since the student ignores g.
    """
    teacher = randomise(Flux(SMALL))
    for name, p in teacher.named_parameters():
        p.mul_(
            0.5 if "blocks" in name and p.ndim == 2 else 1
        )  # less wild than random matrices make it
    theirs = loaded(
        diffusers_transformer(SMALL), transformer_to_diffusers(teacher.state_dict(), SMALL)
    )
    student, captions, pictures = (
        distillation.student_of(teacher),
        features(SMALL, 4),
        random(4, 16, 2, 3),
    )

    def draw(number: int, rows: int):
        generator = training.generator(7, number)
        chosen = torch.randint(0, 4, (rows,), generator=generator)
        batch = training.Batch(pictures[chosen], TextFeatures(*(x[chosen] for x in captions)))
        return (
            batch,
            torch.rand(rows, generator=generator),
            torch.randn(batch.latents.shape, generator=generator),
        )

    def by_diffusers(batch: training.Batch, x: Tensor, t: Tensor) -> Tensor:
        txt, vector = batch.features
        ids = sampling.image_ids(2, 3, 3), sampling.text_ids(6, 3)
        return (
            diffusers_velocity(theirs, x.flatten(2).mT, ids[0], txt, ids[1], t, None, vector)
            .mT.unflatten(2, (2, 3))
            .double()
        )

    batch, t, noise = draw(10**6, 64)
    blank = distillation.without_captions(batch, features(SMALL, 1, seed=8))
    x = sampling.scale_noise(batch.latents, noise, t[:, None, None, None])
    c, u = by_diffusers(batch, x, t), by_diffusers(blank, x, t)

    def error(told: float, g: float) -> float:
        with torch.no_grad():
            v = training.velocity(student, batch, told, x, t).double()
        return ((v - (u + g * (c - u))).norm() / (c - u).norm()).item()

    values = (1.0, 2.5, 4.0)
    assert [error(g, g) for g in values] == pytest.approx([0, 1.5, 3], abs=1e-5)
    trainer = training.Trainer(
        student, Path("nowhere"), {}, steps=200, rate=2e-3, warmup=10, weight_decay=0
    )
    for step in range(200):
        drawn, times, more = draw(step, 16)
        guidance = distillation.draw_guidance(1, 5, 16, 0, step)
        trainer.update(
            [lambda: distillation_loss(student, teacher, drawn, guidance, times, more)[0]]
        )
    after = {g: error(g, g) for g in values}
    assert after[2.5] < 1.5 / 4 and after[4.0] < 3 / 4 and after[1.0] < 0.5
    for g in values:  # what it is told makes the difference
        assert all(error(told, g) > 1.5 * after[g] for told in values if told != g)
