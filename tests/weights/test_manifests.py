"""Every network of the table of models, at full size on the meta device, is the released one.

The truth is tests/manifests, which scripts/dev/manifest.py derives from diffusers' and
transformers' classes. Since those could err too, counts of Black Forest Labs' own classes and the
file sizes that Hugging Face lists are compared too. No released file was read for these tests.
"""

import hashlib
import json
import re
import sys
from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from flux.autoencoder import AutoEncoderConfig
from flux.clip import CLIPConfig
from flux.configs import AE1, AE2, AE2_SMALL_DECODER, FLUX1, MISTRAL, MODELS
from flux.language_model import LanguageModelConfig
from flux.lora.formats import LoraFile, match_layers
from flux.lora.peft_config import PeftConfig
from flux.parity.reference import diffusers_autoencoder, diffusers_transformer, shapes
from flux.runtime.memory_plan import measure_weights
from flux.siglip import SigLIPConfig, siglip_ignore_keys
from flux.t5 import T5Config
from flux.text_encoder import language_model_ignore_keys
from flux.weights.checksums import Published
from flux.weights.diffusers_names import from_diffusers
from flux.weights.load import infer_config, load_module
from flux.weights.quantization import QuantizedLinear

ROOT = Path(__file__).resolve().parents[2]
sys.path.append(str(ROOT / "scripts"))

from dev import manifest
from dev.manifest import (
    MANIFESTS,
    check,
    comparable,
    differences,
    dumps,
    from_files,
    from_json,
    size,
)

DERIVED = manifest.ControlLoraConfig, manifest.QuantizedConfig  # from the manifests of transformers
NETWORKS = {name: config for name, config in MANIFESTS.items() if not isinstance(config, DERIVED)}
QUANTIZED = {
    name: config
    for name, config in MANIFESTS.items()
    if isinstance(config, manifest.QuantizedConfig)
}
every_manifest = pytest.mark.parametrize(("name", "config"), MANIFESTS.items(), ids=MANIFESTS)
every_network = pytest.mark.parametrize(("name", "config"), NETWORKS.items(), ids=NETWORKS)

# Tensors and parameters, counted in Black Forest Labs' own classes on the meta device.
# BatchNorm statistics are not parameters.
COUNTED = {
    "flux1-dev": (780, 11_901_408_320),
    "flux1-schnell": (776, 11_891_178_560),
    "flux1-fill": (780, 11_902_391_360),
    "flux1-control": (780, 11_901_604_928),
    "flux2-dev": (299, 32_223_281_152),
    "klein-4b": (149, 3_875_544_576),
    "klein-9b": (201, 9_078_581_248),
    "flux3-klein": (359, 5_548_681_984),  # as others count the released file
    "flux3-klein-base": (357, 5_538_458_368),
    "ae-flux1": (244, 83_819_683),
    "ae-flux2": (251, 84_046_115),
}
CONTROL_LORA = (
    942,
    622_106_688,
)  # keys and elements of A, B and the bias of B, counted in the same way
# Bytes of the files as Hugging Face lists them, shards added up: second-hand, from the checks of
# public download scripts.
LISTED = [
    ("flux1-dev", 23_802_932_552),
    ("flux1-dev", 23_802_947_360),  # Kontext
    ("flux1-schnell", 23_782_506_688),
    ("flux1-fill", 23_804_922_408),
    ("flux1-control", 23_803_351_736),  # Canny
    ("flux1-control-lora", 1_244_443_944),  # Canny
    ("flux1-control-lora", 1_244_440_512),  # Depth
    ("klein-4b", 7_751_105_712),
    ("klein-9b", 18_157_185_168),
    ("klein-4b-fp8", 4_070_624_520),
    ("klein-4b-nvfp4", 2_460_413_488),
    ("ae-flux1", 335_304_388),
    ("ae-flux2", 336_213_556),
    ("ae-flux2-small-decoder", 249_519_092),
    ("t5-xxl", 4_994_582_224 + 4_530_066_360),
    ("clip-l", 246_144_352),
    ("siglip", 856_505_640),  # sigclip_vision_patch14_384.safetensors of ComfyUI
    ("qwen3-4b", 4_967_215_360 + 3_077_766_632),
    ("qwen3-8b", 4_902_257_696 + 4_915_960_368 + 4_983_068_496 + 1_580_230_264),
]
LISTED_KLEIN_VAE = (
    168_120_878  # vae/diffusion_pytorch_model.safetensors of the klein repositories, in bfloat16
)
LISTED_REDUX = 129_063_232
LISTED_BASE_FP8 = 4_089_498_488  # flux-2-klein-base-4b-fp8.safetensors
# Tensors: 309 and 731 were counted in headers; the others follow from 2 or 3 more for each layer
QUANTIZED_COUNTS = {
    "klein-4b-fp8": 309,
    "klein-9b-fp8": 201 + 2 * 112,
    "klein-4b-nvfp4": 149 + 3 * 80,
    "klein-9b-nvfp4": 201 + 3 * 112,
    "flux2-dev-nvfp4": 731,
    # if all 258 matrices of the blocks are quantized; others count 234, or 198 in NVFP4
    "flux3-klein-fp8r": 359 + 258,
    "flux3-klein-nvfp4": 359 + 3 * 258,
    "flux3-klein-int8-convrot": 359 + 2 * 258,
    "flux3-klein-base-fp8r": 357 + 258,
    "flux3-klein-base-nvfp4": 357 + 3 * 258,
    "flux3-klein-base-int8-convrot": 357 + 2 * 258,
}


