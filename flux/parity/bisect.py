"""Find the first step and the first module at which a network departs from a capture, in few runs, by replay.

Steps, and then the blocks of the step that is found, are run in stretches, each from what was recorded before it, and judged
at its end: 1, 2, 4, ... of them, until a stretch departs; that one is halved until one step, or one block, is left. So k good
ones before a fault cost at most 2·log2(k + 1) + 1 stretches, in which at most 3·k + 1 steps or blocks are run. Only the
block that is found is looked into.
"""

import copy
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import count

import torch
from einops import rearrange
from torch import Tensor
from torch.utils._pytree import tree_leaves

from flux import sampling
from flux.errors import NonFiniteError, UserError
from flux.parity.capture import Request
from flux.parity.capture_file import DTYPES, Capture
from flux.parity.compare import BUDGETS, Row, first_over
from flux.parity.hooks import replaced
from flux.parity.modules import PLACE, Call, Modules
from flux.parity.replay import (
    Recorded,
    asked,
    from_recorded,
    inputs_of,
    inside,
    judged,
    local,
    passes,
    recorded,
)
from flux.pipeline import Pipeline
from flux.runtime.checks import check_cfg, check_steps
from flux.transformer import Modulations

BLOCK = re.compile(r"(double|single)_blocks\.(\d+)")
SEARCH = BUDGETS | {"F32": 1e-5}  # by the dtype of the pipeline


@dataclass(frozen=True)
class Departure:
    """Where a network departs: in which `step`, in which `block` if it is in one, and the first tensor, as a row."""

    step: int
    block: str | None
    row: Row
    runs: Counter  # how many "stretches" were run to find it, and how many times a "network" and a "block" were in them

    def __str__(self) -> str:
        errors, where = self.row.errors, self.block or f"step {self.step}, outside the blocks"
        error = (
            self.row.fault
            if errors is None
            else f"relative L2 {errors.relative_l2:.2g} of {self.row.budget:.2g}"
        )
        what = (
            "the first to depart is"
            if self.row.over
            else "errors add up, and no module alone is over budget; nearest is"
        )
        found = f"found in {self.runs['stretches']} stretches: {self.runs['network']} runs of the network"
        return (
            f"{what} {self.row.name}, in {where}: {error}\n{found}, {self.runs['block']} of a block"
        )


def bisect(
    capture: Capture,
    pipe: Pipeline,
    request: Request,
    call: Call | None = None,
    budget: float | None = None,
) -> Departure | None:
    """The first departure from a capture of a whole run; None if nothing is over budget.

    `pipe` has the schedule, the guidance and the sampler; `call` the networks, if they are not its own. A fault that the rest
    of a stretch makes smaller than the budget is not seen: `replay.forced` runs everything, and misses none.
    """
    budget = SEARCH[DTYPES[pipe.dtype]] if budget is None else budget
    call = _Counted(call or Modules(pipe))
    with from_recorded(capture, pipe) as twin:
        loop = _Loop(capture, twin, request, call)
        found = call.first(loop.steps, lambda start, end: loop.row(start, end, budget).over)
        if found is None:
            return None
        step = found + 1
        for where in passes(capture, step):
            blocks = _blocks(capture, where)
            at = call.first(
                len(blocks), lambda start, end: _departs(capture, call, blocks[start:end], budget)
            )
            if at is not None:
                return Departure(
                    step,
                    blocks[at].name,
                    _look_into(capture, call.call, blocks[at], budget),
                    call.runs,
                )
        row = _outside_blocks(capture, call, step, budget) or loop.row(found, step, budget)
        return Departure(step, None, row, call.runs)


def first_departure(number: int, departs: Callable[[int, int], bool]) -> int | None:
    """The one of a `number` in a row at which they depart: `departs(start, end)` runs a stretch, `end` not included."""
    start, length = 0, 1
    while start < number and not departs(start, min(start + length, number)):
        start, length = start + length, 2 * length
    if start >= number:
        return None
    end = min(start + length, number)
    while end - start > 1:
        middle = (start + end) // 2
        start, end = (start, middle) if departs(start, middle) else (middle, end)
    return start


