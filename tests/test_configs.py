"""flux.configs: the table of models equals what the models' authors publish.

Sources: Black Forest Labs' repositories flux and flux2 (`configs` in flux/util.py,
`FLUX2_MODEL_INFO` in flux2/util.py, the defaults of their scripts), model cards, and diffusers'
pipelines. tests/weights/test_manifests.py has the shapes of tensors.
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
from flux.transformer3 import Flux3Config
from flux.weights import locate as models
from flux.weights.locate import get_spec, with_transformer

REAL = {
    name: spec
    for name, spec in MODELS.items()
    if not spec.embedded and spec.weight_format == "bfloat16"
}
FLUX3 = {name: REAL.pop(name) for name in list(REAL) if REAL[name].flux3}
OTHER_FILES = {name: spec for name, spec in MODELS.items() if spec.weight_format != "bfloat16"}
QUANTIZED = {name: spec for name, spec in OTHER_FILES.items() if not spec.flux3}

# Model cards: FLUX.1-schnell (4 steps, 256 tokens, no guidance), FLUX.1-dev (50 steps, guidance
# 3.5, 512 tokens), FLUX.1-Krea-dev (28 to 32 steps, guidance 4.5). FLUX2_MODEL_INFO: 50 steps at
# guidance 4; the distilled [klein] is fixed to 4 steps without guidance. Defaults of BFL's scripts:
# cli_fill.py (50 steps, guidance 30, 128 tokens), cli_control.py (50 steps, guidance 30 for edges,
# 10 for depth), cli_redux.py (50 steps for [dev], guidance 2.5), cli_kontext.py (30 steps, 2.5).
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

# What an input image is, from the same scripts and the cards; for a text-to-image model, the start.
IMAGE_MODES = {
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
        "flux.3-image-klein",
        "flux.3-image-klein-base",
    },
}

# BFL's `configs` (repositories and files), cli_control.py (`lora_scale`), and diffusers' layout of
# FLUX.1-Redux-dev, whose image_encoder/ has the SigLIP that BFL's code takes from Google.
ADDONS = {
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

# BFL's parameter classes: hidden size, heads, double and single blocks, width of the text, axes,
# theta, guidance embedding
FLUX1 = (3072, 24, 19, 38, 4096, (16, 56, 56), 10_000)
KLEIN_4B = (3072, 24, 5, 20, 7680, (32,) * 4, 2000, False)
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
# In addition to the latents' 64 channels: a control image's latents; or an image's latents and a
# mask of 16x16 pixels per token
EXTRA_CHANNELS = {"flux.1-canny-dev": 64, "flux.1-depth-dev": 64, "flux.1-fill-dev": 64 + 256}


def test_defaults():
    for name, spec in REAL.items():
        file, *defaults, fixed = DEFAULTS[name]
        actual = [spec.schedule, spec.steps, spec.guidance, spec.cfg, spec.text_length]
        assert actual == defaults, name
        assert spec.transformer_file == f"{file}.safetensors"
        assert bool(spec.distilled) == fixed and spec.size == 1024, name


def test_networks():
    for name, spec in REAL.items():
        c, autoencoder = spec.transformer, spec.autoencoder
        sizes = (c.hidden_size, c.num_heads, c.depth, c.depth_single, c.context_dim)
        assert (*sizes, c.axes_dim, c.theta, c.guidance) == NETWORKS[name], name
        assert c.hidden_size // c.num_heads == sum(c.axes_dim) == 128
        kind = (c.out_channels, c.mlp_ratio, c.vector_dim, c.bias, c.gated_mlp, c.shared_modulation)
        latents = (autoencoder.z_channels, autoencoder.scale_factor, autoencoder.shift_factor)
        if name.startswith("flux.1"):
            assert kind == (64, 4, 768, True, False, False) and latents == (16, 0.3611, 0.1159)
            assert isinstance(spec.text, FLUX1Text) and spec.text.t5.hidden_size == c.context_dim
        else:
            assert kind == (128, 3, None, False, True, True) and latents == (32, None, None)
            assert isinstance(spec.text, FLUX2Text) and spec.text.model.features == c.context_dim
            layers = (10, 20, 30) if name == "flux.2-dev" else (9, 18, 27)
            assert spec.text.model.layers == layers
        assert c.in_channels - EXTRA_CHANNELS.get(name, 0) == c.out_channels
        assert c.out_channels == autoencoder.latent_channels


def test_flux3():
    """Defaults of diffusers' blocks, and of others' ports of Black Forest Labs' code."""
    assert set(FLUX3) == {"flux.3-image-klein", "flux.3-image-klein-base"}
    for name, spec in FLUX3.items():
        base = name.endswith("base")
        assert spec.transformer == Flux3Config(flow_map=not base)
        assert spec.repository == f"black-forest-labs/{name.replace('.3', '-3')}"
        assert spec.transformer_file == "model.safetensors" and spec.schedule == "constant"
        assert (spec.steps, spec.guidance, spec.cfg) == (
            (50, 3.5, True) if base else (16, None, False)
        )
        assert bool(spec.distilled) != base and spec.size == 1024 and spec.text_length == 8192
        assert spec.text.model.layers == (4, 8, 12, 16, 20, 24, 28, 32)
        assert spec.text.model.features == spec.transformer.context_dim == 20480
        assert (spec.text.model.theta, spec.text.model.padding_position) == (5_000_000, 1)
        assert spec.autoencoder == MODELS["flux.2-dev"].autoencoder
        assert spec.autoencoder_files[0] == "ae.safetensors"
        assert spec.pooled_dim is None and not spec.licence.commercial and spec.licence.gated
        with pytest.raises(UserError, match=f"^name: {name} is FLUX 3, which is not supported"):
            spec.flux_config  # noqa: B018


