"""flux.weights.convert: what is written is read by decoders and models that are not ours.

Encoders are compared with worked numbers, diffusers and torchao; files with decoders in numpy, and
with diffusers' own conversion of layouts. Equal means to the last bit.
"""

import inspect
import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.quantized_files import (
    E2M1_VALUES,
    e4m3_value,
    hadamard_matrix,
    in_cublas_order,
    int8,
    random,
    random_state,
    save_quantized,
)
from support.weight_files import hollow, refusal, saved
from torch import Tensor

from flux.parity.reference import relative_l2
from flux.transformer import Flux, FluxConfig
from flux.weights.convert import FORMATS, convert
from flux.weights.load import infer_config, load_module
from flux.weights.quantization import QuantizedLinear
from flux.weights.quantization.int8 import hadamard
from flux.weights.quantization.published import PUBLISHED, encode, encode_int8_by_row
from flux.weights.quantization.quantize import large_linears

FLUX2 = FluxConfig(
    in_channels=16,
    out_channels=16,
    context_dim=48,
    hidden_size=256,
    num_heads=4,
    depth=1,
    depth_single=1,
    axes_dim=(16, 16, 16, 16),
    guidance=True,
)
FLUX1 = replace(
    FLUX2,
    axes_dim=(8, 28, 28),
    vector_dim=32,
    mlp_ratio=4.0,
    bias=True,
    gated_mlp=False,
    shared_modulation=False,
    theta=10000,
)
QUANTIZED = [format for format in FORMATS if format != "bf16"]


def empty(config: FluxConfig) -> Flux:
    with torch.device("meta"):
        return Flux(config)


def write(path, config: FluxConfig, dtype=torch.bfloat16) -> dict[str, Tensor]:
    state = {name: tensor.to(dtype) for name, tensor in random_state(empty(config)).items()}
    saved(path, state)
    return state


# ---------------------------------------------------------------- encoders


def test_convrot_equals_worked_numbers():
    """Numbers by hand: a row times H4 / 2, its largest over 127, rounded to even."""
    row = torch.tensor([[3.0, 1.0, -2.0, 0.5]])
    encoded = encode_int8_by_row(hadamard(row, 4), row.abs().max())
    assert hadamard(row, 4).tolist() == [[0.75, 3.25, 0.25, -1.75]]
    assert encoded["weight"].tolist() == [[29, 127, 10, -68]]
    assert encoded["weight_scale"].item() == pytest.approx(3.25 / 127)
    back = hadamard(encoded["weight"].float(), 4) * encoded["weight_scale"]
    assert back[0].tolist() == pytest.approx([2.99409, 0.99803, -1.99606, 0.51181], abs=1e-5)


@pytest.mark.parametrize("group", [4, 16, 64, 256, 1024])
def test_hadamard_is_the_kronecker_power_and_its_own_inverse(group):
    weight = torch.randint(-128, 128, (3, 2 * group)).float()
    expected = weight.double().view(3, 2, group) @ torch.from_numpy(hadamard_matrix(group))
    assert torch.equal(hadamard(weight, group), expected.view(3, -1).float())
    assert torch.equal(hadamard(hadamard(weight, group), group), weight)


def test_mxfp8_equals_worked_numbers():
    """3 / 448 needs 2^-7: 3 becomes 384 (byte 124), and 0.5 becomes 64 (byte 104)."""
    encoded = encode(torch.tensor([[3.0] + 31 * [0.5]]), PUBLISHED["mxfp8"])
    assert encoded["weight_scale"][0, 0] == 120
    assert encoded["weight"].view(torch.uint8).tolist() == [[124] + 31 * [104]]


def test_fp8_and_int8_round_to_the_nearest_number():
    weight = random(1030, 24, seed=4)
    weight[0, :3] = torch.tensor([0.0, -0.6, 0.3])  # the largest is negative
    float8 = np.array([e4m3_value(byte) for byte in range(256) if byte & 127 != 127])
    for format, numbers in ("fp8", float8), ("int8", np.arange(-127, 128)):
        encoded = encode(weight, PUBLISHED[format])
        scale = encoded["weight_scale"].double()
        possible = torch.from_numpy(numbers).double() * scale[..., None]
        nearest = (weight.double()[..., None] - possible).abs().amin(-1)
        error = (weight.double() - encoded["weight"].double() * scale).abs()
        assert torch.allclose(error, nearest, rtol=0, atol=1e-7 * scale.max().item())
        assert (encoded["weight"].double().abs() * scale).max() == pytest.approx(0.6)


