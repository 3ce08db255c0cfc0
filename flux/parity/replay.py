"""Feed what a capture recorded into a module, a block, a network or the whole loop, and compare what comes out.

    forced    each module alone, on the inputs that were recorded: errors do not add up, and a fault shows where it is made
    inside    one module or network on its recorded inputs, and every tensor in it, in the order of execution
    free      the whole loop, from the recorded noise and text features on: errors add up, as in a run

What is judged is a `Call`, the networks here or anybody's. Modules come one after the other, and their tensors from the
mapped file, so that a capture may be larger than memory; so may the networks.
"""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

import torch
from torch import Tensor, nn

from flux import loading, sampling
from flux.errors import UserError
from flux.image_io.request import ImageInputs
from flux.parity.capture import Request, run
from flux.parity.capture_file import DTYPES, Capture, Kind, Record, raw
from flux.parity.compare import BUDGETS, COARSEST_FIRST, Row, compare
from flux.parity.hooks import check_patterns, matches, replaced, watching
from flux.parity.modules import PLACE, Call, Modules, in_dtype
from flux.pipeline import Pipeline
from flux.text_encoder import TextFeatures

Budget = (
    float | Mapping[str, float] | None
)  # relative L2 that is allowed: of all tensors, or by name
LOCAL = {
    "F32": 1e-5,
    "F16": 8e-4,
    "BF16": 6e-3,
}  # of one module on given inputs; of a whole network, compare.BUDGETS

TAP = re.compile(r"(.+)/(in|out)(?:\.(\d+))?(~\d+)?")
ATTENTION = re.compile(
    r"((?!text/).+/attention)/(q|k|v|out)()(~\d+)?"
)  # a text encoder's needs a mask, which is no input
PASS = re.compile(r"step\.\d+(/negative)?")


# ---------------------------------------------------------------- what was recorded


@dataclass(frozen=True)
class Recorded:
    """One run of a module; the tensors of a capture that it took and gave, by name."""

    name: str
    inputs: tuple[str, ...]
    outputs: dict[int, str]  # by their number among all outputs of the module

    @property
    def whole(self) -> bool:
        """Whether it is a network."""
        return PLACE.fullmatch(self.name)[4] is None


def recorded(capture: Capture, only: Sequence[str] = ()) -> list[Recorded]:
    """Every run of a module whose inputs are kept in full, in the order in which they end.

    `only`: patterns that an output fits. UserError if there are none.
    """
    runs = [Recorded(name, *tensors) for name, *tensors in _taken_and_given(capture)]
    usable = [
        each for each in runs if _kept_in_full(capture, each.inputs) and PLACE.fullmatch(each.name)
    ]
    if not usable:
        raise UserError(
            f"{capture.path} holds no module with all of its inputs and an output in full: capture it with --keep full, "
            "and choose whole modules, such as --only 'double_blocks.3'"
        )
    chosen = [each for each in usable if any(matches(name, only) for name in each.outputs.values())]
    return sorted(
        chosen,
        key=lambda each: min(capture.records[name].ordinal for name in each.outputs.values()),
    )


def _taken_and_given(capture: Capture) -> Iterator[tuple[str, tuple[str, ...], dict[int, str]]]:
    taken, given = defaultdict(dict), defaultdict(dict)
    for name in capture.names:
        if tap := ATTENTION.fullmatch(name) or TAP.fullmatch(name):
            place, which, number, again = tap.groups(default="")
            side = given if which == "out" else taken
            side[place, again]["qkv".index(which) if which in "qkv" else int(number or 0)] = name
    for (place, again), outputs in given.items():
        inputs = taken[place, again]
        whole = _taken_by_pass(capture, place) if PASS.fullmatch(place) else None
        if whole or (inputs and list(inputs) == list(range(len(inputs)))):
            yield place, whole or tuple(inputs.values()), outputs
    last = f"step.{len(capture.recipe.get('schedule', ())) - 1:03}/latents"
    if last in capture.records and "pixels" in capture.records:
        yield "decoder", (last,), {0: "pixels"}
    for name in capture.names:
        if re.fullmatch(r"encoder\.\d+/latents", name):
            place = name.removesuffix("/latents")
            yield place, (f"{place}/pixels",), {0: name}


def _taken_by_pass(capture: Capture, place: str) -> tuple[str, ...]:
    """As `Flux.velocity` takes it: tokens, text, rope, vec, and what each block remembers of references."""
    rope = "negative/rope" if place.endswith("/negative") else "rope"
    memories = [name for name in capture.names if re.fullmatch(r"references/out\.\d+", name)]
    return f"{place}/in", f"{place}/txt_in/in", rope, f"{place}/vec", *memories


