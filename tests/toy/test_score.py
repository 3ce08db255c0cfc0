"""scripts/toy/score.py, draw.py and sheets.py, with a model that draws whatever it is asked, or never listens: no network runs."""

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
from flux.runtime import checks as options

score = script("toy/score")
SPEC, SPEC1 = MODELS["flux.2-tiny"], MODELS["flux.1-tiny"]


class Painter:
    """In the place of a pipeline: knows what each prompt means, and draws it; or else one scene, whatever the prompt."""

    spec = SPEC

    def __init__(self, deaf: bool = False):
        self.deaf, self.known, self.asked = deaf, {}, []

    def expect(self, tasks):
        self.known |= {(task.prompt, id(task.images)): task for task in tasks}

    def __call__(self, prompts, seed=0, images=None, width=256, height=256, **options):
        self.asked.append(options)
        rng, made = np.random.default_rng(seed), []
        for prompt, given in zip(prompts, images or [None] * len(prompts), strict=True):
            task = self.known[prompt, id(given)]
            what = task.asked.after if isinstance(task.asked, toy.Edit) else task.asked
            if self.deaf:
                what = toy.Scene((toy.Object("circle", "red", "large", "", ""),), None, "blue")
            made.append(Image.fromarray(toy.draw(what, width, height, rng)))
        return made


def rows_of(part: str, count: int = 25, edits: int = 30, spec: ModelSpec = SPEC) -> list[score.Row]:
    scenes = score.first(toy.scenes(score.SCENES, held=True, complete=True), count)
    return list(score.PARTS[part](SimpleNamespace(spec=spec), scenes, scenes[:15], edits, 0))


@pytest.fixture(scope="module", params=["text", "edits", "modes"])
def rows(request) -> list[score.Row]:
    return rows_of(request.param)


def test_who_draws_what_is_asked_scores_everything(rows):
    painter = Painter()
    for row in rows:
        painter.expect(row.tasks)
        shares = row.score(score.made(painter, row, 0), [task.asked for task in row.tasks])
        open_ = {"size"} if "left open" in row.name or "negative" in row.name else set()
        assert all(share == 1 for name, share in shares.items() if name not in open_), (
            row.name,
            shares,
        )


def test_who_does_not_listen_scores_next_to_nothing(rows):
    painter = Painter(deaf=True)
    for row in rows:
        painter.expect(row.tasks)
        shares = row.score(score.made(painter, row, 0), [task.asked for task in row.tasks])
        assert shares["all"] <= 0.1, (row.name, shares)
        assert shares.get("size", 0) < 0.6


def test_each_row_passes_its_options_on(rows):
    painter = Painter()
    for row in rows:
        painter.expect(row.tasks)
        score.made(painter, row, 0)
        assert painter.asked[-1] == {
            k: v for k, v in row.options.items() if k not in ("width", "height")
        }


@pytest.mark.parametrize("spec", [SPEC, SPEC1], ids=["flux.2", "flux.1"])
def test_the_model_takes_what_its_rows_ask_for(spec):
    parts = score.parts_of(spec)
    assert parts == [
        part for part in ("text", "edits", "modes", "quantised") if part != "edits" or spec is SPEC
    ]
    for row in [row for part in parts[:-1] for row in rows_of(part, 5, 5, spec)]:
        steps = options.check_steps(spec, row.options.get("steps"))
        two = options.check_cfg(
            spec, *map(row.options.get, ("guidance", "negative_prompt", "true_cfg_scale")), steps
        )
        assert two or "negative_prompt" not in row.options
        for task in row.tasks:
            if task.images:
                request.check_images(spec, task.images)


def test_a_model_without_references_is_not_asked_for_edits(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["score.py", "--model", "flux.1-tiny", "--only", "text,edits"])
    with pytest.raises(SystemExit, match="2"):
        score.main()
    assert "--only edits: choose from text, modes, quantised" in capsys.readouterr().err


def test_what_is_asked_for_is_held_out_of_training(rows):
    for row in rows:
        asked = [task.asked for task in row.tasks]
        if row.name == "edits":
            asked = [
                toy.Scene(tuple(i.thing for i in edit.after.items), None, edit.after.background)
                for edit in asked
            ]
        held = [toy.held_out(scene) for scene in asked if isinstance(scene, toy.Scene)]
        if row.name == "combinations that it was trained on":
            assert not any(held)
        elif row.score is not score.not_large and "painting" not in row.name:
            assert all(held)


def test_edits_are_made_once_and_scored_by_the_number_of_their_images(monkeypatch):
    (row,) = rows_of("edits")
    painter = Painter()
    painter.expect(row.tasks)
    monkeypatch.setattr(score, "PARTS", {"edits": lambda *_: [row]})
    every, one, two = score.rows(painter, ["edits"], 5, 30, 0)
    assert every[1] == 30 == one[1] + two[1] and one[1] > two[1] > 0
    assert len(painter.asked) == 2 and every[2]["all"] == one[2]["all"] == two[2]["all"] == 1


def test_a_changed_colour_is_where_only_the_image_tells():
    (row,) = [row for row in rows_of("modes") if "image to image" in row.name]
    for task in row.tasks:
        (item,) = task.asked.after.items
        assert (
            item.thing.colour in task.prompt
            and task.asked.before[0].items[0].thing.colour != item.thing.colour
        )
        assert " at the " not in task.prompt and "center" not in task.prompt
        elsewhere = replace(item, x=0.26 if item.x > 0.4 else 0.74)
        image = toy.draw(
            replace(task.asked.after, items=(elsewhere,)), 256, 256, np.random.default_rng(0)
        )
        assert not row.score([image], [task.asked])["all"]


def test_nothing_is_not_a_small_thing():
    """Not large is what is seen as the thing that was asked for, of another size."""
    rng, scene = (np.random.default_rng(0), toy.Scene((toy.Object("star", "red"),), None, "blue"))
    empty = toy.draw(toy.Layout((), "blue"), 256, 256, rng)
    others = [toy.Object("star", "red", size) for size in toy.SIZES] + [
        toy.Object("ring", "red", "small")
    ]
    images = [
        empty,
        *(toy.draw(toy.Scene((thing,), None, "blue"), 256, 256, rng) for thing in others),
    ]
    assert [score.not_large([image], [scene])["size"] for image in images] == [0, 1, 1, 0, 0]


def test_what_a_mask_covers_is_gone_from_the_image_and_the_rest_is_as_asked():
    for row in rows_of("modes"):
        for task in row.tasks if "painting" in row.name else ():
            image, mask = np.asarray(task.images.images[0]), np.asarray(task.images.mask) > 0
            kept, gone = task.asked.objects
            colours = [np.array(toy.COLOURS[thing.colour]) for thing in (kept, gone)]
            near = [np.abs(image.astype(int) - colour).max(-1) < 8 for colour in colours]
            assert mask.mean() == 0.5 and near[0][~mask].any(), task.prompt
            for thing, there in zip((kept, gone), near, strict=True):  # an empty canvas is gray
                assert thing.colour == "gray" or not there[mask].any(), task.prompt


@pytest.fixture
def draw(tmp_path, monkeypatch):
    """Runs scripts/toy/draw.py in a new folder."""
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> None:
        monkeypatch.setattr("sys.argv", ["draw.py", *words])
        script("toy/draw").main()

    return run


def test_draw_writes_captioned_images_and_edits(draw, tmp_path, capsys):
    draw("framed", "--framed", "--images", "3")
    for number in range(3):
        image = np.asarray(Image.open(tmp_path / "framed" / f"{number:04d}.png"))
        (colour, _), text = (
            toy.drawing.FRAME,
            (tmp_path / "framed" / f"{number:04d}.txt").read_text(),
        )
        assert (
            image.shape == (256, 256, 3)
            and (image[:8] == colour).all()
            and (image[:, -8:] == colour).all()
        )
        assert not toy.unknown_words(text)
    draw("edits", "--edits", "--images", "3")
    lines = [
        json.loads(line)
        for line in (tmp_path / "edits" / "metadata.jsonl").read_text().splitlines()
    ]
    names = [name for line in lines for name in (line["image"], *line["references"])]
    assert len(lines) == 3 and all((tmp_path / "edits" / name).is_file() for name in names)
    with pytest.raises(SystemExit, match="2"):
        draw("edits")
    assert "new or empty" in capsys.readouterr().err
