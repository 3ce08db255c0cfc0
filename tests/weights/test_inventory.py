"""The sizes that are listed for files that are not there are those of the manifests."""

import json
from pathlib import Path

import pytest

from flux.configs import MODELS, QWEN3_4B, QWEN3_8B
from flux.language_model import LanguageModel
from flux.weights import inventory
from flux.weights.load import init_empty

MANIFESTS = Path(__file__).resolve().parents[1] / "manifests"


def manifest(name: str) -> int:
    return json.loads((MANIFESTS / f"{name}.json").read_text())["bytes"]


TRANSFORMERS = {
    "flux.1-dev": "flux1-dev", "flux.1-schnell": "flux1-schnell", "flux.1-fill-dev": "flux1-fill",
    "flux.1-canny-dev": "flux1-control", "flux.2-dev": "flux2-dev", "flux.2-klein-4b": "klein-4b",
    "flux.2-klein-9b": "klein-9b", "flux.2-dev-nvfp4": "flux2-dev-nvfp4",
    "flux.2-klein-4b-fp8": "klein-4b-fp8", "flux.2-klein-base-4b-fp8": "klein-4b-fp8",
    "flux.2-klein-4b-nvfp4": "klein-4b-nvfp4", "flux.2-klein-9b-kv-fp8": "klein-9b-fp8",
    "flux.2-klein-base-9b-nvfp4": "klein-9b-nvfp4", "flux.3-image-klein": "flux3-klein",
    "flux.3-image-klein-fp8r": "flux3-klein-fp8r",
    "flux.3-image-klein-nvfp4": "flux3-klein-nvfp4",
    "flux.3-image-klein-comfy-bf16": "flux3-klein",
    "flux.3-image-klein-comfy-int8-convrot": "flux3-klein-int8-convrot",
    "flux.3-image-klein-base-fp8r": "flux3-klein-base-fp8r",
    "flux.3-image-klein-base-nvfp4": "flux3-klein-base-nvfp4",
    "flux.3-image-klein-base-comfy-int8-convrot": "flux3-klein-base-int8-convrot",
}  # fmt: skip


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_transformer_has_the_size_of_its_manifest(name):
    assert inventory.file_size(MODELS[name], "transformer") == manifest(TRANSFORMERS[name])


def test_other_files_have_the_sizes_of_their_manifests():
    dev, redux = MODELS["flux.1-dev"], MODELS["flux.1-redux-dev"]
    for part, name in (("t5", "t5-xxl"), ("clip", "clip-l"), ("autoencoder", "ae-flux1")):
        assert inventory.file_size(dev, part) == manifest(name)
    for part in ("redux", "siglip"):
        assert inventory.file_size(redux, part) == manifest(part)
    lora = inventory.file_size(MODELS["flux.1-canny-dev-lora"], "lora")
    assert lora == manifest("flux1-control-lora")
    assert inventory.file_size(MODELS["flux.2-dev"], "autoencoder") == manifest("ae-flux2")
    klein = inventory.file_size(MODELS["flux.2-klein-4b"], "autoencoder")
    assert klein == pytest.approx(168_120_878, rel=1e-3)  # as Hugging Face lists the file
    for name, encoder in (("flux.2-klein-4b", "qwen3-4b"), ("flux.2-klein-9b", "qwen3-8b")):
        assert inventory.file_size(MODELS[name], "model") == manifest(encoder)
    assert inventory.file_size(MODELS["flux.3-image-klein"], "model") is None


def test_memory_counts_the_layers_that_are_read():
    for config in (QWEN3_4B, QWEN3_8B):
        network = init_empty(lambda config=config: LanguageModel(config))
        read = 2 * sum(parameter.numel() for parameter in network.parameters())
        assert inventory.TEXT_ENCODERS[config][1] == read
    expected = {
        "flux.1-dev": (33.7, 23.8),
        "flux.2-dev": (99.3, 64.4),
        "flux.2-tiny": (0.022, 0.012),
    }
    for name, sizes in expected.items():  # those of weights.md
        spec = MODELS[name]
        memory = inventory.memory_sizes(spec, inventory.inventory(spec))
        assert [bytes / 1e9 for bytes in memory] == pytest.approx(sizes, rel=0.03)


@pytest.mark.parametrize("name", MODELS)
def test_every_row_has_sizes_for_all_its_networks(name):
    spec = MODELS[name]
    files = inventory.inventory(spec)
    parts = {file.part for file in files}
    assert {"transformer", "autoencoder", *spec.text.networks, *spec.text.tokenizers} <= parts
    for file in files:
        known = file.size or inventory.file_size(spec, file.part)
        assert known or "tokenizer" in file.part or (spec.flux3 and file.part == "model")
