"""Twenty mistakes of one line each, planted in our own code: each is caught, where it is, and the doctor names what it knows.

Each run is recorded and compared with the honest one, which it equals to the bit up to the mistake. Networks are tiny and
random; FLUX.1 and FLUX.2 by turns.
"""

import inspect
import textwrap
from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

import pytest
import torch
from support.tiny_repositories import home, write_tokenizers

import flux
from flux import autoencoder, language_model, sampling, transformer
from flux.configs import MODELS
from flux.parity.capture import Request, Selection, capture
from flux.parity.compare import compare, first_over
from flux.parity.diagnose import diagnose, told
from flux.parity.reference import networks, tiny_models, write_weights
from flux.pipeline import Pipeline

FLUX1, FLUX2 = "flux.1-dev", "flux.2-klein-4b"
REQUEST = Request(
    "a photo of a cat", width=96, height=80, steps=2, seed=5
)  # 30 image tokens; 24 and 64 of text
REQUESTS = {FLUX1: replace(REQUEST, guidance=3.3), FLUX2: REQUEST}  # bfloat16 has no 3.3
PARTS = Selection(
    ("text", "noise", "ids", "rope", "schedule", "step.001", "latents", "decoder/decoder/in")
)
BUDGET = 1e-6
pytestmark = pytest.mark.filterwarnings("ignore:.* was distilled for")


class Mutation(NamedTuple):
    model: str
    owner: object  # where the code looks the function up
    attribute: str
    old: str
    new: str
    first: str  # the first tensor that differs
    cause: str | None = None  # by the doctor's name, if it knows it


MUTATIONS = {
    "shift and scale swapped": Mutation(
        FLUX2,
        transformer,
        "modulate",
        "mod.scale * F.layer_norm(x, x.shape[-1:], eps=1e-6) + mod.shift",
        "(1 + mod.shift) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + mod.scale - 1",
        "step.001/double_blocks.0.img_attn.qkv/in",
        "shift and scale swapped",
    ),
    "eps of the layer norms": Mutation(
        FLUX1,
        transformer,
        "modulate",
        "eps=1e-6",
        "eps=1e-5",
        "step.001/double_blocks.0.img_attn.qkv/in",
        "eps 1e-05",
    ),
    "chunks in another order": Mutation(
        FLUX1,
        transformer.Modulation,
        "forward",
        "b (branch three d)",
        "b (three branch d)",
        "step.001/double_blocks.0.img_mod/out.1",
        "modulation cut by kind",
    ),
    "scale before shift in the last layer": Mutation(
        FLUX2,
        transformer.FinalLayer,
        "forward",
        "shift, scale =",
        "scale, shift =",
        "step.001/final_layer.linear/in",
        "shift and scale swapped",
    ),
    "q, k, v by heads": Mutation(
        FLUX1,
        transformer,
        "split_heads",
        "(3, num_heads, -1)).permute(2, 0, 1, 3, 4)",
        "(num_heads, 3, -1)).permute(3, 0, 1, 2, 4)",
        "step.001/double_blocks.0.txt_attn.norm/in",
        "q, k, v cut by heads",
    ),
    "QK-norm over heads": Mutation(
        FLUX2,
        transformer,
        "unit_rms",
        "x.float(), x.shape[-1:], eps=1e-6)",
        "x.float().mT, x.shape[3:4], eps=1e-6).mT",
        "step.001/double_blocks.0.txt_attn.norm/in",
        "QK-norm over the wrong axis",
    ),
    "QK-norm after RoPE": Mutation(
        FLUX1,
        transformer,
        "turned",
        "rotate(norm(unit_rms(qk, numerics)), rope)",
        "norm(unit_rms(rotate(qk, rope), numerics))",
        "step.001/single_blocks.0.norm/in",
        "QK-norm after RoPE",
    ),
    "RoPE's pairs stored as halves": Mutation(
        FLUX2,
        transformer,
        "rotate",
        ".flatten(-2)",
        ".mT.flatten(-2)",
        "step.001/double_blocks.0/attention/q",
        "RoPE's pairs stored as halves",
    ),
    "RoPE off by one": Mutation(
        FLUX2,
        sampling,
        "image_ids",
        "torch.arange(height)[:, None]",
        "torch.arange(1, height + 1)[:, None]",
        "ids/img",
        "rows off by one",
    ),
    "image before text": Mutation(
        FLUX1,
        transformer.Flux,
        "velocity",
        "torch.cat([txt, img], dim=1)",
        "torch.cat([img, txt], dim=1)",
        "step.001/single_blocks.0/in.0",
        "text and image order",
    ),
    "GELU by erf": Mutation(
        FLUX1,
        transformer,
        "mlp",
        'nn.GELU(approximate="tanh")',
        "nn.GELU()",
        "step.001/double_blocks.0.img_mlp.1/out",
        "GELU by erf",
    ),
    "gate and value swapped": Mutation(
        FLUX2,
        transformer.GatedSiLU,
        "forward",
        "gate, up =",
        "up, gate =",
        "step.001/double_blocks.0.img_mlp.1/out",
        "gate and value swapped",
    ),
    "gate of the MLP's branch for attention's": Mutation(
        FLUX1,
        transformer,
        "residuals",
        "x + mod[0].gate * proj(attended)",
        "x + mod[1].gate * proj(attended)",
        "step.001/double_blocks.0.img_mlp/in",
        None,
    ),
    "text mask missing": Mutation(
        FLUX2,
        language_model.LanguageModel,
        "forward",
        "visible & mask[:, None, None, :]",
        "visible[None, None]",
        "text/model/layers.0/in.2",
        "padding of the prompt seen",
    ),
    "t rounded to bfloat16": Mutation(
        FLUX1,
        transformer,
        "scale_time",
        "return 1000 * t.float()",
        "return 1000 * t.bfloat16().float()",
        "step.001/guidance_in/in",
        "t rounded to bfloat16",
    ),
    "schedule unshifted": Mutation(
        FLUX1,
        sampling,
        "schedule",
        'kind != "unshifted"',
        "kind is None",
        "schedule",
        "schedule unshifted",
    ),
    "time of the next step": Mutation(
        FLUX2,
        Pipeline,
        "sample",
        "{t: (filled(t),",
        "{t: (filled(times[1 + times.tolist().index(t)]),",
        "step.001/time_in/in",
        "schedule off by one",
    ),
    "velocity's sign": Mutation(
        FLUX2,
        sampling,
        "denoise",
        "x + (after - now) * v.float()",
        "x - (after - now) * v.float()",
        "step.001/latents",
        "velocity's sign",
    ),
    "channel order when packing": Mutation(
        FLUX1,
        sampling,
        "pack",
        "b (c ph pw) h w",
        "b (ph pw c) h w",
        "noise",
        "packing order of latents",
    ),
    "latent normalisation missing": Mutation(
        FLUX2,
        autoencoder.AutoEncoder,
        "decode",
        "self.denormalise(latents)",
        "latents",
        "decoder/decoder/in",
        "latent normalisation missing",
    ),
}


