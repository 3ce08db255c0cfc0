"""Guidance, distilled: a network that is told how strong its guidance shall be gives in one pass what took two.

Classifier-free guidance at a scale g moves along u + g · (c - u), where c is the velocity with the caption, and u that without
(Ho & Salimans 2022). A student that is told g learns just this of its teacher (Meng et al. 2023, arXiv:2210.03142). So FLUX.1
[dev] was made. Here a velocity is a function of latents (B, C, h, w) at times t (B,), as in `flux.training.trainer`.
"""

from collections.abc import Callable
from dataclasses import replace

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux import sampling
from flux.errors import UserError
from flux.text_encoder import TextFeatures
from flux.training.trainer import Batch, generator
from flux.transformer import Flux, timestep_embedding
from flux.weights.load import init_empty

Velocity = Callable[[Tensor, Tensor], Tensor]


def guidance_distillation_loss(
    student: Velocity,
    teacher: Velocity,
    uncaptioned: Velocity,
    guidance: Tensor,
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """|v(x_t, t, g) - (u + g · (c - u))|², the mean of it all.

    v: the student, which is told g, `guidance` (B,). c: its teacher. u: the same, `uncaptioned`.
    """
    x, g = sampling.scale_noise(latents, noise, per_picture(t)), per_picture(guidance)
    with torch.no_grad():
        target = sampling.classifier_free_guidance(
            teacher(x, t).float(), uncaptioned(x, t).float(), g
        )
    return F.mse_loss(student(x, t).float(), target)


def guided_flow_loss(
    network: Velocity,
    uncaptioned: Velocity,
    guidance: Tensor,
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """|u + (v(x_t, t, g) - u) / g - (noise - latents)|², the mean of it all: trains at the guidance of use, and keeps it.

    Published, by Krea of FLUX.1 Krea [dev] (https://www.krea.ai/blog/flux-krea-open-source-release), are words and no equation:
    a guidance-distilled model is fine-tuned, with a loss of their own, directly on the classifier-free guided distribution.
    This is our reading. A distilled network's v is u + g · (c - u): solved for c, that has the data's velocity for its target.
    So v learns u + g · (E[noise - latents] - u), what it would be if its teacher had been fine-tuned; the plain loss, at the
    same g, would teach it to ignore g. At g = 1 both are one. u is the network's own, at guidance 1 and without the caption,
    as it is at this step: it gets no gradient.
    """
    x, g = sampling.scale_noise(latents, noise, per_picture(t)), per_picture(guidance)
    with torch.no_grad():
        u = uncaptioned(x, t).float()
    return F.mse_loss(u + (network(x, t).float() - u) / g, noise - latents)


def per_picture(values: Tensor) -> Tensor:
    return rearrange(values, "b -> b 1 1 1")


def draw_guidance(low: float, high: float, count: int, seed: int, number: int) -> Tensor:
    """Evenly from low to high, (count,), for the n-th batch of a run."""
    return low + (high - low) * torch.rand(count, generator=generator(seed, number, 1))


def without_captions(batch: Batch, empty: TextFeatures) -> Batch:
    """`empty`: features of the empty caption, a batch of one."""

    def expand(x):
        return (
            None
            if x is None
            else x.to(batch.latents.device).expand(len(batch.latents), *x.shape[1:])
        )

    return batch._replace(features=TextFeatures(*map(expand, empty)))


@torch.no_grad()
def teacher_of(student: Flux) -> Flux:
    """A copy, in float32, that is what the student is at guidance 1: without an input for it.

    What the student makes of guidance 1 is a vector that it adds to that of time: here it is part of that one's last bias.
    UserError if there is no such bias, as in FLUX.2.
    """
    if not (student.config.guidance and student.config.bias):
        raise UserError(
            "only a model of FLUX.1 that is told its guidance can be made one that is not"
        )
    tensors = {name: x.to(torch.float32, copy=True) for name, x in student.state_dict().items()}
    bias = tensors["time_in.out_layer.bias"]
    bias += student.guidance_in(
        timestep_embedding(torch.tensor([1000.0])).to(student.time_in.out_layer.bias)
    )[0].float()
    tensors = {name: x for name, x in tensors.items() if not name.startswith("guidance_in.")}
    teacher = init_empty(lambda: Flux(replace(student.config, guidance=False), student.numerics))
    teacher.load_state_dict(tensors, assign=True)
    return teacher.requires_grad_(True)


@torch.no_grad()
def student_of(teacher: Flux) -> Flux:
    """A copy, in float32, that is told its guidance, and at first makes nothing of it: its velocity is the teacher's.

    Its last layer for guidance is zero, and its first that for time, which knows such sinusoids.
    """
    if teacher.config.guidance:
        raise UserError(
            "a teacher that is told its guidance was distilled already: choose one with classifier-free guidance"
        )
    student = init_empty(lambda: Flux(replace(teacher.config, guidance=True), teacher.numerics))
    tensors = teacher.state_dict()
    for name in [name for name in tensors if name.startswith("time_in.")]:
        like = tensors[name] if ".in_layer." in name else torch.zeros_like(tensors[name])
        tensors[name.replace("time_in.", "guidance_in.")] = like
    student.load_state_dict(
        {name: x.to(torch.float32, copy=True) for name, x in tensors.items()}, assign=True
    )
    return student.requires_grad_(True)
