"""ComfyUI's single files of text encoders, in every format in which they are published.

The right values are features of the same network with decoded weights in the released layout.
"""

import pytest
import torch
from safetensors.torch import load_file
from support.quantized_files import (
    QuantizedFile,
    comfy_marker,
    comfy_notes,
    comfy_nvfp4,
    fp8_layers,
    json_bytes,
    plain_cast,
    save_quantized,
)
from support.tiny_repositories import home, tiny_repositories
from support.weight_files import saved
from torch import Tensor

import flux
from flux.text_encoder import build_text_encoder
from flux.weights.locate import locate

State = dict[str, Tensor]
T5, CLIP = ("flux.1-dev", "t5", "text_encoder_2"), ("flux.1-dev", "clip", "text_encoder")
QWEN = ("flux.2-klein-4b", "model", "text_encoder")
MISTRAL = ("flux.2-dev", "model", "text_encoder")


def half(layers: list[str], state: State) -> QuantizedFile:
    tensors = {name: tensor.half() for name, tensor in state.items()}
    return QuantizedFile(tensors, {name: tensor.float() for name, tensor in tensors.items()})


def bfloat16(layers: list[str], state: State) -> QuantizedFile:
    tensors = {name: tensor.bfloat16() for name, tensor in state.items()}
    return QuantizedFile(tensors, {name: tensor.float() for name, tensor in tensors.items()})


def scaled(layers: list[str], state: State) -> QuantizedFile:
    """Write t5xxl_fp8_e4m3fn_scaled: older names of scales, a marker, and the tokenizer."""
    file = fp8_layers(layers, state, scale_name="scale_weight", input_scale_name="scale_input")
    marker = torch.empty(0, dtype=torch.float8_e4m3fn)
    more = {"scaled_fp8": marker, "spiece_model": json_bytes({"pieces": []})}
    return QuantizedFile(file.tensors | more, file.weights)


def fp4_mixed(layers: list[str], state: State) -> QuantizedFile:
    """Write NVFP4 and float8 layers in turn, each with ComfyUI's note."""
    first, second = comfy_nvfp4(layers[::2], state), comfy_notes(layers[1::2], state)
    tensors = first.tensors | {
        name: tensor
        for name, tensor in second.tensors.items()
        if name.rpartition(".")[0] in layers[1::2]
    }
    return QuantizedFile(tensors, first.weights | second.weights)


def scaled_embedding(layers: list[str], state: State) -> QuantizedFile:
    """Write a float8 embedding with a scale, as ComfyUI's mixed precision allows."""
    embedding = "shared" if "shared.weight" in state else "model.embed_tokens"
    return comfy_notes([*layers, embedding], state)


CLIP_MORE = dict.fromkeys(["text_projection.weight", "logit_scale"], torch.ones(()))
CLIP_MORE |= {"text_model.embeddings.position_ids": torch.arange(77)[None]}
LM_MORE = {"model.norm.weight": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}
TEKKEN = LM_MORE | {"tekken_model": json_bytes({"vocab": []})}
FILES = {  # ComfyUI's name -> whose, how it is written, what else it holds
    "t5xxl_fp16": (T5, half, {"encoder.embed_tokens.weight": torch.ones(2)}),
    "t5xxl_fp8_e4m3fn": (T5, plain_cast, {}),
    "t5xxl_fp8_e4m3fn_scaled": (T5, scaled, {}),
    "t5xxl, scaled embedding": (T5, scaled_embedding, {}),
    "clip_l": (CLIP, half, CLIP_MORE),
    "qwen_3_4b": (QWEN, bfloat16, LM_MORE),
    "qwen_3_8b_fp8mixed": (QWEN, comfy_notes, LM_MORE),
    "qwen_3_4b, scaled embedding": (QWEN, scaled_embedding, LM_MORE),
    "mistral_3_small_flux2_bf16": (MISTRAL, bfloat16, TEKKEN),
    "mistral_3_small_flux2_fp8": (MISTRAL, comfy_marker, TEKKEN),
    "mistral_3_small_flux2_fp4_mixed": (MISTRAL, fp4_mixed, TEKKEN),
}


@pytest.fixture(scope="module")
def repositories(tmp_path_factory):
    names = [T5[0], QWEN[0], MISTRAL[0]]
    with tiny_repositories(tmp_path_factory.mktemp("weights"), names) as folder:
        yield folder


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("comfy", FILES)
def test_file_of_comfyui_equals_the_decoded_weights(repositories, tmp_path, comfy, dtype):
    (name, part, folder), write, more = FILES[comfy]
    spec = flux.MODELS[name]
    released = load_file(home(repositories, name) / folder / "model.safetensors")
    # Comfy-Org's language models have the prefix "model.", Mistral's repository another one.
    state = {layer.removeprefix("language_model."): tensor for layer, tensor in released.items()}
    layers = [
        layer.removesuffix(".weight")
        for layer, tensor in state.items()
        if layer.endswith("proj.weight") or (part == "t5" and is_linear(layer, tensor))
    ]
    assert layers
    written = write(layers, state)
    path = save_quantized(
        tmp_path / f"{comfy}.safetensors",
        written._replace(tensors=written.tensors | more, prefix=""),
    )
    decoded = saved(tmp_path / "decoded.safetensors", state | written.weights)
    found = [
        build_text_encoder(
            spec.text,
            locate(spec, repositories, {part: [file]}),
            spec.text_length,
            device=torch.device("cpu"),
            dtype=dtype,
        ).features("a red cat")
        for file in (path, decoded)
    ]
    assert torch.equal(found[0].tokens, found[1].tokens)
    assert part != "clip" or torch.equal(found[0].pooled, found[1].pooled)


def is_linear(name: str, tensor: Tensor) -> bool:
    embeddings = ("shared", "embed_tokens", "relative_attention_bias")
    return tensor.ndim == 2 and not any(part in name for part in embeddings)
