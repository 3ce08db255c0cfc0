"""scripts/sample.py --filter: a classifier trained on the toy's world refuses what shows red.

Every way to an image passes the filter: arguments, files, standard input, an image made again.
"""

import io
import json
import sys
from argparse import Namespace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modules.safety_flags import Safety
from PIL import Image
from support.classifiers import save_red_classifier
from support.sample_run import files_in, pixels

import flux
from flux.configs import MODELS
from flux.image_io.output import read_metadata

pytestmark = pytest.mark.slow
RED, BLUE = (f"a large {colour} circle on a white background" for colour in ("red", "blue"))
RUN = ("--width", 64, "--height", 64, "--seed", 1, "--output", "a.png")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("classifier")
    torch.manual_seed(0)
    assert save_red_classifier(folder) > 0.9  # seen: 0.955
    return folder


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a run begins to load a model."""
    monkeypatch.setattr(flux, "load", lambda *_, **__: pytest.fail("the model was loaded"))


def test_refused_image_is_not_written_and_the_others_go_on(cli, folder):
    filtered = ("--filter", "nsfw", "--filter-weights", folder, "--save-latents")
    run = cli(RED, BLUE, *RUN, *filtered)
    assert run.code == 3 and run.out == "a.png\n", run.err
    assert run.files == ["a.png", "a.safetensors"]
    assert run.err.count("refused") == 2  # the verdict, and its threshold
    assert "seed 1: refused by nsfw 0.9" in run.err and f": {RED}\n" in run.err
    assert read_metadata(run.images[0])["prompt"] == BLUE
    (plain,) = cli(BLUE, *RUN, "--seed", 2, "--output", "b.png").images
    assert pixels(plain) == pixels(run.images[0])
    run = cli(BLUE, *RUN, "--output", "c.png", *filtered)
    assert run.code == 0


def test_review_keeps_refused_images_and_scores(cli, folder, monkeypatch):
    """Prompts of standard input; and the image again, by its metadata."""
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{RED}\n{BLUE}\n".encode())))
    filtered = ("--filter", "nsfw", "--filter-weights", folder, "--review", "aside")
    run = cli("--prompt-file", "-", *RUN, *filtered)
    assert run.code == 3
    assert run.files == ["a.png", "aside/a.json", "aside/a.png"]
    review = json.loads((run.folder / "aside/a.json").read_text())
    (verdict,) = review.pop("verdicts")
    assert review == {"image": "a.png"} and verdict.pop("score") > 0.85
    assert verdict == {"filter": "nsfw", "threshold": 0.85, "refused": True}
    assert read_metadata(run.folder / "aside/a.png")["prompt"] == RED
    again = cli("--from-image", "aside/a.png", "--output", "b.png", *filtered[:4])
    assert again.code == 3 and "b.png" not in again.files


def test_saved_latents_pass_the_filter(cli, folder):
    (image,) = cli(RED, *RUN, "--save-latents").images
    filtered = ("--filter", "nsfw", "--filter-weights", folder)
    run = cli("--latents", image.with_suffix(".safetensors"), "--output", "b.png", *filtered)
    assert run.code == 3 and run.out == "" and "refused by nsfw 0.9" in run.err, run.err
    assert run.files == ["a.png", "a.safetensors"]


def test_refused_input_stops_the_run_before_the_model_loads(cli, folder, no_model):
    Image.new("RGB", (64, 64), (215, 35, 35)).save("red.png")
    Image.new("RGB", (64, 64), (35, 75, 215)).save("blue.png")
    filtered = ("--filter", "nsfw", "--filter-weights", folder)
    run = cli(BLUE, *RUN, "--image", "blue.png", "--image", "red.png", *filtered)
    assert run.code == 3
    assert run.err.splitlines()[-1].startswith("refused: image 2, by nsfw 0.9")
    assert run.out == "" and run.files == ["blue.png", "red.png"]


def test_filter_that_is_not_there_stops_the_run(cli, folder, no_model, tmp_path):
    """Missing, of no folder, damaged, or with flags that do nothing without it."""
    cli(BLUE, *RUN, "--filter", "nsfw").fails_with("--filter-weights: ", "is not there")
    empty = tmp_path / "empty"
    empty.mkdir()
    filtered = ("--filter", "nsfw", "--filter-weights")
    cli(BLUE, *RUN, *filtered, empty).fails_with("--filter-weights: ", "is not there")
    cli(BLUE, *RUN, *filtered, "nowhere").fails_with("--filter-weights: nowhere is not")
    whole = {name: (folder / name).read_bytes() for name in ("config.json", "model.safetensors")}
    for damaged in whole:
        for name, data in whole.items():
            (empty / name).write_bytes(data[:-50] if name == damaged else data)
        cli(BLUE, *RUN, *filtered, empty).fails_with(str(empty / damaged))
    cli(BLUE, *RUN, "--filter-weights", folder).fails_with("--filter-weights: has no effect")
    cli(BLUE, *RUN, "--review", "aside").fails_with("--review: has no effect", "--filter")
    mixed = ("--filter-weights", folder, "--review", tmp_path / "here/../here")
    cli(BLUE, *RUN, "--filter", "nsfw", *mixed).fails_with(
        "--review: ", "is the folder of --output"
    )
    assert files_in(tmp_path / "here") == []


@pytest.mark.parametrize("spec", MODELS.values(), ids=MODELS)
def test_licence_that_asks_for_filters_is_named_once(spec, capsys):
    """All but Apache-2.0 do, such as section 2(e) of the non-commercial licences."""
    options = dict(filter=None, filter_weights=None, judge_device=None, review=None)
    options |= dict(weights=None, output=Path("a.png"), watermark=None, sign=None, certificate=None)
    options |= dict(sign_prompt=False, no_metadata=False, image=[], mask=None, latents=None)
    Safety(Namespace(**options), spec.licence, (64, 64), {}).loaded(SimpleNamespace(files={}))
    told = capsys.readouterr().err
    if spec.licence.name.startswith("Apache"):
        assert told == ""
    else:
        assert told.startswith(f"note: the {spec.licence.name} asks for content filters")
        assert told.count("\n") == 1


def test_full_disk_while_a_refused_image_is_put_aside(cli, folder, monkeypatch):
    def fail(self, file, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    filtered = ("--filter", "nsfw", "--filter-weights", folder, "--review", "aside")
    full = "error: aside/a.png: No space left on device"
    cli(RED, *RUN, *filtered).fails_with(full, code=1)
