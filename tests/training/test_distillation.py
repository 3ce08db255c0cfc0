"""flux.training.distillation: the two losses, how a student starts, and what it learns.

Compared with: float64 by hand, and the teacher in diffusers, whose velocities are combined here.
"""

from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from support.training import random
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
from flux.training.loss import (
    Batch,
    autocast_matmul,
    predict_velocity,
    rectified_flow_loss,
    seeded_generator,
)
from flux.training.trainer import Trainer, make_optimizer, warmup_cosine
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


def random_features(config: FluxConfig, rows: int, seed: int = 0) -> TextFeatures:
    pooled = random(rows, config.vector_dim, seed=seed) if config.vector_dim else None
    return TextFeatures(random(rows, 6, config.context_dim, seed=seed), pooled)


def random_batch(config: FluxConfig, rows: int = 3) -> Batch:
    return Batch(random(rows, config.out_channels, 2, 3), random_features(config, rows))


# --------------------------------------------------------------------------------------- the losses

G = torch.tensor([1.0, 2.5, 4.0])
T = torch.tensor([0.2, 0.5, 0.9])
LATENTS, NOISE, C, U = (random(3, 4, 2, 5, seed=seed) for seed in range(4))


def broadcast(x: Tensor) -> Tensor:
    return x.double()[:, None, None, None]


def constant(v: Tensor):
    """Return a velocity that ignores its arguments."""
    return lambda x, t: v.float()


def test_distillation_loss_is_zero_only_for_the_guided_velocity():
    guided = (1 - broadcast(G)) * U.double() + broadcast(G) * C.double()

    def loss(v: Tensor) -> float:
        return distillation.guidance_distillation_loss(
            constant(v), constant(C), constant(U), G, LATENTS, T, NOISE
        ).item()

    assert loss(guided) < 1e-12
    other_g = broadcast(G.flip(0))
    for wrong in (C, U, (1 - other_g) * U + other_g * C, guided - C + U):
        expected = (wrong.double() - guided).square().mean().item()
        assert expected > 0.1 and abs(loss(wrong) / expected - 1) < 1e-5


def test_all_velocities_are_evaluated_at_x_t():
    seen = []

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        seen.append((x, t))
        return x

    distillation.guidance_distillation_loss(velocity, velocity, velocity, G, LATENTS, T, NOISE)
    distillation.guided_flow_loss(velocity, velocity, G, LATENTS, T, NOISE)
    expected = (1 - broadcast(T)) * LATENTS.double() + broadcast(T) * NOISE.double()
    assert len(seen) == 5
    for x, t in seen:
        assert torch.equal(t, T) and max_error(x.double(), expected) < 1e-6


def test_guided_flow_loss_is_zero_where_the_guided_velocity_contains_the_data():
    data = NOISE.double() - LATENTS.double()
    guided = U.double() + broadcast(G) * (data - U.double())

    def loss(v: Tensor) -> float:
        return distillation.guided_flow_loss(constant(v), constant(U), G, LATENTS, T, NOISE).item()

    assert loss(guided) < 1e-12
    wrong = random(3, 4, 2, 5, seed=9)
    solved = U.double() + (wrong.double() - U.double()) / broadcast(G)
    assert abs(loss(wrong) / (solved - data).square().mean().item() - 1) < 1e-5
    assert loss(data) > 0.1  # the optimum of the plain loss, which ignores guidance


def test_guided_flow_loss_at_guidance_one_is_the_rectified_flow_loss():
    v = constant(random(3, 4, 2, 5, seed=9))
    ours = distillation.guided_flow_loss(v, constant(U), torch.ones(3), LATENTS, T, NOISE)
    assert abs(ours.item() / rectified_flow_loss(v, LATENTS, T, NOISE).item() - 1) < 1e-6


@pytest.mark.parametrize("g", [1.0, 2.5, 4.0])
def test_guided_flow_loss_learns_the_guided_mean_of_the_data(g):
    """The gradient is zero at u + g (mean - u), where the data differ and the velocity may not."""
    mean, u = (NOISE - LATENTS).mean(0), U[:1]
    v = (u + g * (mean - u)).requires_grad_()

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        return v.expand(3, -1, -1, -1)

    guidance = torch.full((3,), g)
    loss = distillation.guided_flow_loss(velocity, constant(u), guidance, LATENTS, T, NOISE)
    (gradient,) = torch.autograd.grad(loss, v)
    assert gradient.abs().max() < 1e-7
    (plain,) = torch.autograd.grad(rectified_flow_loss(velocity, LATENTS, T, NOISE), v)
    assert (plain.abs().max() < 1e-7) == (g == 1)


