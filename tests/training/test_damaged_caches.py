"""A file of the cache is what the cache wrote under its name, or is made again.

The rule is tested on a table of tampered files of latents and of text features.
"""

import math
import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.weight_files import refusal
from torch import Tensor

import flux
from flux.training import batches, dataset
from flux.training.checkpoint import CHECKSUM, tensors_sha256
from flux.training.dataset import Sample
from flux.weights.files import read_header

Tensors = dict[str, Tensor]
Metadata = dict[str, str]
Change = Callable[[Tensors, Metadata], object]


@pytest.fixture(scope="module")
def toy():
    return flux.load(device="cpu")


@pytest.fixture(scope="module")
def cached(toy, tmp_path_factory):
    """A cache, its one sample, the sample's files, and what is in them."""
    folder = tmp_path_factory.mktemp("cache")
    pixels = np.random.default_rng(0).integers(0, 256, (64, 96, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "a.png")
    cache, sample = dataset.Cache(folder / "cache", toy, 64), Sample(folder / "a.png", "a red cat")
    files = cache.sample(sample)
    return cache, sample, files, [load_file(files.latents), load_file(files.features)]


def only(edit: Callable[[Tensor], Tensor]) -> Change:
    """Edit the file's only tensor."""

    def change(tensors: Tensors, _) -> None:
        ((name, x),) = tensors.items()
        tensors[name] = edit(x.clone())

    return change


def set_value(value: float) -> Change:
    def edit(x: Tensor) -> Tensor:
        x.view(-1)[-1] = value
        return x

    return only(edit)


def rename(new: str) -> Change:
    return lambda tensors, _: tensors.update({new: tensors.pop(next(iter(tensors)))})


def add(name: str) -> Change:
    return lambda tensors, _: tensors.update({name: torch.zeros(3)})


def told(name: str, value: str | None) -> Change:
    def change(_, metadata: Metadata) -> None:
        metadata.pop(name)
        metadata.update({} if value is None else {name: value})

    return change


CHANGES: dict[str, Change] = {
    "no tensor": lambda tensors, _: tensors.clear(),
    "another name": rename("x"),
    "an empty name": rename(""),
    "the other kind's name": rename("channels"),
    "two tensors": add("x"),
    "a pooled vector": add("pooled"),
    "no rows": only(lambda x: x[:0].clone()),
    "no columns": only(lambda x: x[..., :0].clone()),
    "fewer rows": only(lambda x: x[:-1].clone()),
    "more rows": only(lambda x: torch.cat([x, x[:1]])),
    "one number": only(lambda x: x.view(-1)[0].clone()),
    "another dimension": only(lambda x: x[None].clone()),
    "flat": only(lambda x: x.flatten()),
    "70 dimensions": only(lambda x: x.view(*x.shape, *[1] * 60)),
    "transposed": only(lambda x: x.transpose(0, -1).contiguous()),
    "float64": only(Tensor.double),
    "bfloat16": only(Tensor.bfloat16),
    "integers": only(Tensor.long),
    "float8": only(lambda x: x.to(torch.float8_e4m3fn)),
    "complex": only(lambda x: x.to(torch.complex64)),
    "NaN": set_value(math.nan),
    "infinity": set_value(-math.inf),
    "no checksum": told(CHECKSUM, None),
    "zeros and an empty checksum": lambda tensors, metadata: (
        only(torch.zeros_like)(tensors, metadata),
        told(CHECKSUM, "")(tensors, metadata),
    ),
    "another checksum": told(CHECKSUM, 64 * "0"),
    "no name of its own": told("name", None),
    "the name of another": told("name", "latents-0"),
}
# all others get a right one
SOUND_CHECKSUM = {"no checksum", "zeros and an empty checksum", "another checksum"}


def tamper(file: Path, name: str) -> None:
    tensors, metadata = load_file(file), dict(read_header(file)[1])
    CHANGES[name](tensors, metadata)
    if name not in SOUND_CHECKSUM:
        try:
            metadata[CHECKSUM] = tensors_sha256(tensors)
        except KeyError:  # of a dtype that training never writes
            pass
    save_file(tensors, file, metadata)


def made_again(cached) -> None:
    """Check that the sample has the same files, with the same tensors, as at first."""
    cache, sample, files, contents = cached
    cache.pipe.text.cache.clear()
    assert cache.sample(sample) == files
    for file, expected in zip((files.latents, files.features), contents, strict=True):
        tensors = dataset.load_cached(file)
        assert tensors.keys() == expected.keys()
        assert all(torch.equal(tensors[name], x) for name, x in expected.items())


@pytest.mark.parametrize("name", CHANGES)
def test_tampered_cache_file_is_made_again(cached, name):
    for file in (cached[2].latents, cached[2].features):
        before = file.read_bytes()
        tamper(file, name)
        assert file.read_bytes() != before
    made_again(cached)


@pytest.mark.parametrize("kind", ["flipped", "header", "cut", "longer", "empty", "text", "swapped"])
def test_rotten_cache_file_is_made_again(cached, kind):
    files = cached[2].latents, cached[2].features
    contents = [file.read_bytes() for file in files]
    for file, content in zip(files, contents, strict=True):
        length = struct.unpack("<Q", content[:8])[0]
        changed = bytearray(content)
        if kind == "flipped":
            changed[8 + length + 3] ^= 1
        elif kind == "header":
            changed[12] ^= 255
        elif kind == "cut":
            del changed[-4:]
        elif kind == "longer":
            changed += b"\0\0\0\0"
        elif kind == "empty":
            changed.clear()
        elif kind == "text":
            changed[:] = b"not a cache"
        else:
            changed[:] = contents[0] if file is files[1] else contents[1]
        file.unlink()
        file.write_bytes(changed)
    made_again(cached)


@pytest.mark.parametrize("kind", ["fifo", "device", "broken link"])
def test_special_file_in_the_cache_is_replaced(cached, kind):
    file = cached[2].latents
    file.unlink()
    if kind == "fifo":
        os.mkfifo(file)
    else:
        file.symlink_to("/dev/zero" if kind == "device" else "/nowhere")
    made_again(cached)


def test_file_of_another_image_is_not_taken(cached, tmp_path):
    cache, _, files, _ = cached
    Image.new("RGB", (96, 64), "red").save(tmp_path / "b.png")
    other = cache.latents(tmp_path / "b.png")
    files.latents.write_bytes(other.read_bytes())
    made_again(cached)


def test_file_that_rots_during_the_run_is_named(cached):
    """Batches read the cache long after the start."""
    _, _, files, _ = cached
    content = files.features.read_bytes()
    files.features.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = refusal(batches.collate, [files], 4)
    assert f"{files.features}: is damaged" in message and "Repeat the command" in message
    files.features.unlink()
    message = refusal(batches.collate, [files], 4)
    assert "does not exist" in message and "Repeat the command" in message
    made_again(cached)


def test_encoder_output_that_is_not_finite_is_not_cached(cached, tmp_path, monkeypatch):
    cache, _, _, _ = cached
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "b.png")
    bad = torch.full((1, 64, 4, 4), math.nan)
    with monkeypatch.context() as patch:
        patch.setattr(dataset.Cache, "_encode", lambda self, pixels: bad)
        message = refusal(cache.latents, tmp_path / "b.png")
    assert message.startswith(f"{tmp_path / 'b.png'}: is not finite when encoded. Use `dtype=")
    assert load_file(cache.latents(tmp_path / "b.png"))["latents"].isfinite().all()
