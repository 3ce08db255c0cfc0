"""FLUX 3's transformers from files: both layouts, prefixes, and files of another kind.

diffusers' file is written by diffusers, and its own converter reads ours.
"""

from dataclasses import replace

import pytest
import torch
from support.transformer3_inputs import inputs
from support.weight_files import hollow, refusal, saved

from flux.configs import MODELS
from flux.language_model import LanguageModel
from flux.parity.reference import FLUX3_TINY, loaded, randomise
from flux.parity.reference3 import diffusers_transformer3, diffusers_velocity3
from flux.text_encoder import build_networks
from flux.transformer import Flux, FluxConfig
from flux.transformer3 import Flux3
from flux.weights.families import qwen_kind
from flux.weights.load import infer_config, init_empty, load_module
from flux.weights.locate import get_spec

FLOW_MAP = replace(FLUX3_TINY, flow_map=True)
BASE, DISTILLED = "flux.3-image-klein-base", "flux.3-image-klein"
either = pytest.mark.parametrize("config", [FLUX3_TINY, FLOW_MAP], ids=["base", "flow map"])


def load(path) -> Flux3:
    network = init_empty(lambda: Flux3(infer_config(path)))
    load_module(network, [path])
    return network


def of_full_size(path, config) -> object:
    network = init_empty(lambda: (Flux if isinstance(config, FluxConfig) else Flux3)(config))
    return hollow(path, {n: tuple(x.shape) for n, x in network.state_dict().items()})


@either
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model.", "transformer."])
def test_file_loads_whatever_stands_before_its_names(config, prefix, tmp_path):
    state = randomise(Flux3(config)).state_dict()
    path = saved(tmp_path / "x.safetensors", {prefix + n: x for n, x in state.items()})
    assert infer_config(path) == config
    for name, tensor in load(path).state_dict().items():
        assert torch.equal(tensor, state[name]), name


@either
@torch.no_grad()
def test_file_of_diffusers_computes_the_same(config, tmp_path):
    theirs = randomise(diffusers_transformer3(config).to_empty(device="cpu"))
    ours, batch = load(saved(tmp_path / "x.safetensors", theirs.state_dict())), inputs(config)
    assert ours.config == config
    narrow = {
        n: x.bfloat16() if x.is_floating_point() and "ids" not in n else x for n, x in batch.items()
    }
    plain = Flux3(config, None)
    plain.load_state_dict(ours.state_dict())
    wide = {n: x if ".norm_" in n else x.bfloat16() for n, x in theirs.state_dict().items()}
    theirs = loaded(theirs, wide)
    scales = {n: p.data.clone() for n, p in plain.named_parameters() if n.endswith(".scale")}
    plain.bfloat16()
    for name, parameter in plain.named_parameters():  # diffusers keeps these in float32
        parameter.data = scales.get(name, parameter.data)
    batch["t"], batch["target"] = narrow["t"], narrow.get("target")
    expected = diffusers_velocity3(theirs, **narrow)
    assert torch.equal(plain(**narrow), expected) and expected.std() > 0.1


@either
def test_converter_of_diffusers_reads_our_names_the_same_way(config):
    from diffusers.loaders.single_file_utils import (
        convert_flux3_transformer_checkpoint_to_diffusers as convert,
    )

    from flux.parity.reference3 import transformer3_to_diffusers

    state = randomise(Flux3(config)).state_dict()
    expected = transformer3_to_diffusers(state)
    found = convert({name: tensor.clone() for name, tensor in state.items()})
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in found)


# ------------------------------------------------------------------ which model


def test_key_of_the_target_tells_the_distilled_model(tmp_path):
    for name in (BASE, DISTILLED):
        path = of_full_size(tmp_path / f"{name}.safetensors", MODELS[name].transformer)
        assert get_spec(None, path) == get_spec(name, path) == MODELS[name]
        other = DISTILLED if name == BASE else BASE
        has = "has" if name == DISTILLED else "has no"
        kind = "a flow map" if name == DISTILLED else "a base model"
        assert refusal(get_spec, other, path) == (
            f"transformer: {path} {has} `ref_time_in`, so it is {kind}, unlike {other}. "
            f"Use `name={name}`, or leave `name` out."
        )


