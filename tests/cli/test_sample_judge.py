"""scripts/sample.py --filter judge: every way by which a prompt or an image gets into a run.

Where the scores matter, the judge is a tiny random model, and the oracle transformers' generate.
"""

import io
import json
import sys

import pytest
from PIL import Image
from safetensors.torch import load_file, save_file
from support.chat_server import chat_reply
from support.judges import KINDS, probability, save_judge
from support.sample_run import image_of

import flux
from flux.image_io.output import read_metadata
from flux.safety import judge
from flux.safety.verdict import Verdict

pytestmark = pytest.mark.slow
GOOD, BAD = "a red circle on a blue background", "a forbidden blue star"
RUN = ("--width", 64, "--height", 64, "--steps", 1, "--seed", 1, "--output", "a.png")
JUDGED = ("--filter", "judge")
FLUX3 = ("--model", "flux.3-image-klein")


class Stub:
    """Refuses prompts with the word "forbidden", and images whose first pixel is of one gray."""

    def __init__(self):
        self.texts = []

    def judge_text(self, text):
        self.texts.append(text)
        return Verdict("judge", 0.9 if "forbidden" in text else 0.1, 0.5)

    def judge(self, image):
        gray = image.convert("RGB").getpixel((0, 0)) == (77, 77, 77)
        return Verdict("judge", 0.8 if gray else 0.1, 0.5)


@pytest.fixture
def stub(monkeypatch):
    stub = Stub()
    monkeypatch.setattr("flux.safety.filters.load_judge", lambda *_: stub)
    return stub


@pytest.fixture
def no_model(monkeypatch):
    """Fail if a run begins to load a model."""
    monkeypatch.setattr(flux, "load", lambda *_, **__: pytest.fail("the model was loaded"))


@pytest.mark.parametrize(
    "given",
    [
        (BAD,),
        ("--prompt", BAD),
        ("--prompt-file", "prompts.txt"),
        ("--prompt-file", "-"),
        (GOOD, "--negative-prompt", BAD, "--guidance", 2),
        ("--from-image", "made.png"),
        ("--latents", "made.safetensors"),
        (GOOD, "--image", "gray.png"),
        (GOOD, "--image", "blue.png", "--image", "gray.png"),
        (GOOD, "--image", "blue.png", "--mask", "gray.png"),
        (GOOD, "--image", "gray.png", "--strength", 0.5),
        (BAD, "--upsample", "http://127.0.0.1:1", "--upsample-model", "m"),
        ("a <cat>", *FLUX3, "--box", "cat:0,0,0.5,0.5:a forbidden cat"),
        ("a cat", *FLUX3, "--box", "cat:0,0,0.5,0.5:a forbidden cat"),  # not cited
        ("a <forbidden>", *FLUX3, "--box", "forbidden:0,0,0.5,0.5"),
        ("a <cat>", *FLUX3, "--boxes", "boxes.json"),
        ('a <a> [{"id": "a", "bbox": [0, 0, 9, 9], "desc": "forbidden"}]', *FLUX3),
    ],
    ids=lambda given: " ".join(map(str, given)),
)
def test_refused_before_the_model_loads(cli, stub, given, monkeypatch):
    Image.new("L", (64, 64), 77).save("gray.png")
    Image.new("RGB", (64, 64), "blue").save("blue.png")
    with open("prompts.txt", "w") as file:
        file.write(f"{BAD}\n")
    with open("boxes.json", "w") as file:
        json.dump([{"id": "cat", "bbox": [0, 0, 0.5, 0.5], "desc": "a forbidden cat"}], file)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(f"{BAD}\n".encode())))
    if "made" in str(given):
        cli(BAD, *RUN, "--output", "made.png", "--save-latents")
    with monkeypatch.context() as patch:
        patch.setattr(flux, "load", lambda *_, **__: pytest.fail("the model was loaded"))
        run = cli(*given, *RUN, *JUDGED)
    assert run.code == 3 and run.out == "" and "a.png" not in run.files, run.err
    (told,) = [line for line in run.err.splitlines() if line.startswith("refused: ")]
    assert "by judge 0." in told and "(refused from 0.5 on)" in told


def test_other_prompts_go_on_with_their_own_seeds(cli, stub):
    run = cli(GOOD, BAD, GOOD + " now", *RUN, "--num-images", 2, *JUDGED)
    assert run.code == 3 and run.err.count("refused: prompt, by judge 0.900") == 1
    assert [read_metadata(path)["seed"] for path in run.images] == [1, 2, 5, 6]
    assert len(run.files) == 4 and all(read_metadata(p)["prompt"] != BAD for p in run.images)
    assert sorted(set(stub.texts)) == sorted(stub.texts)  # each is judged once


