"""Compare a live run with a capture. The live run is judged, the capture is the reference.

    here              the pipeline of the capture, from the prompt on: `replay.run_and_compare`
    diffusers         its transformer with the same weights, on the recorded inputs of each pass
    bfl               BFL's networks with the same weights, in the same way: see `bfl.py`
    module:function   a `modules.Call`, on the recorded inputs of each module; or a function that
                      returns the path of a capture of its own run

Errors accumulate over the run (here), over one pass (diffusers), or over one module (a function).
"""

import os
import re
from collections.abc import Sequence
from functools import partial
from typing import Any, cast

import torch
from torch import Tensor, nn

from flux.errors import UserError
from flux.hooks import check_patterns, joined, matches, watching
from flux.parity import modules, reference
from flux.parity.capture_file import DTYPES, Capture
from flux.parity.compare import Row, check_two_files, compare
from flux.parity.modules import Call, guarded
from flux.parity.name_map import Gather, Match, matches_of
from flux.parity.name_map3 import matches_of3
from flux.parity.reference3 import (
    diffusers_transformer3,
    diffusers_velocity3,
    transformer3_to_diffusers,
)
from flux.parity.replay import (
    PASS,
    ModuleRun,
    Tolerance,
    as_outputs,
    check_model,
    compare_to_recorded,
    module_runs,
    outputs_of_modules,
    recorded_inputs,
)
from flux.pipeline import Pipeline
from flux.sampling import per_step_values
from flux.transformer import Flux, FluxConfig
from flux.transformer3 import Flux3, Flux3Config

# ---------------------------------------------------------------- a function


def named(text: str) -> Call:
    """Import the function of "module:function"."""
    if ":" not in text:
        raise UserError(
            f"against: unknown (got {text}, expected here, diffusers, bfl, a .safetensors file, or "
            "MODULE:FUNCTION)."
        )
    try:
        return modules.named(text)
    except UserError as error:
        raise UserError(str(error).replace("module_fn:", "against:", 1)) from None


def adaptor(
    capture: Capture, call: Call, only: Sequence[str] = (), tolerance: float | None = None
) -> tuple[list[Row], list[str]]:
    """Call a function for every recorded module with an output that matches `only`.

    Return the rows, and the names of the tensors that a complete port has: the outputs of all
    modules. If the function returns a path, that capture is compared instead, and a complete one
    has all tensors. A module for which the function returns None or an empty list has no rows.
    UserError if it fails, or does not return tensors of the recorded number and shapes.
    """
    check_patterns(only, capture.names)
    call = guarded(call)
    rows: list[Row] = []
    checked = False
    # without a match, `only` may still name tensors in the capture that the function writes
    for each in module_runs(capture, only) or module_runs(capture)[:1]:
        answer: Any = call(each.name, recorded_inputs(capture, each))
        if isinstance(answer, str | os.PathLike):
            theirs = Capture(os.fspath(answer))
            check_two_files(theirs, capture)
            return compare(theirs, capture, tolerance, only), capture.names
        if not checked:
            check_patterns(only, outputs_of_modules(capture))
            checked = True
        outputs = as_outputs(each.name, answer)
        if not outputs:
            continue
        tensors = _check_outputs(capture, each, outputs)
        rows += compare_to_recorded(capture, tensors, tolerance, is_network=each.is_network)
    return rows, outputs_of_modules(capture)


def _check_outputs(capture: Capture, each: ModuleRun, tensors: list[Tensor]) -> dict[str, Tensor]:
    """Return the tensors by their names in the capture."""
    expected = 1 + max(each.outputs)
    # of numbered outputs, not all need have been recorded
    numbered = any(re.search(r"/out\.\d", name) for name in each.outputs.values())
    if len(tensors) < expected or (len(tensors) > expected and not numbered):
        raise UserError(
            f"against: the function returned {len(tensors)} tensors for {each.name} "
            f"(expected {expected})."
        )
    for number, name in each.outputs.items():
        tensor, shape = tensors[number], capture.records[name].shape
        if tuple(tensor.shape) != shape or tensor.dtype not in DTYPES:
            got, wanted = ("x".join(map(str, size)) for size in (tensor.shape, shape))
            raise UserError(
                f"against: the function returned {tensor.dtype} of {got} for {name} "
                f"(expected {wanted})."
            )
    return {name: tensors[number] for number, name in each.outputs.items()}


# ---------------------------------------------------------------- diffusers


def diffusers(
    capture: Capture, pipe: Pipeline, only: Sequence[str] = (), tolerance: Tolerance = None
) -> list[Row]:
    """Run diffusers' transformer on every recorded pass. Rows of the tensors that both have."""
    check_model(capture, pipe)
    if any(name.startswith("references/") for name in capture.names):
        raise UserError(
            "against: diffusers does not run with `kv_cache`, with which "
            f'{capture.path} was made. Pass `against="here"`.'
        )
    places = passes(capture, pipe.spec.transformer)
    ours = cast(Any, pipe.transformer())
    matching, theirs = layers_of(ours), with_weights_of(ours, pipe)
    velocity = diffusers_velocity3 if pipe.spec.flux3 else reference.diffusers_velocity
    wanted = {}
    for place in places:
        for name, match in matching.items():
            if joined(place, name) in capture.records:
                wanted[joined(place, name)] = match
    check_patterns(only, wanted)
    rows: list[Row] = []

    def judge(name: str, tensor: Tensor) -> None:
        rows.extend(compare_to_recorded(capture, {name: tensor}, tolerance, True, local=False))

    for place in places:
        in_pass = partial(joined, place)
        chosen = {
            in_pass(name): match
            for name, match in matching.items()
            if in_pass(name) in wanted and matches(in_pass(name), only)
        }
        with torch.inference_mode(), watching({"": theirs}, Gather(chosen, judge)):
            velocity(theirs, **inputs_of_pass(capture, place, pipe))
    return sorted(rows, key=lambda row: capture.records[row.name].ordinal)