def test_transformers_of_other_families_are_named(tmp_path):
    three = of_full_size(tmp_path / "3.safetensors", MODELS[BASE].transformer)
    for name, family in (("flux.2-klein-4b", "FLUX.2"), ("flux.1-dev", "FLUX.1")):
        path = of_full_size(tmp_path / "x.safetensors", MODELS[name].transformer)
        assert refusal(get_spec, BASE, path) == (
            f"transformer: {path} is a {family} transformer, but {BASE} is FLUX 3. "
            "Choose another `name`, or leave `name` out."
        )
        assert f"is a FLUX 3 transformer, but {name} is {family}" in refusal(get_spec, name, three)


def test_pruned_and_damaged_files_are_told(tmp_path):
    pruned = replace(MODELS[BASE].transformer, depth_single=20)
    path = of_full_size(tmp_path / "pruned.safetensors", pruned)
    with pytest.warns(
        UserWarning, match="pruned flux.3-image-klein-base, with 5 mode and 20 single"
    ):
        assert get_spec(None, path).transformer == pruned
    state = randomise(Flux3(FLUX3_TINY)).state_dict()
    del state["txt_in.weight"]
    path = saved(tmp_path / "damaged.safetensors", state)
    assert "has no 'txt_in.weight' and looks like a FLUX 3 transformer" in refusal(
        infer_config, path
    )
    state["txt_in.weight"] = torch.zeros(128, 40)
    state["txt_mode_blocks.0.norm.query_norm.scale"] = torch.ones(30)
    path = saved(tmp_path / "odd.safetensors", state)
    assert "has sizes of no FLUX 3 transformer: hidden size 128, heads of 30" in refusal(
        infer_config, path
    )


# ------------------------------------------------------------------ which text encoder


def text_networks(spec, path):
    return build_networks(spec.text, {"model": [path]}, device=torch.device("cpu"), dtype=None)


def test_text_encoders_of_the_same_sizes_are_named(tmp_path):
    """Qwen3 4B and Qwen3-VL 4B: an image encoder tells, or its name for the text, or all layers."""
    klein, three = MODELS["flux.2-klein-4b"], MODELS[BASE]
    state = init_empty(lambda: LanguageModel(replace(klein.text.model, layers=(36,)))).state_dict()
    whole = {f"model.{name}": tuple(tensor.shape) for name, tensor in state.items()}
    above = tuple(f"model.layers.{number}." for number in range(32, 36))
    layers = {n: s for n, s in whole.items() if not n.startswith(above)}
    files = {
        "qwen3": hollow(tmp_path / "qwen3.safetensors", whole),
        "seen": hollow(tmp_path / "seen.safetensors", whole | {"visual.blocks.0.x": (2, 2)}),
        "vl": hollow(
            tmp_path / "vl.safetensors",
            {n.replace("model.", "model.language_model.", 1): s for n, s in layers.items()},
        ),
        "cut": hollow(tmp_path / "cut.safetensors", layers),
    }
    for name in ("seen", "vl"):
        text_networks(three, files[name])
        assert refusal(text_networks, klein, files[name]) == (
            f"text_encoder: {files[name]} is Qwen3-VL, of FLUX 3, but FLUX.2 [klein] reads Qwen3. "
            "Pass text_encoder/ of a repository of FLUX.2 [klein]."
        )
    text_networks(klein, files["qwen3"])
    assert refusal(text_networks, three, files["qwen3"]) == (
        f"text_encoder: {files['qwen3']} is Qwen3, of FLUX.2 [klein], but FLUX 3 reads Qwen3-VL. "
        "Pass text_encoder/ of a repository of FLUX 3."
    )
    for spec in (klein, three):  # the layers alone may be of either
        text_networks(spec, files["cut"])


@pytest.mark.parametrize(
    "names, architecture, kind",
    [
        (["blk.0.attn_q_norm.weight"], "qwen3", "Qwen3"),
        (["blk.0.attn_q_norm.weight"], "qwen3vl", "Qwen3-VL"),
        (["language_model.model.layers.39.mlp.up_proj.weight"], None, None),  # Mistral
        (["layers.31.self_attn.q_norm.weight"], None, None),
        (["layers.32.self_attn.q_norm.weight"], None, "Qwen3"),
    ],
)
def test_kinds_of_language_models(names, architecture, kind):
    metadata = {"general.architecture": architecture} if architecture else {}
    assert qwen_kind(names, metadata, 32) == kind
