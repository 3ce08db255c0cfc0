"""Captures of tiny FLUX 3 models: the base model with references and guidance, and the flow map."""

from dataclasses import replace

import pytest
import torch
from support.drawn_images import photo
from support.flux3_model import BASE, DISTILLED, Flux3Model

from flux.image_io.request import ImageInputs
from flux.parity.capture import Request, capture

PLAIN = Request("a photo of a cat", width=80, height=64, steps=2, seed=5)  # 5 by 4 tokens
PAIR = ImageInputs((photo(48, 64, seed=6), photo(64, 40, seed=7)))
REQUESTS = {
    BASE: replace(PLAIN, width=None, height=None, guidance=3.0, images=PAIR),
    DISTILLED: PLAIN,
}


class Flux3Captures:
    """One model, its plain pipeline, and a capture of its request."""

    def __init__(self, name: str, folder, patch, dtype=torch.float32, **options):
        self.model = Flux3Model(name, folder, patch, dtype)
        self.request, self.folder = REQUESTS[name], folder
        self.pipe = self.load(**options)
        self.taken = capture(self.pipe, self.request, folder / "truth.safetensors")

    def load(self, **options):
        return self.model.load(fast=False, **options)


@pytest.fixture(scope="module", params=(pytest.param(BASE, marks=pytest.mark.slow), DISTILLED))
def run(request, tmp_path_factory):
    """A float32 run of each model."""
    with pytest.MonkeyPatch.context() as patch:
        yield Flux3Captures(request.param, tmp_path_factory.mktemp("flux3"), patch)


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A float32 run of each model, by name."""
    with pytest.MonkeyPatch.context() as patch:
        yield {
            name: Flux3Captures(name, tmp_path_factory.mktemp("flux3"), patch) for name in REQUESTS
        }