def test_guided_flow_loss_gives_no_gradient_to_the_unconditional_velocity():
    scale = nn.Parameter(torch.ones(1))
    loss = distillation.guided_flow_loss(constant(C), lambda x, t: U * scale, G, LATENTS, T, NOISE)
    assert not loss.requires_grad


def test_draw_guidance_is_uniform_and_depends_on_seed_and_number():
    draws = [distillation.draw_guidance(1.5, 5, 64, 3, number) for number in range(50)]
    for number in (7, 0):
        again = distillation.draw_guidance(1.5, 5, 64, 3, number)
        assert torch.equal(again, draws[number])
    assert not torch.equal(distillation.draw_guidance(1.5, 5, 64, 4, 0), draws[0])
    counts = torch.cat(draws).histc(7, 1.5, 5)
    assert counts.sum() == 50 * 64
    assert (counts / 50 / 64 - 1 / 7).abs().max() < 0.03  # five standard deviations
    assert torch.equal(distillation.draw_guidance(3.5, 3.5, 4, 0, 0), torch.full((4,), 3.5))


# ------------------------------------------------------------------------------ teacher and student


def student_loss(
    student: Flux, teacher: Flux, batch: Batch, guidance: Tensor, t=T, noise=None
) -> Tensor:
    """Return the distillation loss of a student on a batch."""
    noise = random(*batch.latents.shape, seed=5) if noise is None else noise
    uncaptioned = distillation.without_captions(batch, random_features(teacher.config, 1, seed=8))
    with autocast_matmul(torch.device("cpu"), torch.float32):
        return distillation.guidance_distillation_loss(
            partial(predict_velocity, student, batch, guidance),
            partial(predict_velocity, teacher, batch, 1.0),
            partial(predict_velocity, teacher, uncaptioned, 1.0),
            guidance,
            batch.latents,
            t,
            noise,
        )


@every_family
def test_student_starts_as_its_teacher_at_any_guidance(config):
    teacher = randomise(Flux(config))
    before = {name: x.clone() for name, x in teacher.state_dict().items()}
    student, batch = distillation.make_student(teacher), random_batch(config)
    assert student.config == replace(config, guidance=True)
    expected = predict_velocity(teacher, batch, 1.0, batch.latents, T)
    student.requires_grad_(False)  # torch multiplies by a weight that is trained in another kernel
    for guidance in (1.0, 3.5, G):
        ours = predict_velocity(student, batch, guidance, batch.latents, T)
        assert torch.equal(ours, expected)
    student.requires_grad_(True)
    # u + 1 (c - u) is c, rounded
    assert student_loss(student, teacher, batch, torch.ones(3)) < 1e-11 * expected.square().mean()
    assert student_loss(student, teacher, batch, G) > 0.01
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(1)
    for name, x in teacher.state_dict().items():
        assert torch.equal(x, before[name])  # student and teacher share no memory


def test_teacher_is_its_student_at_guidance_one():
    student, batch = randomise(Flux(replace(SMALL, guidance=True))), random_batch(SMALL)
    before = {name: x.clone() for name, x in student.state_dict().items()}
    teacher = distillation.make_teacher(student)
    assert teacher.config == SMALL
    expected = predict_velocity(student, batch, 1.0, batch.latents, T)
    ours = predict_velocity(teacher, batch, 3.0, batch.latents, T)
    assert max_error(ours, expected) < 1e-5  # the same three vectors, added in another order
    other = predict_velocity(student, batch, 3.0, batch.latents, T)
    assert max_error(other, expected) > 0.01
    assert all(torch.equal(x, before[name]) for name, x in student.state_dict().items())


def test_unsuitable_students_and_teachers_are_refused():
    for config in (SCHNELL_TINY, replace(KLEIN_TINY, guidance=True)):
        message = refusal(distillation.make_teacher, Flux(config))
        assert message == "student: must be a FLUX.1 model with a guidance embedding"
    message = refusal(distillation.make_student, Flux(replace(SMALL, guidance=True)))
    assert message.startswith("teacher: has a guidance embedding")


def test_student_of_a_bfloat16_teacher_is_float32():
    student = distillation.make_student(randomise(Flux(SMALL)).bfloat16())
    assert {p.dtype for p in student.parameters()} == {torch.float32}
    assert all(p.requires_grad for p in student.parameters())


