"""flux.parity.compare_live: diffusers live on a capture's inputs, and functions of other ports.

Expected values are diffusers' own. A fault planted in a copy of our network must be found where it
is planted. Networks are tiny and random, or the embedded model's.
"""

import copy
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from support.parity_requests import KLEIN, REQUESTS, SMALL, differing
from support.planted_changes import BLOCKS, CHANGES, changed
from support.tiny_repositories import tiny_repositories

import flux
from flux.errors import UserError
from flux.hooks import matches
from flux.image_io.request import ImageInputs
from flux.parity import compare_live as against
from flux.parity import tolerances
from flux.parity.capture import Selection, capture
from flux.parity.capture_file import Capture
from flux.parity.compare import coverage, exit_code, first_over, missing, verdict
from flux.parity.modules import Modules
from flux.parity.replay import replay_modules

pytestmark = pytest.mark.filterwarnings(
    "ignore:.* was distilled for", "ignore:.* was not trained with"
)
either_family = pytest.mark.parametrize("name", REQUESTS)
PASSES = {"step.001", "step.001/negative", "step.002", "step.002/negative"}
ONE_STEP = replace(SMALL, width=64, height=64, steps=1, guidance=1.0)
BLOCK = "step.001/double_blocks.0"
FIRST = {  # where diffusers has no module of the same inputs and outputs
    "activation": "double_blocks.1.img_mlp.2/in",
    "modulation": "double_blocks.0.img_attn.qkv/in",
}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory):
    """A function that loads a tiny random model."""
    with tiny_repositories(tmp_path_factory.mktemp("weights"), REQUESTS) as folder:
        yield lambda name, **how: flux.load(
            name, weights=folder, device="cpu", fast=False, **{"dtype": torch.float32} | how
        )


@pytest.fixture(scope="module")
def right(pipeline):
    return {name: pipeline(name) for name in REQUESTS}


@pytest.fixture(scope="module")
def captures(right, tmp_path_factory):
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(right[name], request, out / f"{name}.safetensors")
        for name, request in REQUESTS.items()
    }


# ---------------------------------------------------------------- diffusers


@either_family
def test_every_tensor_equals_diffusers(name, captures, right):
    """Seen: the same to the bit, but for 1.5e-7 in FLUX.2 from the last modulation on."""
    rows = against.diffusers(captures[name], right[name], tolerance=2e-6)
    assert first_over(rows) is None
    names = [row.name for row in rows]
    assert names == [
        n for n in captures[name].names if n in set(names)
    ]  # in the order of our execution
    # every layer with weights, every attention, every block, and the network
    layers = {n.rpartition(".")[0] for n in right[name].transformer().state_dict()}
    expected = {f"{layer}/{tap}" for layer in layers for tap in ("in", "out")} | {"out"}
    for block in BLOCKS:
        expected |= {f"{block}/attention/{tap}" for tap in ("q", "k", "v", "out")}
        taps = ("out.0", "out.1") if block.startswith("double") else ("out",)
        expected |= {f"{block}/{tap}" for tap in taps}
    assert set(names) == {f"{place}/{tap}" for place in PASSES for tap in expected}
    assert set(names) == set(against.in_every_pass(captures[name], right[name]))


@either_family
def test_bfloat16_equals_diffusers_with_its_numerics(name, pipeline, tmp_path):
    """To the bit. A file does not keep strides, on which a biased Linear's rounding depends."""
    pipe = pipeline(name, dtype=torch.bfloat16, numerics="diffusers")
    layer = pipe.transformer().img_in
    layer.forward = lambda x: F.linear(x.contiguous(), layer.weight, layer.bias)
    taken = capture(pipe, ONE_STEP, tmp_path / "a.safetensors")
    rows = against.diffusers(taken, pipe)
    assert {row.dtype for row in rows} == {"BF16"} and differing(rows) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, change",
    [*((KLEIN, change) for change in CHANGES if change != "weight"), ("flux.1-dev", "weight")],
)
def test_planted_fault_is_found_in_its_module(name, change, pipeline, right, tmp_path):
    pipe = changed(pipeline(name), change)
    taken = capture(pipe, ONE_STEP, tmp_path / "a.safetensors", Selection(("step.001", "ids")))
    first = first_over(against.diffusers(taken, right[name], tolerance=2e-6))
    assert first.name == f"step.001/{FIRST.get(change, CHANGES[change][2])}" and first.ratio > 50


def test_pass_without_inputs_makes_a_comparison_incomplete(captures, right):
    """Each tensor of the other passes is right; a wrong pass could be recorded without inputs."""
    taken, pipe = copy.copy(captures[KLEIN]), right[KLEIN]
    taken.records = {n: r for n, r in taken.records.items() if n != "step.002/in"}
    taken.names = list(taken.records)
    for only, code in ((), 3), (("step.001",), 0):
        rows = against.diffusers(taken, pipe, only, tolerance=2e-6)
        lost = missing(rows, against.in_every_pass(taken, pipe), only)
        assert exit_code(rows, lost) == code and bool(lost) == bool(code)
        assert all(re.match(r"step\.002/(?!negative)", name) for name in lost)


def test_image_to_image_uses_the_guidance_of_its_steps(right, tmp_path):
    """It has another value in each step, and the first steps are left out."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    request = replace(
        ONE_STEP,
        steps=4,
        guidance=(1.0, 5.0),
        images=ImageInputs((Image.fromarray(pixels),), strength=0.5),
    )
    taken = capture(right["flux.1-dev"], request, tmp_path / "a.safetensors")
    rows = against.diffusers(taken, right["flux.1-dev"], ["guidance_in.*", "out"], tolerance=2e-6)
    names = {row.name for row in rows if "guidance_in.in_layer" in row.name}
    assert first_over(rows) is None and names == {
        f"step.00{n}/guidance_in.in_layer/{tap}" for n in (1, 2) for tap in ("in", "out")
    }


LOST = {  # the first tensor that is missed -> what a capture lacks
    "step.001/in": r"step\.\d+(/negative)?/in",
    "step.001/txt_in/in": ".*/txt_in/in",
    "ids/img": ".*ids/img",
    "ids/txt": ".*ids/txt",
}


def test_wrong_captures_for_diffusers_are_refused(captures, right, tmp_path, monkeypatch):
    taken, pipe = captures[KLEIN], right[KLEIN]
    with pytest.raises(
        UserError, match=r"is of flux\.1-dev \(the pipeline is flux\.2-klein-base-4b\)"
    ):
        against.diffusers(captures["flux.1-dev"], pipe)
    with pytest.raises(
        UserError,
        match=r"only: double_block\.0 matches no name. The nearest names are .*double_blocks\.0",
    ):
        against.diffusers(taken, pipe, ["double_block.0"])
    for lost, where in LOST.items():
        few = copy.copy(taken)
        few.records = {
            name: record for name, record in taken.records.items() if not re.fullmatch(where, name)
        }
        few.names = list(few.records)
        with pytest.raises(
            UserError,
            match=rf"\.safetensors: has no {lost} in full, which each pass takes\. Capture it with",
        ):
            against.diffusers(few, pipe)
    for changes in ({"schedule": [1.0]}, {"steps": 0}, {"schedule": [1.0] * 99}):
        few = Capture(taken.path)
        few.recipe |= changes
        with pytest.raises(UserError, match="has no time or no guidance of step.001"):
            against.diffusers(few, pipe)
    with (
        monkeypatch.context() as patch,
        pytest.raises(UserError, match="diffusers is missing, or too old .* Run `pip install"),
    ):
        patch.setitem(sys.modules, "diffusers", None)
        against.diffusers(taken, pipe)


def test_cached_references_are_refused_for_diffusers(right, tmp_path):
    pictures = ImageInputs((Image.new("RGB", (64, 64), "red"),), kv_cache=True)
    taken = capture(
        right[KLEIN],
        replace(ONE_STEP, images=pictures),
        tmp_path / "a.safetensors",
        Selection(("in",)),
    )
    with pytest.raises(UserError, match="against: diffusers does not run with `kv_cache`"):
        against.diffusers(taken, right[KLEIN])


# ---------------------------------------------------------------- adaptors


@either_family
def test_function_is_judged_module_by_module(name, captures, right):
    ours, only = Modules(right[name]), ["step.002/single_blocks.*"]
    assert differing(against.adaptor(captures[name], ours, only)[0]) == []

    def faulty(module, inputs):
        return [
            x * 1.01 if module == "step.002/single_blocks.1" else x for x in ours(module, inputs)
        ]

    rows, _ = against.adaptor(captures[name], faulty, only)
    assert [row.name for row in rows if row.over] == [
        "step.002/single_blocks.1/out"
    ]  # errors do not add up


def test_function_may_return_its_own_capture(captures, tmp_path):
    taken, asked = captures[KLEIN], []
    tensors = {
        name: taken.tensors[name] for name in ("step.001/latents", "step.002/latents", "pixels")
    }
    tensors["step.002/latents"] = 1.01 * tensors["step.002/latents"]
    save_file(tensors, tmp_path / "theirs.safetensors")
    rows, expected = against.adaptor(
        taken, lambda name, inputs: asked.append(name) or tmp_path / "theirs.safetensors"
    )
    assert [row.name for row in rows] == list(tensors) and [
        row.name for row in rows if row.over
    ] == ["step.002/latents"]
    assert len(asked) == 1 and expected == taken.names
    assert (
        against.adaptor(
            taken, lambda name, inputs: str(tmp_path / "theirs.safetensors"), tolerance=0.1
        )[0][1].over
        is False
    )
    with pytest.raises(UserError, match=r"none\.safetensors: does not exist"):
        against.adaptor(taken, lambda name, inputs: str(tmp_path / "none.safetensors"))


WRONG = {  # what an adaptor gives for a double block, two of (1, L, 128) -> what is said
    "a number": (3, "returned int for .*expected a list of tensors"),
    "arrays": ([np.zeros(3)] * 2, "returned list for .*expected a list of tensors"),
    "too few": (
        [torch.zeros(1, 24, 128)],
        r"returned 1 tensors for \S+/double_blocks\.0 \(expected 2\)",
    ),
    "another shape": (
        [torch.zeros(24, 128)] * 2,
        r"returned torch\.float32 of 24x128 for \S+/out\.0 \(expected 1x24x128\)",
    ),
    "another dtype": (
        [torch.zeros(1, 24, 128, dtype=torch.cfloat)] * 2,
        "returned torch.complex64 of 1x24x128 for",
    ),
}


@pytest.mark.parametrize("answer, words", WRONG.values(), ids=WRONG)
def test_wrong_outputs_of_a_function_are_refused(answer, words, captures):
    with pytest.raises(UserError, match=words):
        against.adaptor(
            captures[KLEIN], lambda name, inputs: answer, ["step.001/double_blocks.0/out.?"]
        )


def test_function_may_have_nothing_for_a_module(captures):
    """A port of one block is compared in this block, and is incomplete unless it is selected."""
    taken = captures[KLEIN]
    only = ["step.001", "!attention", "!single_blocks.0"]

    def blocks(nothing):
        def port(name, inputs):
            if name != BLOCK:
                return nothing
            return [taken.tensors[f"{name}/out.{i}"].clone() for i in (0, 1)]

        return port

    for nothing in (None, []):
        rows, expected = against.adaptor(taken, blocks(nothing), only)
        assert [row.name for row in rows] == [f"{BLOCK}/out.{i}" for i in (0, 1)]
        assert all(row.identical for row in rows)
        rest = coverage(rows, taken, only=only, missing="have nothing of the function")
        counted = int(re.search(r"; ([\d,]+) have nothing of the function \(", rest)[1])
        named = [name for name in taken.names if matches(name, only)]
        assert counted == len(named) - 2 > 50
        lost = missing(rows, expected, only)
        assert "step.001/img_in/out" in lost and "step.001/img_in/in" not in lost
        assert exit_code(rows, lost) == 3 and verdict(rows, lost).startswith("incomplete: 2 of ")
        part, all_of_part = against.adaptor(taken, blocks(nothing), [f"{BLOCK}/out.?"])
        assert exit_code(part, missing(part, all_of_part, [f"{BLOCK}/out.?"])) == 0
        assert [row.name for row in replay_modules(taken, blocks(nothing), only)] == [
            row.name for row in rows
        ]
    with pytest.raises(UserError, match="exclude: doubel_blocks matches no name"):
        against.adaptor(taken, blocks(None), ["!doubel_blocks"])


def test_failing_function_is_one_sentence(captures):
    with pytest.raises(UserError, match=r"returned 2 tensors for step.001/img_in \(expected 1\)"):
        against.adaptor(
            captures[KLEIN], lambda name, inputs: [inputs[0]] * 2, ["step.001/img_in/out"]
        )
    with pytest.raises(
        UserError,
        match=r"module_fn: failed at step.001/img_in with ZeroDivisionError \(division by zero",
    ):
        against.adaptor(captures[KLEIN], lambda name, inputs: 1 / 0, ["step.001/img_in/out"])
    with pytest.raises(
        UserError, match="only: imgin matches no name. The nearest names are .*img_in"
    ):
        against.adaptor(captures[KLEIN], lambda name, inputs: inputs, ["imgin"])


# ---------------------------------------------------------------- the command

PORT = """
import flux
from flux.parity.modules import Modules
ours = Modules(flux.load(device="cpu", fast=False))
def port(name, inputs):
    return [x * 1.01 if name == "step.001/single_blocks.1" else x for x in ours(name, inputs)]
