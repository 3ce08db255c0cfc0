"""scripts/examples/ray_data.py: actors make the images of a manifest, as scripts/batch.py does."""

import json
import os
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from flux.batch.manifest import Manifest
from flux.batch.records import Records
from flux.batch.worker import Worker

ROOT = Path(__file__).resolve().parents[2]
EXAMPLE = ROOT / "scripts/examples/ray_data.py"


class StandIn:
    """What the example uses of a dataset, in this process."""

    def __init__(self, rows: list):
        self.rows = rows

    def map_batches(self, actor: type, batch_size: int, compute: int, num_gpus: int):
        assert batch_size == 1
        actors = [actor() for _ in range(compute)]
        calls = [actors[row % compute]({"item": np.array([row])}) for row in self.rows]
        return StandIn([{"worked": value} for made in calls for value in made["worked"]])

    def iter_rows(self):
        return iter(self.rows)


DATA = SimpleNamespace(from_items=StandIn, ActorPoolStrategy=lambda size: size)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Return a folder with a manifest of two blocks, of which few lines are open."""
    lines = [{"prompt": f"a star {n}", "width": 64, "height": 64, "steps": 1} for n in range(66)]
    (tmp_path / "m.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    records = Records(tmp_path / "out", Manifest(tmp_path / "m.jsonl"), {})
    for line in {*range(66)} - {5, 64, 65}:
        records.append({"line": line, "refused": "before"})
    monkeypatch.chdir(tmp_path)
    return tmp_path


COMMAND = ["--manifest", "m.jsonl", "--out", "out", "--actors", "2"]
SAID = ("2 of 2 blocks were worked on", "3 images, 0 wrong lines, 0 images left")


def check_images(folder: Path) -> None:
    import torch

    import flux

    some = Manifest(folder / "m.jsonl")
    records = Records(folder / "alone", some, {})
    for line in {*range(66)} - {5, 64, 65}:
        records.append({"line": line, "refused": "before"})
    torch.set_flush_denormal(True)
    Worker(flux.load(device="cpu"), some, records).run()
    torch.set_flush_denormal(False)
    images = sorted((folder / "alone").glob("0*/*.png"))
    assert [int(image.stem) for image in images] == [5, 64, 65]
    for image in images:
        other = folder / "out" / image.relative_to(folder / "alone")
        assert other.read_bytes() == image.read_bytes()


def test_actors_make_the_images_of_a_manifest(folder, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "ray", SimpleNamespace(data=DATA))
    monkeypatch.setattr(sys, "path", [str(EXAMPLE.parent), *sys.path])
    monkeypatch.setattr(sys, "argv", ["ray_data.py", *COMMAND])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delitem(sys.modules, "example", raising=False)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    runpy.run_path(str(EXAMPLE), run_name="__main__")
    said = capsys.readouterr().out
    assert all(text in said for text in SAID)
    check_images(folder)


@pytest.mark.slow
def test_ray_makes_the_images_of_a_manifest(folder):
    """With ray itself, where it is installed: it is too large to be an extra of the tests."""
    pytest.importorskip("ray.data")
    environment = os.environ | {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, str(EXAMPLE), *COMMAND]
    run = subprocess.run(command, capture_output=True, text=True, cwd=folder, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert all(text in run.stdout for text in SAID)
    check_images(folder)
