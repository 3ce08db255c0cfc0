"""Time two ways to do one thing by turns, A B B A: a machine that slows down slows both."""

import math
import statistics
from collections.abc import Callable
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.rows import Row
from benchmarks.setting import Setting
from flux.parity.reference import relative_l2


def pair(
    name: str,
    ours: Callable[[], Tensor],
    theirs: Callable[[], Tensor],
    setting: Setting,
    **row: Any,
) -> Row:
    """Time two functions of the same result, and return a row of seconds with their difference."""
    difference = relative_l2(ours(), theirs().float())
    seconds = by_turns([ours, theirs], setting.rounds, setting.enough)
    return Row(name, "s", *seconds, runs=2 * setting.rounds, difference=difference, **row)


def by_turns(functions: list[Callable[[], object]], rounds: int, enough: float) -> list[float]:
    """Return the median seconds of each function, of two timings a round, after a warm-up.

    Functions that take less than `enough` seconds are called several times, all equally often.
    """
    usual = []
    for function in functions:
        seconds = timed(function)
        usual.append(timed(function) if seconds < enough else seconds)
    calls = math.ceil(enough / max(usual))
    timings: list[list[float]] = [[] for _ in functions]
    forwards = list(range(len(functions)))
    for _ in range(rounds):
        for k in forwards + forwards[::-1]:
            timings[k].append(timed(functions[k], calls))
    return [statistics.median(each) for each in timings]


def timed(function: Callable[[], object], calls: int = 1) -> float:
    """Return the seconds of one call, with all that it started on a device."""
    synchronize()
    start = perf_counter()
    for _ in range(calls):
        function()
    synchronize()
    return (perf_counter() - start) / calls


def synchronize() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    elif torch.backends.mps.is_available():
        torch.mps.synchronize()


def random_weights(
    build: Callable[[], nn.Module], device: torch.device | str, dtype: torch.dtype
) -> nn.Module:
    """Build a module whose weights are drawn on the device: the largest is ready in seconds.

    Matrices keep the size of their inputs. No weight is 0: products with zeros are faster than any
    real model's.
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
        elif name.endswith("running_mean") or (tensor.ndim == 1 and name.endswith("bias")):
            tensor.normal_(0.0, 0.1, generator=generator)
        elif tensor.ndim == 1:  # the scale of a norm
            tensor.normal_(1.0, 0.1, generator=generator)
        else:
            tensor.normal_(std=tensor[0].numel() ** -0.5, generator=generator)
    return module


def weight_bytes(module: nn.Module, dtype: torch.dtype = torch.bfloat16) -> int:
    return sum(p.numel() for p in module.parameters()) * dtype.itemsize
