"""A wrong port passes no verdict of scripts/parity.py, and a right one passes each.

The truth is a run of a tiny random model. A wrong port is made of the truth by one change.
"""

import json
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.parity_requests import KLEIN, SMALL
from support.tiny_repositories import tiny_repositories
from torch import Tensor

import flux
from flux.errors import UserError
from flux.parity.capture import Selection, capture
from flux.parity.capture_file import Capture, Writer, token_norms
from flux.parity.compare import Row, compare, errors, exit_code, first_over, verdict

Tensors = dict[str, Tensor]
REQUEST = replace(SMALL, width=64, height=64, steps=2, guidance=1.0)
SELECTION = Selection(("noise", "ids", "latents", "image", "*/vec", "txt_in", "double_blocks.0"))
IN, OUT = "step.001/double_blocks.0/in.0", "step.001/double_blocks.0/out.0"  # of one shape


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with tiny_repositories(tmp_path_factory.mktemp("weights"), [KLEIN]) as folder:
        yield folder


@pytest.fixture(scope="module")
def truth(weights, tmp_path_factory) -> Path:
    pipe = flux.load(KLEIN, weights=weights, device="cpu", fast=False, dtype=torch.float32)
    path = tmp_path_factory.mktemp("truth") / "truth.safetensors"
    return capture(pipe, REQUEST, path, SELECTION).path


@pytest.fixture(scope="module")
def tensors(truth) -> Tensors:
    recorded = Capture(truth).tensors
    return {name: recorded[name].clone() for name in recorded}


def passed(rows: list[Row]) -> bool:
    return exit_code(rows) == 0


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


# ---------------------------------------------------------------- ports


def each(change: Callable[[Tensor], Tensor]) -> Callable[[Tensors], Tensors]:
    """Change every tensor."""
    return lambda tensors: {name: change(x).contiguous() for name, x in tensors.items()}


def one(change: Callable[[Tensor], Tensor], name: str = OUT) -> Callable[[Tensors], Tensors]:
    """Change one tensor."""
    return lambda tensors: tensors | {name: change(tensors[name]).contiguous()}


def with_value(value: float, *place: int) -> Callable[[Tensor], Tensor]:
    def change(x: Tensor) -> Tensor:
        x = x.clone()
        x[place] = value
        return x

    return change


def rotten(x: Tensor) -> Tensor:
    """Flip the bits of 1,000 bytes."""
    raw = x.clone().contiguous().flatten().view(torch.uint8)
    at = torch.randperm(len(raw), generator=torch.Generator().manual_seed(1))[:1000]
    raw[at] ^= 255
    return raw.view(x.dtype).reshape(x.shape)


def swapped(tensors: Tensors) -> Tensors:
    return tensors | {IN: tensors[OUT], OUT: tensors[IN]}


