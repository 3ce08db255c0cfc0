"""Distil guidance into a student of the trained transformer, as FLUX.1 [dev] was made."""

from pathlib import Path

import torch
from torch import Tensor

from flux.training.distillation import guidance_distillation_loss, make_student
from flux.transformer import Flux
from recipe.batches import Batches
from recipe.networks import EDGES, RATE, Networks, expanded, some_times
from recipe.samples import Sampler
from recipe.trainer import TimedTrainer, device_of, optimizers

GUIDANCE = 1.0, 6.0  # uniform between these


def train_student(
    run: Path, networks: Networks, sampler: Sampler, minutes: float, compiled: bool
) -> Flux:
    """Train one pass with a guidance input to equal two guided passes of the teacher.

    The data are the teacher's. Some captions are dropped here too, where guidance has no effect, so
    that negative prompts work with the student.
    """
    student, device = make_student(networks.transformer), device_of(networks)
    networks.requires_grad_(False)
    pupil = Networks(student.to(device), networks.text)  # reads the same features
    if compiled:
        pupil.compile_blocks()
    batches = Batches(run, sampler.words, device, edited=False)
    with torch.no_grad():
        uncaptioned = networks.text(**sampler.empty)

    def loss(step: int) -> Tensor:
        batch = batches(step)
        with torch.no_grad():
            features, empty = (
                networks.text(**batch.words),
                expanded(uncaptioned, len(batch.latents)),
            )
        low, high = GUIDANCE
        guidance = low + (high - low) * torch.rand(len(batch.latents), device=device)
        return guidance_distillation_loss(
            lambda x, t: pupil.velocity(features, x, t, corner=batch.corner, guidance=guidance),
            lambda x, t: networks.velocity(features, x, t, corner=batch.corner),
            lambda x, t: networks.velocity(empty, x, t, corner=batch.corner),
            guidance,
            batch.latents,
            some_times(batch.latents),
            torch.randn_like(batch.latents),
        )

    path = run / "student.safetensors"
    trainer = TimedTrainer(
        student,
        optimizers(student, RATE / 2, RATE / 6, EDGES),
        path,
        minutes,
        ema=0.999,
        cooling=1.0,
    )
    trainer.run(loss, every_minutes=8, sheet=lambda: sampler.sheet(pupil, path.with_suffix(".png")))
    return student