def read_of(name: str, config: manifest.Config) -> manifest.Manifest:
    """Return the tensors that we read of a file, by our names."""
    held = from_json(name)
    match config:
        case LanguageModelConfig():
            prefix, unread = (
                "model.",
                lambda bare: language_model_ignore_keys(bare, max(config.layers)),
            )
        case SigLIPConfig():
            prefix, unread = "vision_model.", siglip_ignore_keys
        case _:
            return held
    return {bare: entry for n, entry in held.items() if not unread(bare := n.removeprefix(prefix))}


def of_size(shape: tuple[int, ...]) -> torch.Tensor:
    """Return a tensor that takes no memory and is not on the meta device."""
    return torch.zeros(()).expand(shape)


def write_header(
    path: Path,
    held: manifest.Manifest,
    metadata: dict[str, str] | None = None,
    values: dict[str, bytes] | None = None,
) -> None:
    """Write a safetensors file whose tensors are a hole, which takes no space on most disks.

    `values`: the bytes of some tensors.
    """
    spans, end = ({"__metadata__": metadata} if metadata else {}), 0
    for name, (dtype, shape) in held.items():
        start, end = end, end + size({name: (dtype, shape)})
        spans[name] = {"dtype": dtype, "shape": shape, "data_offsets": [start, end]}
    header = json.dumps(spans).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
        for name, content in (values or {}).items():
            file.seek(8 + len(header) + spans[name]["data_offsets"][0])
            file.write(content)


# ---------------------------------------------------------------- our networks


def test_every_network_of_every_model_has_a_manifest():
    for name, spec in MODELS.items():
        networks = manifest.parts(spec)
        expected = 4 if name.startswith("flux.1") else 3
        if spec.addon and spec.weight_format == "bfloat16":  # else the addon is the transformer
            expected += len(spec.addon.files)
        assert len(networks) == expected, name
        assert all(config in MANIFESTS.values() for config, *_ in networks.values()), name