@pytest.mark.slow
def test_mxfp8_equals_torchao():
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor")
    weight = random(1100, 96, seed=1)
    weight[0], weight[1, :32] = 0, 448 * 2.0**-9  # nothing, and exactly the largest number
    scale, values = mx.to_mx(weight, torch.float8_e4m3fn, 32, mx.ScaleCalculationMode.RCEIL)
    encoded = encode(weight, PUBLISHED["mxfp8"])
    scale = scale.view(torch.uint8).numpy().copy()
    scale[weight.unflatten(1, (-1, 32)).abs().amax(-1) == 0] = 0  # any power of two is right
    rows = in_cublas_order(scale)
    written = encoded["weight_scale"].numpy()
    is_scale = in_cublas_order(np.ones_like(scale)) == 1
    assert np.array_equal(written[is_scale], rows[is_scale])
    assert torch.equal(encoded["weight"].float(), values.view(torch.float8_e4m3fn).float())


def test_nvfp4_equals_diffusers():
    utils = pytest.importorskip("diffusers.quantizers.bfl.utils")
    weight = random(1100, 96, seed=2)
    weight[0] = 0
    weight[1, :16] = torch.tensor(8 * [0.25, 0.75]) / 6  # ties
    theirs, scale, scale_2 = utils.quantize_nvfp4(weight)
    encoded = encode(weight, PUBLISHED["nvfp4"])
    assert torch.equal(encoded["weight"], theirs << 4 | theirs >> 4)
    written, rows = encoded["weight_scale"].view(torch.uint8).numpy(), scale.view(torch.uint8)
    is_scale = in_cublas_order(np.ones(rows.shape, np.uint8)) == 1
    assert np.array_equal(written[is_scale], in_cublas_order(rows.numpy())[is_scale])
    assert torch.equal(encoded["weight_scale_2"], scale_2)


# ---------------------------------------------------------------- files


