"""Guidance distillation: a student with a guidance embedding matches CFG in one forward pass.

Classifier-free guidance at a scale g moves along u + g · (c - u), where c is the velocity with the
caption and u the velocity without (Ho & Salimans 2022, arXiv:2207.12598). A student with a guidance
input learns this velocity from its teacher (Meng et al. 2023, arXiv:2210.03142). FLUX.1 [dev] was
made this way. A velocity here is a function of latents (B, C, h, w) at times t (B,).
"""

from dataclasses import replace
from typing import cast

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor

from flux import sampling
from flux.errors import UserError
from flux.text_encoder import TextFeatures
from flux.training.loss import Batch, Velocity, seeded_generator
from flux.transformer import Flux, timestep_embedding
from flux.weights.load import init_empty


def guidance_distillation_loss(
    student: Velocity,
    teacher: Velocity,
    unconditional: Velocity,
    guidance: Tensor,
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Return mean |v(x_t, t, g) - (u + g · (c - u))|².

    v is the student at guidance g (B,), c its teacher, and u the teacher without captions.
    """
    x, g = sampling.scale_noise(latents, noise, _per_sample(t)), _per_sample(guidance)
    with torch.no_grad():
        c, u = teacher(x, t).float(), unconditional(x, t).float()
        target = sampling.classifier_free_guidance(c, u, g)
    return F.mse_loss(student(x, t).float(), target)


def guided_flow_loss(
    network: Velocity,
    unconditional: Velocity,
    guidance: Tensor,
    latents: Tensor,
    t: Tensor,
    noise: Tensor,
) -> Tensor:
    """Return mean |u + (v(x_t, t, g) - u) / g - (noise - latents)|²: train at inference guidance.

    Krea describes this for FLUX.1 Krea [dev] in words, without an equation: a guidance-distilled
    model is fine-tuned, with a custom loss, directly on the classifier-free guided distribution
    (https://www.krea.ai/blog/flux-krea-open-source-release). The equation is our reading.

    A distilled network's v is u + g · (c - u). Solved for c, the target of that is the velocity of
    the data. So v learns u + g · (E[noise - latents] - u), as if the teacher had been fine-tuned.
    The plain loss at the same g would teach v to ignore g; at g = 1 both losses are equal. u is the
    current network itself, at guidance 1 and without the caption; u gets no gradient.
    """
    x, g = sampling.scale_noise(latents, noise, _per_sample(t)), _per_sample(guidance)
    with torch.no_grad():
        u = unconditional(x, t).float()
    return F.mse_loss(u + (network(x, t).float() - u) / g, noise - latents)


def _per_sample(values: Tensor) -> Tensor:
    return rearrange(values, "b -> b 1 1 1")


def draw_guidance(low: float, high: float, count: int, seed: int, number: int) -> Tensor:
    """Draw uniform guidance scales (count,) for batch `number` of a run."""
    return low + (high - low) * torch.rand(count, generator=seeded_generator(seed, number, 1))


def without_captions(batch: Batch, empty: TextFeatures) -> Batch:
    """Replace all text features by `empty`, the features (1, ...) of the empty caption."""

    def expand(x: Tensor) -> Tensor:
        return x.to(batch.latents.device).expand(len(batch.latents), *x.shape[1:])

    pooled = None if empty.pooled is None else expand(empty.pooled)
    return batch._replace(features=TextFeatures(expand(empty.tokens), pooled))


@torch.no_grad()
def make_teacher(student: Flux) -> Flux:
    """Return a float32 copy without a guidance embedding: the student at guidance 1.

    The embedding of guidance 1 is a vector, added to the time embedding. In the copy, the vector
    becomes part of the last bias of the time embedding. UserError for FLUX.2, which has no biases.
    """
    if not (student.config.guidance and student.config.bias):
        raise UserError("student: must be a FLUX.1 model with a guidance embedding")
    tensors = {name: x.to(torch.float32, copy=True) for name, x in student.state_dict().items()}
    one = timestep_embedding(torch.tensor([1000.0])).to(student.time_in.out_layer.bias)
    tensors["time_in.out_layer.bias"] += student.guidance_in(one)[0].float()
    tensors = {name: x for name, x in tensors.items() if not name.startswith("guidance_in.")}
    config = replace(student.config, guidance=False)
    teacher = cast(Flux, init_empty(lambda: Flux(config, student.numerics)))
    teacher.load_state_dict(tensors, assign=True)
    teacher.requires_grad_(True)
    return teacher


@torch.no_grad()
def make_student(teacher: Flux) -> Flux:
    """Return a float32 copy with a guidance embedding, whose velocity is at first the teacher's.

    The last layer of the guidance embedding is zero. The first one is copied from the time
    embedding, which reads the same sinusoids.
    """
    if teacher.config.guidance:
        raise UserError(
            "teacher: has a guidance embedding, so its guidance is distilled already. "
            "Use a model with classifier-free guidance."
        )
    config = replace(teacher.config, guidance=True)
    student = cast(Flux, init_empty(lambda: Flux(config, teacher.numerics)))
    tensors = teacher.state_dict()
    for name in [name for name in tensors if name.startswith("time_in.")]:
        initial = tensors[name] if ".in_layer." in name else torch.zeros_like(tensors[name])
        tensors[name.replace("time_in.", "guidance_in.")] = initial
    tensors = {name: x.to(torch.float32, copy=True) for name, x in tensors.items()}
    student.load_state_dict(tensors, assign=True)
    student.requires_grad_(True)
    return student
