"""flux.weights.convert for FLUX 3: layouts there and back to the bit, and quantized formats.

diffusers' own converter says what its layout is.
"""

from dataclasses import replace

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from support.transformer3_inputs import inputs
from support.weight_files import saved

from flux.parity.reference import FLUX3_TINY, randomise, relative_l2
from flux.transformer3 import Flux3, Flux3Config
from flux.weights.convert import FORMATS, convert
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.quantization import QuantizedLinear

FLOW_MAP = replace(FLUX3_TINY, flow_map=True)
WIDE = replace(FLOW_MAP, hidden_size=512, num_heads=16, depth=1, depth_single=1)  # is quantized
either = pytest.mark.parametrize("config", [FLUX3_TINY, FLOW_MAP], ids=["base", "flow map"])
LARGEST = {"bf16": 0.003, "fp8": 0.04, "int8": 0.02, "int8-convrot": 0.02, "nvfp4": 0.2}


def random_state(config: Flux3Config) -> dict[str, torch.Tensor]:
    return {n: x.bfloat16() for n, x in randomise(Flux3(config)).state_dict().items()}


def load(path) -> Flux3:
    network = init_empty(lambda: Flux3(infer_config(path)))
    load_module(network, [path])
    return network


@either
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."], ids=["BFL", "ComfyUI"])
def test_layouts_there_and_back_are_equal_to_the_bit(config, prefix, tmp_path):
    from diffusers.loaders.single_file_utils import (
        convert_flux3_transformer_checkpoint_to_diffusers as to_diffusers,
    )

    state, there, back = (
        random_state(config),
        tmp_path / "d.safetensors",
        tmp_path / "b.safetensors",
    )
    given = saved(tmp_path / "x.safetensors", {prefix + n: x for n, x in state.items()})
    report = convert(given, there, layout="diffusers")
    expected = to_diffusers({name: tensor.clone() for name, tensor in state.items()})
    found = load_file(there)
    assert found.keys() == expected.keys() and report.errors == {}
    assert all(torch.equal(found[name], expected[name]) for name in found)
    convert(there, back)
    found = load_file(back)
    assert found.keys() == state.keys()
    assert all(torch.equal(found[name], state[name]) for name in found)


@pytest.mark.slow
@pytest.mark.parametrize("format", FORMATS)
@torch.no_grad()
def test_formats_load_and_compute_nearly_the_same(format, tmp_path):
    """mxfp8 has float8's error, and scales that are powers of two."""
    given = saved(tmp_path / "x.safetensors", random_state(WIDE))
    report = convert(given, tmp_path / "y.safetensors", format)
    network, right = load(tmp_path / "y.safetensors").float(), load(given).float()
    layers = [path for path, x in network.named_modules() if isinstance(x, QuantizedLinear)]
    quantized = format != "bf16"
    assert (len(layers) > 10) == quantized == bool(report.errors)
    assert all("blocks." in path for path in layers)
    assert set(report.errors) == set(layers)
    assert report.error <= LARGEST.get(format, 0.05)
    batch = inputs(WIDE)
    assert relative_l2(network(**batch), right(**batch)) < 0.5
    with safe_open(tmp_path / "y.safetensors", "pt") as file:
        assert ("_quantization_metadata" in file.metadata()) == quantized