def test_flux1_models_have_the_manifest_of_their_input_channels():
    """Fill adds an image and a mask to the 64 channels of the noise, control models an image."""
    found = {
        name: manifest.name_of(spec.transformer)
        for name, spec in MODELS.items()
        if name.startswith("flux.1")
    }
    stacked = {
        "flux.1-fill-dev": "flux1-fill",
        "flux.1-canny-dev": "flux1-control",
        "flux.1-depth-dev": "flux1-control",
    }
    others = {"flux.1-schnell": "flux1-schnell", "flux.1-tiny": "flux1-tiny"}
    assert found == dict.fromkeys(found, "flux1-dev") | others | stacked
    adapters = {
        (name, part): (manifest.name_of(config), repository, files)
        for name, spec in MODELS.items()
        if spec.addon
        for part, (config, repository, files) in list(manifest.parts(spec).items())[4:]
    }
    home = "black-forest-labs/FLUX.1-"
    assert adapters == {
        ("flux.1-canny-dev-lora", "LoRA"): (
            "flux1-control-lora",
            f"{home}Canny-dev-lora",
            ("flux1-canny-dev-lora.safetensors",),
        ),
        ("flux.1-depth-dev-lora", "LoRA"): (
            "flux1-control-lora",
            f"{home}Depth-dev-lora",
            ("flux1-depth-dev-lora.safetensors",),
        ),
        ("flux.1-redux-dev", "Redux"): (
            "redux",
            f"{home}Redux-dev",
            ("flux1-redux-dev.safetensors",),
        ),
        ("flux.1-redux-dev", "SigLIP"): (
            "siglip",
            f"{home}Redux-dev",
            ("image_encoder/model.safetensors",),
        ),
    }


@every_network
def test_network_equals_its_manifest(name, config):
    ours, held = manifest.on_meta(config).state_dict(), read_of(name, config)
    dtype = "F32" if name in ("ae-flux1", "ae-flux2", "ae-flux2-small-decoder") else "BF16"
    expected = {
        n: ("I64" if n == "bn.num_batches_tracked" else dtype, s) for n, s in shapes(ours).items()
    }
    assert not differences(expected, held)
    assert expected == held
    width = 4 if dtype == "F32" else 2
    assert size(held) == sum(
        t.numel() * (width if t.is_floating_point() else 8) for t in ours.values()
    )


@pytest.mark.parametrize("name", COUNTED)
def test_manifest_has_the_counts_of_the_original_code(name):
    network = manifest.on_meta(MANIFESTS[name])
    parameters = sum(p.numel() for p in network.parameters())
    assert (
        (len(network.state_dict()), parameters)
        == COUNTED[name]
        == (len(from_json(name)), parameters)
    )


def test_upper_layers_of_language_models_are_not_read():
    # 11 tensors a layer in Qwen3, 9 in Mistral; a quarter of 36 and of 40 layers is never read
    assert {
        name: len(read_of(name, MANIFESTS[name]))
        for name in ("qwen3-4b", "qwen3-8b", "mistral-small")
    } == {"qwen3-4b": 27 * 11 + 1, "qwen3-8b": 27 * 11 + 1, "mistral-small": 30 * 9 + 1}
    assert (
        len(from_json("qwen3-4b")) == 36 * 11 + 2
    )  # and the final norm; the head is tied to the embedding
    assert len(from_json("qwen3-8b")) == 36 * 11 + 3  # and the head


def test_pooling_head_of_siglip_is_not_read():
    # 16 tensors a layer; two of the patches, one of the positions, two of the last norm
    assert len(read_of("siglip", MANIFESTS["siglip"])) == 27 * 16 + 5
    # a probe, its attention (4), a norm (2), an MLP (4)
    assert len(from_json("siglip")) == 27 * 16 + 5 + 11


def test_redux_is_two_layers():
    elements = sum(prod(shape) for _, shape in from_json("redux").values())
    assert elements == (1152 * 12288 + 12288) + (12288 * 4096 + 4096)
    assert (
        0 < LISTED_REDUX - size(from_json("redux")) < 60_000
    )  # a header that says more than the four of them need


