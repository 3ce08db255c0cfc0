"""Quantized transformers in diffusers' layout, where q, k and v are quantized one by one.

The right values: the velocity of diffusers' classes with decoded weights, bit for bit.
"""

from dataclasses import replace

import gguf
import pytest
import torch
from gguf import GGMLQuantizationType
from support.lora_files import random
from support.quantized_files import FORMATS, QuantizedFile, save_gguf, save_quantized
from support.transformer_inputs import inputs
from support.weight_files import refusal, saved
from torch import Tensor, nn

import flux.parity.reference as reference
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.runtime.streaming import stream
from flux.training.lora import add_lora
from flux.transformer import BLOCK_LISTS, Flux
from flux.weights.convert import convert
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.quantization import JoinedLinear, QuantizedLinear, enable_fp8_matmul

CONFIGS = {  # with the axes of RoPE that no file states
    "flux1": replace(reference.FLUX1_TINY, axes_dim=(4, 14, 14)),
    "klein": reference.KLEIN_TINY,
}
MORE = (
    *("ComfyUI, legacy", "by row", "by block", "INT8", "ConvRot", "MXFP8"),
    *("NVFP4, ComfyUI", "NVFP4, ModelOpt", "NF4"),
)
NAMES = ["BFL", "NF4, nested", *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)]
Q, V = (f"transformer_blocks.0.attn.to_{part}" for part in "qv")


@pytest.fixture(scope="module", params=CONFIGS)
def theirs(request) -> nn.Module:
    config = CONFIGS[request.param]
    network = reference.diffusers_transformer(config).to_empty(device="cpu")
    network.flux_config = config
    return reference.randomise(network)


def linears(theirs: nn.Module) -> list[str]:
    """Return the layers that a format of blocks can hold: also the last modulation."""
    return [
        name
        for name, layer in theirs.named_modules()
        if isinstance(layer, nn.Linear) and layer.in_features % 32 == 0
    ]


def quantized(theirs: nn.Module, name: str) -> QuantizedFile:
    file = FORMATS[name](linears(theirs), theirs.state_dict())
    if not name.startswith(("NVFP4", "by block")):
        return file._replace(prefix="")
    small, ends = 2.0**-13, ("scale_2", "scale_inv")  # or the random scales overflow
    tensors = {n: x * small if n.endswith(ends) else x for n, x in file.tensors.items()}
    weights = {n: x * small for n, x in file.weights.items()}
    return QuantizedFile(tensors, weights, file.metadata)


def load(path, **options) -> Flux:
    network = init_empty(lambda: Flux(infer_config(path)))
    load_module(network, [path], **options)
    return network


def require_velocity(network: Flux, theirs: nn.Module, weights: dict[str, Tensor]):
    config = theirs.flux_config
    state = {n: weights.get(n, x.float()) for n, x in theirs.state_dict().items()}
    decoded = reference.diffusers_transformer(config)
    reference.loaded(decoded, state)
    expected = reference.diffusers_velocity(decoded, **inputs(config))
    assert torch.equal(network(**inputs(config)), expected) and expected.std() > 1e-3


@pytest.mark.parametrize("name", NAMES)
def test_file_computes_the_velocity_of_diffusers(theirs, tmp_path, name):
    file = quantized(theirs, name)
    path = save_quantized(tmp_path / "x.safetensors", file)
    assert infer_config(path) == theirs.flux_config
    network = load(path, dtype=torch.float32, check_finite=True)
    require_velocity(network, theirs, file.weights)
    joined = [layer for layer in network.modules() if isinstance(layer, JoinedLinear)]
    config = theirs.flux_config
    single = config.depth_single if config.vector_dim else 0  # FLUX.2's linear1 is one layer
    assert len(joined) == 2 * config.depth + single + 1


