"""A wrong port passes no verdict of scripts/parity.py.

The truth is a run of a tiny random model. A wrong port is made of it by one change.
"""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.parity_requests import KLEIN, SMALL
from support.tiny_repositories import tiny_repositories

import flux
from flux.parity.capture import Selection, capture

REQUEST = replace(SMALL, width=64, height=64, steps=2, guidance=1.0)
SELECTION = Selection(("noise", "ids", "step.001", "latents", "image"))


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    with tiny_repositories(tmp_path_factory.mktemp("weights"), [KLEIN]) as folder:
        yield folder


@pytest.fixture(scope="module")
def truth(weights, tmp_path_factory) -> Path:
    pipe = flux.load(KLEIN, weights=weights, device="cpu", fast=False, dtype=torch.float32)
    path = tmp_path_factory.mktemp("truth") / "truth.safetensors"
    return capture(pipe, REQUEST, path, SELECTION).path


def metadata_of(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


@pytest.mark.parametrize("command", ["compare", "diagnose", "report"])
@pytest.mark.parametrize("number", [0, 7])
def test_stated_hashes_are_not_believed(command, number, truth, parity):
    """The port's tensors are constant; its metadata, with all hashes, is a copy of the truth's."""
    tensors = {name: torch.full_like(x, number) for name, x in load_file(truth).items()}
    save_file(tensors, "port.safetensors", metadata_of(truth))
    output = ("--output", "report.html") if command == "report" else ()
    code, out, err = parity(command, "port.safetensors", truth, *output)
    assert code in (1, 2) and "equal" not in out + err
