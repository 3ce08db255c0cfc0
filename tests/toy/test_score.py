"""scripts/toy/score.py and draw.py. No network runs.

In place of a model, one painter draws each request, and another always draws the same scene.
"""

import json
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from support.load_script import script

from flux import MODELS, toy
from flux.configs import ModelSpec
from flux.image_io import request
from flux.runtime import checks

score = script("toy/score")
SPEC, SPEC1 = MODELS["flux.2-tiny"], MODELS["flux.1-tiny"]

pytestmark = pytest.mark.slow


class Painter:
    """A pipeline that draws the request of each known prompt; or, if `deaf`, always one scene."""

    spec = SPEC

    def __init__(self, deaf: bool = False):
        self.deaf, self.known, self.options = deaf, {}, []

    def expect(self, tasks):
        self.known |= {(task.prompt, id(task.images)): task for task in tasks}

    def __call__(self, prompts, seed=0, images=None, width=256, height=256, **options):
        self.options.append(options)
        rng, drawn = np.random.default_rng(seed), []
        for prompt, inputs in zip(prompts, images or [None] * len(prompts), strict=True):
            wanted = self.known[prompt, id(inputs)].request
            if isinstance(wanted, toy.Edit):
                wanted = wanted.after
            if self.deaf:
                wanted = toy.Scene((toy.Object("circle", "red", "large", "", ""),), None, "blue")
            drawn.append(Image.fromarray(toy.draw(wanted, width, height, rng)))
        return drawn


def rows_of(part: str, count: int = 15, edits: int = 20, spec: ModelSpec = SPEC) -> list[score.Row]:
    scenes = score.first(toy.scenes(score.SCENES, held=True, complete=True), count)
    return list(score.PARTS[part](SimpleNamespace(spec=spec), scenes, scenes[:10], edits, 0))


@pytest.fixture(scope="module", params=["text", "edits", "modes"])
def rows(request) -> list[score.Row]:
    return rows_of(request.param)


@pytest.mark.parametrize("deaf", [False, True])
def test_right_images_score_everything_and_wrong_ones_nearly_nothing(rows, deaf):
    """Each row's options reach the pipeline."""
    painter = Painter(deaf)
    for row in rows:
        painter.expect(row.tasks)
        images = score.generate(painter, row, 0)
        shares = row.score(images, [task.request for task in row.tasks])
        size = {"width", "height"}
        assert painter.options[-1] == {k: v for k, v in row.options.items() if k not in size}
        if deaf:
            assert shares["all"] <= 0.1 and shares.get("size", 0) < 0.6, (row.name, shares)
            continue
        if "left open" in row.name or "negative" in row.name:
            shares.pop("size")
        assert all(share == 1 for share in shares.values()), (row.name, shares)


@pytest.mark.parametrize("spec", [SPEC, SPEC1], ids=["flux.2", "flux.1"])
def test_models_support_the_options_of_their_rows(spec):
    parts = score.parts_of(spec)
    expected = ["text", "open", "edits", "modes", "quantised"]
    if spec is SPEC1:
        expected.remove("edits")
    assert parts == expected
    for row in [row for part in parts[:-1] for row in rows_of(part, 5, 5, spec)]:
        steps = checks.check_steps(spec, row.options.get("steps"))
        names = ("guidance", "negative_prompt", "true_cfg_scale")
        two_passes = checks.check_cfg(spec, *map(row.options.get, names), steps)
        assert two_passes or "negative_prompt" not in row.options
        for task in row.tasks:
            if task.images:
                request.check_images(spec, task.images)


def test_unsupported_part_lists_supported_parts(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["score.py", "--model", "flux.1-tiny", "--only", "text,edits"])
    with pytest.raises(SystemExit, match="2"):
        score.main()
    error = capsys.readouterr().err
    assert "--only: edits" in error and "text, open, modes, quantised" in error


