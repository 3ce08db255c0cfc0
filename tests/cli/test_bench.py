"""scripts/bench.py: its counts against counts by hand, its turns, its JSON, its errors.

No test depends on a time. The networks are tiny.
"""

import json
import math
import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from support.load_script import script
from torch.utils.flop_counter import FlopCounterMode

from flux import sampling
from flux.configs import FLUX1, KLEIN_9B
from flux.parity.reference import FLUX1_TINY, FLUX3_TINY, KLEIN_TINY, relative_l2
from flux.transformer import Flux

bench = script("bench")  # which puts scripts/ on the path, where `benchmarks` is
from benchmarks import floor, full, references, stages, start, steps, timing
from benchmarks.rows import Row, shown
from benchmarks.setting import Setting

pytestmark = pytest.mark.slow

TINY = dict(
    enough=1e-3,
    width=128,
    sides=(64,),
    text=16,
    shrink=64,
    decoded=64,
    channels=8,
    saved=64,
    compiled=False,
    full_side=64,
    replayed=1e-3,
)

CPU = torch.device("cpu")
ONCE = Setting(CPU, rounds=1, enough=1e-9)


@pytest.fixture
def tiny(monkeypatch):
    """Make --quick smaller, and let the timed imports import nothing."""
    monkeypatch.setattr(Setting, "quick", lambda self: replace(self, **TINY))
    monkeypatch.setattr(start, "IMPORTS", dict.fromkeys(start.IMPORTS, "pass"))


def run(tmp_path: Path, *arguments: str) -> dict:
    """Return the content of the JSON file of a quick run."""
    path = tmp_path / "results" / "a.json"
    flags = ["--quick", "--rounds", "1", "--device", "cpu", "--json", str(path)]
    assert bench.main([*arguments, *flags]) == 0
    return json.loads(path.read_text(), parse_constant=pytest.fail)


def on_meta(config) -> Flux:
    with torch.device("meta"):
        return Flux(config)


# ------------------------------------------------------------------ counts


def flops(config, side: int, count: int, cached: bool, steps: int = 4, text: int = 512) -> int:
    """Count by hand: 2 for each weight and token, 4 D for each query, key and block."""
    sizes = {name: p.numel() for name, p in on_meta(config).named_parameters() if p.ndim == 2}

    def of(*parts):
        return sum(n for name, n in sizes.items() if any(part in name for part in parts))

    image, reference, blocks = side**2, count * side**2, config.depth + config.depth_single
    image_weights = of("img_in") + of(".img_attn.", ".img_mlp.")
    modulation = of("time_in", "modulation") - of("adaLN_modulation")  # for one vector
    keys, queries = text + image + reference, text + image + reference * (not cached)
    image_tokens = image + reference * (not cached)
    step = 2 * image_weights * image_tokens
    step += 2 * of("txt_in", ".txt_attn.", ".txt_mlp.") * text
    step += 2 * of(".linear1.", ".linear2.") * queries
    step += 2 * (modulation + of("adaLN_modulation") + of("final_layer.linear") * image_tokens)
    step += 4 * config.hidden_size * blocks * queries * keys
    if not cached:
        return steps * step
    fill = 2 * ((image_weights + of(".linear1.", ".linear2.")) * reference + modulation)
    fill += 4 * config.hidden_size * blocks * reference**2
    final = 2 * (of("adaLN_modulation") + of("final_layer.linear") * reference)
    return steps * step + fill + final


@pytest.mark.parametrize("config, side, count", [(KLEIN_TINY, 8, 2), (KLEIN_9B, 64, 4)])
def test_gain_of_a_cache_equals_a_count_by_hand(config, side, count):
    by_hand = flops(config, side, count, False) / flops(config, side, count, True)
    assert references.flop_gain(config, side, count) == pytest.approx(by_hand, rel=1e-9)


def test_step_reads_all_weights_but_those_of_modulation():
    row, d = steps.resident_row(), 3072
    modulation = 19 * 2 * (6 * d) * (d + 1) + 38 * (3 * d) * (d + 1)
    vectors = (256 + 1) * d * 2 + (768 + 1) * d + 3 * (d + 1) * d  # time, guidance, pooled text
    assert row.theirs == 2 * 11_901_408_320  # as Black Forest Labs released it
    assert row.ours == row.theirs - 2 * (modulation + vectors)
    assert row.reached


