"""scripts/bench.py: what it counts, against counts by hand; how it takes turns; its JSON; what it refuses. Never a time."""

import json
import math
import sys
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from support.load_script import script
from torch.utils.flop_counter import FlopCounterMode

from flux.configs import FLUX1, KLEIN_9B
from flux.parity.reference import FLUX1_TINY, KLEIN_TINY
from flux.transformer import Flux

bench = script("bench")  # which puts its own folder where `benchmarks` is found
from benchmarks import floor, full, references, stages, start, steps, timing
from benchmarks.rows import Row, shown
from benchmarks.setting import Setting

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
    whole=64,
    replayed=1e-3,
)

ONCE = Setting(torch.device("cpu"), rounds=1, enough=1e-9)


@pytest.fixture
def tiny(monkeypatch):
    """--quick, but quicker; imports that import nothing."""
    monkeypatch.setattr(Setting, "quick", lambda self: replace(self, **TINY))
    monkeypatch.setattr(start, "IMPORTS", dict.fromkeys(start.IMPORTS, "pass"))


def run(tmp_path: Path, *arguments: str) -> dict:
    """What a quick run leaves in its JSON."""
    path = tmp_path / "made" / "a.json"
    assert (
        bench.main([*arguments, "--quick", "--rounds", "1", "--device", "cpu", "--json", str(path)])
        == 0
    )
    return json.loads(path.read_text(), parse_constant=pytest.fail)


# ---------------------------------------------------------------- what is counted


def flops(config, side: int, count: int, cached: bool, steps: int = 4, text: int = 512) -> int:
    """Of four steps: two for every weight and token, and 4·D for every pair of a query and a key in every block."""
    with torch.device("meta"):
        weights = {name: p.numel() for name, p in Flux(config).named_parameters() if p.ndim == 2}

    def of(*parts):
        return sum(n for name, n in weights.items() if any(part in name for part in parts))

    picture, given, blocks = side**2, count * side**2, config.depth + config.depth_single
    images = of("img_in") + of(".img_attn.", ".img_mlp.")
    once = of("time_in", "modulation") - of("adaLN_modulation")  # for one vector
    seen, looking = text + picture + given, text + picture + given * (not cached)
    last = picture + given * (
        not cached
    )  # the final layer sees the references too, where they are part of the sequence
    step = 2 * (
        images * last
        + of("txt_in", ".txt_attn.", ".txt_mlp.") * text
        + of(".linear1.", ".linear2.") * looking
    )
    step += 2 * (once + of("adaLN_modulation") + of("final_layer.linear") * last)
    step += 4 * config.hidden_size * blocks * looking * seen
    alone = (
        2 * ((images + of(".linear1.", ".linear2.")) * given + once)
        + 4 * config.hidden_size * blocks * given**2
    )
    return steps * step + alone * cached


@pytest.mark.parametrize(
    "config, side, count", [(KLEIN_TINY, 8, 2), (KLEIN_9B, 64, 1), (KLEIN_9B, 64, 4)]
)
def test_gain_of_a_cache_is_that_of_a_count_by_hand(config, side, count):
    by_hand = flops(config, side, count, False) / flops(config, side, count, True)
    assert references.flop_gain(config, side, count) == pytest.approx(by_hand, rel=1e-9)


def test_a_step_reads_all_weights_but_those_of_the_modulation():
    row, d = steps.resident_row(), 3072
    modulation = 19 * 2 * (6 * d) * (d + 1) + 38 * (3 * d) * (d + 1)
    vectors = (
        (256 + 1) * d * 2 + (768 + 1) * d + 3 * (d + 1) * d
    )  # of time, guidance and pooled text
    assert row.theirs == 2 * 11_901_408_320  # as Black Forest Labs released it
    assert row.ours == row.theirs - 2 * (modulation + vectors)
    assert row.reached


