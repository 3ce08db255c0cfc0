"""Captures of FLUX 3: complete, harmless, repeated by replay, and equal to diffusers' live.

The capture of the base model has two references and a negative prompt's pass.
"""

import re

import numpy as np
import pytest
import torch
from support.flux3_captures import REQUESTS, Flux3Captures, run
from support.flux3_model import BASE, DISTILLED
from support.parity_requests import differing

from flux.errors import UserError
from flux.parity import compare_live
from flux.parity.bfl import bfl
from flux.parity.bisect import bisect
from flux.parity.capture import Selection, capture
from flux.parity.compare import first_over, missing
from flux.parity.modules import Modules
from flux.parity.replay import replay_inside, replay_loop, replay_modules

__all__ = ["run"]  # a fixture
pytestmark = pytest.mark.filterwarnings("ignore:.* was distilled for")


def test_capture_leaves_the_run_equal_to_the_bit(run):
    """A base model computes text and references once, and its capture in every pass."""
    r, kept = run.request, []
    (image,) = run.pipe(
        r.prompt,
        r.width,
        r.height,
        r.steps,
        r.guidance,
        r.seed,
        callback=lambda step, t, x: kept.append(x),
        images=r.images,
    )
    t = run.taken.tensors
    assert t["step.002/latents"].equal(kept[-1])
    assert t["image"].equal(torch.from_numpy(np.array(image)))
    network = run.pipe.transformer()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in network.modules())
    assert not vars(network).keys() & {"denoise", "stream", "vec", "rope", "forward"}
    assert "_velocity" not in vars(run.pipe)


def test_every_module_is_recorded_in_every_pass(run):
    base = run.model.spec.name == BASE
    places = ["step.001", "step.002"] + ["step.001/negative", "step.002/negative"] * base
    called = {
        path
        for path, module in run.pipe.transformer().named_modules()
        if type(module).forward is not torch.nn.Module.forward
        and (base or "image_cond" not in path)  # without references
    }
    for place in places:
        for tap in ("in", "out"):
            found = (
                re.fullmatch(rf"{place}/(?!negative)(?:([^/]*)/)?{tap}(\.\d+)?(~2)?", name)
                for name in run.taken.names
            )
            seen = {match[1] or "" for match in found if match}
            assert seen == called, (place, tap)
    names = set(run.taken.names)
    assert {f"{place}/{name}" for place in places for name in ("vec", "vec_0")} <= names
    assert {"ids/img", "rope/img", "ids/txt", "rope/txt", "schedule", "noise"} <= names
    assert {"ids/references", "rope/references", "negative/ids/txt"} <= names or not base


def test_target_is_the_next_time_and_text_has_time_0(run):
    t, times = run.taken.tensors, run.taken.recipe["schedule"]
    assert t["step.001/time_in/in"].item() == 1 and t["step.001/time_in/in~2"].item() == 0
    assert t["step.002/time_in/in"].item() == times[1]
    if run.model.spec.name == DISTILLED:
        assert t["step.001/ref_time_in/in"].item() == times[1]
        assert t["step.002/ref_time_in/in"].item() == 0


@pytest.mark.slow
def test_modules_and_loop_repeat_their_outputs(run):
    rows = replay_modules(run.taken, Modules(run.pipe))
    assert len(rows) > 400 and differing(rows) == []
    rows = replay_loop(run.taken, run.pipe, run.request)
    assert len(rows) > 700 and differing(rows) == []
    rows = replay_inside(run.taken, Modules(run.pipe), "step.002")
    assert {"step.002/single_blocks.1/out", "step.002/out"} <= {row.name for row in rows}
    assert differing(rows) == []


def test_every_tensor_equals_diffusers(run):
    """Seen: 4.4e-7, because diffusers computes modulation for each token."""
    rows = compare_live.diffusers(run.taken, run.pipe, tolerance=2e-6)
    assert first_over(rows) is None
    assert missing(rows, compare_live.in_every_pass(run.taken, run.pipe)) == []
    layers = {n.rpartition(".")[0] for n in run.pipe.transformer().state_dict()}
    if run.model.spec.name == DISTILLED:
        layers = {layer for layer in layers if "image_cond" not in layer}
    seen = {row.name for row in rows}
    assert {f"step.002/{layer}/{tap}" for layer in layers for tap in ("in", "out")} <= seen
    assert {"step.001/out", "step.001/time_in.in_layer/out~2"} <= seen
    assert {f"step.001/single_blocks.0/attention/{tap}" for tap in "qkv"} <= seen


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", REQUESTS)
def test_diffusers_numerics_equal_diffusers_to_the_bit(name, dtype, tmp_path, monkeypatch):
    """The capture repeats the conditioning vectors for each token; its replay does too."""
    run = Flux3Captures(name, tmp_path, monkeypatch, dtype, numerics="diffusers")
    rows = compare_live.diffusers(run.taken, run.pipe)
    assert missing(rows, compare_live.in_every_pass(run.taken, run.pipe)) == []
    assert differing(rows) == []
    assert differing(replay_modules(run.taken, Modules(run.pipe), ["step.002/out"])) == []


PLANTED = {  # a layer whose weights are changed -> the first tensor that differs
    "txt_mode_blocks.1.v_proj": "txt_mode_blocks.1.v_proj/out",
    "content_mode_blocks.image.0.mlp_in": "content_mode_blocks.image.0.mlp_in/out",
    "single_blocks.2.attn_out": "single_blocks.2.attn_out/out",
    "final_layer.image.linear": "final_layer.image.linear/out",
}


@pytest.mark.slow
@pytest.mark.parametrize("layer", PLANTED)
def test_bisect_finds_a_changed_layer(layer, run):
    pipe = run.load()
    with torch.no_grad():
        pipe.transformer().get_submodule(layer).weight.mul_(1.05)
    found = bisect(run.taken, pipe, run.request)
    assert found.row.name == f"step.001/{PLANTED[layer]}" and found.row.over
    assert (found.block is None) == ("blocks" not in layer)


@pytest.mark.slow
def test_bisect_finds_nothing_in_the_same_network(run):
    assert bisect(run.taken, run.pipe, run.request) is None


@pytest.mark.slow
def test_part_of_a_run_is_captured(run, tmp_path):
    only = Selection(("single_blocks.1", "*/vec"), at_steps=(2,), store="probe")
    part = capture(run.pipe, run.request, tmp_path / "part.safetensors", only)
    assert "step.002/single_blocks.1/out" in part.names and "step.002/vec" in part.names
    assert all("single_blocks.1" in name or name.endswith("/vec") for name in part.names)


def test_code_of_bfl_is_refused(run, tmp_path):
    with pytest.raises(UserError, match="against: Black Forest Labs' code of FLUX 3 was not at"):
        bfl(run.taken, run.pipe, tmp_path)
