"""Check sizes, steps, guidance and seeds; raise UserError for a wrong value."""

import warnings
from collections.abc import Sequence
from itertools import pairwise

from torch import Tensor

from flux import solvers
from flux.arguments import optional, shown, to_integer, to_integers, to_number, to_numbers
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io.input import MAX_PIXELS

Guidance = float | Sequence[float]  # one value; a first and a last value; or one value a step
MIN_SIDE, MAX_SIDE = 64, 8192  # pixels
MAX_IMAGES = 10**9  # of one run


def check_range(name: str, value: float, low: float, high: float, advice: str = "") -> None:
    """Raise UserError unless the argument `name` is from `low` to `high`."""
    if not low <= value <= high:
        got = f"{value:g}" if isinstance(value, float) else value
        raise UserError(f"{name}: must be from {low} to {high} (got {got}). {advice}".rstrip())


def check_size(height: int, width: int) -> tuple[int, int]:
    """Return height and width; UserError unless they are a size that can be generated."""
    width, height = to_integer("width", width), to_integer("height", height)
    for name, side in (("width", width), ("height", height)):
        if side % 16 or not MIN_SIDE <= side <= MAX_SIDE:
            below = min(MAX_SIDE, max(MIN_SIDE, side // 16 * 16))
            nearest = f"{below} or {below + 16}" if MIN_SIDE <= side <= MAX_SIDE else f"{below}"
            raise UserError(
                f"{name}: must be a multiple of 16 from {MIN_SIDE} to {MAX_SIDE} (got {side}). "
                f"Use {nearest}."
            )
    if width * height > MAX_PIXELS:
        raise UserError(
            f"width: {width} and `height={height}` are {width * height / 1e6:.0f} megapixels "
            f"(expected at most {MAX_PIXELS / 1e6:.1f}). Use a smaller size."
        )
    return height, width


def check_steps(spec: ModelSpec, steps: int | None) -> int:
    """Return the number of steps, by default the model's; warn if a distilled model has another."""
    if steps is None:
        return spec.steps
    steps = to_integer("steps", steps)
    check_range("steps", steps, 1, 1000, f"{spec.name} is meant for {spec.steps}.")
    if spec.distilled and steps != spec.steps:
        message = f"{spec.name} was distilled for {spec.steps} steps, not {steps}"
        warnings.warn(message, stacklevel=4)
    return steps


def check_times(
    spec: ModelSpec, steps: int | None, sigmas: Sequence[float] | None, shift: float | None
) -> tuple[int | None, list[float] | None, float | None]:
    """Return the number of steps, the times of the user with 0 at the end, and the shift."""
    steps = optional(to_integer, "steps", steps)
    shift = optional(to_number, "shift", shift)
    if shift is not None:
        check_range("shift", shift, 0.01, 100, "1 is none; 3 is usual.")
    if sigmas is None:
        return steps, None, shift
    times = to_numbers("sigmas", sigmas)
    if times and times[-1] != 0:
        times = [*times, 0.0]
    falls = all(a > b for a, b in pairwise(times))
    if len(times) < 2 or not falls or not 0 < times[0] <= 1:
        listed = ", ".join(f"{t:g}" for t in times[:8])
        raise UserError(f"sigmas: must fall from at most 1 to 0 (got {listed}).")
    if steps not in (None, len(times) - 1):
        raise UserError(f"sigmas: are for {len(times) - 1} steps (got {steps}). Leave `steps` out.")
    return len(times) - 1, times, shift


def check_solver(
    spec: ModelSpec, solver: str | solvers.Solver, state: str
) -> tuple[solvers.Solver | None, bool]:
    """Return what `solvers.find` does; UserError if the model takes steps of Euler alone."""
    found = solvers.find(solver, state)
    if found[0] is not None and spec.flux3 and spec.distilled:
        raise UserError(
            f'solver: must be "euler" for {spec.name}: {spec.distilled}. Use a base model.'
        )
    return found


def check_guidance(spec: ModelSpec, guidance: Guidance | None, steps: int) -> list[float] | None:
    """Return guidance as `sampling.per_step_values` takes it; None for a model without guidance."""
    if guidance is None:
        return None if spec.guidance is None else [spec.guidance]
    usual = "no guidance" if spec.guidance is None else f"guidance {spec.guidance:g}"
    values = check_values("guidance", guidance, steps, f"{spec.name} is meant for {usual}.")
    if spec.guidance is not None:
        return values
    if values != [1]:
        reason = spec.distilled or "its transformer has no guidance input"
        raise UserError(
            f"guidance: {spec.name} takes none (got {format_values(values)}): {reason}. "
            "Leave `guidance` out, or use a base or dev model."
        )
    return None


def check_true_cfg_scale(scale: Guidance | None, steps: int) -> list[float]:
    """Return the scale of classifier-free guidance as `sampling.per_step_values` takes it."""
    if scale is None:
        return [1.0]
    return check_values("true_cfg_scale", scale, steps, "1 is off; 2 to 5 are usual.")


def check_values(name: str, values: Guidance, steps: int, advice: str) -> list[float]:
    """Return one, two or `steps` values; UserError for another count, or outside 0 to 100."""
    numbers = to_numbers(name, values)
    if len(numbers) not in (1, 2, steps):
        raise wrong_count(name, len(numbers), steps)
    for number in numbers:
        check_range(name, number, 0, 100, advice)
    return numbers


def wrong_count(name: str, count: int, steps: int) -> UserError:
    """Return the error about the number of values in the argument `name`."""
    return UserError(
        f"{name}: has {count} values for {steps} steps. "
        "Give one value, a first and a last value, or one value for each step."
    )


def format_values(values: Sequence[float]) -> str:
    """Return "4", "4:1" (from the first step to the last) or "4,3,2,1" (one value a step)."""
    return (":" if len(values) == 2 else ",").join(f"{value:g}" for value in values)


def check_features(spec: ModelSpec, name: str, features: object, seeds: int) -> None:
    """Raise UserError unless these are this model's, of one prompt or one for each seed."""
    tokens, c = getattr(features, "tokens", None), spec.transformer
    if not isinstance(tokens, Tensor):
        raise UserError(
            f"{name}: must be text features (got {shown(features)}). Pass what `encode` returns."
        )
    pooled = getattr(features, "pooled", None)
    width = None if pooled is None else pooled.shape[-1]
    if (tokens.ndim, tokens.shape[-1], width) != (3, c.context_dim, spec.pooled_dim):
        raise UserError(
            f"{name}: are another model's. Pass what `encode` of this pipeline returns."
        )
    if not tokens.shape[1]:
        raise UserError(f"{name}: have no tokens. Pass what `encode` returns.")
    ids, fitting = getattr(features, "ids", None), (tokens.shape[1], len(c.axes_dim))
    if ids is not None and ids.shape != fitting:
        raise UserError(
            f"{name}: `ids` must be {fitting}, one position for each text token "
            f"(got {tuple(ids.shape)})."
        )
    if not seeds or len(tokens) not in (1, seeds):
        raise UserError(
            f"{name}: one prompt, or one for each of `seeds`, is needed (got "
            f"{len(tokens)} prompts and {seeds} seeds)."
        )


def check_cfg(
    spec: ModelSpec,
    guidance: Guidance | None,
    negative_prompt: str | None,
    true_cfg_scale: Guidance | None,
    steps: int,
) -> bool:
    """Return whether a second, unconditional pass is requested; UserError for contradictions."""
    if spec.cfg and true_cfg_scale is not None:
        raise UserError(
            f"true_cfg_scale: the guidance of {spec.name} is classifier-free already "
            f"(got {true_cfg_scale!s:.40}). Use `guidance`."
        )
    if spec.distilled and not spec.flux1:
        for name, value in (
            ("negative_prompt", negative_prompt),
            ("true_cfg_scale", true_cfg_scale),
        ):
            if value is not None:
                raise UserError(
                    f"{name}: {spec.name} takes none: {spec.distilled}. Use a base model."
                )
    name = "guidance" if spec.cfg else "true_cfg_scale"
    if spec.cfg:
        scales = check_guidance(spec, guidance, steps) or [1.0]
    else:
        scales = check_true_cfg_scale(true_cfg_scale, steps)
    if negative_prompt is not None and max(scales) <= 1:
        raise UserError(
            f"negative_prompt: has an effect only with `{name}` above 1 "
            f"(got {format_values(scales)}). Use `{name}=3`, for example."
        )
    return max(scales) > 1


def check_seeds(seed: int | Sequence[int], count: int) -> Sequence[int]:
    """Return a seed for each of `count` images; a single seed is that of the first image."""
    if not isinstance(seed, list | tuple):
        first = to_integer("seed", seed)
        check_count(count, first)
        return range(first, first + count)
    check_count(count, 0)
    if len(seeds := to_integers("seed", seed)) != count:
        raise UserError(f"seed: one for each image is needed (got {len(seeds)} for {count}).")
    for value in seeds:
        check_range("seed", value, 0, 2**63 - 1)
    return seeds


def check_count(count: int, seed: int) -> None:
    """Check the number of all images and the first image's seed; image k has seed + k."""
    if count < 1:
        raise UserError(
            "num_images: there is nothing to generate. "
            "Give at least one prompt, and at least one image for each."
        )
    if count > MAX_IMAGES:
        raise UserError(
            f"num_images: all prompts together have too many images (got {count}, expected at most "
            f"{MAX_IMAGES})."
        )
    seed = to_integer("seed", seed)
    if not 0 <= seed < 2**63:
        raise UserError(f"seed: must be from 0 to 2^63 - 1 (got {seed}).")
    if seed + count > 2**63:
        raise UserError(
            f"seed: the last of {count} images would have a seed above 2^63 - 1 (got {seed}). "
            "Use a smaller seed."
        )
