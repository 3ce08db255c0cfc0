"""scripts/dev/fullsize.py, on the toy's shapes: what it counts, against counts by hand; what it says is wrong. Never a time."""

import re
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.load_script import script

from flux.configs import MODELS
from flux.training.lora import add_lora
from flux.transformer import Flux
from flux.weights.files import read_header
from flux.weights.load import init_empty, load_module

SCRIPT = Path(__file__).parents[2] / "scripts" / "dev" / "fullsize.py"
TRAINED = (
    r"(double|single)_blocks\.\d+\.(img|txt)?_?(attn\.(qkv|proj)|mlp\.[02]|linear[12])\.weight"
)


def run(folder: Path, *flags: str) -> tuple[int, dict[str, str], str]:
    """Exit code, the rows of the table, what was said."""
    command = [sys.executable, SCRIPT, "--model", "flux.2-tiny", "--folder", folder, *flags]
    done = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, timeout=120
    )
    rows = [line.strip("| ").split(" | ") for line in done.stdout.splitlines()[2:]]
    return done.returncode, dict(rows), done.stderr


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run that wrote the file, and one that trained on it."""
    folder = tmp_path_factory.mktemp("fullsize")
    return folder, run(folder), run(folder, "--lora-rank", "3")


def test_it_loads_and_runs(measured):
    folder, (code, rows, said), _ = measured
    assert (code, said) == (0, "") and rows["written"].startswith("in ")
    assert (
        rows["velocity"].startswith("finite, ")
        and "256 image and 32 text tokens" in rows["one step"]
    )
    (file,) = folder.glob("flux-2-tiny.safetensors")
    assert rows["what"] == f"flux.2-tiny, {file.stat().st_size / 1e9:.3f} GB"


def test_a_lora_of_it_trains(measured):
    folder, _, (code, rows, said) = measured
    assert (code, said) == (0, "") and rows["written"] == "no, it was there"
    infos, _ = read_header(folder / "flux-2-tiny.safetensors")
    shapes = [info.shape for name, info in infos.items() if re.fullmatch(TRAINED, name)]
    assert rows["to train"] == f"{3 * sum(map(sum, shapes)):,} parameters: a LoRA of rank 3"
    assert rows["moved"] == f"{len(shapes)} of {len(shapes)} matrices B"
    assert (
        rows["as in the file"]
        == f"{len(infos)} of {len(infos)} tensors of the transformer, bit for bit"
    )
    losses = [
        float(re.search(r"loss ([\d.]+)", rows[f"{which} step"])[1])
        for which in ("first", "second")
    ]
    assert all(
        1 < loss < 4 for loss in losses
    )  # noise - latents has a variance of 2, and the velocity is small
    size = 2 * sum(prod(info.shape) for info in infos.values()) + 4 * 3 * sum(
        map(sum, shapes)
    )  # bfloat16, and float32
    told = [float(number) for number in re.findall(r"(\d+\.\d+)", rows["memory, told in advance"])]
    assert told[1] == pytest.approx(size / 1e9, rel=5e-3) and told[0] == pytest.approx(
        sum(told[1:]), rel=0.02
    )
    held = [float(number) for number in re.findall(r"(\d+\.\d+)", rows["memory at its peak"])]
    assert told[0] < held[1] <= held[0] < 2  # GB: torch alone takes more than the toy
    lora = load_file(folder / "lora.safetensors")
    assert (
        rows["lora.safetensors"] == f"{(folder / 'lora.safetensors').stat().st_size / 1e6:.1f} MB"
    )
    assert all(tensor.isfinite().all() and tensor.any() for tensor in lora.values())


@pytest.mark.parametrize("flags", [(), ("--lora-rank", "3")])
def test_what_is_not_finite_is_told(measured, tmp_path, flags):
    tensors = load_file(measured[0] / "flux-2-tiny.safetensors")
    tensors["final_layer.linear.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / "flux-2-tiny.safetensors")
    code, rows, said = run(tmp_path, *flags)
    assert code == 1 and (
        rows["velocity"].startswith("NOT FINITE")
        if not flags
        else "step 1: not finite (loss nan" in said
    )


def test_what_has_moved_and_should_not_is_told(measured, tmp_path):
    fullsize, (file,) = script("dev/fullsize"), measured[0].glob("flux-2-tiny.safetensors")
    path = Path(shutil.copy(file, tmp_path))
    network = init_empty(lambda: Flux(MODELS["flux.2-tiny"].transformer))
    load_module(network, [path])
    count, layers = len(network.state_dict()), add_lora(network, 2)
    for layer in layers[1:]:
        network.get_parameter(f"{layer}.lora_B.weight").data[0, 1] = 1e-3
    found, good = fullsize.result(network, path)
    assert not good and dict(found)["moved"] == f"{len(layers) - 1} of {len(layers)} matrices B"
    network.get_parameter(f"{layers[0]}.lora_B.weight").data[0, 1] = 1e-3
    assert fullsize.result(network, path)[1]
    moved = network.get_parameter(f"{layers[3]}.base.weight")
    moved.data = moved.data.clone()
    moved.data[1, 2] += 0.1
    found, good = fullsize.result(network, path)
    assert not good and dict(found)["as in the file"].startswith(f"{count - 1} of {count} tensors")


def test_a_rank_of_0_is_refused(tmp_path):
    assert run(tmp_path, "--lora-rank", "0") == (
        2,
        {},
        "fullsize.py: --lora-rank 0: must be at least 1\n",
    )
    assert not list(tmp_path.iterdir())