def decoded(tensors: dict[str, Tensor], layer: str) -> np.ndarray:
    """Decode a layer by its note, in numpy."""
    note = json.loads(bytes(tensors[f"{layer}.comfy_quant"].tolist()))
    weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
    if note["format"] == "int8_tensorwise":
        whole = weight.double().numpy()
        if group := note.get("convrot") and note["convrot_groupsize"]:
            whole = (whole.reshape(len(whole), -1, group) @ hadamard_matrix(group)).reshape(
                whole.shape
            )
        return whole.astype(np.float32) * scale.numpy()
    e4m3 = np.array([e4m3_value(byte) for byte in range(256)], np.float32)
    if note["format"] == "float8_e4m3fn":
        return e4m3[weight.view(torch.uint8).numpy()] * scale.numpy()
    stored = scale.view(torch.uint8).numpy()
    columns = weight.shape[1] if note["format"] == "mxfp8" else 2 * weight.shape[1]
    block = 32 if note["format"] == "mxfp8" else 16
    places = np.arange(len(weight) * columns // block).reshape(len(weight), -1)
    byte = np.empty_like(places, dtype=np.uint8)
    across = -(-byte.shape[1] // 4)
    tiles = stored.reshape(-1, 512)
    for row, column in np.ndindex(*byte.shape):  # cuBLAS's manual
        place = row % 32 * 16 + row % 128 // 32 * 4 + column % 4
        byte[row, column] = tiles[row // 128 * across + column // 4, place]
    if note["format"] == "mxfp8":
        factor = 2.0 ** (byte.astype(np.float32) - 127)
        return e4m3[weight.view(torch.uint8).numpy()] * factor.repeat(32, axis=1)
    factor = e4m3[byte] * tensors[f"{layer}.weight_scale_2"].numpy()
    codes = np.stack([weight.numpy() >> 4, weight.numpy() & 15], axis=-1).reshape(len(weight), -1)
    return np.array(E2M1_VALUES, np.float32)[codes] * factor.repeat(16, axis=1)


# relative L2 of normal numbers: of 3 bits of mantissa 0.026; of 255 steps over 3 or 4 sigma 0.007
LARGEST_ERRORS = {"fp8": 0.03, "int8": 0.01, "int8-convrot": 0.01, "nvfp4": 0.11, "mxfp8": 0.03}


@pytest.mark.parametrize("format", QUANTIZED)
def test_converted_file_is_read_as_other_decoders_read_it(tmp_path, format):
    config = FLUX1 if format in ("fp8", "int8-convrot", "mxfp8") else FLUX2
    state = write(tmp_path / "in.safetensors", config, torch.float32)
    path = tmp_path / "out.safetensors"
    report = convert(tmp_path / "in.safetensors", path, format)
    tensors, module = load_file(path), empty(config)
    assert infer_config(path) == config
    load_module(module, [path])
    layers = {
        name: layer for name, layer in module.named_modules() if isinstance(layer, QuantizedLinear)
    }
    assert layers.keys() == set(large_linears(empty(config))) and sum(
        report.counts.values()
    ) == len(layers)
    squared = norm = 0.0
    for name, layer in layers.items():
        weight, ours = state[f"{name}.weight"], layer.dequantize()
        assert torch.equal(ours, torch.from_numpy(decoded(tensors, name)))
        assert relative_l2(ours, weight) == pytest.approx(report.errors[name])
        assert 0 < report.errors[name] < LARGEST_ERRORS[format]
    for name, error in report.errors.items():
        size = state[f"{name}.weight"].double().square().sum().item()
        squared, norm = squared + error**2 * size, norm + size
    assert report.error == pytest.approx((squared / norm) ** 0.5)
    for name, parameter in module.named_parameters():
        assert torch.equal(parameter, state[name].bfloat16())
    with safe_open(path, "pt") as file:
        table = json.loads(file.metadata()["_quantization_metadata"])["layers"]
    notes = {layer: tensors[f"{layer}.comfy_quant"] for layer in layers}
    assert table == {layer: json.loads(bytes(note.tolist())) for layer, note in notes.items()}


def test_convrot_keeps_outliers_out_of_the_other_weights(tmp_path):
    state = write(tmp_path / "in.safetensors", FLUX2, torch.float32)
    for name in large_linears(empty(FLUX2)):
        state[f"{name}.weight"][:, 7] *= 50
    saved(tmp_path / "outliers.safetensors", state)
    errors = {}
    for format in ("int8", "int8-convrot"):
        path = tmp_path / f"{format}.safetensors"
        convert(tmp_path / "outliers.safetensors", path, format)
        module = empty(FLUX2)
        load_module(module, [path])
        name = "single_blocks.0.linear2"
        kept = [i for i in range(state[f"{name}.weight"].shape[1]) if i != 7]
        found = module.get_submodule(name).dequantize()[:, kept]
        errors[format] = relative_l2(found, state[f"{name}.weight"][:, kept])
    assert errors["int8-convrot"] < 0.5 * errors["int8"]


def test_quantized_file_becomes_its_weights_in_bfloat16(tmp_path):
    state = random_state(empty(FLUX1))
    written = int8(large_linears(empty(FLUX1)), state, group=64)
    save_quantized(tmp_path / "in.safetensors", written)
    report = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "bf16")
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == state.keys() and report.counts == {}
    for name, tensor in found.items():
        assert torch.equal(tensor, written.weights.get(name, state[name]).bfloat16())
    assert 0 < report.error < 2**-8  # half of the last of 8 bits


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("config", [FLUX1, FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_diffusers_layout_equals_diffusers_own_conversion(tmp_path, config, dtype):
    utils = pytest.importorskip("diffusers.loaders.single_file_utils")
    state = write(tmp_path / "in.safetensors", config, dtype)
    report = convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", layout="diffusers")
    if config.shared_modulation:
        theirs = utils.convert_flux2_transformer_checkpoint_to_diffusers(dict(state))
    else:  # diffusers' code has the width of the released models in it
        text = inspect.getsource(utils.convert_flux_transformer_checkpoint_to_diffusers)
        assert text.count("inner_dim = 3072") == 1
        exec(text.replace("3072", str(config.hidden_size)), scope := {"torch": torch})
        theirs = scope["convert_flux_transformer_checkpoint_to_diffusers"](dict(state))
    found = load_file(tmp_path / "out.safetensors")
    assert found.keys() == theirs.keys() and report.errors == {}
    for name, tensor in found.items():
        assert tensor.dtype == dtype and torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("config", [FLUX1, FLUX2], ids=["FLUX.1", "FLUX.2"])
def test_layouts_there_and_back_are_equal(tmp_path, config):
    state = write(tmp_path / "bfl.safetensors", config)
    theirs, ours = tmp_path / "theirs.safetensors", tmp_path / "ours.safetensors"
    convert(tmp_path / "bfl.safetensors", theirs, layout="diffusers")
    assert "transformer_blocks.0.attn.to_q.weight" in load_file(theirs)
    report = convert(theirs, ours, layout="bfl")
    found = load_file(ours)
    assert found.keys() == state.keys() and report.errors == {}
    assert all(torch.equal(tensor, state[name]) for name, tensor in found.items())
    convert(tmp_path / "bfl.safetensors", tmp_path / "a.safetensors", "int8")
    convert(theirs, tmp_path / "b.safetensors", "int8")
    files = [load_file(tmp_path / f"{name}.safetensors") for name in "ab"]
    assert files[0].keys() == files[1].keys()
    assert all(torch.equal(tensor, files[1][name]) for name, tensor in files[0].items())


# ---------------------------------------------------------------- refusals


def test_wrong_requests_are_refused_before_anything_is_written(tmp_path):
    source, path = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
    write(source, FLUX2)
    assert "format: unknown (got int3)" in refusal(convert, source, path, "int3")
    assert "layout: unknown (got kohya)" in refusal(convert, source, path, None, "kohya")
    assert "`format=bf16`" in refusal(convert, source, path, "fp8", "diffusers")
    assert "must end in .safetensors" in refusal(convert, source, tmp_path / "out.bin", "fp8")
    missing = tmp_path / "missing" / "out.safetensors"
    assert "there is no folder" in refusal(convert, source, missing, "fp8")
    assert "not a complete FLUX transformer" in refusal(
        convert, saved(tmp_path / "x.safetensors", {"a": random(2)}), path, "fp8"
    )
    convert(source, path, "fp8")
    before = path.read_bytes()
    assert "exists already" in refusal(convert, source, path, "int8")
    again = refusal(convert, path, tmp_path / "again.safetensors", "int8")
    assert "is quantized already (FP8Linear). Choose `format=bf16`" in again
    assert path.read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {
        "in.safetensors",
        "out.safetensors",
        "x.safetensors",
    }


def test_failure_in_the_middle_leaves_nothing(tmp_path, monkeypatch):
    write(tmp_path / "in.safetensors", FLUX2)

    def fail(layer):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("flux.weights.quantization.fp8.FP8Linear.dequantize", fail)
    with pytest.raises(OSError, match="No space"):
        convert(tmp_path / "in.safetensors", tmp_path / "out.safetensors", "fp8")
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


@pytest.mark.parametrize("format", FORMATS)
@pytest.mark.parametrize("name", ["double_blocks.0.img_attn.qkv.weight", "img_in.weight"])
def test_numbers_that_cannot_be_rounded_are_refused(tmp_path, name, format):
    state = write(tmp_path / "in.safetensors", FLUX2)
    state[name][-1, 3] = torch.inf if format == "fp8" else torch.nan
    source = saved(tmp_path / "in.safetensors", state)
    message = refusal(convert, source, tmp_path / "out.safetensors", format)
    assert f"source: {name} has NaN or infinity" in message
    assert [file.name for file in tmp_path.iterdir()] == ["in.safetensors"]


def test_other_networks_of_a_checkpoint_are_named(tmp_path):
    state = write(tmp_path / "in.safetensors", FLUX2)
    more = {"vae.decoder.conv_in.weight": random(4, 4)}
    more["text_encoders.t5xxl.transformer.a"] = random(3)
    tensors = {f"model.diffusion_model.{name}": tensor for name, tensor in state.items()}
    source = saved(tmp_path / "all.safetensors", tensors | more)
    told = r"which are not written: (vae\.\*, text_encoders|text_encoders.*, vae\.\*)"
    with pytest.warns(UserWarning, match=told):
        convert(source, tmp_path / "out.safetensors", "bf16")
    assert load_file(tmp_path / "out.safetensors").keys() == state.keys()


MEASURED = """
import sys
from pathlib import Path
from support.weight_files import anonymous_memory
from flux.weights.convert import _Conversion, convert
source, out, format, layout = sys.argv[1:]
peak, in_layout = [], _Conversion._in_layout

def measured(*arguments):
    if not arguments[-1].is_meta:  # torch loads more of itself for the meta device
        peak.append(anonymous_memory())
    yield from in_layout(*arguments)

_Conversion._in_layout = measured
convert(Path(source), Path(out), format if format != "None" else None, layout)
print(max(peak) - peak[0])
"""


@pytest.mark.slow
@pytest.mark.parametrize("format, layout", [("fp8", "bfl"), (None, "diffusers")])
def test_memory_is_that_of_a_matrix(tmp_path, format, layout):
    """Six float32 copies of the largest matrix are enough, which is far below the file."""
    config = replace(FLUX2, hidden_size=512, num_heads=8, depth=1, depth_single=24)
    shapes = {name: tuple(x.shape) for name, x in empty(config).state_dict().items()}
    source = hollow(tmp_path / "in.safetensors", shapes)  # of zeros
    largest = max(torch.Size(shape).numel() for shape in shapes.values())
    words = [str(source), str(tmp_path / "out.safetensors"), str(format), layout]
    paths = os.pathsep.join(str(Path(__file__).parents[up]) for up in (1, 2))
    # glibc returns what is freed at once, and does not keep it for later
    environment = os.environ | {"PYTHONPATH": paths, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURED, *words], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 6 * 4 * largest < source.stat().st_size / 2


def test_tensors_of_a_written_file_are_aligned(tmp_path):
    write(tmp_path / "in.safetensors", FLUX1)
    path = tmp_path / "out.safetensors"
    convert(tmp_path / "in.safetensors", path, "nvfp4")
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    del header["__metadata__"]
    for entry in header.values():
        size = {"F32": 4, "BF16": 2}.get(entry["dtype"], 1)
        assert (8 + length + entry["data_offsets"][0]) % size == 0