def in_every_pass(capture: Capture, pipe: Pipeline) -> list[str]:
    """Return the capture's tensors that every implementation of the transformer has.

    They are inputs and outputs of the layers with weights, q, k, v and outputs of attention, and
    outputs of blocks and of the whole network: `name_map.matches_of`. A pass whose inputs are not
    recorded has them too.
    """
    matching = layers_of(pipe.transformer())
    found = ((PASS.match(name), name) for name in capture.names)
    return [name for place, name in found if place and name[place.end() + 1 :] in matching]


def layers_of(ours: Flux | Flux3) -> dict[str, Match]:
    """Return our names in a pass -> diffusers' tensors."""
    return matches_of3(ours) if isinstance(ours, Flux3) else matches_of(ours)


def with_weights_of(ours: Flux | Flux3, pipe: Pipeline) -> nn.Module:
    """Return diffusers' transformer with our weights."""
    state = {name: tensor.to(pipe.device, pipe.dtype) for name, tensor in ours.state_dict().items()}
    try:
        if isinstance(ours, Flux3):
            theirs = diffusers_transformer3(ours.config)
            state = transformer3_to_diffusers(state)
            # as from released files: diffusers keeps the scales of QK-norm in float32
            state = {name: x.float() if ".norm_" in name else x for name, x in state.items()}
            return reference.loaded(theirs, state).to(pipe.device)
        theirs = reference.diffusers_transformer(ours.config)
    except ImportError as error:
        raise UserError(
            f"against: diffusers is missing, or too old ({error!s:.120}). "
            "Run `pip install --upgrade diffusers`."
        ) from None
    state = reference.transformer_to_diffusers(state, ours.config)
    return reference.loaded(theirs, state).to(pipe.device)


def passes(capture: Capture, config: FluxConfig | Flux3Config) -> list[str]:
    """Return the passes whose inputs are all recorded. UserError if there are none."""
    places = []
    for name in capture.names:
        place = name.removesuffix("/in")
        if place != name and PASS.fullmatch(place):
            places.append(place)
    missing = {}
    for place in places or ["step.001"]:
        names = _recorded_names(capture, place, config).values()
        missing[place] = [n for n in names if n not in capture.records or capture.kind(n) != "full"]
    if all(missing.values()):
        raise UserError(
            f"{capture.path}: has no {next(iter(missing.values()))[0]} in full, which each pass "
            'takes. Capture it with `keep="full"` and without `only`.'
        )
    return [place for place in places if not missing[place]]


def _recorded_names(
    capture: Capture, place: str, config: FluxConfig | Flux3Config
) -> dict[str, str]:
    """Return the recorded inputs of a pass: argument of `reference.diffusers_velocity` -> name."""
    ids = "negative/ids" if place.endswith("/negative") else "ids"
    names = {
        "img": f"{place}/in",
        "txt": f"{place}/txt_in/in",
        "img_ids": f"{ids}/img",
        "txt_ids": f"{ids}/txt",
    }
    if isinstance(config, Flux3Config):
        names["img_ids"] = "ids/img"  # the same with the negative prompt
        if "ids/references" in capture.records:
            names["references"] = f"{place}/emb_in.image_cond/in"
            names["reference_ids"] = "ids/references"
    elif config.vector_dim is not None:
        names["vector"] = f"{place}/vector_in/in"
    return names


def inputs_of_pass(capture: Capture, place: str, pipe: Pipeline) -> dict[str, Tensor]:
    """Return the recorded inputs of a pass, floats in the pipeline's dtype; t and guidance (B,).

    UserError if the recipe has no time, or no guidance, of the pass.
    """
    recipe, config = capture.recipe, pipe.spec.transformer
    has_guidance = isinstance(config, FluxConfig) and config.guidance
    step = int(place.split("/")[0].removeprefix("step."))
    known = 0 < step < len(recipe.get("schedule", ())) <= recipe["steps"] + 1
    if not known or (has_guidance and recipe["guidance"] is None):
        raise UserError(
            f"{capture.path}: its recipe has no time or no guidance of {place}. Capture it again."
        )
    out = {}
    for argument, name in _recorded_names(capture, place, config).items():
        x = capture.tensors[name]
        is_ids = argument.endswith("ids") or not x.is_floating_point()
        out[argument] = x.to(pipe.device, None if is_ids else pipe.dtype)

    def batch(value: float) -> Tensor:
        return torch.full((len(out["img"]),), value, device=pipe.device)

    times = [batch(t) for t in recipe["schedule"][step - 1 : step + 1]]
    if isinstance(config, Flux3Config) and recipe["numerics"] == "diffusers":
        times = [1000 * t / 1000 for t in times]  # as its pipelines pass them on
    out["t"] = times[0]
    if isinstance(config, Flux3Config) and config.flow_map:
        out["target"] = times[1]
    if has_guidance:
        values = per_step_values(recipe["guidance"], recipe["steps"])
        # counted from the end: image to image leaves the first steps out
        out["guidance"] = batch(values[step - len(recipe["schedule"])])
    return out
