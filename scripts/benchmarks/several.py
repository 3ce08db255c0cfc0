"""One step over the processes of torchrun, against the same step in one of them.

torchrun --nproc-per-node 4 scripts/bench.py --parallel context=4

Every process keeps the whole network beside its part, so the models are cut to a few blocks. Groups
of `data` and `cfg` run steps of their own, which need no measurement.
"""

import copy
import statistics
from collections.abc import Callable, Iterator
from functools import partial
from math import prod

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import init_device_mesh

from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.steps import FAMILIES, as_loaded, build_network, case_name, inputs, our_step
from benchmarks.timing import random_weights, timed
from flux.errors import UserError
from flux.parity.reference import relative_l2
from flux.runtime.context_parallel import METHODS, ContextParallel
from flux.runtime.parallel import Parallel, Sizes, parse
from flux.runtime.processes import of_all, rank, world_size
from flux.runtime.shard_weights import ShardedWeights
from flux.runtime.tensor_parallel import TensorParallel, check

RUNS = 3  # in a row, each timed by itself, in every process as many


def sizes_of(text: str) -> Sizes:
    """Parse the flag. UserError unless the processes share the tokens or weights of one step."""
    sizes = Sizes(**parse(text))
    if world_size() == 1:
        raise UserError(
            "--parallel: needs several processes. Start it with `torchrun --nproc-per-node N`."
        )
    if sizes.data > 1 or sizes.cfg > 1:
        raise UserError(
            f"--parallel: data and cfg divide no step (got {text}). Use context and tensor."
        )
    if prod(sizes) != world_size():
        raise UserError(f"--parallel: {text} needs {prod(sizes)} processes (got {world_size()}).")
    return sizes


def parallel_rows(setting: Setting, sizes: Sizes) -> Iterator[Row]:
    """Yield the time of a step over the processes, with each way to attend, and with shards."""
    mesh = Parallel(sizes, setting.device.type)
    everyone = init_device_mesh(setting.device.type, (world_size(),))
    for name, config in FAMILIES.items():
        config = setting.cut(config)
        check(config, sizes.tensor)
        for side in setting.sides:
            case = f"{case_name(name, config, side)}, {sizes}"
            alone = random_weights(partial(build_network, config), setting.device, torch.bfloat16)
            as_loaded(alone, setting.device)
            tensors = inputs(config, side, setting.text, setting.device, torch.bfloat16)
            for method in METHODS if sizes.context > 1 else (None,):

                def divide(network: nn.Module, method: str | None = method) -> None:
                    if sizes.tensor > 1:
                        group, own = mesh.group("tensor"), mesh.mesh.get_local_rank("tensor")
                        TensorParallel(group, own, sizes.tensor)(network)
                    if method:
                        ContextParallel(mesh.group("context"), method)(network)

                row_name = f"{case}, {method}" if method else case
                yield against_one(row_name, alone, divide, tensors, setting)
            if sizes.tensor == 1:

                def shard(network: nn.Module) -> None:
                    ShardedWeights(everyone)(network)
                    ContextParallel(mesh.group("context"))(network)

                yield against_one(f"{case}, sharded weights", alone, shard, tensors, setting)


@torch.no_grad()
def against_one(
    name: str,
    alone: nn.Module,
    divide: Callable[[nn.Module], None],
    tensors: dict[str, Tensor],
    setting: Setting,
) -> Row:
    """Return the row of a network, divided by `divide`: median seconds of the slowest process."""
    network = copy.deepcopy(alone)
    divide(network)
    together, one = our_step(network, tensors), our_step(alone, tensors)
    difference = relative_l2(together(), one().float())
    ours = seconds(together, setting.rounds)
    # one process works alone: others would take its share of the host
    theirs = seconds(one, setting.rounds, first_alone=True)
    return Row(
        name,
        "s",
        ours,
        theirs,
        against="one process",
        runs=RUNS * setting.rounds,
        difference=difference,
    )


def seconds(step: Callable[[], Tensor], rounds: int, first_alone: bool = False) -> float:
    """Return the median over runs of the slowest process's seconds, or of the first one's."""
    found = []
    for _ in range(RUNS * rounds):
        dist.barrier()
        mine = timed(step) if not first_alone or rank() == 0 else 0.0
        found.append(max(of_all(mine)))
    return statistics.median(found)