@pytest.mark.parametrize(
    "name, released", [("Qwen3 4B", 8_044_936_192), ("Qwen3 8B", 16_381_470_720)]
)
def test_language_models_are_counted_as_released(name, released):
    """Total sizes in the index files of Hugging Face's Qwen/Qwen3-4B and -8B."""
    row = stages.text_bytes(name, *stages.TEXT_ENCODERS[name])
    config = stages.TEXT_ENCODERS[name][0]
    layer = (
        2 * (2 * 32 + 2 * 8) * 128 * config.hidden_size // 2
        + 3 * config.hidden_size * config.mlp_size
    )
    layer += 2 * config.hidden_size + 2 * 128  # norms
    assert row.theirs == released
    assert row.ours == 2 * (27 * layer + config.vocab_size * config.hidden_size)
    assert row.reached


def test_mistral_is_counted_without_its_eyes():
    row = stages.text_bytes("Mistral Small", *stages.TEXT_ENCODERS["Mistral Small"])
    layer = 5120 * (4096 + 1024 + 1024 + 4096) + 3 * 5120 * 32768 + 2 * 5120
    table = 131072 * 5120
    assert (row.ours, row.theirs) == (2 * (30 * layer + table), 2 * (40 * layer + 5120 + 2 * table))
    assert row.reached


@pytest.mark.parametrize("name", steps.FAMILIES)
def test_kernels_of_a_step_are_the_same_in_every_run(name):
    row = steps.kernel_row(name)
    assert (
        row == steps.kernel_row(name)
        and row.ours == int(row.ours) < row.theirs
        and row.unit == "kernels"
    )
    assert row.reached


@pytest.mark.parametrize("config", [FLUX1_TINY, KLEIN_TINY])
def test_the_floor_is_all_that_is_heavy_in_a_step(config):
    """As many FLOPs as the step itself has, counted by torch."""
    model = timing.random_weights(lambda: Flux(config), "meta", torch.bfloat16)
    step = steps.our_step(model, steps.inputs(config, 64, 8, "meta", torch.bfloat16))
    replayed = floor.replay(floor.operations(step), torch.device("meta"))
    totals = []
    for function in (step, replayed):
        with torch.no_grad(), FlopCounterMode(display=False) as counter:
            function()
        totals.append(counter.get_total_flops())
    assert totals[0] == totals[1] > 0


def test_the_floor_has_convolutions_and_masks_too():
    spec = bench.get_spec("flux.2-tiny")
    for name, (build, _) in full.STAGES.items():
        operations = floor.operations(build(spec, 64, "meta").run)
        floor.replay(operations, torch.device("cpu"))()  # runs, on data of its own
        assert (torch.nn.functional.conv2d in {function for function, *_ in operations}) == (
            name == "decode"
        )


# ---------------------------------------------------------------- how it is measured


def test_by_turns_forwards_and_backwards(monkeypatch):
    seen, clock = [], iter(range(1000))
    monkeypatch.setattr(timing, "perf_counter", lambda: next(clock))  # every call takes a second
    seconds = timing.by_turns(
        [lambda: seen.append("A"), lambda: seen.append("B")], rounds=3, enough=0.1
    )
    assert "".join(seen) == "AB" + 3 * "ABBA" and seconds == [1, 1]


def test_short_functions_are_called_equally_often():
    seen = []
    timing.by_turns(
        [lambda: seen.append("A"), lambda: seen.append("B") or sum(range(10_000))],
        rounds=1,
        enough=0.01,
    )
    assert seen.count("A") == seen.count("B") > 10


def test_weights_are_random_and_keep_sizes():
    model = timing.random_weights(lambda: Flux(FLUX1_TINY), "cpu", torch.float32)
    for name, p in model.state_dict().items():
        assert p.isfinite().all() and p.std() > 0, name
    x = torch.randn(4096, FLUX1_TINY.hidden_size)
    assert model.single_blocks[0].linear1(x).std() == pytest.approx(1, abs=0.1)


# ---------------------------------------------------------------- rows


def test_rows_say_what_they_reached():
    row = Row("a", "s", 0.9, 1.0, goal=0.95)
    assert (
        row.ratio == 0.9
        and row.reached
        and row.cells() == ("a", "900 ms", "diffusers 1 s", "0.90", "≤ 0.95")
    )
    assert replace(row, ours=0.96).cells()[-1] == "≤ 0.95, missed"
    assert replace(row, goal=None).reached is None
    share = Row("b", "", 0.03, 0.5, limit=0.02)
    assert share.reached is False and share.cells()[-1] == "≤ 0.02, missed"
    assert Row("c", "B", 5, None).cells() == ("c", "5 B", "", "", "")


