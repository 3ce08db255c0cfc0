"""Solvers of the flow from noise to image. Euler's method itself is `sampling.denoise`.

A solver is a function f(velocity, x, times, callback, blend) -> x. It follows velocity(x, t) from
x at times[0] to times[-1], and ends each step with `sampling.finish_step`, which calls
`blend(x, t')`, then `callback(step, t', x)`. Any such function can be passed as `solver`.

    x_t = alpha x0 + sigma noise, alpha = 1 - t, sigma = t     the straight line of rectified flow
    x0  = x - t velocity(x, t)                                 the image that the network predicts
    l   = log(alpha / sigma), h = l' - l                       half of the log-SNR, and its step
    x'  = sigma'/sigma x + alpha' int_0^h e^(u - h) x0(l + u) du     the exact solution

The exponential solvers integrate the last line for a polynomial x0(l + u). With a constant x0 they
are Euler's method. l is infinite at t = 1 and t = 0; so the steps that start or end there have a
constant x0. Their order shows where the steps in l are short, that is, away from both ends. The
last step of Heun's method is Euler's: networks are not trained at t = 0.

    solver         order    velocities a step    source
    euler          1        1                    sampling.py
    heun           2        2                    Karras et al. 2022, arXiv:2206.00364, algorithm 1
    midpoint       2        2                    the explicit midpoint method
    dpmpp_2m       2        1                    Lu et al. 2022, arXiv:2211.01095, algorithm 2
    dpmpp_2m_sde   1 to 2   1, and noise         the same, appendix: SDE-DPM-Solver++(2M)
    res_2m         2        1                    Zhang et al. 2023, arXiv:2308.02157, multistep
"""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from flux import sampling
from flux.errors import UserError
from flux.sampling import Blend, OnStep, Velocity, denoise, finish_step

Solver = Callable[[Velocity, Tensor, Tensor, OnStep | None, Blend | None], Tensor]


def steps(times: Tensor) -> Iterator[tuple[int, float, float]]:
    """Yield the number of each step, counted from 1, and the times at its ends."""
    ends = times.tolist()
    return zip(range(1, len(ends)), ends, ends[1:])


def euler(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    callback: OnStep | None = None,
    blend: Blend | None = None,
) -> Tensor:
    """x' = x + (t' - t) v(x, t)"""
    return denoise(velocity, x, times, callback, blend=blend)


def heun(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    callback: OnStep | None = None,
    blend: Blend | None = None,
) -> Tensor:
    """Average the velocities at both ends of a step, the second at the point that Euler reaches."""
    for step, t, t_next in steps(times):
        v = velocity(x, t).to(x.dtype)
        if t_next > 0:
            end = velocity(x + (t_next - t) * v, t_next).to(x.dtype)
            v = (v + end) / 2
        x = finish_step(x + (t_next - t) * v, step, times, callback, blend)
    return x


def midpoint(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    callback: OnStep | None = None,
    blend: Blend | None = None,
) -> Tensor:
    """Take the velocity in the middle of a step, at the point that half a step of Euler reaches."""
    for step, t, t_next in steps(times):
        half = (t_next - t) / 2
        v = velocity(x + half * velocity(x, t).to(x.dtype), t + half).to(x.dtype)
        x = finish_step(x + 2 * half * v, step, times, callback, blend)
    return x


def half_log_snr(t: float) -> float:
    """log((1 - t) / t)"""
    if t <= 0 or t >= 1:
        return math.inf if t <= 0 else -math.inf
    return math.log1p(-t) - math.log(t)


