"""Quantized files: tiny transformers in every format are read exactly, and bad files are refused.

tests/support/quantized_files.py writes each format from its description, and computes the weights
in float32. Equal means to the last bit; our networks with these weights are the reference.
"""

import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from support.quantized_files import (
    E4M3,
    E5M2,
    FORMATS,
    QuantizedFile,
    bfl_fp8,
    block_linears,
    fp8_by_block,
    fp8_layers,
    json_bytes,
    metadata_for,
    random,
    random_state,
    save_gguf,
    save_gguf_q8_0,
    save_quantized,
    to_fp8,
)
from support.weight_files import anonymous_memory, hollow, refusal
from torch import Tensor, nn

import flux
from flux.configs import EMBEDDED
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity.reference import relative_l2
from flux.runtime.lazy_module import LazyModule
from flux.t5 import T5, T5Config
from flux.text_encoder import language_model_ignore_keys, t5_ignore_keys
from flux.training.lora import add_lora
from flux.transformer import BLOCK_LISTS, Flux, FluxConfig
from flux.weights.load import infer_config, load_module
from flux.weights.quantization import (
    BlockFP8Linear,
    FP8Linear,
    QuantizedLinear,
    enable_fp8_matmul,
    fp8,
)

FLUX2 = FluxConfig(
    in_channels=16,
    out_channels=16,
    context_dim=48,
    hidden_size=64,
    num_heads=2,
    depth=1,
    depth_single=2,
    axes_dim=(8, 8, 8, 8),
    guidance=False,
)
FLUX1 = replace(
    FLUX2,
    axes_dim=(4, 14, 14),
    vector_dim=32,
    guidance=True,
    bias=True,
    gated_mlp=False,
    shared_modulation=False,
    theta=10000,
)


def empty(config: FluxConfig) -> Flux:
    with torch.device("meta"):
        return Flux(config)


# ---------------------------------------------------------------- whole networks


def inputs(config: FluxConfig, dtype: torch.dtype) -> dict[str, Tensor]:
    axes = len(config.axes_dim)
    given = dict(
        img=random(2, 6, config.in_channels, seed=1, size=1).to(dtype),
        img_ids=torch.arange(6 * axes).view(6, axes) % 5,
        txt=random(2, 3, config.context_dim, seed=2, size=1).to(dtype),
        txt_ids=torch.zeros(3, axes),
        t=torch.tensor([0.3, 0.8]),
    )
    given |= {"guidance": torch.tensor([2.0, 4.0])} if config.guidance else {}
    return given | (
        {"vector": random(2, config.vector_dim, seed=3, size=1).to(dtype)}
        if config.vector_dim
        else {}
    )


def save(folder: Path, name: str, config: FluxConfig) -> tuple[Path, dict[str, Tensor]]:
    """Write a random transformer in a format; return the file and the weights it stands for."""
    layers, state = block_linears(empty(config)), random_state(empty(config))
    if name == "GGUF":
        return save_gguf_q8_0(folder / "x.gguf", layers, state)
    file = FORMATS[name](layers, state)
    return save_quantized(folder / "x.safetensors", file), file.weights


@pytest.mark.parametrize("name", [*FORMATS, "GGUF"])
@pytest.mark.parametrize(
    "config, dtype",
    [(FLUX1, torch.bfloat16), (FLUX2, torch.float32)],
    ids=["FLUX.1-bfloat16", "FLUX.2-float32"],
)
def test_quantized_transformer_equals_one_with_the_decoded_weights(tmp_path, config, name, dtype):
    layers, state = block_linears(empty(config)), random_state(empty(config))
    path, weights = save(tmp_path, name, config)
    assert infer_config(path) == config

    expected = empty(config)
    whole = {name: weights.get(name, tensor).to(dtype) for name, tensor in state.items()}
    expected.requires_grad_(False).load_state_dict(whole, strict=True, assign=True)
    ours = empty(config)
    load_module(ours, [path], dtype=dtype)
    quantized = {
        p: layer for p, layer in ours.named_modules() if isinstance(layer, QuantizedLinear)
    }
    changed = {name.removesuffix(".weight") for name in weights if name.endswith(".weight")}
    linears = {p for p, layer in expected.named_modules() if isinstance(layer, nn.Linear)}
    assert quantized.keys() == changed & linears and len(quantized) >= len(layers) // 2
    for p, layer in quantized.items():
        assert (
            torch.equal(layer.dequantize(), weights[f"{p}.weight"])
            and layer.dequantize().dtype == torch.float32
        )
    assert all(p.dtype == dtype and torch.equal(p, whole[n]) for n, p in ours.named_parameters())
    with torch.inference_mode():
        given = inputs(config, dtype)
        assert torch.equal(ours(**given), expected(**given))