@pytest.mark.parametrize(
    "name, released", [("Qwen3 4B", 8_044_936_192), ("Qwen3 8B", 16_381_470_720)]
)
def test_language_models_are_counted_as_released(name, released):
    """The sizes are those in the index files of Hugging Face's Qwen/Qwen3-4B and -8B."""
    row = stages.text_bytes(name, *stages.TEXT_ENCODERS[name])
    config = stages.TEXT_ENCODERS[name][0]
    attention = (2 * 32 + 2 * 8) * 128 * config.hidden_size
    norms = 2 * config.hidden_size + 2 * 128
    layer = attention + 3 * config.hidden_size * config.mlp_size + norms
    assert row.theirs == released
    assert row.ours == 2 * (27 * layer + config.vocab_size * config.hidden_size)
    assert row.reached


def test_mistral_is_counted_without_its_vision_tower():
    row = stages.text_bytes("Mistral Small", *stages.TEXT_ENCODERS["Mistral Small"])
    layer = 5120 * (4096 + 1024 + 1024 + 4096) + 3 * 5120 * 32768 + 2 * 5120
    table = 131072 * 5120
    assert row.ours == 2 * (30 * layer + table)
    assert row.theirs == 2 * (40 * layer + 5120 + 2 * table)
    assert row.reached


def test_qwen3_vl_is_counted_without_its_vision_tower():
    """Literals: the bytes of the released language model, and of its embedding and 32 layers."""
    row = stages.text_bytes("Qwen3-VL 4B", *stages.TEXT_ENCODERS["Qwen3-VL 4B"])
    assert (row.ours, row.theirs) == (7_237_484_544, 2 * 4_022_468_096) and row.reached


@pytest.mark.parametrize("flow_map", [False, True])
@torch.no_grad()
def test_step_of_flux3_equals_diffusers(flow_map):
    """With a reference. diffusers repeats the modulation for each token, which rounds otherwise."""
    config = replace(FLUX3_TINY, flow_map=flow_map)
    ours, theirs = steps.both(config, CPU, torch.float32)
    tensors = steps.inputs(config, 64, 8, CPU, torch.float32)
    ids = sampling.flux3_image_ids(4, 4, 1)
    tensors |= dict(references=torch.randn(1, 16, 16), reference_ids=ids)
    expected = steps.their_step(theirs, tensors)()
    for network in (ours, steps.as_loaded(steps.sharing_weights(ours), CPU)):
        assert relative_l2(steps.our_step(network, tensors)(), expected) < 1e-6


@pytest.mark.parametrize("config", [FLUX1_TINY, KLEIN_TINY, FLUX3_TINY])
def test_floor_has_as_many_flops_as_a_step(config):
    model = timing.random_weights(lambda: steps.build_network(config), "meta", torch.bfloat16)
    step = steps.our_step(model, steps.inputs(config, 64, 8, "meta", torch.bfloat16))
    replayed = floor.replay(floor.operations(lambda: step, CPU), torch.device("meta"))
    totals = []
    for function in (step, replayed):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_floor_includes_convolutions_and_masks():
    spec = bench.get_spec("flux.2-tiny")
    for name, (build, _) in full.STAGES.items():
        operations = floor.operations(lambda build=build: build(spec, 64, "meta").run, CPU)
        floor.replay(operations, torch.device("cpu"))()
        functions = {function for function, *_ in operations}
        assert (torch.nn.functional.conv2d in functions) == (name == "decode")


def test_floor_replays_transposed_convolutions_and_layouts():
    x = torch.empty(2, 3, 4, 5, device="meta").contiguous(memory_format=torch.channels_last)
    weight = torch.empty(3, 6, 4, 4, device="meta")

    def run():
        F.conv_transpose2d(x, weight, stride=2, padding=1)
        F.linear(x.mT[:, :, :1].expand(-1, -1, 7, -1), torch.empty(8, 4, device="meta"))

    (transposed, args, _), (_, (expanded, _), _) = found = floor.operations(lambda: run, CPU)
    assert transposed is F.conv_transpose2d and expanded.strides[2] == 0
    data, _ = floor.filled(found[0], torch.device("cpu"))
    assert [tensor.stride() for tensor in data] == [x.stride(), weight.stride()]
    assert args[0].dtype == torch.float32 and data[0].std() > 0.5
    floor.replay(found, torch.device("cpu"))()


