"""Tensors load bit for bit and without a second copy; those that do not fit are refused.

The truth is what `safetensors` itself writes and reads, and the shapes of the released models.
"""

import hashlib
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from support.weight_files import anonymous_memory, hollow, refusal, saved
from torch import nn

from flux.errors import UserError
from flux.text_encoder import language_model_ignore_keys
from flux.transformer import Flux, FluxConfig
from flux.weights.diffusers_names import from_diffusers
from flux.weights.files import shard_files
from flux.weights.load import find_prefix, infer_config, load_module


class Tiny(nn.Module):
    """A parameter of each kind in released files: scale, convolution, integer statistics."""

    def __init__(self):
        super().__init__()
        self.proj = nn.Linear(4, 3)
        self.conv = nn.Conv2d(2, 2, 1)
        self.bn = nn.BatchNorm2d(2, affine=False)
        self.query_norm = nn.Module()
        self.query_norm.scale = nn.Parameter(torch.empty(4))


def meta() -> Tiny:
    with torch.device("meta"):
        return Tiny()


def tiny_tensors(dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {
        name: torch.tensor(7)
        if like.dtype == torch.int64
        else torch.randn(like.shape, generator=generator).to(dtype)
        for name, like in Tiny().state_dict().items()
    }


# ---------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_load_bit_for_bit_in_the_dtype_of_the_file(tmp_path, dtype):
    tensors = tiny_tensors(dtype)
    module = meta()
    load_module(module, [saved(tmp_path / "x.safetensors", tensors)])
    state = module.state_dict()
    assert state.keys() == tensors.keys()
    assert all(
        state[name].dtype == tensors[name].dtype and torch.equal(state[name], tensors[name])
        for name in tensors
    )
    assert not module.training and not any(
        parameter.requires_grad for parameter in module.parameters()
    )


def test_dtype_casts_only_floats(tmp_path):
    tensors = tiny_tensors()
    module = meta()
    load_module(module, [saved(tmp_path / "x.safetensors", tensors)], dtype=torch.bfloat16)
    assert module.bn.num_batches_tracked.dtype == torch.int64 and module.bn.num_batches_tracked == 7
    assert torch.equal(module.proj.weight, tensors["proj.weight"].bfloat16())
    assert torch.equal(module.bn.running_var, tensors["bn.running_var"].bfloat16())


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize(
    "change, expected",
    [
        (lambda t: without(t, "proj.bias"), "1 missing ('proj.bias')"),
        (
            lambda t: without(t, "proj.bias") | {"proj.bais": t["proj.bias"]},
            "'proj.bais' is close to 'proj.bias'",
        ),
        (
            lambda t: t | {"proj.weight": torch.zeros(3, 5)},
            "1 misshapen ('proj.weight' is (3, 5) and not (3, 4))",
        ),
        (
            lambda t: t | {"conv.weight": torch.zeros(2, 2)},
            "1 misshapen ('conv.weight' is (2, 2) and not (2, 2, 1, 1))",
        ),
        (
            lambda t: t | {"proj.bias": torch.zeros(3).to(torch.int8)},
            "'proj.bias' is I8 and not F64/F32/F16/BF16/F8_E4M3/",
        ),
        (
            lambda t: {"x": t["proj.bias"]},
            "7 missing ('proj.weight', 'proj.bias', 'conv.weight' and 4 more)",
        ),
        (lambda t: t | {"proj.weight_scale": torch.tensor(1.0)}, "1 unknown ('proj.weight_scale')"),
        (
            lambda t: t | {"proj.lora_A.weight": torch.ones(1, 4)},
            "1 unknown ('proj.lora_A.weight')",
        ),
        (lambda t: t | {"ema.proj.bias": t["proj.bias"].clone()}, "1 unknown ('ema.proj.bias')"),
        (lambda t: t | {"quant_conv.weight": torch.ones(1)}, "1 unknown ('quant_conv.weight')"),
        (
            lambda t: without(t, "proj.bias") | {"other": torch.zeros(1)},
            "1 missing ('proj.bias'); 1 unknown ('other')",
        ),
        (
            lambda t: t | {"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)},
            "looks like a transformer of another family",
        ),
        (lambda t: t | {"proj.a\x1b[2J\nb": torch.zeros(1)}, r"1 unknown ('proj.a\x1b[2J\nb')"),
        (lambda t: t | {"query_norm.weight": torch.zeros(4)}, "twice"),
    ],
)
def test_tensor_that_does_not_fit_is_refused(tmp_path, change, expected):
    message = refusal(
        load_module, meta(), [saved(tmp_path / "x.safetensors", change(tiny_tensors()))]
    )
    assert expected in message and str(tmp_path / "x.safetensors") in message


def test_refused_file_leaves_the_module_unchanged(tmp_path):
    module = meta()
    refusal(
        load_module,
        module,
        [saved(tmp_path / "x.safetensors", without(tiny_tensors(), "proj.bias"))],
    )
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_prefixes_ignored_keys_and_renamed_norms_are_handled(tmp_path):
    tensors = tiny_tensors()
    file = {
        f"language_model.model.{name}".replace("scale", "weight"): tensor
        for name, tensor in tensors.items()
    }
    file |= {
        "lm_head.weight": torch.zeros(2),
        "language_model.model.layers.9.weight": torch.zeros(2),
    }
    path = saved(tmp_path / "x.safetensors", file)
    module = meta()
    load_module(
        module, [path], ignore_keys=lambda name: name in ("lm_head.weight", "layers.9.weight")
    )
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())

    with pytest.warns(
        UserWarning, match=r"left out \(1\): 'language_model\.model\.layers\.9\.weight'$"
    ):
        load_module(meta(), [path], ignore_keys=lambda name: name == "lm_head.weight")


PREFIXES = (
    "model.diffusion_model.",
    "diffusion_model.",
    "model.",
    "transformer.",
    "net.",
    "module.",
    "_orig_mod.",
    "module._orig_mod.model.",
    "text_encoders.name.transformer.",
    "some. other path.",
)


@pytest.mark.parametrize("prefix", PREFIXES)
def test_any_prefix_is_removed(tmp_path, prefix):
    """Beside the network lie others, one of which has names of the same endings."""
    tensors = tiny_tensors()
    names = ("other.conv.weight", "vae.proj.bias", "ema.decay") if prefix != "_orig_mod." else ()
    others = {name: torch.zeros(2) for name in names}
    file = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    module = meta()
    load_module(module, [saved(tmp_path / "x.safetensors", file | others)])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())
    path = saved(tmp_path / "x.safetensors", file | {f"{prefix}proj.other": torch.zeros(2)})
    assert f"1 unknown ('{prefix}proj.other')" in refusal(load_module, meta(), [path])
    del file[f"{prefix}proj.bias"]
    path = saved(tmp_path / "x.safetensors", file | others)
    assert "1 missing ('proj.bias')" in refusal(load_module, meta(), [path])


