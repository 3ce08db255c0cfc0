"""Passes whose weights are divided over processes, and what is sent: see `parallel_cases`."""

import copy
import math
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from pytest import MonkeyPatch
from support.parallel_cases import Case, network, velocity
from support.parallel_images import Run, images_of, images_of_one, load
from torch import Tensor, nn
from torch.distributed import init_device_mesh
from torch.utils._python_dispatch import TorchDispatchMode

from flux.runtime import parallel, residency, tensor_parallel
from flux.runtime.context_parallel import ContextParallel
from flux.runtime.devices import FreeMemory
from flux.runtime.lazy_module import local
from flux.runtime.processes import world_size
from flux.runtime.shard_weights import ShardedWeights
from flux.runtime.tensor_parallel import SummedLinear, TensorParallel


def tensor_over_all() -> TensorParallel:
    return TensorParallel(dist.group.WORLD, dist.get_rank(), world_size())


def shards_over_all() -> ShardedWeights:
    return ShardedWeights(init_device_mesh("cpu", (world_size(),)))


DIVIDE: dict[str, Callable[[], Callable[[nn.Module], None]]] = {
    "tensor": tensor_over_all,
    "shards": shards_over_all,
    "allgather": lambda: ContextParallel(dist.group.WORLD, "allgather"),
    "ulysses": lambda: ContextParallel(dist.group.WORLD, "ulysses"),
}


def divided(case: Case, how: str) -> Any:
    """Return a copy of the case's network whose passes run on all processes."""
    net = copy.deepcopy(network(case.config, case.dtype, case.fast)).requires_grad_(False)
    DIVIDE[how]()(net)
    return net


class Outcome(NamedTuple):
    """How a pass over the group differs from a pass alone."""

    relative: float  # L2
    equal: bool  # to the bit
    same_everywhere: bool
    share: float  # of the blocks' weights that this process holds


@torch.no_grad()
def compare(case: Case, how: str, mistake: str = "") -> Outcome:
    alone = velocity(case, whole := network(case.config, case.dtype, case.fast))
    with MISTAKES[mistake]() if mistake else nothing():
        together = velocity(case, net := divided(case, how))
    difference = (together - alone).double().norm() / alone.double().norm()
    everywhere = [torch.empty_like(together) for _ in range(world_size())]
    dist.all_gather(everywhere, together.contiguous())
    same = all(torch.equal(x, together) for x in everywhere)
    return Outcome(
        difference.item(), torch.equal(together, alone), same, in_blocks(net) / in_blocks(whole)
    )


def in_blocks(net: nn.Module) -> int:
    """Return how many weights of matrices of blocks, modulations excluded, are in this process."""
    return sum(
        local(weight).numel()
        for name, weight in net.named_parameters()
        if "blocks" in name and "mod" not in name.rpartition("blocks")[2] and weight.ndim == 2
    )


def compare_all(cases: list[tuple]) -> list[Outcome]:
    return [compare(*case) for case in cases]


# ------------------------------------------------------------------ planted mistakes


@contextmanager
def nothing():
    yield


@contextmanager
def replaced(owner: Any, name: str, value: Any):
    plain = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, plain)


def rows_as_one_piece():
    plain = TensorParallel._rows
    return replaced(TensorParallel, "_rows", lambda self, linear, *_, **__: plain(self, linear))


def columns_as_one_piece():
    plain = TensorParallel._columns
    return replaced(TensorParallel, "_columns", lambda self, linear, *_: plain(self, linear))


def bias_in_every_process():
    def forward(self, x: Tensor) -> Tensor:
        out = nn.functional.linear(x, self.weight, self.bias)
        dist.all_reduce(out, group=self.group)
        return out

    return replaced(SummedLinear, "forward", forward)


def no_sum():
    return replaced(tensor_parallel.dist, "all_reduce", lambda x, group=None: None)


MISTAKES: dict[str, Callable] = {
    "rows as one piece": rows_as_one_piece,
    "columns as one piece": columns_as_one_piece,
    "bias in every process": bias_in_every_process,
    "no sum": no_sum,
}


# ------------------------------------------------------------------ pipelines


def refusal(run: Run) -> str:
    """Return why a pipeline cannot be divided."""
    try:
        sizes = parallel.Sizes(**parallel.parse(run.sizes))
        parallel.distribute(load(run), sizes, None, run.shard_weights)
    except parallel.UserError as error:
        return str(error)
    return ""


def reason_for_shards(run: Run, free: Sequence[float]) -> str:
    """Return why weights are sharded if the processes have so many GB of free memory."""
    with MonkeyPatch.context() as patch:
        memory = FreeMemory("cpu", free[dist.get_rank()] * 1e9, math.inf)
        patch.setattr(residency, "available_memory", lambda device: memory)
        return parallel.needs_shards(load(run), 80, 64)


def compare_unequal_memory(run: Run) -> list[bool]:
    """Return whether two calls make the image of one process if only the first has little memory.

    Then, whether the networks stay loaded.
    """
    alone = images_of_one(run)
    with MonkeyPatch.context() as patch:
        memory = FreeMemory("cpu", 1e9 if dist.get_rank() else 0.0136e9, math.inf)
        patch.setattr(residency, "available_memory", lambda device: memory)
        pipe = load(run)
        sizes = parallel.Sizes(**parallel.parse(run.sizes))
        parallel.distribute(pipe, sizes, run.method, run.shard_weights)
        return [*(images_of(pipe, run) == alone for _ in range(2)), pipe.residency.keep]


# ------------------------------------------------------------------ messages


class Messages(TorchDispatchMode):
    """Counts the collectives of this process, and the bytes that it sends to others.

    An all-reduce of n bytes sends 2 (P - 1) / P n: it scatters sums, then gathers them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.count, self.bytes = 0, 0.0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "c10d":
            self.count += 1
            self.bytes += sent(function._opname, args)
        return function(*args, **(kwargs or {}))


def sent(name: str, args: tuple) -> float:
    others, size = world_size() - 1, world_size()
    if name == "allreduce_":
        return 2 * others / size * args[0][0].nbytes
    if name == "_allgather_base_":
        return others * args[1].nbytes
    if name == "alltoall_base_":
        flat, splits = args[1], args[4]
        own = splits[dist.get_rank()] if splits else len(flat) // size
        return (len(flat) - own) * flat.element_size()
    raise AssertionError(f"{name} is not counted")


@torch.no_grad()
def messages_of_a_pass(case: Case, how: str) -> tuple[int, float]:
    net = divided(case, how)
    with Messages() as messages:
        velocity(case, net)
    return messages.count, messages.bytes


def messages_of_a_run(run: Run) -> tuple[int, float]:
    pipe = load(run)
    parallel.distribute(pipe, parallel.Sizes(**parallel.parse(run.sizes)), run.method)
    with Messages() as messages:
        images_of(pipe, run)
    return messages.count, messages.bytes


def messages_of_a_step(run: Run) -> tuple[int, float]:
    """Return what one more step sends; what a run sends in any case is left out."""
    pipe = load(run)
    parallel.distribute(pipe, parallel.Sizes(**parallel.parse(run.sizes)), run.method)
    call = dict(run.call)
    seeds = list(range(call.pop("num_images", 1)))
    negative = pipe.encode([call.pop("negative_prompt", "")])
    features, found = pipe.encode(["a red star"]), []
    for steps in (1, 2):
        with Messages() as messages:
            pipe.sample(features, seeds, 64, 64, steps, negative=negative, **call)
        found.append((messages.count, messages.bytes))
    (count, size), (more, larger) = found
    return more - count, larger - size