def test_requests_are_held_out_of_training(rows):
    for row in rows:
        requests = [task.request for task in row.tasks]
        if row.name == "edits":
            results = [edit.after for edit in requests]
            requests = [
                toy.Scene(tuple(i.thing for i in r.items), None, r.background) for r in results
            ]
        held = [toy.held_out(scene) for scene in requests if isinstance(scene, toy.Scene)]
        if row.name == "combinations that it was trained on":
            assert not any(held)
        elif row.score is not score.not_large and "painting" not in row.name:
            assert all(held)


def test_edits_run_once_and_are_scored_by_their_number_of_images(monkeypatch):
    (row,) = rows_of("edits", edits=30)
    painter = Painter()
    painter.expect(row.tasks)
    monkeypatch.setattr(score, "PARTS", {"edits": lambda *_: [row]})
    every, one, two = score.rows(painter, ["edits"], 5, 30, 0)
    assert every[1] == 30 == one[1] + two[1] and one[1] > two[1] > 0
    assert len(painter.options) == 2
    assert every[2]["all"] == one[2]["all"] == two[2]["all"] == 1


def test_recoloured_thing_must_stay_at_its_place_in_the_image():
    """The caption does not name the place."""
    (row,) = [row for row in rows_of("modes") if "image to image" in row.name]
    for task in row.tasks:
        (item,) = task.request.after.items
        assert item.thing.colour in task.prompt
        assert task.request.before[0].items[0].thing.colour != item.thing.colour
        assert " at the " not in task.prompt and "center" not in task.prompt
        elsewhere = replace(item, x=0.26 if item.x > 0.4 else 0.74)
        moved = replace(task.request.after, items=(elsewhere,))
        image = toy.draw(moved, 256, 256, np.random.default_rng(0))
        assert not row.score([image], [task.request])["all"]


def test_not_large_needs_the_requested_thing():
    rng, scene = np.random.default_rng(0), toy.Scene((toy.Object("star", "red"),), None, "blue")
    things = [toy.Object("star", "red", size) for size in toy.SIZES]
    things.append(toy.Object("ring", "red", "small"))
    images = [toy.draw(toy.Layout((), "blue"), 256, 256, rng)]
    for thing in things:
        images.append(toy.draw(toy.Scene((thing,), None, "blue"), 256, 256, rng))
    assert [score.not_large([image], [scene])["size"] for image in images] == [0, 1, 1, 0, 0]


def test_mask_covers_one_thing_and_leaves_the_other():
    for row in rows_of("modes"):
        for task in row.tasks if "painting" in row.name else ():
            image, mask = np.asarray(task.images.images[0]), np.asarray(task.images.mask) > 0
            kept, covered = task.request.objects
            assert mask.mean() == 0.5
            for thing in (kept, covered):
                colour = np.array(toy.COLOURS[thing.colour])
                near = np.abs(image.astype(int) - colour).max(-1) < 8
                assert near[~mask].any() or thing is covered, task.prompt
                assert thing.colour == "gray" or not near[mask].any()  # an empty canvas is gray


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Run scripts/toy/draw.py in a new folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["draw.py", *words])
        script("toy/draw").main()

    return run


@pytest.mark.parametrize("flag", ["--images", "--pictures"])
def test_draw_writes_captioned_images(draw, tmp_path, flag):
    draw("framed", "--framed", flag, "3")
    for number in range(3):
        image = np.asarray(Image.open(tmp_path / "framed" / f"{number:04d}.png"))
        caption = (tmp_path / "framed" / f"{number:04d}.txt").read_text()
        wood, _ = toy.drawing.FRAME
        assert image.shape == (256, 256, 3)
        assert (image[:8] == wood).all() and (image[:, -8:] == wood).all()
        assert not toy.unknown_words(caption)


def test_draw_writes_edits_with_metadata(draw, tmp_path, capsys):
    draw("edits", "--edits", "--images", "3")
    lines = (tmp_path / "edits" / "metadata.jsonl").read_text().splitlines()
    assert len(lines) == 3
    for line in map(json.loads, lines):
        for name in (line["image"], *line["references"]):
            assert (tmp_path / "edits" / name).is_file()
    with pytest.raises(SystemExit, match="2"):
        draw("edits")
    assert "must be new or empty" in capsys.readouterr().err