# ------------------------------------------------------------------ timing


def test_functions_take_turns_forwards_and_backwards(monkeypatch):
    seen, clock = [], iter(range(1000))
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))  # every call takes a second
    functions = [lambda: seen.append("A"), lambda: seen.append("B")]
    assert timing.by_turns(functions, rounds=3, enough=0.1) == [1, 1]
    assert "".join(seen) == "AB" + 3 * "ABBA"


def test_short_functions_are_called_equally_often():
    seen = []

    def longer():
        seen.append("B")
        sum(range(10_000))

    timing.by_turns([lambda: seen.append("A"), longer], rounds=1, enough=0.01)
    assert seen.count("A") == seen.count("B") > 10


def test_random_weights_keep_the_size_of_their_inputs():
    model = timing.random_weights(lambda: Flux(FLUX1_TINY), "cpu", torch.float32)
    for name, p in model.state_dict().items():
        assert p.isfinite().all() and p.std() > 0, name
    x = torch.randn(4096, FLUX1_TINY.hidden_size)
    assert model.single_blocks[0].linear1(x).std() == pytest.approx(1, abs=0.1)


def test_step_runs_the_fast_networks_where_flux_load_does():
    model = timing.random_weights(lambda: Flux(KLEIN_TINY), "cpu", torch.float32)
    plain = steps.sharing_weights(model)
    fast = steps.as_loaded(model, "cpu")
    assert type(fast.single_blocks[0]) is not type(plain.single_blocks[0])
    assert plain.single_blocks[0].linear1.weight is not None
    assert (
        plain.single_blocks[0].linear1.weight.data_ptr()
        == fast.single_blocks[0].linear1.weight.data_ptr()
    )
    kind = type(plain.single_blocks[0])
    assert type(steps.as_loaded(plain, "mps").single_blocks[0]) is kind
    assert type(steps.as_loaded(plain, "cuda").single_blocks[0]) is not kind


# ------------------------------------------------------------------ rows


def test_row_says_whether_its_goal_is_reached():
    row = Row("a", "s", 0.9, 1.0, goal=0.95)
    assert row.ratio == 0.9 and row.reached
    assert row.cells() == ("a", "900 ms", "diffusers 1 s", "0.90", "≤ 0.95")
    assert replace(row, ours=0.96).cells()[-1] == "≤ 0.95, missed"
    assert replace(row, goal=None).reached is None
    share = Row("b", "", 0.03, 0.5, limit=0.02)
    assert share.reached is False and share.cells()[-1] == "≤ 0.02, missed"
    assert Row("c", "B", 5, None).cells() == ("c", "5 B", "", "", "")


def test_unequal_results_reach_no_goal():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(100, generator=generator) for _ in range(2))
    same = timing.pair("a", lambda: a, lambda: a, ONCE, goal=1000.0)
    other = timing.pair("a", lambda: a, lambda: b, ONCE, goal=1000.0)
    nan = timing.pair("a", lambda: a, lambda: a * math.nan, ONCE, goal=1000.0)
    assert same.difference == 0 and same.reached
    assert other.difference > 1 and other.reached is False and "not comparable" in other.cells()[-1]
    assert nan.reached is False


def test_figures_have_three_digits():
    for value, unit, text in [
        (0.0123, "s", "12.3 ms"),
        (123.4, "s", "123 s"),
        (2e-6, "s", "2 µs"),
        (2.5e9, "B", "2.5 GB"),
        (0, "B", "0 B"),
        (0.5, "", "0.5"),
        (1281.2, "B/pixel", "1,281 B/pixel"),
    ]:
        assert shown(value, unit) == text


# ------------------------------------------------------------------ the command


