"""From noise to latents: noise, positions, the schedule of times, and Euler's method.

Time t runs from 1 (noise) to 0 (image) along straight lines, x_t = (1 - t) * image + t * noise. The
network predicts their velocity, dx/dt = noise - image.

References: rectified flow, Liu et al. 2022, https://arxiv.org/abs/2209.03003; shifted schedules,
Esser et al. 2024, https://arxiv.org/abs/2403.03206; classifier-free guidance, Ho & Salimans 2022,
https://arxiv.org/abs/2207.12598.

Nothing here knows a network. The sampler takes any function velocity(x, t).
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from torch import Tensor

from flux.errors import NonFiniteError

Velocity = Callable[[Tensor, float], Tensor]  # of x at time t
OnStep = Callable[[int, float, Tensor], None]  # step from 1, its new time, x
Blend = Callable[[Tensor, float], Tensor]  # x at a new time -> x

# ------------------------------------------------------------------ noise and positions


def noise(
    seeds: Sequence[int | torch.Generator],
    channels: int,
    height: int,
    width: int,
    spatial: bool,
    tokens: bool = False,
) -> Tensor:
    """Return standard normal latents, (B, channels, height, width) float32, drawn on the CPU.

    Each seed has its own generator. So the noise of a seed is the same alone and in a batch, on
    every device. A generator in the place of a seed goes on where it is. `spatial`: FLUX.1 draws
    before it packs 2x2 patches into channels, FLUX.2 draws packed latents. `tokens`: FLUX 3 draws
    all channels of a token before the next token.
    """
    shape: tuple[int, ...] = (channels, height, width)
    if spatial:
        shape = (channels // 4, 2 * height, 2 * width)
    elif tokens:
        shape = (height, width, channels)
    generators = [torch.Generator().manual_seed(s) if isinstance(s, int) else s for s in seeds]
    drawn = [torch.randn(shape, generator=generator) for generator in generators]
    x = torch.stack(drawn)  # (B, *shape)
    if tokens:
        x = rearrange(x, "b h w c -> b c h w")
    if spatial:
        x = rearrange(x, "b c (h ph) (w pw) -> b (c ph pw) h w", ph=2, pw=2)
    return x


def image_ids(height: int, width: int, axes: int, t: int = 0, left: int = 0) -> Tensor:
    """Return positions of image tokens, row by row: (height * width, axes), int64.

    A position is (t, row, left + column[, 0]). `t` tells images apart: 0 is the generated image,
    references have 1 (Kontext) or 10, 20, ... (FLUX.2).
    """
    ids = torch.zeros(height, width, axes, dtype=torch.int64)
    ids[..., 0] = t
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = left + torch.arange(width)
    return rearrange(ids, "h w axes -> (h w) axes")


def flux3_image_ids(height: int, width: int, reference: int = 0) -> Tensor:
    """Return FLUX 3's positions (0, row / 2, column / 2, -reference): (height * width, 4), float32.

    The last axis tells images apart: 0 is the generated image, references count from 1.
    """
    ids = image_ids(height, width, 4) / 2
    ids[:, 3] = -reference
    return ids


def text_ids(length: int, axes: int) -> Tensor:
    """Return positions of text tokens, (length, axes), int64.

    FLUX.1 (3 axes) has zeros. FLUX.2 (4 axes) counts tokens on the last axis.
    """
    ids = torch.zeros(length, axes, dtype=torch.int64)
    if axes == 4:
        ids[:, 3] = torch.arange(length)
    return ids


# ------------------------------------------------------------------ times

SHIFT = 6.93  # of FLUX 3, for every size: t -> SHIFT t / (1 + (SHIFT - 1) t)


def schedule(
    kind: str, steps: int, tokens: int, rounding: Literal["float64", "bfl", "diffusers"] = "float64"
) -> Tensor:
    """Return times from 1 to 0, (steps + 1,) float32.

    `kind`: "unshifted" (schnell) is even. "linear" (FLUX.1) and "empirical" (FLUX.2) shift by mu,
    t -> e^mu / (e^mu + 1/t - 1), and larger images spend more steps near the noise. "constant"
    (FLUX 3) shifts by `SHIFT`. `tokens` counts the generated image's tokens, without references.
    `rounding`: the arithmetic, float64 or the float32 of a published implementation, which differs
    in the last bits.
    """
    times: Any  # numpy's for diffusers, torch's otherwise
    if rounding == "diffusers":
        times = np.linspace(1, 1 / steps, steps).astype(np.float32)  # 0 is appended, unshifted
    elif rounding == "bfl":
        times = torch.linspace(1, 0, steps + 1)
    else:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if kind == "constant":
        times = SHIFT * times / (1 + (SHIFT - 1) * times)
    elif kind != "unshifted":
        mu = compute_empirical_mu(tokens, steps) if kind == "empirical" else calculate_shift(tokens)
        times = math.exp(mu) / (math.exp(mu) + (1 / times - 1))  # e^mu / infinity at t = 0
    if rounding == "diffusers":
        return torch.cat([torch.from_numpy(times), torch.zeros(1)])
    return times.float()


def custom_schedule(
    steps: int, sigmas: Sequence[float] | None = None, shift: float | None = None
) -> Tensor:
    """Return times from 1 to 0, (steps + 1,) float32: even, or `sigmas`; then shifted.

    t -> shift t / (1 + (shift - 1) t) is the shift of `schedule`, with e^mu = `shift`.
    """
    if sigmas is None:
        times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    else:
        times = torch.tensor(sigmas, dtype=torch.float64)
    if shift is not None:
        times = shift * times / (1 + (shift - 1) * times)
    return times.float()


def calculate_shift(tokens: int) -> float:
    """Return FLUX.1's mu, on the line through (256 tokens, 0.5) and (4096 tokens, 1.15)."""
    slope = (1.15 - 0.5) / (4096 - 256)
    return slope * tokens + (0.5 - slope * 256)


