"""Training on several processes of torchrun: each one holds a shard of every weight (FSDP2).

Every function also works in a single process, where most of them do nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.tensor import DTensor, distribute_tensor

from flux.errors import UserError
from flux.runtime import shard_weights
from flux.runtime.context_parallel import ContextParallel
from flux.runtime.devices import choose_device
from flux.runtime.processes import of_all, rank, world_size
from flux.training.networks import Network
from flux.transformer3 import Modulation as Modulation3


def init(device: str | None) -> str | None:
    """Join the process group if torchrun started this process, and return the process's device.

    UserError if the device is not available.
    """
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device is not None and choose_device(device).type == "cuda":
        torch.cuda.set_device(device)
    backend = "nccl" if device and device.startswith("cuda") else "gloo"
    dist.init_process_group(backend, timeout=timedelta(days=1))
    return device


@contextmanager
def main_process_first() -> Iterator[None]:
    """Run the block in the first process, then in the others.

    A UserError of the first process is raised in every process.
    """
    error_text: list[str | None] = ["the first process was stopped"]
    if rank() > 0:
        dist.broadcast_object_list(error_text)
        if error_text[0] is not None:
            raise UserError(error_text[0])
    try:
        yield
        error_text[0] = None
    except UserError as error:
        error_text[0] = str(error)
        raise
    finally:
        if rank() == 0 and world_size() > 1:
            dist.broadcast_object_list(error_text)


def all_mean(value: float) -> float:
    """Return the mean of `value` over all processes."""
    return sum(of_all(value)) / world_size()


def shard(network: Network, device: torch.device) -> None:
    """Shard every weight over all processes. Each block gathers its weights when it runs (FSDP2).

    Modulations are sharded on their own, since they run before their blocks.
    """
    mesh = init_device_mesh(device.type, (world_size(),))
    shard_weights.shard(network, mesh, (*shard_weights.UNITS, Modulation3))


def share_tokens(network: Network, processes: int, device: torch.device) -> None:
    """Let neighbouring processes, as many as `processes`, each compute a part of the tokens."""
    shape = world_size() // processes, processes
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=("data", "context"))
    ContextParallel(mesh.get_group("context"), gradients=True)(network)


def full_tensor(x: Tensor) -> Tensor:
    """Gather a sharded tensor. All processes must call this function."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def to_local(x: Tensor) -> Tensor:
    """Return this process's shard of a tensor."""
    return x.to_local() if isinstance(x, DTensor) else x


def distribute_like(x: Tensor, like: Tensor) -> Tensor:
    """Move a full tensor to the device of `like`, and shard `x` if `like` is sharded."""
    x = x.to(like.device)
    if isinstance(like, DTensor):
        return distribute_tensor(x, like.device_mesh, like.placements)
    return x
