"""Every network of the table of models, at full size on the meta device, is the released one: names, types, shapes, bytes.

The truth is tests/manifests/, which scripts/manifest.py derives from diffusers' and transformers' classes; and, since those
could err too, the counts of Black Forest Labs' own classes and the sizes that Hugging Face lists for the files. No released
file was read for it.
"""

import json
import re
import sys
from math import prod
from pathlib import Path

import pytest
import torch
from reference import diffusers_autoencoder, shapes
from safetensors.torch import save_file

from flux.autoencoder import AutoEncoderConfig, from_diffusers
from flux.clip import CLIPConfig
from flux.configs import AE1, AE2, AE2_SMALL_DECODER, MISTRAL, MODELS
from flux.language_model import LanguageModelConfig
from flux.t5 import T5Config
from flux.text import language_model_unread

ROOT = Path(__file__).resolve().parents[1]
sys.path.append(str(ROOT / "scripts"))

import manifest  # noqa: E402
from manifest import MANIFESTS, check, comparable, differences, dumps, from_files, from_json, size  # noqa: E402

every_manifest = pytest.mark.parametrize(("name", "config"), MANIFESTS.items(), ids=MANIFESTS)

# Tensors and parameters, counted in Black Forest Labs' own classes on the meta device; statistics are no parameters.
COUNTED = {
    "flux1-dev": (780, 11_901_408_320),
    "flux1-schnell": (776, 11_891_178_560),
    "flux2-dev": (299, 32_223_281_152),
    "klein-4b": (149, 3_875_544_576),
    "klein-9b": (201, 9_078_581_248),
    "ae-flux1": (244, 83_819_683),
    "ae-flux2": (251, 84_046_115),
}
# Bytes of the files as Hugging Face lists them, shards added up: second-hand, from the checks of public download scripts.
LISTED = {
    "flux1-dev": 23_802_932_552,
    "flux1-schnell": 23_782_506_688,
    "klein-4b": 7_751_105_712,
    "klein-9b": 18_157_185_168,
    "ae-flux1": 335_304_388,
    "ae-flux2": 336_213_556,
    "ae-flux2-small-decoder": 249_519_092,
    "t5-xxl": 4_994_582_224 + 4_530_066_360,
    "clip-l": 246_144_352,
    "qwen3-4b": 4_967_215_360 + 3_077_766_632,
    "qwen3-8b": 4_902_257_696 + 4_915_960_368 + 4_983_068_496 + 1_580_230_264,
}
LISTED_KLEIN_VAE = 168_120_878  # vae/diffusion_pytorch_model.safetensors of the klein repositories, in bfloat16


def read_of(name: str, config: manifest.Config) -> manifest.Manifest:
    """What we read of a file, in our names."""
    held = from_json(name)
    if not isinstance(config, LanguageModelConfig):
        return held
    last = max(config.layers)
    return {bare: entry for n, entry in held.items() if not language_model_unread(bare := n.removeprefix("model."), last)}


# ---------------------------------------------------------------- our networks


@pytest.mark.parametrize("model", MODELS)
def test_every_network_of_every_model_has_a_manifest(model):
    networks = manifest.parts(MODELS[model])
    assert len(networks) == (4 if model.startswith("flux.1") else 3)
    assert all(config in MANIFESTS.values() for config, _ in networks.values())


@every_manifest
def test_network_equals_its_manifest(name, config):
    ours, held = manifest.on_meta(config).state_dict(), read_of(name, config)
    dtype = "F32" if name in ("ae-flux1", "ae-flux2", "ae-flux2-small-decoder") else "BF16"
    expected = {n: ("I64" if n == "bn.num_batches_tracked" else dtype, s) for n, s in shapes(ours).items()}
    assert not differences(expected, held)
    assert expected == held
    width = 4 if dtype == "F32" else 2
    assert size(held) == sum(t.numel() * (width if t.is_floating_point() else 8) for t in ours.values())


@pytest.mark.parametrize("name", COUNTED)
def test_counts_are_those_of_the_original_code(name):
    network = manifest.on_meta(MANIFESTS[name])
    parameters = sum(p.numel() for p in network.parameters())
    assert (len(network.state_dict()), parameters) == COUNTED[name] == (len(from_json(name)), parameters)


def test_language_models_leave_out_the_upper_layers():
    # 11 tensors a layer in Qwen3, 9 in Mistral; a quarter of 36 and of 40 layers is never read
    assert {name: len(read_of(name, MANIFESTS[name])) for name in ("qwen3-4b", "qwen3-8b", "mistral-small")} == {
        "qwen3-4b": 27 * 11 + 1, "qwen3-8b": 27 * 11 + 1, "mistral-small": 30 * 9 + 1,
    }  # fmt: skip
    assert len(from_json("qwen3-4b")) == 36 * 11 + 2  # and the final norm; the head is tied to the embedding
    assert len(from_json("qwen3-8b")) == 36 * 11 + 3  # and the head


# ---------------------------------------------------------------- the manifests


@every_manifest
def test_manifest_is_what_the_reference_builds(name, config):
    assert manifest.from_reference(config) == from_json(name)
    assert (ROOT / "tests" / "manifests" / f"{name}.json").read_text() == dumps(from_json(name))


