"""flux.parity's replay, bisect and tolerances.

A capture is the truth here (test_capture.py tests captures). Faults are one-line changes to copies
of our networks. The rounding of single layers is computed by hand. Networks are tiny and random, or
the embedded model's.
"""

import json
import math
import re
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
from torch import Tensor

import flux
from flux.errors import UserError
from flux.image_io.request import ImageInputs
from flux.parity import modules, tolerances
from flux.parity.bisect import bisect, first_differing
from flux.parity.capture import Request, Selection, capture
from flux.parity.capture_file import Capture
from flux.parity.compare import compare, first_over, measured_tolerance
from flux.parity.modules import Modules, in_dtype
from flux.parity.replay import (
    check_model,
    load_pipeline,
    replay_inside,
    replay_loop,
    replay_modules,
    request_of,
)

TINY = replace(SMALL, width=64, height=64, steps=1, guidance=1.0)
OUTS = "step.*_blocks.?/out*"  # of the blocks themselves, not of what is in them
SOME = (OUTS, "*.qkv", "*.proj", "*.linear2", "features", "latents")
FLUX1 = "flux.1-dev"
either_family = pytest.mark.parametrize("name", REQUESTS)
# every change in one family, and one of them in both
CHANGED = [
    (FLUX1, "activation"),
    (KLEIN, "modulation"),
    (FLUX1, "rope"),
    (KLEIN, "rope"),
    (FLUX1, "norm"),
    (KLEIN, "weight"),
]
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* was distilled for", "ignore:.* was not trained with"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Tiny random repositories in bfloat16, as the released ones."""
    with tiny_repositories(tmp_path_factory.mktemp("weights"), REQUESTS, torch.bfloat16) as folder:
        yield folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return lambda name, dtype=torch.float32: flux.load(
        name, weights=folder, device="cpu", fast=False, dtype=dtype
    )


@pytest.fixture(scope="module")
def captures(pipeline, tmp_path_factory):
    """Every tensor of one float32 run of each family."""
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(pipeline(name), request, out / f"{name}.safetensors")
        for name, request in REQUESTS.items()
    }


