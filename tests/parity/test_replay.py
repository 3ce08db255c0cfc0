"""flux.parity's replay, bisect and budgets: a module alone does what it did in the run, and a fault shows where it is made.

What was recorded is the truth here, which test_parity.py proves it to be; the faults are one-line changes to copies of our
networks; what rounding does is worked out by hand for single layers. Networks are tiny and random, or the embedded model's.
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
from flux.parity import modules
from flux.parity import tolerances as budgets
from flux.parity.bisect import bisect, first_departure
from flux.parity.capture import Request, Selection, capture
from flux.parity.capture_file import Capture
from flux.parity.compare import compare, first_over
from flux.parity.modules import Modules, in_dtype, named
from flux.parity.replay import check_model, forced, free, inside, load, recorded, request_of

SCRIPT = Path(__file__).resolve().parents[2] / "scripts/parity.py"
OUTS = "step.*_blocks.?/out*"  # of the blocks themselves, not of what is in them
SOME = (OUTS, "*.qkv", "*.proj", "*.linear2", "features", "latents")
either_family = pytest.mark.parametrize("name", REQUESTS)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* was distilled for", "ignore:.* was not trained with"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Repositories with tiny random weights, in bfloat16 as released, of which the table's rows speak meanwhile."""
    with tiny_repositories(tmp_path_factory.mktemp("weights"), REQUESTS, torch.bfloat16) as folder:
        yield folder


@pytest.fixture(scope="module")
def pipeline(folder):
    return lambda name, dtype=torch.float32: flux.load(
        name, weights=folder, device="cpu", dtype=dtype
    )


@pytest.fixture(scope="module")
def captures(pipeline, tmp_path_factory):
    """Everything, of one run of each family, in float32."""
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(pipeline(name), request, out / f"{name}.safetensors")
        for name, request in REQUESTS.items()
    }


@pytest.fixture(scope="module")
def seven_steps(pipeline, tmp_path_factory):
    path = tmp_path_factory.mktemp("seven") / "a.safetensors"
    return capture(pipeline(KLEIN), replace(SMALL, steps=7, guidance=1.0), path)


# ---------------------------------------------------------------- our own capture, replayed


@either_family
def test_every_module_alone_does_what_it_did(name, captures, pipeline):
    taken, pipe = captures[name], pipeline(name)
    rows = forced(taken, Modules(pipe))
    assert differing(rows) == []
    outputs = {n for n in taken.names if re.search(r"/out(\.\d+)?$", n)} | {"pixels"}
    # left out is the attention of the text encoders, which is given a mask as well; their modules around it are not
    assert {row.name for row in rows} == {
        n for n in outputs if not re.match("text/.*/attention/out", n)
    }


@either_family
def test_inside_a_network_and_a_block(name, captures, pipeline):
    taken, modules = captures[name], Modules(pipeline(name))
    for place in (
        "step.002",
        "step.001/negative",
        "step.002/single_blocks.1",
        "decoder",
        "text/negative/t5",
    ):
        if place not in {each.name for each in recorded(taken)}:
            continue
        rows = inside(taken, modules, place)
        # what a module is given, its caller computes: vec, and in FLUX.1 the modulations
        caller = (
            r"\.modulation"
            if "blocks" in place
            else "/(in|vec|time_in|guidance_in|vector_in|latents|velocity|negative)\\b"
        )
        given = caller if place.startswith("step") else "$"
        of = [
            n
            for n in taken.names
            if n.startswith(place) and not re.match(given, n.removeprefix(place))
        ]
        assert differing(rows) == [] and [row.name for row in rows] == of + ["pixels"] * (
            place == "decoder"
        )


@either_family
def test_the_whole_loop(name, captures, pipeline):
    """From recorded noise and features: the text encoders are not run."""
    pipe = pipeline(name)
    rows = free(captures[name], pipe, request_of(captures[name]))
    names = [
        n for n in captures[name].names if not re.match(r"text/(negative/)?(t5|clip|model)", n)
    ]
    assert [row.name for row in rows] == names and differing(rows) == []
    assert not pipe.text.cache and all(network.module is None for network in pipe.text.networks)