@pytest.mark.parametrize(
    "config, name",
    [
        (FLUX1, "BFL"),
        (FLUX2, "by row"),
        (FLUX1, "cast"),
        (FLUX2, "by block"),
        (FLUX1, "NVFP4"),
        (FLUX2, "NF4, nested"),
        (FLUX1, "GGUF"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_lora_on_a_quantized_file_has_the_gradients_of_the_decoded_weights(tmp_path, config, name):
    layers = block_linears(empty(config))
    path, _ = save(tmp_path, name, config)
    gradients = []
    for whole in (False, True):
        network = empty(config)
        load_module(network, [path], dtype=torch.float32)
        quantized = [
            (p, layer) for p, layer in network.named_modules() if isinstance(layer, QuantizedLinear)
        ]
        for p, layer in quantized if whole else ():
            network.set_submodule(p, layer.to_linear(layer.dequantize()))
        torch.manual_seed(0)
        add_lora(network, 2)
        learnt = {n: p for n, p in network.named_parameters() if p.requires_grad}
        for p in learnt.values():
            nn.init.normal_(p, std=0.1)
        network(**inputs(config, torch.float32)).square().sum().backward()
        assert learnt.keys() == {n for n in learnt if "lora_" in n} and len(learnt) >= 2 * len(
            layers
        )
        gradients.append({n: p.grad for n, p in learnt.items()})
    for n, gradient in gradients[1].items():
        assert gradient.norm() > 0
        assert relative_l2(gradients[0][n], gradient) < 1e-5, (
            n
        )  # a bias is added after the product here, and not in it


@pytest.mark.parametrize("name", ["ComfyUI, legacy", "cast", "GGUF"])
def test_mapped_bytes_are_counted_for_each_tensor(tmp_path, name):
    """Biases and norms are cast and take memory; quantized matrices stay the file's pages."""
    path, _ = save(tmp_path, name, FLUX1)
    cpu = torch.device("cpu")
    network = LazyModule(
        Flux, FLUX1, [path], device=cpu, dtype=torch.bfloat16, block_lists=BLOCK_LISTS
    )
    cast = [p for p in network.shapes.parameters() if p.dtype != torch.bfloat16]
    assert network.weight_sizes.mapped == network.nbytes - sum(2 * p.numel() for p in cast) and cast
    network()
    assert network.device_bytes == sum(2 * p.numel() for p in cast)
    network.set_transform(lambda module: None, ["single_blocks.0.linear1"])
    linear1 = network.shapes.single_blocks[0].linear1
    stays = network.nbytes - sum(2 * p.numel() for p in cast)
    assert network.weight_sizes.mapped == stays - 2 * linear1.in_features * linear1.out_features
    assert network.weight_sizes.merging == 14 * linear1.in_features * linear1.out_features
    network.quantize = "int8"
    assert "quantized already" in refusal(lambda: network.weight_sizes)


# ---------------------------------------------------------------- text encoders

T5_TINY = T5Config(vocab_size=40, hidden_size=32, head_dim=8, num_heads=4, mlp_size=48, depth=2)
QWEN = LanguageModelConfig(
    layers=(1, 2),
    vocab_size=40,
    hidden_size=160,
    mlp_size=144,
    num_heads=4,
    num_kv_heads=2,
    head_dim=32,
)
MISTRAL = replace(QWEN, qk_norm=False)


def t5_file(state: dict[str, Tensor], linears: list[str]) -> QuantizedFile:
    """Write t5xxl_fp8_e4m3fn_scaled: marker, `scale_weight`, tokenizer, an embedding only cast."""
    written = fp8_layers(linears, state, scale_name="scale_weight", input_scale_name="scale_input")
    embedding = state["shared.weight"].to(E4M3)
    extra = {
        "shared.weight": embedding,
        "scaled_fp8": torch.empty(0, dtype=E4M3),
        "spiece_model": json_bytes({}),
    }
    return QuantizedFile(
        written.tensors | extra, written.weights | {"shared.weight": embedding.float()}
    )


def mistral_file(state: dict[str, Tensor], linears: list[str]) -> QuantizedFile:
    """Write ComfyUI's: marker, `weight_scale`, tokenizer, and layers that are not read."""
    written = fp8_layers(linears, state)
    above = {
        name.replace("layers.1.", "layers.2."): tensor
        for name, tensor in written.tensors.items()
        if "layers.1." in name
    }
    named = {f"model.{name}": tensor for name, tensor in (written.tensors | above).items()}
    return QuantizedFile(
        named | {"scaled_fp8": torch.empty(0), "tekken_model": json_bytes({"vocab": []})},
        written.weights,
    )


def qwen_file(state: dict[str, Tensor], linears: list[str]) -> QuantizedFile:
    """Write Qwen/Qwen3-4B-FP8: blocks of 128x128; 160 and 144 are not multiples of 128."""
    written = fp8_by_block(linears, state)
    named = {f"model.{name}": tensor for name, tensor in written.tensors.items()}
    return QuantizedFile(
        named | {"lm_head.weight": random(40, 160), "model.norm.weight": random(160)},
        written.weights,
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "kind, config, write, unread, classes",
    [
        (T5, T5_TINY, t5_file, t5_ignore_keys, {FP8Linear}),
        (
            LanguageModel,
            MISTRAL,
            mistral_file,
            lambda name: language_model_ignore_keys(name, 2),
            {FP8Linear},
        ),
        (
            LanguageModel,
            QWEN,
            qwen_file,
            lambda name: language_model_ignore_keys(name, 2),
            {BlockFP8Linear},
        ),
    ],
    ids=["T5", "Mistral", "Qwen3"],
)
def test_quantized_text_encoder_equals_one_with_the_decoded_weights(
    tmp_path, kind, config, write, unread, classes, dtype
):
    with torch.device("meta"):
        ours, expected = kind(config), kind(config)
    state = random_state(ours)
    linears = [path for path, layer in ours.named_modules() if isinstance(layer, nn.Linear)]
    written = write(state, linears)
    load_module(
        ours, [save_quantized(tmp_path / "x.safetensors", written)], dtype=dtype, ignore_keys=unread
    )
    quantized = {
        path: type(layer)
        for path, layer in ours.named_modules()
        if isinstance(layer, QuantizedLinear)
    }
    assert quantized.keys() == set(linears) and set(quantized.values()) == classes
    whole = {name: written.weights.get(name, tensor).to(dtype) for name, tensor in state.items()}
    expected.requires_grad_(False).load_state_dict(whole, strict=True, assign=True)
    given = [torch.arange(10).view(2, 5)] + (
        [] if kind is T5 else [torch.ones(2, 5, dtype=torch.bool)]
    )
    with torch.inference_mode():
        assert torch.equal(ours(*given), expected(*given))


# ---------------------------------------------------------------- layers


def fp8_linear(weight: Tensor, bias: Tensor | None = None, **more: Tensor) -> FP8Linear:
    shapes = {"scale": more.get("weight_scale"), "input_scale": more.get("input_scale")}
    shapes = {
        name: None if tensor is None else tuple(tensor.shape) for name, tensor in shapes.items()
    }
    with torch.device("meta"):
        layer = FP8Linear(
            weight.shape[1], weight.shape[0], bias is not None, dtype=weight.dtype, **shapes
        )
    state = {"weight": weight, **more} | ({} if bias is None else {"bias": bias})
    layer.requires_grad_(False).load_state_dict(state, strict=True, assign=True)
    return layer


def test_every_float8_byte_is_decoded_and_scaled_in_float32():
    """OCP 8-bit floats: a sign, 4 and 3 bits with bias 7, or 5 and 2 bits with bias 15."""
    byte = torch.arange(256)
    for dtype, mantissa, bias, kept in (
        (E4M3, 3, 7, byte % 128 != 127),
        (E5M2, 2, 15, byte % 128 < 124),
    ):
        exponent, fraction = byte % 128 >> mantissa, (byte % 2**mantissa).double() / 2**mantissa
        size = torch.where(
            exponent == 0,
            fraction * 2.0 ** (1 - bias),
            (1 + fraction) * 2.0 ** (exponent.double() - bias),
        )
        value = torch.where(byte < 128, size, -size).float()
        scale = torch.tensor(0.0123)
        found = fp8_linear(byte.to(torch.uint8).view(dtype)[None], weight_scale=scale).dequantize()[
            0
        ]
        assert torch.equal(found[kept], (value * scale)[kept]) and not found[~kept].isfinite().any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("scale", [(), (256,), None], ids=str)
@pytest.mark.parametrize("format", [torch.float8_e4m3fn, torch.float8_e5m2], ids=str)
def test_fp8_weight_is_rounded_once_from_float32(format, scale, dtype):
    """Each byte but those of NaN, in each row."""
    layer = FP8Linear(256, 256, bias=False, dtype=format, scale=scale)
    numbers = torch.arange(256, dtype=torch.uint8).view(format)
    layer.weight.copy_(numbers.float().nan_to_num(1.0).to(format).expand(256, -1))
    if layer.weight_scale is not None:
        layer.weight_scale.copy_(torch.rand(scale, generator=torch.Generator().manual_seed(0)) / 9)
    assert torch.equal(layer.rounded_weight(dtype), layer.dequantize().to(dtype))


def test_fp8_by_row_equals_diffusers():
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight, scale = utils.quantize_fp8r(random(24, 40, size=1))
    assert scale.shape == (24,)
    assert torch.equal(
        fp8_linear(weight, weight_scale=scale).dequantize(),
        utils.dequantize_fp8r(weight, scale).float(),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_to_dtype_changes_only_the_bias(dtype):
    weight, scale = to_fp8(random(16, 32))
    layer = fp8_linear(weight, random(16), weight_scale=scale)
    whole = layer.dequantize()
    x = random(3, 32, size=1).to(dtype)
    layer.to(dtype)
    assert (
        layer.bias.dtype == dtype
        and layer.weight.dtype == E4M3
        and layer.weight_scale.dtype == torch.float32
    )
    assert torch.equal(layer(x), F.linear(x, whole.to(dtype), layer.bias))
    assert layer.to("meta").weight.is_meta and layer.weight.dtype == E4M3


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("by_row", [False, True])
def test_scaled_product_has_one_more_rounding_of_the_product(by_row, bias):
    """And none of the weights. Two equal roundings have an error of 1.41 times that of one."""
    weight, scale = to_fp8(random(96, 512), by_row=by_row)
    layer = fp8_linear(weight, random(96) if bias else None, weight_scale=scale).to(torch.bfloat16)
    x = random(2, 20, 512, size=1).to(torch.bfloat16)
    wide = [None if y is None else y.double() for y in (layer.dequantize(), layer.bias)]
    exact = F.linear(x.double(), *wide)
    found, usual = layer.scaled_product(x), layer(x)
    assert found.dtype == torch.bfloat16 and found.shape == (2, 20, 96)
    error, usual_error = (relative_l2(y, exact.float()) for y in (found, usual))
    assert error < 2**-8 and error < 1.5 * usual_error
    assert torch.equal(usual, F.linear(x, layer.dequantize().to(x.dtype), layer.bias))


@torch.no_grad()
def test_product_is_scaled_where_it_is_smaller_and_no_bits_are_promised():
    weight, scale = to_fp8(random(96, 512))
    layer = fp8_linear(weight, weight_scale=scale)
    x = torch.empty(1, 511, 512, dtype=torch.bfloat16, device="meta")  # which stands for a GPU
    assert layer.scales_product(x)
    assert not layer.scales_product(torch.empty(1, 512, 512, dtype=x.dtype, device="meta"))
    assert not layer.scales_product(torch.empty_like(x, device="cpu"))
    assert not layer.scales_product(x.half()) and not layer.scales_product(x.float())
    with torch.enable_grad():
        assert not layer.scales_product(x)
    assert not fp8_linear(weight).scales_product(x)


@pytest.mark.parametrize("by_row", [False, True])
def test_fp8_linear_compiles_without_a_graph_break(by_row):
    weight, scale = to_fp8(random(32, 48), by_row=by_row)
    layer = fp8_linear(weight, random(32), weight_scale=scale, input_scale=torch.tensor(0.01))
    x = random(3, 48, size=1)
    for native in (False, True):
        layer.fp8_matmul = native
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(x), layer(x), atol=1e-6)


# ---------------------------------------------------------------- native float8


@pytest.mark.parametrize(
    "bias, dtype", [(False, torch.float32), (True, torch.bfloat16)], ids=["float32", "bfloat16"]
)
@pytest.mark.parametrize("weights", ["scaled", "by row", "cast"])
@pytest.mark.parametrize("activations", ["static", "dynamic"])
def test_scaled_mm_equals_the_product_of_rounded_numbers(activations, weights, dtype, bias):
    """Emulated in float64. In float32 only the order of sums differs; bfloat16 rounds once."""
    weight, scale = (
        (random(48, 64).to(E4M3), None)
        if weights == "cast"
        else to_fp8(random(48, 64), by_row=weights == "by row")
    )
    x = random(2, 5, 64, size=3).to(dtype)
    x[0, 0, 0], x[1, 2] = 9, 0  # beyond what the static scale holds; a token of zeros
    tensors = {} if scale is None else {"weight_scale": scale}
    if activations == "static":
        tensors["input_scale"] = torch.tensor(0.02)  # 448 of these are 8.96
        steps = torch.tensor(0.02)
    else:
        steps = x.float().abs().amax(dim=-1, keepdim=True).clamp(min=1e-12) / 448
    layer = fp8_linear(weight, random(48).to(dtype) if bias else None, **tensors)
    assert enable_fp8_matmul(layer) == [] and layer.fp8_matmul
    rounded = (x.float() / steps).clamp(-448, 448).to(E4M3).double() * steps
    expected = F.linear(rounded, layer.dequantize().double(), layer.bias.double() if bias else None)
    found = layer(x)
    assert found.dtype == dtype and found.shape == (2, 5, 48)
    bound = 1e-5 if dtype == torch.float32 else 2**-8
    assert (found - expected).norm() / expected.norm() < bound
    lossless = F.linear(
        x.double(), layer.dequantize().double(), layer.bias.double() if bias else None
    )
    assert (found - lossless).norm() / lossless.norm() > 0.01  # which is why it is no default


@pytest.mark.parametrize("scale", [0.02, 0.0123, 1.0, 3e-6, 77.0])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_activations_are_clamped_to_the_same_bytes_before_and_after_the_division(dtype, scale):
    """All finite numbers of the dtype."""
    x = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(dtype)
    x = x[x.isfinite()][None]
    step = torch.tensor([[scale]])
    expected = (x.float() / step).clamp(-448, 448).to(E4M3)
    found = fp8.quotient_in_float8(x, step, clamp=True)
    assert torch.equal(found.view(torch.uint8), expected.view(torch.uint8))


@pytest.mark.parametrize(
    "name, full_precision",
    [
        ("ComfyUI", True),
        ("ComfyUI, (1,)", True),
        ("ComfyUI, marker", False),
        ("BFL", False),
        ("cast", False),
    ],
)
def test_file_can_ask_for_activations_in_full_precision(tmp_path, name, full_precision):
    path = save_quantized(
        tmp_path / "x.safetensors",
        FORMATS[name](block_linears(empty(FLUX2)), random_state(empty(FLUX2))),
    )
    module = empty(FLUX2)
    load_module(module, [path], dtype=torch.float32)
    layers = [layer for layer in module.modules() if isinstance(layer, FP8Linear)]
    assert layers and {layer.full_precision for layer in layers} == {full_precision}
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert len(enable_fp8_matmul(module)) == (len(layers) if full_precision else 0)
    n = len(layers)
    assert [str(warning.message) for warning in told] == [
        f"{n} of the {n} quantized layers of Flux are dequantized, not multiplied in float8: "
        f"{n} whose file asks for activations in full precision"
    ] * full_precision


def test_layers_without_fp8_matmul_are_returned_with_one_warning(tmp_path):
    def layer(rows: int, columns: int, dtype=E4M3, **more) -> FP8Linear:
        weight, scale = to_fp8(random(rows, columns), dtype)
        return fp8_linear(weight, weight_scale=scale, **more)

    block = BlockFP8Linear(32, 32, bias=False)
    module = nn.ModuleDict(
        dict(
            fits=layer(32, 48),
            narrow=layer(32, 40),
            short=layer(24, 48),
            e5m2=layer(32, 48, E5M2),
            block=block,
            refused=layer(32, 48),
            unmeasured=layer(32, 48, input_scale=torch.tensor(1.0)),
            plain=nn.Linear(32, 32),
        )
    )
    module["refused"].full_precision = True
    with pytest.warns(UserWarning) as told:
        assert enable_fp8_matmul(module) == ["narrow", "short", "e5m2", "block", "refused"]
    assert [str(warning.message) for warning in told] == [
        "5 of the 7 quantized layers of ModuleDict are dequantized, not multiplied in float8: "
        "2 with a side that is not a multiple of 16, 1 in float8_e5m2, 1 with scales of blocks, "
        "1 whose file asks for activations in full precision"
    ]
    assert [name for name, layer in module.items() if getattr(layer, "fp8_matmul", False)] == [
        "fits",
        "unmeasured",
    ]
    assert module["unmeasured"].input_scale is None


@pytest.mark.parametrize(
    "capability, dtype, told",
    [
        ((8, 6), torch.bfloat16, "compute capability 8.9 or above"),
        ((9, 0), torch.float16, "need bfloat16, not torch.float16"),
    ],
)
def test_device_without_fp8_matmul_gives_one_warning(monkeypatch, capability, dtype, told):
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: capability)
    weight, scale = to_fp8(random(32, 48))
    module = nn.Sequential(
        *(fp8_linear(weight, random(32).to(dtype), weight_scale=scale) for _ in range(3))
    )
    with pytest.warns(UserWarning, match=told) as warned:
        assert enable_fp8_matmul(module, torch.device("cuda")) == ["0", "1", "2"]
    assert len(warned) == 1 and not any(layer.fp8_matmul for layer in module)


# ---------------------------------------------------------------- memory


@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="needs Linux' account of a process' memory"
)
@pytest.mark.parametrize("name", ["BFL", "by row", "NVFP4, ModelOpt"])
def test_quantized_weights_stay_mapped(tmp_path, name):
    """Loaded for bfloat16; the float32 tensors of the file, which are cast, are small."""
    shape = 2048, 4096
    weight, scale = to_fp8(random(*shape), by_row=name != "BFL")
    tensors = {"0.weight": weight, "0.weight_scale": scale, "1.weight": random(8)}
    if name.startswith("NVFP4"):
        tensors["0.weight"] = weight.view(torch.uint8)
        tensors |= {
            "0.weight_scale": random(2048, 512).to(E4M3),
            "0.weight_scale_2": torch.tensor(1.0),
        }
    path = save_quantized(tmp_path / "x.safetensors", QuantizedFile(tensors, {}))
    with torch.device("meta"):
        module = nn.Sequential(
            nn.Linear(4096 if not name.startswith("NVFP4") else 8192, 2048, bias=False),
            nn.RMSNorm(8),
        )
    before = anonymous_memory()
    load_module(module, [path], dtype=torch.bfloat16)
    assert module[0].weight.view(torch.uint8).max() > 0  # touches every page
    assert anonymous_memory() - before < 0.05 * path.stat().st_size
    assert module[1].weight.dtype == torch.bfloat16 and isinstance(module[0], QuantizedLinear)


def test_lazy_module_reports_the_bytes_of_its_tensors(tmp_path):
    state, layers = random_state(empty(FLUX1)), block_linears(empty(FLUX1))
    paths = {
        name: save_quantized(tmp_path / f"{name}.safetensors", FORMATS[name](layers, state))
        for name in ("BFL", "NVFP4", "cast")
    }
    paths |= {
        "bfloat16": save_quantized(tmp_path / "bfloat16.safetensors", QuantizedFile(state, {}))
    }
    networks = {
        name: LazyModule(Flux, FLUX1, [path], device=torch.device("cpu"), dtype=torch.float32)
        for name, path in paths.items()
    }
    packed = sum(state[f"{layer}.weight"].numel() for layer in layers)
    whole = sum(tensor.numel() for tensor in state.values()) - packed
    assert networks["bfloat16"].nbytes == 4 * (whole + packed)
    assert networks["BFL"].nbytes == 4 * whole + packed + 8 * len(layers)
    linears = sum(t.numel() for n, t in state.items() if n.endswith("weight"))
    assert networks["cast"].nbytes == linears + 4 * (whole + packed - linears)
    for network in networks.values():
        assert network.nbytes == sum(tensor.nbytes for tensor in network().state_dict().values())
    assert networks["NVFP4"].nbytes < networks["BFL"].nbytes


# ---------------------------------------------------------------- bad files

LAYER = "double_blocks.0.img_attn.qkv"
WEIGHT = f"{LAYER}.weight"


def without(written: QuantizedFile, *names: str) -> QuantizedFile:
    return written._replace(
        tensors={name: tensor for name, tensor in written.tensors.items() if name not in names}
    )


def plus(written: QuantizedFile, **tensors: Tensor) -> QuantizedFile:
    return written._replace(
        tensors=written.tensors | {f"{LAYER}.{name}": tensor for name, tensor in tensors.items()}
    )


def metadata(written: QuantizedFile, text: str) -> QuantizedFile:
    return written._replace(metadata={"_quantization_metadata": text})


def renamed_format(written: QuantizedFile, name: str) -> QuantizedFile:
    return written._replace(metadata=metadata_for([LAYER], name))


def convrot_note(group: object) -> Tensor:
    note = {"format": "int8_tensorwise", "convrot": True, "convrot_groupsize": group}
    return json_bytes(note)


BAD: dict[str, tuple[str, Callable[[QuantizedFile], QuantizedFile], str]] = {
    "no scale": (
        "BFL",
        lambda w: without(w, f"{LAYER}.weight_scale"),
        f"1 missing ('{LAYER}.weight_scale')",
    ),
    "no scale, marker": (
        "ComfyUI, marker",
        lambda w: without(w, f"{LAYER}.weight_scale"),
        f"1 missing ('{LAYER}.weight_scale')",
    ),
    "no scale, note": (
        "ComfyUI",
        lambda w: without(w, f"{LAYER}.weight_scale"),
        f"1 missing ('{LAYER}.weight_scale')",
    ),
    "misshapen": (
        "BFL",
        lambda w: plus(w, weight_scale=torch.ones(7)),
        f"'{LAYER}.weight_scale' is (7,) and not ()",
    ),
    "misshapen input": (
        "BFL",
        lambda w: plus(w, input_scale=torch.ones(7)),
        f"'{LAYER}.input_scale' is (7,) and not ()",
    ),
    "misshapen blocks": (
        "by block",
        lambda w: plus(w, weight_scale_inv=torch.ones(1, 1)),
        f"'{LAYER}.weight_scale_inv' is (1, 1) and not (2, 1)",
    ),
    "no scale, NVFP4": (
        "NVFP4",
        lambda w: without(w, f"{LAYER}.weight_scale_2"),
        f"1 missing ('{LAYER}.weight_scale_2')",
    ),
    "not swizzled": (
        "NVFP4",
        lambda w: plus(w, weight_scale=torch.ones(192, 4).to(E4M3)),
        f"'{LAYER}.weight_scale' is (192, 4) and not (256, 4)",
    ),
    "no absmax": ("NF4", lambda w: without(w, f"{WEIGHT}.absmax"), f"1 missing ('{LAYER}.absmax')"),
    "no note": (
        "BFL",
        lambda w: w._replace(metadata=metadata_for(["elsewhere"], "float8_e4m3fn")),
        "_quantization_metadata does not say in which format",
    ),
    "mxfp4": (
        "BFL",
        lambda w: renamed_format(w, "mxfp4"),
        f"stores '{LAYER}' as 'mxfp4' (F8_E4M3), which is not supported; get the model",
    ),
    "mxfp8 with a scale for the matrix": (
        "BFL",
        lambda w: w._replace(metadata=metadata_for(block_linears(empty(FLUX2)), "mxfp8")),
        f"'{LAYER}.weight_scale' is () and not (256, 4)",
    ),
    "int8": (
        "BFL",
        lambda w: renamed_format(w, "int8_tensorwise"),
        "'int8_tensorwise' (F8_E4M3), which is not supported",
    ),
    "other type": (
        "BFL",
        lambda w: plus(w, weight=random(192, 64)),
        f"stores '{LAYER}' as 'float8_e4m3fn' (F32), which is not supported",
    ),
    "integers": (
        "cast",
        lambda w: plus(w, weight=torch.ones(192, 64, dtype=torch.int8)),
        f"stores '{LAYER}' as I8 without scales, which is not supported; "
        "get the model in bfloat16, FP8",
    ),
    "no scale, INT8": (
        "INT8",
        lambda w: without(w, f"{LAYER}.weight_scale"),
        f"1 missing ('{LAYER}.weight_scale')",
    ),
    "no scale, MXFP8": (
        "MXFP8",
        lambda w: without(w, f"{LAYER}.weight_scale"),
        f"1 missing ('{LAYER}.weight_scale')",
    ),
    "no note, ConvRot": (
        "ConvRot",
        lambda w: without(w, f"{LAYER}.comfy_quant"),
        "comfy_quant does not say in which format",
    ),
    "group of no power of 4": (
        "ConvRot",
        lambda w: plus(w, comfy_quant=convrot_note(32)),
        f"turns '{LAYER}' in groups of 32, but a group must be a power of 4",
    ),
    "group of text": (
        "ConvRot",
        lambda w: plus(w, comfy_quant=convrot_note("16")),
        "in groups of '16', but a group must be a power of 4",
    ),
    "group that does not divide": (
        "ConvRot",
        lambda w: plus(w, comfy_quant=convrot_note(256)),
        "in groups of 256, but a group must be a power of 4 that divides the 64 inputs",
    ),
    "turned or not": (
        "ConvRot, metadata",
        lambda w: plus(w, comfy_quant=json_bytes({"format": "int8_tensorwise"})),
        f"'{LAYER}' is True by _quantization_metadata, and None by comfy_quant",
    ),
    "blocks of INT8": (
        "INT8, no notation",
        lambda w: plus(w, weight_scale=torch.ones(2, 1)),
        f"'{LAYER}.weight_scale' is (2, 1) and not ()",
    ),
    "E8M0": (
        "by row",
        lambda w: plus(w, weight_scale=torch.ones(192, 2).to(torch.float8_e8m0fnu)),
        "as F8_E4M3 with scales in F8_E8M0, which is not supported",
    ),
    "SVDQuant": (
        "BFL",
        lambda w: plus(w, qweight=torch.ones(192, 32, dtype=torch.int8), wscales=random(1, 192)),
        f"stores '{LAYER}' as SVDQuant (Nunchaku), int4, which is not supported",
    ),
    "SVDQuant, fp4": (
        "BFL",
        lambda w: plus(w, qweight=torch.ones(192, 32), wscales=random(4), wtscale=random(1)),
        "as SVDQuant (Nunchaku), fp4",
    ),
    "GPTQ": ("BFL", lambda w: plus(w, qweight=random(4), g_idx=random(4)), "as GPTQ, which"),
    "AWQ": (
        "BFL",
        lambda w: plus(w, qweight=random(64, 24), qzeros=random(1, 24), scales=random(1, 192)),
        f"stores '{LAYER}' as AWQ, which",
    ),
    "GPTQ without g_idx": (
        "BFL",
        lambda w: plus(w, qweight=random(8, 192), qzeros=random(1, 24), scales=random(1, 192)),
        "as GPTQ, which",
    ),
    "torchao": (
        "BFL",
        lambda w: plus(without(w, WEIGHT), _weight_qdata=random(4), _weight_scale=random(4)),
        f"stores '{LAYER}' as a tensor of torchao, which",
    ),
    "HQQ": (
        "BFL",
        lambda w: plus(without(w, WEIGHT), W_q=random(4), zero=random(4)),
        "as HQQ, which",
    ),
    "LLM Compressor": (
        "BFL",
        lambda w: plus(without(w, WEIGHT), weight_packed=random(4)),
        "as compressed-tensors (LLM Compressor), which",
    ),
    "ModelOpt": (
        "BFL",
        lambda w: plus(w, **{"weight_quantizer._amax": random(1)}),
        "as a tensor of ModelOpt (NVIDIA), which",
    ),
    "EETQ": ("INT8", lambda w: plus(w, weight_scales=random(192)), "as EETQ, which"),
    "packed": (
        "BFL",
        lambda w: plus(w, qweight=random(4)),
        "as packed integers (SVDQuant, GPTQ or AWQ)",
    ),
    "quanto": (
        "BFL",
        lambda w: plus(w, **{"weight._data": torch.ones(192, 64, dtype=torch.int8)}),
        f"stores '{LAYER}' as a tensor of optimum-quanto, which is not supported",
    ),
    "bitsandbytes": ("BFL", lambda w: plus(w, SCB=random(192)), "as LLM.int8() (bitsandbytes)"),
    "MLX": ("BFL", lambda w: plus(w, scales=random(192, 1)), "as groups of integers (MLX)"),
    "SDNQ": (
        "cast",
        lambda w: plus(w, weight=torch.ones(192, 64, dtype=torch.int8), scale=random(192, 1)),
        f"stores '{LAYER}' as I8 of SDNQ (SD.Next), which is not supported",
    ),
    "float8 without note and scale": (
        "BFL",
        lambda w: without(w, f"{LAYER}.weight_scale", f"{LAYER}.input_scale")._replace(
            metadata=metadata_for(
                [path for path in block_linears(empty(FLUX2)) if path != LAYER], "float8_e4m3fn"
            )
        ),
        f"has no scale for '{LAYER}', but one for ",
    ),
    "contradiction": (
        "BFL",
        lambda w: plus(w, comfy_quant=json_bytes({"format": "nvfp4"})),
        f"contradicts itself: '{LAYER}' is float8_e4m3fn by _quantization_metadata, "
        "and nvfp4 by comfy_quant",
    ),
    "two transports": (
        "NF4",
        lambda w: w._replace(metadata=metadata_for([LAYER], "nvfp4")),
        "in 2 notations, of which one must be wrong: "
        "quant_state.bitsandbytes and _quantization_metadata",
    ),
    "marker of another": (
        "ComfyUI, legacy",
        lambda w: w._replace(metadata=metadata_for([LAYER], "nvfp4")),
        f"stores '{LAYER}' as 'nvfp4' (F8_E4M3), which is not supported",
    ),
    "two spellings": (
        "BFL",
        lambda w: plus(w._replace(metadata=None), scale_weight=torch.tensor(1.0)),
        "twice",
    ),
    "damaged metadata": ("BFL", lambda w: metadata(w, "{"), "has a damaged _quantization_metadata"),
    "list of layers": (
        "BFL",
        lambda w: metadata(w, '{"layers": ["a"]}'),
        "has a damaged _quantization_metadata",
    ),
    "no format": (
        "BFL",
        lambda w: metadata(w, f'{{"layers": {{"{LAYER}": {{}}}}}}'),
        "has a damaged _quantization_metadata",
    ),
    "format of no text": (
        "BFL",
        lambda w: renamed_format(w, 8),
        f"the format of '{LAYER}' is not text",
    ),
    "deep metadata": (
        "BFL",
        lambda w: metadata(w, "[" * 100_000),
        "has a damaged _quantization_metadata",
    ),
    "damaged note": (
        "ComfyUI",
        lambda w: plus(w, comfy_quant=json_bytes({})[:1]),
        "damaged comfy_quant",
    ),
    "note of no bytes": (
        "ComfyUI",
        lambda w: plus(w, comfy_quant=random(3)),
        "damaged comfy_quant",
    ),
    "note of floats": (
        "ComfyUI",
        lambda w: plus(w, comfy_quant=torch.tensor(0.0)),
        "damaged comfy_quant",
    ),
    "scale lost, by row": (
        "by row",
        lambda w: without(w, f"{LAYER}.weight_scale"),
        f"no scale for '{LAYER}'",
    ),
    "scale lost, by block": (
        "by block",
        lambda w: without(w, f"{LAYER}.weight_scale_inv"),
        f"no scale for '{LAYER}'",
    ),
    "bytes alone": (
        "BFL",
        lambda w: plus(w._replace(metadata=None), weight=torch.ones(192, 64, dtype=torch.uint8)),
        "as U8",
    ),
    "nothing": (
        "BFL",
        lambda w: w._replace(tensors={"vae.a": random(1)}),
        "of 29 tensors, 29 missing",
    ),
    "vector": (
        "cast",
        lambda w: plus(w, weight=torch.ones(192).to(E4M3)),
        f"'{WEIGHT}' is (192,) and not (192, 64)",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_bad_quantized_file_is_refused_in_one_sentence(tmp_path, what):
    name, spoil, expected = BAD[what]
    written = spoil(FORMATS[name](block_linears(empty(FLUX2)), random_state(empty(FLUX2))))
    path = save_quantized(tmp_path / "x.safetensors", written._replace(prefix=""))
    module = empty(FLUX2)
    message = refusal(load_module, module, [path])
    assert expected in message and str(path) in message and message.endswith(".")
    assert all(
        isinstance(module.get_submodule(layer), nn.Linear) for layer in block_linears(empty(FLUX2))
    )  # as it was


def test_quantized_file_of_another_network_is_refused(tmp_path):
    written = bfl_fp8(block_linears(empty(FLUX2)), random_state(empty(FLUX2)))
    path = save_quantized(tmp_path / "x.safetensors", written)
    assert "looks like a FLUX.2 transformer, and a FLUX.1 transformer is wanted" in refusal(
        load_module, empty(FLUX1), [path]
    )
    wider = refusal(load_module, empty(replace(FLUX2, hidden_size=128, num_heads=4)), [path])
    assert "21 misshapen" in wider and "missing" not in wider and "unknown" not in wider


@pytest.mark.parametrize("where", [WEIGHT, f"{LAYER}.input_scale"])
def test_check_finite_finds_values_in_quantized_tensors(tmp_path, where):
    written = bfl_fp8(block_linears(empty(FLUX2)), random_state(empty(FLUX2)))
    wrong = torch.full(written.tensors[where].shape, torch.nan).to(written.tensors[where].dtype)
    path = save_quantized(
        tmp_path / "x.safetensors", written._replace(tensors=written.tensors | {where: wrong})
    )
    load_module(empty(FLUX2), [path])
    assert f"NaN or infinity in '{where}'" in refusal(
        load_module, empty(FLUX2), [path], check_finite=True
    )


def test_svdquant_file_is_refused(tmp_path):
    path = hollow(
        tmp_path / "x.safetensors", {"transformer_blocks.0.qkv_proj.qweight": (8, 8)}, "I8", 8
    )
    assert "SVDQuant" in refusal(infer_config, path)


# ---------------------------------------------------------------- pipelines


def test_check_finite_finds_values_in_gguf_blocks(tmp_path):
    layers, state = block_linears(empty(FLUX2)), random_state(empty(FLUX2))
    arrays = {name: tensor.float().numpy() for name, tensor in state.items()}
    raw = gguf.quantize(arrays[WEIGHT], gguf.GGMLQuantizationType.Q8_0)
    raw[3, :2] = np.array([np.inf], dtype=np.float16).view(np.uint8)
    path = save_gguf(tmp_path / "x.gguf", arrays | {WEIGHT: (raw, "Q8_0")})
    assert f"NaN or infinity in '{WEIGHT}'" in refusal(
        load_module, empty(FLUX2), [path], check_finite=True
    )
    path, _ = save_gguf_q8_0(tmp_path / "y.gguf", layers, state)
    load_module(empty(FLUX2), [path], check_finite=True)


def test_pipeline_with_a_quantized_transformer_equals_decoded_weights(tmp_path):
    """The toy computes in float32, and the images are equal except for a last bit or two.

    A matrix product may sum in another order if its weights lie elsewhere in memory.
    """
    state = load_file(EMBEDDED / "flux.2-tiny" / "flux-2-tiny.safetensors")
    written = bfl_fp8(block_linears(empty(flux.MODELS["flux.2-tiny"].transformer)), state)
    whole = QuantizedFile(
        {name: written.weights.get(name, tensor.float()) for name, tensor in state.items()}, {}
    )
    pictures = []
    for name, file in ("fp8", written), ("whole", whole):
        pipe = flux.load(transformer=save_quantized(tmp_path / f"{name}.safetensors", file))
        pictures.append(np.asarray(pipe("a red circle", steps=2, seed=3)[0]).astype(int))
        assert any(isinstance(layer, FP8Linear) for layer in pipe.transformer().modules()) == (
            name == "fp8"
        )
    assert abs(pictures[0] - pictures[1]).max() <= 1 and (pictures[0] != pictures[1]).mean() < 1e-3