@pytest.mark.parametrize("name", LISTED)
def test_bytes_are_those_of_the_released_file_less_its_header(name):
    header = LISTED[name] - size(from_json(name))
    assert 100 < header / len(from_json(name)) < 200  # a name, a type, a shape and two offsets, in JSON


def test_the_table_names_no_manifest_twice_and_none_is_left_over():
    assert len(set(MANIFESTS.values())) == len(MANIFESTS)
    assert {path.stem for path in manifest.FOLDER.iterdir()} == set(MANIFESTS)


@pytest.mark.parametrize("config", [AE1, AE2, AE2_SMALL_DECODER], ids=["flux.1", "flux.2", "small decoder"])
def test_vae_folders_hold_the_same_network(config: AutoEncoderConfig):
    """diffusers' names and shapes, through `from_diffusers`, are those of ae.safetensors."""
    vae, expected = shapes(diffusers_autoencoder(config).state_dict()), from_json(manifest.name_of(config))
    assert {from_diffusers(name) for name in vae} == expected.keys()
    assert {from_diffusers(name) for name in expected} == expected.keys()
    held = {name: ("I64" if name == "bn.num_batches_tracked" else "F32", shape) for name, shape in vae.items()}
    assert comparable(held, config) == comparable(expected, config) == expected
    assert held.keys() != expected.keys()


def test_klein_vae_is_the_flux2_autoencoder_in_bfloat16():
    elements = [(dtype, prod(shape)) for dtype, shape in from_json("ae-flux2").values()]
    assert 100 < (LISTED_KLEIN_VAE - sum(n * (8 if dtype == "I64" else 2) for dtype, n in elements)) / len(elements) < 200


# ---------------------------------------------------------------- files


def test_embedded_files_equal_their_manifests(capsys):
    assert check(MODELS["flux.2-tiny"], None) == 0
    assert capsys.readouterr().out.count("as it should be") == 3


def test_files_are_read_by_their_headers(tmp_path):
    save_file({"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(4), "n": torch.tensor(7)}, tmp_path / "m-2.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a.weight": "m-1.safetensors", "b": "m-2.safetensors"}}))
    found = from_files([index])
    assert found == {"a.weight": ("BF16", (2, 3)), "b": ("F32", (4,)), "n": ("I64", ())}
    assert json.loads(dumps(found)) == {
        "count": 3, "bytes": 12 + 16 + 8, "tensors": {"a.weight": ["BF16", [2, 3]], "b": ["F32", [4]], "n": ["I64", []]},
    }  # fmt: skip


def test_differences_are_told():
    expected = from_json("klein-4b")
    found = dict(expected)
    del found["img_in.weight"]
    found["guidance_in.in_layer.weight"] = ("BF16", (3072, 256))
    found["txt_in.weight"] = ("F8_E4M3", (3072, 7680))
    found["final_layer.linear.weight"] = ("BF16", (64, 3072))
    assert differences(found, expected) == [
        "1 of 149 missing, first img_in.weight (nothing in place of BF16 (3072, 128))",
        "1 of 149 unknown, first guidance_in.in_layer.weight (BF16 (3072, 256) in place of nothing)",
        "1 of 149 of another type, first txt_in.weight (F8_E4M3 (3072, 7680) in place of BF16 (3072, 7680))",
        "1 of 149 of another shape, first final_layer.linear.weight (BF16 (64, 3072) in place of BF16 (128, 3072))",
    ]
    assert not differences(expected, expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_files_may_hold_more_than_is_read(prefix):
    mistral, t5, clip = from_json("mistral-small"), from_json("t5-xxl"), from_json("clip-l")
    whole = {prefix + name: entry for name, entry in mistral.items()}
    whole[f"{prefix}layers.30.mlp.up_proj.weight"] = ("BF16", (32768, 5120))
    whole["vision_tower.patch_conv.weight"] = ("BF16", (1024, 3, 14, 14))
    assert comparable(whole, MISTRAL) == mistral
    assert comparable(t5 | {"encoder.embed_tokens.weight": t5["shared.weight"]}, T5Config()) == t5
    assert comparable(clip | {"text_model.embeddings.position_ids": ("I64", (1, 77))}, CLIPConfig()) == clip


def test_absent_files_are_named(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flux.weights._in_cache", lambda repository, filename: None)
    assert check(MODELS["flux.2-klein-4b"], tmp_path) == 1
    said = "transformer: flux-2-klein-4b.safetensors of black-forest-labs/FLUX.2-klein-4B is not here"
    assert said in capsys.readouterr().out


# ---------------------------------------------------------------- weights.md


def test_tables_of_weights_md_are_computed():
    """If this fails, put in what `python scripts/manifest.py --markdown` prints."""
    text = (ROOT / "weights.md").read_text()
    for table in manifest.tables():
        assert f"\n\n{table}\n\n" in text
    assert len(re.findall(r"(?m)^\| ---", text)) == len(manifest.tables())
    assert all(path.exists() for path in map(ROOT.joinpath, re.findall(r"\]\((tests/[^)]+)\)", text)))
