"""sample.py --latents: decode what --save-latents wrote, or go on from it."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.sample_run import PROMPT, QUICK, pixels

from flux.image_io.output import read_metadata
from flux.safety.verification import verify

pytestmark = pytest.mark.slow


@pytest.fixture
def saved(cli):
    run = cli(PROMPT, *QUICK, "--seed", 3, "--output", "a.png", "--save-latents")
    assert run.code == 0, run.err
    return Path("a.png"), Path("a.safetensors")


def test_decoded_latents_are_the_image_with_its_metadata(cli, saved):
    image, latents = saved
    run = cli("--latents", latents, "--output", "b.png")
    assert run.code == 0, run.err
    assert pixels(Path("b.png")) == pixels(image)
    assert read_metadata(Path("b.png")) == read_metadata(image)
    again = cli("--from-image", "b.png", "--output", "c.png")
    assert again.code == 0 and pixels(Path("c.png")) == pixels(image)


def test_a_run_goes_on_from_latents_and_is_made_again(cli, saved):
    flags = ("--latents", saved[1], "--steps", 4, "--strength", 0.5, "--seed", 5)
    run = cli("a blue ring", *flags, "--output", "b.png")
    assert run.code == 0 and "64x64, 4 steps at strength 0.5" in run.err, run.err
    metadata = read_metadata(Path("b.png"))
    assert metadata["latents"]["file"] == "a.safetensors" and metadata["prompt"] == "a blue ring"
    again = cli("--from-image", "b.png", "--output", "c.png")
    assert again.code == 0 and pixels(Path("c.png")) == pixels(Path("b.png"))
    weaker = cli("a blue ring", *flags[:5], 0.25, *flags[6:], "--output", "d.png")
    assert weaker.code == 0 and pixels(Path("d.png")) != pixels(Path("b.png"))
    saved[1].write_bytes(b"other")
    changed = cli("--from-image", "b.png")
    assert changed.code == 2 and "is not the file that b.png was made with" in changed.err


@pytest.mark.parametrize(
    "record",
    [
        {"model": "flux.2-tiny", "image_options": "x", "mask": 3, "seed": []},
        {"model": "flux.2-tiny", "image_options": ["x"], "images": 7},
        {"prompt": {}},
        [],
        None,
    ],
)
def test_every_decoded_image_has_the_mark_of_generated_media(cli, record):
    """Without a record, with a foreign one, and where the record cannot hold: of two images."""
    for count in (1, 2):
        header = None if record is None else {"flux": json.dumps(record)}
        save_file({"latents": torch.zeros(count, 64, 4, 4)}, "l.safetensors", header)
        for flags in ((), ("--no-metadata",)):
            run = cli("--latents", "l.safetensors", "--model", "flux.2-tiny", *flags)
            assert run.code == 0 and len(run.images) == count, run.err
            for path in run.images:
                (found,) = [f for f in verify(path) if f.kind == "source type"]
                assert found.holds and found.text.startswith("trainedAlgorithmicMedia")


def test_wrong_latents_are_refused(cli, saved, tmp_path):
    good = torch.zeros(1, 64, 4, 4)
    for name, tensors, problem in (
        ("other", {"x": good}, "has no latents"),
        ("flat", {"latents": good[0]}, "has no latents"),
        ("nan", {"latents": good / 0}, "has NaN or infinity"),
        ("channels", {"latents": good[:, :16].contiguous()}, "latents"),
    ):
        save_file(tensors, f"{name}.safetensors")
        run = cli("--latents", f"{name}.safetensors")
        assert run.code == 2 and problem in run.err and run.err.count("\n") <= 2, run.err
    Path("text.safetensors").write_text("latents")
    assert cli("--latents", "text.safetensors").code == 2
    assert cli("--latents", "missing.safetensors").code == 2
    for flags, problem in (
        (("--width", 128), "--width: is 64 in a.safetensors (got 128)"),
        (("--strength", 2), "--strength: must be above 0"),
    ):
        run = cli(PROMPT, "--latents", saved[1], *flags)
        assert run.code == 2 and problem in run.err, run.err
    save_file({"latents": good}, "odd.safetensors", {"flux": json.dumps([1])})
    assert cli("--latents", "odd.safetensors", "--output", "odd.png").code == 0