def test_the_loop_begins_with_what_was_recorded(captures, pipeline, tmp_path):
    """With noise and features that no seed and no prompt here would give, as from another implementation."""
    before, g = captures[KLEIN], torch.Generator().manual_seed(0)

    def draw(name):
        return torch.randn(before.tensors[name].shape, generator=g)

    given = {name: draw(name) for name in ("noise", "text/features", "text/negative/features")}
    save_file(given, tmp_path / "theirs.safetensors")
    rows = free(Capture(tmp_path / "theirs.safetensors"), pipeline(KLEIN), REQUESTS[KLEIN])
    assert [row.name for row in rows] == [
        "text/features",
        "text/negative/features",
        "noise",
    ] and differing(rows) == []


@pytest.mark.parametrize("cached", [False, True], ids=["references", "memories"])
def test_pictures(cached, pipeline, tmp_path):
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    pictures = ImageInputs((Image.fromarray(pixels),), kv_cache=cached)
    pipe, request = pipeline(KLEIN), replace(SMALL, guidance=1.0, pictures=pictures)
    taken = capture(pipe, request, tmp_path / "a.safetensors")
    rows = forced(taken, Modules(pipe))
    names = {row.name for row in rows}
    assert (
        differing(rows) == []
        and {"step.002/out", "encoder.1/latents", "encoder.1/encoder.conv_in/out"} <= names
    )
    assert ({"references/out.0", "references/double_blocks.1/out.2"} <= names) == cached
    assert differing(free(taken, pipe, request_of(taken, pictures))) == []
    assert bisect(taken, pipe, request) is None
    with pytest.raises(UserError, match="was made of pictures: give the same --image"):
        request_of(taken)


def test_the_embedded_model(tmp_path):
    pipe = flux.load(device="cpu")
    taken = capture(
        pipe, Request("a small red circle", 64, 64, steps=2), tmp_path / "a.safetensors"
    )
    assert differing(forced(taken, Modules(pipe))) == []
    assert bisect(taken, pipe, request_of(taken)) is None
    assert (
        load(taken).spec.name == pipe.spec.name and request_of(taken).prompt == "a small red circle"
    )


# ---------------------------------------------------------------- one change in one block


every_change = pytest.mark.parametrize("change", CHANGES)


@either_family
@every_change
def test_a_change_shows_in_its_block_alone(name, change, captures, pipeline):
    """Each module alone: in the block, and in whole networks, which contain it; nowhere else is a single bit moved."""
    block, pipe = CHANGES[change][0], changed(pipeline(name), change)
    moved = differing(forced(captures[name], Modules(pipe), ["step.*"]))
    elsewhere = [
        n for n in moved if not re.match(rf"step\.\d+/(negative/)?({re.escape(block)}[./]|out$)", n)
    ]
    where = ("step.001", "step.001/negative", "step.002", "step.002/negative")
    assert elsewhere == [] and {
        n.removesuffix("/out") for n in moved if re.match(r".*\d/out$|.*negative/out$", n)
    } >= set(where)
    assert all(any(n.startswith(f"{place}/{block}/out") for n in moved) for place in where)


@pytest.mark.parametrize(
    "name, change", [*((KLEIN, change) for change in CHANGES), ("flux.1-dev", "rope")]
)
def test_in_a_run_it_shows_in_all_that_follows(name, change, captures, pipeline):
    block, pipe = CHANGES[change][0], changed(pipeline(name), change)
    rows = free(captures[name], pipe, REQUESTS[name], [OUTS])
    moved, outs = differing(rows), [f"{b}/out" + ".0" * b.startswith("double") for b in BLOCKS]
    at = BLOCKS.index(block)
    assert [f"step.001/{out}" in moved for out in outs] == [i >= at for i in range(len(outs))]
    assert all(f"step.002/{out}" in moved for out in outs)


@either_family
@every_change
def test_bisect_names_the_first_tensor(name, change, captures, pipeline):
    block, _, first = CHANGES[change]
    found = bisect(captures[name], changed(pipeline(name), change), REQUESTS[name])
    assert (found.step, found.block, found.row.name) == (
        1,
        f"step.001/{block}",
        f"step.001/{first}",
    )
    good = BLOCKS.index(block)
    assert found.runs["network"] == 2  # one step, of two passes
    assert (
        found.runs["stretches"] <= 1 + 2 * math.log2(good + 1) + 1
        and found.runs["block"] <= 3 * good + 1
    )
    assert str(found).startswith(
        f"the first to depart is step.001/{first}, in step.001/{block}: relative L2 "
    )