# ---------------------------------------------------------------- the control LoRA


def test_control_lora_has_the_counts_of_the_original_code():
    """Each Linear has an A, a B and a bias; every QK-norm has a new scale."""
    held = from_json("flux1-control-lora")
    lora = {name: shape for name, (_, shape) in held.items() if ".lora_" in name}
    assert (len(lora), sum(map(prod, lora.values()))) == CONTROL_LORA
    assert {name: shape for name, (_, shape) in held.items() if name not in lora} == {
        name: (128,) for name in from_json("flux1-dev") if name.endswith("_norm.scale")
    }
    ranks = {
        name.removesuffix(".lora_A.weight"): shape[0]
        for name, shape in lora.items()
        if ".lora_A." in name
    }
    assert ranks == dict.fromkeys(ranks, 128) | {
        "final_layer.linear": 64
    }  # which has no more outputs
    assert lora["img_in.lora_A.weight"] == (128, 128)


def test_control_lora_matches_the_layers_of_flux1_dev():
    held = from_json("flux1-control-lora")
    network = manifest.on_meta(FLUX1)
    lora = LoraFile(
        Path("canny.safetensors"),
        "BFL control",
        {name: of_size(shape) for name, (_, shape) in held.items()},
        PeftConfig(),
    )
    deltas = match_layers(lora, {"transformer": network})
    patches = {delta.target.path: delta for delta in deltas}
    assert sum(len(patch.factors) for patch in patches.values()) == len(held) == 1094
    changed = {f"{path}.{'scale' if path.endswith('_norm') else 'weight'}" for path in patches}
    assert changed == {name for name in network.state_dict() if not name.endswith(".bias")}
    assert {
        path: patch.columns
        for path, patch in patches.items()
        if patch.columns != columns(network, path)
    } == {"img_in": 128}


def columns(network: torch.nn.Module, path: str) -> int:
    return next(iter(network.get_submodule(path).parameters())).shape[-1]


def test_control_lora_is_converted_by_diffusers():
    """diffusers' converter, which refuses unknown keys, makes a LoRA for each Linear."""
    from diffusers.loaders.lora_conversion_utils import (
        _convert_bfl_flux_control_lora_to_diffusers as convert,
    )

    file = {
        name: torch.empty(shape, device="meta")
        for name, (_, shape) in from_json("flux1-control-lora").items()
    }
    found = {
        name.removeprefix("transformer."): shape for name, shape in shapes(convert(file)).items()
    }
    expected = {}
    for path, layer in diffusers_transformer(replace(FLUX1, in_channels=128)).named_modules():
        if isinstance(layer, torch.nn.Linear):
            rank = found[f"{path}.lora_A.weight"][0]
            expected[f"{path}.lora_A.weight"] = (rank, layer.in_features)
            expected[f"{path}.lora_B.weight"] = (layer.out_features, rank)
            expected[f"{path}.lora_B.bias"] = (layer.out_features,)
        elif path.rpartition(".")[2] in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
            expected[f"{path}.weight"] = (128,)
    assert found == expected


# ---------------------------------------------------------------- quantised transformers


