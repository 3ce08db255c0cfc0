"""flux.configs: the table of models says what the models' authors say.

The truth: Black Forest Labs' repositories flux and flux2 (`configs` in flux/util.py; `FLUX2_MODEL_INFO` in flux2/util.py;
the defaults of their scripts), the repositories' model cards, and diffusers' pipelines. Shapes of tensors are elsewhere.
"""

from dataclasses import FrozenInstanceError, fields, is_dataclass

import pytest

import flux
from flux.configs import EMBEDDED, MODELS, FLUX1Text, FLUX2Text
from flux.errors import UserError
from flux.pipeline import find_spec

REAL = {name: spec for name, spec in MODELS.items() if not spec.embedded}

# From the cards of FLUX.1-schnell (4 steps, 256 tokens, no guidance), FLUX.1-dev (50 steps, guidance 3.5, 512 tokens) and
# FLUX.1-Krea-dev (28 to 32 steps, guidance 4.5), whose step counts and lengths BFL's scripts share; from FLUX2_MODEL_INFO
# for FLUX.2: 50 steps at guidance 4 but for the distilled [klein], which is fixed to 4 steps without guidance.
# name: (file, schedule, steps, guidance, classifier-free, text tokens, fixed)
DEFAULTS = {
    "flux.1-schnell": ("flux1-schnell", "unshifted", 4, None, False, 256, True),
    "flux.1-dev": ("flux1-dev", "linear", 50, 3.5, False, 512, False),
    "flux.1-krea-dev": ("flux1-krea-dev", "linear", 28, 4.5, False, 512, False),
    "flux.2-dev": ("flux2-dev", "empirical", 50, 4.0, False, 512, False),
    "flux.2-klein-4b": ("flux-2-klein-4b", "empirical", 4, None, False, 512, True),
    "flux.2-klein-9b": ("flux-2-klein-9b", "empirical", 4, None, False, 512, True),
    "flux.2-klein-9b-kv": ("flux-2-klein-9b-kv", "empirical", 4, None, False, 512, True),
    "flux.2-klein-base-4b": ("flux-2-klein-base-4b", "empirical", 50, 4.0, True, 512, False),
    "flux.2-klein-base-9b": ("flux-2-klein-base-9b", "empirical", 50, 4.0, True, 512, False),
}

# Of BFL's parameter classes: hidden size, heads, double and single blocks, width of the text, axes, theta, guidance embedding.
FLUX1, KLEIN_4B = (3072, 24, 19, 38, 4096, (16, 56, 56), 10_000), (3072, 24, 5, 20, 7680, (32,) * 4, 2000, False)
KLEIN_9B = (4096, 32, 8, 24, 12288, (32,) * 4, 2000, False)
NETWORKS = {
    "flux.1-schnell": (*FLUX1, False),
    "flux.1-dev": (*FLUX1, True),
    "flux.1-krea-dev": (*FLUX1, True),
    "flux.2-dev": (6144, 48, 8, 48, 15360, (32,) * 4, 2000, True),
    "flux.2-klein-4b": KLEIN_4B,
    "flux.2-klein-base-4b": KLEIN_4B,
    "flux.2-klein-9b": KLEIN_9B,
    "flux.2-klein-9b-kv": KLEIN_9B,
    "flux.2-klein-base-9b": KLEIN_9B,
}


@pytest.mark.parametrize("name", REAL)
def test_defaults(name):
    spec = MODELS[name]
    file, *defaults, fixed = DEFAULTS[name]
    assert [spec.schedule, spec.steps, spec.guidance, spec.cfg, spec.text_length] == defaults
    assert spec.transformer_file == f"{file}.safetensors" and bool(spec.fixed) == fixed and spec.size == 1024


@pytest.mark.parametrize("name", REAL)
def test_networks(name):
    spec, c = MODELS[name], MODELS[name].transformer
    sizes = (c.hidden_size, c.num_heads, c.depth, c.depth_single, c.context_dim, c.axes_dim, c.theta, c.guidance)
    assert sizes == NETWORKS[name] and c.hidden_size // c.num_heads == sum(c.axes_dim) == 128
    kind = (c.in_channels, c.mlp_ratio, c.vector_dim, c.bias, c.gated_mlp, c.shared_modulation)
    autoencoder = (spec.autoencoder.z_channels, spec.autoencoder.scale_factor, spec.autoencoder.shift_factor)
    if name.startswith("flux.1"):
        assert kind == (64, 4, 768, True, False, False) and autoencoder == (16, 0.3611, 0.1159)
        assert isinstance(spec.text, FLUX1Text) and spec.text.t5.hidden_size == c.context_dim
    else:
        assert kind == (128, 3, None, False, True, True) and autoencoder == (32, None, None)
        assert isinstance(spec.text, FLUX2Text) and spec.text.model.features == c.context_dim
        assert spec.text.model.layers == ((10, 20, 30) if name == "flux.2-dev" else (9, 18, 27))
    assert c.in_channels == c.out_channels == spec.autoencoder.latent_channels


