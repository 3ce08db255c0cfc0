"""A transformer in diffusers' layout computes what diffusers computes with the same file.

The files are written by diffusers itself, from networks with random weights.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.transformer_inputs import inputs
from support.weight_files import hollow, refusal, saved

import flux.parity.reference as reference
from flux.configs import MODELS
from flux.transformer import Flux, FluxConfig
from flux.weights.files import shard_files
from flux.weights.load import infer_config, init_empty, load_module

CONFIGS = {  # with the axes of RoPE that no file states
    "flux1": replace(reference.FLUX1_TINY, axes_dim=(4, 14, 14)),
    "schnell": replace(reference.SCHNELL_TINY, axes_dim=(4, 14, 14)),
    "flux2": reference.FLUX2_TINY,
    "klein": reference.KLEIN_TINY,
}


@pytest.fixture(scope="module", params=CONFIGS)
def written(request, tmp_path_factory):
    """Return a config, diffusers' network of that size, and a folder with its file."""
    config = CONFIGS[request.param]
    theirs = reference.randomise(reference.diffusers_transformer(config).to_empty(device="cpu"))
    folder = tmp_path_factory.mktemp("model") / "transformer"
    save_file(theirs.state_dict(), make(folder) / "diffusion_pytorch_model.safetensors")
    return config, theirs, folder


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


def load(path: Path, **options) -> Flux:
    network = init_empty(lambda: Flux(infer_config(path)))
    load_module(network, shard_files(path), **options)
    return network


def require_same_velocity(network: Flux, theirs, config: FluxConfig) -> None:
    expected = reference.diffusers_velocity(theirs, **inputs(config))
    assert torch.equal(network(**inputs(config)), expected) and expected.std() > 0.1


def test_file_and_folder_compute_the_velocity_of_diffusers(written):
    config, theirs, folder = written
    for path in (folder / "diffusion_pytorch_model.safetensors", folder, folder.parent):
        assert infer_config(path) == config
        require_same_velocity(load(path), theirs, config)


@pytest.mark.parametrize("prefix", ["model.diffusion_model.", "transformer.", "module."])
def test_prefix_is_removed(written, tmp_path, prefix):
    config, theirs, _ = written
    file = {f"{prefix}{name}": tensor for name, tensor in theirs.state_dict().items()}
    path = saved(tmp_path / "x.safetensors", file | {"vae.x.weight": torch.zeros(1)})
    assert infer_config(path) == config
    require_same_velocity(load(path), theirs, config)


def test_shards_are_read_by_index_folder_or_any_of_them(written, tmp_path):
    config, theirs, _ = written
    theirs.save_pretrained(tmp_path / "model", max_shard_size=100_000)
    (index,) = (tmp_path / "model").glob("*.index.json")
    shards = sorted((tmp_path / "model").glob("*.safetensors"))
    assert len(shards) > 2
    (tmp_path / "model" / "._config.json").write_bytes(b"\0\5\x16\7")
    for path in (index, tmp_path / "model", shards[1]):
        assert shard_files(path) == shards and infer_config(path) == config
    require_same_velocity(load(index), theirs, config)
    index.unlink()
    assert shard_files(tmp_path / "model") == shards
    shards[0].unlink()
    message = refusal(shard_files, shards[1])
    assert f"is one of {len(shards)} files" in message and f"lacks {shards[0].name}" in message


def test_casts_and_the_meta_device_give_the_same_tensors(written):
    config, theirs, folder = written
    network, cast = load(folder), load(folder, dtype=torch.bfloat16)
    shapes = load(folder, device="meta").state_dict()
    for name, tensor in network.state_dict().items():
        assert torch.equal(cast.state_dict()[name], tensor.bfloat16())
        assert shapes[name].is_meta and shapes[name].shape == tensor.shape


@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.float8_e5m2])
def test_plain_float8_is_joined_bit_for_bit(written, tmp_path, dtype):
    config, theirs, _ = written
    file = {n: x.to(dtype) if x.ndim == 2 else x for n, x in theirs.state_dict().items()}
    found = load(saved(tmp_path / "x.safetensors", file), dtype=torch.float32)
    theirs_again = reference.diffusers_transformer(config)
    reference.loaded(theirs_again, {name: tensor.float() for name, tensor in file.items()})
    require_same_velocity(found, theirs_again, config)


def test_parts_that_do_not_fit_together_are_refused(written, tmp_path):
    _, theirs, _ = written
    state = theirs.state_dict()
    q, v = (f"transformer_blocks.0.attn.to_{part}.weight" for part in "qv")
    for change, expected in (
        ({v: state[v].half()}, f"{v!r} as F16"),
        ({v: state[v][:, :-1]}, "which belong into one matrix"),
        ({f"{q}_scale": torch.tensor(1.0)}, f"1 unknown ('{q}_scale')"),
        ({"transformer_blocks.0.attn.to_other.weight": torch.ones(1)}, "1 unknown"),
        ({"norm_out.linear.weight": torch.ones(3, 4)}, "'norm_out.linear.weight' is (3, 4)"),
    ):
        assert expected in refusal(load, saved(tmp_path / "x.safetensors", state | change))
    del state[q]
    message = refusal(load, saved(tmp_path / "x.safetensors", state))
    assert "1 missing ('double_blocks.0.img_attn.qkv.weight')" in message and v in message


def test_folder_without_a_model_or_with_several_is_refused(tmp_path):
    assert "is a folder without a safetensors or GGUF file" in refusal(shard_files, tmp_path)
    (tmp_path / "a.safetensors").touch()
    assert shard_files(tmp_path) == [tmp_path / "a.safetensors"]
    (tmp_path / "b.gguf").touch()
    assert "a folder with 2 models (a.safetensors, b.gguf)" in refusal(shard_files, tmp_path)


@pytest.mark.parametrize(
    "name", ["flux.1-dev", "flux.1-schnell", "flux.1-fill-dev", "flux.2-dev", "flux.2-klein-4b"]
)
def test_released_sizes_are_inferred_and_fit(tmp_path, name):
    config = MODELS[name].transformer
    shapes = reference.shapes(reference.diffusers_transformer(config).state_dict())
    path = hollow(tmp_path / "x.safetensors", shapes)
    assert infer_config(path) == config
    load(path, device="meta")
