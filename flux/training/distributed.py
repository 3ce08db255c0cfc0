"""Training by several processes, which torchrun starts: each has a part of every weight (FSDP2), and a share of every batch.

Where there is one process, everything here does nothing.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

from flux.errors import UserError
from flux.runtime.devices import choose_device
from flux.transformer import DoubleStreamBlock, Flux, Modulation, SingleStreamBlock


def join(device: str | None) -> str | None:
    """If torchrun started this process, be one of many from here on; returns its device. UserError if it is not there."""
    if not {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return device
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    if device is not None and choose_device(device).type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        "nccl" if device and device.startswith("cuda") else "gloo", timeout=timedelta(days=1)
    )
    return device


def leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


@contextmanager
def one_before_the_others() -> Iterator[None]:
    """The first process does what stands in the block, and then the others; where it has a UserError, all have it."""
    told: list[str | None] = ["the first process was stopped"]
    if rank() > 0:
        dist.broadcast_object_list(told)
        if told[0] is not None:
            raise UserError(told[0])
    try:
        yield
        told[0] = None
    except UserError as error:
        told[0] = str(error)
        raise
    finally:
        if rank() == 0 and world() > 1:
            dist.broadcast_object_list(told)


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def world() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def mean_of_all(value: float) -> float:
    """Over all processes."""
    if world() == 1:
        return value
    each = [None] * world()
    dist.all_gather_object(each, value)
    return sum(each) / world()


def shard(network: Flux, device: torch.device) -> None:
    """Each process keeps a part of each weight, and gathers those of a block when it is its turn (FSDP2).

    Modulators, which are used before their blocks, are gathered on their own.
    """
    mesh = init_device_mesh(device.type, (world(),))
    for module in reversed(list(network.modules())):  # what is within comes first
        if isinstance(module, Flux | DoubleStreamBlock | SingleStreamBlock | Modulation):
            fully_shard(module, mesh=mesh)


def whole(x: Tensor) -> Tensor:
    """Of a tensor of which each process has a part; all must ask for it."""
    return x.full_tensor() if isinstance(x, DTensor) else x


def own(x: Tensor) -> Tensor:
    """This process's part."""
    return x.to_local() if isinstance(x, DTensor) else x


def part(x: Tensor, like: Tensor) -> Tensor:
    """A whole tensor -> on the device of another, and in parts if that is."""
    x = x.to(like.device)
    return (
        distribute_tensor(x, like.device_mesh, like.placements) if isinstance(like, DTensor) else x
    )
