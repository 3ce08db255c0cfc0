"""flux.training.lora: a LoRA that trains nothing else, and its file, which others load.

The truth: diffusers, with the file given to its own loader; the weights that `flux.lora.formats` merges it into; autograd.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from support.weight_files import refusal
from test_trainer import CONFIGS, a_batch, every_family, loss_of, random
from torch import nn

from flux import sampling
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.parity.reference import (
    KLEIN_TINY,
    diffusers_pipeline,
    diffusers_velocity,
    max_error,
    networks,
    randomise,
    tiny_models,
)
from flux.training import lora as adapters
from flux.training import trainer as training
from flux.transformer import Flux
from flux.weights.quantization.quantize import SCHEMES, quantize_linear


def trained_lora(network: Flux, rank: int = 3, targets=("*",)) -> Flux:
    """With factors as if they had been trained: none is zero."""
    adapters.add_lora(network, rank, targets)
    for name, parameter in network.named_parameters():
        if parameter.requires_grad:
            parameter.data = (
                0.5 * random(*parameter.shape, seed=len(name)) / parameter.shape[1] ** 0.5
            )
    return network


@every_family
def test_a_lora_begins_as_the_network_and_trains_nothing_else(family):
    network = randomise(Flux(CONFIGS[family]))
    before, state = loss_of(network), {name: x.clone() for name, x in network.state_dict().items()}
    paths = adapters.add_lora(network, 3)
    assert torch.equal(loss_of(network), before)
    matrices = [
        n
        for n, p in state.items()
        if n.endswith(".weight") and p.ndim == 2 and "_blocks" in n and "mod" not in n
    ]
    assert {f"{path}.weight" for path in paths} == set(matrices)
    trainer = training.Trainer(network, Path("nowhere"), {}, steps=5, rate=0.01)
    assert set(trainer.parameters) == {f"{path}.lora_{ab}.weight" for path in paths for ab in "AB"}
    for step in range(3):
        trainer.update([partial(loss_of, network, step)])
    assert loss_of(network) != before
    after = {name.replace(".base.", "."): x for name, x in network.state_dict().items()}
    assert all(torch.equal(after[name], x) for name, x in state.items())


@every_family
@pytest.mark.parametrize("targets", [["*"], ["*attn.qkv", "single_blocks.1.*"]])
def test_our_loader_makes_of_the_file_what_was_trained(tmp_path, family, targets):
    network, plain = randomise(Flux(CONFIGS[family])), randomise(Flux(CONFIGS[family]))
    training.write(
        tmp_path / "lora.safetensors", adapters.lora_tensors(trained_lora(network, targets=targets))
    )
    batch, t = a_batch(plain.config), torch.tensor([0.3, 0.8])

    def of(network):
        return training.velocity(network, batch, 1.0, batch.latents, t).detach()

    without = of(plain)
    deltas = match_layers(read_lora(tmp_path / "lora.safetensors"), {"transformer": plain})
    merge(plain, [(delta, 1.0) for delta in deltas])
    # B(Ax) is added to Wx in one, BA to W in the other: the same sums, rounded in another order
    assert max_error(of(plain), of(network)) < 1e-5
    assert max_error(of(plain), without) > 0.02


@pytest.mark.parametrize("model", ["flux.1-dev", "flux.2-dev", "flux.2-klein-4b"])
def test_diffusers_loads_the_file_as_what_was_trained(tmp_path, model):
    spec = tiny_models(clip_eos=999)[model]
    parts = networks(spec)
    pipe, network = diffusers_pipeline(spec, parts), parts["transformer"]
    batch, t, axes = (
        a_batch(spec.transformer),
        torch.tensor([0.3, 0.8]),
        len(spec.transformer.axes_dim),
    )
    inputs = dict(
        img=batch.latents.flatten(2).mT,
        img_ids=sampling.image_ids(3, 4, axes),
        txt=batch.features.tokens,
        txt_ids=sampling.text_ids(7, axes),
        t=t,
        guidance=torch.ones(2) if spec.transformer.guidance else None,
        vector=batch.features.pooled,
    )
    without = diffusers_velocity(pipe.transformer, **inputs)
    training.write(
        tmp_path / "lora.safetensors",
        adapters.lora_tensors(trained_lora(network)),
        {"format": "pt"},
    )
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    theirs = diffusers_velocity(pipe.transformer, **inputs)
    ours = training.velocity(network, batch, 1.0, batch.latents, t).flatten(2).mT
    assert max_error(theirs, without) > 0.05
    assert max_error(ours.detach(), theirs) < 1e-5


def test_a_pattern_that_names_nothing_is_told():
    told = refusal(adapters.add_lora, Flux(KLEIN_TINY), 2, ["*attn.qkv", "img_in"])
    assert (
        told.startswith("--targets img_in: none of the ") and "double_blocks.0.img_attn.qkv" in told
    )


@pytest.mark.parametrize("kind", SCHEMES)
def test_a_lora_on_a_quantised_matrix_is_one_on_what_it_stands_for(kind):
    """For the backward pass, no whole matrix is kept."""
    torch.manual_seed(0)
    small = quantize_linear(nn.Linear(128, 256), kind)
    plain = small.to_linear(small.dequantize())
    results = []
    for base in (small, plain):
        torch.manual_seed(1)
        layer, x, kept = adapters.LoRALinear(base, 3), random(2, 5, 128).requires_grad_(), []
        nn.init.normal_(layer.lora_B.weight)
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t) or t, lambda t: t
        ):
            out = layer(x)
        assert any(t.numel() >= 128 * 256 for t in kept) == (base is plain)
        out.square().sum().backward()
        assert all(p.grad is None for p in base.parameters())
        results.append([out.detach(), x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad])
    assert all(
        max_error(a, b) < 1e-5 for a, b in zip(*results, strict=True)
    )  # the bias is added after the product, not in it
    with torch.autocast("cpu", torch.bfloat16):
        assert small.differentiable(x).dtype == torch.bfloat16