def test_use_of_input_images():
    kinds = {"flux.1-canny-dev": "canny", "flux.1-depth-dev": "depth"}
    for name, spec in MODELS.items():
        if name in OTHER_FILES:
            continue
        assert [mode for mode, names in IMAGE_MODES.items() if name in names] == [spec.image_mode]
        assert spec.control == kinds.get(name.removesuffix("-lora"))
        # use_kv_cache in FLUX2_MODEL_INFO
        assert spec.kv_cached_references == (name == "flux.2-klein-9b-kv")


def test_addons():
    """All else is FLUX.1 [dev]."""
    base = MODELS["flux.1-dev"]
    same = (
        "repository licence transformer transformer_file text autoencoder autoencoder_files".split()
    )
    for name, spec in MODELS.items():
        if name in OTHER_FILES:
            continue
        assert spec.addon == ADDONS.get(name)
        if spec.addon:
            assert all(getattr(spec, field) == getattr(base, field) for field in same), name


def test_quantized_rows_equal_the_unquantized_ones():
    """Only the file differs; names are those of the repositories."""
    assert {name: spec.addon.repository.split("/")[1] for name, spec in QUANTIZED.items()} == {
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
    for name, spec in QUANTIZED.items():
        base, _, storage = name.rpartition("-")
        file = dict(transformer_file=spec.transformer_file, addon=spec.addon, weight_format=storage)
        assert spec == replace(MODELS[base], name=name, **file) and spec.weight_format == storage
        assert spec.addon.files == (("transformer", spec.transformer_file),)


def test_other_files_of_flux3_change_the_file_alone():
    """In folders of the repository, as others load them; ComfyUI's have a repository."""
    places = {
        "fp8r": (None, "variants/fp8r/model.safetensors"),
        "nvfp4": (None, "variants/nvfp4/model.safetensors"),
        "comfy-bf16": ("flux-3-image-klein-comfy", "diffusion_models/flux3-{}-bf16.safetensors"),
        "comfy-int8-convrot": (
            "flux-3-image-klein-comfy",
            "diffusion_models/flux3-{}-int8-convrot.safetensors",
        ),
    }
    found = set()
    for base in FLUX3:
        for kind, (repository, file) in places.items():
            spec = MODELS[f"{base}-{kind}"]
            file = file.format(base.removeprefix("flux.3-"))
            addon = Addon(f"black-forest-labs/{repository}", (("transformer", file),))
            changed = dict(transformer_file=file, addon=addon if repository else None)
            changed |= dict(weight_format=kind, unconfirmed=spec.unconfirmed)
            assert spec == replace(MODELS[base], name=spec.name, **changed) and spec.unconfirmed
            found.add(spec.name)
    assert found == OTHER_FILES.keys() - QUANTIZED.keys()
    assert not any(spec.unconfirmed for name, spec in MODELS.items() if name not in found)


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
        name for name, spec in MODELS.items() if spec.licence.commercial and name not in OTHER_FILES
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
        name for name, spec in MODELS.items() if not spec.licence.gated and name not in OTHER_FILES
    }
    assert open_to_all == free - {"flux.1-schnell"}
    owed = {
        name: spec.licence.name
        for name, spec in MODELS.items()
        if name not in free | OTHER_FILES.keys()
    }
    assert owed == {
        name: "FLUX.1 [dev] Non-Commercial License" for name in owed if name.startswith("flux.1")
    } | {
        "flux.2-dev": "FLUX.2 [dev] Non-Commercial License",
        "flux.2-klein-9b": "FLUX Non-Commercial License",
        "flux.2-klein-9b-kv": "FLUX Non-Commercial License",
        "flux.2-klein-base-9b": "FLUX Non-Commercial License",
        "flux.3-image-klein": "FLUX Kommunity License v1.0",
        "flux.3-image-klein-base": "FLUX Kommunity License v1.0",
    }


