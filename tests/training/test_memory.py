"""flux.training.memory: the estimate against a real forward pass, and gradient checkpointing."""

from functools import partial

import pytest
import torch
from support.training import CPU, every_family, network_loss, random, random_network
from torch import Tensor

from flux import sampling
from flux.parity.reference import tiny_models
from flux.parity.reference3 import tiny_models3
from flux.text_encoder import TextFeatures
from flux.training import loss, memory
from flux.training.lora import add_lora
from flux.training.networks import Network, new_network

BASE = "flux.3-image-klein-base"


@every_family
def test_gradient_checkpointing_keeps_the_gradients(family):
    gradients = []
    for checkpointing in (False, True):
        network = random_network(family).requires_grad_(True)
        if checkpointing:
            memory.enable_gradient_checkpointing(network)
        network_loss(network).backward()
        gradients.append({name: p.grad for name, p in network.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


@pytest.mark.parametrize("rank", [0, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model", ["flux.1-dev", "flux.2-klein-4b", BASE])
def test_estimate_equals_what_a_real_pass_saves(model, dtype, rank):
    spec = (tiny_models(clip_eos=999) | tiny_models3())[model]
    references = 6 if spec.flux3 else 0

    def build() -> Network:
        network = new_network(spec.transformer)
        for parameter in network.parameters():
            parameter.data = parameter.data.to(dtype if rank else torch.float32)
        if rank:
            add_lora(network, rank)
        return network

    network = build()
    weights = {p.untyped_storage().data_ptr() for p in network.parameters()}
    saved = {}  # holds the storages, so that no address is used twice

    def save(x: Tensor) -> Tensor:
        if x.untyped_storage().data_ptr() not in weights:
            saved[x.untyped_storage().data_ptr()] = x.untyped_storage()
        return x

    pooled = random(2, spec.pooled_dim) if spec.pooled_dim else None
    features = TextFeatures(random(2, 8, spec.transformer.context_dim), pooled)
    channels = spec.autoencoder.latent_channels
    batch = loss.Batch(random(2, channels, 3, 4), features)
    if references:
        ids = sampling.flux3_image_ids(2, 3, 1)
        batch = batch._replace(references=random(2, 6, channels), reference_ids=ids)
    t = torch.tensor([0.3, 0.8])
    with torch.autograd.graph.saved_tensors_hooks(save, lambda x: x):
        with loss.autocast_matmul(CPU, dtype):
            velocity = partial(loss.predict_velocity, network, batch, 1.0)
            loss.rectified_flow_loss(velocity, batch.latents, t, batch.latents)
    real = sum(storage.nbytes() for storage in saved.values())

    estimate = partial(memory.estimate_memory, spec, build, 12, 2, CPU, dtype)
    tokens = dict(reference_tokens=references, text_tokens=8)
    full = estimate(ema=True, gradient_checkpointing=False, **tokens)
    # a view may be one saved tensor more or less in a fake pass
    assert full.activations == pytest.approx(real, rel=0.02)
    assert full.weights == sum(p.nbytes for p in network.parameters())
    trained = sum(p.numel() for p in network.parameters() if p.requires_grad)
    assert full.states == 4 * 4 * trained  # a gradient, two moments, an average
    less = estimate(ema=False, gradient_checkpointing=True, **tokens)
    assert less.states == 3 * 4 * trained and less.activations < 0.6 * full.activations