def test_against_diffusers_runs_every_part_with_equal_results(tmp_path, tiny, capsys):
    result = run(tmp_path, "--against", "diffusers")
    assert result["command"].startswith("bench.py --against diffusers --quick")
    assert result["device"] == "cpu" and len(result["date"]) == 10
    assert {"torch", "diffusers", "transformers", "Python"} <= result["versions"].keys()
    assert result["machine"].keys() == {"processor", "cores", "threads", "system"}
    rows, printed = result["rows"], capsys.readouterr().out
    kinds = {row["name"].split(",")[0] for row in rows}
    expected = "cold start, load, text, step, decode, encode, saving, prompt to PNG"
    assert kinds == set(expected.split(", "))
    for row in rows:
        assert row["ours"] > 0 and row["ratio"] == row["ours"] / row["theirs"]
        assert f"| {row['name']} |" in printed
        assert row["difference"] is None or row["difference"] < 0.05, row["name"]
        assert row["runs"] in (None, 2) and row["reached"] in (None, True, False)
    compared = [row["name"] for row in rows if row["difference"] is not None]
    assert all(row["unit"] == "s" for row in rows if row["difference"] is not None)
    # text encoders; steps: overhead, eager, plain; decode and encode in two dtypes
    assert len(compared) == 4 + 3 * 3 + 2 * 2 * 2
    assert sum(name.endswith("plain") for name in compared) == 3
    for dtype in ("float32", "bfloat16"):
        assert sum(name.startswith("decode") and name.endswith(dtype) for name in compared) == 2


def test_floor_measures_each_family(tmp_path, tiny):
    rows = run(tmp_path, "--floor")["rows"]
    assert [row["against"] for row in rows] == ["floor"] * len(steps.FAMILIES)
    assert all(row["theirs"] > 0 for row in rows)


def test_start_takes_turns_and_compares_with_torch(monkeypatch, capsys):
    seconds, seen = {"import torch": 1.0, "import diffusers": 4.0, "import flux": 1.05}, []

    def pretended(arguments: list[str]) -> tuple[float, str]:
        imports = [name for name, code in start.IMPORTS.items() if arguments == ["-c", code]]
        seen.append(imports[0] if imports else "sample")
        return seconds.get(seen[-1], 3.0), ""

    monkeypatch.setattr(start, "run", pretended)
    assert bench.main(["--rounds", "1"]) == 0
    names = ["import torch", "import flux", "import diffusers", "sample"]
    assert seen == names + names + names[::-1]
    printed = capsys.readouterr().out
    assert "| import flux | 1.05 s | import torch 1 s | 1.05 | ≤ 1.10 |" in printed
    assert "| sample.py, prompt to image | 3 s | import torch 1 s | 3.00 |  |" in printed


def test_torchrun_takes_turns_with_a_plain_run(monkeypatch, capsys, tmp_path):
    """Three files of a run, at equal distances; torchrun's own start counts for the command."""
    seen = []

    def pretended(arguments: list[str]) -> tuple[float, str]:
        seen.append("torchrun" if "torch.distributed.run" in arguments else "plain")
        output, paths = Path(arguments[arguments.index("--output") + 1]), []
        for number in range(3):
            paths.append(output.with_name(f"{len(seen)}-{number}.png"))
            paths[-1].touch()
            between = 10.1 if seen[-1] == "torchrun" else 10.0
            os.utime(paths[-1], (0, 1e6 + number * between))
        return 40.0 if seen[-1] == "torchrun" else 32.0, "\n".join(map(str, paths))

    monkeypatch.setattr(start, "run", pretended)
    assert bench.main(["--torchrun", "--rounds", "1", "--device", "cpu"]) == 0
    assert seen == ["torchrun", "plain", "torchrun", "plain", "plain", "torchrun"]
    printed = capsys.readouterr().out
    assert "| an image, under torchrun | 10.1 s | a plain run 10 s | 1.01 | ≤ 1.02 |" in printed
    assert "of 9 images, under torchrun | 40 s | a plain run 32 s | 1.25 |  |" in printed


def test_float8_row_has_an_error(tmp_path):
    setting = Setting(torch.device("cpu"), 1, **TINY)
    stage = full.stepping(bench.get_spec("flux.2-tiny"), 64, "cpu")
    error, seconds = full.float8_rows("step", stage, setting)
    assert 0.001 < error.ours < 0.2 and error.reached is None
    assert seconds.against == "bfloat16" and seconds.goal == 0.72 and seconds.theirs > 0


