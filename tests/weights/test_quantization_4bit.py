"""NVFP4 and NF4 equal a decoder in numpy and the formats' own libraries, to the last bit.

A weight is a product of float32 numbers in a fixed order. diffusers, bitsandbytes and torchao are
compared where they are installed.
"""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from support.quantized_files import (
    E2M1_VALUES,
    NF4_VALUES,
    nf4_tensors,
    nvfp4_tensors,
    nvfp4_weight,
    random_nvfp4,
)
from torch import Tensor

from flux.errors import UserError
from flux.weights.files import read_header
from flux.weights.quantization.nf4 import (
    STATE,
    NF4Linear,
    QuantState,
    canonical,
    lookup,
    read_state,
)
from flux.weights.quantization.nvfp4 import NVFP4Linear, e2m1, unswizzled
from flux.weights.quantization.quantize import dequantized

FEW = settings(max_examples=25, deadline=None)


def bits(x: Tensor) -> list[int]:
    """Return the bits as integers, so that -0 differs from 0."""
    return x.contiguous().view(torch.int32).flatten().tolist()


def same(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and a.dtype == b.dtype == torch.float32 and bits(a) == bits(b)


# ---------------------------------------------------------------- NVFP4


def nvfp4(tensors: dict[str, Tensor], swizzled: bool) -> NVFP4Linear:
    rows, half = tensors["weight"].shape
    with torch.device("meta"):
        layer = NVFP4Linear(
            2 * half, rows, bias=False, swizzled=swizzled, input_scale="input_scale" in tensors
        )
    layer.load_state_dict(tensors, strict=True, assign=True)
    return layer


def test_e2m1_values_equal_the_specification():
    assert bits(e2m1(torch.device("cpu"))) == bits(torch.tensor(E2M1_VALUES))


@FEW
@given(
    rows=st.integers(1, 300),
    blocks=st.integers(1, 9),
    swizzled=st.booleans(),
    seed=st.integers(0, 99),
)
def test_nvfp4_equals_a_decoder_in_numpy(rows, blocks, swizzled, seed):
    codes, scales, scale_2 = random_nvfp4(rows, blocks, seed)
    layer = nvfp4(nvfp4_tensors(codes, scales, scale_2, swizzled), swizzled)
    assert same(layer.dequantize(), torch.from_numpy(nvfp4_weight(codes, scales, scale_2)))


@pytest.mark.parametrize("swizzled", [True, False])
def test_nvfp4_decodes_every_byte_and_every_scale(swizzled):
    byte, scale = (
        np.arange(256, dtype=np.uint8),
        np.array([b for b in range(256) if b & 127 != 127], np.uint8),
    )  # less NaN
    codes = np.stack([byte >> 4, byte & 15], axis=-1).reshape(1, 512).repeat(len(scale), axis=0)
    scales = scale[:, None].repeat(32, axis=1)
    layer = nvfp4(nvfp4_tensors(codes, scales, 0.75, swizzled), swizzled)
    assert len(set(layer.weight.flatten().tolist())) == 256
    assert same(layer.dequantize(), torch.from_numpy(nvfp4_weight(codes, scales, 0.75)))


def test_layouts_of_nvfp4_have_equal_shapes_and_different_weights():
    """The wrong layout gives unrelated weights, so the layout must not be guessed."""
    codes, scales, scale_2 = random_nvfp4(256, 8)
    written = nvfp4_tensors(codes, scales, scale_2, swizzled=True)
    right, wrong = nvfp4(written, swizzled=True), nvfp4(written, swizzled=False)
    assert {n: t.shape for n, t in right.state_dict().items()} == {
        n: t.shape for n, t in wrong.state_dict().items()
    }
    cosine = torch.cosine_similarity(
        right.dequantize().flatten(), wrong.dequantize().flatten(), dim=0
    )
    assert abs(cosine) < 0.03  # of 32768 numbers; independent ones would give 0.006


def test_nvfp4_in_modelopts_layout_equals_diffusers():
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight, scale, scale_2 = utils.quantize_nvfp4(
        torch.randn(200, 144, generator=torch.Generator().manual_seed(1))
    )
    layer = nvfp4(
        {"weight": weight, "weight_scale": scale, "weight_scale_2": scale_2}, swizzled=False
    )
    assert same(layer.dequantize(), utils.dequantize_nvfp4(weight, scale, scale_2))


@pytest.mark.parametrize("rows, columns", [(128, 64), (200, 160), (384, 32)])
def test_nvfp4_swizzled_equals_torchao(rows, columns):
    """torchao keeps the even column in the low half; its scales lie as Black Forest Labs' do."""
    ao = pytest.importorskip("torchao.prototype.mx_formats.nvfp4_tensor")
    whole = torch.randn(rows, columns, generator=torch.Generator().manual_seed(2))
    scale_2 = whole.abs().max() / (448 * 6)
    theirs = ao.NVFP4Tensor.to_nvfp4(whole, per_tensor_scale=scale_2, is_swizzled_scales=True)
    weight = theirs.qdata.view(torch.uint8)
    scale = theirs.scale.view(-(-rows // 128) * 128, -1)
    layer = nvfp4(
        {"weight": weight << 4 | weight >> 4, "weight_scale": scale, "weight_scale_2": scale_2},
        swizzled=True,
    )
    assert same(layer.dequantize(), theirs.dequantize(torch.float32))


def test_unswizzled_undoes_torchaos_order():
    ao = pytest.importorskip("torchao.prototype.mx_formats.utils")
    scale = torch.arange(256 * 12, dtype=torch.float32).view(256, 12)
    assert same(unswizzled(ao.to_blocked(scale).view(256, 12)), scale)


def test_nvfp4_refuses_inputs_that_are_not_a_multiple_of_16():
    with pytest.raises(
        UserError, match="a layer of 40 inputs cannot be NVFP4, which has blocks of 16"
    ):
        NVFP4Linear(40, 8, bias=False, swizzled=True)


def test_nvfp4_layer_has_the_shapes_and_bytes_of_a_released_file():
    with torch.device("meta"):  # single_blocks.0.linear1 of FLUX.2 [dev]
        layer = NVFP4Linear(6144, 55296, bias=False, swizzled=True)
    shapes = {
        name: (tuple(tensor.shape), tensor.dtype) for name, tensor in layer.state_dict().items()
    }
    assert shapes == {
        "weight": ((55296, 3072), torch.uint8),
        "weight_scale": ((55296, 384), torch.float8_e4m3fn),
        "weight_scale_2": ((), torch.float32),
        "input_scale": ((), torch.float32),
    }
    assert sum(tensor.nbytes for tensor in layer.buffers()) == 0.5625 * 6144 * 55296 + 8


# ---------------------------------------------------------------- NF4


def nf4(path, tensors: dict[str, Tensor]) -> NF4Linear:
    """Load the file of a layer "L", as the loader does."""
    save_file(tensors, path)
    file = load_file(path)
    (name,) = [name for name in file if STATE.fullmatch(name)]
    state = read_state(read_header(path)[0][name])
    with torch.device("meta"):
        layer = NF4Linear(state.shape[1], state.shape[0], bias=False, state=state)
    named = {canonical(n).removeprefix("L."): tensor for n, tensor in file.items() if n != name}
    layer.load_state_dict(named, strict=True, assign=True)
    return layer


@FEW
@given(
    shape=st.tuples(st.integers(1, 40), st.integers(1, 40)),
    blocksize=st.sampled_from([64, 128]),
    nested_blocksize=st.sampled_from([None, 4, 256]),
    seed=st.integers(0, 99),
)
def test_nf4_equals_a_decoder_in_numpy(tmp_path_factory, shape, blocksize, nested_blocksize, seed):
    rng = np.random.default_rng(seed)
    codes, blocks = rng.integers(0, 16, shape, dtype=np.uint8), -(-shape[0] * shape[1] // blocksize)
    absmax, nested = rng.uniform(0.01, 2, blocks).astype(np.float32), None
    largest = absmax
    if nested_blocksize:
        absmax = rng.integers(0, 256, blocks, dtype=np.uint8)
        values, offset = rng.uniform(-1, 1, 256).astype(np.float32), 0.3712834417819977
        nested_absmax = rng.uniform(0.01, 2, -(-blocks // nested_blocksize)).astype(np.float32)
        nested = dict(
            blocksize=nested_blocksize, offset=offset, absmax=nested_absmax, values=values
        )
        largest = values[absmax] * nested_absmax.repeat(nested_blocksize)[:blocks] + np.float32(
            offset
        )
    path = tmp_path_factory.mktemp("nf4") / "file.safetensors"
    layer = nf4(path, nf4_tensors(codes, absmax, NF4_VALUES, nested, blocksize))
    by_hand = (
        np.array(NF4_VALUES, np.float32)[codes].flatten() * largest.repeat(blocksize)[: codes.size]
    )
    assert same(layer.dequantize(), torch.from_numpy(by_hand.reshape(shape)))


def test_nf4_decodes_every_byte_with_the_values_of_the_file(tmp_path):
    values = np.random.default_rng(0).standard_normal(16).astype(np.float32)
    byte = np.arange(256, dtype=np.uint8)
    codes = np.stack([byte >> 4, byte & 15], axis=-1).reshape(8, 64)
    layer = nf4(
        tmp_path / "file.safetensors", nf4_tensors(codes, np.ones(8, np.float32), values.tolist())
    )
    assert same(layer.dequantize(), torch.from_numpy(values[codes]))


def test_lookup_decodes_either_half_first():
    code = torch.arange(16.0)
    assert lookup(torch.tensor([0x1F, 0xA0], dtype=torch.uint8), code).tolist() == [1, 15, 10, 0]
    assert lookup(
        torch.tensor([[0x1F], [0xA0]], dtype=torch.uint8), code, high_first=False
    ).tolist() == [[15, 1], [0, 10]]


@pytest.mark.parametrize("shape", [(64, 128), (7, 9), (600, 130)])
@pytest.mark.parametrize(
    "kind, blocksize, nested",
    [("nf4", 64, False), ("nf4", 64, True), ("nf4", 128, True), ("fp4", 64, False)],
)
def test_nf4_equals_bitsandbytes(tmp_path, nested, kind, blocksize, shape):
    """Rows of 96 are left out: bitsandbytes 0.50.2 decodes them wrongly with AVX-512."""
    theirs = pytest.importorskip("bitsandbytes.functional")
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    packed, state = theirs.quantize_4bit(
        weight, blocksize=blocksize, compress_statistics=nested, quant_type=kind
    )
    tensors = {f"L.weight.{name}": tensor for name, tensor in state.as_dict(packed=True).items()}
    layer = nf4(tmp_path / "file.safetensors", {"L.weight": packed} | tensors)
    assert (layer.state.nested_blocksize is not None) == nested
    assert torch.equal(
        layer.dequantize(), theirs.dequantize_4bit(packed, state)
    )  # its kernel has a -0 that its file has not


def test_bitsandbytes_names_become_module_names():
    assert (
        canonical("double_blocks.0.img_mlp.0.weight.absmax") == "double_blocks.0.img_mlp.0.absmax"
    )
    assert canonical("L.weight.nested_quant_map") == "L.nested_quant_map"
    for name in ("L.weight", "L.bias", "L.weight_scale", "norm.key_norm.scale", "L.absmax"):
        assert canonical(name) == name
    assert STATE.fullmatch("a.b.weight.quant_state.bitsandbytes__fp4")[1] == "a.b"
    assert not STATE.fullmatch("a.b.weight.absmax")


GOOD = {"quant_type": "nf4", "blocksize": 64, "dtype": "bfloat16", "shape": [3, 5]}


@pytest.mark.parametrize(
    "text, fault",
    [
        ("{", "damaged"),
        ("[]", "damaged"),
        ("\xff", "damaged"),
        ({"shape": [15]}, "damaged"),
        ({"shape": 15}, "damaged"),
        ({"shape": [3, -5]}, "not whole numbers above 0"),
        ({"shape": [3.0, 5]}, "not whole numbers above 0"),
        ({"blocksize": 0}, "not whole numbers above 0"),
        ({"blocksize": True}, "not whole numbers above 0"),
        ({"nested_blocksize": 0, "nested_offset": 0.1}, "not whole numbers above 0"),
        ({"nested_blocksize": 256, "nested_offset": "0.1"}, "not a finite number"),
        ({"nested_blocksize": 256, "nested_offset": float("nan")}, "has NaN, which is no number"),
        ({"nested_blocksize": 256, "nested_offset": 1e39}, "not a finite number"),
        (
            {"quant_type": "int8"},
            "of the type 'int8'; of bitsandbytes' types, nf4 and fp4 are supported",
        ),
        ({"quant_type": ["nf4"]}, "of bitsandbytes' types, nf4 and fp4 are supported"),
    ],
)
def test_damaged_quant_state_is_refused(tmp_path, text, fault):
    text = json.dumps(GOOD | text) if isinstance(text, dict) else text
    path, name = tmp_path / "file.safetensors", "L.weight.quant_state.bitsandbytes__nf4"
    save_file({name: torch.tensor(list(text.encode("latin1")), dtype=torch.uint8)}, path)
    with pytest.raises(UserError, match=fault) as error:
        read_state(read_header(path)[0][name])
    assert str(path) in str(error.value) and repr(name) in str(error.value)


def test_quant_state_is_read(tmp_path):
    path, name = tmp_path / "file.safetensors", "L.weight.quant_state.bitsandbytes__nf4"
    for table, nested in (
        (GOOD, (None, 0.0)),
        (GOOD | {"nested_blocksize": 256, "nested_offset": 0.5}, (256, 0.5)),
    ):
        save_file({name: torch.tensor(list(json.dumps(table).encode()), dtype=torch.uint8)}, path)
        assert read_state(read_header(path)[0][name]) == QuantState((3, 5), 64, *nested)


def test_nf4_layer_has_the_bytes_of_a_released_file():
    with torch.device("meta"):
        plain = NF4Linear(3072, 9216, bias=False, state=QuantState((9216, 3072), 64, None, 0.0))
        double = NF4Linear(3072, 9216, bias=False, state=QuantState((9216, 3072), 64, 256, 0.5))
    per_weight = [
        sum(tensor.nbytes for tensor in layer.buffers()) / (3072 * 9216)
        for layer in (plain, double)
    ]
    assert per_weight == pytest.approx(
        [0.5625, 0.5 + 1 / 64 + 4 / 64 / 256], abs=1e-4
    )  # + 64 bytes and 1 KiB of values


# ---------------------------------------------------------------- both


def layers() -> dict[str, torch.nn.Module]:
    """Return a layer of each format, 9 x 48, with a bias."""
    rng, generator = np.random.default_rng(7), torch.Generator().manual_seed(7)
    out = {}
    for name, swizzled in (("swizzled", True), ("modelopt", False)):
        layer = NVFP4Linear(48, 9, bias=True, swizzled=swizzled)
        layer.load_state_dict(
            nvfp4_tensors(*random_nvfp4(9, 3), swizzled) | {"bias": torch.randn(9)},
            strict=True,
            assign=True,
        )
        out[name] = layer
    for name, nested in (("nf4", None), ("double", 4)):
        layer = NF4Linear(48, 9, bias=True, state=QuantState((9, 48), 64, nested, 0.25))
        for tensor in layer.buffers():
            noise = torch.randn(tensor.shape, generator=generator)
            tensor.copy_(
                noise
                if tensor.is_floating_point()
                else torch.from_numpy(rng.integers(0, 256, tensor.shape))
            )
        layer.bias.data.normal_(generator=generator)
        out[name] = layer
    return {name: layer.eval().requires_grad_(False) for name, layer in out.items()}


@pytest.mark.parametrize("name", ["swizzled", "modelopt", "nf4", "double"])
def test_4bit_layer_multiplies_runs_on_meta_and_compiles(name):
    layer = layers()[name]
    x = torch.randn(2, 5, 48, dtype=torch.bfloat16, generator=torch.Generator().manual_seed(8))
    weight = layer.dequantize()
    layer.bias.data = layer.bias.data.bfloat16()
    with torch.inference_mode():
        made = layer(x)
        assert torch.equal(
            made, torch.nn.functional.linear(x, weight.bfloat16(), layer.bias)
        )  # rounded once
        assert torch.equal(made, dequantized(layer, torch.bfloat16)(x))
        compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(x), made)
    meta = layers()[name].to("meta")
    assert meta(x.to("meta").float()).shape == (2, 5, 9) and meta.dequantize().is_meta
