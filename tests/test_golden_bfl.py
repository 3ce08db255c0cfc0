"""`numerics="bfl"` in bfloat16, to the last bit, against runs that `scripts/dev/golden_bfl.py` writes out rounding by rounding.

In which order a processor sums a product of matrices is its own affair, and moves last bits. So the script is run here as well:
ours must equal what it gives on this machine; and that must be what it gave where `tests/golden_bfl` was made, up to such sums.
Both compute on one thread.
"""

import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from support.load_script import script
from torch import Tensor

import flux
from flux.configs import MODELS
from flux.parity.capture import Request, run
from flux.parity.compare import errors
from flux.parity.random_model import random_model
from flux.pipeline import Pipeline
from flux.text_encoder import TextFeatures
from flux.transformer import NUMERICS, Numerics

SCRIPT = Path(__file__).resolve().parents[1] / "scripts/dev/golden_bfl.py"
GOLDEN = Path(__file__).parent / "golden_bfl"
golden_bfl = script("dev/golden_bfl")

ASKED = dict(width=96, height=64, steps=4, guidance=3.5)
# Seen: up to 0.0081 with the kernels of older processors (ATEN_CPU_CAPABILITY=default, ONEDNN_MAX_CPU_ISA=SSE41), and 0.0083
# with every sum in float64. `exact` is off by 0.1 and more.
OTHER_SUMS = 0.02


class Case(NamedTuple):
    load: Callable[[Numerics], Pipeline]
    weights: Path
    golden: dict[str, Tensor]  # in the order of execution

    @property
    def features(self) -> TextFeatures:
        return TextFeatures(self.golden["text/features"], self.golden.get("text/pooled"))


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=["flux.1", "flux.2"])
def case(request, one_thread):
    with random_model(request.param) as (name, folder):
        weights = folder / MODELS[name].transformer_file

        def load(numerics):
            return flux.load(name, folder, "cpu", torch.bfloat16, numerics)

        family, golden = golden_bfl.run(load_file(weights))
        assert family == request.param
        yield Case(load, weights, golden)


def ours(case: Case, numerics: Numerics) -> dict[str, Tensor]:
    """Every tensor of our run, by name."""
    seen, pipe = {}, case.load(numerics)
    pipe.text.encode_one = lambda prompt: case.features
    run(pipe, Request("", **ASKED), lambda name, tensor: seen.update({name: tensor.clone()}))
    return seen | {
        "rope": seen["rope"][..., 0]
    }  # of each rotation, the first column: its cosine and its sine


def differing(case: Case, seen: dict[str, Tensor]) -> list[str]:
    return [name for name, tensor in case.golden.items() if not seen[name].float().equal(tensor)]


def test_every_tensor_is_equal_to_the_last_bit(case):
    """Inside attention and after each block, at each step. Our times, from float64, are at most a rounding of float32 away."""
    seen = ours(case, NUMERICS["bfl"])
    assert len(case.golden) - ("text/pooled" in case.golden) == 3 + 4 * (1 + 2 * 6 + 3 * 5 + 2)
    assert [name for name in differing(case, seen) if name != "schedule"] == []
    assert all(
        seen[name].dtype == torch.bfloat16 for name in case.golden if name.startswith("step")
    )
    torch.testing.assert_close(seen["schedule"], case.golden["schedule"], rtol=1.2e-7, atol=0)
    latents = case.load(NUMERICS["bfl"]).sample(case.features, [0], **ASKED)  # not watched
    assert latents.equal(case.golden["step.004/latents"]) and latents.std() > 0.5


@pytest.mark.parametrize(
    "choice, first",
    [
        ("time", "step.001/vec"),
        ("rope", "rope"),
        ("norm_scale", "step.001/double_blocks.0/attention/q"),
        ("state", "step.001/latents"),
    ],
)
def test_each_rounding_is_seen_where_it_happens(case, choice, first):
    other = replace(NUMERICS["bfl"], **{choice: getattr(NUMERICS["exact"], choice)})
    differ = [name for name in differing(case, ours(case, other)) if name != "schedule"]
    assert differ[0] == first
    assert (
        choice == "rope" or "step.004/latents" in differ
    )  # its 3e-8 are less than what bfloat16 shows


def test_exact_numerics_are_far_away(case):
    seen = ours(case, NUMERICS["exact"])
    golden = {
        name: tensor
        for name, tensor in case.golden.items()
        if re.search("blocks|vec|/out|step.004/latents", name)
    }
    found = {name: errors(seen[name], tensor).relative_l2 for name, tensor in golden.items()}
    assert min(found.values()) > 5 * OTHER_SUMS


def test_what_is_stored_is_what_the_script_gives(case, tmp_path, monkeypatch):
    monkeypatch.setattr(golden_bfl, "GOLDEN", tmp_path)
    monkeypatch.setattr(sys, "argv", ["golden_bfl.py", str(case.weights)])
    golden_bfl.main()
    (file,) = tmp_path.iterdir()
    now, then = load_file(file), load_file(GOLDEN / file.name)
    assert now.keys() == then.keys() == set(filter(golden_bfl.kept, case.golden))
    assert all(tensor.float().equal(case.golden[name]) for name, tensor in now.items())
    found = {name: errors(now[name], tensor).relative_l2 for name, tensor in then.items()}
    assert found["text/features"] < 1e-3, (
        "torch draws other random numbers than it did: run the script again"
    )
    assert max(found.values()) <= OTHER_SUMS, found
    assert (GOLDEN / file.name).stat().st_size < 150_000


def test_the_script_stands_alone():
    imported = re.findall(
        r"^\s*(?:import|from) (\w+)", SCRIPT.read_text(encoding="utf-8"), re.MULTILINE
    )
    assert set(imported) == {"math", "sys", "pathlib", "torch", "safetensors"}