class _Counted:
    """A call that counts what is run of it."""

    def __init__(self, call: Call):
        self.call, self.runs = call, Counter()

    def __call__(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        path = PLACE.fullmatch(name)[4]
        self.runs[
            "network" if path is None else "block" if BLOCK.fullmatch(path) else "module"
        ] += 1
        return asked(self.call, name, inputs)

    def first(self, number: int, departs: Callable[[int, int], bool]) -> int | None:
        def counted(start: int, end: int) -> bool:
            self.runs["stretches"] += 1
            return departs(start, end)

        return first_departure(number, counted)


# ---------------------------------------------------------------- steps


class _Loop:
    """The steps of a pipeline's loop, from the latents that were recorded before the first of them."""

    def __init__(self, capture: Capture, pipe: Pipeline, request: Request, call: Call):
        self.capture, self.pipe, self.request, self.call, r = capture, pipe, request, call, request
        self.steps = len(
            [name for name in capture.names if re.fullmatch(r"step\.\d+/latents", name)]
        )
        if not self.steps or not all(
            f"step.{n:03}/latents" in capture.tensors for n in range(1, self.steps + 1)
        ):
            raise UserError(
                f"{capture.path} lacks latents, from which to go on: capture it without --steps-of and --only"
            )
        self.conditions = r.pictures and pipe.condition(r.pictures, r.width, r.height)
        self.features, self.negative = pipe.encode([r.prompt]), None
        if check_cfg(
            pipe.spec, r.guidance, r.negative_prompt, r.cfg_scale, check_steps(pipe.spec, r.steps)
        ):
            self.negative = pipe.encode([r.negative_prompt or ""])

    def row(self, start: int, end: int, budget: float) -> Row:
        """What the steps start + 1 to end come to: the last velocity if it is over budget, else the latents after it."""
        last = f"step.{end:03}"
        try:
            velocity, latents = self.run(start, end)
        except NonFiniteError as error:
            return Row(
                f"{last}/latents",
                self.capture.records[f"{last}/latents"].shape,
                "F32",
                "full",
                budget,
                None,
                str(error),
            )
        tensors = {f"{last}/velocity": velocity, f"{last}/latents": latents}
        rows = judged(
            self.capture, {n: x for n, x in tensors.items() if n in self.capture.records}, budget
        )
        return first_over(rows) or rows[-1]

    def run(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        numbers, coming, velocities = count(start + 1), [], []

        def denoise(
            original: Callable, velocity: Callable, x: Tensor, times: Tensor, *rest
        ) -> Tensor:
            def step(x: Tensor, t: float) -> Tensor:
                where = f"step.{next(numbers):03}"
                coming[:] = [where, f"{where}/negative"]
                velocities[:] = [velocity(x, t)]
                return velocities[0]

            if start:
                before = self.capture.tensors[f"step.{start:03}/latents"]
                x = rearrange(before, "b c h w -> b (h w) c").to(x.device)
            return original(step, x, times[start : end + 1], *rest)

        def velocity(
            img: Tensor, txt: Tensor, rope: Tensor, mods: Modulations, memories=None
        ) -> Tensor:
            return self.call(
                coming.pop(0), [img, txt, rope, mods.vec, *tree_leaves(memories or [])]
            )[0].to(img.device)

        r, pipe = self.request, copy.copy(self.pipe)
        pipe.transformer = copy.copy(self.pipe.transformer)
        pipe.transformer.module = copy.copy(
            self.pipe.transformer()
        )  # with the same weights, in which `call` may run
        pipe.transformer.module.denoise = velocity
        size = (None, None) if self.conditions else (r.width, r.height)
        with replaced(sampling, "denoise", lambda original: partial(denoise, original)):
            latents = pipe.sample(
                self.features,
                [r.seed],
                *size,
                r.steps,
                r.guidance,
                self.negative,
                r.cfg_scale,
                conditions=self.conditions,
            )
        return velocities[0], latents


# ---------------------------------------------------------------- blocks


def _blocks(capture: Capture, where: str) -> list[Recorded]:
    """All blocks of a pass, in a row."""
    blocks = [
        each
        for each in recorded(capture)
        if PLACE.fullmatch(each.name)[1] == where and _is_block(each)
    ]
    places = [BLOCK.fullmatch(PLACE.fullmatch(each.name)[4]) for each in blocks]
    kinds = [
        [int(place[2]) for place in places if place[1] == kind] for kind in ("double", "single")
    ]
    if not blocks or any(numbers != list(range(len(numbers))) for numbers in kinds):
        raise UserError(
            f"{where} departs, but {capture.path} lacks blocks of it in full: capture it without --only and --keep"
        )
    return blocks


def _is_block(each: Recorded) -> bool:
    return BLOCK.fullmatch(PLACE.fullmatch(each.name)[4] or "") is not None


def _departs(capture: Capture, call: Call, blocks: list[Recorded], budget: float) -> bool:
    """Whether what comes of these blocks in a row is over budget, the first one's input being the recorded one."""
    streams: list[Tensor] = []
    for each in blocks:
        inputs = inputs_of(capture, each)
        if (
            "single_blocks" in each.name and len(streams) == 2
        ):  # image and text become one sequence, text first
            streams = [torch.cat(streams[::-1], dim=1)]
        inputs[: len(streams)] = streams
        streams = call(each.name, inputs)[: len(each.outputs)]
    outputs = {name: streams[number] for number, name in blocks[-1].outputs.items()}
    return any(row.over for row in judged(capture, outputs, budget))


def _look_into(capture: Capture, call: Call, block: Recorded, budget: float) -> Row:
    """The first tensor over budget in a block, or else the nearest to it."""
    if isinstance(call, Modules):
        rows = inside(capture, call, block.name, budget=budget)
    else:  # of a function, its modules one by one
        parts = [
            each
            for each in recorded(capture)
            if re.match(rf"{re.escape(block.name)}(?![^./])", each.name)
        ]
        rows = [row for each in parts for row in local(capture, call, each, budget)]
    return first_over(rows) or max(rows, key=lambda row: row.ratio)


def _outside_blocks(capture: Capture, call: Call, step: int, budget: float) -> Row | None:
    """The first over budget of all modules of a step whose blocks are well: an embedder, a modulation, the final layer."""
    places = (*passes(capture, step), "references")
    parts = [
        each
        for each in recorded(capture)
        if PLACE.fullmatch(each.name)[1] in places and not each.whole
    ]
    return first_over([row for each in parts for row in local(capture, call, each, budget)])