def _kept_in_full(capture: Capture, names: Iterable[str]) -> bool:
    return all(name in capture.records and capture.kind(name) == "full" for name in names)


def inputs_of(capture: Capture, each: Recorded) -> list[Tensor]:
    tensors = _part(capture, each.inputs).tensors
    return [tensors[name] for name in each.inputs]


def _part(capture: Capture, names: Iterable[str]) -> Capture:
    """The same capture, of these tensors alone: it may have a hundred thousand."""
    part = copy.copy(capture)
    part.names = list(names)
    part.records = {name: capture.records[name] for name in part.names}
    return part


def passes(capture: Capture, step: int) -> list[str]:
    """The runs of the transformer in a step: the prompt's, then the negative prompt's if there is one."""
    negative = f"step.{step:03}/negative"
    return [
        f"step.{step:03}",
        *[negative] * any(name.startswith(f"{negative}/") for name in capture.names),
    ]


# ---------------------------------------------------------------- replaying


def forced(
    capture: Capture, call: Call, only: Sequence[str] = (), budget: Budget = None
) -> list[Row]:
    """Every recorded module, of which an output fits `only`, alone, on its recorded inputs. Rows in the order of execution."""
    check_patterns(only, [name for each in recorded(capture) for name in each.outputs.values()])
    return [row for each in recorded(capture, only) for row in local(capture, call, each, budget)]


def local(capture: Capture, call: Call, each: Recorded, budget: Budget = None) -> list[Row]:
    """One module on its recorded inputs -> a row an output."""
    answers = asked(call, each.name, inputs_of(capture, each))
    if len(answers) <= max(each.outputs):
        raise UserError(
            f"{each.name} gave {len(answers)} tensors, and {1 + max(each.outputs)} were recorded"
        )
    return judged(
        capture,
        {name: answers[number] for number, name in each.outputs.items()},
        budget,
        whole=each.whole,
    )


def asked(call: Call, name: str, inputs: list[Tensor]) -> list[Tensor]:
    """What a call answers, which is tensors, or UserError."""
    answers = call(name, inputs)
    if isinstance(answers, Tensor):
        return [answers]
    if not isinstance(answers, Sequence) or not all(
        isinstance(answer, Tensor) for answer in answers
    ):
        raise UserError(
            f"the function that was called for {name} gave {type(answers).__name__}, and not a list of tensors"
        )
    return list(answers)


def inside(
    capture: Capture, modules: Modules, name: str, only: Sequence[str] = (), budget: Budget = None
) -> list[Row]:
    """The module or network of this name on its recorded inputs, and each tensor in it that was recorded and fits `only`."""
    runs = {each.name: each for each in recorded(capture)}
    if name not in runs:
        near = get_close_matches(name, runs, n=3, cutoff=0) or list(runs)
        raise UserError(
            f"--inside {name}: it has no recorded inputs; the nearest that have are {', '.join(near)}"
        )
    rows, see = _rows(capture, only, lambda tensors: judged(capture, tensors, budget, whole=True))
    with watching({PLACE.fullmatch(name)[1]: modules.network(name)}, see):
        outputs = asked(modules, name, inputs_of(capture, runs[name]))
    if runs[name].whole:  # which is called by another name than hooks see
        for number, output in runs[name].outputs.items():
            see(output, outputs[number])
    return rows


def free(
    capture: Capture,
    pipe: Pipeline,
    request: Request,
    only: Sequence[str] = (),
    budget: Budget = None,
) -> list[Row]:
    """The whole loop, from the noise and text features of the capture, as far as it has them, on."""
    with from_recorded(capture, pipe) as twin:
        return against(capture, twin, request, only, budget)


def against(
    capture: Capture,
    pipe: Pipeline,
    request: Request,
    only: Sequence[str] = (),
    budget: Budget = None,
) -> list[Row]:
    """A run here, compared while it runs: a row for each of its tensors that the capture has."""
    check_patterns(only, capture.names)
    recipe = {"dtype": str(pipe.dtype).removeprefix("torch.")}
    rows, see = _rows(
        capture,
        only,
        lambda tensors: compare(Live(tensors, recipe), _part(capture, tensors), budget),
    )
    run(pipe, request, see)
    return rows


def _rows(capture: Capture, only: Sequence[str], judge: Callable[[dict[str, Tensor]], list[Row]]):
    """Rows to come, and the function that sees the tensors: the second of a name is `name~2`, as in a capture."""
    rows, times = [], Counter()

    def see(name: str, tensor: Tensor) -> None:
        times[name] += 1
        name += f"~{times[name]}" * (times[name] > 1)
        if name in capture.records and matches(name, only):
            rows.extend(judge({name: tensor}))

    return rows, see


