"""How fast the hardware is at what a model cannot avoid: its matrix products, attentions and convolutions, and nothing else.

Their shapes are collected in a run on the meta device, and replayed back to back on random data, in the process that measures
the model: so clocks, power and torch's version are in both figures, and the ratio says what the code around them costs.
"""

from collections.abc import Callable, Iterator
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.steps import FAMILIES, inputs, our_step, same_attention
from benchmarks.timing import by_turns, random_weights
from flux.runtime.devices import can_compile
from flux.runtime.lazy_module import compile_blocks
from flux.transformer import BLOCK_LISTS, Flux, FluxConfig

HEAVY = (F.linear, F.scaled_dot_product_attention, F.conv2d)
Operation = tuple[
    Callable, tuple, tuple
]  # function, its arguments, those that have names; tensors as their (shape, dtype)


def floor_rows(setting: Setting) -> Iterator[Row]:
    for name, config in FAMILIES.items():
        config = setting.cut(config)
        for side in setting.sides:
            case = (
                f"step, {name}, 1 + 2 blocks of width {config.hidden_size}, {side}x{side}, bfloat16"
            )
            yield from over_floor(case, config, side, setting)


def over_floor(case: str, config: FluxConfig, side: int, setting: Setting) -> Iterator[Row]:
    """A step, eager and compiled, over its floor."""
    replayed = replay(step_operations(config, side, setting.text), setting.device)
    model = random_weights(lambda: Flux(config), setting.device, torch.bfloat16)
    step = our_step(model, inputs(config, side, setting.text, setting.device, torch.bfloat16))
    row = partial(Row, unit="s", against="floor", runs=2 * setting.rounds)
    with same_attention():
        ours, floor = by_turns([step, replayed], setting.rounds, setting.replayed)
        yield row(f"{case}, eager", ours=ours, theirs=floor)
        if setting.compiled and can_compile(setting.device):
            compile_blocks(model, BLOCK_LISTS)
            ours, floor = by_turns([step, replayed], setting.rounds, setting.replayed)
            yield row(f"{case}, compiled", ours=ours, theirs=floor, goal=1.20)
    torch._dynamo.reset()


def step_operations(config: FluxConfig, side: int, text: int) -> list[Operation]:
    model = random_weights(lambda: Flux(config), "meta", torch.bfloat16)
    return operations(our_step(model, inputs(config, side, text, "meta", torch.bfloat16)))


def operations(function: Callable[[], object]) -> list[Operation]:
    """What of `function` is heavy, in its order."""
    found: list[Operation] = []

    class Watch(TorchFunctionMode):
        def __torch_function__(self, called, types, args=(), kwargs=None):
            if called in HEAVY:
                kwargs = kwargs or {}
                found.append(
                    (
                        called,
                        tuple(map(described, args)),
                        tuple((k, described(v)) for k, v in kwargs.items()),
                    )
                )
            return called(*args, **(kwargs or {}))

    with torch.no_grad(), Watch():
        function()
    return found


def described(value):
    return (value.shape, value.dtype) if isinstance(value, Tensor) else value


def replay(operations: list[Operation], device: torch.device) -> Callable[[], None]:
    """All of them, back to back. Equal ones share their data: that is too much for caches as it is."""
    data = {operation: filled(operation, device) for operation in set(operations)}
    calls = [(operation[0], *data[operation]) for operation in operations]

    def run() -> None:
        for function, args, kwargs in calls:
            function(*args, **kwargs)

    return run


def filled(operation: Operation, device: torch.device) -> tuple[list, dict]:
    """Random tensors for those that are described."""
    _, args, named = operation

    def make(x):
        return random(*x, device) if isinstance(x, tuple) and isinstance(x[0], torch.Size) else x

    return [make(x) for x in args], {name: make(x) for name, x in named}


def random(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    if dtype == torch.bool:  # a mask
        return torch.ones(shape, dtype=dtype, device=device)
    return torch.randn(shape, dtype=dtype, device=device)
