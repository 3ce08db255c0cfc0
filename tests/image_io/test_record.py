"""Images made in Python carry their metadata, and sample.py makes them again from these."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import flux
from flux.configs import EMBEDDED
from flux.image_io.output import RecordedImage, read_metadata

LORA = EMBEDDED / "flux.2-tiny/framed.safetensors"


@pytest.fixture(scope="module")
def pipe():
    return flux.load(device="cpu")


@pytest.mark.slow
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_images_of_python_are_made_again(pipe, cli, suffix):
    pipe.load_lora(LORA, 0.7)
    request = dict(seed=4, num_images=2, solver="heun", sigmas=[1, np.float32(0.5)])
    image = pipe("a red circle", 64, 64, **request, guidance="1.5:2".split(":"))[1]
    pipe.unload_loras()
    image.save(f"a.{suffix}")
    run = cli("--from-image", f"a.{suffix}", "--output", "b.png")
    assert run.code == 0, run.err
    first, again = (read_metadata(Path(x)) for x in (f"a.{suffix}", "b.png"))
    assert first["seed"] == 5 and first["solver"] == "heun" and first["sigmas"] == [1, 0.5, 0]
    differing = {name for name in first if first[name] != again[name]}
    assert differing == set(), differing
    with Image.open("b.png") as made:  # alone, an image may differ by a level
        levels = np.abs(np.asarray(made).astype(int) - np.asarray(image))
    assert levels.max() <= 1 and (levels > 0).mean() < 1e-3


def test_input_images_are_known_by_their_files(pipe, cli):
    Image.new("RGB", (64, 64), "navy").save("in.png")
    options = dict(steps=2, seed=1)
    inputs = flux.ImageInputs(("in.png",), strength=np.float64(0.5))
    pipe("a red circle", images=inputs, **options)[0].save("a.png")
    run = cli("--from-image", "a.png", "--output", "b.png")
    assert run.code == 0, run.err
    with Image.open("in.png") as opened:
        in_memory = pipe("a red circle", images=opened.convert("RGB"), **options)[0]
    in_memory.save("c.png")
    run = cli("--from-image", "c.png", "--output", "d.png")
    assert run.code == 2 and "do not say which files --image had" in run.err


def test_what_only_python_has_is_refused(pipe, cli):
    def own(velocity, x, times, callback, blend):
        return x

    pipe("a", 64, 64, 1, solver=own)[0].save("a.png")
    run = cli("--from-image", "a.png")
    assert run.code == 2 and "--solver: there is none" in run.err


def test_records_do_not_disturb_images(pipe):
    image = pipe("a red circle", 64, 64, 1)[0]
    plain = pipe.decode(pipe.sample(pipe.encode("a red circle"), [0], 64, 64, 1))[0]
    assert isinstance(image, RecordedImage) and type(plain) is type(image.copy()) is Image.Image
    assert image == plain and plain == image and image != image.rotate(90)
    assert image != 3 and "a red circle" in image.info["flux"]
    assert torch.equal(*(torch.from_numpy(np.array(x)) for x in (image, plain)))