def test_network_that_lies_twice_in_a_file_is_refused(tmp_path):
    tensors = tiny_tensors()
    path = saved(
        tmp_path / "x", tensors | {f"model.{name}": x.clone() for name, x in tensors.items()}
    )
    assert "7 unknown ('model." in refusal(load_module, meta(), [path])


def test_names_that_wrappers_put_inside_are_removed(tmp_path):
    tensors = tiny_tensors()
    path = saved(
        tmp_path / "x", {name.replace(".", "._orig_mod."): tensors[name] for name in tensors}
    )
    module = meta()
    load_module(module, [path])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_tensors_that_nothing_reads_may_be_there_in_any_dtype(tmp_path, prefix, dtype):
    tensors, unread = tiny_tensors(), torch.ones(1, 3).to(dtype)
    names = (
        "logit_scale",
        "text_projection",
        "text_projection.weight",
        "embeddings.position_ids",
        "layers.3.rotary_emb.inv_freq",
        "proj.num_batches_tracked",
    )
    file = tensors | dict.fromkeys(names, unread) | {"marker": torch.empty(0).to(dtype)}
    file["bn.num_batches_tracked"] = torch.tensor(3).to(dtype)
    file = {f"{prefix}{name}": tensor.clone() for name, tensor in file.items()}
    module = meta()
    load_module(module, [saved(tmp_path / "x.safetensors", file)])
    counter = module.bn.num_batches_tracked
    assert counter.dtype == torch.int64 and counter == (3 if dtype == torch.int64 else 0)
    found = without(module.state_dict(), "bn.num_batches_tracked")
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in found.items())
    del file[f"{prefix}bn.num_batches_tracked"]
    load_module(meta(), [saved(tmp_path / "x.safetensors", file)])