@either_family
def test_bisect_outside_blocks(name, captures, pipeline):
    """In an embedder, in a modulation, which FLUX.1 has in its blocks but computes before them, and in what is asked for."""
    pipe = pipeline(name)
    pipe.transformer().img_in.weight.mul_(1.01)
    found = bisect(captures[name], pipe, REQUESTS[name])
    assert (found.step, found.block, found.row.name) == (1, None, "step.001/img_in/out")
    pipe = pipeline(name)
    modulation = (
        "single_blocks.1.modulation.lin" if name == "flux.1-dev" else "single_stream_modulation.lin"
    )
    pipe.transformer().get_submodule(modulation).weight.mul_(1.01)
    found = bisect(captures[name], pipe, REQUESTS[name])
    assert (found.step, found.block, found.row.name) == (1, None, f"step.001/{modulation}/out")
    late = replace(REQUESTS[name], guidance=1.5 + REQUESTS[name].guidance)
    found = bisect(captures[name], pipeline(name), late)
    assert (found.step, found.block, found.row.name) == (1, None, "step.001/velocity")


@pytest.mark.parametrize("late", [1, 2, 4, 7])
def test_bisect_finds_a_step(late, seven_steps, pipeline):
    """A block that goes wrong from a step on, by what it is given of the time."""
    pipe = pipeline(KLEIN)
    block = pipe.transformer().single_blocks[1]
    forward, tensors = block.forward, seven_steps.tensors
    shifts = [tensors[f"step.{step:03}/single_blocks.1/in.2"] for step in range(late, 8)]

    def wrong(mod):
        return any(mod.shift.equal(shift) for shift in shifts)

    block.forward = lambda x, rope, mod, *rest: (
        forward(x, rope, mod, *rest) * (1.01 if wrong(mod) else 1)
    )
    found = bisect(seven_steps, pipe, request_of(seven_steps))
    assert (found.step, found.row.name) == (late, f"step.{late:03}/single_blocks.1/out")
    assert found.runs["network"] <= 3 * (late - 1) + 1
    assert (
        found.runs["stretches"]
        <= 2 * math.log2(late) + 1 + 2 * math.log2(BLOCKS.index("single_blocks.1") + 1) + 1
    )


def test_few_runs():
    """At every place in rows of every length, against the bounds that the module states; each run is of what it says."""
    for number in range(1, 66):
        for fault in range(number):
            runs = []
            departs = lambda start, end: runs.append(end - start) or start <= fault < end
            assert first_departure(number, departs) == fault
            assert len(runs) <= 2 * math.log2(fault + 1) + 1 and sum(runs) <= 3 * fault + 1
    assert (
        first_departure(5, lambda start, end: False) is None
        and first_departure(0, lambda start, end: True) is None
    )


def test_a_function_in_place_of_the_networks(captures, pipeline):
    """A port answers for modules by name: bisect and replay need no more of it."""
    asked, theirs = [], Modules(changed(pipeline(KLEIN), "activation"))

    def port(name: str, inputs: list[Tensor]) -> list[Tensor]:
        asked.append(name)
        return theirs(name, inputs)

    found = bisect(captures[KLEIN], pipeline(KLEIN), REQUESTS[KLEIN], port)
    assert found.row.name == "step.001/double_blocks.1.img_mlp.1/out" and asked[:2] == [
        "step.001",
        "step.001/negative",
    ]
    rows = forced(captures[KLEIN], port, ["single_blocks.1"])
    assert rows and differing(rows) == []


# ---------------------------------------------------------------- more than fits in memory


@either_family
def test_networks_that_do_not_fit(name, captures, pipeline, monkeypatch):
    """Matrices stay in bfloat16, as in the file, and what comes out is the same to the bit."""
    monkeypatch.setattr(modules, "free_memory", lambda device: 0)
    pipe = in_dtype(pipeline(name), torch.float32)
    only = ["step.002", "decoder.conv_out", "text/negative/*/out"]
    rows = forced(captures[name], Modules(pipe), only) + free(
        captures[name], pipe, REQUESTS[name], ["latents", "pixels"]
    )
    assert differing(rows) == [] and len(rows) > 200
    weights = dict(pipe.transformer().named_parameters())
    kept = {n for n, weight in weights.items() if weight.dtype == torch.bfloat16}
    assert kept == {
        n for n in weights if re.match(r"\w+_blocks\.\d+\.", n) and not n.endswith("scale")
    }


