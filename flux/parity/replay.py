"""Run modules on the inputs that a capture recorded, and compare their outputs.

    replay_modules  each module alone on its recorded inputs: errors do not accumulate
    replay_inside   one module or network on its recorded inputs, and every tensor inside it
    replay_loop     the sampling loop from the recorded noise and text features: errors accumulate

The modules belong to a `Call`: the networks here, or any function. Only one module's tensors are in
memory at a time, so a capture may be larger than memory.
"""

import copy
import re
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from functools import partial
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from flux import loading, sampling
from flux.errors import UserError
from flux.hooks import check_patterns, matches, replaced, watching
from flux.image_io.request import ImageInputs
from flux.parity.capture import Request, run
from flux.parity.capture3 import inputs_of_pass
from flux.parity.capture_file import Capture, comparable
from flux.parity.capture_metadata import DTYPES, Kind, Record
from flux.parity.compare import COARSEST_FIRST, TOLERANCES, Row, compare, measured_tolerance
from flux.parity.modules import PLACE, Call, Modules, in_dtype
from flux.pipeline import Pipeline
from flux.text_encoder import TextFeatures

Tolerance = float | Mapping[str, float] | None  # relative L2, of all tensors or by name
MODULE_TOLERANCES = {"F32": 1e-5, "F16": 8e-4, "BF16": 6e-3}  # one module; a network: TOLERANCES

REQUEST = (  # arguments of a run that stand in a recipe under the same names
    "prompt",
    "width",
    "height",
    "steps",
    "guidance",
    "seed",
    "negative_prompt",
    "true_cfg_scale",
)

TAP = re.compile(r"(.+)/(in|arg|out)(?:\.(\d{1,9}))?(~\d+)?")
# a text encoder's attention also takes a mask, which is not recorded with it
ATTENTION = re.compile(r"((?!text/).+/attention)/(q|k|v|out)()(~\d+)?")
PASS = re.compile(r"step\.\d{1,9}(/negative)?")


# ---------------------------------------------------------------- the runs of a capture


@dataclass(frozen=True)
class ModuleRun:
    """One run of a module: the names of its recorded inputs and outputs."""

    name: str
    inputs: tuple[str, ...]
    outputs: dict[int, str]  # position among all outputs of the module -> name

    @property
    def is_network(self) -> bool:
        return split_place(self.name)[1] == ""


def split_place(name: str) -> tuple[str, str]:
    """Split a name into the place of the network and the path of the module, "" for all of it."""
    place = PLACE.fullmatch(name)
    if place is None:
        raise UserError(f"{name}: is not a module of a pipeline")
    return place[1], place[4] or ""


def module_runs(capture: Capture, only: Sequence[str] = ()) -> list[ModuleRun]:
    """Return every run of a module whose inputs are stored in full, in the order of execution.

    `only`: patterns for the names of the outputs. UserError if the capture has no such run.
    """
    runs = [ModuleRun(*each) for each in _inputs_and_outputs(capture)]
    usable = [
        each
        for each in runs
        if _stored_in_full(capture, each.inputs) and PLACE.fullmatch(each.name)
    ]
    if not usable:
        raise UserError(
            f"{capture.path}: has no module with all inputs and an output in full. Capture it with "
            '`keep="full"` and an `only` that selects whole modules, such as double_blocks.3'
        )
    chosen = [each for each in usable if any(matches(name, only) for name in each.outputs.values())]
    return sorted(
        chosen,
        key=lambda each: min(capture.records[name].ordinal for name in each.outputs.values()),
    )


def outputs_of_modules(capture: Capture) -> list[str]:
    """Return the recorded outputs of all module runs whose inputs are stored in full."""
    return [name for each in module_runs(capture) for name in each.outputs.values()]


def _inputs_and_outputs(capture: Capture) -> Iterator[tuple[str, tuple[str, ...], dict[int, str]]]:
    Tensors = dict[tuple[str, str], dict[int, str]]  # (module, repeat) -> position -> name
    inputs: Tensors = defaultdict(dict)
    outputs: Tensors = defaultdict(dict)
    for name in capture.names:
        if tap := ATTENTION.fullmatch(name) or TAP.fullmatch(name):
            place, which, number, repeat = tap.groups(default="")
            side = outputs if which == "out" else inputs
            position = "qkv".index(which) if which in "qkv" else int(number or 0)
            side[place, repeat][position] = name
    for (place, repeat), given in outputs.items():
        taken = inputs[place, repeat]
        if PASS.fullmatch(place):
            yield place, _inputs_of_pass(capture, place), given
        elif taken and list(taken) == list(range(len(taken))):
            yield place, tuple(taken.values()), given
    last = f"step.{len(capture.recipe.get('schedule', ())) - 1:03}/latents"
    if last in capture.records and "pixels" in capture.records:
        yield "decoder", (last,), {0: "pixels"}
    for name in capture.names:
        if re.fullmatch(r"encoder\.\d+/latents", name):
            place = name.removesuffix("/latents")
            yield place, (f"{place}/pixels",), {0: name}