@pytest.mark.parametrize("dtype", [torch.int8, torch.int64, torch.float32, torch.bool])
@pytest.mark.parametrize("prefix", ["", "model."])
def test_unknown_tensors_outside_the_layers_are_named_and_left_out(tmp_path, prefix, dtype):
    """Integers may lie inside a layer too: no layer of floats reads them."""
    tensors = tiny_tensors()
    names = ["__index_timestep_zero__", "norms.other", "denoiser.sigmas"]
    names += [] if dtype == torch.float32 else ["proj.steps"]
    unknown = {f"{prefix}{name}": torch.ones(2).to(dtype) for name in names}
    file = {f"{prefix}{name}": tensor for name, tensor in tensors.items()}
    path, module = saved(tmp_path / "x.safetensors", file | unknown), meta()
    with pytest.warns(UserWarning, match=rf"Tiny lacks, .* \({len(names)}\)") as told:
        load_module(module, [path])
    assert repr(f"{prefix}denoiser.sigmas") in str(told[0].message)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())


class Blocks(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(4, 4))])


def test_block_that_the_network_lacks_is_refused(tmp_path):
    file = {name: torch.ones(like.shape) for name, like in Blocks().state_dict().items()}
    path = saved(tmp_path / "x.safetensors", file | {"blocks.1.0.gain": torch.ones(4)})
    with torch.device("meta"):
        module = Blocks()
    assert "1 unknown ('blocks.1.0.gain')" in refusal(load_module, module, [path])


@pytest.mark.parametrize("dtype", [torch.float32, torch.int64])
def test_unknown_tensor_of_a_quantized_layer_is_refused(tmp_path, dtype):
    """It may be a scale, whatever its type."""
    file = tiny_tensors() | {"proj.other": torch.ones(2).to(dtype)}
    file["proj.weight"] = file["proj.weight"].to(torch.float8_e4m3fn)
    path = saved(tmp_path / "x.safetensors", file)
    assert "1 unknown ('proj.other')" in refusal(load_module, meta(), [path])


def test_second_name_is_read_only_without_the_first(tmp_path):
    tensors = tiny_tensors()
    second = without(tensors, "proj.bias") | {"second": torch.full((3,), 5.0)}
    options = dict(second_names={"second": "proj.bias"}, ignore_keys=lambda name: name == "second")
    for file, expected in ((second, second["second"]), (second | tensors, tensors["proj.bias"])):
        module = meta()
        load_module(module, [saved(tmp_path / "x.safetensors", file)], **options)
        assert torch.equal(module.proj.bias, expected)


