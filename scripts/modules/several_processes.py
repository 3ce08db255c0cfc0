"""sample.py on several processes of torchrun: the first one prints and writes for all of them.

Each process checks the request and the files. If one fails, one process says why, and all end.
"""

import argparse
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, TypeVar

from modules import command_line

T = TypeVar("T")
OF_EACH = {"device", "weights"}  # arguments that may differ between machines
OF_FIRST = (  # of results
    *("filter", "filter_weights", "judge_device", "review"),
    *("sign", "certificate", "sign_prompt"),
)
LOST = ("Connection closed", "Connection reset", "Broken pipe", "Timed out", "timed out", "NCCL")


def count() -> int:
    """Return the number of processes that torchrun started, 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def is_first() -> bool:
    return count() == 1 or os.environ["RANK"] == "0"


class OneOfSeveral(command_line.Speaker):
    """Lets the first process print, and the first failure be said by one process."""

    def __init__(self) -> None:
        self.quiet = not is_first()

    def claim_failure(self, lost: bool = False) -> str | None:
        from flux.runtime import processes

        if not processes.has_joined():
            if self.quiet:  # the first process fails for the same reason, and torchrun ends all
                time.sleep(2 * processes.SECONDS)
            return ""
        if not processes.is_first_failure(lost):
            return None
        return "" if is_first() else f"process {os.environ['RANK']}: "

    def failure_said(self) -> None:
        from flux.runtime import processes

        processes.failure_said()

    def is_lost(self, error: Exception) -> bool:
        return any(part in str(error) for part in LOST)


def start() -> None:
    """Let this process print only what it shall."""
    if count() > 1:
        command_line.speaker = OneOfSeveral()


def join(args: argparse.Namespace) -> None:
    """Join the other processes. UserError in all of them if their arguments differ."""
    from flux.errors import UserError

    if count() == 1:
        return
    if str(args.prompt_file) == "-":
        raise UserError("prompt_file: - is read by one process alone. Name a file.")
    from flux.runtime import processes

    args.device = processes.join(args.device)
    own = {name: repr(value) for name, value in vars(args).items() if name not in OF_EACH}
    processes.require_equal("arguments", own)
    given = [args.mask, args.latents, args.boxes, args.from_image, args.prompt_file, *args.image]
    require_equal_files((path.name, path) for path in given if path is not None)
    if not is_first():
        for name in OF_FIRST:
            setattr(args, name, None)


def require_equal_files(files: Iterable[tuple[str, Path]]) -> None:
    """UserError in all processes if they have other files under these names."""
    from flux.runtime.processes import fingerprint, require_equal

    require_equal("files", {name: fingerprint(path) for name, path in files if path.is_file()})


def by_first(function: Callable[[], T]) -> T:
    """Return, in all processes, what the first one alone computes."""
    if count() == 1:
        return function()
    from flux.runtime import processes

    return processes.by_first(function)


def choose(args: argparse.Namespace, use_cfg: bool, images: int, tokens: int) -> Any:
    """Return the sizes of the mesh of this run; None for a process that is alone."""
    if count() == 1 and args.shard_weights:
        from flux.errors import UserError

        raise UserError(
            "shard_weights: needs several processes. Start them with `torchrun --nproc-per-node 2`."
        )
    if count() == 1 and args.parallel is None:
        return None
    from flux.runtime import parallel

    given = {} if args.parallel is None else parallel.parse(args.parallel)
    sizes = parallel.choose(given, count(), use_cfg=use_cfg, images=images, tokens=tokens)
    return None if count() == 1 else sizes


def distribute(pipe: Any, sizes: Any, shard: bool, width: int, height: int) -> None:
    """Let a loaded pipeline work on the mesh; say how. Shard weights that would not fit whole."""
    if sizes is None:
        return
    from flux.runtime import parallel

    files: list[tuple[str, Path]] = [(f"lora {path.name}", path) for path in pipe.loras]
    for part in ("transformer", "autoencoder", "lora"):
        files += [(f"{part} {path.name}", path) for path in pipe.files.get(part, ())]
    require_equal_files(files)
    numbers = ""
    if not shard and sizes.tensor == 1:
        numbers = parallel.needs_shards(pipe, width, height)
    shard |= bool(numbers)
    parallel.distribute(pipe, sizes, shard_weights=shard)
    sharded = ", with sharded weights" if shard else ""
    command_line.say(
        f"parallel: {sizes}, on {count()} processes{sharded}{f' ({numbers})' if numbers else ''}"
    )


def leave() -> None:
    """Leave the other processes at the end of a run."""
    if count() > 1:
        from flux.runtime import processes

        processes.leave()
