"""Our networks and pipelines against the tensors in `tests/golden`, which diffusers and transformers answered with once.

As the live tests, but without either library: what they computed stays on record, whatever becomes of them. Each file's
metadata names their versions; `scripts/dev/golden.py` makes the files anew. All is float32 on the CPU.
"""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import flux
from flux.configs import MODELS
from flux.parity.reference import (
    fingerprint,
    golden_networks,
    max_error,
    networks,
    tiny_models,
    write_weights,
)
from flux.weights.files import read_header

GOLDEN = Path(__file__).parent / "golden"
PIPELINES = sorted(path.stem.removeprefix("pipeline-") for path in GOLDEN.glob("pipeline-*"))

# Where the files were made, the answers are equal or 2e-6 apart, as in the live tests. Other processors draw, multiply and
# sum with other roundings: weights changed by 1e-7 at random, about a unit in their last place, moved answers by 3e-7 to
# 2.5e-6 of the largest value.
WITHIN = 1e-5


def golden(name: str, *modules: nn.Module) -> dict[str, dict[str, Tensor]]:
    """The tensors of a file by their kind: "in", "out" and "file". Fails if it was made with other weights."""
    path = GOLDEN / f"{name}.safetensors"
    tensors, kinds = load_file(path), {"in": {}, "out": {}, "file": {}}
    names = [tensor for module in modules for tensor in module.state_dict()]
    before, now = tensors.pop("fingerprint"), fingerprint(*modules)
    then = read_header(path)[1]["torch"]
    drawn = (
        f"torch {torch.__version__} draws other random weights here than {then} did for {path.name}"
    )
    for tensor, a, b in zip(names, before, now, strict=True):
        assert abs(a - b) <= 1e-5, f"{drawn}, in {tensor}: run scripts/dev/golden.py"
    for key, tensor in tensors.items():
        kind, _, rest = key.partition(".")
        kinds[kind][rest] = tensor
    return kinds


@pytest.fixture(scope="module")
def ours():
    return golden_networks()


@pytest.mark.parametrize("path", sorted(GOLDEN.glob("*")), ids=lambda path: path.stem)
def test_file_names_the_versions_that_made_it(path):
    metadata = read_header(path)[1]
    assert all(metadata[library][0].isdigit() for library in ("diffusers", "transformers", "torch"))
    assert path.stat().st_size < 700_000


def test_every_network_and_every_kind_of_pipeline_has_its_file(ours):
    names = {*ours, *(f"pipeline-{name}" for name in tiny_models(0))}
    assert names == {path.stem for path in GOLDEN.glob("*.safetensors")}


@pytest.mark.parametrize("name", ["flux.1-dev", "flux.1-schnell", "flux.2-dev", "flux.2-klein"])
@torch.no_grad()
def test_transformer(ours, name):
    given, expected, _ = golden(name, ours[name]).values()
    assert max_error(ours[name](**given), expected["velocity"]) <= WITHIN


@pytest.mark.parametrize("name", ["flux.1-autoencoder", "flux.2-autoencoder"])
@torch.no_grad()
def test_autoencoder(ours, name):
    given, expected, _ = golden(name, ours[name]).values()
    assert max_error(ours[name].encode(given["pixels"]), expected["encoded"]) <= WITHIN
    assert max_error(ours[name].decode(given["latents"]), expected["decoded"]) <= WITHIN


@pytest.mark.parametrize("name", ["t5", "clip", "qwen3", "mistral"])
@torch.no_grad()
def test_text_encoder(ours, name):
    given, expected, _ = golden(name, ours[name]).values()
    assert max_error(ours[name](**given), expected["features"]) <= WITHIN


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline(name, tmp_path, monkeypatch):
    """From prompts through files, tokens, features and latents to pictures, of which a pixel may be one level off."""
    path = GOLDEN / f"pipeline-{name}.safetensors"
    files = {key[5:]: tensor for key, tensor in load_file(path).items() if key.startswith("file.")}
    vocabulary = (
        json.loads(files["tokenizer/vocab.json"].numpy().tobytes())
        if "tokenizer/vocab.json" in files
        else {}
    )
    spec = tiny_models(len(vocabulary) - 1)[name]
    parts, metadata, home = (
        networks(spec),
        read_header(path)[1],
        tmp_path / spec.repository.split("/")[1],
    )
    expected = golden(path.stem, *parts.values())["out"]
    for file, content in files.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(content.numpy().tobytes())
    write_weights(home, spec, parts)
    monkeypatch.setitem(MODELS, name, spec)
    monkeypatch.delenv("FLUX_WEIGHTS", raising=False)

    pipe = flux.load(name, weights=tmp_path, device="cpu", dtype=torch.float32)
    features = pipe.encode(metadata["prompts"].split("\n"))
    assert max_error(features.tokens, expected["features"]) <= WITHIN
    assert features.pooled is None or max_error(features.pooled, expected["pooled"]) <= WITHIN
    guidance = float(metadata["guidance"]) if "guidance" in metadata else None
    latents = pipe.sample(
        features, (5, 6), 96, 64, 4, guidance, pipe.encode([""]) if spec.cfg else None
    )
    assert max_error(latents, expected["latents"]) <= WITHIN
    pictures = np.stack(pipe.decode(latents)).astype(int)
    assert (
        pictures.shape == (2, 64, 96, 3)
        and np.abs(pictures - expected["pictures"].numpy()).max() <= 1
    )


def test_this_passes_without_diffusers_and_transformers():
    """In a process that cannot import them. One pipeline of each family is enough there."""
    block = "import sys, pytest; sys.modules |= dict.fromkeys(('diffusers', 'transformers'))"
    this = [
        __file__,
        "-q",
        "-p",
        "no:cacheprovider",
        "-k",
        "not without_diffusers and not dev and not base",
    ]
    ran = subprocess.run(
        [sys.executable, "-c", f"{block}; sys.exit(pytest.main({this}))"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
