"""Checkpoints of a whole model in the released size, as files that hold no bytes but a header."""

import json
import os
from math import prod
from pathlib import Path

import pytest
from support.tiny_repositories import write_tokenizers
from support.weight_files import entry, raw

import flux
from flux.weights.files import BITS
from flux.weights.quantization import FP8Linear

MANIFESTS = Path(__file__).parents[1] / "manifests"

FULL_SIZE = {  # model -> the lists of the released tensors behind each prefix of ComfyUI
    "flux.1-dev": {
        "model.diffusion_model.": "flux1-dev",
        "vae.": "ae-flux1",
        "text_encoders.clip_l.transformer.": "clip-l",
        "text_encoders.t5xxl.transformer.": "t5-xxl",
    },
    "flux.2-klein-4b": {
        "model.diffusion_model.": "klein-4b",
        "vae.": "ae-flux2",
        "text_encoders.qwen3_4b.transformer.": "qwen3-4b",
    },
    "flux.2-klein-9b": {  # 35 GB, which is more than the memory of many machines
        "model.diffusion_model.": "klein-9b",
        "vae.": "ae-flux2",
        "text_encoders.qwen3_8b.transformer.": "qwen3-8b",
    },
}


@pytest.mark.slow
@pytest.mark.parametrize("name", FULL_SIZE)
def test_checkpoint_of_the_released_size_is_placed_completely(tmp_path, name):
    """FLUX.1's is flux1-dev-fp8.safetensors: matrices of the transformer and T5 are float8."""
    write_tokenizers(tmp_path / "tokenizers", name)
    header, position = {}, 0
    for prefix, manifest in FULL_SIZE[name].items():
        held = json.loads((MANIFESTS / f"{manifest}.json").read_text())["tensors"]
        for layer, (dtype, shape) in held.items():
            cast = manifest in ("flux1-dev", "t5-xxl") and len(shape) == 2
            dtype = "F8_E4M3" if cast else dtype
            size = prod(shape) * BITS[dtype] // 8
            header[prefix + layer] = entry(dtype, shape, position, position + size)
            position += size
    path = raw(tmp_path / "all.safetensors", header)
    os.truncate(path, path.stat().st_size + position)  # a hole, which takes no space
    options = dict(weights=tmp_path, tokenizer=tmp_path / "tokenizers", device="cpu")
    with pytest.warns(UserWarning, match="also holds other networks"):
        pipe = flux.load(name, transformer=path, **options)
    networks = [pipe.transformer, pipe.autoencoder, *pipe.text.networks]
    assert all(network.files == [path] for network in networks)
    layers = [layer for network in networks for layer in network.shapes.modules()]
    float8 = sum(isinstance(layer, FP8Linear) for layer in layers)
    assert float8 == (314 + 24 * 7 if name == "flux.1-dev" else 0)