def judged(
    capture: Capture, tensors: Mapping[str, Tensor], budget: Budget = None, whole: bool = False
) -> list[Row]:
    """What came of recorded inputs against what was recorded; `whole`: of a network, in which errors add up."""
    usual, allowed = BUDGETS if whole else BUDGETS | LOCAL, {}
    for name, tensor in tensors.items():
        dtype = min(DTYPES[tensor.dtype], capture.records[name].dtype, key=COARSEST_FIRST.index)
        given = budget.get(name) if isinstance(budget, Mapping) else budget
        allowed[name] = usual.get(dtype, 0.0) if given is None else given
    return compare(Live(tensors), _part(capture, tensors), allowed)


class Live:
    """Tensors in memory, in the place of a capture."""

    def __init__(self, tensors: Mapping[str, Tensor], recipe: dict | None = None):
        self.path, self.tensors, self.names, self.recipe = (
            "the replay",
            tensors,
            list(tensors),
            recipe or {},
        )
        self.records = {name: self._record(tensor) for name, tensor in tensors.items()}

    def _record(self, tensor: Tensor) -> Record:
        """With a hash, by which what is the same to the bit is known at once."""
        return Record(
            0, "full", DTYPES[tensor.dtype], tuple(tensor.shape), sha256(raw(tensor)).hexdigest()
        )

    def kind(self, name: str) -> Kind:
        return "full"


@contextmanager
def from_recorded(capture: Capture, pipe: Pipeline) -> Iterator[Pipeline]:
    """A copy of the pipeline that knows the recorded text features; meanwhile, noise is the recorded noise."""
    twin, twin.text = copy.copy(pipe), copy.copy(pipe.text)
    twin.text.cache = {}
    kept = [
        where
        for where in ("text", "text/negative")
        if _kept_in_full(capture, [f"{where}/features"])
    ]
    known = [features(capture, where) for where in kept]
    if known:
        twin.text.encode_one = lambda prompt, known=iter(known): next(known)
        for part in pipe.spec.text.networks:
            setattr(
                twin.text, part, nn.Identity
            )  # a module in which there is nothing to watch, and nothing to load
    noise = capture.tensors["noise"] if _kept_in_full(capture, ["noise"]) else None
    with replaced(
        sampling,
        "noise",
        lambda draw: draw if noise is None else lambda *args, **kwargs: noise.clone(),
    ):
        yield twin


def features(capture: Capture, where: str) -> TextFeatures:
    pooled = f"{where}/pooled"
    return TextFeatures(
        capture.tensors[f"{where}/features"],
        capture.tensors[pooled] if pooled in capture.tensors else None,
    )


# ---------------------------------------------------------------- the pipeline of a capture


def load(
    capture: Capture,
    weights: Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    numerics: str | None = None,
    transformer: Path | None = None,
    autoencoder: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    partial: bool = False,
) -> Pipeline:
    """The pipeline that the recipe names, in its dtype and numerics if not in others; it need not fit in memory."""
    recipe = recipe_of(capture)
    if lost := [lora["file"] for lora in recipe.get("loras", ())][len(loras) :]:
        raise UserError(f"{capture.path} was made with the LoRA {lost[0]}: give it with --lora")
    dtype, numerics = dtype or getattr(torch, recipe["dtype"]), numerics or recipe["numerics"]
    pipe = loading.load(recipe["model"], weights, device, dtype, numerics, transformer, autoencoder)
    for path, scale in loras:
        pipe.load_lora(path, scale, partial)
    return in_dtype(pipe, dtype)


def request_of(capture: Capture, pictures: ImageInputs | None = None) -> Request:
    """What was asked for, by the recipe. Of pictures a capture keeps but hashes: they are given again."""
    recipe = recipe_of(capture)
    if recipe["pictures"] and pictures is None:
        raise UserError(
            f"{capture.path} was made of pictures: give the same --image, and what else was given with it"
        )
    asked = (
        "prompt",
        "width",
        "height",
        "steps",
        "guidance",
        "seed",
        "negative_prompt",
        "cfg_scale",
    )
    return Request(**{key: recipe[key] for key in asked}, pictures=pictures)


def recipe_of(capture: Capture) -> dict:
    if "model" not in capture.recipe:
        raise UserError(
            f"{capture.path} is a plain file, which does not say how it was made: capture it with parity.py"
        )
    return capture.recipe


def check_model(capture: Capture, pipe: Pipeline) -> None:
    if recipe_of(capture)["model"] != pipe.spec.name:
        raise UserError(
            f"{capture.path} is of {capture.recipe['model']}, and the pipeline here is {pipe.spec.name}"
        )
