"""Compare a capture with Black Forest Labs' own code: an unmodified checkout, in its own process.

BFL's transformer gets the capture's weights, and in each recorded pass the recorded inputs. So
errors accumulate over one pass at most. Its autoencoder decodes the recorded latents and encodes
the recorded pixels, if it has the 32 groups a norm that BFL's code has, and its sampler computes
the schedule. Hooks on BFL's modules name the tensors.
In float32 they are equal to rounding; in bfloat16 a capture with `numerics="bfl"` is equal to the
bit on the same processor.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor

from flux.errors import UserError
from flux.hooks import check_patterns, matches
from flux.parity import bfl_process
from flux.parity.capture_file import Capture
from flux.parity.compare import Row, compare
from flux.parity.compare_live import in_every_pass, inputs_of_pass, passes
from flux.parity.golden_kit import write_tensors
from flux.parity.replay import Tolerance, check_model
from flux.pipeline import Pipeline


def bfl(
    capture: Capture,
    pipe: Pipeline,
    checkout: Path,
    only: tuple[str, ...] = (),
    tolerance: Tolerance = None,
) -> list[Row]:
    """Run BFL's networks of `checkout` on the capture's inputs. Rows of what both have.

    The code in `checkout` is run. UserError if it is not of the capture's family, or fails.
    """
    check_model(capture, pipe)
    if pipe.spec.flux3:
        raise UserError(
            "against: Black Forest Labs' code of FLUX 3 was not at hand, and is not run here. Pass "
            '`against="diffusers"`.'
        )
    check_patterns(only, capture.names)
    package = "flux" if pipe.spec.flux1 else "flux2"
    if not (checkout / "src" / package / "model.py").is_file():
        raise UserError(
            f"bfl_path: {checkout} has no src/{package}/model.py. Pass a checkout of "
            f"black-forest-labs/{package}."
        )
    wanted = [name for name in capture.names if matches(name, only)]
    with TemporaryDirectory() as folder:
        inputs, outputs = Path(folder, "inputs.safetensors"), Path(folder, "outputs.safetensors")
        tensors, settings = _inputs(capture, pipe), _settings(capture, pipe, wanted)
        write_tensors(inputs, tensors, {"settings": json.dumps(settings)})
        _run(checkout.resolve(), inputs, outputs)
        theirs = Capture(outputs)
        if not theirs.names:
            return []
        return compare(theirs, capture, tolerance)


def computed_by_bfl(capture: Capture, pipe: Pipeline) -> list[str]:
    """Return the capture's tensors that BFL's code must give if it is run on the inputs.

    With cached references, BFL's code runs them together with the image in the first step: of this
    step, only the output is the capture's.
    """
    names = in_every_pass(capture, pipe)
    if "references/in.0" in capture.records:
        first = passes(capture, pipe.spec.flux_config)[0]
        names = [n for n in names if not n.startswith(f"{first}/") or n == f"{first}/out"]
    if _settings(capture, pipe, ["schedule"])["image_tokens"]:
        names.append("schedule")
    for name in _of_autoencoder(capture, pipe):
        place = name.partition(":")[0]
        names.append("pixels" if place == "decoder" else f"{place}/latents")
    return [name for name in names if name in capture.records]


def _settings(capture: Capture, pipe: Pipeline, wanted: list[str]) -> dict:
    recipe = capture.recipe
    tokens = recipe["height"] // 16 * (recipe["width"] // 16)
    whole = len(recipe["schedule"]) == recipe["steps"] + 1  # image to image leaves out a part
    return dict(
        transformer=asdict(pipe.spec.flux_config),
        autoencoder=asdict(pipe.spec.autoencoder) if _of_autoencoder(capture, pipe) else None,
        passes=passes(capture, pipe.spec.flux_config),
        steps=recipe["steps"],
        image_tokens=tokens if whole and "schedule" in wanted else 0,
        shift=pipe.spec.schedule != "unshifted",
        dtype=str(pipe.dtype).removeprefix("torch."),
        device=pipe.device.type,
        threads=torch.get_num_threads(),
        wanted=wanted,
    )


def _inputs(capture: Capture, pipe: Pipeline) -> dict[str, Tensor]:
    """Return weights, and the recorded inputs of every pass, by the names of `bfl_process`."""
    out = {f"transformer.{name}": x for name, x in pipe.transformer().state_dict().items()}
    for place in passes(capture, pipe.spec.flux_config):
        given = inputs_of_pass(capture, place, pipe)
        given.setdefault("guidance", torch.zeros_like(given["t"]))
        out |= {f"{place}:{name}": x for name, x in given.items()}
    if "references/in.0" in capture.records:
        out["references:img"] = capture.tensors["references/in.0"]
        out["references:img_ids"] = capture.tensors["references/ids/img"]
    if recorded := _of_autoencoder(capture, pipe):
        state = pipe.autoencoder().state_dict()
        out |= {f"autoencoder.{name}": x for name, x in state.items()}
        out |= {name: capture.tensors[source] for name, source in recorded.items()}
    return out


def _of_autoencoder(capture: Capture, pipe: Pipeline) -> dict[str, str]:
    """Return the recorded inputs of the autoencoder: name for `bfl_process` -> recorded name.

    None if the autoencoder is not one of BFL's code: 32 groups in a norm, one width.
    """
    config = pipe.spec.autoencoder
    if config.norm_groups != 32 or config.decoder_ch is not None:
        return {}
    last = f"step.{len(capture.recipe['schedule']) - 1:03}/latents"
    found = {"decoder:latents": last} if "pixels" in capture.records else {}
    for name in capture.names:
        if name.startswith("encoder.") and name.count("/") == 1 and name.endswith("/pixels"):
            found[name.replace("/", ":")] = name
    return {
        name: source
        for name, source in found.items()
        if source in capture.records and capture.kind(source) == "full"
    }


def _run(checkout: Path, inputs: Path, outputs: Path) -> None:
    """Run BFL's code in a process that cannot import this package. UserError if it fails."""
    environment = {name: x for name, x in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-P", bfl_process.__file__, checkout, inputs, outputs],
        env=environment,
        cwd=inputs.parent,
        capture_output=True,
        text=True,
    )
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["it was stopped"])[-1]
        raise UserError(f"bfl_path: the code of {checkout} failed: {last:.300}")
