"""One recorded tensor, computed again from what a capture recorded before it, by our code with something changed in it.

The run is as small as it can be: the module around the tensor, on its recorded inputs, so that nothing before it counts.
"""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import cached_property, partial

import torch
from torch import Tensor, nn

from flux import sampling
from flux.errors import UserError
from flux.parity.capture_file import Capture
from flux.parity.hooks import joined, replaced, watching
from flux.parity.modules import PLACE, Modules
from flux.parity.replay import recorded
from flux.pipeline import Pipeline

LOOP = re.compile(r"step\.\d+/(velocity|latents)")  # what no network makes
Change = tuple[
    object, str, Callable
]  # owner, attribute, and what is called in its place: wrong(original, *args)


@dataclass(frozen=True)
class Run:
    go: Callable[[], Sequence[Tensor]]
    outputs: Mapping[int, str]  # names of what it gives
    whole: bool  # network


class Found(Exception):
    """Ends a run as soon as its tensor is there."""


@dataclass
class Case:
    """`again` gives the tensor `name`; LookupError where the capture lacks what that takes.

    With `late`, changes act only once `before`, the last tensor that agreed, has been seen.
    """

    name: str
    reference: Capture
    pipe: Pipeline
    before: str | None = None
    run: Run | None = None
    late: bool = False
    honest: Tensor | None = None  # what it gives without a change

    def again(self, *changes: Change) -> Tensor:
        if self.run is None:
            raise LookupError(self.name)
        acting = not self.late

        def see(name: str, tensor: Tensor) -> None:
            nonlocal acting
            if name == self.made_as:
                raise Found(tensor)
            acting |= name == self.before

        def switched(wrong: Callable, original: Callable) -> Callable:
            return lambda *args, **kwargs: (
                wrong(original, *args, **kwargs) if acting else original(*args, **kwargs)
            )

        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(watching({self.where: self.network} if self.where else {}, see))
            for owner, attribute, wrong in changes:
                stack.enter_context(replaced(owner, attribute, partial(switched, wrong)))
            try:
                answers = self.run.go()
            except Found as found:
                return found.args[0].clone()
        if self.made_as not in self.run.outputs.values():
            raise LookupError(self.name)  # this run does not come by
        return next(
            answers[number] for number, name in self.run.outputs.items() if name == self.made_as
        )

    # runs

    def runs(self) -> Iterator[Run]:
        """All that may come by the tensor: what is around it, the smallest first, and what is no module."""
        try:
            around = [
                each
                for each in recorded(self.reference)
                if self.lies_in(each.name) and each.name != "decoder"
            ]
        except UserError:  # no module has all of its inputs
            around = []
        modules = Modules(self.pipe)
        for each in sorted(around, key=lambda each: -len(each.name)):
            yield Run(
                lambda each=each: modules(each.name, [*map(self.given, each.inputs)]),
                each.outputs,
                each.whole,
            )
        if self.where == "decoder":
            yield Run(
                lambda: modules("decoder", [self.latents(len(self.times) - 1)]), {0: "pixels"}, True
            )
        if self.name.endswith("rope"):
            yield Run(lambda: [self.network.rope(*self.ids)], {0: self.name}, True)
        if self.where.startswith("step"):
            yield Run(lambda: [self.network.vec(*self.moment)], {0: f"{self.where}/vec"}, True)

    def lies_in(self, place: str) -> bool:
        """A module makes neither its own inputs nor what other networks make."""
        around = self.made_as.startswith((f"{place}/", f"{place}.")) or place == self.where
        taken = re.fullmatch(rf"{re.escape(place)}/in(\.\d+)?", self.name)
        return (
            around
            and not taken
            and PLACE.fullmatch(place)[1] == self.where
            and not place.endswith("/attention")
        )

    # what the name says

    @cached_property
    def made_as(self) -> str:
        """Text features have another name where they are made."""
        result = re.fullmatch("(text(?:/negative)?)/(features|pooled)", self.name)
        if result is None:
            return self.name
        part = "clip" if result[2] == "pooled" else "t5" if self.pipe.spec.flux1 else "model"
        return f"{result[1]}/{part}/out"

    @cached_property
    def where(self) -> str:
        """The network whose tensor it is; "" for a tensor of none."""
        place = PLACE.fullmatch("decoder/pixels" if self.name == "pixels" else self.made_as)
        return place[1] if place and not LOOP.fullmatch(self.name) else ""

    @property
    def network(self) -> nn.Module:
        return Modules(self.pipe).network(self.where or "step")

    @property
    def step(self) -> int:
        return int(re.match(r"step\.(\d+)", self.name)[1])

    def of_step(self, name: str) -> str:
        return f"step.{self.step:03}/{name}"

    def of_pass(self, name: str) -> str:
        """`rope`, `ids/txt`, `ids/img`: the negative prompt has its own, and so have references that are seen once."""
        own = [part for part in self.name.split("/") if part in ("negative", "references")]
        return joined(*own, name)

    def of_text(self, name: str) -> str:
        """`t5/in`: of the prompt that is at work."""
        return joined("text", "negative" if "negative" in self.name.split("/") else "", name)

    # what was recorded

    def given(self, name: str) -> Tensor:
        """A whole tensor of the reference, on the device."""
        if self.reference.records[name].kind != "full":
            raise LookupError(name)
        return self.reference.tensors[name].to(self.pipe.device)

    @property
    def truth(self) -> Tensor:
        return self.given(self.name)

    @property
    def ids(self) -> tuple[Tensor, Tensor]:
        """Coordinates of text and of image tokens."""
        return self.given(self.of_pass("ids/txt")), self.given(self.of_pass("ids/img"))

    @property
    def times(self) -> Tensor:
        return self.given("schedule")

    @property
    def tokens(self) -> int:
        """Of the picture that is made."""
        return math.prod(self.given("noise").shape[2:])

    @property
    def moment(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """What the time's vector is made of: t, guidance, pooled text."""
        spec, t, guidance, pooled = (
            self.pipe.spec,
            self.times[self.step - 1 : self.step],
            None,
            None,
        )
        if spec.transformer.guidance:
            guidance = torch.full_like(t, self.at_step(self.reference.recipe["guidance"]))
        if spec.transformer.vector_dim is not None:
            pooled = self.given(f"{self.where}/vector_in/in")
        return t, guidance, pooled

    @property
    def cfg_scale(self) -> float:
        """Of classifier-free guidance, at this step."""
        return self.at_step(
            self.reference.recipe["guidance" if self.pipe.spec.cfg else "cfg_scale"]
        )

    def at_step(self, values: float | Sequence[float]) -> float:
        values = [values] if isinstance(values, float | int) else values
        return sampling.per_step_values(values, self.reference.recipe["steps"])[
            self.step - len(self.times)
        ]

    def latents(self, step: int) -> Tensor:
        """After a step, (B, C, h, w); the noise before the first."""
        return self.given(f"step.{step:03}/latents" if step else "noise")


def cases(name: str, reference: Capture, pipe: Pipeline, before: str | None) -> list[Case]:
    """The ways to compute a tensor again, the nearest first; one without a run, where there is none.

    All of a network is run only where no module alone will do. In each run, what is changed is changed throughout at first,
    and then only after `before`.
    """
    bare, found = Case(name, reference, pipe, before), []
    for run in bare.runs():
        if run.whole and found:
            break
        try:
            case = replace(bare, run=run)
            found.append(replace(case, honest=case.again()))
        except LookupError:  # it does not come by, or the capture lacks what it takes
            continue
    return [replace(case, late=late) for case in found for late in (False, True)] or [bare]
