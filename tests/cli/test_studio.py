"""What the page of scripts/app.py does, without a browser: forms, jobs, records, the gallery."""

import os
import shlex
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from modules import studio as studios
from modules.studio import Studio, flags_of_form, form_of_record, gallery, keep, split_painting
from PIL import Image
from support.sample_run import PROMPT, pixels

from flux.errors import UserError
from flux.image_io import output
from flux.safety.filters import Filters
from flux.safety.verdict import Verdict

SMALL = {"prompt": PROMPT, "width": "64", "height": "64", "steps": "2", "seed": "1"}
HOSTILE = "--help\n</script><img src=x onerror=alert(1)> \u202e"


@pytest.fixture
def studio(tmp_path, monkeypatch, no_weights_here):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    made = Studio([], tmp_path)
    yield made
    torch.set_flush_denormal(False)


def run(job):
    """Run a job to its end; return all updates."""
    return list(job.updates())


# ------------------------------------------------------------------------------ forms


def test_flags_of_a_form_are_those_of_sample(studio, tmp_path):
    form = SMALL | {"prompt": HOSTILE, "guidance": " 2:1 ", "strength": "", "num_images": None}
    form |= {"keep_input_size": True, "lora": "a b.safetensors", "lora_scale": "0.5"}
    args = studio.parser.parse_args(flags_of_form(form, tmp_path))
    assert args.prompt == [HOSTILE.strip()] and args.guidance == [2.0, 1.0]
    assert (args.width, args.height, args.steps, args.seed, args.num_images) == (64, 64, 2, 1, 1)
    assert args.strength is None and args.keep_input_size
    assert args.lora == [(Path("a b.safetensors"), 0.5)]


def test_wrong_number_is_one_sentence(studio):
    last = run(studio.make(SMALL | {"seed": "many"}))[-1]
    assert last.code == 2 and not last.finished
    assert last.lines[-1] == "error: Seed: must be a whole number (got 'many')."


def test_paint_is_a_mask_of_the_images_size():
    background, layer = Image.new("RGBA", (80, 64), "red"), Image.new("RGBA", (80, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 40, 64))
    layer.paste((255, 255, 255, 90), (40, 0, 60, 64))  # the soft edge of a brush
    image, mask = split_painting({"background": background, "layers": [layer]})
    assert image is background and mask.mode == "L" and mask.size == (80, 64)
    assert mask.crop((0, 0, 40, 64)).getextrema() == (255, 255)
    assert mask.crop((40, 0, 80, 64)).getextrema() == (0, 0)
    assert split_painting({"background": background, "layers": []}) == (background, None)
    empty = Image.new("RGBA", (80, 64))  # what an editor without an image returns
    assert split_painting({"background": empty, "layers": [layer]}) == (None, None)
    assert split_painting(None) == (None, None)


def test_input_images_are_kept_once_under_the_hash_of_their_content(tmp_path):
    source = tmp_path / "cat of mine.PNG"
    Image.new("RGB", (64, 64), "red").save(source, "PNG")
    kept = keep(source, tmp_path)
    assert kept.parent == tmp_path / "inputs" and kept.read_bytes() == source.read_bytes()
    assert keep(source, tmp_path) == kept == keep(kept, tmp_path)
    painted = keep(Image.new("RGB", (64, 64), "red"), tmp_path)
    assert painted == keep(Image.new("RGB", (64, 64), "red"), tmp_path) != kept
    assert painted != keep(Image.new("RGB", (32, 128), "red"), tmp_path)
    assert len(list((tmp_path / "inputs").iterdir())) == 3


def test_upload_that_is_no_image_or_is_huge_is_one_sentence(tmp_path, monkeypatch):
    text = tmp_path / "secret-name.png"
    text.write_text("no image")
    with pytest.raises(UserError, match=r"^upload.png: is not an image"):
        keep(text, tmp_path)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    Image.new("RGB", (64, 64)).save(text)
    with pytest.raises(UserError, match=r"^upload.png: has more than"):
        keep(text, tmp_path)
    assert list((tmp_path / "inputs").iterdir()) == []


# ------------------------------------------------------------------------------ jobs


