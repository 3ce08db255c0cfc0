"""What tests of scripts/sample.py share: the result of a run, quick arguments, pixels of files."""

import hashlib
import os
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from flux.configs import EMBEDDED, MODELS

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sample.py"
PROMPT = "a small red circle above a large blue ring on a white background"
QUICK = ("--width", "64", "--height", "64", "--steps", "1")
SPEC = MODELS["flux.2-tiny"]
TOY = EMBEDDED / SPEC.name / SPEC.transformer_file


class Run(NamedTuple):
    """The result of one run in a folder, which had these files before."""

    code: int
    out: str
    err: str
    folder: Path
    files_before: tuple[str, ...] = ()

    @property
    def images(self) -> list[Path]:
        """Return the images that the run printed."""
        return [self.folder / line for line in self.out.splitlines()]

    @property
    def files(self) -> list[str]:
        return files_in(self.folder)

    def fails_with(self, *words: str, code: int = 2) -> None:
        """Assert this exit code, one line `error: ...` with these words, and nothing written."""
        assert self.code == code, self.err
        assert self.err.count("error: ") == 1 and "Traceback" not in self.err, self.err
        last = self.err.rstrip("\n").splitlines()[-1]
        assert last.startswith("error: "), self.err
        assert [word for word in words if word not in last] == [], last
        assert self.out == "" and self.files == list(self.files_before)


def files_in(folder: Path) -> list[str]:
    paths = [path for path in folder.rglob("*") if path.is_file()]
    return sorted(path.relative_to(folder).as_posix() for path in paths)


def image_of(run: Run) -> Path:
    """Return the one image that a run made."""
    assert run.code == 0, run.err
    (path,) = run.images
    return path


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def subprocess_environment(home: Path) -> dict[str, str]:
    """Return an environment without weights, network and GPU."""
    ours = ("FLUX_WEIGHTS", "HF_HUB_CACHE", "PYTHONPATH")
    environment = {name: value for name, value in os.environ.items() if name not in ours}
    return environment | dict(
        HF_HUB_OFFLINE="1", HF_HOME=str(home), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )
