"""scripts/sample.py --preview: a file that shows the image so far, and nothing else changes."""

import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from support.sample_run import PROMPT, pixels

pytestmark = pytest.mark.slow
RUN = (PROMPT, "--width", 64, "--height", 64, "--seed", 1, "--steps", 3, "--output", "a.png")


def test_preview_leaves_the_bytes_of_the_image_and_no_file(cli, monkeypatch):
    from modules.progress import Progress

    seen, update = [], Progress.update

    def watched(self, step, total):
        update(self, step, total)
        seen.append(self.path.is_file() and pixels(self.path))

    plain = cli(*RUN)
    expected = plain.images[0].read_bytes()
    plain.images[0].unlink()
    monkeypatch.setattr(Progress, "update", watched)
    run = cli(*RUN, "--preview", 2)
    assert run.code == 0 and "preview: a.preview.png\n" in run.err
    assert run.images[0].read_bytes() == expected and run.files == ["a.png"]
    assert seen[0] is False and seen[1] and seen[2] == seen[1]  # after step 2


def test_preview_of_a_killed_run_is_replaced_but_no_other_file(cli, tmp_path):
    from modules.progress import KEY

    other = tmp_path / "here" / "a.preview.png"
    Image.new("RGB", (64, 64)).save(other)
    cli(*RUN, "--preview", 1).fails_with("--preview: a.preview.png exists", "--output")
    info = PngInfo()
    info.add_text(KEY, "the image so far")
    Image.new("RGB", (64, 64)).save(other, pnginfo=info)
    run = cli(*RUN, "--preview", 1)
    assert run.code == 0 and run.files == ["a.png"]


def test_preview_goes_away_when_the_run_fails(cli, monkeypatch, sample_script):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(sample_script, "save_latents", fail)
    run = cli(*RUN, "--preview", 1, "--save-latents")
    assert run.code == 130 and "a.preview.png" not in run.files


@pytest.mark.parametrize(
    "flags, words",
    [
        (("--preview", 0), ("--preview", "from 1 to 1000")),
        (("--preview", 1, "--filter", "nsfw"), ("--preview", "--filter")),
    ],
)
def test_wrong_previews_are_refused(cli, flags, words):
    cli(*RUN, *flags).fails_with(*words)
