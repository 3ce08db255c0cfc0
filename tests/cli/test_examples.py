"""scripts/examples/: each is short, runs on a toy, and writes only where it is told to."""

import re
import runpy
import sys
from pathlib import Path

import pytest
from PIL import Image

FOLDER = Path(__file__).resolve().parents[2] / "scripts/examples"
EXAMPLES = {  # name -> flags, and what it prints
    "attention_map": (["--steps", 2], r"20 maps; the most attention to 'star' is in row \d+, col"),
    "controlnet": (["--steps", 1], r"the residuals moved the latents by 0\.[0-9]*[1-9]"),
    "flow_edit": (["--steps", 4], r"the latents moved by \d"),
    "gradient_guidance": (["--steps", 2], r"loss of the predicted image: \d"),
    "ip_adapter": (["--steps", 1], r"the adapter moved the latents by 0\.[0-9]*[1-9]"),
    "new_block": (
        ["--steps", 1, "--seconds", 0.1, "--scenes", 9],
        r"(?s)softmax: loss \d.*linear, untrained: loss \d.*linear, trained: loss \d",
    ),
    "own_text_encoder": (["--steps", 1], "encoded 'ein kleiner roter Stern auf blauem Grund'"),
    "regional_prompts": (["--steps", 1], r"the mask moved the latents by 0\.[0-9]*[1-9]"),
    "rf_inversion": (["--steps", 3], r"inverted to a standard deviation of \d"),
    "solvers_by_steps": (["--truth", 8, "--most", 6], r"(?s)euler .*heun .*midpoint .*res_2m "),
    "steering_vector": (["--steps", 2], "2 steps were steered; the latents moved by 0."),
    "step_caches": (["--steps", 3], r"(?s)first block \| 0.0 \| 0 .*TeaCache \| 0.0 \| 0 \|"),
}
WITHOUT_IMAGE = {"solvers_by_steps", "step_caches"}


@pytest.mark.slow
@pytest.mark.parametrize("name", EXAMPLES)
def test_example_runs_on_a_toy(name, tmp_path, monkeypatch, capsys):
    flags, printed = EXAMPLES[name]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [str(FOLDER), *sys.path])
    output = [] if name in WITHOUT_IMAGE else ["--output", "made.png"]
    monkeypatch.setattr(sys, "argv", [name, *map(str, flags), *output])
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    monkeypatch.delitem(sys.modules, "example", raising=False)
    runpy.run_path(str(FOLDER / f"{name}.py"), run_name="__main__")
    assert re.search(printed, capsys.readouterr().out)
    assert [path.name for path in tmp_path.iterdir()] == (["made.png"] if output else [])
    if output:
        with Image.open("made.png") as image:
            assert image.size[0] % image.size[1] == 0 and image.size[0] > image.size[1]


def test_examples_are_short_and_listed():
    names = {path.stem for path in FOLDER.glob("*.py")} - {"example"}
    assert names == EXAMPLES.keys() | {"ray_data"}  # which test_ray_data.py runs
    readme = (FOLDER / "README.md").read_text(encoding="utf-8")
    for name in names:
        assert len((FOLDER / f"{name}.py").read_text(encoding="utf-8").splitlines()) <= 60
        assert f"{name}.py" in readme
    for figure in FOLDER.glob("*.png"):
        assert figure.stat().st_size < 150_000 and figure.name in readme