def test_quantized_models_have_a_repository_of_their_own():
    """The transformer has a repository of its own; all other files come from the base model's."""
    found = {
        name: manifest.parts(spec)["transformer"]
        for name, spec in MODELS.items()
        if spec.weight_format != "bfloat16" and not spec.flux3
    }
    home = "black-forest-labs/FLUX.2-"
    assert {
        name: (manifest.name_of(part.config), part.repository, part.files)
        for name, part in found.items()
    } == {
        f"flux.2-{name.lower()}": (held, home + name, (f"{file}.safetensors",))
        for name, held, file in [
            ("dev-NVFP4", "flux2-dev-nvfp4", "flux2-dev-nvfp4"),
            ("klein-4b-fp8", "klein-4b-fp8", "flux-2-klein-4b-fp8"),
            ("klein-4b-nvfp4", "klein-4b-nvfp4", "flux-2-klein-4b-nvfp4"),
            ("klein-9b-fp8", "klein-9b-fp8", "flux-2-klein-9b-fp8"),
            ("klein-9b-nvfp4", "klein-9b-nvfp4", "flux-2-klein-9b-nvfp4"),
            ("klein-9b-kv-fp8", "klein-9b-fp8", "flux-2-klein-9b-kv-fp8"),
            ("klein-base-4b-fp8", "klein-4b-fp8", "flux-2-klein-base-4b-fp8"),
            ("klein-base-9b-fp8", "klein-9b-fp8", "flux-2-klein-base-9b-fp8"),
            ("klein-base-9b-nvfp4", "klein-9b-nvfp4", "flux-2-klein-base-9b-nvfp4"),
        ]
    }


@pytest.mark.parametrize("name", QUANTIZED)
def test_quantized_file_loads_at_full_size(name, tmp_path):
    """A file with a true header becomes the network of the manifest, with the same bytes."""
    held, config = from_json(name), QUANTIZED[name].transformer
    assert len(held) == QUANTIZED_COUNTS[name]
    layers = [
        scale.removesuffix(".weight_scale") for scale in held if scale.endswith(".weight_scale")
    ]
    kind = {"fp8": "float8_e4m3fn", "nvfp4": "nvfp4"}.get(QUANTIZED[name].weight_format)
    note = {"format_version": "1.0", "layers": {layer: {"format": kind} for layer in layers}}
    metadata = {"_quantization_metadata": json.dumps(note)}
    notes = {tensor: manifest.CONVROT for tensor in held if tensor.endswith(".comfy_quant")}
    path = tmp_path / "x.safetensors"
    write_header(path, held, None if name.startswith("flux3") else metadata, notes)
    assert infer_config(path) == config
    network = manifest.on_meta(config)
    load_module(network, [path])
    state = network.state_dict()
    types = {
        torch.bfloat16: "BF16",
        torch.float32: "F32",
        torch.float8_e4m3fn: "F8_E4M3",
        torch.uint8: "U8",
        torch.int8: "I8",
    }
    held = {n: entry for n, entry in held.items() if n not in notes}
    assert {n: (types[tensor.dtype], tuple(tensor.shape)) for n, tensor in state.items()} == held
    total = measure_weights(network, (), torch.bfloat16).total
    assert total == size(held) == sum(tensor.nbytes for tensor in state.values())
    quantised = {
        path for path, layer in network.named_modules() if isinstance(layer, QuantizedLinear)
    }
    added = {"fp8": 2, "nvfp4": 3, "fp8r": 1, "comfy-int8-convrot": 1}
    more = len(held) - len(from_json(plain(name)))
    assert quantised == set(layers)
    assert more == len(layers) * added[QUANTIZED[name].weight_format]


def plain(name: str) -> str:
    return manifest.name_of(QUANTIZED[name].transformer)


def test_quantized_layers_are_those_of_a_released_header():
    """klein-4b-fp8: https://github.com/invoke-ai/InvokeAI, tests/model_identification."""
    kinds = {
        re.sub(r"\d+", "N", name)
        for name, (dtype, _) in from_json("klein-4b-fp8").items()
        if dtype == "F8_E4M3"
    }
    double = (
        f"double_blocks.N.{x}_{y}.weight"
        for x in ("img", "txt")
        for y in ("attn.qkv", "attn.proj", "mlp.N")
    )
    assert kinds == {*double, "single_blocks.N.linearN.weight"}
    scales = {
        shape for name, (_, shape) in from_json("klein-4b-fp8").items() if name.endswith("_scale")
    }
    assert scales == {()}


