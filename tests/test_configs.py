"""flux.configs: the table of models says what the models' authors say.

The truth: Black Forest Labs' repositories flux and flux2 (`configs` in flux/util.py; `FLUX2_MODEL_INFO` in flux2/util.py;
the defaults of their scripts), the repositories' model cards, and diffusers' pipelines. Shapes of tensors are elsewhere.
"""

from dataclasses import FrozenInstanceError, fields, is_dataclass, replace

import pytest
from support.weight_files import refusal

import flux
from flux import configs
from flux.configs import EMBEDDED, MODELS, Addon, FLUX1Text, FLUX2Text
from flux.errors import UserError
from flux.loading import load
from flux.runtime.checks import check_guidance
from flux.weights import locate as models
from flux.weights.locate import get_spec, with_transformer

REAL = {
    name: spec
    for name, spec in MODELS.items()
    if not spec.embedded and spec.weight_format == "bfloat16"
}
QUANTISED = {name: spec for name, spec in MODELS.items() if spec.weight_format != "bfloat16"}

# From the cards of FLUX.1-schnell (4 steps, 256 tokens, no guidance), FLUX.1-dev (50 steps, guidance 3.5, 512 tokens) and
# FLUX.1-Krea-dev (28 to 32 steps, guidance 4.5), whose step counts and lengths BFL's scripts share; from FLUX2_MODEL_INFO
# for FLUX.2: 50 steps at guidance 4 but for the distilled [klein], which is fixed to 4 steps without guidance. From the
# defaults of BFL's scripts: cli_fill.py (50 steps, guidance 30, 128 tokens), cli_control.py (50 steps, guidance 30 for edges
# and 10 for depth), cli_redux.py (50 steps for [dev], guidance 2.5), cli_kontext.py (30 steps, guidance 2.5).
# name: (file, schedule, steps, guidance, classifier-free, text tokens, fixed)
DEFAULTS = {
    "flux.1-schnell": ("flux1-schnell", "unshifted", 4, None, False, 256, True),
    "flux.1-dev": ("flux1-dev", "linear", 50, 3.5, False, 512, False),
    "flux.1-krea-dev": ("flux1-krea-dev", "linear", 28, 4.5, False, 512, False),
    "flux.1-fill-dev": ("flux1-fill-dev", "linear", 50, 30.0, False, 128, False),
    "flux.1-canny-dev": ("flux1-canny-dev", "linear", 50, 30.0, False, 512, False),
    "flux.1-depth-dev": ("flux1-depth-dev", "linear", 50, 10.0, False, 512, False),
    "flux.1-canny-dev-lora": ("flux1-dev", "linear", 50, 30.0, False, 512, False),
    "flux.1-depth-dev-lora": ("flux1-dev", "linear", 50, 10.0, False, 512, False),
    "flux.1-redux-dev": ("flux1-dev", "linear", 50, 2.5, False, 512, False),
    "flux.1-kontext-dev": ("flux1-kontext-dev", "linear", 30, 2.5, False, 512, False),
    "flux.2-dev": ("flux2-dev", "empirical", 50, 4.0, False, 512, False),
    "flux.2-klein-4b": ("flux-2-klein-4b", "empirical", 4, None, False, 512, True),
    "flux.2-klein-9b": ("flux-2-klein-9b", "empirical", 4, None, False, 512, True),
    "flux.2-klein-9b-kv": ("flux-2-klein-9b-kv", "empirical", 4, None, False, 512, True),
    "flux.2-klein-base-4b": ("flux-2-klein-base-4b", "empirical", 50, 4.0, True, 512, False),
    "flux.2-klein-base-9b": ("flux-2-klein-base-9b", "empirical", 50, 4.0, True, 512, False),
}

# What a picture is to them, from the same scripts and the cards; to a model that knows no pictures, a start.
PICTURES = {
    "start": {"flux.1-schnell", "flux.1-dev", "flux.1-krea-dev", "flux.1-tiny"},
    "fill": {"flux.1-fill-dev"},
    "control": {
        "flux.1-canny-dev",
        "flux.1-depth-dev",
        "flux.1-canny-dev-lora",
        "flux.1-depth-dev-lora",
    },
    "redux": {"flux.1-redux-dev"},
    "reference": {
        "flux.1-kontext-dev",
        "flux.2-dev",
        "flux.2-klein-4b",
        "flux.2-klein-9b",
        "flux.2-klein-9b-kv",
        "flux.2-klein-base-4b",
        "flux.2-klein-base-9b",
        "flux.2-tiny",
    },
}