@pytest.mark.slow
def test_job_makes_what_sample_makes_with_previews_and_progress(studio, tmp_path, cli):
    plain = cli(PROMPT, "--width", 64, "--height", 64, "--steps", 2, "--seed", 1, "--num-images", 2)
    updates = run(studio.make(SMALL | {"num_images": "2"}))
    last = updates[-1]
    assert last.code == 0 and [path.name for path in last.finished] == ["flux.png", "flux-2.png"]
    expected = [path.read_bytes() for path in plain.images]
    assert [path.read_bytes() for path in last.finished] == expected
    shares = [update.share for update in updates]
    assert shares == sorted(shares) and shares[-1] == 1 and any(0 < x < 1 for x in shares)
    frames = [x.frame for x in updates if isinstance(x.frame, Image.Image)]
    assert frames and all(frame.size == (64, 64) for frame in frames)
    assert last.frame == last.finished[-1] and gallery(tmp_path)[0].name == "flux-2.png"
    command = shlex.split(last.lines[0])
    assert command[:3] == ["python", "scripts/sample.py", f"--prompt={PROMPT}"]
    # the model stays loaded, and a record gives the same bytes
    pipe = studio.pipe
    again = run(studio.make_again(last.finished[1]))[-1]
    assert again.code == 0 and studio.pipe is pipe
    assert again.finished[0].read_bytes() == expected[1]


@pytest.mark.slow
def test_refused_image_is_never_shown_and_the_filter_is_loaded_once(tmp_path, monkeypatch, studio):
    loads = []

    def load(kind, *_):
        loads.append(kind)
        return Filters(SimpleNamespace(judge=lambda image: Verdict("nsfw", 0.9, 0.85)))

    monkeypatch.setattr("flux.safety.filters.load_filters", load)
    studio = Studio(["--filter", "nsfw"], tmp_path)
    for _ in range(2):
        updates = run(studio.make(SMALL))
        assert [update.frame for update in updates] == [None] * len(updates)
        assert updates[-1].code == 3 and updates[-1].finished == () and gallery(tmp_path) == []
        assert updates[-1].lines[-1] == "error: a filter refused an image"
    assert loads == ["nsfw"]


@pytest.mark.slow
def test_record_fills_the_form_and_gives_the_image_again(studio, tmp_path):
    background, layer = Image.new("RGBA", (64, 64), "white"), Image.new("RGBA", (64, 64))
    layer.paste((255, 255, 255, 255), (0, 0, 32, 64))
    form = SMALL | {"editor": {"background": background, "layers": [layer]}, "strength": "1"}
    form["watermark"] = "tile"
    del form["width"], form["height"]
    first = run(studio.make(form | {"prompt": HOSTILE}))[-1]
    assert first.code == 2 or first.finished, first.lines  # a watermark needs a larger image
    form.pop("watermark")
    first = run(studio.make(form | {"prompt": HOSTILE}))[-1]
    assert first.code == 0, first.lines
    loaded = form_of_record(first.finished[0], tmp_path)
    assert loaded["prompt"] == HOSTILE.strip() and loaded["seed"] == "1"
    assert loaded["strength"] in ("1", "1.0") and loaded["mask"].is_file()
    assert [pixels(path) for path in loaded["images"]] == [background.convert("RGB").tobytes()]
    again = run(studio.make_again(first.finished[0]))[-1]
    assert again.finished[0].read_bytes() == first.finished[0].read_bytes()
    loaded["editor"] = None
    loaded["references"] = loaded["images"]
    same = run(studio.make(loaded))[-1]
    assert pixels(same.finished[0]) == pixels(first.finished[0])


@pytest.mark.slow
def test_cancel_keeps_finished_images_and_the_next_job_runs(studio):
    job, seen = studio.make(SMALL | {"num_images": "3"}), []
    for update in job.updates():
        seen.append(update)
        if update.finished:
            job.cancel()
    assert seen[-1].code == 130 and seen[-1].lines[-1] == f"error: {studios.STOPPED}"
    assert 1 <= len(seen[-1].finished) < 3
    assert all(path.is_file() for path in seen[-1].finished)
    closed = studio.make(SMALL | {"steps": "20"})
    updates = closed.updates()
    next(updates)
    updates.close()  # the page was closed
    assert not closed.thread.is_alive() and closed.code == 130
    assert run(studio.make(SMALL))[-1].code == 0