def test_bytes_of_other_quantized_files_agree_with_listed_sizes():
    """FLUX.2-dev has the text's attention in bfloat16, klein-base-4b-fp8 two more matrices."""
    assert abs(size(from_json("flux2-dev-nvfp4")) / 2**30 - 19.6) < 0.05
    header = LISTED_BASE_FP8 - size(from_json("klein-4b-fp8")) - 2 * 3072 * 3072
    assert 100 < header / 305 < 200


# ---------------------------------------------------------------- the manifests


@every_manifest
def test_manifest_equals_the_reference_classes(name, config):
    assert manifest.from_reference(config) == from_json(name)
    assert (ROOT / "tests" / "manifests" / f"{name}.json").read_text() == dumps(from_json(name))


@pytest.mark.parametrize(("name", "listed"), LISTED)
def test_bytes_are_the_listed_size_without_the_header(name, listed):
    header = listed - size(from_json(name))
    assert (
        100 < header / len(from_json(name)) < 200
    )  # a name, a type, a shape and two offsets, in JSON


def test_table_names_every_manifest_once():
    assert len(set(MANIFESTS.values())) == len(MANIFESTS)
    assert {path.stem for path in manifest.FOLDER.iterdir()} == set(MANIFESTS)


@pytest.mark.parametrize(
    "config", [AE1, AE2, AE2_SMALL_DECODER], ids=["flux.1", "flux.2", "small decoder"]
)
def test_vae_file_of_diffusers_is_the_same_network(config: AutoEncoderConfig):
    """`from_diffusers` maps diffusers' names and shapes to those of ae.safetensors."""
    vae, expected = (
        shapes(diffusers_autoencoder(config).state_dict()),
        from_json(manifest.name_of(config)),
    )
    assert {from_diffusers(name) for name in vae} == expected.keys()
    assert {from_diffusers(name) for name in expected} == expected.keys()
    held = {
        name: ("I64" if name == "bn.num_batches_tracked" else "F32", shape)
        for name, shape in vae.items()
    }
    assert comparable(held, config) == comparable(expected, config) == expected
    assert held.keys() != expected.keys()


def test_klein_vae_is_the_flux2_autoencoder_in_bfloat16():
    elements = [(dtype, prod(shape)) for dtype, shape in from_json("ae-flux2").values()]
    assert (
        100
        < (LISTED_KLEIN_VAE - sum(n * (8 if dtype == "I64" else 2) for dtype, n in elements))
        / len(elements)
        < 200
    )


# ---------------------------------------------------------------- files


def test_check_passes_for_the_embedded_model(capsys):
    assert check(MODELS["flux.2-tiny"], None) == 0
    assert capsys.readouterr().out.count("as expected") == 3


def test_manifest_of_files_comes_from_their_headers(tmp_path):
    save_file({"a.weight": torch.zeros(2, 3, dtype=torch.bfloat16)}, tmp_path / "m-1.safetensors")
    save_file({"b": torch.zeros(4), "n": torch.tensor(7)}, tmp_path / "m-2.safetensors")
    index = tmp_path / "m.safetensors.index.json"
    index.write_text(
        json.dumps({"weight_map": {"a.weight": "m-1.safetensors", "b": "m-2.safetensors"}})
    )
    found = from_files([index])
    assert found == {"a.weight": ("BF16", (2, 3)), "b": ("F32", (4,)), "n": ("I64", ())}
    assert json.loads(dumps(found)) == {
        "count": 3,
        "bytes": 12 + 16 + 8,
        "tensors": {"a.weight": ["BF16", [2, 3]], "b": ["F32", [4]], "n": ["I64", []]},
    }


def test_differences_name_the_first_tensor_of_each_kind():
    expected = from_json("klein-4b")
    found = dict(expected)
    del found["img_in.weight"]
    found["guidance_in.in_layer.weight"] = ("BF16", (3072, 256))
    found["txt_in.weight"] = ("F8_E4M3", (3072, 7680))
    found["final_layer.linear.weight"] = ("BF16", (64, 3072))
    assert differences(found, expected) == [
        "1 of 149 missing, first img_in.weight (nothing in place of BF16 (3072, 128))",
        "1 of 149 unknown, first guidance_in.in_layer.weight "
        "(BF16 (3072, 256) in place of nothing)",
        "1 of 149 of another type, first txt_in.weight "
        "(F8_E4M3 (3072, 7680) in place of BF16 (3072, 7680))",
        "1 of 149 of another shape, first final_layer.linear.weight "
        "(BF16 (64, 3072) in place of BF16 (128, 3072))",
    ]
    assert not differences(expected, expected)


@pytest.mark.parametrize("prefix", ["language_model.model.", "model.language_model.", "model."])
def test_tensors_that_are_not_read_make_no_difference(prefix):
    mistral, t5, clip, siglip = (
        from_json(name) for name in ("mistral-small", "t5-xxl", "clip-l", "siglip")
    )
    whole = {prefix + name: entry for name, entry in mistral.items()}
    whole[f"{prefix}layers.30.mlp.up_proj.weight"] = ("BF16", (32768, 5120))
    whole["vision_tower.patch_conv.weight"] = ("BF16", (1024, 3, 14, 14))
    assert comparable(whole, MISTRAL) == mistral
    assert comparable(t5 | {"encoder.embed_tokens.weight": t5["shared.weight"]}, T5Config()) == t5
    assert (
        comparable(clip | {"text_model.embeddings.position_ids": ("I64", (1, 77))}, CLIPConfig())
        == clip
    )
    more = {
        "vision_model.embeddings.position_ids": ("I64", (1, 729)),
        "text_model.head.bias": ("F32", (1152,)),
    }
    assert comparable(siglip | more | {"logit_scale": ("F32", (1,))}, SigLIPConfig()) == siglip


def test_check_reports_missing_files(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("flux.weights.files._in_cache", lambda repository, filename: None)
    assert check(MODELS["flux.2-klein-4b"], tmp_path) == 1
    said = (
        "transformer: flux-2-klein-4b.safetensors of black-forest-labs/FLUX.2-klein-4B is not here"
    )
    assert said in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "names"),
    [
        ("flux.1-depth-dev-lora", {"lora": "flux1-control-lora"}),
        ("flux.1-redux-dev", {"siglip": "siglip", "redux": "redux"}),
    ],
)
def test_check_covers_the_files_of_an_addon(model, names, tmp_path, capsys, monkeypatch):
    """The networks of the base model's repository are missing here."""
    monkeypatch.setattr("flux.weights.files._in_cache", lambda repository, filename: None)
    monkeypatch.setattr(manifest, "PUBLISHED", {})  # the tensors of these files are a hole
    addon = MODELS[model].addon
    home = tmp_path / addon.repository.split("/")[1]
    for part, file in addon.files:
        write_header(home / file, from_json(names[part]))
    assert check(MODELS[model], tmp_path) == 1
    said = capsys.readouterr().out.splitlines()
    assert (
        sum(line.endswith("of black-forest-labs/FLUX.1-dev is not here") for line in said[:4]) == 4
    )
    assert [line.split(": ", 1)[1] for line in said[4:]] == [
        f"{home / f}: as expected" for _, f in addon.files
    ]

    monkeypatch.setattr(
        manifest, "parts", lambda spec, all_of=manifest.parts: dict(list(all_of(spec).items())[4:])
    )
    assert check(MODELS[model], tmp_path) == 0
    part, file = addon.files[0]
    wrong = from_json(names[part])
    first = min(wrong)
    write_header(home / file, wrong | {first: ("F32", wrong[first][1])})
    assert check(MODELS[model], tmp_path) == 1
    assert f"1 of {len(wrong)} of another type, first {first} (F32 " in capsys.readouterr().out


# ---------------------------------------------------------------- checksums