# From BFL's `configs` (repositories and files), cli_control.py (`lora_scale`), and diffusers' layout of FLUX.1-Redux-dev, in
# whose image_encoder/ lies the SigLIP so400m-patch14-384 that BFL's code takes from Google.
ADAPTERS = {
    "flux.1-canny-dev-lora": Addon(
        "black-forest-labs/FLUX.1-Canny-dev-lora",
        (("lora", "flux1-canny-dev-lora.safetensors"),),
        0.85,
    ),
    "flux.1-depth-dev-lora": Addon(
        "black-forest-labs/FLUX.1-Depth-dev-lora",
        (("lora", "flux1-depth-dev-lora.safetensors"),),
        0.85,
    ),
    "flux.1-redux-dev": Addon(
        "black-forest-labs/FLUX.1-Redux-dev",
        (("redux", "flux1-redux-dev.safetensors"), ("siglip", "image_encoder/model.safetensors")),
        1.0,
    ),
}

# Of BFL's parameter classes: hidden size, heads, double and single blocks, width of the text, axes, theta, guidance embedding.
FLUX1, KLEIN_4B = (
    (3072, 24, 19, 38, 4096, (16, 56, 56), 10_000),
    (3072, 24, 5, 20, 7680, (32,) * 4, 2000, False),
)
KLEIN_9B = (4096, 32, 8, 24, 12288, (32,) * 4, 2000, False)
NETWORKS = {
    "flux.1-schnell": (*FLUX1, False),
    "flux.1-dev": (*FLUX1, True),
    "flux.1-krea-dev": (*FLUX1, True),
    "flux.1-fill-dev": (*FLUX1, True),
    "flux.1-canny-dev": (*FLUX1, True),
    "flux.1-depth-dev": (*FLUX1, True),
    "flux.1-canny-dev-lora": (*FLUX1, True),
    "flux.1-depth-dev-lora": (*FLUX1, True),
    "flux.1-redux-dev": (*FLUX1, True),
    "flux.1-kontext-dev": (*FLUX1, True),
    "flux.2-dev": (6144, 48, 8, 48, 15360, (32,) * 4, 2000, True),
    "flux.2-klein-4b": KLEIN_4B,
    "flux.2-klein-base-4b": KLEIN_4B,
    "flux.2-klein-9b": KLEIN_9B,
    "flux.2-klein-9b-kv": KLEIN_9B,
    "flux.2-klein-base-9b": KLEIN_9B,
}
# Beside the latents' 64 channels: a control picture's latents; or a picture's latents, and a mask of 16x16 pixels a token
STACKED = {"flux.1-canny-dev": 64, "flux.1-depth-dev": 64, "flux.1-fill-dev": 64 + 256}


@pytest.mark.parametrize("name", REAL)
def test_defaults(name):
    spec = MODELS[name]
    file, *defaults, fixed = DEFAULTS[name]
    assert [spec.schedule, spec.steps, spec.guidance, spec.cfg, spec.text_length] == defaults
    assert (
        spec.transformer_file == f"{file}.safetensors"
        and bool(spec.distilled) == fixed
        and spec.size == 1024
    )


@pytest.mark.parametrize("name", REAL)
def test_networks(name):
    spec, c = MODELS[name], MODELS[name].transformer
    sizes = (
        c.hidden_size,
        c.num_heads,
        c.depth,
        c.depth_single,
        c.context_dim,
        c.axes_dim,
        c.theta,
        c.guidance,
    )
    assert sizes == NETWORKS[name] and c.hidden_size // c.num_heads == sum(c.axes_dim) == 128
    kind = (c.out_channels, c.mlp_ratio, c.vector_dim, c.bias, c.gated_mlp, c.shared_modulation)
    autoencoder = (
        spec.autoencoder.z_channels,
        spec.autoencoder.scale_factor,
        spec.autoencoder.shift_factor,
    )
    if name.startswith("flux.1"):
        assert kind == (64, 4, 768, True, False, False) and autoencoder == (16, 0.3611, 0.1159)
        assert isinstance(spec.text, FLUX1Text) and spec.text.t5.hidden_size == c.context_dim
    else:
        assert kind == (128, 3, None, False, True, True) and autoencoder == (32, None, None)
        assert isinstance(spec.text, FLUX2Text) and spec.text.model.features == c.context_dim
        assert spec.text.model.layers == ((10, 20, 30) if name == "flux.2-dev" else (9, 18, 27))
    assert (
        c.in_channels - STACKED.get(name, 0) == c.out_channels == spec.autoencoder.latent_channels
    )