# ---------------------------------------------------------------- budgets


@pytest.fixture(scope="module")
def measured(captures, pipeline):
    def measure(name, precision):
        return budgets.measure(captures[name], pipeline(name), REQUESTS[name], precision, SOME)

    return {
        name: {precision: measure(name, precision) for precision in budgets.PRECISIONS}
        for name in REQUESTS
    }


def relative(a: Tensor, b: Tensor) -> float:
    return ((a.double() - b.double()).norm() / b.double().norm()).item()


def float8(w: Tensor) -> Tensor:
    """E4M3 by its definition (Micikevicius et al. 2022): 3 bits after the point, exponents from -6, at most 448."""
    scale = w.double().abs().max() / 448
    x = w.double() / scale
    unit = 2 ** (x.abs().log2().floor().clamp(min=-6) - 3)
    return (x / unit).round() * unit * scale


@either_family
def test_a_layer_by_hand(name, measured, captures, pipeline):
    state, t = pipeline(name).transformer().state_dict(), captures[name].tensors
    for layer in ("double_blocks.0.img_attn.proj", "single_blocks.2.linear2"):
        x, true = t[f"step.002/{layer}/in"], t[f"step.002/{layer}/out"]
        weight, bias = state[f"{layer}.weight"], state.get(f"{layer}.bias")
        half = lambda dtype: F.linear(
            x.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
        )
        eighth = F.linear(x.double(), float8(weight), None if bias is None else bias.double())
        expected = dict(bfloat16=half(torch.bfloat16), float16=half(torch.float16), float8=eighth)
        for precision, value in expected.items():
            assert measured[name][precision][f"step.002/{layer}/out"].local == pytest.approx(
                relative(value, true), rel=1e-4
            )


@either_family
def test_coarser_is_further(name, measured):
    """bfloat16 has three bits less than float16: 8 times the error. In a run, errors of what came before are added."""
    coarse, fine, eighth = (measured[name][precision] for precision in budgets.PRECISIONS)
    blocks = [n for n in coarse if re.search(r"_blocks\.\d/out", n)]
    assert len(blocks) == 4 * 7  # four passes; a double block gives two tensors
    for n in blocks:
        assert (
            5 < coarse[n].local / fine[n].local < 12
            and coarse[n].accumulated > 3 * fine[n].accumulated
        )
    last = f"step.002/{BLOCKS[-1]}/out"
    assert all(
        rounding[last].accumulated > 1.2 * rounding[last].local
        for rounding in (coarse, fine, eighth)
    )
    assert all(eighth[n].local > coarse[n].local for n in coarse if n.endswith("img_attn.qkv/out"))
    assert coarse["step.001/latents"].local is None and coarse["step.001/latents"].accumulated > 0


