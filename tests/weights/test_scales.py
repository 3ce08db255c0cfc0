"""Scales that are missing, superfluous, misshapen or not above 0 are refused in every format."""

import pytest
import torch
from support.quantized_files import FORMATS, QuantizedFile, random, save_quantized
from support.weight_files import refusal
from torch import Tensor, nn

from flux.weights.load import load_module
from flux.weights.quantization import FP8Linear, NVFP4Linear, enable_fp8_matmul

SCALES = {  # format -> its scales of matrices and rows, and of blocks, by their names in a file
    "BFL": (("weight_scale",), ()),
    "e5m2": (("weight_scale",), ()),
    "ComfyUI, legacy": (("scale_weight",), ()),
    "ComfyUI, (1,)": (("scale_weight",), ()),
    "ComfyUI, marker": (("weight_scale",), ()),
    "ComfyUI": (("weight_scale",), ()),
    "three notations": (("weight_scale",), ()),
    "by row": (("weight_scale",), ()),
    "by column": (("weight_scale",), ()),
    "by block": (("weight_scale_inv",), ()),
    "INT8": (("weight_scale",), ()),
    "INT8, by row": (("weight_scale",), ()),
    "INT8, no notation": (("weight_scale",), ()),
    "ConvRot": (("weight_scale",), ()),
    "ConvRot, metadata": (("weight_scale",), ()),
    "MXFP8": ((), ("weight_scale",)),
    "MXFP8, E8M0": ((), ("weight_scale",)),
    "NVFP4": (("weight_scale_2",), ("weight_scale",)),
    "NVFP4, ComfyUI": (("weight_scale_2",), ("weight_scale",)),
    "NVFP4, ModelOpt": (("weight_scale_2",), ("weight_scale",)),
    "NF4": ((), ("weight.absmax",)),
    "NF4, nested": ((), ("weight.nested_absmax",)),
}
CAST = {"ComfyUI, mixed", "cast", "cast, e5m2", "bundle"}  # without scales, or like another
LAYERS = ["first", "second"]


def empty() -> nn.ModuleDict:
    with torch.device("meta"):
        return nn.ModuleDict({layer: nn.Linear(64, 160, bias=False) for layer in LAYERS})


def written(format: str) -> QuantizedFile:
    state = {f"{layer}.weight": random(160, 64, seed=i) for i, layer in enumerate(LAYERS)}
    return FORMATS[format](LAYERS, state)._replace(prefix="")


def result(folder, file: QuantizedFile, tensors: dict[str, Tensor | None], check=False) -> str:
    """Return how a file with these tensors in place of its own is refused; None leaves one out."""
    held = {name: tensor for name, tensor in (file.tensors | tensors).items() if tensor is not None}
    path = save_quantized(folder / "x.safetensors", file._replace(tensors=held))
    message = refusal(load_module, empty(), [path], check_finite=check)
    assert str(path) in message and message.endswith(".")
    return message


def test_every_format_is_tested():
    assert SCALES.keys() | CAST == FORMATS.keys()


@pytest.mark.parametrize("format", SCALES)
def test_lost_or_misshapen_scale_is_refused(tmp_path, format):
    file = written(format)
    for name in map("second.{}".format, sum(SCALES[format], ())):
        lost = result(tmp_path, file, {name: None})
        assert "second" in lost
        told = ("1 missing", "no scale for", "as U8", "without scales")
        assert any(words in lost for words in told)
        tripled = file.tensors[name].reshape(-1).view(torch.uint8).repeat(3)
        misshapen = result(tmp_path, file, {name: tripled.view(file.tensors[name].dtype)})
        assert "1 misshapen" in misshapen and "second" in misshapen


@pytest.mark.parametrize("format", SCALES)
def test_superfluous_scale_is_refused(tmp_path, format):
    """A scale of another format beside the layer's own, and scales of a layer in bfloat16."""
    file, few = written(format), SCALES[format][0]
    other = "weight_scale_inv" if "weight_scale" in str(few) else "weight_scale_2"
    if few != ("weight_scale_inv",) and "weight_scale_2" not in few:
        result(tmp_path, file, {f"second.{other}": torch.ones(2, 2)})
    plain = {name: None for name in file.tensors if name.startswith("second.")}
    plain["second.weight"] = random(160, 64).bfloat16()
    for name in sum(SCALES[format], ()):
        message = result(tmp_path, file, plain | {f"second.{name}": file.tensors[f"second.{name}"]})
        assert "second" in message or "notations" in message


