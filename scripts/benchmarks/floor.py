"""The time that the hardware needs for the matrix products, attentions and convolutions alone.

Their shapes are collected in a run on the meta device. They are replayed back to back on random
data, in the process that measures the model. So clocks, power and torch's version are the same for
both figures, and their ratio is the cost of the code around them.
"""

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.steps import (
    FAMILIES,
    Config,
    as_loaded,
    block_lists,
    build_network,
    case_name,
    inputs,
    our_step,
    same_attention,
)
from benchmarks.timing import by_turns, random_weights
from flux.runtime.compilation import compile_blocks
from flux.runtime.devices import can_compile
from flux.runtime.fast import counted_for

HEAVY = (F.linear, F.scaled_dot_product_attention, F.conv2d, F.conv_transpose2d)
Operation = tuple[Callable, tuple, tuple]  # function, positional arguments, named arguments


class Description(NamedTuple):
    """What decides the time of an operation on a tensor: its values do not."""

    shape: torch.Size
    strides: tuple[int, ...]  # a convolution is faster or slower with the channels last
    dtype: torch.dtype


def floor_rows(setting: Setting) -> Iterator[Row]:
    for name, config in FAMILIES.items():
        config = setting.cut(config)
        for side in setting.sides:
            yield from over_floor(case_name(name, config, side), config, side, setting)


def over_floor(case: str, config: Config, side: int, setting: Setting) -> Iterator[Row]:
    """Yield the time of a step over its floor, eager and compiled."""
    found = step_operations(config, side, setting.text, setting.device)
    replayed = replay(found, setting.device)
    model = random_weights(lambda: build_network(config), setting.device, torch.bfloat16)
    model = as_loaded(model, setting.device)
    step = our_step(model, inputs(config, side, setting.text, setting.device, torch.bfloat16))
    row = partial(Row, unit="s", against="floor", runs=2 * setting.rounds)
    with same_attention():
        ours, floor = by_turns([step, replayed], setting.rounds, setting.replayed)
        yield row(f"{case}, eager", ours=ours, theirs=floor)
        if setting.compiled and can_compile(setting.device):
            compile_blocks(model, block_lists(model))
            ours, floor = by_turns([step, replayed], setting.rounds, setting.replayed)
            yield row(f"{case}, compiled", ours=ours, theirs=floor, goal=1.20)
    torch._dynamo.reset()


def step_operations(config: Config, side: int, text: int, device: torch.device) -> list[Operation]:
    def build() -> Callable[[], object]:
        model = random_weights(lambda: build_network(config), "meta", torch.bfloat16)
        model = as_loaded(model, device)
        return our_step(model, inputs(config, side, text, "meta", torch.bfloat16))

    return operations(build, device)


def operations(build: Callable[[], Callable[[], object]], device: torch.device) -> list[Operation]:
    """Build a function on the meta device, and return the heavy operations of it on `device`."""
    found: list[Operation] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            kwargs = kwargs or {}
            if called in HEAVY:
                named = tuple((name, described(value)) for name, value in kwargs.items())
                found.append((called, tuple(map(described, args)), named))
            return called(*args, **kwargs)

    with torch.no_grad(), counted_for(device.type):
        function = build()
        with Watch():
            function()
    return found


def described(value: Any) -> Any:
    if isinstance(value, Tensor):
        return Description(value.shape, value.stride(), value.dtype)
    return value


def replay(operations: list[Operation], device: torch.device) -> Callable[[], None]:
    """Return a function that runs all operations back to back.

    Equal operations share their data, which is too large for caches as it is.
    """
    data = {operation: filled(operation, device) for operation in set(operations)}
    calls = [(operation[0], *data[operation]) for operation in operations]

    def run() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return run


def filled(operation: Operation, device: torch.device) -> tuple[list, dict]:
    """Replace the descriptions in an operation's arguments by random tensors."""
    _, args, named = operation

    def make(value: Any) -> Any:
        return random(value, device) if isinstance(value, Description) else value

    return [make(value) for value in args], {name: make(value) for name, value in named}


def random(tensor: Description, device: torch.device) -> Tensor:
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.strides))
    memory = torch.empty(last + 1, dtype=tensor.dtype, device=device)
    if tensor.dtype == torch.bool:  # a mask
        memory.fill_(True)
    else:
        memory.normal_()
    return memory.as_strided(tensor.shape, tensor.strides)