@pytest.mark.parametrize("name", MODELS)
def test_what_a_picture_becomes(name):
    spec = MODELS[name]
    if name in QUANTISED:
        return
    assert [use for use, names in PICTURES.items() if name in names] == [spec.image_mode]
    kinds = {"flux.1-canny-dev": "canny", "flux.1-depth-dev": "depth"}
    assert spec.control == kinds.get(name.removesuffix("-lora"))
    assert spec.kv_cached_references == (
        name == "flux.2-klein-9b-kv"
    )  # FLUX2_MODEL_INFO: use_kv_cache


@pytest.mark.parametrize("name", MODELS)
def test_adapters(name):
    spec, base = MODELS[name], MODELS["flux.1-dev"]
    if name in QUANTISED:
        return
    assert spec.addon == ADAPTERS.get(name)
    if spec.addon:  # all else is of FLUX.1 [dev]
        assert (spec.repository, spec.licence, spec.transformer) == (
            base.repository,
            base.licence,
            base.transformer,
        )
        assert (spec.text, spec.autoencoder, spec.autoencoder_files) == (
            base.text,
            base.autoencoder,
            base.autoencoder_files,
        )


def test_quantised_rows_are_those_of_the_whole_model():
    """Of another file alone: all else, licence included, is the same. The names are those of the repositories."""
    assert {name: spec.addon.repository.split("/")[1] for name, spec in QUANTISED.items()} == {
        name.lower(): name
        for name in (
            "FLUX.2-dev-NVFP4",
            "FLUX.2-klein-4b-fp8",
            "FLUX.2-klein-4b-nvfp4",
            "FLUX.2-klein-9b-fp8",
            "FLUX.2-klein-9b-nvfp4",
            "FLUX.2-klein-9b-kv-fp8",
            "FLUX.2-klein-base-4b-fp8",
            "FLUX.2-klein-base-9b-fp8",
            "FLUX.2-klein-base-9b-nvfp4",
        )
    }
    for name, spec in QUANTISED.items():
        whole, _, storage = name.rpartition("-")
        file = dict(transformer_file=spec.transformer_file, addon=spec.addon, weight_format=storage)
        assert spec == replace(MODELS[whole], name=name, **file) and spec.weight_format == storage
        assert spec.addon.files == (("transformer", spec.transformer_file),)


def test_names_and_repositories():
    assert REAL.keys() == DEFAULTS.keys() and flux.MODELS is MODELS
    homes = {
        name: spec.addon.repository if spec.addon else spec.repository
        for name, spec in REAL.items()
    }
    assert all(f"black-forest-labs/{name}" == home.lower() for name, home in homes.items())
    assert all(name == spec.name for name, spec in MODELS.items())
    assert {home.split("/")[1] for home in homes.values()} == {
        "FLUX.1-schnell",
        "FLUX.1-dev",
        "FLUX.1-Krea-dev",
        "FLUX.1-Fill-dev",
        "FLUX.1-Canny-dev",
        "FLUX.1-Depth-dev",
        "FLUX.1-Canny-dev-lora",
        "FLUX.1-Depth-dev-lora",
        "FLUX.1-Redux-dev",
        "FLUX.1-Kontext-dev",
        "FLUX.2-dev",
        "FLUX.2-klein-4B",
        "FLUX.2-klein-9B",
        "FLUX.2-klein-9b-kv",
        "FLUX.2-klein-base-4B",
        "FLUX.2-klein-base-9B",
    }


def test_licences():
    free = {
        name for name, spec in MODELS.items() if spec.licence.commercial and name not in QUANTISED
    }
    assert free == {
        "flux.1-schnell",
        "flux.2-klein-4b",
        "flux.2-klein-base-4b",
        "flux.1-tiny",
        "flux.2-tiny",
    }
    assert all(
        (spec.licence.name == "Apache-2.0") == spec.licence.commercial for spec in MODELS.values()
    )
    open_to_all = {
        name for name, spec in MODELS.items() if not spec.licence.gated and name not in QUANTISED
    }
    assert open_to_all == free - {"flux.1-schnell"}
    owed = {
        name: spec.licence.name
        for name, spec in MODELS.items()
        if name not in free | QUANTISED.keys()
    }
    assert owed == {
        name: "FLUX.1 [dev] Non-Commercial License" for name in owed if name.startswith("flux.1")
    } | {
        "flux.2-dev": "FLUX.2 [dev] Non-Commercial License",
        "flux.2-klein-9b": "FLUX Non-Commercial License",
        "flux.2-klein-9b-kv": "FLUX Non-Commercial License",
        "flux.2-klein-base-9b": "FLUX Non-Commercial License",
    }


