"""What a capture records around the transformer of FLUX 3: see `capture`.

    ids/img  rope/img  ids/references  rope/references  ids/txt  rope/txt
    negative/ids/txt  negative/rope/txt                   of the negative prompt
    step.001/vec  step.001/vec_0                          conditioning vectors of t and of time 0
    step.001/txt_in/in ...  step.001/in  step.001/emb_in.image/in ...  step.001/out

A base model computes the streams of text and references once, before the first step. A capture
computes them in every pass, so that a pass has all of its tensors, to the same bits. Modules that
run for t, then for time 0, have two tensors of a name: `time_in/out` and `time_in/out~2`.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor

from flux.hooks import Observer, joined
from flux.pipeline import Pipeline
from flux.transformer3 import Flux3
from flux.velocity3 import BRANCHES, Velocity3


class Passes:
    """Wrappers of what the pipeline calls in `sample`; `inside` observes the network's modules."""

    def __init__(self, pipe: Pipeline, observer: Observer, references: bool):
        self.pipe, self.observer = pipe, observer
        # the pipeline makes tables in this order
        self.tables = iter(["img", *["references"] * references, "txt", "negative/txt"])
        self.vecs: dict[str, int] = {}  # place -> calls of `vec`

    def wrappers(self, network: Flux3) -> Iterable[tuple[object, str, Callable]]:
        """Return owner, attribute, and the wrapper of each function."""
        return (
            (self.pipe, "_velocity", self.velocity),
            (network, "rope", self.rope),
            (network, "vec", self.vec),
            (network, "denoise", self.denoise),
        )

    @property
    def place(self) -> str:
        """The pass that runs; "" outside of passes."""
        now = self.pipe.now
        if not now.branch:
            return ""
        return joined(f"step.{now.step:03}", "negative" if now.branch == BRANCHES[1] else "")

    def inside(self, name: str, tensor: Tensor) -> Tensor:
        if self.place:
            self.observer(joined(self.place, name), tensor)
        return tensor

    def velocity(self, original: Callable, *args: Any, **kwargs: Any) -> Velocity3:
        velocity = original(*args, **kwargs)
        velocity.kept = []  # streams are computed in every pass
        return velocity

    def rope(self, original: Callable, ids: Tensor) -> Tensor:
        branch, _, mode = next(self.tables).rpartition("/")
        self.observer(joined(branch, f"ids/{mode}"), ids)
        table = original(ids)
        self.observer(joined(branch, f"rope/{mode}"), table)
        return table

    def vec(self, original: Callable, *args: Any) -> Tensor:
        vec, place = original(*args), self.place
        self.vecs[place] = self.vecs.get(place, 0) + 1
        return self.inside("vec" if self.vecs[place] == 1 else "vec_0", vec)

    def denoise(self, original: Callable, img: Tensor, *args: Any) -> Tensor:
        self.inside("in", img)
        return self.inside("out", original(img, *args))


def inputs_of_pass(place: str, references: bool) -> tuple[str, ...]:
    """Return the names of what a pass reads, in the order in which `Modules` takes them.

    They are image tokens, text features, reference tokens if any, the tables of each, and the
    conditioning vectors of t and of time 0.
    """
    negative = "negative" if place.endswith("/negative") else ""
    tokens = {"img": "in", "txt": "txt_in/in", "references": "emb_in.image_cond/in"}
    modes = [mode for mode in tokens if references or mode != "references"]
    tables = [joined(negative if mode == "txt" else "", f"rope/{mode}") for mode in modes]
    vecs = [f"{place}/vec", f"{place}/vec_0"]
    return (*(f"{place}/{tokens[mode]}" for mode in modes), *tables, *vecs)
