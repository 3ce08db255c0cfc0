"""flux.runtime.compilation: where compiled code is kept, and when compiling pays, by the counts."""

import json
import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from support.load_script import SCRIPTS, script
from torch._inductor.runtime.cache_dir_utils import default_cache_dir

from flux.configs import MODELS
from flux.runtime import compilation
from flux.runtime.devices import can_compile

sample = script("sample")
from benchmarks.count import GPUS
from benchmarks.full import text_tokens

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
COUNTED = json.loads((SCRIPTS / "benchmarks/counts.json").read_text())


def test_compiled_code_is_kept_in_a_private_folder_of_the_user(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = tmp_path / "flux/compiled"
    for _ in range(2):
        assert compilation.keep_compiled() == folder
    assert os.environ[VARIABLE] == str(folder) and folder.stat().st_mode & 0o077 == 0
    monkeypatch.setenv(VARIABLE, default_cache_dir())  # as torch's compiler does when imported
    assert compilation.keep_compiled() == folder
    monkeypatch.setenv(VARIABLE, "elsewhere")  # the user's choice
    assert str(compilation.keep_compiled()) == "elsewhere"


def test_folder_that_cannot_be_made_leaves_torch_its_own(monkeypatch, tmp_path):
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert compilation.keep_compiled() is None and VARIABLE not in os.environ


PROGRAM = """
import torch
from torch import nn
from torch._dynamo.utils import counters
from flux.runtime.compilation import compile_blocks, compile_seconds
from flux.t5 import MLPLayer, T5Config

assert compile_seconds() == 0
module = nn.Module()
config = T5Config(hidden_size=4, mlp_size=8)
module.blocks = nn.ModuleList(MLPLayer(config) for _ in range(2))
compile_blocks(module, ["blocks"])
with torch.no_grad():
    for block in module.blocks:
        block(torch.zeros(2, 3, 4))
print(*(counters["inductor"]["fxgraph_cache_" + name] for name in ("miss", "hit")))
assert compile_seconds() > 0
"""


@pytest.mark.slow
@pytest.mark.skipif(not can_compile(torch.device("cpu")), reason="needs a C++ compiler")
def test_second_process_reads_what_the_first_one_compiled(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name != VARIABLE}
    environment |= {"XDG_CACHE_HOME": str(tmp_path), "PYTHONPATH": str(SCRIPTS.parent)}
    for expected in ("1 0\n", "0 1\n"):  # one graph for both blocks: missed, then hit
        command = [sys.executable, "-c", PROGRAM]
        run = subprocess.run(command, env=environment, capture_output=True, text=True)
        assert run.stdout == expected, run.stderr


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize(
    "row", [row for row in COUNTED if row.endswith(", step") and "tiny" not in row]
)
def test_saving_is_at_most_what_is_counted(row, gpu):
    """And at least half of it: bytes are all of it, but for norms that are bound by their rows."""
    spec, count = MODELS[row.removesuffix(", step")], COUNTED[row]["ours"]
    saved = compilation.saved_seconds(
        spec.transformer, 4096 + text_tokens(spec), GPUS[gpu].bandwidth
    )
    counted = (count["elementwise"] - count["fused"]) / GPUS[gpu].bandwidth
    least = 0.5 if spec.flux3 else 0.75  # FLUX 3 modulates text and references apart, too
    assert least * counted <= saved <= counted


def test_compiling_text_encoder_and_autoencoder_would_pay_after_thousands_of_images():
    for row, sides in COUNTED.items():
        stage = row.split(", ")[1]
        if stage != "step" and "tiny" not in row:
            saved = sides["ours"]["eager"] - sides["ours"]["compiled"]
            assert compilation.SECONDS / saved > 5000, row


def test_bandwidth_is_read_and_written_bytes_over_seconds(monkeypatch):
    ticks = iter([0, 2, 10, 13, 20, 21, 30, 39, 40, 44])  # 2, 3, 1, 9 and 4 seconds
    monkeypatch.setattr(compilation, "perf_counter", lambda: next(ticks))
    assert compilation.measure_bandwidth(torch.device("cpu"), 300) == 2 * 300 / 3


# ------------------------------------------------------------------ what sample.py says


def advice(monkeypatch, capsys, passes: int, compile: bool = False, device: str = "cuda") -> str:
    """Return what is said for FLUX.1 [dev] at 1024x1024, on a GPU of 1 TB/s."""
    monkeypatch.setattr(compilation, "measure_bandwidth", lambda device: 1e12)
    monkeypatch.setattr("flux.runtime.devices.can_compile", lambda device: True)
    spec = MODELS["flux.1-dev"]
    pipe = SimpleNamespace(spec=spec, device=torch.device(device), text_tokens=spec.text_length)
    sample.advise_compilation(SimpleNamespace(compile=compile), pipe, 1024**2, None, passes)
    return capsys.readouterr().err


def test_compiling_is_recommended_where_it_pays(monkeypatch, capsys):
    """By hand: 30 passes x 57 blocks x 4608 tokens x 3072 channels x 2 bytes are 48.4 GB."""
    seconds = 2000 * 48.4e9 / 1e12
    said = advice(monkeypatch, capsys, 2000)
    assert f"note: --compile would save at least {seconds:.0f} s of this run" in said
    assert advice(monkeypatch, capsys, 50) == ""
    assert advice(monkeypatch, capsys, 2000, device="cpu") == ""


def test_compiling_is_announced_with_its_folder(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv(VARIABLE, str(tmp_path))
    said = advice(monkeypatch, capsys, 50, compile=True)
    assert said.startswith("compile: ") and str(tmp_path) in said and said.count("\n") == 1
