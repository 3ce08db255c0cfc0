"""Our networks and pipelines against outputs of diffusers and transformers, in tests/golden.

The live tests check the same without records. These need neither library. The metadata of a file
name the versions that made it; scripts/dev/golden.py makes the files. All is float32 on the CPU.
"""

import json
import subprocess
import sys

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from support.golden_files import GOLDEN, golden

import flux
from flux.configs import MODELS
from flux.parity.reference import golden_networks, max_error, networks, tiny_models, write_weights
from flux.weights.files import read_header

PIPELINES = sorted(path.stem.removeprefix("pipeline-") for path in GOLDEN.glob("pipeline-*"))

# Where the files were made, outputs are equal or 2e-6 apart, as in the live tests. Other processors
# draw, multiply and sum with other rounding: weights changed by 1e-7 at random, about a unit in
# their last place, moved outputs by 3e-7 to 2.5e-6 of the largest value.
TOLERANCE = 1e-5


@pytest.fixture(scope="module")
def ours():
    return golden_networks()


def test_golden_files_name_the_versions_that_made_them():
    for path in GOLDEN.glob("*.safetensors"):
        metadata = read_header(path)[1]
        for library in ("diffusers", "transformers", "torch"):
            assert metadata[library][0].isdigit(), path.name
        assert path.stat().st_size < 700_000, path.name


def test_every_network_and_every_kind_of_pipeline_has_a_golden_file(ours):
    names = {*ours, *(f"pipeline-{name}" for name in tiny_models(0))}
    assert names == {path.stem for path in GOLDEN.glob("*.safetensors")}


@pytest.mark.parametrize(
    "name",
    [
        "flux.1-dev",
        "flux.1-schnell",
        "flux.2-dev",
        "flux.2-klein",
        "flux.3-klein-base",
        "flux.3-klein",
    ],
)
@torch.no_grad()
def test_transformer_gives_the_golden_velocity(ours, name):
    inputs, expected, _ = golden(name, ours[name]).values()
    assert max_error(ours[name](**inputs), expected["velocity"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["flux.1-autoencoder", "flux.2-autoencoder"])
@torch.no_grad()
def test_autoencoder_gives_the_golden_latents_and_pixels(ours, name):
    inputs, expected, _ = golden(name, ours[name]).values()
    assert max_error(ours[name].encode(inputs["pixels"]), expected["encoded"]) <= TOLERANCE
    assert max_error(ours[name].decode(inputs["latents"]), expected["decoded"]) <= TOLERANCE


@pytest.mark.parametrize("name", ["t5", "clip", "qwen3", "mistral"])
@torch.no_grad()
def test_text_encoder_gives_the_golden_features(ours, name):
    inputs, expected, _ = golden(name, ours[name]).values()
    assert max_error(ours[name](**inputs), expected["features"]) <= TOLERANCE


@pytest.mark.parametrize("name", PIPELINES)
def test_pipeline_gives_the_golden_images(name, tmp_path, monkeypatch):
    """From prompts through files, tokens, features and latents to images, at most one level off."""
    path = GOLDEN / f"pipeline-{name}.safetensors"
    files = {key[5:]: tensor for key, tensor in load_file(path).items() if key.startswith("file.")}
    vocabulary = {}
    if "tokenizer/vocab.json" in files:
        vocabulary = json.loads(files["tokenizer/vocab.json"].numpy().tobytes())
    spec = tiny_models(len(vocabulary) - 1)[name]
    parts, metadata = networks(spec), read_header(path)[1]
    expected = golden(path.stem, *parts.values())["out"]
    home = tmp_path / spec.repository.split("/")[1]
    for file, content in files.items():
        (home / file).parent.mkdir(parents=True, exist_ok=True)
        (home / file).write_bytes(content.numpy().tobytes())
    write_weights(home, spec, parts)
    monkeypatch.setitem(MODELS, name, spec)
    monkeypatch.delenv("FLUX_WEIGHTS", raising=False)

    pipe = flux.load(name, weights=tmp_path, device="cpu", dtype=torch.float32)
    features = pipe.encode(metadata["prompts"].split("\n"))
    assert max_error(features.tokens, expected["features"]) <= TOLERANCE
    assert features.pooled is None or max_error(features.pooled, expected["pooled"]) <= TOLERANCE
    guidance = float(metadata["guidance"]) if "guidance" in metadata else None
    negative = pipe.encode([""]) if spec.cfg else None
    latents = pipe.sample(features, (5, 6), 96, 64, 4, guidance, negative)
    assert max_error(latents, expected["latents"]) <= TOLERANCE
    images = np.stack(pipe.decode(latents)).astype(int)
    assert images.shape == (2, 64, 96, 3)
    assert np.abs(images - expected["pictures"].numpy()).max() <= 1


@pytest.mark.slow
def test_golden_tests_pass_without_diffusers_and_transformers():
    """Run in a process that cannot import them. One pipeline of each family is enough."""
    block = "import sys, pytest; sys.modules |= dict.fromkeys(('diffusers', 'transformers'))"
    selection = "not without_diffusers and not dev and not base"
    this = [__file__, "-q", "-p", "no:cacheprovider", "-k", selection]
    ran = subprocess.run(
        [sys.executable, "-c", f"{block}; sys.exit(pytest.main({this}))"],
        capture_output=True,
        text=True,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
