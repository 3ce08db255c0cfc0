"""Models in several files, and what else lies in real folders. The package `gguf` splits files."""

from pathlib import Path

import gguf
import pytest
import torch
from support.weight_files import refusal, saved

import flux
from flux.configs import TINY1
from flux.lora.formats import read_lora
from flux.transformer import Flux
from flux.weights.files import MAX_SHARDS, read_header, shard_files
from flux.weights.load import infer_config, init_empty, load_module

APPLE_DOUBLE = b"\x00\x05\x16\x07\x00\x02\x00\x00Mac OS X        \x00\x02\x00\x00\x00\x09" + bytes(
    80
)
CONFIG = TINY1


@pytest.fixture(scope="module")
def state() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    return Flux(CONFIG).state_dict()


def split_gguf(folder: Path, state, empty_first: bool) -> list[Path]:
    """Write a GGUF file in parts of 50 tensors, as llama.cpp's gguf-split does."""
    writer = gguf.GGUFWriter(
        folder / "x.gguf", "flux", split_max_tensors=50, small_first_shard=empty_first
    )
    for name, tensor in state.items():
        writer.add_tensor(name, tensor.numpy())
    writer.write_header_to_file(folder / "x.gguf")
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sorted(folder.glob("x-*.gguf"))


@pytest.mark.parametrize("empty_first", [False, True])
def test_any_part_of_a_split_gguf_file_stands_for_all(tmp_path, state, empty_first):
    parts = split_gguf(tmp_path, state, empty_first)
    assert len(parts) > 2
    for given in (*parts, tmp_path):
        assert shard_files(given) == parts
        assert infer_config(given) == CONFIG
    network = init_empty(lambda: Flux(CONFIG))
    load_module(network, parts)
    assert all(torch.equal(x, state[name]) for name, x in network.state_dict().items())


def test_missing_or_renamed_part_is_named(tmp_path, state):
    parts = split_gguf(tmp_path, state, empty_first=False)
    count = len(parts)
    renamed = parts[0].rename(tmp_path / "model.gguf")
    message = refusal(shard_files, parts[1])
    assert f"is one of {count} files that must lie next to it, and lacks {parts[0].name}" in message
    assert f"{renamed} is one of {count} parts of a GGUF file" in refusal(infer_config, renamed)
    many = tmp_path / "x-00001-of-99999.safetensors"
    assert "is one of 99,999 files by its name" in refusal(shard_files, many)
    assert MAX_SHARDS < 99_999


# ---------------------------------------------------------------- what else lies in folders


def litter(folder: Path, *names: str) -> None:
    """Put beside files what macOS, Windows and Synology write, and half a download."""
    for name in (*names, "model.safetensors.index.json", "config.json"):
        (folder / f"._{name}").write_bytes(APPLE_DOUBLE)
        (folder / "@eaDir" / name).mkdir(parents=True)
        (folder / "@eaDir" / f"{name}@SynoEAStream").write_bytes(b"\0")
    for name in (".DS_Store", "Thumbs.db", "desktop.ini", "x.safetensors.part", ".x.safetensors"):
        (folder / name).write_bytes(b"\0" * 8)
    (folder / "@backup.safetensors").mkdir()
    (folder / "old.safetensors").mkdir()


def test_model_in_a_littered_folder_is_found(tmp_path, state):
    file = saved(tmp_path / "model.safetensors", state)
    litter(tmp_path, file.name)
    assert shard_files(tmp_path) == [file]
    assert infer_config(tmp_path) == CONFIG


def test_shards_in_a_littered_folder_are_found(tmp_path, state):
    names = sorted(state)
    files = [
        saved(tmp_path / f"x-0000{i + 1}-of-00002.safetensors", {n: state[n] for n in names[i::2]})
        for i in range(2)
    ]
    litter(tmp_path, *[file.name for file in files])
    for given in (*files, tmp_path):
        assert shard_files(given) == files
    assert infer_config(tmp_path) == CONFIG


def test_model_of_a_littered_weight_folder_loads(tmp_path):
    source = flux.configs.EMBEDDED / "flux.1-tiny"
    for file in source.rglob("*"):
        if file.is_file():
            target = tmp_path / "w" / file.relative_to(source)
            target.parent.mkdir(parents=True, exist_ok=True)
            target.symlink_to(file)
    for folder in {file.parent for file in (tmp_path / "w").rglob("*")}:
        litter(folder, "vocab.json", "spiece.model")
    pipe = flux.load(
        "flux.1-tiny",
        transformer=tmp_path / "w/flux1-tiny.safetensors",
        autoencoder=tmp_path / "w/ae.safetensors",
        text_encoder_2=tmp_path / "w/text_encoder_2/model.safetensors",
        tokenizer=tmp_path / "w",
    )
    assert pipe.spec.name == "flux.1-tiny"


def test_lora_of_a_littered_folder_is_found(tmp_path):
    down, up = torch.ones(2, 128), torch.ones(128, 2)
    tensors = {"lora_A": down, "lora_B": up}
    file = saved(
        tmp_path / "adapter_model.safetensors",
        {f"base_model.model.txt_in.{name}.weight": x for name, x in tensors.items()},
    )
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4}')
    litter(tmp_path, file.name)
    assert read_lora(tmp_path).path == file


def test_companion_that_is_named_itself_is_refused(tmp_path):
    (path := tmp_path / "._model.safetensors").write_bytes(APPLE_DOUBLE)
    expected = "a companion that macOS writes, without weights; name the file without ._"
    assert expected in refusal(read_header, path)
    assert expected in refusal(read_lora, path)
    assert expected in refusal(infer_config, path)
