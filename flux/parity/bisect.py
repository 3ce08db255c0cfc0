"""Find the first step and the first module at which a network differs from a capture, in few runs.

Steps run in stretches of 1, 2, 4, ..., each from the recorded latents before it and compared at its
end. The first stretch that differs is halved until one step is left. The blocks of that step are
searched in the same way. So k good steps before a fault cost at most 2·log2(k + 1) + 1 stretches,
of at most 3·k + 1 steps together. Only the block that is found is compared tensor by tensor.
"""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from flux import sampling
from flux.errors import NonFiniteError, UserError
from flux.hooks import replaced
from flux.parity.capture import Request
from flux.parity.capture_file import DTYPES, Capture
from flux.parity.compare import TOLERANCES, Row, first_over
from flux.parity.modules import Call, Modules
from flux.parity.replay import (
    ModuleRun,
    call_checked,
    compare_to_recorded,
    module_runs,
    passes_of_step,
    recorded_inputs,
    replay_inside,
    replay_module,
    split_place,
    start_from_recorded,
)
from flux.pipeline import Pipeline
from flux.runtime.checks import check_cfg, check_steps
from flux.runtime.terminal import printable
from flux.transformer import KVCache, Modulations

BLOCK = re.compile(r"(\w+_blocks(?:\.\w+)?)\.(\d{1,9})")  # its list, and its number
SEARCH_TOLERANCES = TOLERANCES | {"F32": 1e-5}  # by the dtype of the pipeline


@dataclass(frozen=True)
class FirstDifference:
    """Where a network differs first: the step, the block if any, and the row of the tensor.

    `runs` counts "stretches", and the runs of a "network" and of a "block" in them.
    """

    step: int
    block: str | None
    row: Row
    runs: Counter

    def __str__(self) -> str:
        where = printable(self.block or f"step {self.step}, outside the blocks")
        if self.row.errors is None:
            error = printable(self.row.fault)
        else:
            error = f"relative L2 {self.row.errors.relative_l2:.2g} of {self.row.tolerance:.2g}"
        subject = "the first difference is at"
        if not self.row.over:
            subject = "errors accumulate, and no module alone is over its tolerance; the nearest is"
        runs = (
            f"{self.runs['stretches']} stretches: {self.runs['network']} runs of the network, "
            f"{self.runs['block']} of a block"
        )
        return f"{subject} {printable(self.row.name)}, in {where}: {error}\nfound in {runs}"


def bisect(
    capture: Capture,
    pipe: Pipeline,
    request: Request,
    call: Call | None = None,
    tolerance: float | None = None,
) -> FirstDifference | None:
    """Return the first difference from the capture of a complete run; None if there is none.

    `pipe` supplies schedule, guidance and sampler, and the networks unless `call` does. A fault
    that the rest of its stretch makes smaller than the tolerance is missed. `replay_modules` misses
    none.
    """
    tolerance = SEARCH_TOLERANCES[DTYPES[pipe.dtype]] if tolerance is None else tolerance
    counted = _CountedCall(call or Modules(pipe))
    with start_from_recorded(capture, pipe) as copied:
        loop = _Loop(capture, copied, request, counted)

        def steps_differ(start: int, end: int) -> bool:
            return loop.row(start, end, tolerance).over

        found = counted.search(loop.steps, steps_differ)
        if found is None:
            return None
        step = found + 1
        for place in passes_of_step(capture, step):
            blocks = _blocks(capture, place)

            def blocks_differ(start: int, end: int, blocks: list[ModuleRun] = blocks) -> bool:
                return _output_differs(capture, counted, blocks[start:end], tolerance)

            at = counted.search(len(blocks), blocks_differ)
            if at is not None:
                row = _first_inside(capture, counted.call, blocks[at], tolerance)
                return FirstDifference(step, blocks[at].name, row, counted.runs)
        outside = _first_outside_blocks(capture, counted, step, tolerance)
        row = outside or loop.row(found, step, tolerance)
        return FirstDifference(step, None, row, counted.runs)


def first_differing(number: int, differs: Callable[[int, int], bool]) -> int | None:
    """Return the first of `number` items that differs. `differs(start, end)` excludes `end`."""
    start, length = 0, 1
    while start < number and not differs(start, min(start + length, number)):
        start, length = start + length, 2 * length
    if start >= number:
        return None
    end = min(start + length, number)
    while end - start > 1:
        middle = (start + end) // 2
        if differs(start, middle):
            end = middle
        else:
            start = middle
    return start


