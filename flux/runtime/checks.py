"""What may be asked of a model: sizes, steps, guidance, seeds; each wrong value is refused in one sentence."""

import operator
import warnings
from collections.abc import Sequence

from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io.input import MAX_PIXELS

Guidance = float | Sequence[float]  # one value; one a step; or two, the first and the last


def check_whole(flag: str, number: int) -> None:
    try:
        operator.index(number)
    except TypeError:
        raise UserError(f"{flag} {number!r:.40}: must be a whole number") from None


def check_size(height: int, width: int) -> tuple[int, int]:
    for name, n in (("width", width), ("height", height)):
        check_whole(f"--{name}", n)
        if n % 16 or not 64 <= n <= 8192:
            low, high = (min(8192, max(64, n // 16 * 16 + more)) for more in (0, 16))
            nearest = str(low) if not 64 <= n <= 8192 else f"{low} or {high}"
            raise UserError(
                f"--{name} {n}: sizes are multiples of 16 from 64 to 8192; the nearest is {nearest}"
            )
    if width * height > MAX_PIXELS:
        size, most = (
            f"{pixels / 1e6:.{digits}f}"
            for pixels, digits in ((width * height, 0), (MAX_PIXELS, 1))
        )
        raise UserError(
            f"--width {width} --height {height}: that is {size} megapixels, and at most {most} are possible"
        )
    return height, width


def check_steps(spec: ModelSpec, steps: int | None) -> int:
    if steps is None:
        return spec.steps
    check_whole("--steps", steps)
    if not 1 <= steps <= 1000:
        raise UserError(
            f"--steps {steps}: must be from 1 to 1000; {spec.name} is meant for {spec.steps}"
        )
    if spec.distilled and steps != spec.steps:
        warnings.warn(
            f"{spec.name} was distilled for {spec.steps} steps, not {steps}", stacklevel=4
        )
    return steps


def check_guidance(spec: ModelSpec, guidance: Guidance | None, steps: int) -> list[float] | None:
    """The guidance to use, as `sampling.per_step_values` takes it; None for a model that has none."""
    if guidance is None:
        return None if spec.guidance is None else [spec.guidance]
    meant = "takes none" if spec.guidance is None else f"is meant for {spec.guidance:g}"
    values = check_values("--guidance", guidance, steps, f"{spec.name} {meant}")
    if spec.guidance is None:
        if values != [1]:
            why = spec.distilled or "its transformer has no input for it"
            raise UserError(
                f"{spec.name} takes no --guidance (here {written(values)}): {why}; leave it out, or use a base or dev model"
            )
        return None
    return values


def check_scale(cfg_scale: Guidance | None, steps: int) -> list[float]:
    return (
        [1.0]
        if cfg_scale is None
        else check_values("--cfg-scale", cfg_scale, steps, "1 is off, and 2 to 5 are usual")
    )


def check_values(flag: str, values: Guidance, steps: int, advice: str) -> list[float]:
    """A value, two, or one a step."""
    values = list(values) if isinstance(values, Sequence) else [values]
    if len(values) not in (1, 2, steps):
        raise miscounted(flag, len(values), steps)
    for value in values:
        if not 0 <= value <= 100:
            raise UserError(f"{flag} {value}: must be from 0 to 100; {advice}")
    return values


def miscounted(flag: str, count: int, steps: int) -> UserError:
    return UserError(
        f"{flag} has {count} values for {steps} steps: give one, START:END, or one for each step"
    )


def written(values: Sequence[float]) -> str:
    """As --guidance takes it."""
    return (":" if len(values) == 2 else ",").join(f"{value:g}" for value in values)


def check_cfg(
    spec: ModelSpec,
    guidance: Guidance | None,
    negative_prompt: str | None,
    cfg_scale: Guidance | None,
    steps: int,
) -> bool:
    """Whether a second, unconditional pass is asked for; UserError where that makes no sense."""
    if spec.cfg and cfg_scale is not None:
        raise UserError(
            f"--cfg-scale {cfg_scale}: the guidance of {spec.name} is classifier-free already; use --guidance"
        )
    if spec.distilled and (negative_prompt, cfg_scale) != (None, None) and not spec.flux1:
        raise UserError(
            f"{spec.name} takes no negative prompt and no --cfg-scale: {spec.distilled}; use a base model"
        )
    scale = max(
        check_guidance(spec, guidance, steps) if spec.cfg else check_scale(cfg_scale, steps)
    )
    if negative_prompt is not None and scale <= 1:
        flag = "--guidance" if spec.cfg else "--cfg-scale"
        raise UserError(
            f"--negative-prompt has an effect only with {flag} above 1; add {flag} 3, for example"
        )
    return scale > 1


def check_count(count: int, seed: int) -> None:
    if count < 1:
        raise UserError(
            "there is nothing to make: give at least one prompt, and --num-images of at least 1"
        )
    check_whole("--seed", seed)
    if not 0 <= seed <= 2**63 - count:
        raise UserError(f"--seed {seed}: must be from 0 to 2^63 - 1")