def test_references_expect_nine_tenths_of_the_gain_in_flops(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(references, "KLEIN_9B", replace(KLEIN_9B, depth=1, depth_single=2))
    rows = run(tmp_path, "--references")["rows"]
    assert len(rows) == 9 and all(row["against"] == "at every step" for row in rows)
    for seconds, share in zip(rows[::3], rows[1::3], strict=True):
        assert seconds["goal"] == pytest.approx(share["ratio"] / 0.9) and share["ratio"] < 1


def test_rows_before_a_failure_are_saved(tmp_path, tiny, monkeypatch):
    def fails(setting):
        yield Row("first", "s", 1.0)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(floor, "floor_rows", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, "--floor")
    rows = json.loads((tmp_path / "results" / "a.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["first"]


def test_full_model_has_a_floor_and_diffusers(tmp_path, tiny):
    rows = run(tmp_path, "--model", "FLUX.2-tiny", "--against", "diffusers")["rows"]
    timed = [row for row in rows if row["unit"] == "s"]
    names = {against: [] for against in ("floor", "diffusers")}
    for row in timed:
        names[row["against"]].append(row["name"].split(",")[0])
    around = ["all but the steps", "all but the steps and the PNG"]
    assert names["floor"] == ["text", "step", "decode", *around, "prompt to PNG"]
    assert names["diffusers"] == ["text", "step", "decode", "prompt to PNG"]
    assert all(row["difference"] < 0.05 for row in rows if row["difference"] is not None)


def test_full_model_needs_no_diffusers(tmp_path, tiny, monkeypatch):
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    rows = run(tmp_path, "--model", "flux.2-tiny", "--floor")["rows"]
    assert {row["against"] for row in rows if row["theirs"] is not None} == {"floor"}


def test_results_are_never_overwritten(tmp_path, tiny, monkeypatch):
    monkeypatch.setattr(floor, "floor_rows", lambda setting: iter([Row("first", "s", 1.0)]))
    run(tmp_path, "--floor")
    run(tmp_path, "--floor")
    assert sorted(p.name for p in (tmp_path / "results").iterdir()) == ["a-2.json", "a.json"]


class Loss(NamedTuple):
    mode: str
    psnr: float


def test_losses_are_printed_and_saved(tmp_path, tiny, capsys, monkeypatch):
    import benchmarks.lossy as lossy

    losses = [Loss("float32", math.inf), Loss("--quantize fp8", 31.26)]
    monkeypatch.setattr(lossy, "losses", lambda prompts: losses)
    result = run(tmp_path, "--lossy")
    assert result["rows"] == []
    assert result["losses"] == [
        {"mode": "float32", "psnr": None},
        {"mode": "--quantize fp8", "psnr": 31.26},
    ]
    table = "| mode | psnr |\n|---|---|\n| float32 | inf |\n| --quantize fp8 | 31.3 |"
    assert table in capsys.readouterr().out


# ------------------------------------------------------------------ errors


def refused(capsys, *arguments: str) -> str:
    assert bench.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and error.count("\n") == 1
    return error


def test_wrong_flags_are_refused_before_measuring(tmp_path, capsys, monkeypatch):
    assert "--rounds: must be from 1 to 1000 (got 0)" in refused(capsys, "--rounds", "0")
    error = refused(capsys, "--model", "flux.2-klein-4")
    assert "--model: " in error and "flux.2-klein-4b" in error
    assert "--device: tpu" in refused(capsys, "--device", "tpu")
    assert ".json" in refused(capsys, "--json", str(tmp_path / "a.txt"))
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, "--json", str(tmp_path / "file" / "a.json"))
    monkeypatch.setattr(bench, "installed", lambda library: None)
    assert "pip install -e '.[test]'" in refused(capsys, "--against", "diffusers")


def test_model_that_does_not_fit_is_refused_with_numbers(capsys, monkeypatch):
    """12 billion weights take two bytes each."""
    monkeypatch.setattr(full, "free_memory", lambda device: 20e9)
    error = refused(capsys, "--model", "flux.1-dev", "--device", "cpu")
    assert "23.8 GB" in error and "20.0" in error
    assert sum(p.numel() for p in on_meta(FLUX1).parameters()) == 11_901_408_320
