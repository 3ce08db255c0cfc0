"""Noise to latents: noise, coordinates, the schedule of times, and Euler's method.

Time t runs from 1 (noise) to 0 (picture) along straight lines, x_t = (1 - t) · picture + t · noise, whose velocity
dx/dt = noise - picture is what the network predicts (rectified flow; Liu et al. 2022, Esser et al. 2024).
Nothing here knows a network: the sampler takes any function velocity(x, t).
"""

import math
from collections.abc import Callable, Sequence

import torch
from einops import rearrange
from torch import Tensor

from flux.autoencoder import pack
from flux.errors import NonFiniteError
from flux.transformer import NUMERICS, Numerics


def noise(seeds: Sequence[int], channels: int, height: int, width: int, spatial: bool) -> Tensor:
    """Standard normal latents (B, channels, height, width), float32, one generator an image, always drawn on the CPU.

    So image k of a batch with seeds s, s + 1, ... is the image of seed s + k alone, on every device. `spatial`: FLUX.1 draws
    before the 2x2 packing, FLUX.2 after it; the same seed means the same numbers in another order.
    """
    shape = (channels // 4, 2 * height, 2 * width) if spatial else (channels, height, width)
    drawn = torch.stack(
        [torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    )
    return pack(drawn) if spatial else drawn


def image_ids(height: int, width: int, axes: int, t: int = 0, left: int = 0) -> Tensor:
    """Coordinates of image tokens, row by row: (height·width, axes) int64 of (t, row, left + column[, 0]).

    `t` tells pictures apart: 0 is the one that is made; references are 1 (Kontext) or 10, 20, ... (FLUX.2).
    """
    ids = torch.zeros(height, width, axes, dtype=torch.int64)
    ids[..., 0] = t
    ids[..., 1] = torch.arange(height)[:, None]
    ids[..., 2] = left + torch.arange(width)
    return rearrange(ids, "h w axes -> (h w) axes")


def text_ids(length: int, axes: int) -> Tensor:
    """Coordinates of text tokens, (length, axes) int64: all zero in FLUX.1 (3 axes), counted on the last axis in FLUX.2 (4)."""
    ids = torch.zeros(length, axes, dtype=torch.int64)
    if axes == 4:
        ids[:, 3] = torch.arange(length)
    return ids


def schedule(kind: str, steps: int, tokens: int) -> Tensor:
    """Times from 1 to 0, (steps + 1,) float32. `tokens`: image tokens of the picture that is made, references not counted.

    "unshifted" (schnell) is even; "linear" (FLUX.1) and "empirical" (FLUX.2) shift by mu, so that more tokens spend more
    steps near the noise: t -> e^mu / (e^mu + 1/t - 1).
    """
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if kind != "unshifted":
        shift = math.exp(
            {"linear": calculate_shift, "empirical": compute_empirical_mu}[kind](tokens, steps)
        )
        t = shift / (shift + (1 / t - 1))  # at t = 0: shift / infinity
    return t.float()


def truncate_by_strength(times: Sequence, strength: float) -> Sequence:
    """The last `strength` of the steps, (n + 1,): where a picture is changed and not made, noise is not begun with."""
    steps = len(times) - 1
    return times[int(max(steps - steps * strength, 0)) :]


def scale_noise(picture: Tensor, noise: Tensor, t: float) -> Tensor:
    """Where the flow is at t, on the straight line from the noise to the picture."""
    return (1 - t) * picture + t * noise


def per_step_values(values: Sequence[float], steps: int) -> list[float]:
    """A value a step: of one value, always that; of as many as there are steps, these; of two, the straight line between."""
    if len(values) == steps:
        return list(values)
    start, end = values[0], values[-1]
    return [start + (end - start) * step / max(steps - 1, 1) for step in range(steps)]


def calculate_shift(tokens: int, steps: int) -> float:
    """FLUX.1: the line through (256 tokens, 0.5) and (4096 tokens, 1.15), whatever the steps."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


def compute_empirical_mu(tokens: int, steps: int) -> float:
    """FLUX.2: BFL's fit at 10 and at 200 steps, interpolated in the steps."""
    at_200 = 0.00016927 * tokens + 0.45666666
    if (
        tokens > 4300
    ):  # above about one megapixel BFL drops the steps, and mu jumps (2.04 to 1.18 at 50 steps); as published
        return at_200
    at_10 = 8.73809524e-05 * tokens + 1.89833333
    return at_200 + (at_10 - at_200) * (200 - steps) / 190


def denoise(
    velocity: Callable[[Tensor, float], Tensor],
    x: Tensor,
    times: Tensor,
    callback: Callable[[int, float, Tensor], None] | None = None,
    numerics: Numerics = NUMERICS["exact"],
    blend: Callable[[Tensor, float], Tensor] = lambda x, t: x,
) -> Tensor:
    """Euler's method along `times`: x <- x + (t' - t) · velocity(x, t). Any shape of x; float32 unless numerics say otherwise.

    `callback(step, t', x)` sees every step, counted from 1, after `blend(x, t')`, which may put known parts of the picture
    back. NonFiniteError names the step at which x stopped being finite.
    """
    for step, (now, after) in enumerate(
        zip(times[:-1].tolist(), times[1:].tolist(), strict=True), start=1
    ):
        v = velocity(x, now)
        if numerics.state == "float32":
            x = x + (after - now) * v.float()
        elif (
            numerics.state == "bfl"
        ):  # latents stay in the network's dtype, and every step rounds them
            x = x.to(v.dtype) + (after - now) * v
        else:  # diffusers rounds the noise, t' - t, its product with v, and the sum; only the addition is in float32
            dt = torch.tensor(after - now, dtype=v.dtype, device=v.device)
            x = (x.to(v.dtype).float() + dt * v).to(v.dtype)
        x = blend(x, after)
        if not torch.isfinite(x).all():
            raise NonFiniteError(
                f"the latents are not finite after step {step} of {len(times) - 1} (t = {after:.4f}): "
                "look for NaN in the weights with --check-weights, or try --dtype float32"
            )
        if callback:
            callback(step, after, x)
    return x


def classifier_free_guidance(conditional: Tensor, unconditional: Tensor, scale: float) -> Tensor:
    """Classifier-free guidance (Ho & Salimans 2022): away from the unconditional velocity, `scale` times the difference."""
    return unconditional + scale * (conditional - unconditional)
