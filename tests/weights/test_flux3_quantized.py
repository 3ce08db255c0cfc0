"""Quantized transformers of FLUX 3, in the layouts in which they are published or made by others.

The right values are those of the same network with the decoded weights.
"""

import re
import warnings
from functools import partial

import pytest
import torch
from support.quantized_files import (
    QuantizedFile,
    fp8_by_row,
    int8,
    mxfp8,
    nvfp4,
    random_state,
    save_gguf_q8_0,
    save_quantized,
)
from support.tokenizer_files import make_qwen
from support.transformer3_inputs import inputs
from support.weight_files import refusal, saved
from torch import nn

from flux.language_model import LanguageModel
from flux.parity.reference import FLUX3_TINY
from flux.parity.reference3 import tiny_models3
from flux.text_encoder import build_text_encoder
from flux.transformer3 import BLOCK_LISTS, Flux3
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.quantization import QuantizedLinear
from flux.weights.quantization.quantize import large_linears

PREFIX = "model.diffusion_model."  # ComfyUI's
FORMATS = {  # what is released -> its writer, and what stands before the names
    "fp8r": (fp8_by_row, ""),  # by Black Forest Labs: scales of rows, without a note
    "NVFP4": (partial(nvfp4, swizzled=False), ""),  # by Black Forest Labs: ModelOpt's layout
    "INT8 ConvRot": (partial(int8, group=16), PREFIX),
    "MXFP8": (mxfp8, PREFIX),
}


