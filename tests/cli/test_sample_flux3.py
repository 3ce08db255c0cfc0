"""scripts/sample.py with tiny FLUX 3 models."""

from pathlib import Path

import pytest
from PIL import Image
from support.drawn_images import photo
from support.flux3_model import BASE, DISTILLED, both_models

from flux.image_io import output

pytestmark = pytest.mark.filterwarnings("ignore:.* was distilled for")


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with both_models(folder):
        yield folder


@pytest.mark.slow
@pytest.mark.parametrize("name", [BASE, DISTILLED])
def test_reference_is_edited_at_its_size_and_made_again(cli, weights, tmp_path, name):
    photo(70, 45).save(tmp_path / "in.png")
    shared = ("--weights", weights, "--dtype", "float32")
    run = cli("a cat", "--model", name, "--image", tmp_path / "in.png", "--steps", 2, *shared)
    assert run.code == 0, run.err
    path = Path(run.out.strip())
    with Image.open(path) as image:
        assert image.size == (70, 45)
        pixels = image.tobytes()
    metadata = output.read_metadata(path)
    assert (metadata["model"], metadata["steps"]) == (name, 2)
    again = cli("--from-image", path, "--weights", weights)
    assert again.code == 0, again.err
    with Image.open(again.out.strip()) as image:
        assert image.tobytes() == pixels
    sized = cli(
        "a cat",
        "--model",
        name,
        "--image",
        tmp_path / "in.png",
        "--steps",
        1,
        "--width",
        96,
        *shared,
    )
    with Image.open(sized.out.strip()) as image:
        assert image.size == (96, 64)


def test_guidance_of_a_flow_map_is_refused_with_the_reason(cli, weights):
    shared = ("a cat", "--model", DISTILLED, "--weights", weights)
    reason = "it was distilled to a flow map, which samples without guidance, in 16 steps"
    cli(*shared, "--guidance", 3.5).fails_with("--guidance", reason, "base")
    cli(*shared, "--negative-prompt", "x").fails_with("--negative-prompt", reason, "base")
    cli(*shared, "--true-cfg-scale", 2).fails_with("--true-cfg-scale", reason, "base")
    cli(*shared, "--solver", "heun").fails_with('--solver: must be "euler"', reason, "base")


@pytest.mark.slow
def test_boxes_follow_the_prompt_and_are_kept(cli, weights, tmp_path):
    file = tmp_path / "boxes.json"
    file.write_text('[{"id": "dog", "bbox": [0.5, 0, 1, 0.5], "desc": "brown"}]')
    shared = ("--model", DISTILLED, "--weights", weights, "--dtype", "float32", "--steps", 1)
    shared += ("--width", 64, "--height", 64)
    run = cli("a <cat>, a <dog>", "--box", "cat:0.2,0.1,0.9,0.5:gray", "--boxes", file, *shared)
    assert run.code == 0, run.err
    rows = (
        '[{"id": "cat", "bbox": [100, 200, 500, 900], "desc": "gray"}, '
        '{"id": "dog", "bbox": [500, 0, 1000, 500], "desc": "brown"}]'
    )
    path = Path(run.out.strip())
    assert output.read_metadata(path)["prompt"] == f"a <cat>, a <dog> {rows}" and rows in run.err
    again = cli("--from-image", path, "--weights", weights)
    with Image.open(path) as first, Image.open(again.out.strip()) as second:
        assert first.tobytes() == second.tobytes()


def test_boxes_that_cannot_be_used_are_refused(cli, weights):
    shared = ("a cat", "--model", DISTILLED, "--weights", weights)
    cli("a cat", "--box", "cat:0,0,1,1").fails_with("--boxes", "only FLUX 3", "flux.2-tiny")
    cli(*shared, "--box", "cat:0,0,1").fails_with("--box: must be NAME:X0,Y0,X1,Y1")
    cli(*shared, "--box", "cat:0,0,2,1").fails_with("--boxes: the box of cat")
    cli(*shared, "--box", "cat:0,0,1,1", "--box", "cat:0,0,1,1").fails_with("two boxes", "cat")
    cli(*shared, "--boxes", "none.json").fails_with("none.json: does not exist")
    rows = 'a <cat> [{"id": "cat", "bbox": [1, 2, 3, 4]}]'
    cli(rows, *shared[1:], "--box", "cat:0,0,1,1").fails_with("--boxes: the prompt ends in rows")
