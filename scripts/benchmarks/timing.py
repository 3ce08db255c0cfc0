"""Two ways to do one thing, timed by turns: A B B A, so that a machine that slows down slows both."""

import math
import statistics
from collections.abc import Callable
from time import perf_counter

import torch
from torch import Tensor, nn

from benchmarks.rows import Row
from benchmarks.setting import Setting
from flux.parity.reference import relative_l2


def pair(
    name: str, ours: Callable[[], Tensor], theirs: Callable[[], Tensor], setting: Setting, **row
) -> Row:
    """Two functions that should have the same result, as a row of seconds."""
    difference = relative_l2(ours(), theirs().float())
    seconds = by_turns([ours, theirs], setting.rounds, setting.enough)
    return Row(name, "s", *seconds, runs=2 * setting.rounds, difference=difference, **row)


def by_turns(functions: list[Callable[[], object]], rounds: int, enough: float) -> list[float]:
    """Median seconds of each, of two timings a round, after a warm-up; what takes less than `enough` is repeated."""
    first = [timed(function) for function in functions]
    usual = max(
        timed(function) if seconds < enough else seconds
        for function, seconds in zip(functions, first)
    )
    calls = math.ceil(enough / usual)  # the same number of each
    seconds = [[] for _ in functions]
    for _ in range(rounds):
        for k in [*range(len(functions)), *reversed(range(len(functions)))]:
            seconds[k].append(timed(functions[k], calls))
    return [statistics.median(each) for each in seconds]


def timed(function: Callable[[], object], calls: int = 1) -> float:
    """Seconds of one call, all that it started on a device included."""
    synchronise()
    start = perf_counter()
    for _ in range(calls):
        function()
    synchronise()
    return (perf_counter() - start) / calls


def synchronise() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def random_weights(
    build: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """A network whose weights are drawn where they will be used, so that the largest is ready in seconds.

    Matrices keep the size of what they multiply. Never zeros: multiplying those is faster than any real model.
    """
    with torch.device("meta"):
        module = build()
    module = module.to(dtype).to_empty(device=device).eval().requires_grad_(False)
    generator = None if str(device) == "meta" else torch.Generator(device).manual_seed(0)
    for name, tensor in module.state_dict().items():
        if not tensor.is_floating_point():
            tensor.zero_()
        elif name.endswith("running_var"):
            tensor.uniform_(0.5, 2, generator=generator)
        elif tensor.ndim == 1:  # a bias or a mean about 0, the scale of a norm about 1
            tensor.normal_(
                0.0 if name.endswith(("bias", "running_mean")) else 1.0, 0.1, generator=generator
            )
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
    return module


def weight_bytes(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize
