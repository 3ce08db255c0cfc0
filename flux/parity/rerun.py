"""Recompute one recorded tensor by our code, with some functions of that code replaced.

Only the module around the tensor runs, on its recorded inputs, so that nothing before it counts.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux import sampling
from flux.errors import UserError
from flux.hooks import joined, replaced, watching
from flux.parity.capture_file import Capture
from flux.parity.modules import PLACE, Modules
from flux.parity.replay import module_runs, split_place
from flux.pipeline import Pipeline
from flux.transformer3 import Flux3Config

SAMPLER_TENSOR = re.compile(r"step\.\d+/(velocity|latents)")  # computed by no network
# owner, attribute, and what is called instead: replacement(original, *args)
Patch = tuple[object, str, Callable]


@dataclass(frozen=True)
class Run:
    """A way to compute some tensors: a function without arguments, and the results' names."""

    function: Callable[[], Sequence[Tensor]]
    outputs: Mapping[int, str]  # position -> name
    is_network: bool


class KnownBug(NamedTuple):
    """A bug, and how a tensor comes out with it: one tensor, or several by a text about each.

    The text is put where the description has `{}`.
    """

    name: str
    description: str
    where: str  # a regular expression: names of the tensors in which the bug can show first
    # LookupError where the capture lacks an input
    compute: "Callable[[Rerun], Tensor | Mapping[str, Tensor]]"


def patched(owner: object, attribute: str, replacement: Callable) -> "Callable[[Rerun], Tensor]":
    """Run our code with `replacement(original, *args)` in place of one function."""
    return lambda rerun: rerun.compute((owner, attribute, replacement))


def module_of(name: str) -> str:
    """Return the module in which a tensor of this name is seen."""
    return name.rpartition("/")[0].removesuffix("/attention")


class _Computed(Exception):
    """Ends a run as soon as its tensor is computed."""


@dataclass
class Rerun:
    """A recorded tensor and a way to compute it again.

    `previous` names the last tensor that agreed. With `late`, patches act only after `previous`.
    Everything that reads a tensor raises LookupError where the capture lacks the tensor.
    """

    name: str
    reference: Capture
    pipe: Pipeline
    previous: str | None = None
    run: Run | None = None
    late: bool = False
    unpatched: Tensor | None = None  # the result without patches

    def compute(self, *patches: Patch) -> Tensor:
        """Return the tensor, computed while the patches act."""
        if self.run is None:
            raise LookupError(self.name)
        acting = not self.late

        def see(name: str, tensor: Tensor) -> None:
            nonlocal acting
            if name == self.computed_as:
                raise _Computed(tensor)
            acting |= name == self.previous

        def switch(replacement: Callable, original: Callable) -> Callable:
            def call(*args, **kwargs):
                if acting:
                    return replacement(original, *args, **kwargs)
                return original(*args, **kwargs)

            return call

        networks = {self.place: self.network} if self.place else {}
        # hooks of all modules take longer than most runs
        places = {module_of(name) for name in (self.computed_as, self.previous or "")}
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(watching(networks, see, places=places))
            for owner, attribute, replacement in patches:
                stack.enter_context(replaced(owner, attribute, partial(switch, replacement)))
            try:
                results = self.run.function()
            except _Computed as computed:
                return computed.args[0].clone()
        for position, name in self.run.outputs.items():
            if name == self.computed_as + self.repeat:
                return results[position]
        raise LookupError(self.name)  # this run does not compute it

    # ways to compute the tensor

    def runs(self) -> Iterator[Run]:
        """Yield the runs that may compute the tensor: the smallest module around it first."""
        modules = Modules(self.pipe)
        try:
            around = [
                run
                for run in module_runs(self.reference)
                if self.lies_in(run.name) and all(map(self.is_same_repeat, run.outputs.values()))
            ]
        except UserError:  # no module has all of its inputs
            around = []
        for each in sorted(around, key=lambda each: -len(each.name)):

            def run_module(each=each) -> list[Tensor]:
                return modules(each.name, [self.recorded(name) for name in each.inputs])

            yield Run(run_module, each.outputs, each.is_network)
        if self.place == "decoder":
            last = len(self.times) - 1
            yield Run(lambda: modules("decoder", [self.latents(last)]), {0: "pixels"}, True)
        if self.name.endswith("rope"):
            yield Run(lambda: [self.network.rope(*self.ids)], {0: self.name}, True)
        if self.table_ids:  # of FLUX 3
            yield Run(
                lambda: [self.network.rope(self.recorded(self.table_ids))], {0: self.name}, True
            )
        if self.place.startswith("step"):
            outputs = {0: f"{self.place}/vec_0" if self.at_zero else f"{self.place}/vec"}
            yield Run(lambda: [self.network.vec(*self.vec_inputs)], outputs, True)

    def lies_in(self, place: str) -> bool:
        """Whether the module `place` computes the tensor: it computes no inputs of its own."""
        if split_place(place)[0] != self.place or place == "decoder":
            return False
        if place.endswith("/attention"):
            return False
        name = self.name.removesuffix(self.repeat)
        if re.fullmatch(rf"{re.escape(place)}/(in|arg)(\.\d+)?", name):
            return False
        inside = self.computed_as.startswith((f"{place}/", f"{place}."))
        return inside or place == self.place

    def is_same_repeat(self, name: str) -> bool:
        """Whether a tensor is of the same run of its module: FLUX 3's `time_in` runs twice."""
        return repeat_of(name) == self.repeat

    # what the name means

    @property
    def repeat(self) -> str:
        """What a capture appends to the name of a module's second tensor, or ""."""
        return repeat_of(self.name)

    @cached_property
    def computed_as(self) -> str:
        """The tensor's name where it is computed: text features and vec have another one there."""
        name = self.name.removesuffix(self.repeat)
        module = re.fullmatch(r"((?:step\.\d+|references)(?:/negative)?)/.+/in(?:\.1)?", name)
        vec = self.reference.records.get(f"{module[1]}/vec") if module else None
        if module and vec and vec.sha256 == self.reference.records[self.name].sha256 != "":
            return f"{module[1]}/vec"  # as a modulation takes it
        result = re.fullmatch("(text(?:/negative)?)/(features|pooled)", name)
        if result is None:
            return name
        if result[2] == "pooled":
            part = "clip"
        else:
            part = "t5" if self.pipe.spec.flux1 else "model"
        return f"{result[1]}/{part}/out"

    @cached_property
    def place(self) -> str:
        """The network that computes the tensor; "" where none does."""
        place = PLACE.fullmatch("decoder/pixels" if self.name == "pixels" else self.computed_as)
        return place[1] if place and not SAMPLER_TENSOR.fullmatch(self.name) else ""

    @property
    def network(self) -> Any:
        """The module; its class depends on the place."""
        return Modules(self.pipe).network(self.place or "step")

    @property
    def step(self) -> int:
        return int(self.name.removeprefix("step.")[:3])

    def in_step(self, name: str) -> str:
        return f"step.{self.step:03}/{name}"

    def in_pass(self, name: str) -> str:
        """Return the full name of `rope`, `ids/txt` or `ids/img`.

        The negative prompt has its own, and so have references that are cached.
        """
        own = [part for part in self.name.split("/") if part in ("negative", "references")]
        return joined(*own, name)

    def in_text(self, name: str) -> str:
        """Return the full name of a text encoder's tensor, `t5/in`, of the prompt in use."""
        return joined("text", "negative" if "negative" in self.name.split("/") else "", name)

    # what was recorded

    def recorded(self, name: str) -> Tensor:
        """Return a full tensor of the reference, on the device."""
        if self.reference.records[name].kind != "full":
            raise LookupError(name)
        return self.reference.tensors[name].to(self.pipe.device)

    @property
    def expected(self) -> Tensor:
        return self.recorded(self.name)

    @property
    def ids(self) -> tuple[Tensor, Tensor]:
        """Positions of the text tokens and of the image tokens."""
        return self.recorded(self.in_pass("ids/txt")), self.recorded(self.in_pass("ids/img"))

    @property
    def table_ids(self) -> str:
        """The name of the positions, where the tensor is a table of FLUX 3; else ""."""
        found = re.fullmatch(r"(negative/)?rope/(\w+)", self.name)
        return f"{found[1] or ''}ids/{found[2]}" if found else ""

    @property
    def at_zero(self) -> bool:
        """Whether the tensor belongs to the conditioning vector of time 0, which FLUX 3 has."""
        return self.name.endswith("/vec_0") or self.repeat == "~2"

    @property
    def times(self) -> Tensor:
        return self.recorded("schedule")

    @property
    def image_tokens(self) -> int:
        """The number of tokens of the generated image."""
        return math.prod(self.recorded("noise").shape[2:])

    @property
    def vec_inputs(self) -> tuple[Tensor | None, ...]:
        """The arguments of `vec` at this step: t, guidance, pooled text; FLUX 3: t, target."""
        t, guidance, pooled = self.times[self.step - 1 : self.step], None, None
        config = self.pipe.spec.transformer
        if isinstance(config, Flux3Config):
            t = torch.zeros_like(t) if self.at_zero else t
            return t, (self.times[self.step : self.step + 1] if config.flow_map else None)
        if config.guidance:
            guidance = torch.full_like(t, self.at_step(self.reference.recipe["guidance"]))
        if config.vector_dim is not None:
            pooled = self.recorded(f"{self.place}/vector_in/in")
        return t, guidance, pooled

    @property
    def cfg_scale(self) -> float:
        """The scale of classifier-free guidance at this step."""
        key = "guidance" if self.pipe.spec.cfg else "true_cfg_scale"
        return self.at_step(self.reference.recipe[key])

    def at_step(self, values: float | Sequence[float]) -> float:
        """Return this step's value. A run from an image leaves out the first steps."""
        values = [values] if isinstance(values, float | int) else values
        each = sampling.per_step_values(values, self.reference.recipe["steps"])
        return each[self.step - len(self.times)]

    def latents(self, step: int) -> Tensor:
        """Return the latents after a step, (B, C, h, w); the noise before the first."""
        return self.recorded(f"step.{step:03}/latents" if step else "noise")


def repeat_of(name: str) -> str:
    found = re.search(r"~\d+$", name)
    return found[0] if found else ""


def reruns(name: str, reference: Capture, pipe: Pipeline, previous: str | None) -> list[Rerun]:
    """Return the ways to compute a tensor, the smallest run first; one without a run if none can.

    A complete network runs only where no module alone computes the tensor. Each run comes twice:
    with patches that act throughout, and with patches that act after `previous`.
    """
    bare = Rerun(name, reference, pipe, previous)
    found: list[Rerun] = []
    for run in bare.runs():
        if run.is_network and found:
            break
        rerun = replace(bare, run=run)
        try:
            found.append(replace(rerun, unpatched=rerun.compute()))
        except LookupError:  # this run does not compute it, or the capture lacks an input
            continue
    if not found:
        return [bare]
    return [replace(rerun, late=late) for rerun in found for late in (False, True)]