def test_gguf_with_other_types_for_q_k_and_v(theirs, tmp_path):
    """llama.cpp's mixtures give v a finer type."""
    arrays = {name: tensor.float().numpy() for name, tensor in theirs.state_dict().items()}
    weights, tensors = {}, dict(arrays)
    for i, layer in enumerate(linears(theirs)):
        kind = (GGMLQuantizationType.Q8_0, GGMLQuantizationType.Q4_0, None)[i % 3]
        if kind:
            raw = gguf.quantize(arrays[f"{layer}.weight"], kind)
            tensors[f"{layer}.weight"] = raw, kind.name
            decoded = torch.from_numpy(gguf.dequantize(raw, kind).copy())
            weights[f"{layer}.weight"] = decoded
    path = save_gguf(tmp_path / "x.gguf", tensors)
    require_velocity(load(path, dtype=torch.float32, check_finite=True), theirs, weights)


def test_joined_layer_is_a_layer_like_others(theirs, tmp_path):
    """A LoRA is merged into it or trained on it, its blocks are streamed, and it is converted."""
    file = quantized(theirs, "NF4, nested")
    path = save_quantized(tmp_path / "x.safetensors", file)
    qkv = "double_blocks.0.img_attn.qkv"
    weight = torch.cat([file.weights[f"transformer_blocks.0.attn.to_{x}.weight"] for x in "qkv"])
    network = load(path, dtype=torch.float32)
    streamed = stream(load(path, dtype=torch.float32), BLOCK_LISTS, torch.device("cpu"))
    given = inputs(theirs.flux_config)
    assert torch.equal(streamed(**given), network(**given))

    a, b = random(4, weight.shape[1]), random(len(weight) // 3, 4, seed=1)
    lora = {f"transformer.{V}.lora_A.weight": a, f"transformer.{V}.lora_B.weight": b}
    shapes = {"transformer": init_empty(lambda: Flux(infer_config(path)))}
    deltas = match_layers(read_lora(saved(tmp_path / "l.safetensors", lora)), shapes)
    merge(network, [(delta, 0.5) for delta in deltas])
    weight[-len(b) :] += 0.5 * (b @ a)
    assert reference.max_error(network.get_submodule(qkv).weight, weight) < 1e-6

    trained = load(path, dtype=torch.float32)
    paths = add_lora(trained, 2)
    assert qkv in paths and not any("parts" in path for path in paths)

    convert(path, tmp_path / "plain.safetensors", "bf16")
    plain = load(tmp_path / "plain.safetensors").state_dict()
    before = load(path, dtype=torch.float32)
    for name, tensor in before.named_parameters():
        assert torch.equal(plain[name], tensor.bfloat16())
    for name, layer in before.named_modules():
        if isinstance(layer, QuantizedLinear) and ".parts" not in name:
            assert torch.equal(plain[f"{name}.weight"], layer.dequantize().bfloat16())


def test_parts_are_no_layers_of_their_own_for_float8_products(theirs, tmp_path):
    path = save_quantized(tmp_path / "x.safetensors", quantized(theirs, "BFL"))
    network = load(path, dtype=torch.float32)
    with pytest.warns(UserWarning, match="in another format"):
        left = enable_fp8_matmul(network)
    assert "double_blocks.0.img_attn.qkv" in left and not any("parts" in path for path in left)


def test_parts_that_do_not_fit_are_refused(theirs, tmp_path):
    def message(name: str, change: dict[str, Tensor | None]) -> str:
        file = quantized(theirs, name)
        held = {n: x for n, x in (file.tensors | change).items() if x is not None}
        path = save_quantized(tmp_path / "x.safetensors", file._replace(tensors=held))
        return refusal(load, path)

    rows, columns = theirs.state_dict()[f"{Q}.weight"].shape
    assert "no scale for" in message("by row", {f"{Q}.weight_scale": None})
    assert "1 missing" in message("NF4", {f"{V}.weight.absmax": None})
    assert "LLM.int8()" in message("INT8", {f"{V}.SCB": torch.ones(rows)})
    assert "has the scale -1" in message("INT8", {f"{V}.weight_scale": torch.tensor(-1.0)})
    for shape in ((rows + 1, columns), (rows, columns + 1), (rows // 2, columns), (rows,)):
        wrong = torch.zeros(shape, dtype=torch.int8)
        assert V in message("INT8", {f"{V}.weight": wrong})
    assert f"'{Q}.weight'" in message("BFL", {f"{V}.weight": None})
