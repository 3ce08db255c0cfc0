"""The processes of torchrun: join them, let the first one act for all, end all if one fails."""

import hashlib
import os
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from flux.errors import UserError
from flux.runtime.devices import choose_device

TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
TIMEOUT = timedelta(minutes=30)  # of a collective: others may load, or download, meanwhile
SECONDS = 5.0  # that a failed process waits at most until another one has said why
PART, PARTS, WHOLE = 2**16, 64, 2**24  # of files that are compared: bytes, parts, bytes
T = TypeVar("T")

_store: dist.Store | None = None  # of the process group; torchrun's own outlives its processes


def started_by_torchrun() -> bool:
    """Return whether torchrun started this process."""
    return all(name in os.environ for name in TORCHRUN)


def join(device: str | None = None) -> str | None:
    """Join the processes that torchrun started; return the device of this one.

    UserError if the device is not available, or is one on which processes cannot work together.
    """
    global _store
    if not started_by_torchrun():
        return device
    if device is not None and device.startswith("cuda:") and os.environ["WORLD_SIZE"] != "1":
        raise UserError(f"device: each process has a GPU of its own (got {device}). Use cuda.")
    if device in (None, "cuda") and torch.cuda.is_available():
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    kind = choose_device(device).type
    if kind not in ("cpu", "cuda"):
        raise UserError(f"device: several processes need CPUs or NVIDIA GPUs (got {kind}).")
    if kind == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized():
        _store, number, count = next(dist.rendezvous("env://", timeout=TIMEOUT))
        dist.init_process_group(  # objects and features travel over the hosts
            "cpu:gloo,cuda:nccl" if kind == "cuda" else "gloo",
            store=_store,
            rank=number,
            world_size=count,
            timeout=TIMEOUT,
        )
    return device


def has_joined() -> bool:
    """Return whether this process works with others."""
    return dist.is_initialized()


def leave() -> None:
    """Leave the other processes, if there are any."""
    global _store
    if dist.is_initialized():
        dist.destroy_process_group()
    _store = None


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def world_size() -> int:
    """Return the number of processes."""
    return dist.get_world_size() if dist.is_initialized() else 1


def by_first(function: Callable[[], T]) -> T:
    """Return, in every process, what `function` returns in the first one, which alone calls it.

    What it raises is raised in every process. The result must be of a kind that can be pickled.
    """
    if world_size() == 1:
        return function()
    outcome: list[Any] = [None, None]
    if rank() == 0:
        try:
            outcome[0] = function()
        except Exception as error:
            known = isinstance(error, UserError)
            outcome[1] = error if known else RuntimeError(f"process 0: {error}")
            dist.broadcast_object_list(outcome, src=0)
            raise
    dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise outcome[1]
    return outcome[0]


def of_all(value: T) -> list[T]:
    """Return the values of all processes, in their order. All processes must call this function.

    The values must be of a kind that can be pickled.
    """
    if world_size() == 1:
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def require_equal(what: str, values: Mapping[str, object]) -> None:
    """Raise UserError, in every process, if a value is not the same in all of them.

    what: "files", for example. The sentence names the process and the values that differ.
    """
    everywhere = of_all(dict(values))
    first = everywhere[0]
    for number, other in enumerate(everywhere):
        names = [name for name in first.keys() | other.keys() if first.get(name) != other.get(name)]
        if names:
            raise UserError(
                f"parallel: process {number} has other {what} than process 0: "
                f"{', '.join(sorted(names))}. Give all processes the same."
            )


def fingerprint(path: Path) -> str:
    """Return a hash of a file: of all its bytes if it is small, else of its size and some parts.

    Weights that were trained further differ in almost all bytes.
    """
    size, found = path.stat().st_size, hashlib.sha256()
    found.update(str(size).encode())
    with path.open("rb") as file:
        for start in range(0, size, PART if size <= WHOLE else size // PARTS):
            file.seek(start)
            found.update(file.read(PART))
    return found.hexdigest()


def is_first_failure(lost: bool = False) -> bool:
    """Return whether this process is the one to say why the run fails; else another one has said.

    lost: another process has gone, which has said why, if it could. Else the first process has a
    second's start: what is wrong everywhere is said by the first.
    """
    if _store is None or world_size() == 1:
        return True
    deadline = time.monotonic() + SECONDS
    try:
        if rank() and not lost:
            _wait_for("failed", time.monotonic() + 1)
        if _store.add("failed", 1) == 1:
            return True
        _wait_for("said", deadline)  # else torchrun might stop that process before
    except RuntimeError:  # the store has gone, with the first process
        return not lost
    return False


def failure_said() -> None:
    """Let the other processes know that the reason of the failure has been printed."""
    if _store is not None:
        try:
            _store.set("said", "1")
        except RuntimeError:
            pass


def _wait_for(key: str, deadline: float) -> None:
    assert _store is not None
    while time.monotonic() < deadline and not _store.check([key]):
        time.sleep(0.02)
