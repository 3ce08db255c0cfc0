"""Changes to one block of a tiny transformer, each with the first tensor that it moves."""

import torch.nn.functional as F
from support.parity_requests import KLEIN

# of both tiny families
BLOCKS = [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]


def other_activation(block, family: str) -> None:
    """FLUX.1: the exact GELU instead of its tanh approximation. FLUX.2: GELU instead of SiLU."""

    def gated_gelu(x):
        gate, up = x.chunk(2, dim=-1)
        return F.gelu(gate) * up

    block.img_mlp[1].forward = gated_gelu if family == KLEIN else F.gelu


def swapped_modulation(block, family: str) -> None:
    forward = block.forward

    def swapped(img, txt, rope, img_mod, *rest):
        img_mod = [mod._replace(shift=mod.scale, scale=mod.shift) for mod in img_mod]
        return forward(img, txt, rope, img_mod, *rest)

    block.forward = swapped


def backward_rope(block, family: str) -> None:
    forward = block.forward
    block.forward = lambda x, rope, *rest: forward(x, rope.mT, *rest)


def longer_queries(block, family: str) -> None:
    block.norm.query_norm.scale.mul_(1.01)


def scaled_weight(block, family: str) -> None:
    block.linear2.weight.mul_(1.02)


CHANGES = {  # name -> a block, the change, and the first tensor that it moves
    "activation": ("double_blocks.1", other_activation, "double_blocks.1.img_mlp.1/out"),
    "modulation": ("double_blocks.0", swapped_modulation, "double_blocks.0.img_attn/in"),
    "rope": ("single_blocks.0", backward_rope, "single_blocks.0/attention/q"),
    "norm": ("single_blocks.1", longer_queries, "single_blocks.1.norm.query_norm/out"),
    "weight": ("single_blocks.2", scaled_weight, "single_blocks.2.linear2/out"),
}


def changed(pipe, change: str):
    """Make a change of CHANGES to the pipeline's transformer. Return the pipeline."""
    block, make, _ = CHANGES[change]
    make(pipe.transformer().get_submodule(block), pipe.spec.name)
    return pipe