def test_embedded_models_are_a_klein_base_and_a_flux1_dev():
    assert [spec.name for spec in MODELS.values() if spec.embedded] == [
        "flux.1-tiny",
        "flux.2-tiny",
    ]
    for name, large in (("flux.1-tiny", "flux.1-dev"), ("flux.2-tiny", "flux.2-klein-base-4b")):
        toy, large = MODELS[name], MODELS[large]
        assert (toy.schedule, toy.cfg, toy.picture) == (
            large.schedule,
            large.cfg,
            large.picture,
        ) and toy.guidance > 1
        same = ("mlp_ratio", "theta", "guidance", "bias", "gated_mlp", "shared_modulation")
        assert all(
            getattr(toy.transformer, name) == getattr(large.transformer, name) for name in same
        )
        assert toy.transformer.in_channels == toy.autoencoder.latent_channels
    text = MODELS["flux.1-tiny"].text
    widths = text.t5.hidden_size, text.clip.hidden_size, MODELS["flux.2-tiny"].text.model.features
    assert widths == (configs.TINY1.context_dim, configs.TINY1.vector_dim, configs.TINY.context_dim)


@pytest.mark.parametrize("name", ["flux.1-tiny", "flux.2-tiny"])
def test_files_of_embedded_models_are_in_the_package_or_have_to_be_made(
    name, tmp_path, monkeypatch
):
    spec = MODELS[name]
    assert EMBEDDED.parent.name == "toy" and models.is_available_locally(spec)
    assert (
        sum(file.stat().st_size for file in (EMBEDDED / name).rglob("*") if file.is_file()) < 16e6
    )
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    assert not models.is_available_locally(spec)
    assert f"scripts/toy/train.py --model {name}" in refusal(load, name, device="cpu")


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
    assert get_spec(name) is get_spec(name.upper()) is get_spec(name.title()) is MODELS[name]


def test_without_a_name_it_is_the_embedded_model():
    assert get_spec(None).embedded


@pytest.mark.parametrize(
    "name, told, guidance, cfg",
    [
        ("flux.1-dev", True, 3.5, False),
        ("flux.1-dev", False, None, False),
        ("flux.1-schnell", True, 3.5, False),
        ("flux.1-fill-dev", True, 30, False),
        ("flux.2-klein-4b", True, 4, False),
        ("flux.2-klein-4b", False, None, False),
        ("flux.2-klein-base-4b", True, 4, False),
        ("flux.2-klein-base-4b", False, 4, True),
    ],
)
def test_another_transformer_is_guided_as_it_can_be(name, told, guidance, cfg):
    """By its own input, where it has one; a row's second pass needs none; and else there is no guidance to ask for."""
    row = MODELS[name]
    spec = with_transformer(row, replace(row.transformer, guidance=told))
    assert (spec.guidance, spec.cfg, spec.transformer.guidance) == (guidance, cfg, told)
    if guidance is None:
        with pytest.raises(UserError, match="takes no --guidance"):
            check_guidance(spec, 3.0, spec.steps)


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("flux-dev", "flux.1-dev"),
        ("FLUX.1-Dev ", "flux.1-dev"),
        ("flux1-schnell", "flux.1-schnell"),
        ("klein-4b", "flux.2-klein-4b"),
        ("flux.2-klein-4b-base", "flux.2-klein-base-4b"),
        ("flux.3-dev", "flux.2-dev"),
        ("black-forest-labs/FLUX.2-dev", "flux.2-dev"),
    ],
)
def test_unknown_name_is_told_with_the_nearest(wrong, near):
    with pytest.raises(
        UserError, match=r"there is no such model \(got .*\); did you mean .*The choices are"
    ) as told:
        get_spec(wrong)
    assert f"name: there is no such model (got {wrong})" in str(told.value)
    assert near in str(told.value).partition("did you mean ")[2].partition("?")[0]


@pytest.mark.parametrize("wrong", ["", "zzz", "../../etc/passwd"])
def test_unknown_name_with_nothing_near_is_told(wrong):
    with pytest.raises(UserError, match=r"there is no such model \(got .*\); The choices are") as told:
        get_spec(wrong)
    assert all(name in str(told.value) for name in MODELS)
