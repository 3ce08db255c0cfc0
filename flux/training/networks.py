"""What training needs to know of the two kinds of transformers: `Flux`, and FLUX 3's `Flux3`."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flux.transformer import Flux, FluxConfig
from flux.transformer3 import BLOCK_LISTS, Flux3, Flux3Config
from flux.weights.diffusers_names import split_block

Network = Flux | Flux3

# Layers of a block that get a LoRA: attention and MLP.
TRAINABLE = {
    *("img_attn.qkv", "img_attn.proj", "img_mlp.0", "img_mlp.2"),
    *("txt_attn.qkv", "txt_attn.proj", "txt_mlp.0", "txt_mlp.2"),
    *("linear1", "linear2"),
}
TRAINABLE3 = ("q_proj", "k_proj", "v_proj", "attn_out", "mlp_in", "mlp_out")


def new_network(config: FluxConfig | Flux3Config) -> Network:
    """Return the transformer of a configuration, with PyTorch's random weights."""
    return Flux3(config) if isinstance(config, Flux3Config) else Flux(config)


def blocks(network: Network) -> list[nn.Module]:
    """Return the blocks in the order in which they run."""
    names: Sequence[str] = ("double_blocks", "single_blocks")
    if isinstance(network, Flux3):
        names = BLOCK_LISTS
    lists: list[Any] = [network.get_submodule(name) for name in names]
    return [block for blocks in lists for block in blocks]


def gets_lora(network: Network, path: str, references: bool = True) -> bool:
    """Return whether the layer at a path is of a block's attention or MLP.

    Without `references`, those layers of FLUX 3 are left out that only references reach.
    """
    if isinstance(network, Flux3):
        return path.endswith(TRAINABLE3) and (references or not is_for_references(path))
    return split_block(path)[2] in TRAINABLE


def is_for_references(path: str) -> bool:
    """Return whether only reference images reach a layer or a parameter of FLUX 3."""
    return ".image_cond." in f"{path}."


def freeze_unreached(network: Network) -> None:
    """Freeze what no sample reaches if none has references: a part of FLUX 3, nothing of others.

    Weight decay would shrink those weights, which get no gradient.
    """
    if isinstance(network, Flux3):
        for name, parameter in network.named_parameters():
            if is_for_references(name):
                parameter.requires_grad_(False)


def round_times(network: Network, dtype: torch.dtype) -> None:
    """Show float32 weights of FLUX 3 the times that the same weights will see in `dtype`.

    FLUX 3 rounds 1000 t to the dtype of its weights: in bfloat16, to multiples of 4 near noise. The
    released weights know no other times. Float32 weights, which are rounded when they are exported,
    would learn times in between.
    """

    def rounded(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        return ((1000 * args[0].to(dtype)).float() / 1000,)

    if isinstance(network, Flux3) and dtype != torch.float32:
        network.time_in.register_forward_pre_hook(rounded)