def test_embedded_models_resemble_klein_base_and_flux1_dev():
    assert [spec.name for spec in MODELS.values() if spec.embedded] == [
        "flux.1-tiny",
        "flux.2-tiny",
    ]
    for name, large in (("flux.1-tiny", "flux.1-dev"), ("flux.2-tiny", "flux.2-klein-base-4b")):
        toy, large = MODELS[name], MODELS[large]
        assert (toy.schedule, toy.cfg, toy.image_mode) == (
            large.schedule,
            large.cfg,
            large.image_mode,
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
def test_missing_files_of_embedded_models_are_refused(name, tmp_path, monkeypatch):
    spec = MODELS[name]
    assert EMBEDDED.parent.name == "toy" and models.is_available_locally(spec)
    assert (
        sum(file.stat().st_size for file in (EMBEDDED / name).rglob("*") if file.is_file()) < 16e6
    )
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    assert not models.is_available_locally(spec)
    assert f"scripts/toy/train.py --model {name}" in refusal(load, name, device="cpu")


def frozen(config) -> bool:
    """Return whether no field of a dataclass, or of the dataclasses in its fields, can be set."""
    for field in fields(config):
        with pytest.raises(FrozenInstanceError):
            setattr(config, field.name, None)
        value = getattr(config, field.name)
        if is_dataclass(value):
            assert frozen(value)
        else:
            hash(value)
    return True


def test_rows_are_frozen_and_found_by_name_in_any_case():
    for name, spec in MODELS.items():
        assert frozen(spec)
        assert get_spec(name) is get_spec(name.upper()) is get_spec(name.title()) is spec


def test_default_is_an_embedded_model():
    assert get_spec(None).embedded


@pytest.mark.parametrize(
    "name, embeds, guidance, cfg",
    [
        ("flux.1-dev", True, 3.5, False),
        ("flux.1-dev", False, 3.5, True),  # de-distilled
        ("flux.1-fill-dev", False, 3.5, True),
        ("flux.1-schnell", False, None, False),
        ("flux.1-schnell", True, 3.5, False),
        ("flux.1-fill-dev", True, 30, False),
        ("flux.2-klein-4b", True, 4, False),
        ("flux.2-klein-4b", False, None, False),
        ("flux.2-klein-base-4b", True, 4, False),
        ("flux.2-klein-base-4b", False, 4, True),
    ],
)
def test_other_transformer_changes_guidance(name, embeds, guidance, cfg):
    """An embedded guidance, else classifier-free guidance if the row has any, else none."""
    row = MODELS[name]
    spec = with_transformer(row, replace(row.transformer, guidance=embeds))
    assert (spec.guidance, spec.cfg, spec.transformer.guidance) == (guidance, cfg, embeds)
    if guidance is None:
        with pytest.raises(UserError, match="^guidance: .* takes none"):
            check_guidance(spec, 3.0, spec.steps)


@pytest.mark.parametrize(
    "name, row",
    [
        # the names of repositories
        *((f"black-forest-labs/{name.upper()}", name) for name in MODELS),
        # of BFL's command line
        ("flux-schnell", "flux.1-schnell"),
        ("flux-dev", "flux.1-dev"),
        ("flux-dev-krea", "flux.1-krea-dev"),
        ("flux-dev-kontext", "flux.1-kontext-dev"),
        ("flux-dev-fill", "flux.1-fill-dev"),
        ("flux-dev-canny", "flux.1-canny-dev"),
        ("flux-dev-canny-lora", "flux.1-canny-dev-lora"),
        ("flux-dev-depth", "flux.1-depth-dev"),
        ("flux-dev-depth-lora", "flux.1-depth-dev-lora"),
        ("flux-dev-redux", "flux.1-redux-dev"),
        # of mflux and of files
        ("dev", "flux.1-dev"),
        ("schnell", "flux.1-schnell"),
        ("krea-dev", "flux.1-krea-dev"),
        ("kontext", "flux.1-kontext-dev"),
        ("flux1-dev", "flux.1-dev"),
        ("FLUX.1 [dev]", "flux.1-dev"),
        ("flux2_dev", "flux.2-dev"),
        ("flux-2-klein-base-9b", "flux.2-klein-base-9b"),
        ("klein-4b", "flux.2-klein-4b"),
        ("flux2-klein-9b-kv-fp8", "flux.2-klein-9b-kv-fp8"),
        ("https://huggingface.co/black-forest-labs/FLUX.1-dev/tree/main?x=1", "flux.1-dev"),
    ],
)
def test_names_of_other_tools_stand_for_the_same_models(name, row):
    assert get_spec(name) is MODELS[row]


@pytest.mark.parametrize(
    "wrong, near",
    [
        ("flux.3-dev", "flux.2-dev"),
        ("flux.2-klein-14b", "flux.2-klein-"),
        ("flux.1-shnell", "flux.1-schnell"),
        ("klein", "flux.2-klein-4b"),  # the first with this word
        ("flux-dve", "flux.1-dev"),
        ("flux1", "flux.1-dev"),
        # of repositories and files that other people made of a model
        ("city96/FLUX.1-dev-gguf", "flux.1-dev?"),
        ("unsloth/FLUX.2-klein-4B-GGUF", "flux.2-klein-4b?"),
        ("mlx-community/FLUX.1-Krea-dev-4bit", "flux.1-krea-dev?"),
        ("flux1-schnell-Q4_K_S.gguf", "flux.1-schnell?"),
        ("flux-kontext-pro", "flux.1-kontext-dev"),
        ("flux-pro", None),  # a service alone
        ("", None),
        ("zzz", None),
        ("../../etc/passwd", None),
        ("sdxl", None),
    ],
)
def test_unknown_name_is_told_the_nearest(wrong, near):
    with pytest.raises(UserError) as caught:
        get_spec(wrong)
    message = str(caught.value)
    assert message.startswith(f"name: there is no such model (got {wrong}). ")
    assert "flux.MODELS" in message and len(message) < 250
    assert ("no weights are released" in message) == wrong.endswith("pro")
    if near:
        assert message.partition("Did you mean ")[2].startswith(near), message
    else:  # of nothing that is near
        assert "Did you mean" not in message


def test_long_name_is_shown_in_part():
    """The record in an image may name any model."""
    assert len(refusal(get_spec, 5000 * "9")) < 400
