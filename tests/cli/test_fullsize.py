"""scripts/dev/fullsize.py on the toy's shapes: counts against counts by hand, and errors."""

import re
import shutil
import subprocess
import sys
from math import prod
from pathlib import Path
from types import ModuleType

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.load_script import script

from flux.configs import MODELS
from flux.parity.reference3 import tiny_models3
from flux.training.lora import add_lora
from flux.transformer import Flux
from flux.weights.files import read_header
from flux.weights.load import init_empty, load_module

pytestmark = pytest.mark.slow

SCRIPT = Path(__file__).parents[2] / "scripts" / "dev" / "fullsize.py"
FILE = "flux-2-tiny.safetensors"
TRAINED = (
    r"(double|single)_blocks\.\d+\.(img|txt)?_?(attn\.(qkv|proj)|mlp\.[02]|linear[12])\.weight"
)


class SameProcess:
    """A pool that calls functions here: no new process has to import torch."""

    def __init__(self, processes: int):
        pass

    def __enter__(self):
        return self

    def __exit__(self, *error):
        pass

    def apply(self, function, args):
        return function(*args)


@pytest.fixture
def fullsize(monkeypatch) -> ModuleType:
    module = script("dev/fullsize")
    monkeypatch.setattr(module, "get_context", lambda method: type("", (), {"Pool": SameProcess}))
    return module


def table(text: str) -> dict[str, str]:
    return dict(line.strip("| ").split(" | ") for line in text.splitlines()[2:])


def run(folder: Path, *flags: str) -> dict[str, str]:
    """Run the script in processes of its own. Return the rows of its table."""
    command = [sys.executable, SCRIPT, "--model", "flux.2-tiny", "--folder", folder, *flags]
    words = [str(word) for word in command]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    return table(done.stdout)


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Return the folder and the rows of a run that wrote the file, and of one that trained."""
    folder = tmp_path_factory.mktemp("fullsize")
    return folder, run(folder), run(folder, "--lora-rank", "3")


def numbers(text: str) -> list[float]:
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def test_file_loads_and_runs(measured):
    folder, rows, _ = measured
    assert rows["written"].startswith("in ") and rows["velocity"].startswith("finite, ")
    assert "256 image and 32 text tokens" in rows["one step"]
    assert rows["model"] == f"flux.2-tiny, {(folder / FILE).stat().st_size / 1e9:.3f} GB"


def test_lora_trains_and_is_saved(measured):
    folder, _, rows = measured
    assert rows["written"] == "no, the file exists"
    infos, _ = read_header(folder / FILE)
    shapes = [info.shape for name, info in infos.items() if re.fullmatch(TRAINED, name)]
    sides = sum(map(sum, shapes))
    assert rows["trainable"] == f"{3 * sides:,} parameters: a LoRA of rank 3"
    assert rows["changed"] == f"{len(shapes)} of {len(shapes)} matrices B"
    assert rows["equal to the file"] == f"{len(infos)} of {len(infos)} tensors of the transformer"
    for step in ("first step", "second step"):  # noise - latents has a variance of 2
        assert 1 < numbers(rows[step])[1] < 4
    size = 2 * sum(prod(info.shape) for info in infos.values()) + 4 * 3 * sides
    total, weights, *rest = numbers(rows["memory, predicted"])
    assert weights == pytest.approx(size / 1e9, rel=5e-3)  # bfloat16, and the LoRA in float32
    assert total == pytest.approx(weights + sum(rest), rel=0.02)
    resident, anonymous = numbers(rows["peak of memory"])
    assert total < anonymous <= resident < 2  # GB: torch alone takes more than the toy
    file = folder / "lora.safetensors"
    assert rows["lora.safetensors"] == f"{file.stat().st_size / 1e6:.1f} MB"
    assert all(tensor.isfinite().all() and tensor.any() for tensor in load_file(file).values())


@pytest.mark.parametrize("flags", [(), ("--lora-rank", "3")])
def test_nan_in_the_weights_is_reported(measured, fullsize, tmp_path, capsys, flags):
    tensors = load_file(measured[0] / FILE)
    tensors["final_layer.linear.weight"][3, 5] = torch.nan
    save_file(tensors, tmp_path / FILE)
    assert fullsize.main(["--model", "flux.2-tiny", "--folder", str(tmp_path), *flags]) == 1
    printed = capsys.readouterr()
    if flags:
        assert "step 1: not finite (loss nan" in printed.err
    else:
        assert table(printed.out)["velocity"].startswith("NOT FINITE")


def test_unchanged_lora_and_changed_weights_are_reported(measured, fullsize, tmp_path):
    path = Path(shutil.copy(measured[0] / FILE, tmp_path))
    network = init_empty(lambda: Flux(MODELS["flux.2-tiny"].transformer))
    load_module(network, [path])
    count, layers = len(network.state_dict()), add_lora(network, 2)
    for layer in layers[1:]:
        network.get_parameter(f"{layer}.lora_B.weight").data[0, 1] = 1e-3
    rows, good = fullsize.result(network, path)
    assert not good and dict(rows)["changed"] == f"{len(layers) - 1} of {len(layers)} matrices B"
    network.get_parameter(f"{layers[0]}.lora_B.weight").data[0, 1] = 1e-3
    assert fullsize.result(network, path)[1]
    base = network.get_parameter(f"{layers[3]}.base.weight")
    base.data = base.data.clone()
    base.data[1, 2] += 0.1
    rows, good = fullsize.result(network, path)
    expected = f"{count - 1} of {count} tensors"
    assert not good and dict(rows)["equal to the file"].startswith(expected)


@pytest.mark.parametrize("name", ["flux.3-image-klein-base", "flux.3-image-klein"])
def test_flux3_loads_and_runs(name, fullsize, tmp_path, monkeypatch, capsys):
    """The base model trains a LoRA, too, without the layers of references."""
    monkeypatch.setitem(MODELS, name, tiny_models3()[name])
    folder = ("--model", name, "--folder", str(tmp_path))
    assert fullsize.main([*folder]) == 0
    rows = table(capsys.readouterr().out)
    assert rows["velocity"].startswith("finite, ") and "80 text tokens" in rows["one step"]
    infos, _ = read_header(tmp_path / "model.safetensors")
    code = fullsize.main([*folder, "--lora-rank", "3"])
    if name == "flux.3-image-klein":
        assert code == 2 and "is a flow map" in capsys.readouterr().err
        return
    rows = table(capsys.readouterr().out)
    layer = r"(?!.*image_cond).*blocks\.(image\.)?\d+\.([qkv]_proj|attn_out|mlp_(in|out))\.weight"
    layers = [info.shape for name, info in infos.items() if re.fullmatch(layer, name)]
    assert code == 0 and rows["changed"] == f"{len(layers)} of {len(layers)} matrices B"
    assert rows["trainable"].startswith(f"{3 * sum(map(sum, layers)):,} parameters")
    for step in ("first step", "second step"):  # noise - latents has a variance of 2
        assert 1 < numbers(rows[step])[1] < 4


def test_wrong_flags_are_refused(fullsize, tmp_path, capsys):
    folder = ["--folder", str(tmp_path)]
    assert fullsize.main(["--model", "flux.2-tiny", "--lora-rank", "0", *folder]) == 2
    assert capsys.readouterr().err == "error: --lora-rank: must be from 1 to 1024 (got 0)\n"
    assert fullsize.main(["--model", "flux.3", *folder]) == 2
    assert capsys.readouterr().err.startswith("error: --model: ")
    assert not list(tmp_path.iterdir())
