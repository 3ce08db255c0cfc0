"""A live run against a capture: what is live is judged, and what was recorded is the reference.

    here              the pipeline that the capture is of, from the prompt on: `replay.run_and_compare`
    diffusers         its transformer with the same weights, on what each pass took: tokens, text, ids, t, guidance, pooled text
    module:function   an adaptor, a `modules.Call`, on what each module took; or it gives the path of a capture that it wrote

Here, errors add up over a run; beside diffusers, over one run of the transformer; in an adaptor, over a module.
"""

import os
import re
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from flux.errors import UserError
from flux.parity import modules, reference
from flux.parity.capture_file import DTYPES, Capture
from flux.parity.compare import Row, compare
from flux.parity.hooks import check_patterns, joined, matches, watching
from flux.parity.modules import Call, guarded
from flux.parity.name_map import Gather, matches_of
from flux.parity.replay import (
    PASS,
    ModuleRun,
    Tolerance,
    call_checked,
    check_model,
    compare_to_recorded,
    module_runs,
    recorded_inputs,
)
from flux.parity.tolerances import measured_tolerances, stored_rounding
from flux.pipeline import Pipeline
from flux.sampling import per_step_values
from flux.transformer import Flux, FluxConfig


def allowed(
    capture: Capture, precision: str | None, given: float | None, alone: bool = False
) -> Tolerance:
    """What was given, else what was measured for this precision, if anything was."""
    measured = given is None and precision in stored_rounding(capture)
    return measured_tolerances(capture, precision, alone) if measured else given


# ---------------------------------------------------------------- adaptors


def named(text: str) -> Call:
    """The function that `--against module:function` names."""
    if ":" not in text:
        raise UserError(
            f"--against {text}: give here, diffusers, a .safetensors file, or MODULE:FUNCTION"
        )
    try:
        return modules.named(text)
    except UserError as error:
        raise UserError(str(error).replace("--call", "--against")) from None


def adaptor(
    capture: Capture, call: Call, only: Sequence[str] = (), tolerance: float | None = None
) -> list[Row]:
    """Every recorded module of which an output fits `only`; or the capture of which the adaptor gives the path.

    UserError where it fails, or gives anything but as many tensors as were recorded, of their shapes.
    """
    check_patterns(only, capture.names)
    precision, rows, call = capture.recipe.get("dtype"), [], guarded(call)
    alone = allowed(capture, precision, tolerance, alone=True)
    for each in (
        module_runs(capture, only) or module_runs(capture)[:1]
    ):  # a capture has more than what modules give
        answer = call(each.name, recorded_inputs(capture, each))
        if isinstance(answer, str | os.PathLike):
            return compare(Capture(answer), capture, allowed(capture, precision, tolerance), only)
        if not rows:
            check_patterns(
                only, [name for each in module_runs(capture) for name in each.outputs.values()]
            )
        rows += compare_to_recorded(
            capture, _checked(capture, each, answer), alone, is_network=each.is_network
        )
    return rows


def _checked(capture: Capture, each: ModuleRun, answer) -> dict[str, Tensor]:
    """Tensors by their names in the capture."""
    tensors = call_checked(lambda name, inputs: answer, each.name, [])
    expected = 1 + max(each.outputs)
    numbered = any(
        re.search(r"/out\.\d", name) for name in each.outputs.values()
    )  # then not all need have been recorded
    if len(tensors) < expected or (len(tensors) > expected and not numbered):
        raise UserError(
            f"the adaptor gave {len(tensors)} tensors for {each.name}, and should give {expected}"
        )
    for number, name in each.outputs.items():
        given, wanted = tensors[number], capture.records[name].shape
        if tuple(given.shape) != wanted or given.dtype not in DTYPES:
            sizes = ["x".join(map(str, shape)) for shape in (given.shape, wanted)]
            raise UserError(
                f"the adaptor gave {given.dtype} of {sizes[0]} for {name}, which should be {sizes[1]}"
            )
    return {name: tensors[number] for number, name in each.outputs.items()}


# ---------------------------------------------------------------- diffusers