def written(name, inputs):
    return "copy.safetensors"
def itself(name, inputs):
    return "a.safetensors"
"""


@pytest.mark.slow
def test_command_compares_live_runs(parity):
    size = ("--width", 64, "--height", 64, "--steps", 1)
    assert parity("capture", "a small red circle", *size, "--output", "a.safetensors")[0] == 0
    code, out, _ = parity(
        "compare", "a.safetensors", "--against", "here", "--budget", 0, "--json", "rows.json"
    )
    rows = json.loads(Path("rows.json").read_text())
    assert (
        code == 0
        and out.startswith("all ")
        and [row["name"] for row in rows] == Capture("a.safetensors").names
    )
    code, out, _ = parity("compare", "a.safetensors", "--against", "diffusers", "--budget", 2e-6)
    assert code == 0 and "step.001/single_blocks.1/attention/q" in out
    code, out, _ = parity(
        "compare",
        "a.safetensors",
        "--against",
        "diffusers",
        "--dtype",
        "bfloat16",
        "--budget",
        1e-5,
    )
    assert code == 1 and "tensors are over tolerance" in out

    Path("another_port.py").write_text(PORT)
    code, out, _ = parity("compare", "a.safetensors", "--against", "another_port:port")
    assert code == 1 and "the first is step.001/single_blocks.1/out:" in out.splitlines()[0]
    shutil.copy("a.safetensors", "copy.safetensors")
    for same in ("another_port:written", "copy.safetensors"):
        code, out, _ = parity("compare", "a.safetensors", "--against", same, "--only", "latents")
        assert code == 0 and out.startswith("all 1 tensors")
    for arguments, words in (
        ((), "compare takes A and either B or --against X"),
        (("a.safetensors", "--against", "here"), "compare takes A and either B or --against X"),
        (("--against", "there"), "--against: unknown (got there, expected here, diffusers"),
        (("--against", "another_port:itself"), "is the same file as"),
        (("a.safetensors",), "is the same file as"),
        (("--against", "another_port:no"), "--against: there is no function another_port:no"),
        (
            ("--against", "another_port:port", "--dtype", "bfloat16"),
            "--dtype: applies only with --against here, diffusers or bfl",
        ),
        (
            ("a.safetensors", "--lora-partial"),
            "--lora-ignore-unmatched: applies only with --against",
        ),
        (("--against", "here", "--image", "none.png"), "none.png"),
    ):
        code, _, err = parity("compare", "a.safetensors", *arguments)
        assert code == 2 and words in err.splitlines()[-1]

    only, json_file = "step.001/single_blocks.1/out", ("--json", "allowed.json")
    assert parity("budgets", "a.safetensors", "--precision", "bfloat16", "--only", only)[0] == 0
    measured = tolerances.stored_rounding(Capture("a.safetensors"))["bfloat16"][only]
    code, *_ = parity(
        "compare",
        "a.safetensors",
        "--against",
        "diffusers",
        "--dtype",
        "bfloat16",
        "--only",
        only,
        *json_file,
    )
    (row,) = json.loads(Path("allowed.json").read_text())
    assert code == 0 and row["tolerance"] == pytest.approx(2 * measured.accumulated)