def multistep(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    callback: OnStep | None = None,
    blend: Blend | None = None,
    *,
    weight: Callable[[float], float],
    noise: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """Extrapolate x0 linearly, in l, from the last two steps.

    x' = sigma'/sigma e^(-g) x + alpha' ((1 - e^(-h - g)) x0 + weight(h) (x0 - x0_old) / h_old)

    With `noise`, g = h, and sigma' sqrt(1 - e^(-2h)) noise(x) is added: the reverse SDE, which has
    the same distribution at every time. Without, g = 0.
    """
    before: tuple[Tensor, float] | None = None  # x0 and h of the step before
    for step, t, t_next in steps(times):
        h = half_log_snr(t_next) - half_log_snr(t)
        x0 = x - t * velocity(x, t).to(x.dtype)
        decay = math.exp(-h) if noise is not None else 1.0
        keep = t_next / t * decay
        direction = (1 - t_next) - keep * (1 - t)  # alpha' (1 - e^(-h - g)), also at t = 1
        end = keep * x + direction * x0
        if before is not None and math.isfinite(h) and math.isfinite(before[1]):
            end = end + (1 - t_next) * weight(h) / before[1] * (x0 - before[0])
        if noise is not None and t_next > 0:
            end = end + t_next * math.sqrt(-math.expm1(-2 * h)) * noise(x)
        before = x0, h
        x = finish_step(end, step, times, callback, blend)
    return x


def dpmpp_2m_weight(h: float) -> float:
    """The extrapolated x0 in the middle of the step stands for the whole step."""
    return -math.expm1(-h) * h / 2


def dpmpp_2m_sde_weight(h: float) -> float:
    return -math.expm1(-2 * h) * h / 2


def res_2m_weight(h: float) -> float:
    """int_0^h e^(u - h) u du = h^2 phi_2(-h), the exact integral of a linear x0."""
    return h + math.expm1(-h)


dpmpp_2m = partial(multistep, weight=dpmpp_2m_weight)
res_2m = partial(multistep, weight=res_2m_weight)


class StepNoise:
    """noise(x) of tokens x (B, L, C): each image goes on with the generator of its seed."""

    def __init__(self, seeds: Sequence[int], *shape: int, spatial: bool):
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.shape, self.spatial = shape, spatial
        self._draw()  # the noise that x starts from

    def _draw(self) -> Tensor:
        channels, height, width = self.shape
        return sampling.noise(self.generators, channels, height, width, spatial=self.spatial)

    def __call__(self, x: Tensor) -> Tensor:
        return rearrange(self._draw(), "b c h w -> b (h w) c").to(x)


def dpmpp_2m_sde(
    velocity: Velocity,
    x: Tensor,
    times: Tensor,
    callback: OnStep | None = None,
    blend: Blend | None = None,
    noise: Callable[[Tensor], Tensor] = torch.randn_like,
) -> Tensor:
    """DPM++ 2M with noise in every step but the last; `noise(x)` draws it, of the shape of x."""
    options: dict[str, Any] = dict(weight=dpmpp_2m_sde_weight, noise=noise)
    return multistep(velocity, x, times, callback, blend, **options)


SOLVERS: dict[str, Solver] = {
    "euler": euler,
    "heun": heun,
    "midpoint": midpoint,
    "dpmpp_2m": dpmpp_2m,
    "dpmpp_2m_sde": dpmpp_2m_sde,
    "res_2m": res_2m,
}
# these ask for velocities at times[:-1] alone, whose modulations are computed before the first step
ON_SCHEDULE = ("euler", "heun", "dpmpp_2m", "dpmpp_2m_sde", "res_2m")


def find(solver: str | Solver, state: str = "float32") -> tuple[Solver | None, bool]:
    """Return a solver by its name, and whether it is of ON_SCHEDULE. None: `sampling.denoise`.

    A function stays. `state`: of `Numerics`; another than float32 is known of Euler alone.
    """
    if not (callable(solver) or isinstance(solver, str) and solver in SOLVERS):
        raise UserError(
            f"solver: there is none of this name (got {solver!r:.40}, expected "
            f"{', '.join(SOLVERS)}, or a function)."
        )
    if solver == "euler":
        return None, True
    if state != "float32":
        raise UserError(
            'solver: only euler rounds as BFL and diffusers do. Use `numerics="exact"` for others.'
        )
    return (solver, False) if callable(solver) else (SOLVERS[solver], solver in ON_SCHEDULE)
