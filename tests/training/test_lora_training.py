"""flux.training.lora: a LoRA trains nothing else, and other programs load its file.

Compared with: diffusers' loader, flux.lora, and autograd.
"""

from functools import partial
from pathlib import Path

import pytest
import torch
from support.training import every_family, network_loss, random, random_batch, random_network
from support.weight_files import refusal
from torch import Tensor, nn

from flux import sampling
from flux.lora.formats import match_layers, read_lora
from flux.lora.merge import merge
from flux.parity.reference import (
    KLEIN_TINY,
    diffusers_pipeline,
    diffusers_velocity,
    max_error,
    networks,
    tiny_models,
)
from flux.training.checkpoint import save_tensors
from flux.training.lora import LoRALinear, add_lora, lora_state_dict
from flux.training.loss import predict_velocity
from flux.training.networks import Network
from flux.training.trainer import Trainer, make_optimizer, trainable_parameters, warmup_cosine
from flux.transformer import Flux
from flux.weights.quantization.quantize import SCHEMES, quantize_linear


def with_random_lora(network: Network, rank: int = 3, target_modules=("*",)) -> Network:
    """Add a LoRA with random factors, as if it had been trained."""
    add_lora(network, rank, target_modules)
    for name, p in trainable_parameters(network).items():
        p.data = 0.5 * random(*p.shape, seed=len(name)) / p.shape[1] ** 0.5
    return network


@every_family
def test_lora_starts_as_the_network_and_trains_nothing_else(family):
    network = random_network(family)
    before, weights = network_loss(network), network.state_dict()
    weights = {name: x.clone() for name, x in weights.items()}
    paths = add_lora(network, 3)
    assert torch.equal(network_loss(network), before)
    matrices = {
        name
        for name, x in weights.items()
        if name.endswith(".weight")
        and x.ndim == 2
        and "_blocks" in name
        and "mod." not in name
        and "modulation." not in name
    }
    assert {f"{path}.weight" for path in paths} == matrices
    optimizer = make_optimizer("adamw", trainable_parameters(network).values(), 0.01)
    trainer = Trainer(network, Path("nowhere"), {}, [optimizer], warmup_cosine(5))
    assert set(trainer.parameters) == {f"{path}.lora_{ab}.weight" for path in paths for ab in "AB"}
    for step in range(3):
        trainer.update([partial(network_loss, network, step)])
    assert network_loss(network) != before
    after = {name.replace(".base.", "."): x for name, x in network.state_dict().items()}
    assert all(torch.equal(after[name], x) for name, x in weights.items())


@every_family
@pytest.mark.parametrize("target_modules", [["*"], ["*attn.qkv", "single_blocks.1.*"]])
def test_our_loader_merges_the_trained_weights(tmp_path, family, target_modules):
    path = tmp_path / "lora.safetensors"
    if family == "flux.3":
        target_modules = [pattern.replace("attn.qkv", "q_proj") for pattern in target_modules]
    network, plain = random_network(family), random_network(family)
    save_tensors(path, lora_state_dict(with_random_lora(network, target_modules=target_modules)))
    batch, t = random_batch(plain.config, references=True), torch.tensor([0.3, 0.8])

    def velocity(network: Network) -> Tensor:
        return predict_velocity(network, batch, 1.0, batch.latents, t).detach()

    before = velocity(plain)
    deltas = match_layers(read_lora(path), {"transformer": plain})
    merge(plain, [(delta, 1.0) for delta in deltas])
    # B(Ax) + Wx in one network, (BA + W)x in the other: equal except for rounding
    assert max_error(velocity(plain), velocity(network)) < 1e-5
    assert max_error(velocity(plain), before) > 0.02


@pytest.mark.parametrize("model", ["flux.1-dev", "flux.2-dev", "flux.2-klein-4b"])
def test_diffusers_loads_the_trained_weights(tmp_path, model):
    spec = tiny_models(clip_eos=999)[model]
    parts = networks(spec)
    pipe, network = diffusers_pipeline(spec, parts), parts["transformer"]
    batch, t = random_batch(spec.transformer), torch.tensor([0.3, 0.8])
    axes = len(spec.transformer.axes_dim)
    inputs = dict(
        img=batch.latents.flatten(2).mT,
        img_ids=sampling.image_ids(3, 4, axes),
        txt=batch.features.tokens,
        txt_ids=sampling.text_ids(7, axes),
        t=t,
        guidance=torch.ones(2) if spec.transformer.guidance else None,
        vector=batch.features.pooled,
    )
    before = diffusers_velocity(pipe.transformer, **inputs)
    tensors = lora_state_dict(with_random_lora(network))
    save_tensors(tmp_path / "lora.safetensors", tensors, {"format": "pt"})
    pipe.load_lora_weights(str(tmp_path), weight_name="lora.safetensors")
    theirs = diffusers_velocity(pipe.transformer, **inputs)
    ours = predict_velocity(network, batch, 1.0, batch.latents, t).flatten(2).mT
    assert max_error(theirs, before) > 0.05
    assert max_error(ours.detach(), theirs) < 1e-5


def test_unmatched_target_modules_list_trainable_layers():
    message = refusal(add_lora, Flux(KLEIN_TINY), 2, ["*attn.qkv", "img_in"])
    assert message.startswith("target_modules: img_in matches none of the ")
    assert "double_blocks.0.img_attn.qkv" in message


@pytest.mark.parametrize("scheme", SCHEMES)
def test_lora_on_a_quantized_layer_equals_lora_on_its_dequantized_layer(scheme):
    """The forward pass saves no full matrix for the backward pass."""
    torch.manual_seed(0)
    quantized = quantize_linear(nn.Linear(128, 256), scheme)
    plain = quantized.to_linear(quantized.dequantize())
    x = random(2, 5, 128).requires_grad_()
    results = []
    for base in (quantized, plain):
        torch.manual_seed(1)
        layer, saved = LoRALinear(base, 3), []
        nn.init.normal_(layer.lora_B.weight)

        def save(tensor: Tensor, saved=saved) -> Tensor:
            saved.append(tensor)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(save, lambda tensor: tensor):
            out = layer(x)
        assert any(tensor.numel() >= 128 * 256 for tensor in saved) == (base is plain)
        x.grad = None
        out.square().sum().backward()
        assert all(p.grad is None for p in base.parameters())
        results.append([out.detach(), x.grad, layer.lora_A.weight.grad, layer.lora_B.weight.grad])
    for ours, expected in zip(*results, strict=True):
        assert max_error(ours, expected) < 1e-5  # the bias is added in another place
    with torch.autocast("cpu", torch.bfloat16):
        assert quantized.differentiable(x).dtype == torch.bfloat16


def test_rank_is_at_most_the_smaller_side_of_a_matrix():
    network = Flux(KLEIN_TINY)
    sides = {
        path: min(m.weight.shape)
        for path, m in network.named_modules()
        if path and hasattr(m, "weight") and m.weight.ndim == 2
    }
    message = refusal(add_lora, network, 2**62)
    limit = min(side for path, side in sides.items() if "_blocks" in path and "mod" not in path)
    assert message.startswith(f"rank: must be at most {limit}, the smaller side of ")
    assert refusal(add_lora, network, limit + 1).endswith(f"(got {limit + 1})")
    assert add_lora(network, limit)
