"""Shard the weights of a transformer over all processes, which gather a block when it runs (FSDP2).

ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054. Every process computes with whole weights, so the
results are equal to the bit. All weights travel once in each pass.
"""

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard, register_fsdp_forward_method

from flux.runtime.memory_plan import WeightSizes
from flux.transformer import DoubleStreamBlock, Modulation, SingleStreamBlock
from flux.transformer3 import Block as Block3

UNITS = (DoubleStreamBlock, SingleStreamBlock, Block3, Modulation)  # gathered one after another
METHODS = ("vec", "modulations", "stream", "denoise")  # which the pipeline calls: see `velocity.py`


def shard(network: nn.Module, mesh: DeviceMesh, units: tuple[type[nn.Module], ...]) -> None:
    """Shard every weight over a mesh of one axis; modules of `units` are gathered one by one."""
    for module in reversed(list(network.modules())):  # children before their parents
        if module is network or isinstance(module, units):
            fully_shard(module, mesh=mesh)


class ShardedWeights:
    """Shards a loaded Flux or Flux3: `pipe.transformer.set_divide(self)`. mesh: of one axis."""

    def __init__(self, mesh: DeviceMesh):
        self.mesh = mesh

    def __call__(self, network: nn.Module) -> None:
        shard(network, self.mesh, UNITS)
        for name in METHODS:
            if hasattr(network, name):
                sharded: Any = network
                register_fsdp_forward_method(sharded, name)

    def sizes(self, whole: WeightSizes) -> WeightSizes:
        return shard_sizes(whole, self.mesh.size())


def shard_sizes(whole: WeightSizes, processes: int) -> WeightSizes:
    """Return what one process holds: its shard, the root's weights, and two gathered blocks."""
    gathered = whole.fixed + 2 * max(whole.blocks, default=0)
    return WeightSizes(-(-whole.total // processes) + gathered, merging=whole.merging)