class _CountedCall:
    """A call that counts its runs of networks, blocks and other modules."""

    def __init__(self, call: Call):
        self.call = call
        self.runs: Counter[str] = Counter()

    def __call__(self, name: str, inputs: list[Tensor]) -> list[Tensor]:
        path = split_place(name)[1]
        if path == "":
            self.runs["network"] += 1
        elif BLOCK.fullmatch(path):
            self.runs["block"] += 1
        else:
            self.runs["module"] += 1
        return call_checked(self.call, name, inputs)

    def search(self, number: int, differs: Callable[[int, int], bool]) -> int | None:
        def counted(start: int, end: int) -> bool:
            self.runs["stretches"] += 1
            return differs(start, end)

        return first_differing(number, counted)


# ---------------------------------------------------------------- steps


class _Loop:
    """The pipeline's sampling loop. It starts at any step, from the recorded latents before it."""

    def __init__(self, capture: Capture, pipe: Pipeline, request: Request, call: Call):
        self.capture, self.pipe, self.request, self.call = capture, pipe, request, call
        r = request
        recorded = [name for name in capture.names if re.fullmatch(r"step\.\d+/latents", name)]
        self.steps = len(recorded)
        expected = [f"step.{number:03}/latents" for number in range(1, self.steps + 1)]
        if not recorded or any(
            name not in capture.records or capture.kind(name) != "full" for name in expected
        ):
            raise UserError(
                f"{capture.path}: lacks latents to start from. Capture it in full, without "
                "`at_steps` and `only`"
            )
        self.conditions = None
        if r.images:
            self.conditions = pipe.condition(r.images, r.width, r.height)
        self.features, self.negative = pipe.encode([r.prompt]), None
        steps = check_steps(pipe.spec, r.steps)
        if check_cfg(pipe.spec, r.guidance, r.negative_prompt, r.true_cfg_scale, steps):
            self.negative = pipe.encode([r.negative_prompt or ""])

    def row(self, start: int, end: int, tolerance: float) -> Row:
        """Run steps start + 1 to end. Return the last velocity's row if over, else the latents'."""
        last = f"step.{end:03}"
        try:
            velocity, latents = self.run(start, end)
        except NonFiniteError as error:
            name = f"{last}/latents"
            shape = self.capture.records[name].shape
            return Row(name, shape, "F32", "full", tolerance, None, str(error))
        tensors = {f"{last}/velocity": velocity, f"{last}/latents": latents}
        tensors = {name: x for name, x in tensors.items() if name in self.capture.records}
        rows = compare_to_recorded(self.capture, tensors, tolerance)
        return first_over(rows) or rows[-1]

    def run(self, start: int, end: int) -> tuple[Tensor, Tensor]:
        """Run the steps start + 1 to end. Return the last velocity and the latents after it."""
        stretch = _Stretch(self, start, end)
        r, pipe = self.request, copy.copy(self.pipe)
        # a copy with the same weights: `call` may run the original
        module: Any = copy.copy(self.pipe.transformer())
        if pipe.spec.flux3:
            module.stream, module.denoise = _Held.hold, stretch.run_network3
        else:
            module.denoise = partial(stretch.run_network, module.denoise)
        pipe.transformer = copy.copy(self.pipe.transformer)
        pipe.transformer.module = module
        pipe.transformer.drop_submodules = lambda *_: module  # type: ignore[method-assign]
        size = (None, None) if self.conditions else (r.width, r.height)
        with replaced(sampling, "denoise", lambda original: partial(stretch.denoise, original)):
            latents = pipe.sample(
                self.features,
                [r.seed],
                *size,
                r.steps,
                r.guidance,
                self.negative,
                r.true_cfg_scale,
                conditions=self.conditions,
            )
        return stretch.velocity, latents