@pytest.mark.parametrize("format", [format for format, (few, _) in SCALES.items() if few])
def test_scale_that_is_no_number_above_0_is_refused(tmp_path, format):
    file, (few, _) = written(format), SCALES[format]
    for name in map("second.{}".format, few):
        for value in (torch.nan, torch.inf, -torch.inf, -0.5, 0.0):
            if value == 0 and name.endswith("_inv"):  # of a block
                continue
            scale = file.tensors[name].clone()
            scale.view(-1)[-1] = value
            message = result(tmp_path, file, {name: scale})
            assert f"has the scale {value:g} in '{name}'" in message
    nothing = torch.zeros_like(file.tensors["second.weight"].view(torch.uint8))
    if few != ("weight_scale_inv",):  # all-zero rows may have any scale
        tensors = {few[0]: torch.zeros_like(file.tensors[f"second.{few[0]}"])}
        tensors["weight"] = nothing.view(file.tensors["second.weight"].dtype)
        held = file.tensors | {f"second.{name}": tensor for name, tensor in tensors.items()}
        load_module(
            empty(), [save_quantized(tmp_path / "y.safetensors", file._replace(tensors=held))]
        )


@pytest.mark.parametrize("format", [format for format, (_, blocks) in SCALES.items() if blocks])
def test_scales_of_blocks_are_checked_when_asked(tmp_path, format):
    file, (_, blocks) = written(format), SCALES[format]
    for name in map("second.{}".format, blocks):
        scale = file.tensors[name].clone()
        scale.view(torch.uint8).view(-1)[:8] = 255  # NaN as float8, E8M0 and float32
        assert "has NaN or infinity in 'second" in result(tmp_path, file, {name: scale}, True)
        if not format.startswith("MXFP8"):  # whose bytes are all above 0
            zeros = torch.zeros_like(file.tensors[name])
            if format != "NF4, nested":  # to which an offset is added
                assert "has scales of zero for" in result(tmp_path, file, {name: zeros}, True)


def test_scale_of_activations_shows_that_a_scale_was_lost(tmp_path):
    """Also if all scales were lost: the file is no plain cast."""
    tensors: dict = {name: None for name in written("BFL").tensors if name.endswith("weight_scale")}
    message = result(tmp_path, written("BFL")._replace(metadata=None), tensors)
    assert "has no scale for 'first', but an input_scale for 'first'" in message
    message = result(tmp_path, written("cast"), {"second.input_scale": torch.tensor(0.5)})
    assert "has no scale for 'first', but an input_scale for 'second'" in message


@pytest.mark.parametrize("value", [torch.nan, torch.inf, 0.0, -1.0])
def test_wrong_scale_of_activations_is_not_used(tmp_path, value):
    file = written("BFL")
    tensors = file.tensors | {"second.input_scale": torch.tensor(value)}
    module = empty()
    load_module(
        module, [save_quantized(tmp_path / "x.safetensors", file._replace(tensors=tensors))]
    )
    assert isinstance(module["second"], FP8Linear)
    with pytest.warns(UserWarning, match="1 with a scale of activations that is not above 0"):
        assert enable_fp8_matmul(module) == ["second"]


def test_negative_zeros_of_nvfp4_are_zeros(tmp_path):
    """Signs of zeros need no scale."""
    file = written("NVFP4")
    tensors = file.tensors | {
        "second.weight": torch.full_like(file.tensors["second.weight"], 0x88),
        "second.weight_scale_2": torch.tensor(0.0),
    }
    module = empty()
    load_module(
        module, [save_quantized(tmp_path / "x.safetensors", file._replace(tensors=tensors))]
    )
    assert isinstance(module["second"], NVFP4Linear) and not module["second"].dequantize().any()