def diffusers(
    capture: Capture, pipe: Pipeline, only: Sequence[str] = (), tolerance: Tolerance = None
) -> list[Row]:
    """Its transformer in every recorded pass: rows of the tensors that both have, in the order of our execution."""
    check_model(capture, pipe)
    places = passes(capture, pipe.spec.transformer)
    ours = pipe.transformer()
    matching, theirs, rows = matches_of(ours), with_weights_of(ours, pipe), []
    have = {
        place: {n: m for n, m in matching.items() if joined(place, n) in capture.records}
        for place in places
    }
    check_patterns(only, [joined(place, name) for place in places for name in have[place]])
    for place in places:
        wanted = {
            joined(place, name): match
            for name, match in have[place].items()
            if matches(joined(place, name), only)
        }

        def judge(name, tensor):
            return rows.extend(
                compare_to_recorded(capture, {name: tensor}, tolerance, is_network=True)
            )

        with torch.inference_mode(), watching({"": theirs}, Gather(wanted, judge)):
            reference.diffusers_velocity(theirs, **_inputs(capture, place, pipe))
    return sorted(rows, key=lambda row: capture.records[row.name].ordinal)


def with_weights_of(ours: Flux, pipe: Pipeline) -> nn.Module:
    """diffusers' transformer, which is imported here and nowhere before."""
    state = {name: tensor.to(pipe.device, pipe.dtype) for name, tensor in ours.state_dict().items()}
    try:
        theirs = reference.diffusers_transformer(ours.config)
    except ImportError as error:
        fault = f"--against diffusers: it is not installed, or too old ({error!s:.120})"
        raise UserError(f"{fault}; run `pip install --upgrade diffusers`") from None
    return reference.loaded(theirs, reference.transformer_to_diffusers(state, ours.config)).to(
        pipe.device
    )


def passes(capture: Capture, config: FluxConfig) -> list[str]:
    """The runs of the transformer that were recorded with all that diffusers' takes; UserError if there are none."""
    if any(name.startswith("references/") for name in capture.names):
        raise UserError(
            f"--against diffusers is for runs without --kv-cache, which {capture.path} is not: give --against here"
        )
    places = [
        name.removesuffix("/in")
        for name in capture.names
        if PASS.fullmatch(name.removesuffix("/in"))
    ] or ["step.001"]

    def full(name):
        return name in capture.records and capture.kind(name) == "full"

    lacking = {
        place: [name for name in _taken(place, config).values() if not full(name)]
        for place in places
    }
    if all(lacking.values()):
        fault = f"{capture.path} lacks {lacking[places[0]][0]} in full, which diffusers takes"
        raise UserError(f"{fault}: capture it with --keep full, and without --only")
    return [place for place in places if not lacking[place]]


def _taken(place: str, config: FluxConfig) -> dict[str, str]:
    """What a pass took, by the arguments of `reference.diffusers_velocity`."""
    ids = "negative/ids" if place.endswith("/negative") else "ids"
    taken = dict(
        img=f"{place}/in", txt=f"{place}/txt_in/in", img_ids=f"{ids}/img", txt_ids=f"{ids}/txt"
    )
    return taken | ({} if config.vector_dim is None else {"vector": f"{place}/vector_in/in"})


def _inputs(capture: Capture, place: str, pipe: Pipeline) -> dict[str, Tensor]:
    recipe, step, config = capture.recipe, int(re.search(r"\d+", place)[0]), pipe.spec.transformer
    taken = {key: capture.tensors[name] for key, name in _taken(place, config).items()}
    out = {
        key: x.to(pipe.device, pipe.dtype if x.is_floating_point() else None)
        for key, x in taken.items()
    }

    def batch(value):
        return torch.full((len(out["img"]),), value, device=pipe.device)

    out["t"] = batch(recipe["schedule"][step - 1])
    if (
        config.guidance
    ):  # counted from the end: a run that starts from a picture leaves out the first steps
        out["guidance"] = batch(
            per_step_values(recipe["guidance"], recipe["steps"])[step - len(recipe["schedule"])]
        )
    return out