def test_what_computes_something_else_reaches_nothing():
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(100, generator=generator) for _ in range(2))
    same, other = (timing.pair("a", lambda: a, lambda x=x: x, ONCE, goal=1000.0) for x in (a, b))
    assert same.difference == 0 and same.reached
    assert other.difference > 1 and other.reached is False and "not comparable" in other.cells()[-1]
    nothing = timing.pair("a", lambda: a, lambda: a * math.nan, ONCE, goal=1000.0)
    assert nothing.reached is False


@pytest.mark.parametrize(
    "value, unit, text",
    [
        (0.0123, "s", "12.3 ms"),
        (123.4, "s", "123 s"),
        (2e-6, "s", "2 µs"),
        (2.5e9, "B", "2.5 GB"),
        (0, "B", "0 B"),
        (1663, "kernels", "1,663 kernels"),
        (0.5, "", "0.5"),
        (1281.2, "B/pixel", "1,281 B/pixel"),
    ],
)
def test_figures_are_written_with_three_digits(value, unit, text):
    assert shown(value, unit) == text


# ---------------------------------------------------------------- the command


def test_against_diffusers(tmp_path, tiny, capsys):
    """Every part runs, on both sides with the same result, and is kept."""
    made = run(tmp_path, "--against", "diffusers")
    assert (
        made["command"].startswith("bench.py --against diffusers --quick")
        and made["device"] == "cpu"
    )
    assert {"torch", "diffusers", "transformers", "Python"} <= made["versions"].keys() and len(
        made["date"]
    ) == 10
    assert made["machine"].keys() == {"processor", "cores", "threads", "system"}
    rows, printed = made["rows"], capsys.readouterr().out
    kinds = {row["name"].split(",")[0] for row in rows}
    assert kinds == {
        "cold start",
        "load",
        "text",
        "step",
        "decode",
        "encode",
        "saving",
        "prompt to PNG",
    }
    for row in rows:
        assert (
            row["ours"] > 0
            and row["ratio"] == row["ours"] / row["theirs"]
            and f"| {row['name']} |" in printed
        )
        assert row["difference"] is None or row["difference"] < 0.05, row["name"]
        assert row["runs"] in (None, 2) and row["reached"] in (None, True, False)
    assert {
        row["name"] for row in rows if row["difference"] is not None and row["unit"] != "s"
    } == set()
    assert sum(row["difference"] is not None for row in rows) == 3 + 4 + 4  # text, steps, pictures


def test_floor(tmp_path, tiny):
    rows = run(tmp_path, "--floor")["rows"]
    assert [row["against"] for row in rows] == ["floor"] * len(steps.FAMILIES) and all(
        row["theirs"] > 0 for row in rows
    )


def test_start(monkeypatch, capsys):
    """Over `import torch` alone; each in turn, after one run that is not counted."""
    seconds, seen = {"import torch": 1.0, "import diffusers": 4.0, "import flux": 1.05}, []

    def pretended(arguments: list[str]) -> tuple[float, str]:
        seen.append(
            next(
                (name for name, code in start.IMPORTS.items() if arguments == ["-c", code]),
                "sample",
            )
        )
        return seconds.get(seen[-1], 3.0), ""

    monkeypatch.setattr(start, "run", pretended)
    assert bench.main(["--rounds", "1"]) == 0
    names = ["import torch", "import flux", "import diffusers", "sample"]
    assert seen == names + names + names[::-1]
    printed = capsys.readouterr().out
    assert "| import flux | 1.05 s | import torch 1 s | 1.05 | ≤ 1.10 |" in printed
    assert "| sample.py, prompt to picture | 3 s | import torch 1 s | 3.00 |  |" in printed


def test_float8_says_how_far_it_is_off():
    """On the CPU it gains nothing, but computes the same."""
    setting = Setting(torch.device("cpu"), 1, **TINY)
    error, seconds = full.float8_rows(
        "step", full.stepping(bench.get_spec("flux.2-tiny"), 64, "cpu"), setting
    )
    assert 0.001 < error.ours < 0.2 and error.reached is None
    assert seconds.against == "bfloat16" and seconds.goal == 0.72 and seconds.theirs > 0