@either_family
def test_budgets_are_kept_and_used(name, measured, captures, pipeline, tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(captures[name].path.read_bytes())
    budgets.store(path, {"float16": measured[name]["float16"]}, "float16")
    budgets.store(path, {"bfloat16": measured[name]["bfloat16"]}, "bfloat16")
    truth, kept = Capture(path), measured[name]["bfloat16"]
    assert budgets.stored(truth) == {
        precision: measured[name][precision] for precision in ("float16", "bfloat16")
    }
    assert truth.tensors["step.002/latents"].equal(captures[name].tensors["step.002/latents"])
    assert truth.records["step.002/latents"].budget == 2 * kept["step.002/latents"].accumulated

    selected = Selection(SOME)
    half = capture(
        pipeline(name, torch.bfloat16), REQUESTS[name], tmp_path / "half.safetensors", selected
    )
    rows = compare(half, truth, only=["out", "out.?", "latents"])
    assert {round(row.ratio, 6) for row in rows} == {0.5}  # what was measured, again
    assert re.match(
        r"within 1x of bfloat16 rounding; the most is at step\.",
        budgets.within(rows, truth, "bfloat16"),
    )
    worse = capture(
        changed(pipeline(name, torch.bfloat16), "modulation"),
        REQUESTS[name],
        tmp_path / "b.safetensors",
        selected,
    )
    rows = compare(worse, truth, only=["out", "out.?", "latents"])
    assert (
        first_over(rows).name == "step.001/double_blocks.0.img_attn.qkv/out"
        and first_over(rows).ratio > 5
    )

    local = budgets.budgets(truth, "bfloat16", alone=True)
    rows = forced(truth, Modules(pipeline(name, torch.bfloat16)), [OUTS], local)
    assert first_over(rows) is None and "within 1x of bfloat16 rounding" in budgets.within(
        rows, truth, "bfloat16", alone=True
    )
    assert budgets.table({"bfloat16": kept}).splitlines()[0].split() == [
        "bfloat16",
        "in",
        "a",
        "run",
        "name",
    ]


def test_what_overflows_has_no_budget(captures, pipeline):
    """float16 ends at 65504."""
    pipe = pipeline(KLEIN)
    pipe.transformer.set_transform(lambda module: module.final_layer.linear.weight.mul_(1e6))
    found = budgets.measure(
        captures[KLEIN], pipe, REQUESTS[KLEIN], "float16", ["final_layer.linear", "latents"]
    )
    assert (
        found["step.001/final_layer.linear/out"] == (None, None) and "step.001/latents" not in found
    )


# ---------------------------------------------------------------- mistakes, each told in one sentence


def test_mistakes(captures, pipeline, tmp_path):
    taken, pipe = captures[KLEIN], pipeline(KLEIN)
    few = capture(
        pipe,
        REQUESTS[KLEIN],
        tmp_path / "few.safetensors",
        Selection(("step.001/*/out",), keep="probe"),
    )
    with pytest.raises(
        UserError,
        match="holds no module with all of its inputs .* --keep full, .*--only 'double_blocks.3'",
    ):
        forced(few, Modules(pipe))
    with pytest.raises(UserError, match=r"few\.safetensors lacks latents"):
        bisect(few, pipe, REQUESTS[KLEIN])
    only_latents = capture(
        pipe, REQUESTS[KLEIN], tmp_path / "latents.safetensors", Selection(("latents",))
    )
    with pytest.raises(
        UserError, match=r"step\.001 departs, but .*latents\.safetensors lacks|holds no module"
    ):
        bisect(only_latents, changed(pipeline(KLEIN), "activation"), REQUESTS[KLEIN])
    with pytest.raises(
        UserError,
        match=r"only: double_block\.0 matches no name. The nearest names are .*double_blocks\.0",
    ):
        forced(taken, Modules(pipe), ["double_block.0"])
    with pytest.raises(
        UserError,
        match=r"--inside step.001/double_block.1: .* nearest that have are step\.001/double_blocks\.1",
    ):
        inside(taken, Modules(pipe), "step.001/double_block.1")
    with pytest.raises(UserError, match=r"no\.such is of no network here"):
        Modules(pipe)("no.such", [])
    with pytest.raises(
        UserError,
        match=r"step\.001/double_blocks\.7: Flux has no module 'double_blocks\.7'; is the capture of",
    ):
        Modules(pipe)("step.001/double_blocks.7", [])
    with pytest.raises(UserError, match=r"step\.001/img_in does not take what was recorded, 1x5x7"):
        Modules(pipe)("step.001/img_in", [torch.zeros(1, 5, 7)])


def test_mistakes_with_other_captures(captures, pipeline, tmp_path):
    pipe = pipeline(KLEIN)
    with pytest.raises(
        UserError, match="is of flux.1-dev, and the pipeline here is flux.2-klein-base-4b"
    ):
        check_model(captures["flux.1-dev"], pipe)
    with pytest.raises(UserError, match="is of flux.1-dev, and"):
        budgets.measure(captures["flux.1-dev"], pipe, SMALL, "bfloat16")
    save_file({"x": torch.zeros(2)}, tmp_path / "plain.safetensors")
    plain = Capture(tmp_path / "plain.safetensors")
    for use in (
        request_of,
        load,
        lambda x: check_model(x, pipe),
        lambda x: budgets.store(x.path, {"float16": {}}, "float16"),
    ):
        with pytest.raises(
            UserError, match=r"plain\.safetensors is a plain file, .*: capture it with parity\.py"
        ):
            use(plain)
    half = capture(
        pipeline(KLEIN, torch.bfloat16), SMALL, tmp_path / "b.safetensors", Selection(("latents",))
    )
    with pytest.raises(UserError, match="is in bfloat16, and rounding is measured against float32"):
        budgets.measure(half, pipe, SMALL, "float16")
    with pytest.raises(UserError, match="knows no rounding in float16: measure it"):
        budgets.budgets(half, "float16")
    with pytest.raises(UserError, match="--precision int3: choose from bfloat16, float16, float8"):
        budgets.rounded(pipe, "int3")
    with pytest.raises(UserError, match="--call nosuch:f: there is no such function"):
        named("nosuch:f")


def test_functions_that_answer_wrongly(captures):
    def answer(value):
        return lambda name, inputs: value

    with pytest.raises(
        UserError, match="called for .*double_blocks.0.* gave str, and not a list of tensors"
    ):
        forced(captures[KLEIN], answer("done"), ["double_blocks.0"])
    with pytest.raises(UserError, match=r"double_blocks\.0\S* gave 0 tensors, and 1 were recorded"):
        forced(captures[KLEIN], answer([]), ["double_blocks.0"])
    (row, *_) = forced(captures[KLEIN], answer(torch.zeros(3)), ["*.linear1"])
    assert row.over and row.fault.startswith("is (3,) and should be (1, ")


# ---------------------------------------------------------------- the command


PORT = """
import flux
from flux.parity.modules import Modules
ours = Modules(flux.load(device="cpu"))
def port(name, inputs):
    return [x * 1.01 if name in ("step.001", "step.001/single_blocks.1") else x for x in ours(name, inputs)]


def broken(name, inputs):
    raise KeyError(name)
"""


def test_the_command(parity, tmp_path):
    assert (
        parity(
            "capture",
            "a small red circle",
            "--width",
            64,
            "--height",
            64,
            "--steps",
            2,
            "--output",
            "a.safetensors",
        )[0]
        == 0
    )
    code, out, _ = parity("replay", "a.safetensors", "--only", "step.002")
    assert (
        code == 0
        and out.startswith("all ")
        and "step.002/double_blocks.1/out.0" in out
        and "step.001" not in out
    )
    code, out, _ = parity(
        "replay", "a.safetensors", "--inside", "step.001/single_blocks.0", "--budget", 0
    )
    assert code == 0 and "step.001/single_blocks.0/attention/q" in out
    code, out, _ = parity("replay", "a.safetensors", "--free", "--only", "latents", "--budget", 0)
    assert code == 0 and "step.002/latents" in out
    assert parity("bisect", "a.safetensors")[:2] == (0, "no step departs\n")

    code, out, err = parity(
        "budgets", "a.safetensors", "--precision", "bfloat16", "--only", "single_blocks.?"
    )
    assert (
        code == 0
        and "step.001/single_blocks.0/out" in out
        and "`compare` allows 2 times what bfloat16 does" in err
    )
    options = ("--dtype", "bfloat16", "--only", "single_blocks.?")
    code, out, err = parity("replay", "a.safetensors", *options, "--json", "rows.json")
    assert code == 0 and re.search(r"within \S+x of bfloat16 rounding; the most is at step", err)
    assert {row["dtype"] for row in json.loads(Path("rows.json").read_text())} == {"BF16"}
    before = Path("rows.json").read_bytes()
    parity("replay", "a.safetensors", "--only", "step.002", "--json", "rows.json")
    assert Path("rows.json").read_bytes() == before and Path("rows-2.json").exists()

    Path("a_port.py").write_text(PORT)
    code, out, _ = parity("bisect", "a.safetensors", "--call", "a_port:port")
    assert code == 1 and out.startswith(
        "the first to depart is step.001/single_blocks.1/out, in step.001/single_blocks.1: "
    )
    code, out, _ = parity("replay", "a.safetensors", "--call", "a_port:port", "--only", "step.001")
    assert code == 1 and "the first is step.001/single_blocks.1/out:" in out.splitlines()[0]
    for arguments, words in (
        (("replay", "b.safetensors"), "does not exist"),
        (("replay", "a.safetensors", "--free", "--call", "a_port:port"), "exclude each other"),
        (
            ("bisect", "a.safetensors", "--call", "a_port:no"),
            "--call a_port:no: there is no such function",
        ),
        (
            ("replay", "a.safetensors", "--call", "a_port:broken"),
            "the adaptor failed at text/model/embed_tokens with KeyError",
        ),
        (("budgets", "a.safetensors", "--only", "nosuch"), "--only nosuch matches no name"),
        (("replay", "a.safetensors", "--image", "none.png"), "none.png"),
    ):
        code, _, err = parity(*arguments)
        assert code == 2 and words in err.splitlines()[-1]