@pytest.fixture(scope="module")
def seven_steps(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("seven") / "a.safetensors"
    return capture(pipeline(KLEIN), replace(TINY, steps=7), path)


# ---------------------------------------------------------------- our own capture


@either_family
def test_every_module_alone_repeats_its_outputs(name, captures, pipeline):
    recorded = captures[name]
    rows = replay_modules(recorded, Modules(pipeline(name)))
    assert differing(rows) == []
    outputs = {n for n in recorded.names if re.search(r"/out(\.\d+)?$", n)} | {"pixels"}
    # a text encoder's attention also takes a mask; the modules around it are replayed
    masked = {n for n in outputs if re.match("text/.*/attention/out", n)}
    assert {row.name for row in rows} == outputs - masked


@either_family
def test_replay_inside_networks_and_blocks_repeats_every_tensor(name, captures, pipeline):
    recorded, modules = captures[name], Modules(pipeline(name))
    places = ["step.002", "step.001/negative", "step.002/single_blocks.1", "decoder"]
    places += ["text/negative/t5"] * (name == FLUX1)
    for place in places:
        rows = replay_inside(recorded, modules, place)
        # a caller computes the inputs: vec and, in FLUX.1, the modulations
        from_caller = "$"
        if "blocks" in place:
            from_caller = r"\.modulation"
        elif place.startswith("step"):
            from_caller = r"/(in|vec|time_in|guidance_in|vector_in|latents|velocity|negative)\b"
        expected = [
            n
            for n in recorded.names
            if n.startswith(place) and not re.match(from_caller, n.removeprefix(place))
        ]
        if place == "decoder":
            expected.append("pixels")
        assert differing(rows) == [] and [row.name for row in rows] == expected


@either_family
def test_loop_repeats_the_run_without_text_encoders(name, captures, pipeline):
    pipe = pipeline(name)
    rows = replay_loop(captures[name], pipe, request_of(captures[name]))
    names = [
        n for n in captures[name].names if not re.match(r"text/(negative/)?(t5|clip|model)", n)
    ]
    assert [row.name for row in rows] == names and differing(rows) == []
    assert not pipe.text.cache and all(network.module is None for network in pipe.text.networks)


def test_loop_starts_from_recorded_noise_and_features(captures, pipeline, tmp_path):
    """Noise and features that no seed and no prompt here give, as of another implementation."""
    g = torch.Generator().manual_seed(0)
    names = ["text/features", "text/negative/features", "noise"]
    drawn = {name: torch.randn(captures[KLEIN].tensors[name].shape, generator=g) for name in names}
    save_file(drawn, tmp_path / "theirs.safetensors")
    theirs = Capture(tmp_path / "theirs.safetensors")
    rows = replay_loop(theirs, pipeline(KLEIN), REQUESTS[KLEIN])
    assert [row.name for row in rows] == names and differing(rows) == []


@pytest.mark.parametrize("kv_cache", [False, True], ids=["references", "cached references"])
def test_run_with_input_images_is_replayed(kv_cache, pipeline, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    images = ImageInputs((Image.fromarray(pixels),), kv_cache=kv_cache)
    pipe, request = pipeline(KLEIN), replace(TINY, steps=2, images=images)
    recorded = capture(pipe, request, tmp_path / "a.safetensors")
    rows = replay_modules(recorded, Modules(pipe))
    names = {row.name for row in rows}
    assert differing(rows) == []
    assert {"step.002/out", "encoder.1/latents", "encoder.1/encoder.conv_in/out"} <= names
    cached = {"references/out.0", "references/double_blocks.1/out.0"} <= names
    assert cached == kv_cache
    assert differing(replay_loop(recorded, pipe, request_of(recorded, images))) == []
    assert bisect(recorded, pipe, request) is None
    with pytest.raises(UserError, match="images: .* was made with images. Pass the same images"):
        request_of(recorded)


def test_embedded_model_is_replayed(tmp_path):
    pipe = flux.load(device="cpu", fast=False)
    request = Request("a small red circle", 64, 64, steps=2)
    recorded = capture(pipe, request, tmp_path / "a.safetensors")
    assert differing(replay_modules(recorded, Modules(pipe))) == []
    assert bisect(recorded, pipe, request_of(recorded)) is None
    assert load_pipeline(recorded).spec.name == pipe.spec.name
    assert request_of(recorded).prompt == "a small red circle"


# ---------------------------------------------------------------- one change in one block


@pytest.mark.parametrize("name, change", CHANGED)
def test_change_shows_only_in_its_block_and_in_networks(name, change, captures, pipeline):
    """Each module runs alone: no bit moves anywhere else."""
    block, pipe = CHANGES[change][0], changed(pipeline(name), change)
    moved = differing(replay_modules(captures[name], Modules(pipe), ["step.*"]))
    allowed = rf"step\.\d+/(negative/)?({re.escape(block)}[./]|out$)"
    assert [n for n in moved if not re.match(allowed, n)] == []
    for place in ("step.001", "step.001/negative", "step.002", "step.002/negative"):
        assert f"{place}/out" in moved
        assert any(n.startswith(f"{place}/{block}/out") for n in moved)


@pytest.mark.parametrize("name, change", CHANGED)
def test_change_shows_in_all_later_blocks_of_a_run(name, change, captures, pipeline):
    block, pipe = CHANGES[change][0], changed(pipeline(name), change)
    moved = differing(replay_loop(captures[name], pipe, REQUESTS[name], [OUTS]))
    outs = [f"{b}/out.0" if b.startswith("double") else f"{b}/out" for b in BLOCKS]
    at = BLOCKS.index(block)
    assert [f"step.001/{out}" in moved for out in outs] == [i >= at for i in range(len(outs))]
    assert all(f"step.002/{out}" in moved for out in outs)


@pytest.mark.parametrize("name, change", CHANGED)
def test_bisect_names_the_first_tensor(name, change, captures, pipeline):
    block, _, first = CHANGES[change]
    found = bisect(captures[name], changed(pipeline(name), change), REQUESTS[name])
    assert (found.step, found.block) == (1, f"step.001/{block}")
    assert found.row.name == f"step.001/{first}"
    good = BLOCKS.index(block)
    assert found.runs["network"] == 2  # one step, of two passes
    assert found.runs["stretches"] <= 1 + 2 * math.log2(good + 1) + 1
    assert found.runs["block"] <= 3 * good + 1
    assert str(found).startswith(
        f"the first difference is at step.001/{first}, in step.001/{block}: relative L2 "
    )


@either_family
def test_bisect_finds_faults_outside_blocks(name, captures, pipeline):
    """In an embedder, in a modulation, which is computed before the blocks, and in the request."""
    modulation = "single_stream_modulation.lin"
    if name == FLUX1:
        modulation = "single_blocks.1.modulation.lin"
    for module in ("img_in", modulation):
        pipe = pipeline(name)
        pipe.transformer().get_submodule(module).weight.mul_(1.01)
        found = bisect(captures[name], pipe, REQUESTS[name])
        assert (found.step, found.block) == (1, None)
        assert found.row.name == f"step.001/{module}/out"
    wrong = replace(REQUESTS[name], guidance=1.5 + REQUESTS[name].guidance)
    found = bisect(captures[name], pipeline(name), wrong)
    assert (found.step, found.block, found.row.name) == (1, None, "step.001/velocity")


@pytest.mark.parametrize("late", [1, 2, 4, 7])
def test_bisect_finds_the_step(late, seven_steps, pipeline):
    """One block is wrong from a step on, which its modulation tells."""
    pipe = pipeline(KLEIN)
    block = pipe.transformer().single_blocks[1]
    forward, tensors = block.forward, seven_steps.tensors
    shifts = [tensors[f"step.{step:03}/single_blocks.1/arg.2"] for step in range(late, 8)]

    def wrong(x, rope, mod, *rest):
        is_late = any(mod.shift.equal(shift) for shift in shifts)
        return forward(x, rope, mod, *rest) * (1.01 if is_late else 1)

    block.forward = wrong
    found = bisect(seven_steps, pipe, request_of(seven_steps))
    assert (found.step, found.row.name) == (late, f"step.{late:03}/single_blocks.1/out")
    assert found.runs["network"] <= 3 * (late - 1) + 1
    of_steps, at = 2 * math.log2(late) + 1, BLOCKS.index("single_blocks.1")
    assert found.runs["stretches"] <= of_steps + 2 * math.log2(at + 1) + 1


def test_bisect_runs_no_more_than_it_promises():
    """A fault at every place of rows of every length."""
    for number in range(1, 66):
        for fault in range(number):
            runs = []

            def differs(start: int, end: int, runs=runs, fault=fault) -> bool:
                runs.append(end - start)
                return start <= fault < end

            assert first_differing(number, differs) == fault
            assert len(runs) <= 2 * math.log2(fault + 1) + 1 and sum(runs) <= 3 * fault + 1
    assert first_differing(5, lambda start, end: False) is None
    assert first_differing(0, lambda start, end: True) is None


def test_function_replaces_the_networks(captures, pipeline):
    """A port answers for modules by name: bisect and replay need nothing else of the port."""
    names, theirs = [], Modules(changed(pipeline(KLEIN), "activation"))

    def port(name: str, inputs: list[Tensor]) -> list[Tensor]:
        names.append(name)
        return theirs(name, inputs)

    found = bisect(captures[KLEIN], pipeline(KLEIN), REQUESTS[KLEIN], port)
    assert found.row.name == "step.001/double_blocks.1.img_mlp.1/out"
    assert names[:2] == ["step.001", "step.001/negative"]
    rows = replay_modules(captures[KLEIN], port, ["single_blocks.1"])
    assert rows and differing(rows) == []


# ---------------------------------------------------------------- more than fits in memory


@either_family
def test_networks_larger_than_memory_give_the_same_bits(name, captures, pipeline, monkeypatch):
    """Matrices stay in bfloat16, as in the file, until they are used."""
    monkeypatch.setattr(modules, "free_memory", lambda device: 0)
    pipe = in_dtype(pipeline(name), torch.float32)
    only = ["step.002", "decoder.conv_out", "text/negative/*/out"]
    rows = replay_modules(captures[name], Modules(pipe), only)
    rows += replay_loop(captures[name], pipe, REQUESTS[name], ["latents", "pixels"])
    assert differing(rows) == [] and len(rows) > 200
    weights = dict(pipe.transformer().named_parameters())
    kept = {n for n, weight in weights.items() if weight.dtype == torch.bfloat16}
    matrices = {n for n in weights if re.match(r"\w+_blocks\.\d+\.", n) and not n.endswith("scale")}
    assert kept == matrices


# ---------------------------------------------------------------- tolerances


@pytest.fixture(scope="module")
def measured(captures, pipeline):
    """precision -> tensor -> rounding, of FLUX.1, whose layers have biases."""
    return {
        precision: tolerances.measure_rounding(
            captures[FLUX1], pipeline(FLUX1), REQUESTS[FLUX1], precision, SOME
        )
        for precision in tolerances.PRECISIONS
    }


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def float8(w: Tensor) -> Tensor:
    """E4M3 by its definition (Micikevicius et al. 2022, arXiv:2209.05433).

    3 bits after the point, exponents from -6, at most 448.
    """
    scale = w.double().abs().max() / 448
    x = w.double() / scale
    unit = 2 ** (x.abs().log2().floor().clamp(min=-6) - 3)
    return (x / unit).round() * unit * scale


def test_rounding_of_a_layer_is_that_computed_by_hand(measured, captures, pipeline):
    state, t = pipeline(FLUX1).transformer().state_dict(), captures[FLUX1].tensors
    for layer in ("double_blocks.0.img_attn.proj", "single_blocks.2.linear2"):
        x, true = t[f"step.002/{layer}/in"], t[f"step.002/{layer}/out"]
        weight, bias = state[f"{layer}.weight"], state.get(f"{layer}.bias")
        expected = {}
        for dtype in (torch.bfloat16, torch.float16):
            args = [None if y is None else y.to(dtype) for y in (x, weight, bias)]
            expected[str(dtype).removeprefix("torch.")] = F.linear(*args)
        wide = None if bias is None else bias.double()
        expected["float8"] = F.linear(x.double(), float8(weight), wide)
        for precision, value in expected.items():
            found = measured[precision][f"step.002/{layer}/out"].local
            assert found == pytest.approx(relative(value, true), rel=1e-4)


def test_coarser_precision_errs_more(measured):
    """bfloat16 has 3 bits less than float16: 8 times the error. In a run, errors accumulate."""
    coarse, fine, eighth = (measured[precision] for precision in tolerances.PRECISIONS)
    blocks = [n for n in coarse if re.search(r"_blocks\.\d/out", n)]
    assert len(blocks) == 4 * 7  # four passes; a double-stream block has two outputs
    for n in blocks:
        assert 5 < coarse[n].local / fine[n].local < 12
        assert coarse[n].accumulated > 3 * fine[n].accumulated
    last = f"step.002/{BLOCKS[-1]}/out"
    for rounding in (coarse, fine, eighth):
        assert rounding[last].accumulated > 1.2 * rounding[last].local
    assert all(eighth[n].local > coarse[n].local for n in coarse if n.endswith("img_attn.qkv/out"))
    assert coarse["step.001/latents"].local is None and coarse["step.001/latents"].accumulated > 0


def test_tolerances_are_stored_and_used(measured, captures, pipeline, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(captures[FLUX1].path.read_bytes())
    for precision in ("float16", "bfloat16"):
        rounding = {precision: measured[precision]}
        tolerances.store_rounding(path, rounding)
    recorded, stored = Capture(path), measured["bfloat16"]
    assert tolerances.stored_rounding(recorded) == {
        precision: measured[precision] for precision in ("float16", "bfloat16")
    }
    last = "step.002/latents"
    assert recorded.tensors[last].equal(captures[FLUX1].tensors[last])
    allowed = measured_tolerance(recorded, last, "BF16")
    assert allowed == 2 * stored[last].accumulated

    only, request = ["out", "out.?", "latents"], REQUESTS[FLUX1]
    half = pipeline(FLUX1, torch.bfloat16)
    port = capture(half, request, tmp_path / "half.safetensors", Selection(SOME))
    rows = compare(port, recorded, only=only)
    assert {round(row.ratio, 6) for row in rows} == {0.5}  # half of the tolerance, as measured
    assert tolerances.format_ratio(rows, recorded, "bfloat16").startswith(
        "within 1x of bfloat16 rounding; the largest ratio is at step."
    )
    worse = changed(pipeline(FLUX1, torch.bfloat16), "modulation")
    port = capture(worse, request, tmp_path / "b.safetensors", Selection(SOME))
    first = first_over(compare(port, recorded, only=only))
    assert first.name == "step.001/double_blocks.0.img_attn.qkv/out" and first.ratio > 5

    local = tolerances.measured_tolerances(recorded, "bfloat16", local=True)
    rows = replay_modules(recorded, Modules(half), [OUTS], local)
    assert first_over(rows) is None
    text = tolerances.format_ratio(rows, recorded, "bfloat16", local=True)
    assert "within 1x of bfloat16 rounding" in text
    table = tolerances.format_table({"bfloat16": stored})
    assert table.splitlines()[0].split() == ["bfloat16", "in", "a", "run", "name"]


def test_overflowing_tensor_gets_no_tolerance(captures, pipeline):
    """float16 ends at 65504."""
    pipe = pipeline(KLEIN)
    pipe.transformer.set_transform(lambda module: module.final_layer.linear.weight.mul_(1e6))
    only = ["final_layer.linear", "latents"]
    found = tolerances.measure_rounding(captures[KLEIN], pipe, REQUESTS[KLEIN], "float16", only)
    assert found["step.001/final_layer.linear/out"] == (None, None)
    assert "step.001/latents" not in found


# ---------------------------------------------------------------- errors


def test_incomplete_captures_are_refused(captures, pipeline, tmp_path):
    pipe, request = pipeline(KLEIN), TINY
    few = Selection(("step.001/*/out",), store="probe")
    few = capture(pipe, request, tmp_path / "few.safetensors", few)
    with pytest.raises(UserError, match="has no module with all inputs .* double_blocks.3"):
        replay_modules(few, Modules(pipe))
    with pytest.raises(UserError, match=r"few\.safetensors: lacks latents"):
        bisect(few, pipe, request)
    latents = capture(pipe, request, tmp_path / "b.safetensors", Selection(("latents",)))
    with pytest.raises(UserError, match=r"step\.001 differs, but|has no module"):
        bisect(latents, changed(pipeline(KLEIN), "activation"), request)


@pytest.mark.parametrize(
    "name, missing", [(KLEIN, "text/negative/features"), (FLUX1, "text/pooled")]
)
def test_loop_needs_all_features_or_none(name, missing, pipeline, tmp_path):
    pipe = pipeline(name)
    request = replace(REQUESTS[name], width=64, height=64)
    selection = Selection(("text/features", "latents"))
    part = capture(pipe, request, tmp_path / "part.safetensors", selection)
    with pytest.raises(UserError, match=rf"part\.safetensors: has no {missing} in full"):
        replay_loop(part, pipe, request)


def test_unknown_names_list_the_nearest(captures, pipeline):
    recorded, modules = captures[KLEIN], Modules(pipeline(KLEIN))
    with pytest.raises(UserError, match=r"only: double_block\.0 .* double_blocks\.0"):
        replay_modules(recorded, modules, ["double_block.0"])
    near = r"inside: step.001/double_block.1 has no .* Nearest names: step\.001/double_blocks\.1"
    with pytest.raises(UserError, match=near):
        replay_inside(recorded, modules, "step.001/double_block.1")


def test_modules_refuse_unknown_names_and_other_shapes(pipeline):
    modules = Modules(pipeline(KLEIN))
    with pytest.raises(UserError, match=r"no\.such"):
        modules("no.such", [])
    with pytest.raises(UserError, match=r"has no module 'double_blocks\.7'"):
        modules("step.001/double_blocks.7", [])
    with pytest.raises(UserError, match=r"step\.001/img_in.* 1x5x7"):
        modules("step.001/img_in", [torch.zeros(1, 5, 7)])


def test_other_models_and_plain_files_are_refused(captures, pipeline, tmp_path):
    pipe = pipeline(KLEIN)
    of_other = f"is of flux.1-dev .the pipeline is {KLEIN}"
    with pytest.raises(UserError, match=of_other):
        check_model(captures[FLUX1], pipe)
    with pytest.raises(UserError, match=of_other):
        tolerances.measure_rounding(captures[FLUX1], pipe, SMALL, "bfloat16")
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    plain = Capture(tmp_path / "plain.safetensors")
    for use in (
        request_of,
        load_pipeline,
        lambda x: check_model(x, pipe),
        lambda x: tolerances.store_rounding(x.path, {"float16": {}}),
    ):
        with pytest.raises(UserError, match=r"plain\.safetensors: is a plain file"):
            use(plain)


def test_rounding_is_measured_against_float32_only(pipeline, tmp_path):
    pipe, half = pipeline(KLEIN), pipeline(KLEIN, torch.bfloat16)
    recorded = capture(half, TINY, tmp_path / "b.safetensors", Selection(("latents",)))
    with pytest.raises(UserError, match="must be in float32 .got bfloat16"):
        tolerances.measure_rounding(recorded, pipe, TINY, "float16")
    with pytest.raises(UserError, match="has no measured rounding in float16"):
        tolerances.measured_tolerances(recorded, "float16")
    with pytest.raises(UserError, match=r"precision: unknown .got int3, expected one of bfloat16"):
        tolerances.in_precision(pipe, "int3")


def test_wrong_answers_of_a_function_are_reported(captures):
    recorded = captures[KLEIN]
    with pytest.raises(UserError, match="module_fn: returned str for .*double_blocks.0"):
        replay_modules(recorded, lambda name, inputs: "done", ["double_blocks.0"])
    assert replay_modules(recorded, lambda name, inputs: [], ["double_blocks.0"]) == []
    with pytest.raises(UserError, match=r"returned 1 tensors for .* .expected 2"):
        replay_modules(recorded, lambda name, inputs: torch.zeros(3), ["double_blocks.0"])
    rows = replay_modules(recorded, lambda name, inputs: torch.zeros(3), ["*.linear1"])
    assert rows[0].over and "(3,)" in rows[0].fault


# ---------------------------------------------------------------- the command


PORT = """
import flux
from flux.parity.modules import Modules
ours = Modules(flux.load(device="cpu", fast=False))
def port(name, inputs):
    wrong = name in ("step.001", "step.001/single_blocks.1")
    return [x * 1.01 if wrong else x for x in ours(name, inputs)]


def broken(name, inputs):
    raise KeyError(name)
"""
IMAGE = ("a small red circle", "--width", 64, "--height", 64, "--steps", 2)


@pytest.fixture
def recorded(parity) -> str:
    """A capture of the embedded model in the current folder."""
    assert parity("capture", *IMAGE, "--output", "a.safetensors")[0] == 0
    return "a.safetensors"


def test_command_replay(parity, recorded):
    code, out, _ = parity("replay", recorded, "--filter", "step.002")
    assert code == 0 and out.startswith("all ")
    assert "step.002/double_blocks.1/out.0" in out and "step.001" not in out
    inside = ("--inside", "step.001/single_blocks.0")
    code, out, _ = parity("replay", recorded, *inside, "--tolerance", 0)
    assert code == 0 and "step.001/single_blocks.0/attention/q" in out
    for names in (("--end-to-end", "--filter", "--tolerance"), ("--free", "--only", "--budget")):
        loop, filter_flag, tolerance = names  # the new and the old names of the flags
        code, out, _ = parity("replay", recorded, loop, filter_flag, "latents", tolerance, 0)
        assert code == 0 and "step.002/latents" in out


def test_command_calibrate(parity, recorded):
    only = ("--filter", "single_blocks.?")
    code, out, err = parity("calibrate", recorded, "--precision", "bfloat16", *only)
    assert code == 0 and "step.001/single_blocks.0/out" in out
    assert "compare allows a run in one of these precisions 2 times the error of that" in err
    options = ("--dtype", "bfloat16", *only)
    code, out, err = parity("replay", recorded, *options, "--json", "rows.json")
    assert code == 0
    assert re.search(r"within \S+x of bfloat16 rounding; the largest ratio is at step", err)
    assert {row["dtype"] for row in json.loads(Path("rows.json").read_text())} == {"BF16"}
    before = Path("rows.json").read_bytes()
    parity("replay", recorded, "--filter", "step.002", "--json", "rows.json")
    assert Path("rows.json").read_bytes() == before and Path("rows-2.json").exists()


def test_command_bisect(parity, recorded):
    assert parity("bisect", recorded)[:2] == (
        0,
        "no step differs: each run of steps ends within tolerance\n",
    )
    Path("a_port.py").write_text(PORT)
    code, out, _ = parity("bisect", recorded, "--module-fn", "a_port:port")
    place = "step.001/single_blocks.1"
    assert code == 1
    assert out.startswith(f"the first difference is at {place}/out, in {place}: ")
    code, out, _ = parity("replay", recorded, "--call", "a_port:port", "--filter", "step.001")
    assert code == 1 and f"the first is {place}/out:" in out.splitlines()[0]
    for arguments, words in (
        (("replay", "b.safetensors"), "does not exist"),
        (("replay", recorded, "--end-to-end", "--inside", "x"), "exclude each other"),
        (("bisect", recorded, "--module-fn", "a_port:no"), "--module-fn"),
        (("replay", recorded, "--module-fn", "a_port:broken"), "KeyError"),
        (("calibrate", recorded, "--filter", "nosuch"), "--filter: nosuch"),
        (("replay", recorded, "--image", "none.png"), "none.png"),
    ):
        code, _, err = parity(*arguments)
        assert code == 2 and words in err.splitlines()[-1], arguments