def test_rename_maps_a_foreign_layout(tmp_path):
    """Only then may a 1x1 convolution be stored as a Linear."""
    tensors = tiny_tensors()
    file = without(tensors, "conv.weight") | {
        "to_out.weight": tensors["conv.weight"][:, :, 0, 0].contiguous()
    }
    path = saved(tmp_path / "x.safetensors", file)

    def rename(name):
        return name.replace("to_out", "conv")

    module = meta()
    load_module(module, [path], rename=rename)
    assert torch.equal(module.conv.weight, tensors["conv.weight"])
    message = refusal(
        load_module, meta(), [saved(path, file | {"to_out.weight": torch.zeros(4)})], rename=rename
    )
    assert "'to_out.weight' is (4,) and not (2, 2, 1, 1)" in message
    message = refusal(
        load_module, meta(), [saved(path, file | {"conv.weight": torch.zeros(2, 2)})], rename=rename
    )
    assert "twice" in message
    blocks = {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}
    message = refusal(
        load_module, meta(), [saved(path, file | blocks)], rename=lambda name: rename(name).upper()
    )
    assert (
        "7 missing" in message and "looks like" not in message
    )  # of names that are renamed, the layout is no news


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_check_finite_finds_nan_and_infinity(tmp_path, value):
    tensors = tiny_tensors(torch.bfloat16)
    tensors["proj.weight"][1, 2] = value
    path = saved(tmp_path / "x.safetensors", tensors)
    load_module(meta(), [path])
    message = refusal(load_module, meta(), [path], check_finite=True)
    assert "'proj.weight'" in message and str(path) in message


def test_check_finite_checks_the_hash_of_a_file_in_the_cache(tmp_path):
    (tmp_path / "blobs").mkdir()
    content = saved(tmp_path / "x", tiny_tensors(torch.bfloat16)).read_bytes()
    blob = tmp_path / "blobs" / hashlib.sha256(content).hexdigest()
    (path := tmp_path / "x.safetensors").symlink_to(blob)
    blob.write_bytes(content)
    load_module(meta(), [path], check_finite=True)
    blob.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))  # another number, and as finite
    load_module(meta(), [path])
    message = refusal(load_module, meta(), [path], check_finite=True)
    assert "has not the hash" in message and str(path) in message and f"delete {blob}" in message


@pytest.mark.skipif(
    not Path("/proc/self/maps").exists(), reason="needs Linux' account of a process' memory"
)
def test_weights_are_mapped_without_a_copy(tmp_path):
    path = saved(
        tmp_path / "x.safetensors", {"weight": torch.randn(4096, 4096, dtype=torch.float32)}
    )
    size = path.stat().st_size
    with torch.device("meta"):
        module = nn.Linear(4096, 4096, bias=False)
    before = anonymous_memory()
    load_module(module, [path], dtype=torch.float32)
    assert module.weight.sum().isfinite()  # touches every page
    assert anonymous_memory() - before < 0.05 * size
    address = module.weight.data_ptr()
    spans = re.findall(r"^(\w+)-(\w+) .* (/.*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    assert [name for begin, end, name in spans if int(begin, 16) <= address < int(end, 16)] == [
        str(path)
    ]


@pytest.fixture(scope="module")
def sound(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "x.safetensors"
    save_file(tiny_tensors(), path, metadata={"format": "pt"})
    return path


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_every_truncation_is_refused(sound, data):
    content = sound.read_bytes()
    path = sound.with_name("cut.safetensors")
    path.write_bytes(content[: data.draw(st.integers(0, len(content) - 1))])
    refusal(load_module, meta(), [path])


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_damaged_bytes_are_refused_or_stay_local(sound, data):
    """Damage in the header is refused or has no effect; damage in a tensor changes one byte."""
    content = bytearray(sound.read_bytes())
    header_end = 8 + int.from_bytes(content[:8], "little")
    where = data.draw(st.integers(0, header_end - 1) | st.integers(0, len(content) - 1))
    content[where] ^= data.draw(st.integers(1, 255))
    path = sound.with_name("damaged.safetensors")
    path.write_bytes(content)
    module = meta()
    try:
        load_module(module, [path])
    except UserError as error:
        assert where < header_end and "\n" not in str(error)
        return
    as_bytes = {
        name: tensor.reshape(-1).view(torch.uint8) for name, tensor in module.state_dict().items()
    }
    true = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tiny_tensors().items()}
    if where < header_end:  # a counter of another dtype is not read
        del true["bn.num_batches_tracked"]
    changed = sum(int((as_bytes[name] != true[name]).sum()) for name in true)
    assert changed == (0 if where < header_end else 1)


