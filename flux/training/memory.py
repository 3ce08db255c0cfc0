"""The memory of a training step, counted in a forward pass of fake tensors; gradient checkpointing.

Fake tensors have shapes and no storage, so the largest model is counted in a second.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from flux.configs import ModelSpec
from flux.runtime.context_parallel import attending_again
from flux.text_encoder import TextFeatures
from flux.training.lora import add_lora
from flux.training.loss import (
    Batch,
    attention_backend,
    autocast,
    predict_velocity,
    rectified_flow_loss,
)
from flux.training.networks import Network, blocks, freeze_unreached, new_network
from flux.transformer import FluxConfig
from flux.transformer3 import Flux3Config


def enable_gradient_checkpointing(network: Network) -> None:
    """Keep only the input of each block for the backward pass, which computes the block again."""
    device = next(network.parameters()).device

    @contextmanager
    def repeating(attending: AbstractContextManager) -> Iterator[None]:
        with attention_backend(device), attending:
            yield

    def contexts():  # of the first forward pass, and of the repeated one
        return nullcontext(), repeating(attending_again())

    for block in blocks(network):
        block.forward = partial(checkpoint, block.forward, use_reentrant=False, context_fn=contexts)


class TrainingMemory(NamedTuple):
    """Bytes of a training step, by use."""

    weights: int
    states: int  # gradients, the optimizer's state and the average of the trained weights
    activations: int  # saved by the forward pass for the backward pass

    @property
    def total(self) -> int:
        return sum(self)


def build_for_training(
    config: FluxConfig | Flux3Config,
    dtype: torch.dtype,
    lora_rank: int | None = None,
    target_modules: Sequence[str] = ("*",),
    references: bool = True,
) -> Network:
    """Return a network with the shapes and dtypes of training, and random weights.

    `references`: whether samples have any.
    """
    network = new_network(config)
    for parameter in network.parameters():
        parameter.data = parameter.data.to(dtype)
    if lora_rank:
        add_lora(network, lora_rank, target_modules, references)
    elif not references:
        freeze_unreached(network)
    return network


def optimizer_state_bytes(optimizer: str, p: Tensor) -> int:
    """Return the bytes of the state that an optimizer of OPTIMIZERS keeps for a parameter."""
    if optimizer == "adamw" or p.numel() < 4096:  # bitsandbytes keeps small moments in float32
        return 2 * p.nbytes
    scales = 4 * math.ceil(p.numel() / 256)  # a float32 scale for every 256 values
    return 2 * (p.numel() + scales)


def estimate_memory(
    spec: ModelSpec,
    build: Callable[[], Network],
    tokens: int,
    batch_size: int,
    device: torch.device,
    dtype: torch.dtype,
    ema: bool,
    gradient_checkpointing: bool,
    optimizer: str = "adamw",
    reference_tokens: int = 0,
    text_tokens: int | None = None,
) -> TrainingMemory:
    """Return a lower bound of the memory of a training step.

    `build` returns the network that is trained. `tokens`, `reference_tokens` and `text_tokens`
    (default: the most that the model takes) are those of one sample. With `gradient_checkpointing`,
    the inputs of all blocks are kept, and the rest of one block.
    """
    channels, text_tokens = spec.autoencoder.latent_channels, text_tokens or spec.text_length
    saved: dict[int, torch.UntypedStorage] = {}  # held, so that no address is used twice
    block_bytes: list[int] = []  # saved inside each block
    stream_bytes: list[int] = []  # the output of each block, which is the next one's input

    def saved_bytes() -> int:
        return sum(storage.nbytes() for storage in saved.values())

    def save(x: Tensor) -> Tensor:
        storage = x.untyped_storage()
        if storage._cdata not in weights:
            saved[storage._cdata] = storage
        return x

    def before_block(block: nn.Module, inputs: tuple) -> None:
        block_bytes.append(saved_bytes())

    def after_block(block: nn.Module, inputs: tuple, out: Tensor | tuple[Tensor, ...]) -> None:
        block_bytes[-1] = saved_bytes() - block_bytes[-1]
        outputs = out if isinstance(out, tuple) else (out,)
        stream_bytes.append(sum(x.nbytes for x in outputs))

    with FakeTensorMode():
        network = build()
        weights = {p.untyped_storage()._cdata for p in network.parameters()}
        for block in blocks(network):
            block.register_forward_pre_hook(before_block)
            block.register_forward_hook(after_block)
        vector = torch.zeros(batch_size, spec.pooled_dim) if spec.pooled_dim else None
        text = torch.zeros(batch_size, text_tokens, spec.transformer.context_dim)
        latents, t = torch.zeros(batch_size, channels, 1, tokens), torch.zeros(batch_size)
        batch = Batch(latents, TextFeatures(text, vector))
        if reference_tokens:
            references = torch.zeros(batch_size, reference_tokens, channels)
            ids = torch.zeros(reference_tokens, len(spec.transformer.axes_dim))
            batch = batch._replace(references=references, reference_ids=ids)
        if extra := spec.transformer.in_channels - channels:
            batch = batch._replace(channels=torch.zeros(batch_size, tokens, extra))
        attention = SDPBackend.MATH if device.type == "cpu" else SDPBackend.FLASH_ATTENTION
        with saved_tensors_hooks(save, lambda x: x), sdpa_kernel(attention), autocast("cpu", dtype):
            rectified_flow_loss(partial(predict_velocity, network, batch, 1.0), latents, t, latents)
        activations = saved_bytes()
        if gradient_checkpointing:
            activations -= sum(block_bytes) - max(block_bytes) - sum(stream_bytes)
        states = 0
        for p in network.parameters():
            if p.requires_grad:
                states += (1 + ema) * p.nbytes + optimizer_state_bytes(optimizer, p)
        return TrainingMemory(sum(p.nbytes for p in network.parameters()), states, activations)