def _inputs_of_pass(capture: Capture, place: str) -> tuple[str, ...]:
    """Return the inputs of `Flux.denoise`: tokens, text, rope, vec, each block's cached k and v.

    Those of a pass of FLUX 3 are `capture3.inputs_of_pass`.
    """
    if is_flux3(capture):
        return inputs_of_pass(place, f"{place}/emb_in.image_cond/in" in capture.records)
    rope = "negative/rope" if place.endswith("/negative") else "rope"
    caches = [name for name in capture.names if re.fullmatch(r"references/out\.\d+", name)]
    return f"{place}/in", f"{place}/txt_in/in", rope, f"{place}/vec", *caches


def is_flux3(capture: Capture) -> bool:
    """Whether a capture is of FLUX 3, by a tensor that every pass has there."""
    return any(name.endswith("/vec_0") for name in capture.names)


def _stored_in_full(capture: Capture, names: Iterable[str]) -> bool:
    return all(name in capture.records and capture.kind(name) == "full" for name in names)


def recorded_inputs(capture: Capture, each: ModuleRun) -> list[Tensor]:
    return [capture.tensors[name] for name in each.inputs]


def _subset(capture: Capture, names: Iterable[str]) -> Capture:
    """Return the same capture with these tensors alone: it may have a hundred thousand."""
    subset = copy.copy(capture)
    subset.names = list(names)
    subset.records = {name: capture.records[name] for name in subset.names}
    return subset


def passes_of_step(capture: Capture, step: int) -> list[str]:
    """Return the transformer's runs in a step: the prompt's, then the negative prompt's."""
    places = [f"step.{step:03}"]
    negative = f"step.{step:03}/negative"
    if any(name.startswith(f"{negative}/") for name in capture.names):
        places.append(negative)
    return places


# ---------------------------------------------------------------- replay


def replay_modules(
    capture: Capture, call: Call, only: Sequence[str] = (), tolerance: Tolerance = None
) -> list[Row]:
    """Run each recorded module alone on its recorded inputs. Rows in the order of execution."""
    check_patterns(only, outputs_of_modules(capture))
    return [
        row
        for each in module_runs(capture, only)
        for row in replay_module(capture, call, each, tolerance)
    ]


def replay_module(
    capture: Capture, call: Call, each: ModuleRun, tolerance: Tolerance = None
) -> list[Row]:
    """Run one module on its recorded inputs. One row an output."""
    answers = as_outputs(each.name, call(each.name, recorded_inputs(capture, each)))
    if not answers:  # a function without this module
        return []
    if len(answers) <= max(each.outputs):
        raise UserError(
            f"module_fn: returned {len(answers)} tensors for {each.name} "
            f"(expected {1 + max(each.outputs)})"
        )
    outputs = {name: answers[position] for position, name in each.outputs.items()}
    return compare_to_recorded(capture, outputs, tolerance, is_network=each.is_network)


def call_checked(call: Call, name: str, inputs: list[Tensor]) -> list[Tensor]:
    """Return the tensors that a call returns. UserError if it returns anything else, or nothing."""
    answers = as_outputs(name, call(name, inputs))
    if not answers:
        raise UserError(f"module_fn: returned nothing for {name}, which is needed here")
    return answers


def as_outputs(name: str, answers) -> list[Tensor]:
    """Return what a call returned as a list; None is an empty one. UserError for anything else."""
    if isinstance(answers, Tensor):
        return [answers]
    if answers is None:
        return []
    if not isinstance(answers, Sequence) or not all(isinstance(x, Tensor) for x in answers):
        raise UserError(
            f"module_fn: returned {type(answers).__name__} for {name} (expected a list of tensors)"
        )
    return list(answers)