@pytest.mark.slow
def test_two_jobs_run_one_after_the_other(studio, monkeypatch):
    running, most, run_sample = [], [], studios.sample.run

    def watched(*arguments):
        running.append(1)
        most.append(len(running))
        try:
            return run_sample(*arguments)
        finally:
            running.pop()

    monkeypatch.setattr(studios.sample, "run", watched)
    jobs = [studio.make(SMALL), studio.make(SMALL | {"seed": "2"})]
    results = [[], []]
    threads = [
        threading.Thread(target=lambda k=k: results[k].extend(jobs[k].updates())) for k in (0, 1)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1, 1] and [x[-1].code for x in results] == [0, 0]
    assert len(gallery(studio.folder)) == 2


@pytest.mark.slow
def test_mistakes_of_a_page_are_one_sentence_in_its_words(studio, tmp_path):
    red = tmp_path / "red.png"
    Image.new("RGB", (64, 64), "red").save(red)
    gray = tmp_path / "gray.png"
    Image.new("L", (40, 90), 255).save(gray)
    foreign = tmp_path / "lora.safetensors"
    from safetensors.torch import save_file

    save_file({"double_blocks.0.img_attn.qkv.lora_A.weight": torch.zeros(4, 3072)}, foreign)
    cases = {
        "Width: must be a multiple of 16": SMALL | {"width": "100"},
        "Prompt: is empty": SMALL | {"prompt": " "},
        "Mask": SMALL | {"references": [str(red)], "mask": str(gray)},
        "lora.safetensors": SMALL | {"lora": str(foreign)},
    }
    for words, form in cases.items():
        last = run(studio.make(form))[-1]
        assert last.code == 2 and not last.finished, (words, last.lines)
        assert last.lines[-1].startswith("error: ") and words in last.lines[-1], last.lines
    assert run(studio.make(SMALL))[-1].code == 0  # and nothing of them stays


# ------------------------------------------------------------------------------ records


def test_image_without_a_record_is_one_sentence(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (64, 64)).save(path)
    with pytest.raises(UserError, match="is not an image with flux metadata"):
        form_of_record(path, tmp_path)


def test_record_names_no_file_outside_of_the_inputs(tmp_path):
    """Whoever made the image chose its record."""
    (tmp_path / "inputs").mkdir()
    (tmp_path / "secret.png").write_text("secret")
    os.symlink(tmp_path / "secret.png", tmp_path / "inputs" / "link.png")
    files = ["/etc/passwd", "../secret.png", str(tmp_path / "secret.png"), "link.png", 7, "inputs"]
    record = dict(prompt="a", seed=1, width=64, height=64, steps=2, guidance=[4, 1])
    record["images"] = [{"file": file, "sha256": ""} for file in files]
    record["mask"] = {"file": "/etc/passwd", "sha256": ""}
    path = output.save(Image.new("RGB", (64, 64)), tmp_path / "a.png", record)
    form = form_of_record(path, tmp_path)
    assert form["images"] == [] and form["mask"] is None
    assert form["guidance"] == "" and form["width"] == "64"


@pytest.mark.parametrize(
    "foreign",
    [
        dict(images=7, mask="x", image_options="x"),
        dict(image_options={"outpaint": ["a", {}], "strength": "b"}),
        dict(watermark=["tile"], negative_prompt=5, filter="none"),
        dict(watermark="mine", guidance={}, true_cfg_scale=[]),
    ],
    ids=repr,
)
def test_foreign_record_fills_fields_with_texts_alone(tmp_path, foreign):
    record = dict(prompt="a", seed=1, width=64, height=64, steps=2) | foreign
    form = form_of_record(
        output.save(Image.new("RGB", (64, 64)), tmp_path / "a.png", record), tmp_path
    )
    assert form.pop("images") == [] and form["num_images"] == "1"
    assert form["watermark"] is None and form["filter"] is None
    assert [x for x in form.values() if not isinstance(x, str | None)] == []


def test_gallery_has_the_newest_images_first_and_no_links(tmp_path):
    for age, name in enumerate(("b.png", "a.jpg", "c.txt", "a.preview.png", "d.webp")):
        (tmp_path / name).write_bytes(b"")
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    (tmp_path / "link.png").symlink_to("/etc/passwd")
    (tmp_path / "folder.png").mkdir()
    assert [path.name for path in gallery(tmp_path)] == ["b.png", "a.jpg", "d.webp"]
