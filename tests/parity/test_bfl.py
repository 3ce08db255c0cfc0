"""`--against bfl`: networks with BFL's module names, in a process of their own, against captures.

support/bfl_stand_in takes the place of a checkout: it has BFL's names and signatures, computes from
the equations, and shares no code with the project. flux/parity/README.md has the figures of BFL's
real code.
"""

import re
import shutil
from pathlib import Path

import pytest
import torch
from support.parity_requests import REQUESTS
from support.tiny_repositories import tiny_repositories

import flux
from flux.errors import UserError
from flux.parity.bfl import bfl, computed_by_bfl
from flux.parity.capture import capture
from flux.parity.compare import exit_code, first_over, missing

CHECKOUT = Path(__file__).parents[1] / "support/bfl_stand_in"
FLUX1, KLEIN = "flux.1-dev", "flux.2-klein-base-4b"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.filterwarnings("ignore:.* was distilled for", "ignore:.* was not trained with"),
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """name -> a float32 capture with two passes a step, and its pipeline."""
    out = tmp_path_factory.mktemp("captures")
    with tiny_repositories(tmp_path_factory.mktemp("weights"), REQUESTS) as folder:
        pipes = {
            name: flux.load(name, folder, "cpu", dtype=torch.float32, fast=False)
            for name in (FLUX1, KLEIN)
        }
        yield {
            name: (capture(pipe, REQUESTS[name], out / f"{name}.safetensors"), pipe)
            for name, pipe in pipes.items()
        }


@pytest.mark.parametrize("name", [FLUX1, KLEIN])
def test_every_module_of_a_checkout_is_compared(name, runs):
    """Both passes of both steps, and the schedule. Errors add up to 3e-6 over a pass."""
    taken, pipe = runs[name]
    rows = bfl(taken, pipe, CHECKOUT, tolerance=2e-5)
    assert exit_code(rows) == 0, first_over(rows)
    assert all(row.values for row in rows)
    names = {row.name for row in rows}
    required = computed_by_bfl(taken, pipe)
    assert "schedule" in required and missing(rows, required) == []
    assert exit_code(rows[:-1], missing(rows[:-1], required)) == 3
    layers = {n.rpartition(".")[0] for n in pipe.transformer().state_dict()}
    for place in ("step.001", "step.001/negative", "step.002", "step.002/negative"):
        wanted = {f"{place}/{layer}/{tap}" for layer in layers for tap in ("in", "out")}
        wanted |= {f"{place}/out", f"{place}/single_blocks.2/out", f"{place}/double_blocks.1/in.1"}
        for block in ("double_blocks.0", "single_blocks.1"):
            wanted |= {f"{place}/{block}/attention/{tap}" for tap in ("q", "k", "v", "out")}
        wanted |= {f"{place}/single_blocks.0.norm/in.1", f"{place}/double_blocks.1/out.0"}
        modulation = "double_stream_modulation_img"
        if name == FLUX1:
            modulation = "double_blocks.1.txt_mod"
        wanted |= {f"{place}/{modulation}/out.{number}" for number in range(6)}
        recorded = wanted & set(taken.names)
        assert len(recorded) > 0.9 * len(wanted) and recorded <= names


MISTAKES = {  # (right, wrong) in the checkout -> the first tensor over its tolerance
    "the gate of the image's MLP is that of its attention": (
        ("img + b.gate", "img + a.gate"),
        "step.001/double_blocks.0/out.0",
    ),
    "time is not multiplied by 1000": (("1000 * t", "t"), "step.001/time_in/in"),
    "the shift is left out of the schedule": (
        ("mu = at_200 if", "mu = 0 if 1 else at_200 if"),
        "schedule",
    ),
}


@pytest.mark.parametrize("change, first", MISTAKES.values(), ids=MISTAKES)
def test_mistake_in_a_checkout_is_found_where_it_is(change, first, runs, tmp_path):
    taken, pipe = runs[KLEIN]
    shutil.copytree(CHECKOUT, tmp_path / "flux2")
    right, wrong = change
    changed = 0
    for file in (tmp_path / "flux2").rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        changed += text.count(right)
        file.write_text(text.replace(right, wrong), encoding="utf-8")
    assert changed
    rows = bfl(taken, pipe, tmp_path / "flux2", ("schedule", "step.001", "!negative"))
    assert first_over(rows).name == first
    assert not any("negative" in row.name or "step.002" in row.name for row in rows)


def test_wrong_checkouts_are_one_sentence(runs, tmp_path):
    taken, pipe = runs[KLEIN]
    with pytest.raises(
        UserError, match=r"bfl_path: .* has no src/flux2/model\.py. Pass a checkout"
    ):
        bfl(taken, pipe, tmp_path)
    (tmp_path / "src/flux2").mkdir(parents=True)
    (tmp_path / "src/flux2/model.py").write_text("raise OSError('no such code')")
    with pytest.raises(UserError, match="bfl_path: the code of .* failed: OSError: no such code"):
        bfl(taken, pipe, tmp_path, ("step.001",))
    with pytest.raises(UserError, match=re.escape("only: step.009 matches no name")):
        bfl(taken, pipe, CHECKOUT, ("step.009",))


def test_command_compares_with_a_checkout(parity):
    size = ("--width", 64, "--height", 64, "--steps", 1, "--filter", "step.001", "--filter", "ids")
    assert parity("capture", "a red circle", *size, "--output", "a.safetensors")[0] == 0
    arguments = ("compare", "a.safetensors", "--against", "bfl")
    code, out, err = parity(*arguments, "--bfl-path", CHECKOUT, "--exclude", "attention")
    assert code == 0 and re.match(r"all \d{3} tensors are within tolerance", out), (out, err)
    assert "/attention/" not in out and "were not computed" in out
    for wrong, words in (
        (arguments, "--bfl-path: belongs to --against bfl"),
        ((*arguments[:-1], "here", "--bfl-path", CHECKOUT), "--bfl-path: belongs to"),
        ((*arguments, "--bfl-path", "none"), "--bfl-path: none has no src/flux2/model.py"),
    ):
        code, _, err = parity(*wrong)
        assert code == 2 and words in err.splitlines()[-1]
