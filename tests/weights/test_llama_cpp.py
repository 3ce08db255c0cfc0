"""Text encoders in GGUF under llama.cpp's names.

The `gguf` package gives the names and dequantizes; transformers undoes the order of Mistral's rows.
"""

from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from gguf import MODEL_ARCH, GGMLQuantizationType
from safetensors.torch import load_file
from support.quantized_files import random_state
from support.tiny_repositories import home, tiny_repositories
from support.weight_files import refusal
from torch import Tensor, nn

import flux
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.runtime.memory_plan import measure_weights
from flux.t5 import T5, T5Config
from flux.weights.files import TensorInfo
from flux.weights.llama_cpp_names import (
    halves_from_pairs,
    language_model_from_llama_cpp,
    t5_from_llama_cpp,
)
from flux.weights.load import init_empty, load_module
from flux.weights.quantization import GGUFEmbedding, GGUFLinear

SMALL_T5 = T5Config(vocab_size=96, hidden_size=64, head_dim=32, num_heads=2, mlp_size=96, depth=2)
QWEN = LanguageModelConfig(
    layers=(1, 2),
    vocab_size=96,
    hidden_size=64,
    mlp_size=96,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
MISTRAL = replace(QWEN, qk_norm=False)
KINDS = {  # network, configuration, GGUF's architecture, prefix of transformers' names
    "T5": (T5, SMALL_T5, MODEL_ARCH.T5ENCODER, ""),
    "Qwen3": (LanguageModel, QWEN, MODEL_ARCH.QWEN3, "model."),
    "Mistral": (LanguageModel, MISTRAL, MODEL_ARCH.LLAMA, "model."),
}
RENAMES = [("T5", t5_from_llama_cpp)]
RENAMES += [(kind, language_model_from_llama_cpp) for kind in ("Qwen3", "Mistral")]


def permute(rows: np.ndarray, heads: int) -> np.ndarray:
    """Order the rows of q and k as `LlamaModel.permute` in llama.cpp's convert_hf_to_gguf.py."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def write(path, kind: str, state: dict[str, Tensor], types=None, config=None):
    """Write a state under llama.cpp's names; return the path and the weights that it stands for.

    types: dimensions of a tensor -> ggml's type; None: float32.
    """
    _, small, arch, prefix = KINDS[kind]
    config = config or small
    names = gguf.get_tensor_name_map(arch, 8)
    writer, decoded = gguf.GGUFWriter(path, gguf.MODEL_ARCH_NAMES[arch]), {}
    for name, tensor in state.items():
        layer = names.get_name(f"{prefix}{name}", try_suffixes=(".weight",))
        assert layer, name
        array = tensor.float().numpy()
        role = "embedding" if "token_embd" in layer else array.ndim
        type = None if "attn_rel_b" in layer else (types or {}).get(role)  # as in llama.cpp
        if type:
            raw = gguf.quantize(array, GGMLQuantizationType[type])
            array = gguf.dequantize(raw, GGMLQuantizationType[type])
        decoded[name] = torch.from_numpy(array.copy())
        heads = {"q_proj": "num_heads", "k_proj": "num_kv_heads"}.get(name.split(".")[-2])
        if kind == "Mistral" and heads:
            array = permute(array, getattr(config, heads))
        if type:
            raw = gguf.quantize(array, GGMLQuantizationType[type])
            writer.add_tensor(layer, raw, raw_dtype=GGMLQuantizationType[type])
        else:
            writer.add_tensor(layer, np.ascontiguousarray(array))
    writer.add_array("tokenizer.ggml.tokens", ["a", "b"])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path, decoded


def text_network(kind: str, path, dtype=torch.float32, config=None):
    """Load the network as `flux.load` does."""
    build, config = KINDS[kind][0], config or KINDS[kind][1]
    options = dict(dtype=dtype, device="cpu")
    module = init_empty(lambda: build(config))
    if kind == "T5":
        load_module(module, [path], rename=t5_from_llama_cpp, **options)
        return module

    def reorder(info, rows, metadata):
        return halves_from_pairs(info, rows, metadata, config.head_dim)

    load_module(module, [path], rename=language_model_from_llama_cpp, reorder=reorder, **options)
    return module


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", KINDS)
def test_quantized_text_encoder_equals_one_with_the_decoded_weights(tmp_path, kind, dtype):
    """Matrices in Q8_0, the embedding in Q5_0, norms in float32, as llama.cpp's files have them."""
    build, config, *_ = KINDS[kind]
    state = random_state(build(config))
    types = {2: "Q8_0", "embedding": "Q5_0"}
    path, decoded = write(tmp_path / "x.gguf", kind, state, types)
    ours = text_network(kind, path, dtype)
    quantized = {type(layer) for layer in ours.modules() if isinstance(layer, GGUFLinear)}
    assert quantized == {GGUFLinear, GGUFEmbedding}
    theirs = init_empty(lambda: build(config))
    cast = {name: tensor.to(dtype) for name, tensor in decoded.items()}
    theirs.requires_grad_(False).load_state_dict(cast, strict=True, assign=True)
    ids = torch.arange(10).view(2, 5)
    given = [ids] if kind == "T5" else [ids, torch.ones(2, 5, dtype=torch.bool)]
    with torch.inference_mode():
        assert torch.equal(ours(*given), theirs(*given))


@pytest.mark.slow  # imports transformers
def test_rows_of_mistral_are_ordered_as_transformers_orders_them():
    from transformers.modeling_gguf_pytorch_utils import LlamaTensorProcessor

    rows = torch.randn(4 * 32, 16)
    theirs = LlamaTensorProcessor(config={})._reverse_permute_weights(rows.numpy(), 4)
    for architecture in ("llama", "mistral3"):
        assert np.array_equal(reordered("blk.3.attn_q.weight", rows, architecture), theirs)


@pytest.mark.parametrize(
    "name, architecture",
    [
        ("blk.3.attn_q.weight", "qwen3"),
        ("blk.3.attn_v.weight", "llama"),
        ("blk.3.attn_q_norm.weight", "llama"),
        ("blk.3.ffn_up.weight", "mistral3"),
        ("model.layers.3.self_attn.q_proj.weight", "llama"),
        ("model.layers.3.self_attn.q_proj.weight", None),
    ],
)
def test_other_rows_keep_their_order(name, architecture):
    rows = torch.randn(4 * 32, 16)
    assert reordered(name, rows, architecture) is rows


@pytest.mark.parametrize("architecture", [None, "qwen2vl", 7])
def test_unknown_order_of_rows_is_refused(architecture):
    message = refusal(reordered, "blk.0.attn_k.weight", torch.zeros(64, 2), architecture)
    assert message.startswith(f"x.gguf has the architecture {architecture!r} and not qwen3")


def reordered(name: str, rows: Tensor, architecture: object) -> Tensor:
    info = TensorInfo("F32", tuple(rows.shape), Path("x.gguf"), name)
    return halves_from_pairs(info, rows, {"general.architecture": architecture}, 32)


@pytest.mark.parametrize("kind, rename", RENAMES)
def test_names_are_those_of_the_gguf_package(kind, rename):
    """Of all tensors of twelve layers, and of what is not read."""
    build, config, arch, prefix = KINDS[kind]
    names = gguf.get_tensor_name_map(arch, 12)
    deep = {"depth": 12} if kind == "T5" else {"layers": (12,)}
    for name in init_empty(lambda: build(replace(config, **deep))).state_dict():
        theirs = names.get_name(f"{prefix}{name}", (".weight",))
        assert rename(theirs) == name and rename(name) == name
    assert rename("output.weight") == "lm_head.weight"
    assert t5_from_llama_cpp("dec.blk.0.attn_q.weight").startswith("decoder.")


@pytest.mark.parametrize(
    "name, kind, argument, part",
    [
        ("flux.1-dev", "T5", "text_encoder_2", "text_encoder_2"),
        ("flux.2-klein-4b", "Qwen3", "text_encoder", "text_encoder"),
        ("flux.2-dev", "Mistral", "text_encoder", "text_encoder"),
    ],
)
def test_gguf_equals_the_released_layout(tmp_path, name, kind, argument, part):
    """In float32, with what a file of a whole language model holds besides."""
    with tiny_repositories(tmp_path, [name]) as weights:
        spec = flux.MODELS[name]
        released = load_file(home(weights, name) / part / "model.safetensors")
        state = {
            layer.removeprefix("language_model.").removeprefix("model."): tensor
            for layer, tensor in released.items()
            if "embed_tokens" not in layer or kind != "T5"
        }
        config = spec.text.t5 if kind == "T5" else spec.text.model
        path, _ = write(tmp_path / "x.gguf", kind, state, config=config)
        options = dict(weights=weights, device="cpu", dtype=torch.float32)
        ours, theirs = (flux.load(name, **options, **more) for more in ({argument: path}, {}))
        (network,) = [network for network in ours.text.networks if network.files == [path]]
        for one, other in zip(ours.text.networks, theirs.text.networks):
            found, expected = one().state_dict(), other().state_dict()
            assert found.keys() == expected.keys()
            assert all(torch.equal(found[layer], expected[layer]) for layer in expected)
        features = [pipe.text.encode(["a red cat"]) for pipe in (ours, theirs)]
        assert torch.equal(features[0].tokens, features[1].tokens)


def test_embedding_casts_moves_and_becomes_a_plain_one(tmp_path):
    """Only the rows change their dtype; the blocks stay as they are in the file."""
    state = random_state(T5(SMALL_T5))
    path, decoded = write(tmp_path / "x.gguf", "T5", state, {"embedding": "Q8_0"})
    module = text_network("T5", path)
    shared = module.shared
    ids = torch.tensor([[3, 0], [95, 3]])
    assert torch.equal(shared(ids), decoded["shared.weight"][ids])
    assert shared.weight.dtype == torch.uint8 and shared.weight.shape == (96, 64 // 32 * 34)
    module.to(torch.bfloat16)
    assert shared(ids).dtype == torch.bfloat16 and shared.weight.dtype == torch.uint8
    assert torch.equal(shared(ids), decoded["shared.weight"][ids].bfloat16())
    plain = shared.to_linear(shared.dequantize())
    assert isinstance(plain, nn.Embedding) and not plain.weight.requires_grad
    assert torch.equal(plain(ids), decoded["shared.weight"][ids])
    sizes = measure_weights(module.to("meta"), ["encoder.block"], torch.bfloat16)
    assert sizes.scratch == 0  # rows are decoded, never the table