def mutated(mutation: Mutation) -> Callable:
    """The function with one piece of its source replaced, which is there once."""
    function = getattr(mutation.owner, mutation.attribute)
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(mutation.old) == 1, source
    scope: dict = {}
    exec(source.replace(mutation.old, mutation.new), inspect.unwrap(function).__globals__, scope)
    return scope[function.__name__]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name in (FLUX1, FLUX2):
            spec = tiny_models(write_tokenizers(home(folder, name), name))[name]
            spec = replace(spec, transformer=replace(spec.transformer, depth=1, depth_single=1))
            patch.setitem(MODELS, name, spec)
            write_weights(home(folder, name), spec, networks(spec), sharded=False)
        yield folder


@pytest.fixture(scope="module")
def load(folder):
    return lambda name: flux.load(name, weights=folder, device="cpu", dtype=torch.float32)


@pytest.fixture(scope="module")
def honest(load, tmp_path_factory):
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(load(name), REQUESTS[name], out / f"{name}.safetensors", PARTS)
        for name in (FLUX1, FLUX2)
    }


def test_twenty():
    assert (
        len(MUTATIONS) == 20
        and sum(mutation.cause is not None for mutation in MUTATIONS.values()) == 19
    )


@pytest.mark.parametrize("name", MUTATIONS)
def test_mutation(name, load, honest, tmp_path, monkeypatch):
    mutation = MUTATIONS[name]
    with monkeypatch.context() as patch:
        patch.setattr(mutation.owner, mutation.attribute, mutated(mutation))
        port = capture(
            load(mutation.model), REQUESTS[mutation.model], tmp_path / "port.safetensors", PARTS
        )
    reference = honest[mutation.model]
    rows = compare(port, reference, BUDGET)
    found = diagnose(rows, port, reference, load(mutation.model))
    assert first_over(rows).name == found.row.name == mutation.first
    assert found.unsound is None
    assert (found.cause and found.cause.name) == mutation.cause, told(found)
