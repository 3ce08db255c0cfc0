"""Files that are not what they seem, tensors that do not fit, and files that cannot be had are each told in one
sentence; all others load bit for bit, without a second copy.

The truth: what `safetensors` itself writes and reads; the shapes of the released models; and, for the hub,
huggingface_hub's own client, to which a transport without a network gives the answers of the real one.
"""

import errno
import json
import os
import re
import struct
from dataclasses import replace
from pathlib import Path

import httpx2
import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from flux.errors import UserError
from flux.transformer import Flux, FluxConfig
from flux.weights import find, find_all, infer_config, is_local, load_module, read_header, shard_files


class Tiny(nn.Module):
    """A parameter of each kind that the released files hold: a scale, a convolution, statistics with an integer."""

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
        name: torch.tensor(7) if like.dtype == torch.int64 else torch.randn(like.shape, generator=generator).to(dtype)
        for name, like in Tiny().state_dict().items()
    }


def saved(path: Path, tensors: dict[str, torch.Tensor]) -> Path:
    save_file(tensors, path)
    return path


def raw(path: Path, header: dict | bytes, data: bytes = b"") -> Path:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)
    return path


def refusal(call, *arguments, **options) -> str:
    """The sentence with which a call is refused; it must be one line."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------------------------------------------------- headers


def test_header_is_what_was_written(tmp_path):
    tensors = {"a": torch.zeros(2, 3, dtype=torch.bfloat16), "b": torch.tensor(1), "none": torch.zeros(0, 5),
               "eight": torch.zeros(3, dtype=torch.float8_e4m3fn)}
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert {name: info[:2] for name, info in infos.items()} == {
        "a": ("BF16", (2, 3)), "b": ("I64", ()), "none": ("F32", (0, 5)), "eight": ("F8_E4M3", (3,))}
    assert {info.file for info in infos.values()} == {tmp_path / "x.safetensors"}


@pytest.mark.parametrize("length", [640, 768, 60 * 256])  # the first bytes of a pickle twice, and of a web page
def test_length_of_a_header_may_look_like_another_format(tmp_path, length):
    header = json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}}).encode().ljust(length)
    assert read_header(raw(tmp_path / "x.safetensors", header, b"\0"))[0]["a"].shape == (1,)


@pytest.mark.parametrize("content, told", [
    (b"", "is empty"),
    (b"abc", "not a safetensors file"),
    (b"\0" * 100, "not a safetensors file"),
    (b"<!DOCTYPE html><html><head><title>Access restricted", "web page"),
    (b"\n  <html>", "web page"),
    (b"version https://git-lfs.github.com/spec/v1\noid sha256:4610\nsize 23802932552\n", "git lfs pull"),
    (b"PK\x03\x04" + b"\0" * 60, "pickle"),
    (b"\x80\x02}q\0(X\x06\0\0\0", "pickle"),
    (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
    (b'{"weight_map": {"a": "b"}}', "JSON"),
    (struct.pack("<Q", 1 << 40) + b"{}", "header would be"),
    (struct.pack("<Q", 5000) + b'{"a":', "truncated"),
])
def test_what_is_no_safetensors_file_is_told(tmp_path, content, told):
    (tmp_path / "x.safetensors").write_bytes(content)
    message = refusal(read_header, tmp_path / "x.safetensors")
    assert told in message and str(tmp_path / "x.safetensors") in message


def test_what_is_no_file_is_told(tmp_path):
    assert "does not exist" in refusal(read_header, tmp_path / "x.safetensors")
    assert "is a folder" in refusal(read_header, tmp_path)
    assert "cannot be read" in refusal(read_header, tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "special file" in refusal(read_header, tmp_path / "pipe")


def entry(dtype="F32", shape=(2,), begin=0, end=8):
    return {"dtype": dtype, "shape": shape, "data_offsets": [begin, end]}


@pytest.mark.parametrize("header, told", [
    (b"{not json}", "damaged header"),
    (b'{"a": \xff}', "damaged header"),
    (b'{"a": ' + b"[" * 100_000, "damaged header"),
    ({"__metadata__": {"a": 1}, "a": entry()}, "metadata that is not text"),
    ({"__metadata__": [1], "a": entry()}, "damaged header"),
    ({"a": entry("F31")}, "'a'"),
    ({"a": entry(["F32"])}, "'a'"),
    ({"a": entry(shape=[-2])}, "'a'"),
    ({"a": entry(shape=[2.0])}, "'a'"),
    ({"a": entry(shape=[True, 2])}, "'a'"),
    ({"a": entry(shape=2)}, "'a'"),
    ({"a": {"dtype": "F32", "shape": [2]}}, "'a'"),
    ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "'a'"),
    ({"a": []}, "'a'"),
    ({"a": entry(shape=[3])}, "8 bytes for tensor 'a', F32 of shape [3]"),
    ({"a": entry("BF16")}, "8 bytes for tensor 'a', BF16 of shape [2]"),
    ({"a": entry(shape=[1 << 63, 2])}, "8 bytes for tensor 'a'"),
    ({"a": entry(), "b": entry(begin=4, end=12)}, "'b' overlaps"),
    ({"a": entry(), "b": entry(begin=12, end=20)}, "'b' leaves a hole"),
    ({"a": entry(begin=8, end=16)}, "'a' leaves a hole"),
    ({"a": entry(), "b": entry(begin=8, end=16)}, "is truncated"),
    ({}, "goes on after its end"),
])
def test_header_that_lies_is_told(tmp_path, header, told):
    message = refusal(read_header, raw(tmp_path / "x.safetensors", header, b"\0" * 8))
    assert told in message and str(tmp_path / "x.safetensors") in message


def test_truncated_and_overlong_files_are_told_with_both_sizes(tmp_path):
    path = saved(tmp_path / "x.safetensors", tiny_tensors())
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert f"truncated: {len(content):,} bytes expected, {len(content) - 5:,} found" in refusal(read_header, path)
    path.write_bytes(content + b"\0")
    assert f"{len(content):,} bytes expected, {len(content) + 1:,} found" in refusal(read_header, path)


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
def test_damaged_bytes_are_refused_or_change_nothing_but_themselves(sound, data):
    """One in the header is refused or without effect (metadata, spaces); one in the tensors changes itself alone."""
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
    as_bytes = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in module.state_dict().items()}
    true = {name: tensor.reshape(-1).view(torch.uint8) for name, tensor in tiny_tensors().items()}
    changed = sum(int((as_bytes[name] != true[name]).sum()) for name in true)
    assert changed == (0 if where < header_end else 1)


# ---------------------------------------------------------------------------------------------------------- shards


def test_shards(tmp_path):
    tensors = tiny_tensors()
    names = sorted(tensors)
    saved(tmp_path / "x-1.safetensors", {name: tensors[name] for name in names[:3]})
    saved(tmp_path / "x-2.safetensors", {name: tensors[name] for name in names[3:]})
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: f"x-{1 + (name in names[3:])}.safetensors" for name in names}}))
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
    assert "'proj.bias' in x-2.safetensors is (1,) and not (3,)" in refusal(load_module, meta(), files)
    files[1].unlink()
    assert "lacks x-2.safetensors" in refusal(shard_files, index)


@pytest.mark.parametrize("content", [
    "", "[]", "{}", '{"weight_map": []}', '{"weight_map": {}}', '{"weight_map": {"a": ["b"]}}', "[" * 100_000])
def test_index_without_names_is_told(tmp_path, content):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(content)
    assert f"{index} is not an index" in refusal(shard_files, index)


@pytest.mark.parametrize("name", [
    "../x.safetensors", "/x.safetensors", "a/x.safetensors", "..", "", "a\\x.safetensors", "C:x.safetensors",
    ".x.safetensors", "x.safetensors\n", "x.pt", 1])
def test_index_may_not_reach_out_of_its_folder(tmp_path, name):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    message = refusal(shard_files, index)
    assert f"{index} names {name!r}, which is not the plain name" in message


def test_index_that_is_missing_is_told(tmp_path):
    assert "cannot be read" in refusal(shard_files, tmp_path / "x.safetensors.index.json")


# ---------------------------------------------------------------------------------------------------------- loading


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_tensors_load_bit_for_bit_in_the_dtype_of_the_file(tmp_path, dtype):
    tensors = tiny_tensors(dtype)
    module = meta()
    load_module(module, [saved(tmp_path / "x.safetensors", tensors)])
    state = module.state_dict()
    assert state.keys() == tensors.keys()
    assert all(state[name].dtype == tensors[name].dtype and torch.equal(state[name], tensors[name]) for name in tensors)
    assert not module.training and not any(parameter.requires_grad for parameter in module.parameters())


def test_cast_is_of_floats_only(tmp_path):
    tensors = tiny_tensors()
    module = meta()
    load_module(module, [saved(tmp_path / "x.safetensors", tensors)], dtype=torch.bfloat16)
    assert module.bn.num_batches_tracked.dtype == torch.int64 and module.bn.num_batches_tracked == 7
    assert torch.equal(module.proj.weight, tensors["proj.weight"].bfloat16())
    assert torch.equal(module.bn.running_var, tensors["bn.running_var"].bfloat16())


def without(tensors, name):
    return {other: tensor for other, tensor in tensors.items() if other != name}


@pytest.mark.parametrize("change, told", [
    (lambda t: without(t, "proj.bias"), "1 missing ('proj.bias')"),
    (lambda t: t | {"other": torch.zeros(1)}, "1 unknown ('other')"),
    (lambda t: without(t, "proj.bias") | {"proj.bais": t["proj.bias"]}, "'proj.bais' is close to 'proj.bias'"),
    (lambda t: t | {"proj.weight": torch.zeros(3, 5)}, "1 misshapen ('proj.weight' is (3, 5) and not (3, 4))"),
    (lambda t: t | {"conv.weight": torch.zeros(2, 2)}, "1 misshapen ('conv.weight' is (2, 2) and not (2, 2, 1, 1))"),
    (lambda t: t | {"proj.weight": torch.zeros(3, 4).to(torch.int8)}, "'proj.weight' is I8 and not F64/F32/F16/BF16"),
    (lambda t: t | {"proj.weight": torch.zeros(3, 4).to(torch.float8_e4m3fn)}, "type ('proj.weight' is F8_E4M3"),
    (lambda t: t | {"bn.num_batches_tracked": torch.tensor(1.0)}, "'bn.num_batches_tracked' is F32 and not I64"),
    (lambda t: {"x": t["proj.bias"]}, "8 missing ('proj.weight', 'proj.bias', 'conv.weight' and 5 more)"),
    (lambda t: t | {"proj.weight_scale": torch.tensor(1.0)}, "a quantised model"),
    (lambda t: t | {"transformer_blocks.0.attn.to_q.weight": torch.zeros(1)}, "diffusers' layout"),
    (lambda t: t | {"a\x1b[2J\nb": torch.zeros(1)}, r"1 unknown ('a\x1b[2J\nb')"),
    (lambda t: t | {"query_norm.weight": torch.zeros(4)}, "twice"),
])
def test_tensor_that_does_not_fit_is_told(tmp_path, change, told):
    message = refusal(load_module, meta(), [saved(tmp_path / "x.safetensors", change(tiny_tensors()))])
    assert told in message and str(tmp_path / "x.safetensors") in message


def test_a_refused_file_leaves_the_module_untouched(tmp_path):
    module = meta()
    refusal(load_module, module, [saved(tmp_path / "x.safetensors", without(tiny_tensors(), "proj.bias"))])
    assert all(tensor.is_meta for tensor in module.state_dict().values())


def test_prefix_and_unread_tensors_and_the_other_name_of_a_norm(tmp_path):
    tensors = tiny_tensors()
    file = {f"language_model.model.{name}".replace("scale", "weight"): tensor for name, tensor in tensors.items()}
    file |= {"lm_head.weight": torch.zeros(2), "language_model.model.layers.9.weight": torch.zeros(2)}
    path = saved(tmp_path / "x.safetensors", file)
    module = meta()
    prefixes = ("", "model.", "language_model.model.")
    load_module(module, [path], prefixes=prefixes, unread=lambda name: name in ("lm_head.weight", "layers.9.weight"))
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in module.state_dict().items())

    message = refusal(load_module, meta(), [path], prefixes=prefixes, unread=lambda name: name == "lm_head.weight")
    assert "of 8 tensors, 1 unknown ('language_model.model.layers.9.weight')" in message


def test_rename_for_a_foreign_layout(tmp_path):
    """A convolution of one pixel may then be stored as a Linear; nothing else is bent."""
    tensors = tiny_tensors()
    file = without(tensors, "conv.weight") | {"to_out.weight": tensors["conv.weight"][:, :, 0, 0].contiguous()}
    path = saved(tmp_path / "x.safetensors", file)

    def rename(name):
        return name.replace("to_out", "conv")

    module = meta()
    load_module(module, [path], rename=rename)
    assert torch.equal(module.conv.weight, tensors["conv.weight"])
    message = refusal(load_module, meta(), [saved(path, file | {"to_out.weight": torch.zeros(4)})], rename=rename)
    assert "'to_out.weight' is (4,) and not (2, 2, 1, 1)" in message
    message = refusal(load_module, meta(), [saved(path, file | {"conv.weight": torch.zeros(2, 2)})], rename=rename)
    assert "twice" in message
    blocks = {"down_blocks.0.resnets.0.conv1.weight": torch.zeros(1)}
    message = refusal(load_module, meta(), [saved(path, file | blocks)], rename=lambda name: rename(name).upper())
    assert "8 missing" in message and "looks like" not in message  # of names that are renamed, the layout is no news


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity_are_found_when_asked_for(tmp_path, value):
    tensors = tiny_tensors(torch.bfloat16)
    tensors["proj.weight"][1, 2] = value
    path = saved(tmp_path / "x.safetensors", tensors)
    load_module(meta(), [path])
    message = refusal(load_module, meta(), [path], check_finite=True)
    assert "'proj.weight'" in message and str(path) in message


def anonymous_memory() -> int:
    return 1024 * int(re.search(r"RssAnon:\s+(\d+) kB", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs Linux' account of a process' memory")
def test_there_is_no_second_copy(tmp_path):
    path = saved(tmp_path / "x.safetensors", {"weight": torch.randn(4096, 4096, dtype=torch.float32)})
    size = path.stat().st_size
    with torch.device("meta"):
        module = nn.Linear(4096, 4096, bias=False)
    before = anonymous_memory()
    load_module(module, [path], dtype=torch.float32)
    assert module.weight.sum().isfinite()  # touches every page
    assert anonymous_memory() - before < 0.05 * size
    address = module.weight.data_ptr()
    spans = re.findall(r"^(\w+)-(\w+) .* (/.*)$", Path("/proc/self/maps").read_text(), re.MULTILINE)
    assert [name for begin, end, name in spans if int(begin, 16) <= address < int(end, 16)] == [str(path)]


# ------------------------------------------------------------------------------------------------------ configurations

FLUX1 = FluxConfig(
    in_channels=64, out_channels=64, context_dim=4096, hidden_size=3072, num_heads=24, depth=19, depth_single=38,
    mlp_ratio=4.0, axes_dim=(16, 56, 56), theta=10000, vector_dim=768, guidance=True,
    bias=True, gated_mlp=False, shared_modulation=False)
FLUX2 = FluxConfig(
    in_channels=128, out_channels=128, context_dim=15360, hidden_size=6144, num_heads=48, depth=8, depth_single=48,
    mlp_ratio=3.0, axes_dim=(32, 32, 32, 32), theta=2000, vector_dim=None, guidance=True,
    bias=False, gated_mlp=True, shared_modulation=True)
KLEIN_4B = replace(FLUX2, context_dim=7680, hidden_size=3072, num_heads=24, depth=5, depth_single=20, guidance=False)
RELEASED = {
    "FLUX.1-dev": FLUX1,
    "FLUX.1-schnell": replace(FLUX1, guidance=False),
    "FLUX.1-Canny-dev": replace(FLUX1, in_channels=128),
    "FLUX.1-Fill-dev": replace(FLUX1, in_channels=384),
    "FLUX.2-dev": FLUX2,
    "FLUX.2-klein-4B": KLEIN_4B,
    "FLUX.2-klein-9B": replace(KLEIN_4B, context_dim=12288, hidden_size=4096, num_heads=32, depth=8, depth_single=24),
}
TINY1 = replace(FLUX1, in_channels=20, out_channels=12, context_dim=24, hidden_size=64, num_heads=2, depth=2,
                depth_single=3, axes_dim=(4, 14, 14), vector_dim=20)
TINY2 = replace(FLUX2, in_channels=20, out_channels=12, context_dim=24, hidden_size=48, num_heads=3, depth=1,
                depth_single=2, axes_dim=(4, 4, 4, 4), guidance=False)


def hollow(path: Path, shapes: dict[str, tuple[int, ...]], dtype: str = "BF16", bits: int = 16) -> Path:
    """A file of the full size that takes no room on disk: a true header, and then a hole."""
    header, position = {}, 0
    for name, shape in shapes.items():
        size = torch.Size(shape).numel() * bits // 8
        header[name] = entry(dtype, list(shape), position, position + size)
        position += size
    raw(path, header)
    os.truncate(path, path.stat().st_size + position)
    return path


def shapes_of(config: FluxConfig) -> dict[str, tuple[int, ...]]:
    with torch.device("meta"):
        return {name: tuple(tensor.shape) for name, tensor in Flux(config).state_dict().items()}


@pytest.mark.parametrize("name", RELEASED)
@pytest.mark.parametrize("prefix, dtype, bits", [("", "BF16", 16), ("model.diffusion_model.", "F8_E4M3", 8)])
def test_config_of_released_shapes(tmp_path, name, prefix, dtype, bits):
    shapes = {prefix + key: shape for key, shape in shapes_of(RELEASED[name]).items()}
    assert infer_config(hollow(tmp_path / "x.safetensors", shapes, dtype, bits)) == RELEASED[name]


@pytest.mark.parametrize("config", [TINY1, TINY2], ids=["FLUX.1", "FLUX.2"])
def test_unnamed_file_becomes_a_transformer(tmp_path, config):
    tensors = {name: torch.randn(shape) for name, shape in shapes_of(config).items()}
    path = saved(tmp_path / "x.safetensors", tensors)
    assert infer_config(path) == config
    respelt = {name.replace("_norm.scale", "_norm.weight"): tensor for name, tensor in tensors.items()}
    assert respelt.keys() != tensors.keys() and infer_config(saved(path, respelt)) == config
    with torch.device("meta"):
        model = Flux(config)
    load_module(model, [path])
    assert all(torch.equal(tensor, tensors[name]) for name, tensor in model.state_dict().items())


def test_other_family_and_other_size_are_told(tmp_path):
    path = hollow(tmp_path / "x.safetensors", shapes_of(TINY2))
    with torch.device("meta"):
        flux1, wide = Flux(TINY1), Flux(replace(TINY2, context_dim=32))
    assert "looks like a FLUX.2 transformer, and a FLUX.1 transformer is wanted" in refusal(load_module, flux1, [path])
    message = refusal(load_module, wide, [path])
    assert "1 misshapen ('txt_in.weight' is (48, 24) and not (48, 32))" in message and "looks like" not in message


@pytest.mark.parametrize("name, told", [
    ("transformer_blocks.0.attn.to_q.weight", "diffusers' layout"),
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
])
def test_what_is_no_transformer_is_told(tmp_path, name, told):
    message = refusal(infer_config, hollow(tmp_path / "x.safetensors", {name: (2, 2)}))
    assert told in message and "'img_in.weight'" in message


@pytest.mark.parametrize("name, shape", [
    ("img_in.weight", (64,)), ("img_in.weight", (0, 20)), ("img_in.weight", (63, 20)),
    ("double_blocks.0.img_attn.norm.query_norm.scale", (16,)), ("double_blocks.0.img_attn.norm.query_norm.scale", (0,)),
    ("double_blocks.0.img_mlp.0.weight", (100, 64)), ("vector_in.in_layer.weight", (64,)),
])
def test_sizes_of_no_transformer_are_told(tmp_path, name, shape):
    refusal(infer_config, hollow(tmp_path / "x.safetensors", shapes_of(TINY1) | {name: shape}))


def test_two_columns_a_byte_are_counted_as_two(tmp_path):
    """NVFP4 halves the width of a weight: an ungated MLP must not be taken for a gated one of half the size."""
    shapes = shapes_of(TINY1) | {"double_blocks.0.img_mlp.2.weight": (64, 128)}
    assert infer_config(hollow(tmp_path / "x.safetensors", shapes, "U8", 8)) == TINY1


# ---------------------------------------------------------------------------------------------------------- finding

REPOSITORY, FILE, INDEX = "Black-Forest/FLUX.9-dev", "flux9.safetensors", "text_encoder/model.safetensors.index.json"
ASK = dict(licence="the FLUX Dev licence", gated=True)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda *names: pytest.fail(f"downloads {names}"))
    monkeypatch.delenv("FLUX_WEIGHTS", raising=False)


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def cached(root: Path, filename: str, text: str = "") -> Path:
    """A file as huggingface_hub keeps it."""
    home = root / "cache" / f"models--{REPOSITORY.replace('/', '--')}"
    touch(home / "refs" / "main", "c" * 40)
    return touch(home / "snapshots" / ("c" * 40) / filename, text)


def test_folder_then_cache_the_most_specific_first(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    in_cache = cached(tmp_path, FILE)
    assert find(REPOSITORY, FILE) == in_cache
    folder.mkdir()
    assert find(REPOSITORY, FILE, folder) == in_cache
    for place in ("", "flux.9-DEV", "black-forest/Flux.9-dev"):
        path = touch(folder / place / FILE)
        assert find(REPOSITORY, FILE, folder) == path
        assert is_local(REPOSITORY, FILE, folder)
    monkeypatch.setenv("FLUX_WEIGHTS", str(folder))
    assert find(REPOSITORY, FILE) == path
    assert find(REPOSITORY, FILE, touch(tmp_path / "other" / FILE).parent) == tmp_path / "other" / FILE


def test_file_that_a_given_folder_lacks_is_not_downloaded(tmp_path, monkeypatch):
    message = refusal(find, REPOSITORY, FILE, tmp_path, **ASK)
    for place in (tmp_path / FILE, tmp_path / "FLUX.9-dev" / FILE, tmp_path / REPOSITORY / FILE):
        assert str(place) in message
    assert f"https://huggingface.co/{REPOSITORY} under the FLUX Dev licence" in message
    assert not is_local(REPOSITORY, FILE, tmp_path) and not is_local(REPOSITORY, FILE)
    assert "--weights, is not a folder" in refusal(find, REPOSITORY, FILE, tmp_path / "none")
    monkeypatch.setenv("FLUX_WEIGHTS", str(touch(tmp_path / FILE)))
    assert "$FLUX_WEIGHTS, is not a folder" in refusal(find, REPOSITORY, FILE)


def test_index_is_local_when_its_shards_are(tmp_path):
    index = json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}})
    for save, weights in ((lambda name, text="": cached(tmp_path, name, text), None),
                          (lambda name, text="": touch(tmp_path / "weights" / name, text), tmp_path / "weights")):
        path = save(INDEX, index)
        save("text_encoder/x-1.safetensors")
        assert not is_local(REPOSITORY, INDEX, weights)
        if weights:
            assert "lacks x-2.safetensors" in refusal(find_all, REPOSITORY, INDEX, weights)
        last = save("text_encoder/x-2.safetensors")
        assert is_local(REPOSITORY, INDEX, weights)
        assert find_all(REPOSITORY, INDEX, weights) == [path.parent / "x-1.safetensors", last]
        assert find_all(REPOSITORY, "text_encoder/x-2.safetensors", weights) == [last]


@pytest.fixture
def hub(monkeypatch):
    """The true hf_hub_download, with a hub that answers as it is told."""
    from huggingface_hub.file_download import hf_hub_download

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)

    def answer(respond):
        factory = lambda: httpx2.Client(transport=httpx2.MockTransport(respond), follow_redirects=True)  # noqa: E731
        huggingface_hub.set_client_factory(factory)

    yield answer
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def told(status: int, code: str | None = None, message: str | None = None):
    headers = {name: text for name, text in (("X-Error-Code", code), ("X-Error-Message", message)) if text}
    return lambda request: httpx2.Response(status, headers=headers, request=request)


@pytest.mark.parametrize("respond, gated, sentence", [
    (told(401, "GatedRepo"), True, "no valid Hugging Face token was sent; accept the FLUX Dev licence at"),
    (told(401, "GatedRepo"), False, "no valid Hugging Face token was sent"),
    (told(401, None, "Invalid credentials in Authorization header"), True, "no valid Hugging Face token was sent"),
    (told(403, "GatedRepo"), True, "your token's account has no access"),
    (told(403), True, "your token's account has no access"),
    (told(404, "RepoNotFound"), False, "there is no public repository"),
    (told(401), False, "there is no public repository"),
    (told(404, "EntryNotFound"), True, "has no such file"),
    (told(403), False, "HTTP 403"),
    (told(418), False, "HTTP 418"),
    (told(200), False, "cannot be reached"),
])
def test_refusals_of_the_hub_are_told(hub, respond, gated, sentence):
    hub(respond)
    message = refusal(find, REPOSITORY, FILE, licence="the FLUX Dev licence", gated=gated)
    assert sentence in message and REPOSITORY in message and FILE in message and "--weights" in message
    if "token" in sentence:
        assert f"https://huggingface.co/{REPOSITORY}" in message
    if "no valid" in sentence:
        assert "READ token" in message and "hf auth login" in message and "HF_TOKEN" in message


def test_no_network_and_offline_are_told(hub, monkeypatch):
    monkeypatch.setattr("time.sleep", lambda seconds: None)  # huggingface_hub tries again for 20 seconds

    def respond(request):
        raise httpx2.ConnectError("Name or service not known", request=request)

    hub(respond)
    assert "cannot be reached (Name or service not known)" in refusal(find, REPOSITORY, FILE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert "HF_HUB_OFFLINE" in refusal(find, REPOSITORY, FILE)


@pytest.mark.parametrize("error, sentence", [
    (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
    (httpx2.ReadTimeout("timed out"), "ReadTimeout, timed out; run again (it resumes)"),
    (RuntimeError("Data processing error:\n  lost"), "RuntimeError, Data processing error: lost"),
])
def test_interrupted_download_is_told(monkeypatch, error, sentence):
    def fail(*names):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = refusal(find, REPOSITORY, FILE)
    assert sentence in message and REPOSITORY in message and FILE in message


def test_ctrl_c_is_not_swallowed(monkeypatch):
    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find(REPOSITORY, FILE)


def test_download_brings_index_and_shards_and_then_needs_no_network(hub, tmp_path):
    contents = {INDEX: json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}).encode(),
                "text_encoder/x-1.safetensors": b"one", "text_encoder/x-2.safetensors": b"two"}
    asked = []

    def respond(request):
        name = request.url.path.removeprefix(f"/{REPOSITORY}/resolve/").split("/", 1)[1]
        asked.append((request.method, name))
        headers = {"ETag": f'"{name}"'.replace("/", "-"), "X-Repo-Commit": "c" * 40}
        return httpx2.Response(200, headers=headers, content=contents[name], request=request)

    hub(respond)
    assert [path.read_bytes() for path in find_all(REPOSITORY, INDEX)] == [b"one", b"two"]
    assert {name for _, name in asked} == contents.keys()
    asked.clear()
    assert len(find_all(REPOSITORY, INDEX)) == 2 and is_local(REPOSITORY, INDEX) and not asked