@every_family
def test_only_the_student_gets_a_gradient(config):
    teacher = randomise(Flux(config)).requires_grad_(True)
    student = distillation.make_student(teacher)
    student_loss(student, teacher, random_batch(config), G).backward()
    assert all(p.grad is None for p in teacher.parameters())
    zero = {name for name, p in student.named_parameters() if p.grad is None or not p.grad.any()}
    # the layer in front of one that is still zero
    expected = {n for n, _ in student.named_parameters() if n.startswith("guidance_in.in_layer.")}
    assert zero == expected


def test_without_captions_replaces_text_features_only():
    empty = random_features(SMALL, 1, seed=8)
    tokens, ids = random(3, 6, 16), random(6, 3)
    batch = random_batch(SMALL)._replace(references=tokens, reference_ids=ids)
    uncaptioned = distillation.without_captions(batch, empty)
    for row in range(3):
        assert torch.equal(uncaptioned.features.tokens[row], empty.tokens[0])
        assert torch.equal(uncaptioned.features.pooled[row], empty.pooled[0])
    assert uncaptioned.latents is batch.latents
    assert uncaptioned.references is tokens and uncaptioned.reference_ids is ids
    klein = distillation.without_captions(random_batch(KLEIN_TINY), random_features(KLEIN_TINY, 1))
    assert klein.features.pooled is None


@pytest.mark.slow
def test_student_learns_the_guided_velocity_of_its_teacher():
    """The error at each g on unseen draws, against diffusers' two velocities in float64.

    Relative to |c - u|, the error is g - 1 at first, since the student ignores g.
    """
    teacher = randomise(Flux(SMALL))
    for name, p in teacher.named_parameters():
        if "blocks" in name and p.ndim == 2:
            p.mul_(0.5)  # makes the random network smoother
    theirs = loaded(
        diffusers_transformer(SMALL), transformer_to_diffusers(teacher.state_dict(), SMALL)
    )
    student = distillation.make_student(teacher)
    captions, images = random_features(SMALL, 4), random(4, 16, 2, 3)

    def draw(number: int, rows: int) -> tuple[Batch, Tensor, Tensor]:
        generator = seeded_generator(7, number)
        chosen = torch.randint(0, 4, (rows,), generator=generator)
        features = TextFeatures(captions.tokens[chosen], captions.pooled[chosen])
        batch = Batch(images[chosen], features)
        t = torch.rand(rows, generator=generator)
        return batch, t, torch.randn(batch.latents.shape, generator=generator)

    def by_diffusers(batch: Batch, x: Tensor, t: Tensor) -> Tensor:
        txt, vector = batch.features[:2]
        img_ids, txt_ids = sampling.image_ids(2, 3, 3), sampling.text_ids(6, 3)
        img = x.flatten(2).mT
        out = diffusers_velocity(theirs, img, img_ids, txt, txt_ids, t, None, vector)
        return out.mT.unflatten(2, (2, 3)).double()

    batch, t, noise = draw(10**6, 64)
    uncaptioned = distillation.without_captions(batch, random_features(SMALL, 1, seed=8))
    x = sampling.scale_noise(batch.latents, noise, t[:, None, None, None])
    c, u = by_diffusers(batch, x, t), by_diffusers(uncaptioned, x, t)

    def error(guidance: float, g: float) -> float:
        """Of the student at `guidance`, to the guided velocity at scale g."""
        with torch.no_grad():
            v = predict_velocity(student, batch, guidance, x, t).double()
        return ((v - (u + g * (c - u))).norm() / (c - u).norm()).item()

    scales = (1.0, 2.5, 4.0)
    assert [error(g, g) for g in scales] == pytest.approx([0, 1.5, 3], abs=1e-5)
    optimizer = make_optimizer("adamw", student.parameters(), 2e-3, weight_decay=0)
    trainer = Trainer(student, Path("nowhere"), {}, [optimizer], warmup_cosine(200, 10))
    for step in range(200):
        drawn, times, more = draw(step, 16)
        guidance = distillation.draw_guidance(1, 5, 16, 0, step)
        trainer.update([partial(student_loss, student, teacher, drawn, guidance, times, more)])
    after = {g: error(g, g) for g in scales}
    assert after[2.5] < 1.5 / 4 and after[4.0] < 3 / 4 and after[1.0] < 0.5
    for g in scales:  # the guidance input makes the difference
        assert all(error(other, g) > 1.5 * after[g] for other in scales if other != g)