@pytest.fixture
def redux(tmp_path, monkeypatch):
    """Restrict FLUX.1-redux-dev to its Redux file, a small fake, and return that file.

    The published table has the fake's checksum.
    """
    spec = MODELS["flux.1-redux-dev"]
    part = manifest.parts(spec)["Redux"]
    path = tmp_path / part.repository.split("/")[1] / part.files[0]
    path.parent.mkdir()
    save_file({"redux_up.bias": torch.zeros(4, dtype=torch.bfloat16)}, path)
    monkeypatch.setattr(manifest, "parts", lambda spec: {"Redux": part})
    monkeypatch.setattr(manifest, "from_json", lambda name: from_files([path]))
    content = path.read_bytes()
    published = Published(hashlib.sha256(content).hexdigest(), len(content))
    monkeypatch.setattr(manifest, "PUBLISHED", {path.name: published})
    return path


def test_check_passes_for_the_published_checksum(redux, tmp_path, monkeypatch, capsys):
    spec = MODELS["flux.1-redux-dev"]
    assert check(spec, tmp_path) == 0
    assert capsys.readouterr().out == f"Redux: {redux}: as expected\n"
    unknown_size = manifest.PUBLISHED[redux.name]._replace(size=None)
    monkeypatch.setattr(manifest, "PUBLISHED", {redux.name: unknown_size})
    assert check(spec, tmp_path) == 0
    monkeypatch.setattr(manifest, "PUBLISHED", {"another.safetensors": ("0" * 64, 1)})
    assert check(spec, tmp_path) == 0


def test_check_reports_another_checksum_in_one_sentence(redux, tmp_path, capsys):
    content = bytearray(redux.read_bytes())
    content[-1] ^= 1  # the header stays as it is
    redux.write_bytes(content)
    assert check(MODELS["flux.1-redux-dev"], tmp_path) == 1
    found, published = hashlib.sha256(content).hexdigest(), manifest.PUBLISHED[redux.name].sha256
    assert capsys.readouterr().out == (
        f"Redux: {redux}: SHA-256 {found} in place of the published {published}\n"
    )


def test_check_compares_the_size_before_it_computes_a_checksum(
    redux, tmp_path, monkeypatch, capsys
):
    published = manifest.PUBLISHED[redux.name]._replace(size=10_000)
    monkeypatch.setattr(manifest, "PUBLISHED", {redux.name: published})
    monkeypatch.setattr(
        manifest.hashlib, "file_digest", lambda *_: pytest.fail("the checksum was computed")
    )
    assert check(MODELS["flux.1-redux-dev"], tmp_path) == 1
    size = f"{redux.stat().st_size:,}"
    assert f"{size} bytes in place of the published 10,000\n" in capsys.readouterr().out


def test_published_checksums_are_of_transformers_and_addons_of_the_table():
    files = {}  # name -> repositories
    for spec in MODELS.values():
        for part in manifest.parts(spec).values():
            for file in part.files:
                files.setdefault(file, set()).add(part.repository)
    for name, published in manifest.PUBLISHED.items():
        assert len(files[name]) == 1  # a file of one repository only
        assert re.fullmatch("[0-9a-f]{64}", published.sha256)
    checksums = {published.sha256 for published in manifest.PUBLISHED.values()}
    assert len(checksums) == len(manifest.PUBLISHED) == 9
    assert "flux1-krea-dev.safetensors" not in manifest.PUBLISHED


# ---------------------------------------------------------------- weights.md


def test_tables_of_weights_md_are_up_to_date():
    """If this fails, copy the output of `python scripts/dev/manifest.py --markdown`."""
    text, tables = (ROOT / "weights.md").read_text(), manifest.tables()
    for table in tables:
        assert f"\n\n{table}\n\n" in text
    assert len(re.findall(r"(?m)^\| ---", text)) == len(tables)
    assert all(
        path.exists() for path in map(ROOT.joinpath, re.findall(r"\]\((tests/[^)]+)\)", text))
    )
