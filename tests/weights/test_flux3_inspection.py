"""What `inspect` says of files of FLUX 3: released sizes, quantized files, LoRAs, text encoders."""

import json
from functools import partial
from pathlib import Path

import pytest
import torch
from support.quantized_files import (
    fp8_by_row,
    int8,
    mxfp8,
    nvfp4,
    random_state,
    save_gguf_q8_0,
    save_quantized,
)
from support.weight_files import hollow, saved

from flux.configs import MODELS
from flux.language_model import LanguageModel
from flux.parity.reference3 import tiny_models3, transformer3_to_diffusers
from flux.transformer3 import Flux3
from flux.weights.inspection import inspect

BASE, DISTILLED = "flux.3-image-klein-base", "flux.3-image-klein"
FORMATS = {  # writer, class of the layers
    "fp8": (fp8_by_row, "FP8Linear"),
    "nvfp4": (partial(nvfp4, swizzled=False), "NVFP4Linear"),
    "int8": (partial(int8, group=16), "Int8Linear"),
    "mxfp8": (mxfp8, "MXFP8Linear"),
}


def told(path: Path) -> dict[str, str]:
    found = inspect(path)
    assert not found.refusal
    return dict(found.lines)


def of_manifest(path: Path, name: str, prefix: str = "", **more: tuple[int, ...]) -> Path:
    """Write a file with a released model's names and shapes."""
    manifest = Path(__file__).parents[1] / f"manifests/{name}.json"
    tensors = json.loads(manifest.read_text())["tensors"]
    return hollow(
        path, {prefix + name: tuple(shape) for name, (_, shape) in tensors.items()} | more
    )


@pytest.fixture
def tiny(monkeypatch):
    rows = tiny_models3()
    for name, row in rows.items():
        monkeypatch.setitem(MODELS, name, row)
    return rows


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
@pytest.mark.parametrize("name, file", [(DISTILLED, "flux3-klein"), (BASE, "flux3-klein-base")])
def test_released_transformers(tmp_path, name, file, prefix):
    found = told(of_manifest(tmp_path / "x.safetensors", file, prefix))
    assert found["kind"] == "a FLUX 3 transformer" and not {"note", "refused"} & found.keys()
    assert found["fits"] == f"{name}; pass it as `transformer`"
    assert found["network"].startswith("5 mode and 28 single blocks of width 3072, 128 channels")
    assert found["network"].endswith("a flow map" if name == DISTILLED else "a base model")
    assert found.get("prefix", "") == prefix


@pytest.mark.parametrize("format", [*FORMATS, "gguf"])
def test_quantized_transformers(tmp_path, tiny, format):
    network = Flux3(tiny[BASE].transformer)
    layers = ["single_blocks.0.q_proj", "txt_mode_blocks.0.mlp_out"]
    if format == "gguf":
        path, _ = save_gguf_q8_0(tmp_path / "x.gguf", layers, random_state(network))
        kind = "GGUFLinear (Q8_0)"
    else:
        write, kind = FORMATS[format]
        path = save_quantized(tmp_path / "x.safetensors", write(layers, random_state(network)))
    found = told(path)
    assert found["kind"] == "a FLUX 3 transformer" and "refused" not in found
    assert found["quantized"] == f"2 {kind}"
    assert found["fits"] == f"{BASE}; pass it as `transformer`"


def test_layout_of_diffusers(tmp_path, tiny):
    theirs = transformer3_to_diffusers(Flux3(tiny[DISTILLED].transformer).state_dict())
    found = told(hollow(tmp_path / "x.safetensors", {n: tuple(x.shape) for n, x in theirs.items()}))
    assert found["kind"] == "a FLUX 3 transformer" and "refused" not in found
    assert found["fits"] == f"{DISTILLED}; pass it as `transformer`"


@pytest.mark.parametrize("layer, fits", [
    ("single_blocks.0.q_proj", [DISTILLED, BASE]),
    ("ref_time_in.in_layer", [DISTILLED]),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["diffusion_model.", "base_model.model.", "lora_unet_"])
def test_loras(tmp_path, tiny, layer, fits, layout):
    """Only the distilled model embeds its target time."""
    rows, columns = Flux3(tiny[DISTILLED].transformer).get_submodule(layer).weight.shape
    name = layout + (layer.replace(".", "_") if layout == "lora_unet_" else layer)
    down, up = ("lora_down", "lora_up") if layout == "lora_unet_" else ("lora_A", "lora_B")
    tensors = {f"{name}.{down}.weight": torch.ones(2, columns)}
    tensors[f"{name}.{up}.weight"] = torch.ones(rows, 2)
    found = told(saved(tmp_path / "x.safetensors", tensors))
    assert found["kind"] == "a LoRA" and "refused" not in found
    assert found["changes"] == "1 layers of transformer" and found["ranks"] == "2"
    assert found["fits"] == f"{', '.join(fits)}; pass it as `loras`"


def test_text_encoder_is_told_by_its_image_encoder(tmp_path):
    """Without one, it may be Qwen3 of the same sizes; what does not fit gives no notes."""
    path = tmp_path / "x.safetensors"
    found = told(of_manifest(path, "qwen3-vl-4b"))
    assert found["kind"] == "a language model" and "refused" not in found
    assert "flux.2-klein-4b" in found["fits"] and DISTILLED in found["fits"]
    assert found["note"].startswith("Qwen3-4B, of FLUX.2 [klein], and Qwen3-VL-4B, of FLUX 3")
    image_encoder = {"model.visual.blocks.0.attn.qkv.weight": (4, 4)}
    found = told(of_manifest(path, "qwen3-vl-4b", "model.language_model.", **image_encoder))
    assert found["fits"] == f"{DISTILLED}, {BASE}; pass it as `text_encoder`"
    assert not {"note", "refused"} & found.keys()
    found = told(of_manifest(path, "qwen3-8b"))
    assert "klein-9b" in found["fits"] and not {"note", "refused"} & found.keys()


def test_quantized_text_encoder(tmp_path, tiny):
    state = random_state(LanguageModel(tiny[BASE].text.model))
    layers = [name.removesuffix(".weight") for name in state if name.endswith("proj.weight")]
    written = int8(layers, state, group=16)
    found = told(save_quantized(tmp_path / "x.safetensors", written))
    assert found["quantized"] == f"{len(layers)} Int8Linear" and "refused" not in found
    assert DISTILLED in found["fits"] and BASE in found["fits"]