def test_pipe_is_refused_without_waiting(tmp_path):
    os.mkfifo(tmp_path / "x.safetensors")
    assert "is a pipe or a device" in refusal(load_module, meta(), [tmp_path / "x.safetensors"])


def test_shards_load_like_one_file(tmp_path):
    tensors = tiny_tensors()
    names = sorted(tensors)
    saved(tmp_path / "x-1.safetensors", {name: tensors[name] for name in names[:3]})
    saved(tmp_path / "x-2.safetensors", {name: tensors[name] for name in names[3:]})
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(
        json.dumps(
            {"weight_map": {name: f"x-{1 + (name in names[3:])}.safetensors" for name in names}}
        )
    )
    files = shard_files(index)
    assert files == [tmp_path / "x-1.safetensors", tmp_path / "x-2.safetensors"]
    assert shard_files(files[0]) == files[:1]
    module = meta()
    load_module(module, files)
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())

    assert "do not belong together" in refusal(load_module, meta(), [*files, files[0]])
    message = refusal(load_module, meta(), files[:1])
    assert "missing" in message and str(files[0]) in message
    saved(files[1], {name: tensors[name][..., :1].contiguous() for name in names[3:]})
    assert "'proj.bias' in x-2.safetensors is (1,) and not (3,)" in refusal(
        load_module, meta(), files
    )
    files[1].unlink()
    assert "lacks x-2.safetensors" in refusal(shard_files, index)


# ---------------------------------------------------------------- configurations

FLUX1 = FluxConfig(
    in_channels=64,
    out_channels=64,
    context_dim=4096,
    hidden_size=3072,
    num_heads=24,
    depth=19,
    depth_single=38,
    mlp_ratio=4.0,
    axes_dim=(16, 56, 56),
    theta=10000,
    vector_dim=768,
    guidance=True,
    bias=True,
    gated_mlp=False,
    shared_modulation=False,
)
FLUX2 = FluxConfig(
    in_channels=128,
    out_channels=128,
    context_dim=15360,
    hidden_size=6144,
    num_heads=48,
    depth=8,
    depth_single=48,
    mlp_ratio=3.0,
    axes_dim=(32, 32, 32, 32),
    theta=2000,
    vector_dim=None,
    guidance=True,
    bias=False,
    gated_mlp=True,
    shared_modulation=True,
)
KLEIN_4B = replace(
    FLUX2,
    context_dim=7680,
    hidden_size=3072,
    num_heads=24,
    depth=5,
    depth_single=20,
    guidance=False,
)
RELEASED = {
    "FLUX.1-dev": FLUX1,
    "FLUX.1-schnell": replace(FLUX1, guidance=False),
    "FLUX.1-Canny-dev": replace(FLUX1, in_channels=128),
    "FLUX.1-Fill-dev": replace(FLUX1, in_channels=384),
    "FLUX.2-dev": FLUX2,
    "FLUX.2-klein-4B": KLEIN_4B,
    "FLUX.2-klein-9B": replace(
        KLEIN_4B, context_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single=24
    ),
}
TINY1 = replace(
    FLUX1,
    in_channels=20,
    out_channels=12,
    context_dim=24,
    hidden_size=64,
    num_heads=2,
    depth=2,
    depth_single=3,
    axes_dim=(4, 14, 14),
    vector_dim=20,
)
TINY2 = replace(
    FLUX2,
    in_channels=20,
    out_channels=12,
    context_dim=24,
    hidden_size=48,
    num_heads=3,
    depth=1,
    depth_single=2,
    axes_dim=(4, 4, 4, 4),
    guidance=False,
)


def shapes_of(config: FluxConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Flux(config).state_dict().items()}