def test_references(tmp_path, tiny):
    rows = run(tmp_path, "--references")["rows"]
    assert len(rows) == 9 and all(row["against"] == "at every step" for row in rows)
    for seconds, small, _ in (
        rows[k : k + 3] for k in (0, 3, 6)
    ):  # a gain of 0.9 of that in FLOPs is the goal
        assert seconds["goal"] == pytest.approx(small["ratio"] / 0.9) and small["ratio"] < 1


def test_what_was_measured_before_a_failure_is_kept(tmp_path, tiny, monkeypatch):
    def fails(setting):
        yield Row("first", "s", 1.0)
        raise torch.OutOfMemoryError

    monkeypatch.setattr(floor, "floor_rows", fails)
    with pytest.raises(torch.OutOfMemoryError):
        run(tmp_path, "--floor")
    assert [
        row["name"] for row in json.loads((tmp_path / "made" / "a.json").read_text())["rows"]
    ] == ["first"]


def test_a_whole_model(tmp_path, tiny):
    rows = run(tmp_path, "--model", "FLUX.2-tiny", "--against", "diffusers")["rows"]

    def stages_of(against):
        return [
            row["name"].split(",")[0]
            for row in rows
            if row["against"] == against and row["unit"] == "s"
        ]

    assert stages_of("floor") == ["text", "step", "decode", "all but the steps", "prompt to PNG"]
    assert stages_of("diffusers") == ["text", "step", "decode", "prompt to PNG"]
    assert all(row["difference"] < 0.05 for row in rows if row["difference"] is not None)


def test_a_whole_model_needs_no_diffusers(tmp_path, tiny, monkeypatch):
    for name in ("diffusers", "transformers"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    rows = run(tmp_path, "--model", "flux.2-tiny", "--floor")["rows"]
    assert {row["against"] for row in rows if row["theirs"] is not None} == {"floor"}


def test_a_result_is_never_overwritten(tmp_path, tiny):
    run(tmp_path, "--floor")
    run(tmp_path, "--floor")
    assert sorted(path.name for path in (tmp_path / "made").iterdir()) == ["a-2.json", "a.json"]


class Loss(NamedTuple):
    mode: str
    psnr: float


def test_lossy(tmp_path, tiny, capsys, monkeypatch):
    import benchmarks.lossy as loss

    monkeypatch.setattr(
        loss, "losses", lambda prompts: [Loss("float32", math.inf), Loss("--quantize fp8", 31.26)]
    )
    made = run(tmp_path, "--lossy")
    assert made["rows"] == []
    assert made["losses"] == [
        {"mode": "float32", "psnr": None},
        {"mode": "--quantize fp8", "psnr": 31.26},
    ]
    assert (
        "| mode | psnr |\n|---|---|\n| float32 | inf |\n| --quantize fp8 | 31.3 |"
        in capsys.readouterr().out
    )


def refused(capsys, *arguments: str) -> str:
    assert bench.main(list(arguments)) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.py: ") and error.count("\n") == 1
    return error


def test_refuses_what_cannot_be_measured(tmp_path, capsys, monkeypatch):
    assert "--rounds 0" in refused(capsys, "--rounds", "0")
    assert "flux.2-klein-4b" in refused(capsys, "--model", "flux.2-klein-4")
    assert "--device tpu" in refused(capsys, "--device", "tpu")
    assert ".json" in refused(capsys, "--json", str(tmp_path / "a.txt"))
    (tmp_path / "file").touch()
    assert "cannot be written" in refused(capsys, "--json", str(tmp_path / "file" / "a.json"))
    monkeypatch.setattr(bench, "installed", lambda library: None)
    assert "pip install -e '.[test]'" in refused(capsys, "--against", "diffusers")


def test_refuses_a_model_that_does_not_fit(capsys, monkeypatch):
    """With numbers: 12 billion weights, two bytes each."""
    monkeypatch.setattr(full, "free_memory", lambda device: 20e9)
    error = refused(capsys, "--model", "flux.1-dev", "--device", "cpu")
    assert (
        "23.8 GB" in error
        and "20.0" in error
        and sum(p.numel() for p in meta(FLUX1).parameters()) == 11_901_408_320
    )


def meta(config) -> Flux:
    with torch.device("meta"):
        return Flux(config)