def compute_empirical_mu(tokens: int, steps: int) -> float:
    """Return FLUX.2's mu, from BFL's fits at 10 and at 200 steps, interpolated in the steps.

    Above 4300 tokens, about one megapixel, BFL ignores the steps. mu jumps there (2.04 to 1.18
    at 50 steps), as published.
    """
    at_200 = 0.00016927 * tokens + 0.45666666
    if tokens > 4300:
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    slope = (at_200 - at_10) / 190
    return slope * steps + (at_200 - 200 * slope)


def skipped_steps(
    steps: int, strength: float, rounding: Literal["rounded", "bfl"] = "rounded"
) -> int:
    """Return how many of the first steps image to image leaves out; 0 at a `strength` of 1.

    Of 50 steps at strength 0.8, diffusers runs 40 and BFL's demos ("bfl") run 41.
    """
    return int((1 - strength) * steps if rounding == "bfl" else max(steps - steps * strength, 0))


def truncate_by_strength(
    times: Tensor, strength: float, rounding: Literal["rounded", "bfl"] = "rounded"
) -> Tensor:
    """Return the times of the steps that are run, for image to image: see `skipped_steps`."""
    return times[skipped_steps(len(times) - 1, strength, rounding) :]


def scale_noise(image: Tensor, noise: Tensor, t: float | Tensor) -> Tensor:
    """Return the point at time t on the straight line from the image to the noise."""
    return (1 - t) * image + t * noise


def per_step_values(values: Sequence[float], steps: int) -> list[float]:
    """Return one value for each step.

    One value is repeated. As many values as steps stay as they are. Two values are the ends of a
    straight line.
    """
    if len(values) == steps:
        return list(values)
    start, end = values[0], values[-1]
    return [start + (end - start) * step / max(steps - 1, 1) for step in range(steps)]


# ------------------------------------------------------------------ Euler's method


def denoise(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    callback: OnStep | None = None,
    state: Literal["float32", "bfl", "diffusers"] = "float32",
    blend: Blend | None = None,
) -> Tensor:
    """Follow the velocity from `times[0]` to `times[-1]`: x <- x + (t' - t) * velocity(x, t).

    x has any shape. `callback(step, t', x)` is called after each step, counted from 1.
    `blend(x, t')` may restore parts of an image before that. `state` says how x is rounded
    between steps. Raise NonFiniteError at the first step after which x is not finite.
    flux/solvers.py has other methods.
    """
    for step, (t, t_next) in enumerate(zip(times[:-1].tolist(), times[1:].tolist()), start=1):
        x = euler_step(x, velocity(x, t), t_next - t, state)
        x = finish_step(x, step, times, callback, blend)
    return x


def finish_step(
    x: Tensor, step: int, times: Tensor, callback: OnStep | None, blend: Blend | None
) -> Tensor:
    """End a step of any solver: blend, check, call back. Return x. Steps count from 1."""
    t = times[step].item()
    if blend is not None:
        x = blend(x, t)
    if not torch.isfinite(x).all():
        raise NonFiniteError(
            f"latents: not finite after step {step} of {len(times) - 1} (t = {t:.4f}). "
            "Look for NaN in the weights with `check_finite=True`, or try `dtype=float32`."
        )
    if callback is not None:
        callback(step, t, x)
    return x


def euler_step(x: Tensor, v: Tensor, dt: float, state: str) -> Tensor:
    """Return x + dt * v, rounded as `state` says."""
    if state == "float32":
        return x + dt * v.float()
    if state == "bfl":  # x has the network's dtype
        return x.to(v.dtype) + dt * v
    # diffusers rounds x, dt, their product and the sum; it adds in float32
    rounded = torch.tensor(dt, dtype=v.dtype, device=v.device)
    return (x.to(v.dtype).float() + rounded * v).to(v.dtype)


def classifier_free_guidance(
    conditional: Tensor, unconditional: Tensor, scale: float | Tensor
) -> Tensor:
    """Move away from the unconditional velocity by `scale` times the difference."""
    return unconditional + scale * (conditional - unconditional)