def replay_inside(
    capture: Capture,
    modules: Modules,
    name: str,
    only: Sequence[str] = (),
    tolerance: Tolerance = None,
) -> list[Row]:
    """Run one module or network on its recorded inputs. Rows for the recorded tensors inside it."""
    runs = {each.name: each for each in module_runs(capture)}
    if name not in runs:
        near = get_close_matches(name, runs, n=3, cutoff=0) or list(runs)
        raise UserError(f"inside: {name} has no recorded inputs. Nearest names: {', '.join(near)}")
    observer = _Observer(
        capture, only, lambda x: compare_to_recorded(capture, x, tolerance, is_network=True)
    )
    with watching({split_place(name)[0]: modules.network(name)}, observer):
        outputs = call_checked(modules, name, recorded_inputs(capture, runs[name]))
    if runs[name].is_network:  # its outputs are recorded under other names than hooks give
        for position, output in runs[name].outputs.items():
            observer(output, outputs[position])
    return observer.rows


def replay_loop(
    capture: Capture,
    pipe: Pipeline,
    request: Request,
    only: Sequence[str] = (),
    tolerance: Tolerance = None,
) -> list[Row]:
    """Run the loop from the recorded noise and text features, as far as the capture has them."""
    with start_from_recorded(capture, pipe) as copied:
        return run_and_compare(capture, copied, request, only, tolerance)


def run_and_compare(
    capture: Capture,
    pipe: Pipeline,
    request: Request,
    only: Sequence[str] = (),
    tolerance: Tolerance = None,
) -> list[Row]:
    """Run the pipeline, and compare each tensor as soon as it is computed."""
    check_patterns(only, capture.names)
    recipe = {"dtype": str(pipe.dtype).removeprefix("torch.")}

    def judge(tensors: dict[str, Tensor]) -> list[Row]:
        return compare(as_capture(tensors, recipe), _subset(capture, tensors), tolerance)

    observer = _Observer(capture, only, judge)
    run(pipe, request, observer)
    return observer.rows


class _Observer:
    """Called with each tensor of a run; adds rows. The second tensor of a name is `name~2`."""

    def __init__(
        self, capture: Capture, only: Sequence[str], judge: Callable[[dict[str, Tensor]], list[Row]]
    ):
        self.capture, self.only, self.judge = capture, only, judge
        self.rows: list[Row] = []
        self.times: Counter[str] = Counter()

    def __call__(self, name: str, tensor: Tensor) -> None:
        self.times[name] += 1
        if self.times[name] > 1:
            name += f"~{self.times[name]}"
        if name in self.capture.records and matches(name, self.only):
            self.rows += self.judge({name: tensor})