class _Stretch:
    """Takes the places of `sampling.denoise` and of the transformer while some steps run."""

    def __init__(self, loop: _Loop, start: int, end: int):
        self.loop, self.start, self.end = loop, start, end
        self.step = start
        self.passes: list[str] = []  # names of the passes of this step that are still to run

    def denoise(self, original: Callable, velocity: Callable, x: Tensor, times: Tensor, *rest):
        def counted(x: Tensor, *at) -> Tensor:
            self.step += 1
            place = f"step.{self.step:03}"
            self.passes = [place, f"{place}/negative"]
            self.velocity = velocity(x, *at)
            return self.velocity

        if self.start:
            before = self.loop.capture.tensors[f"step.{self.start:03}/latents"]
            x = rearrange(before, "b c h w -> b (h w) c").to(x.device)
        return original(counted, x, times[self.start : self.end + 1], *rest)

    def run_network(
        self,
        original: Callable,
        img: Tensor,
        txt: Tensor,
        rope: Tensor,
        mods: Modulations,
        caches: list[KVCache] | None = None,
    ) -> Tensor:
        if not self.passes:  # before the first step: the references, which fill the caches
            return original(img, txt, rope, mods, caches)
        inputs = [img, txt, rope, mods.vec]
        for cache in caches or ():
            inputs += [x for x in (cache.k, cache.v) if x is not None]
        return self.loop.call(self.passes.pop(0), inputs)[0].to(img.device)

    def run_network3(
        self, img: Tensor, rope: Tensor, vec: Tensor, text: "_Held", *references: "_Held"
    ) -> Tensor:
        """Run a pass of FLUX 3 on what `capture3.inputs_of_pass` lists."""
        streams = text, *references
        tokens, tables = [s.tokens for s in streams], [s.rope for s in streams]
        inputs = [img, *tokens, rope, *tables, vec[:, :1], text.vec[:, :1]]
        return self.loop.call(self.passes.pop(0), inputs)[0].to(img.device)


class _Held(NamedTuple):
    """What a stream of FLUX 3 is computed from, in the place of the stream."""

    tokens: Tensor
    rope: Tensor
    vec: Tensor

    @classmethod
    def hold(cls, mode: str, tokens: Tensor, rope: Tensor, vec: Tensor) -> "_Held":
        return cls(tokens, rope, vec)


# ---------------------------------------------------------------- blocks


def _blocks(capture: Capture, place: str) -> list[ModuleRun]:
    """Return the runs of all blocks of a pass, in order. UserError if one is not recorded."""
    blocks: list[ModuleRun] = []
    numbers: dict[str, list[int]] = defaultdict(list)
    for each in module_runs(capture):
        network, path = split_place(each.name)
        block = BLOCK.fullmatch(path)
        if network == place and block:
            blocks.append(each)
            numbers[block[1]].append(int(block[2]))
    if not blocks or any(found != list(range(len(found))) for found in numbers.values()):
        raise UserError(
            f"{capture.path}: {place} differs, but its blocks are not recorded in full. "
            "Capture it without `only` and `store`"
        )
    return blocks


def _output_differs(
    capture: Capture, call: Call, blocks: list[ModuleRun], tolerance: float
) -> bool:
    """Run blocks in a row from the first one's recorded input. Whether the last output is over."""
    streams: list[Tensor] = []

    def over(last: ModuleRun) -> bool:
        outputs = {name: streams[position] for position, name in last.outputs.items()}
        return any(row.over for row in compare_to_recorded(capture, outputs, tolerance))

    for last, each in zip([None, *blocks], blocks):
        inputs = recorded_inputs(capture, each)
        if last and _list_of(last) != _list_of(each):
            if len(streams) == 2:
                streams = [torch.cat(streams[::-1], dim=1)]  # image and text -> text first
            elif over(last):  # FLUX 3: the end of a mode
                return True
            else:
                streams = []
        inputs[: len(streams)] = streams
        streams = call(each.name, inputs)[: len(each.outputs)]
    return over(blocks[-1])


def _list_of(block: ModuleRun) -> str:
    return block.name.rpartition(".")[0]


def _first_inside(capture: Capture, call: Call, block: ModuleRun, tolerance: float) -> Row:
    """Return the row of the first tensor over its tolerance in a block, or else of the nearest."""
    if isinstance(call, Modules):
        rows = replay_inside(capture, call, block.name, tolerance=tolerance)
    else:  # a function: its modules one by one
        parts = [
            each
            for each in module_runs(capture)
            if re.match(rf"{re.escape(block.name)}(?![^./])", each.name)
        ]
        rows = [row for each in parts for row in replay_module(capture, call, each, tolerance)]
    return first_over(rows) or max(rows, key=lambda row: row.ratio)


def _first_outside_blocks(capture: Capture, call: Call, step: int, tolerance: float) -> Row | None:
    """Return the first row over its tolerance in the embedders, modulations and final layer."""
    places = (*passes_of_step(capture, step), "references")
    parts = [
        each
        for each in module_runs(capture)
        if split_place(each.name)[0] in places and not each.is_network
    ]
    rows = [row for each in parts for row in replay_module(capture, call, each, tolerance)]
    return first_over(rows)
