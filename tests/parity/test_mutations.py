"""Bugs of one line in our own code: compare finds the first wrong tensor, diagnose names the bug.

A complete run is recorded with each bug and compared with a run without. test_diagnose.py tests
every known bug at the tensor where it shows. These few test the complete way, stage by stage.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.tiny_repositories import tiny_repositories

import flux
from flux import autoencoder, language_model, sampling, transformer
from flux.parity.capture import Request, Selection, capture
from flux.parity.compare import compare, first_over
from flux.parity.diagnose import diagnose, format_diagnosis

FLUX1, FLUX2 = "flux.1-dev", "flux.2-klein-4b"
REQUEST = Request("a photo of a cat", width=96, height=80, steps=2, seed=5)
REQUESTS = {FLUX1: replace(REQUEST, guidance=3.3), FLUX2: REQUEST}  # bfloat16 has no 3.3
PARTS = Selection(
    ("text", "noise", "ids", "rope", "schedule", "step.001", "latents", "decoder/decoder/in")
)
TOLERANCE = 1e-6
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.* was distilled for")]


class Mutation(NamedTuple):
    model: str
    owner: object  # where the code looks the function up
    attribute: str
    old: str
    new: str
    first: str  # the first tensor that differs
    bug: str | None  # the known bug's name


# fmt: off
MUTATIONS = {
    "text mask missing": Mutation(
        FLUX2, language_model.LanguageModel, "forward",
        "causal & mask[:, None, None, :]", "causal[None, None]",
        "text/model/layers.0/in.2", "padding of the prompt seen"),
    "channel order of packing": Mutation(
        FLUX1, sampling, "noise", "b (c ph pw) h w", "b (ph pw c) h w",
        "noise", "packing order of latents"),
    "rows off by one": Mutation(
        FLUX2, sampling, "image_ids",
        "torch.arange(height)[:, None]", "torch.arange(1, height + 1)[:, None]",
        "ids/img", "rows off by one"),
    "schedule unshifted": Mutation(
        FLUX1, sampling, "schedule", 'kind != "unshifted"', "kind is None",
        "schedule", "schedule unshifted"),
    "t rounded to bfloat16": Mutation(
        FLUX1, transformer, "scale_time",
        "return 1000 * t.float()", "return 1000 * t.bfloat16().float()",
        "step.001/guidance_in/in", "t rounded to bfloat16"),
    "chunks in another order": Mutation(
        FLUX1, transformer.Modulation, "forward",
        "chunks[i : i + 3]", "chunks[i // 3 :: len(chunks) // 3]",
        "step.001/double_blocks.0.img_mod/out.1", "modulation split by kind"),
    "shift and scale swapped": Mutation(
        FLUX2, transformer, "modulate",
        "(1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift",
        "(1 + shift) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + scale",
        "step.001/double_blocks.0.img_attn/in", "shift and scale swapped"),
    "gate of the MLP for attention's": Mutation(
        FLUX1, transformer.DoubleStreamBlock, "forward",
        "img_mod1.gate * self.img_attn", "img_mod2.gate * self.img_attn",
        "step.001/double_blocks.0.img_mlp/in", "gate of a residual"),
    "image before text": Mutation(
        FLUX1, transformer.Flux, "denoise",
        "torch.cat([txt, img], dim=1)", "torch.cat([img, txt], dim=1)",
        "step.001/single_blocks.0/in.0", "text and image order"),
    "velocity's sign": Mutation(
        FLUX2, sampling, "euler_step", "return x + dt * v.float()", "return x - dt * v.float()",
        "step.001/latents", "velocity's sign"),
    "latent normalisation missing": Mutation(
        FLUX2, autoencoder.AutoEncoder, "decode", "self.denormalise(latents)", "latents",
        "decoder/decoder/in", "latent normalisation missing"),
}
# fmt: on


def mutated(mutation: Mutation) -> Callable:
    """Return the function with one piece of its source replaced, which occurs once."""
    function = getattr(mutation.owner, mutation.attribute)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.old) == 1, source
    scope: dict = {}
    exec(source.replace(mutation.old, mutation.new), inspect.unwrap(function).__globals__, scope)
    return scope[function.__name__]


@pytest.fixture(scope="module")
def load(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with tiny_repositories(folder, REQUESTS, depth=1, depth_single=1):
        yield lambda name: flux.load(
            name, weights=folder, device="cpu", fast=False, dtype=torch.float32
        )


@pytest.fixture(scope="module")
def references(load, tmp_path_factory):
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(load(name), request, out / f"{name}.safetensors", PARTS)
        for name, request in REQUESTS.items()
    }


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation_is_found_and_named(name, load, references, tmp_path, monkeypatch):
    mutation = MUTATIONS[name]
    model, path = mutation.model, tmp_path / "port.safetensors"
    with monkeypatch.context() as patch:
        patch.setattr(mutation.owner, mutation.attribute, mutated(mutation))
        port = capture(load(model), REQUESTS[model], path, PARTS)
    rows = compare(port, references[model], TOLERANCE)
    found = diagnose(rows, port, references[model], load(model))
    assert first_over(rows).name == found.row.name == mutation.first
    assert found.baseline_error is None
    assert (found.bug and found.bug.name) == mutation.bug, format_diagnosis(found)