def block_layers(network: nn.Module) -> list[str]:
    """Return the matrices of all blocks."""
    parts = [(path, layer) for path, layer in network.named_modules() if "blocks." in path]
    return [path for path, layer in parts if isinstance(layer, nn.Linear)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", [*FORMATS, "GGUF"])
@torch.no_grad()
def test_quantized_file_equals_the_decoded_weights(name, dtype, tmp_path):
    network = Flux3(FLUX3_TINY)
    state, layers = random_state(network), block_layers(network)
    assert len(layers) == 6 * (3 * 2 + 3)
    if name == "GGUF":
        path, weights = save_gguf_q8_0(tmp_path / "x.gguf", layers, state)
    else:
        write, prefix = FORMATS[name]
        written = write(layers, state)
        weights = written.weights
        path = save_quantized(tmp_path / "x.safetensors", written._replace(prefix=prefix))
    assert infer_config(path) == FLUX3_TINY
    ours = init_empty(lambda: Flux3(FLUX3_TINY))
    load_module(ours, [path], dtype=dtype)
    quantized = {path for path, x in ours.named_modules() if isinstance(x, QuantizedLinear)}
    assert quantized == set(layers)
    network.load_state_dict(state | weights)
    expected = network.to(dtype).eval()(**inputs(FLUX3_TINY, dtype))
    assert (
        torch.equal(ours(**inputs(FLUX3_TINY, dtype)), expected) and expected.float().std() > 0.01
    )


@pytest.mark.parametrize("name", ["fp8r", "NVFP4"])
@torch.no_grad()
def test_matrices_left_in_bfloat16_stay_so(name, tmp_path):
    """Which ones the released files leave is not known: the file decides."""
    network = Flux3(FLUX3_TINY)
    state, layers = random_state(network), block_layers(network)[::2]
    write, prefix = FORMATS[name]
    written = write(layers, state)
    path = save_quantized(tmp_path / "x.safetensors", written._replace(prefix=prefix))
    ours = init_empty(lambda: Flux3(FLUX3_TINY))
    load_module(ours, [path], dtype=torch.bfloat16)
    found = {path for path, x in ours.named_modules() if isinstance(x, QuantizedLinear)}
    assert found == set(layers)
    network.load_state_dict(state | written.weights)
    batch = inputs(FLUX3_TINY, torch.bfloat16)
    assert torch.equal(ours(**batch), network.bfloat16()(**batch))


@pytest.mark.parametrize("name", FORMATS)
@torch.no_grad()
def test_quantized_time_embeddings_keep_the_times(name, tmp_path):
    """MXFP8 files quantize them, too. Their dtype is what times are rounded to: they are decoded.

    On the meta device they have the same shapes and dtypes.
    """
    network = Flux3(FLUX3_TINY)
    state = random_state(network)
    layers = [*block_layers(network)[::5], "time_in.in_layer", "time_in.out_layer"]
    write, prefix = FORMATS[name]
    written = write(layers, state)
    path = save_quantized(tmp_path / "x.safetensors", written._replace(prefix=prefix))
    ours, hollow = (init_empty(lambda: Flux3(FLUX3_TINY)) for _ in range(2))
    load_module(ours, [path], dtype=torch.bfloat16)
    load_module(hollow, [path], dtype=torch.bfloat16, device="meta")
    network.load_state_dict(state | written.weights)
    vec = network.bfloat16().vec(times := torch.tensor([0.9, 0.3]))
    assert vec.isfinite().all() and torch.equal(ours.vec(times), vec)
    shapes = [{n: (x.shape, x.dtype) for n, x in m.state_dict().items()} for m in (ours, hollow)]
    assert shapes[0] == shapes[1]


def fused(tensors: dict, name: str) -> dict:
    """Return the tensors with q, k and v of each block joined to one layer of this name."""
    out, joined = {}, {}
    for key, tensor in tensors.items():
        match = re.fullmatch(r"(.*)\.([qkv])_proj\.(\w+)", key)
        if match is None:
            out[key] = tensor
        else:
            joined.setdefault(f"{match[1]}.{name}.{match[3]}", []).append(tensor)
    for key, parts in joined.items():
        note = key.endswith("comfy_quant") or not parts[0].ndim
        out[key] = parts[0] if note else torch.cat(parts)
    return out


@pytest.mark.parametrize("layer", ["qkv", "attn.to_qkv"])
@pytest.mark.parametrize("name", ["bfloat16", "fp8r", "INT8 ConvRot"])
@torch.no_grad()
def test_fused_projections_equal_separate_ones(name, layer, tmp_path):
    """The layer's name is not known: whatever it is. A setting beside it is left out, and told."""
    network = Flux3(FLUX3_TINY)
    state, layers = random_state(network), block_layers(network)
    write, prefix = FORMATS.get(name, (lambda layers, state: QuantizedFile(state, {}), ""))
    written = write(layers, state)._replace(prefix=prefix)
    found = []
    for change in (dict, partial(fused, name=layer)):
        tensors = change(written.tensors)
        if change is not dict:
            tensors["single_blocks.0.attn_kernel"] = torch.zeros(1, dtype=torch.uint8)
        path = save_quantized(
            tmp_path / f"{len(found)}.safetensors", written._replace(tensors=tensors)
        )
        with warnings.catch_warnings(record=True) as told:
            warnings.simplefilter("always")
            assert infer_config(path) == FLUX3_TINY
            ours = init_empty(lambda: Flux3(FLUX3_TINY))
            load_module(ours, [path], dtype=torch.bfloat16)
        said = " ".join(str(warning.message) for warning in told)
        assert ("attn_kernel" in said) == (change is not dict)
        assert (f"{layer}': it is taken for them, in this order" in said) == (change is not dict)
        found.append(ours)
    batch = inputs(FLUX3_TINY, torch.bfloat16)
    assert torch.equal(found[0](**batch), found[1](**batch))
    kinds = [{type(x) for x in network.modules()} for network in found]
    assert kinds[0] == kinds[1]


def test_matrix_that_may_not_be_fused_is_refused(tmp_path):
    """Of another size, beside q_proj, or two of them."""
    whole = random_state(Flux3(FLUX3_TINY))
    joined = fused(whole, "qkv")
    key = "single_blocks.1.qkv.weight"
    cases = {
        "q_proj": joined | {"single_blocks.1.q_proj.weight": joined[key][:128].clone()},
        "rows": joined | {key: joined[key][:-1].clone()},
        "two": joined | {"single_blocks.1.other.weight": joined[key].clone()},
    }
    for name, tensors in cases.items():
        path = saved(tmp_path / f"{name}.safetensors", tensors)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = refusal(load_module, init_empty(lambda: Flux3(FLUX3_TINY)), [path])
        assert "missing" in said and "single_blocks.1" in said


def test_what_is_quantized_here_are_the_matrices_of_all_blocks():
    """Modulations, time, inputs and outputs act on every token, and stay as they are."""
    network = init_empty(lambda: Flux3(FLUX3_TINY))
    assert set(large_linears(network)) == set(block_layers(network))
    lists = [network.get_submodule(path) for path in BLOCK_LISTS]
    assert sum(map(len, lists)) * 6 == len(block_layers(network))


@pytest.mark.parametrize("prefix", ["model.", "model.language_model.", ""])
@pytest.mark.parametrize("write", [None, partial(int8, group=16)], ids=["bfloat16", "ConvRot"])
def test_text_encoder_in_one_file_equals_the_decoded_weights(prefix, write, tmp_path):
    """ComfyUI's files: with an image encoder, a final norm and more layers, which nothing reads."""
    spec = tiny_models3()["flux.3-image-klein"]
    make_qwen(tmp_path)
    state = random_state(LanguageModel(spec.text.model))
    layers = [name.removesuffix(".weight") for name in state if name.endswith("proj.weight")]
    written = write(layers, state) if write else QuantizedFile(state, {})
    more = {f"{prefix}norm.weight": torch.ones(2), f"{prefix}layers.5.x.weight": torch.ones(2)}
    more |= {"visual.blocks.0.x": torch.ones(2), "lm_head.weight": torch.ones(2, 2)}
    tensors = {prefix + name: tensor for name, tensor in written.tensors.items()} | more
    path = save_quantized(tmp_path / "x.safetensors", written._replace(tensors=tensors))
    decoded = saved(tmp_path / "decoded.safetensors", state | written.weights)
    found = [
        build_text_encoder(
            spec.text,
            {"model": [file], "tokenizer": tmp_path},
            spec.text_length,
            device=torch.device("cpu"),
            dtype=torch.float32,
        ).features("a red cat")
        for file in (path, decoded)
    ]
    assert torch.equal(found[0].tokens, found[1].tokens) and found[0].tokens.std() > 0.01