@pytest.mark.parametrize("name", RELEASED)
def test_config_is_inferred_from_released_shapes(tmp_path, name):
    prefix, dtype, bits = "", "BF16", 16
    if name in ("FLUX.1-dev", "FLUX.2-klein-9B"):  # ComfyUI's plain casts
        prefix, dtype, bits = "model.diffusion_model.", "F8_E4M3", 8
    shapes = {prefix + key: shape for key, shape in shapes_of(RELEASED[name]).items()}
    assert infer_config(hollow(tmp_path / "x.safetensors", shapes, dtype, bits)) == RELEASED[name]


@pytest.mark.parametrize("config", [TINY1, TINY2], ids=["FLUX.1", "FLUX.2"])
def test_file_without_a_name_loads_by_its_shapes(tmp_path, config):
    tensors = {name: torch.randn(shape) for name, shape in shapes_of(config).items()}
    path = saved(tmp_path / "x.safetensors", tensors)
    assert infer_config(path) == config
    respelt = {
        name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()
    }
    assert respelt.keys() != tensors.keys() and infer_config(saved(path, respelt)) == config
    with torch.device("meta"):
        model = Flux(config)
    load_module(model, [path])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_other_family_and_other_size_are_refused(tmp_path):
    path = hollow(tmp_path / "x.safetensors", shapes_of(TINY2))
    with torch.device("meta"):
        flux1, wide = Flux(TINY1), Flux(replace(TINY2, context_dim=32))
    assert "looks like a FLUX.2 transformer, and a FLUX.1 transformer is wanted" in refusal(
        load_module, flux1, [path]
    )
    message = refusal(load_module, wide, [path])
    assert (
        "1 misshapen ('txt_in.weight' is (48, 24) and not (48, 32))" in message
        and "looks like" not in message
    )


@pytest.mark.parametrize(
    "name, expected",
    [
        ("transformer_blocks.0.attn.to_q.weight", "a transformer of another family"),
        ("time_text_embed.timestep_embedder.linear_1.weight", "a transformer in diffusers' layout"),
        ("double_blocks.0.img_attn.qkv.lora_A.weight", "a LoRA"),
        ("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight", "a LoRA"),
        ("encoder.block.0.layer.0.SelfAttention.q.weight", "T5"),
        ("text_model.encoder.layers.0.mlp.fc1.weight", "CLIP"),
        ("model.layers.0.mlp.gate_proj.weight", "a language model"),
        ("decoder.up.0.block.0.conv1.weight", "an autoencoder"),
        ("decoder.up_blocks.0.resnets.0.conv1.weight", "an autoencoder in diffusers' layout"),
        ("redux_up.weight", "Redux"),
        ("double_blocks.0.img_attn.qkv.weight", "a FLUX.1 transformer"),
        ("something.weight", "something else"),
    ],
)
def test_other_networks_are_recognised_and_refused(tmp_path, name, expected):
    message = refusal(infer_config, hollow(tmp_path / "x.safetensors", {name: (2, 2)}))
    assert expected in message and "'img_in.weight'" in message


@pytest.mark.parametrize(
    "name, shape",
    [
        ("img_in.weight", (64,)),
        ("img_in.weight", (0, 20)),
        ("img_in.weight", (63, 20)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (16,)),
        ("double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
        ("double_blocks.0.img_mlp.0.weight", (100, 64)),
        ("vector_in.in_layer.weight", (64,)),
    ],
)
def test_impossible_sizes_are_refused(tmp_path, name, shape):
    refusal(infer_config, hollow(tmp_path / "x.safetensors", shapes_of(TINY1) | {name: shape}))


def test_foreign_names_of_any_length_are_read_in_few_steps():
    """Python converts no text of 5,000 digits to an integer."""
    asked = []
    names = ["." * 9000, "a." * 4000 + "weight", "model.weight"]
    assert find_prefix(names, {"weight"}, lambda name: asked.append(name) or name) == "model."
    assert len(asked) < 10 * len(names)
    number = "9" * 5000
    name = f"decoder.up_blocks.{number}.resnets.0.conv1.weight"
    assert from_diffusers(name).endswith(".conv1.weight")
    assert not language_model_ignore_keys(f"layers.{number}.mlp.weight", depth=2)
