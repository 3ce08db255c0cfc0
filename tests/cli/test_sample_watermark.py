"""scripts/sample.py --watermark: the mark of a run, and what scripts/verify.py says of it."""

import sys

import pytest
from PIL import Image, PngImagePlugin
from support.load_script import script
from support.sample_run import PROMPT, image_of, pixels

from flux.image_io.output import read_metadata
from flux.safety import marking

pytestmark = pytest.mark.slow
RUN = (PROMPT, "--width", 256, "--height", 256, "--steps", 1, "--seed", 1, "--output", "a.png")


@pytest.fixture
def verify(monkeypatch, capsys):
    """Run scripts/verify.py: arguments -> (exit code, stdout)."""
    module = script("verify")

    def run(*arguments) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, arguments)])
        return module.main(), capsys.readouterr().out

    return run


def save_with_record(image: Image.Image, path, record: str) -> None:
    info = PngImagePlugin.PngInfo()
    info.add_itxt("flux", record)
    image.save(path, pnginfo=info)


def test_mark_names_the_record_and_is_made_again(cli, verify):
    path = image_of(cli(*RUN, "--watermark", "tile"))
    record = read_metadata(path)
    assert record["watermark"] == "tile"
    code, out = verify(path)
    assert code == 0 and f"watermark: holds: tile {marking.payload_of(record):012x}\n" in out
    again = image_of(cli("--from-image", path, "--output", "b.png"))
    assert pixels(again) == pixels(path) and read_metadata(again) == record
    unmarked = image_of(cli(*RUN, "--output", "c.png"))
    assert pixels(unmarked) != pixels(path) and "watermark" not in read_metadata(unmarked)
    with Image.open(path) as image:
        text = image.info["flux"]
        image.convert("RGB").save("d.jpg", quality=75)
        save_with_record(image.convert("RGB"), "other.png", text.replace('"seed": 1', '"seed": 2'))
    code, out = verify("d.jpg")
    assert code == 0 and out.startswith("d.jpg: watermark: holds: tile")
    code, out = verify("other.png")
    assert code == 1 and "is that of another record" in out
    with Image.open(unmarked) as image:
        save_with_record(image.convert("RGB"), "e.png", text)
    code, out = verify("e.png")
    assert code == 1 and "the pixels carry no such mark" in out


def test_mark_without_a_record(cli, verify):
    path = image_of(cli(*RUN, "--watermark", "tile", "--no-metadata"))
    code, out = verify(path)
    assert code == 0 and ": record: " not in out and "watermark: holds: tile" in out


def test_marks_of_bfl_are_told_where_they_cannot_be_read(cli, verify):
    run = cli(*RUN, "--watermark", "bfl")
    path = image_of(run)
    assert "JPEG and WebP often erase" not in run.err
    assert "JPEG and WebP often erase" in cli(*RUN, "--watermark", "bfl", "--output", "a.jpg").err
    code, out = verify(path)
    readable = "BFL's watermark cannot be read back" not in run.err
    assert code == (0 if readable else 1) and "watermark: " in out


def test_image_that_is_too_small_is_refused_before_any_work(cli):
    for kind in marking.KINDS:
        run = cli(*RUN, "--width", 240, "--watermark", kind)
        run.fails_with("--watermark: an image of 240x256 is too small")
        assert run.err.count("\n") == 1