def compare_to_recorded(
    capture: Capture,
    tensors: Mapping[str, Tensor],
    tolerance: Tolerance = None,
    is_network: bool = False,
    local: bool = True,
) -> list[Row]:
    """Compare outputs of recorded inputs. A network is allowed more: its errors accumulate.

    `local`: the measured rounding that counts is that of a module alone, else that of a run.
    """
    defaults = TOLERANCES if is_network else TOLERANCES | MODULE_TOLERANCES
    allowed = {}
    tensors = {name: comparable(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        dtype = min(DTYPES[tensor.dtype], capture.records[name].dtype, key=COARSEST_FIRST.index)
        given = tolerance.get(name) if isinstance(tolerance, Mapping) else tolerance
        if given is None:
            given = measured_tolerance(capture, name, dtype, local)
        allowed[name] = defaults.get(dtype, 0.0) if given is None else given
    return compare(as_capture(tensors), _subset(capture, tensors), allowed)


def as_capture(tensors: Mapping[str, Tensor], recipe: dict | None = None) -> Capture:
    """Return what `compare` takes for tensors in memory."""
    tensors = {name: comparable(tensor) for name, tensor in tensors.items()}
    return cast(Capture, _TensorsAsCapture(tensors, recipe))


class _TensorsAsCapture:
    def __init__(self, tensors: Mapping[str, Tensor], recipe: dict | None):
        self.path = "the replay"
        self.tensors, self.names, self.recipe = tensors, list(tensors), recipe or {}
        self.records = {name: self._record(tensor) for name, tensor in tensors.items()}

    def _record(self, tensor: Tensor) -> Record:
        return Record(0, "full", DTYPES[tensor.dtype], tuple(tensor.shape))

    def kind(self, name: str) -> Kind:
        return "full"


@contextmanager
def start_from_recorded(capture: Capture, pipe: Pipeline) -> Iterator[Pipeline]:
    """Yield a copy of the pipeline that uses the recorded text features and the recorded noise."""
    copied, copied.text = copy.copy(pipe), copy.copy(pipe.text)
    copied.text.cache = {}
    if _stored_in_full(capture, ["text/features"]):
        places = iter(("text", "text/negative"))  # in the order of a run

        def recorded_text(prompt: str) -> TextFeatures:
            return recorded_features(capture, next(places), pipe)

        copied.text.encode_one = recorded_text  # type: ignore[method-assign]
        for part in pipe.spec.text.networks:  # nothing to load, and nothing to observe
            setattr(copied.text, part, nn.Identity)
    if not _stored_in_full(capture, ["noise"]):
        yield copied
        return

    def recorded_noise(original: Callable, *args, **kwargs) -> Tensor:
        drawn = original(*args, **kwargs)
        return checked_shape(capture, "noise", drawn.shape).clone()

    with replaced(sampling, "noise", lambda original: partial(recorded_noise, original)):
        yield copied


def recorded_features(capture: Capture, place: str, pipe: Pipeline) -> TextFeatures:
    spec, pooled, length = pipe.spec, None, pipe.spec.text_length
    if spec.pooled_dim is not None:
        pooled = checked_shape(capture, f"{place}/pooled", (1, spec.pooled_dim))
    found = capture.records.get(f"{place}/features")
    if spec.flux3 and found is not None and len(found.shape) == 3:
        length = found.shape[1]  # that of the prompt
    width = spec.transformer.context_dim
    tokens = checked_shape(capture, f"{place}/features", (1, length, width))
    return TextFeatures(tokens, pooled)


def checked_shape(capture: Capture, name: str, shape: Sequence[int]) -> Tensor:
    """Return a recorded tensor. UserError if it has another shape, or is not stored in full."""
    if not _stored_in_full(capture, [name]):
        raise UserError(
            f"{capture.path}: has no {name} in full, from which the run starts. "
            "Capture it again, with this name"
        )
    tensor = capture.tensors[name]
    if tensor.shape != tuple(shape):
        raise UserError(
            f"{capture.path}: tensor {name} has shape {tuple(tensor.shape)} "
            f"(expected {tuple(shape)}). Capture it again"
        )
    return tensor


# ---------------------------------------------------------------- the pipeline of a capture


def load_pipeline(
    capture: Capture,
    weights: Path | None = None,
    device: str | None = None,
    dtype: torch.dtype | None = None,
    numerics: str | None = None,
    transformer: Path | None = None,
    autoencoder: Path | None = None,
    loras: Sequence[tuple[Path, float]] = (),
    ignore_unmatched: bool = False,
) -> Pipeline:
    """Load the pipeline that the recipe names. Its dtype and numerics are the recipe's by default.

    The networks need not fit in memory.
    """
    recipe = recipe_of(capture)
    if missing := [lora["file"] for lora in recipe.get("loras", ())][len(loras) :]:
        raise UserError(
            f"loras: {missing[0]} is missing, with which {capture.path} was made. Pass the file"
        )
    dtype, numerics = dtype or getattr(torch, recipe["dtype"]), numerics or recipe["numerics"]
    pipe = loading.load(
        recipe["model"], weights, device, dtype, numerics, transformer, autoencoder, fast=False
    )
    for path, scale in loras:
        pipe.load_lora(path, scale, strict=not ignore_unmatched)
    return in_dtype(pipe, dtype)


def request_of(capture: Capture, images: ImageInputs | None = None) -> Request:
    """Return the recipe's request. Pass the images again: a capture stores only their hashes."""
    recipe = recipe_of(capture)
    if recipe["images"] and images is None:
        raise UserError(
            f"images: {capture.path} was made with images. Pass the same images and their options"
        )
    return Request(**{key: recipe[key] for key in REQUEST}, images=images)


def recipe_of(capture: Capture) -> dict:
    """Return the recipe of a capture whose run can be repeated. UserError for other files."""
    if "model" not in capture.recipe:
        raise UserError(
            f"{capture.path}: is a plain file, without a recipe. Run `parity.py capture`"
        )
    for key in ("dtype", "numerics", "images", *REQUEST):
        if key not in capture.recipe:
            raise UserError(f"{capture.path}: has no {key} in its recipe. Capture it again")
    return capture.recipe


def check_model(capture: Capture, pipe: Pipeline) -> None:
    if recipe_of(capture)["model"] != pipe.spec.name:
        raise UserError(
            f"{capture.path}: is of {capture.recipe['model']} (the pipeline is {pipe.spec.name})"
        )
