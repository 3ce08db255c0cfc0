"""Weight files that change, vanish or lie on a network while they are used.

Without these errors the process would end by SIGBUS, or go on with other weights.
"""

import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.weight_files import refusal, saved

import flux
from flux.configs import EMBEDDED
from flux.parity.capture_file import Capture
from flux.weights import mapping
from flux.weights.files import read_header
from flux.weights.mapping import file_system, map_tensors

TOY = EMBEDDED / "flux.2-tiny/flux-2-tiny.safetensors"
PROMPT = "a small red circle above a large blue ring on a white background"
changed = pytest.mark.parametrize(
    "change", [lambda path: os.truncate(path, 100_000), lambda path: os.utime(path, (1, 1))]
)


@pytest.fixture
def toy(tmp_path) -> Path:
    return Path(shutil.copy(TOY, tmp_path / "toy.safetensors"))


def load(path: Path, **options):
    """Load the toy in the dtype of its file, so that it stays mapped."""
    options = dict(device="cpu", dtype=torch.bfloat16) | options
    return flux.load("flux.2-tiny", transformer=path, **options)


def image(pipe, steps: int = 2, **options) -> np.ndarray:
    return np.asarray(pipe(PROMPT, 64, 64, steps=steps, seed=0, **options)[0])


@changed
@pytest.mark.parametrize("offload", [None, "block"])
def test_file_that_changes_between_two_images_is_refused(toy, change, offload):
    pipe = load(toy, offload=offload)
    image(pipe)
    change(toy)
    assert refusal(image, pipe) == f"{toy}: was changed while it was used. Load the model again."


@changed
@pytest.mark.parametrize("offload", [None, "block"])
def test_file_that_changes_between_two_steps_is_refused(toy, change, offload):
    pipe = load(toy, offload=offload)
    seen = []

    def after_step(step, t, latents):
        seen.append(step)
        if step == 2:
            change(toy)

    message = refusal(image, pipe, steps=4, callback=after_step)
    assert "was changed while it was used" in message and seen == [1, 2]


@changed
def test_file_that_changes_before_it_is_loaded_is_refused(toy, change):
    pipe = load(toy)
    change(toy)
    assert "was changed while it was used" in refusal(image, pipe)


def test_replaced_file_is_refused_where_it_would_be_read_again(toy):
    """What is mapped stays, whatever has the name now; a new load would be another model."""
    pipe = load(toy)
    expected = image(pipe)
    tensors = {name: torch.zeros_like(x) for name, x in load_file(toy).items()}
    save_file(tensors, toy.with_name("new"))
    os.replace(toy.with_name("new"), toy)
    assert np.array_equal(image(pipe), expected)
    pipe.transformer.release()
    assert "was changed while it was used" in refusal(image, pipe)


def test_deleted_file_is_used_on_and_missed_at_the_next_load(toy):
    pipe = load(toy)
    expected = image(pipe)
    toy.unlink()
    assert np.array_equal(image(pipe), expected)
    pipe.transformer.release()
    assert f"{toy}: does not exist" in refusal(image, pipe)


@changed
def test_lora_that_changes_is_refused(toy, tmp_path, change):
    lora = Path(
        shutil.copy(EMBEDDED / "flux.2-tiny/framed.safetensors", tmp_path / "l.safetensors")
    )
    pipe = load(toy)
    pipe.load_lora(lora)
    image(pipe)
    change(lora)
    pipe.set_lora_scale(lora, 0.5)
    assert f"{lora}: was changed" in refusal(image, pipe)


@changed
def test_capture_that_changes_is_refused(tmp_path, change):
    path = saved(tmp_path / "x.safetensors", {"x": torch.ones(100_000)})
    capture = Capture(path)
    assert capture.tensors["x"].sum() == 100_000
    change(path)
    assert "was changed while it was used" in refusal(capture.tensors.__getitem__, "x")


# ---------------------------------------------------------------- files on a network

MOUNTS = """\
22 27 0:21 / /proc rw,relatime - proc proc rw
27 1 254:0 / / rw,relatime - ext4 /dev/vda rw
40 27 0:52 / /home rw,relatime shared:21 master:3 - nfs4 server:/home rw,vers=4.2
41 27 0:53 / /mnt/a\\040b rw - fuse.sshfs me@server:/ rw
"""


@pytest.fixture
def on_network(monkeypatch):
    monkeypatch.setattr(mapping, "file_system", lambda major, minor: "nfs4")


@pytest.mark.parametrize(
    "device, kind", [("254:0", "ext4"), ("0:52", "nfs4"), ("0:53", "fuse.sshfs"), ("9:9", "")]
)
def test_type_of_a_file_system_is_told_by_its_device(device, kind):
    assert mapping._type_of(MOUNTS.splitlines(), device) == kind


@pytest.mark.skipif(not Path("/proc/self/mountinfo").exists(), reason="needs Linux' /proc")
def test_type_of_this_file_system_is_that_of_stat(tmp_path):
    """The mount table names /proc itself."""
    device = os.stat("/proc").st_dev
    assert file_system(os.major(device), os.minor(device)) == "proc"
    assert not mapping.is_on_network(Path("/proc/self/mountinfo"))


def test_mapped_file_on_a_network_is_noted(toy, on_network):
    pipe = load(toy)
    with pytest.warns(UserWarning, match="lies on a network: if its server") as told:
        image(pipe)
    assert any(str(toy) in str(warning.message) for warning in told)


def test_file_on_a_network_is_read_on_its_way_to_a_device(tmp_path, on_network, monkeypatch):
    tensors = {"x": torch.randn(300, 5).bfloat16(), "y": torch.randn(7), "z": torch.empty(0, 3)}
    infos, _ = read_header(saved(tmp_path / "x.safetensors", tensors))
    monkeypatch.setattr(mapping, "map_file", None)
    found = dict(map_tensors(infos, copied=True))
    assert all(torch.equal(found[name], x) for name, x in tensors.items())
    os.truncate(tmp_path / "x.safetensors", 1000)
    assert "was changed while it was read" in refusal(dict, map_tensors(infos, copied=True))


def test_input_output_error_while_reading_is_a_sentence(tmp_path, on_network, monkeypatch):
    infos, _ = read_header(saved(tmp_path / "x.safetensors", {"x": torch.ones(4)}))

    def fail(*_, **__):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    assert "cannot be read: Input/output error" in refusal(dict, map_tensors(infos, copied=True))