def test_names_and_repositories():
    assert REAL.keys() == DEFAULTS.keys() and flux.MODELS is MODELS
    assert all(f"black-forest-labs/{name}" == spec.repository.lower() for name, spec in REAL.items())
    assert all(name == spec.name for name, spec in MODELS.items())
    assert {s.repository.split("/")[1] for s in REAL.values()} == {
        "FLUX.1-schnell", "FLUX.1-dev", "FLUX.1-Krea-dev", "FLUX.2-dev", "FLUX.2-klein-4B", "FLUX.2-klein-9B",
        "FLUX.2-klein-9b-kv", "FLUX.2-klein-base-4B", "FLUX.2-klein-base-9B",
    }  # fmt: skip


def test_licences():
    free = {name for name, spec in MODELS.items() if spec.licence.commercial}
    assert free == {"flux.1-schnell", "flux.2-klein-4b", "flux.2-klein-base-4b", "flux.2-tiny"}
    assert all((spec.licence.name == "Apache-2.0") == spec.licence.commercial for spec in MODELS.values())
    assert {name for name, spec in MODELS.items() if not spec.licence.gated} == free - {"flux.1-schnell"}


def test_embedded_model_is_a_klein_whose_files_are_in_the_package():
    toy, klein = MODELS["flux.2-tiny"], MODELS["flux.2-klein-4b"]
    assert toy.embedded and [spec for spec in MODELS.values() if spec.embedded] == [toy]
    assert (toy.schedule, toy.guidance, toy.cfg) == (klein.schedule, klein.guidance, klein.cfg)
    names = (toy.transformer_file, *toy.autoencoder_files, *toy.text.files, *toy.text.tokenizer)
    assert all((EMBEDDED / name).is_file() for name in names) and EMBEDDED.parent.name == "flux"
    assert toy.text.model.features == toy.transformer.context_dim
    assert toy.transformer.in_channels == toy.autoencoder.latent_channels


@pytest.mark.parametrize("name", MODELS)
def test_rows_are_frozen_all_the_way_down(name):
    def freeze(config) -> None:
        for field in fields(config):
            with pytest.raises(FrozenInstanceError):
                setattr(config, field.name, None)
            value = getattr(config, field.name)
            freeze(value) if is_dataclass(value) else hash(value)

    freeze(MODELS[name])


@pytest.mark.parametrize("name", MODELS)
def test_a_row_is_found_by_its_name_in_any_case(name):
    assert find_spec(name) is find_spec(name.upper()) is find_spec(name.title()) is MODELS[name]


def test_without_a_name_it_is_the_embedded_model():
    assert find_spec(None).embedded


@pytest.mark.parametrize("wrong, near", [
    ("flux-dev", "flux.1-dev"), ("FLUX.1-Dev ", "flux.1-dev"), ("flux1-schnell", "flux.1-schnell"),
    ("klein-4b", "flux.2-klein-4b"), ("flux.2-klein-4b-base", "flux.2-klein-base-4b"), ("flux.3-dev", "flux.2-dev"),
    ("black-forest-labs/FLUX.2-dev", "flux.2-dev"),
])  # fmt: skip
def test_unknown_name_is_told_with_the_nearest(wrong, near):
    with pytest.raises(UserError, match="there is no such model; did you mean .*The choices are") as told:
        find_spec(wrong)
    assert f"--model {wrong}" in str(told.value)
    assert near in str(told.value).partition("did you mean ")[2].partition("?")[0]


@pytest.mark.parametrize("wrong", ["", "zzz", "../../etc/passwd"])
def test_unknown_name_with_nothing_near_is_told(wrong):
    with pytest.raises(UserError, match="there is no such model; The choices are") as told:
        find_spec(wrong)
    assert all(name in str(told.value) for name in MODELS)