WRONG = {
    "zeros": each(torch.zeros_like),
    "sevens": each(lambda x: torch.full_like(x, 7)),
    "one tensor of zeros": one(torch.zeros_like),
    "one tensor of sevens": one(lambda x: torch.full_like(x, 7)),
    "negative": one(torch.neg),
    "scaled": one(lambda x: 1.001 * x),
    "swapped names": swapped,
    "tokens in another order": one(lambda x: x.flip(1)),
    "channels in another order": one(lambda x: x.flip(2)),
    "one bad token": one(with_value(0.0, 0, 3)),
    "the last token": one(with_value(0.0, 0, -1), "step.001/txt_in/out"),
    "rotten": one(rotten),
    "the last tensor": one(lambda x: 255 - x, "image"),
    "NaN": one(lambda x: x * torch.nan),
    "one NaN": one(with_value(torch.nan, 0, 1, 2)),
    "infinity": one(with_value(torch.inf, 0, 1, 2)),
    "transposed": one(lambda x: x.mT),
    "without the batch": one(lambda x: x[0]),
    "one token less": one(lambda x: x[:, 1:]),
    "without values": one(lambda x: x[:, :0]),
    "broadcast": one(lambda x: x[:, :1, :1]),
    "truncated to integers": one(lambda x: x.long()),
    "only signs": one(lambda x: x > 0),
    "bfloat16 zeros": each(lambda x: torch.zeros_like(x, dtype=torch.bfloat16)),
    "an id off by one": one(with_value(2, 15, 2), "ids/img"),
    "ids in bfloat16, off": one(lambda x: (1.01 * x).bfloat16(), "ids/img"),
    "alone": lambda tensors: {OUT: tensors[IN]},
    "amid extra tensors": lambda tensors: swapped(tensors) | {"mine": tensors[OUT].clone()},
}
SOME = ("zeros", "swapped names", "one NaN", "one token less", "rotten", "the last tensor")
RIGHT = {  # a port that is right, and what is said
    "equal": (dict, r"all \d+ tensors are equal to the bit\n"),
    "float64": (
        each(lambda x: x.double() if x.is_floating_point() else x),
        r"all \d+ tensors are equal, \d+ of them in value alone",
    ),
    "bfloat16": (
        each(lambda x: x.bfloat16() if x.is_floating_point() else x),
        r"all \d+ tensors are within tolerance; \S+ comes nearest",
    ),
    "ids in float32": (one(Tensor.float, "ids/img"), r"all \d+ tensors are equal, 1 of them"),
    "rounded": (one(lambda x: x * (1 + 1e-6)), r"all \d+ tensors are within tolerance"),
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_compare_finds_each_wrong_port(change, tensors, truth, parity):
    save_file(change(tensors), "port.safetensors")
    code, out, _ = parity("compare", "port.safetensors", truth, "--json", "rows/rows.json")
    assert code == 1 and "tensors are over tolerance; the first is" in out.splitlines()[0]
    assert out.splitlines()[1].startswith("compared: ")
    rows = json.loads(Path("rows/rows.json").read_text())
    assert any(row["over"] for row in rows)


@pytest.mark.parametrize("change, words", RIGHT.values(), ids=RIGHT)
def test_compare_passes_each_right_port(change, words, tensors, truth, parity):
    save_file(change(tensors), "port.safetensors")
    code, out, _ = parity("compare", "port.safetensors", truth)
    assert code == 0 and re.match(words, out)


@pytest.mark.slow
@pytest.mark.parametrize("command", ["report", "diagnose"])
@pytest.mark.parametrize("change", map(WRONG.get, SOME), ids=SOME)
def test_report_and_diagnose_find_each_wrong_port(change, command, tensors, truth, weights, parity):
    save_file(change(tensors), "port.safetensors")
    how = ("--output", "page.html") if command == "report" else ("--weights", weights)
    code, out, err = parity(command, "port.safetensors", truth, *how)
    assert code == 1 and "tensors are over tolerance; the first is" in out + err
    if command == "report":
        assert '<h1 class="over">Over tolerance</h1>' in Path("page.html").read_text()


@pytest.mark.parametrize("command", ["compare", "diagnose", "report"])
@pytest.mark.parametrize("number", [0, 7])
def test_stated_hashes_are_not_believed(command, number, truth, parity):
    """The port's tensors are constant; its metadata, with all hashes, is a copy of the truth's."""
    constant = {name: torch.full_like(x, number) for name, x in load_file(truth).items()}
    save_file(constant, "port.safetensors", metadata_of(truth))
    output = ("--output", "report.html") if command == "report" else ()
    code, out, err = parity(command, "port.safetensors", truth, *output)
    assert (code, out) == (2, "") and not Path("report.html").exists()
    assert re.fullmatch(r"error: port\.safetensors: tensor '\S+' has not the sha256 .*\n", err)


@pytest.mark.parametrize("command", ["compare", "diagnose", "report"])
def test_nothing_in_common_is_no_pass(command, tensors, truth, parity):
    output = ("--output", "page.html") if command == "report" else ()
    for port in ({}, {"mine": tensors[OUT]}):
        save_file(port, "port.safetensors")
        code, out, err = parity(command, "port.safetensors", truth, *output)
        assert (code, out) == (2, "") and "has no tensor in common" in err
    Path("port.safetensors").write_bytes(b"")
    code, out, err = parity(command, "port.safetensors", truth, *output)
    assert (code, out) == (2, "") and "is empty" in err


@pytest.mark.parametrize(
    "command", ["compare", "diagnose", pytest.param("report", marks=pytest.mark.slow)]
)
def test_truth_is_not_its_own_port(command, truth, parity):
    output = ("--output", "page.html") if command == "report" else ()
    Path("link.safetensors").symlink_to(truth)
    for same in (truth, "link.safetensors"):
        code, out, err = parity(command, same, truth, *output)
        assert (code, out) == (2, "") and "every file equals itself" in err
    shutil.copy(truth, "copy.safetensors")
    code, out, err = parity(command, "copy.safetensors", truth, *output)
    assert code == 0 and "equal to the bit" in out + err
    text = Path("page.html").read_text() if command == "report" else err
    assert "That shows nothing about a port." in text


def with_recipe(path: Path, **changes) -> dict[str, str]:
    """The metadata of a capture whose recipe states other things, and no hashes."""
    document = json.loads(metadata_of(path)["flux.parity"])
    document["recipe"] |= changes
    for entry in document["tensors"].values():
        del entry["sha256"], entry["statistics"]
    return {"flux.parity": json.dumps(document)}


def test_stated_dtype_allows_no_errors_in_silence(tensors, truth, parity):
    """A port in float32 that errs by a tenth, or by a hundredth, and states a coarse dtype."""
    draw = torch.Generator().manual_seed(4)
    for dtype, noise, code in (
        ("float8_e5m2", 0.1, 2),
        ("bfloat16", 0.1, 1),
        ("bfloat16", 0.01, 0),
    ):
        port = {
            name: x * (1 + noise * torch.randn(x.shape, generator=draw))
            if x.is_floating_point()
            else x
            for name, x in load_file(truth).items()
        }
        save_file(port, "port.safetensors", with_recipe(truth, dtype=dtype))
        found, _, err = parity("compare", "port.safetensors", truth)
        assert found == code
    assert "were allowed more than the reference's dtype allows, because port.safetensors" in err


@pytest.mark.parametrize(
    "command", ["compare", "diagnose", pytest.param("report", marks=pytest.mark.slow)]
)
def test_port_without_some_tensors_is_incomplete(command, tensors, truth, parity):
    """Each tensor that the port has is right; a wrong port could leave all others out."""
    output = ("--output", "page.html") if command == "report" else ()
    count = len(tensors)
    for part in ({OUT: tensors[OUT]}, {name: tensors[name] for name in tensors if name != IN}):
        save_file(part, "port.safetensors")
        code, out, err = parity(command, "port.safetensors", truth, *output)
        lost = count - len(part)
        words = f"incomplete: {len(part)} of {count} tensors are equal to the bit; {lost} not "
        assert code == 3 and f"{words}compared, because they are missing\n" in out + err
    if command == "report":
        assert '<h1 class="over">Incomplete</h1>' in Path("page.html").read_text()
    else:
        selected = parity(command, "port.safetensors", truth, "--filter", "noise")
        assert selected[0] == 0 and selected[1].startswith("all 1 tensors are equal to the bit\n")


FUNCTION = """
def port(name, inputs):
    return "port.safetensors"
"""


def test_own_capture_of_a_function_is_incomplete(tensors, whole, parity):
    """Each tensor in the file that the function names is right, and all others are left out."""
    Path("my_port.py").write_text(FUNCTION)
    sys.modules.pop("my_port", None)
    save_file({"noise": tensors["noise"]}, "port.safetensors")
    command = ("compare", whole, "--against", "my_port:port")
    code, out, _ = parity(*command)
    assert code == 3 and out.startswith("incomplete: 1 of ") and "are missing\n" in out
    assert parity(*command, "--filter", "noise")[0] == 0


@pytest.mark.slow
@pytest.mark.parametrize("command", ["against", "replay"])
def test_function_without_a_module_is_incomplete(command, whole, weights, parity):
    code, out, _ = run_call(parity, CALLS[command], whole, weights, "x", "step.002/img_in")
    assert code == 3 and re.match(r"incomplete: \d+ of \d+ tensors are equal to the bit; 1 ", out)


def test_port_of_statistics_is_incomplete(tensors, truth, parity):
    """One right tensor; all others state the statistics, hashes and recipe of the truth."""
    document = json.loads(metadata_of(truth)["flux.parity"])
    for name, entry in document["tensors"].items():
        if name != "noise":
            entry["kind"] = "statistics"
            entry.pop("same", None)
    save_file(
        {"noise": tensors["noise"]}, "port.safetensors", {"flux.parity": json.dumps(document)}
    )
    code, out, _ = parity("compare", "port.safetensors", truth)
    count = len(tensors)
    assert code == 3 and out.splitlines()[0] == (
        f"incomplete: 1 of {count} tensors are equal to the bit; {count - 1} not compared, because "
        "statistics alone are stored"
    )


def test_verdict_counts_what_was_not_compared(tensors, truth, parity):
    count = len(tensors)
    save_file({OUT: tensors[OUT], "mine": tensors[IN]}, "port.safetensors")
    code, out, _ = parity("compare", "port.safetensors", truth)
    assert code == 3 and out.splitlines()[1] == (
        f"compared: 1 of the {count} tensors of {truth}; {count - 1} are not in port.safetensors "
        "(noise, ids/txt, ids/img, ...); 1 are in port.safetensors alone (mine)"
    )
    save_file(tensors, "port.safetensors")
    code, out, _ = parity("compare", "port.safetensors", truth, "--filter", "noise")
    assert code == 0 and out.splitlines()[1] == (
        f"compared: 1 of the {count} tensors of {truth}; {count - 1} are left out by the filter"
    )


# ---------------------------------------------------------------- what is not stored in full


def written(path: str, tensors: Tensors, kind="full") -> Capture:
    with Writer(Path(path), {}) as writer:
        for name, tensor in tensors.items():
            writer.add(name, tensor, kind)
    return Capture(path)


@pytest.fixture
def large() -> Tensors:
    draw = torch.Generator().manual_seed(3)
    return {"step.001/img_in/out": torch.randn(1, 300, 64, generator=draw)}


@pytest.mark.parametrize("kind", ["full", "probe", "slice", "statistics"])
def test_reference_in_part_finds_a_wrong_port(kind, large, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = written("truth.safetensors", large, kind)
    changes = {name: WRONG[name] for name in ("zeros", "sevens")}
    changes["beyond the corner"] = each(lambda x: torch.cat([x[:, :16], 0 * x[:, 16:]], 1))
    for name, change in changes.items():
        port = written(f"{name}.safetensors", change(large))
        rows = compare(port, reference)
        assert rows[0].over and not passed(rows), name


@pytest.mark.parametrize("kind", ["full", "probe", "slice", "statistics"])
def test_hash_of_the_reference_shows_equality_to_the_bit(kind, large, tmp_path, monkeypatch):
    """The hash of the port's own bytes is computed, whatever its metadata states."""
    monkeypatch.chdir(tmp_path)
    reference = written("truth.safetensors", large, kind)
    save_file(large, "port.safetensors")
    rows = compare(Capture("port.safetensors"), reference)
    assert rows[0].identical and rows[0].values == 300 * 64 and passed(rows)
    save_file({name: x * (1 + 1e-6) for name, x in large.items()}, "near.safetensors")
    rows = compare(Capture("near.safetensors"), reference)
    assert not rows[0].identical and not rows[0].over
    assert passed(rows) == (kind in ("full", "probe"))


@pytest.mark.parametrize("kind", ["probe", "slice", "statistics"])
def test_port_in_part_is_never_equal_to_the_bit(kind, large, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    reference = written("truth.safetensors", large)
    rows = compare(written("port.safetensors", large, kind), reference)
    assert not rows[0].over and not rows[0].identical and "to the bit" not in verdict(rows)
    words = {"probe": "4,096 values", "slice": "a corner", "statistics": "statistics alone"}
    assert words[kind] in verdict(rows) and passed(rows) == (kind == "probe")


@pytest.mark.parametrize("kind", ["probe", "slice"])
def test_reference_in_part_passes_no_port_with_other_values(kind, large, tmp_path, monkeypatch):
    """Beyond the corner, tokens are in another order: all statistics are those of the truth."""
    monkeypatch.chdir(tmp_path)
    reference = written("truth.safetensors", large, kind)
    moved = each(lambda x: torch.cat([x[:, :16], x[:, 16:].flip(1)], 1))(large)
    save_file(moved, "port.safetensors")
    assert not passed(compare(Capture("port.safetensors"), reference))


def test_probe_of_another_memory_order_is_equal(tmp_path):
    """The norms of a view are summed in another order than those of the stored tensor."""
    x = torch.randn(1, 2000, 4, 32, generator=torch.Generator().manual_seed(3)).transpose(1, 2)
    a = written(tmp_path / "a.safetensors", {"q": x}, "probe")
    b = written(tmp_path / "b.safetensors", {"q": x})
    assert not torch.equal(a.tokens("q"), token_norms(b.tensors["q"]))
    assert passed(compare(a, b, 0.0)) and passed(compare(b, a, 0.0))
    moved = written(tmp_path / "c.safetensors", {"q": x * (1 + 1e-5)}, "probe")
    assert not passed(compare(moved, b, 0.0))


def test_command_passes_no_statistics(large, parity):
    written("truth.safetensors", large)
    written("port.safetensors", large, "statistics")
    code, out, _ = parity("compare", "port.safetensors", "truth.safetensors")
    assert code == 1
    assert out.startswith("nothing was compared; 1 not compared, because statistics alone are")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_reference_without_finite_values_is_no_pass(value, large, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    broken = each(lambda x: torch.full_like(x, value))(large)
    save_file(broken, "a.safetensors"), save_file(broken, "b.safetensors")
    rows = compare(Capture("a.safetensors"), Capture("b.safetensors"))
    assert first_over(rows) is None and not passed(rows)
    assert verdict(rows).startswith("nothing was compared; 1 not compared, because they have no")


def test_minus_zero_is_equal_in_value_alone(tmp_path):
    zeros = torch.tensor([0.0, 1.0, -0.0])
    save_file({"x": zeros}, tmp_path / "b.safetensors")
    save_file({"x": zeros.where(zeros != 0, -zeros)}, tmp_path / "a.safetensors")
    rows = compare(Capture(tmp_path / "a.safetensors"), Capture(tmp_path / "b.safetensors"), 0.0)
    assert passed(rows) and not rows[0].identical
    assert verdict(rows).startswith("all 1 tensors are equal, 1 of them in value alone: ")


# ---------------------------------------------------------------- two tensors


def test_integers_beyond_float64_are_compared():
    """2^60 and 2^60 + 1 are one number in float64."""
    b = torch.tensor([2**60])
    assert errors(b + 1, b).over(0) and not errors(b, b).over(0)


@pytest.mark.parametrize("size", [1e-300, 1e-200, 1e200, 1e300])
def test_extreme_float64_is_compared(size):
    """The squares of these numbers are 0 or infinite in float64."""
    b = size * torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
    assert not errors(b, b).over(0)
    assert errors(1.01 * b, b).relative_l2 == pytest.approx(0.01)
    assert errors(0 * b, b).over(0.9) and errors(b, 0 * b).over(0.9)


def test_shapes_are_not_broadcast():
    with pytest.raises(UserError, match=r"got \(1,\), expected \(3,\)"):
        errors(torch.ones(1), torch.ones(3))


@pytest.mark.parametrize(
    "name, ours, theirs, words",
    [
        ("single_blocks.0/out", (1, 9, 8), (1, 6, 8), "the images have different sizes, or the"),
        ("double_blocks.0/out.0", (1, 9, 8), (1, 6, 8), "the images have different sizes"),
        ("latents", (1, 4, 3, 2), (1, 4, 2, 2), "the images have different sizes"),
        ("txt_in/out", (1, 9, 8), (1, 6, 8), "the texts have different numbers of tokens"),
        ("double_blocks.0/out.0", (1, 8, 6), (1, 6, 8), ""),
    ],
)
def test_other_shapes_are_explained(name, ours, theirs, words, tmp_path):
    a = written(tmp_path / "a.safetensors", {f"step.001/{name}": torch.ones(ours)})
    b = written(tmp_path / "b.safetensors", {f"step.001/{name}": torch.ones(theirs)})
    fault = compare(a, b)[0].fault
    assert fault.startswith(f"has shape {ours} (expected {theirs})")
    assert fault.removeprefix(f"has shape {ours} (expected {theirs})").startswith(
        f": {words}" if words else ""
    ) and bool(words) == (": " in fault)


# ---------------------------------------------------------------- runs


@pytest.fixture(scope="module")
def whole(weights, tmp_path_factory) -> Path:
    """A capture of everything, which a run can be repeated from."""
    pipe = flux.load(KLEIN, weights=weights, device="cpu", fast=False, dtype=torch.float32)
    return capture(pipe, REQUEST, tmp_path_factory.mktemp("whole") / "whole.safetensors").path


# A port that knows the truth and changes it.
PORT = """
import torch
from flux.parity.capture_file import Capture
from flux.parity.replay import module_runs
recorded = Capture({truth!r})
outputs = {{each.name: list(each.outputs.values()) for each in module_runs(recorded)}}
def true(name):
    return [recorded.tensors[output] for output in outputs[name]]
def port(name, inputs):
    return [{change} for x in true(name)] if name != {without!r} else None
"""
CHANGES = {
    "zeros": "torch.zeros_like(x)",
    "sevens": "torch.full_like(x, 7)",
    "negative": "-x",
    "scaled": "1.001 * x",
    "NaN": "x * torch.nan",
    "bfloat16 zeros": "torch.zeros_like(x).bfloat16()",
    "one token": "torch.cat([x[:, :1] * 0, x[:, 1:]], 1)",
    "inputs": "inputs[0] if inputs[0].shape == x.shape else x * 2",
}
CALLS = {
    "against": ("compare", "{}", "--against", "my_port:port"),
    "replay": ("replay", "{}", "--module-fn", "my_port:port", "--weights", "{weights}"),
    "bisect": ("bisect", "{}", "--module-fn", "my_port:port", "--weights", "{weights}"),
}


def run_call(
    parity, command: tuple[str, ...], truth: Path, weights: Path, change: str, without: str = ""
):
    Path("my_port.py").write_text(PORT.format(truth=str(truth), change=change, without=without))
    sys.modules.pop("my_port", None)
    return parity(*(part.format(truth, weights=weights) for part in command))


@pytest.mark.slow
@pytest.mark.parametrize("command", CALLS.values(), ids=CALLS)
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_wrong_function_is_found(change, command, whole, weights, parity):
    code, out, _ = run_call(parity, command, whole, weights, change)
    assert code == 1 and re.match(r"[\d,]+ of [\d,]+ tensors are over|the first difference is", out)


@pytest.mark.slow
@pytest.mark.parametrize("command", CALLS.values(), ids=CALLS)
def test_right_function_passes(command, whole, weights, parity):
    code, out, _ = run_call(parity, command, whole, weights, "x")
    assert code == 0 and re.match(r"all \d+ tensors are equal to the bit|no step differs", out)


RUNS = {
    "here": ("compare", "{}", "--against", "here"),
    "diffusers": ("compare", "{}", "--against", "diffusers"),
    "modules": ("replay", "{}"),
    "loop": ("replay", "{}", "--end-to-end"),
    "inside": ("replay", "{}", "--inside", "step.001"),
    "bisect": ("bisect", "{}"),
}


@pytest.mark.slow
@pytest.mark.parametrize("command", RUNS.values(), ids=RUNS)
def test_wrong_weights_are_found(command, whole, weights, parity):
    (file,) = weights.rglob("flux-2-klein*.safetensors")
    state = load_file(file)
    name = next(name for name in state if "single_blocks.1.linear1" in name)
    save_file(state | {name: state[name] * 1.01}, "wrong.safetensors")
    run = [part.format(whole) for part in command]
    code, out, _ = parity(*run, "--weights", weights, "--transformer", "wrong.safetensors")
    assert code == 1 and "single_blocks.1" in out.splitlines()[0]
    assert parity(*run, "--weights", weights)[0] == 0
