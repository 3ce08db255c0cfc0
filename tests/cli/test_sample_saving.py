"""scripts/sample.py saves an image while it makes the next: the same files, messages, errors."""

from pathlib import Path
from threading import Event

import pytest
from PIL import Image
from support.sample_run import PROMPT, QUICK, pixels

from flux.image_io import output
from flux.image_io.output import read_metadata
from flux.pipeline import Pipeline

pytestmark = pytest.mark.slow
THREE = (PROMPT, *QUICK, "--seed", 5, "--num-images", 3)


@pytest.fixture
def second_image(monkeypatch) -> Event:
    """An event that is set when the second image is begun."""
    begun, calls, sample = Event(), [], Pipeline.sample

    def noted(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            begun.set()
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "sample", noted)
    return begun


def test_image_is_saved_while_the_next_is_made(cli, monkeypatch, second_image):
    save, waited = output.save, []

    def late(image, path, metadata, *arguments, **options):
        if metadata["seed"] == 5:
            waited.append(second_image.wait(30))
        return save(image, path, metadata, *arguments, **options)

    monkeypatch.setattr(output, "save", late)
    run = cli(*THREE, "--output", "a.png", "--save-latents")
    assert run.code == 0 and waited == [True]
    told = [f"latents: a{n}.safetensors\nseed {s}:" for n, s in (("", 5), ("-2", 6), ("-3", 7))]
    places = [run.err.index(text) for text in told]
    assert places == sorted(places) and run.out == "a.png\na-2.png\na-3.png\n"
    for seed, path in zip((5, 6, 7), run.images, strict=True):
        (alone,) = cli(PROMPT, *QUICK, "--seed", seed, "--output", f"b{seed}.png").images
        assert read_metadata(path)["seed"] == seed and pixels(path) == pixels(alone)


def test_files_are_those_of_single_runs_to_the_byte(cli):
    """But for the highest seed of the run, which is no part of the metadata."""
    together = cli(*THREE, "--output", "a.jpg")
    alone = [cli(PROMPT, *QUICK, "--seed", seed, "--output", f"b{seed}.jpg") for seed in (5, 6, 7)]
    for path, run in zip(together.images, alone, strict=True):
        assert path.read_bytes() == run.images[0].read_bytes()


def test_full_disk_is_told_while_the_next_image_is_made(cli, monkeypatch, second_image):
    def fail(self, file, **options):
        file.write(b"half")
        assert second_image.wait(30)
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    cli(*THREE).fails_with("outputs/flux.png", "No space left on device", code=1)


@pytest.mark.parametrize(
    "error, code, words", [(KeyboardInterrupt(), 130, "stopped"), (MemoryError(), 1, "memory")]
)
def test_finished_image_is_kept_and_told_when_the_next_one_fails(
    cli, monkeypatch, error, code, words
):
    calls, sample = [], Pipeline.sample

    def fail_twice(self, *arguments, **options):
        calls.append(1)
        if len(calls) == 2:
            raise error
        return sample(self, *arguments, **options)

    monkeypatch.setattr(Pipeline, "sample", fail_twice)
    run = cli(*THREE, "--output", "a.png")
    assert run.code == code and run.out == "a.png\n" and run.files == ["a.png"]
    assert run.err.index("seed 5: ") < run.err.index("error: ") and words in run.err
    assert pixels(Path("a.png"))