def test_expanded_prompt_is_judged_and_a_refused_one_is_sent_nowhere(cli, stub, server):
    server.reply = 200, {}, chat_reply(BAD)
    upsampled = ("--upsample", server.url, "--upsample-model", "m", *JUDGED)
    run = cli(GOOD, *RUN, *upsampled)
    assert (
        run.code == 3
        and run.files == []
        and f"by judge 0.900 (refused from 0.5 on): {BAD}" in run.err
    )
    assert len(server.requests) == 1
    assert cli(BAD, *RUN, *upsampled).code == 3 and len(server.requests) == 1


def test_start_from_latents_is_judged_as_the_image_it_is(cli, stub, monkeypatch):
    path = image_of(cli(GOOD, *RUN, "--save-latents", "--output", "made.png"))
    latents = path.with_suffix(".safetensors")
    start = (GOOD, *RUN, "--latents", latents, "--strength", 0.5, *JUDGED)
    assert cli(*start).code == 0
    monkeypatch.setattr(stub, "judge", lambda image: Verdict("judge", 0.8, 0.5))
    run = cli(*start)
    assert run.code == 3 and "refused: image 1, by judge 0.800" in run.err
    assert run.out == ""


def test_foreign_latents_without_texts_are_judged_by_their_image(cli, stub, monkeypatch):
    path = image_of(cli(GOOD, *RUN, "--save-latents", "--output", "made.png"))
    tensors = load_file(path.with_suffix(".safetensors"))
    record = json.dumps({"model": "flux.2-tiny", "prompt": 5, "upsampled_from": BAD})
    save_file(tensors, "foreign.safetensors", {"flux": record})
    run = cli("--latents", "foreign.safetensors", "--output", "b.png", *JUDGED)
    assert run.code == 3 and "refused: prompt" in run.err and "b.png" not in run.files


def test_prompt_that_would_steer_a_terminal_is_shown_escaped(cli, stub, no_model):
    run = cli("forbidden \x1b[2J\u202e", *RUN, *JUDGED)
    assert run.code == 3 and "\x1b" not in run.err and "\u202e" not in run.err
    assert run.err.count("\n") == 1


def test_judge_that_is_not_there_stops_the_run(cli, tmp_path, no_model):
    for kind in ("judge", "all"):
        cli(GOOD, *RUN, "--filter", kind).fails_with("--filter-weights: ", "there")
    empty = tmp_path / "empty"
    empty.mkdir()
    cli(GOOD, *RUN, *JUDGED, "--filter-weights", empty).fails_with("no judge is there")
    cli(GOOD, *RUN, "--judge-device", "cpu").fails_with("--judge-device: has no effect")
    nsfw = ("--filter", "nsfw", "--judge-device", "cpu")
    cli(GOOD, *RUN, *nsfw).fails_with("--judge-device: has no effect without --filter judge")
    cli(GOOD, *RUN, *JUDGED, "--judge-device", "gpu9").fails_with("gpu9")


@pytest.mark.parametrize("kind", KINDS)
def test_scores_of_a_run_equal_transformers(cli, tmp_path, kind):
    """Of prompts, as they are told; of results, in the JSON for a review, to the bit."""
    (folder := tmp_path / "judge").mkdir()
    save_judge(folder, kind)
    prompts = [
        f"a {size} {colour} star" for size in ("small", "large") for colour in ("red", "blue")
    ]
    texts = [(judge.OF_TEXT + prompt + judge.AFTER_TEXT, None, "") for prompt in prompts]
    scores = {prompt: probability(folder, *text) for prompt, text in zip(prompts, texts)}
    assert len(set(scores.values())) == 4
    run = cli(*prompts, *RUN, *JUDGED, "--filter-weights", folder, "--review", "aside")
    refused = [prompt for prompt, score in scores.items() if score >= 0.5]
    for prompt, score in scores.items():
        line = f"refused: prompt, by judge {score:.3f} (refused from 0.5 on): {prompt}"
        assert (line in run.err.splitlines()) == (prompt in refused)
    made = [*run.images, *(run.folder / "aside").glob("*.png")] if refused != prompts else []
    assert len(made) == len(prompts) - len(refused)
    for path in made:
        with Image.open(path) as image:
            score = probability(folder, judge.OF_IMAGE, image.convert("RGB"), judge.AFTER_IMAGE)
        assert (score >= 0.5) == (path.parent.name == "aside")
        if score >= 0.5:
            (verdict,) = json.loads(path.with_suffix(".json").read_text())["verdicts"]
            assert verdict["score"] == score and verdict["filter"] == "judge"
    assert run.code == (3 if "refused" in run.err else 0)
