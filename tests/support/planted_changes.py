"""One change each to one block of a tiny transformer, and the first tensor that the change moves."""

import torch.nn.functional as F
from support.parity_requests import KLEIN

# of both tiny families
BLOCKS = [f"double_blocks.{i}" for i in range(2)] + [f"single_blocks.{i}" for i in range(3)]


def other_activation(block, family: str) -> None:
    block.img_mlp[1].forward = {
        "flux.1-dev": lambda x: F.gelu(x),  # the exact one, for the approximation by tanh
        KLEIN: lambda x: F.gelu(x.chunk(2, -1)[0]) * x.chunk(2, -1)[1],
    }[family]


def swapped_modulation(block, family: str) -> None:
    forward = block.forward

    def swap(mods):
        return [mod._replace(shift=mod.scale - 1, scale=1 + mod.shift) for mod in mods]

    block.forward = lambda img, txt, rope, img_mod, *rest: forward(
        img, txt, rope, swap(img_mod), *rest
    )


def other_way_round(block, family: str) -> None:
    forward = block.forward
    block.forward = lambda x, rope, *rest: forward(x, rope.mT, *rest)


def longer_queries(block, family: str) -> None:
    forward = block.norm.forward
    block.norm.forward = lambda unit: forward(
        unit * unit.new_tensor([1.01, 1]).reshape(2, 1, 1, 1, 1)
    )


def scaled_weight(block, family: str) -> None:
    block.linear2.weight.mul_(1.02)


CHANGES = {  # a block, what is done to it, and the first tensor that it moves
    "activation": ("double_blocks.1", other_activation, "double_blocks.1.img_mlp.1/out"),
    "modulation": ("double_blocks.0", swapped_modulation, "double_blocks.0.img_attn.qkv/in"),
    "rope": ("single_blocks.0", other_way_round, "single_blocks.0/attention/q"),
    "norm": ("single_blocks.1", longer_queries, "single_blocks.1.norm/out"),
    "weight": ("single_blocks.2", scaled_weight, "single_blocks.2.linear2/out"),
}


def changed(pipe, change: str):
    """Make a change of CHANGES to the pipeline's transformer. Return the pipeline."""
    block, make, _ = CHANGES[change]
    make(pipe.transformer().get_submodule(block), pipe.spec.name)
    return pipe
