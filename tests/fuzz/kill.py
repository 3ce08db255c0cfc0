"""Run a script of this project in a process of its own, and kill the process on the way.

A process is killed just before it changes a file for the n-th time (`change`), at byte n of a file
that it writes (`byte`), or after some time (`seconds`). All but the last are exact.
"""

import io
import multiprocessing
import os
import resource
import signal
import sys
import threading
import time
from pathlib import Path
from typing import NamedTuple

CHANGES = ("os.rename", "os.link", "os.remove", "os.mkdir", "os.rmdir", "os.chmod", "os.truncate")
PRELOADED = [
    "torch._dynamo",
    "flux.parity.golden_kit",
    "flux.parity.tolerances",
    "flux.training.loss",
]
WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


class Kill(NamedTuple):
    """Where to kill a process; nowhere by default."""

    change: int | None = None
    byte: int | None = None
    seconds: float | None = None


NOWHERE = Kill()


class Ended(NamedTuple):
    """How a process ended: its exit code or minus a signal, its changes of files, its time."""

    code: int
    changes: int
    seconds: float
    output: str


def run(folder: Path, command: list[str], kill: Kill = NOWHERE) -> Ended:
    """Run scripts/COMMAND in `folder` until it ends or is killed."""
    context = multiprocessing.get_context("forkserver")  # processes with torch imported already
    context.set_forkserver_preload(PRELOADED)
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(folder, command, kill, sender))
    process.start()
    sender.close()
    try:
        changes, seconds, output = receiver.recv()
    except EOFError:  # killed
        changes, seconds, output = 0, 0.0, ""
    process.join()
    return Ended(process.exitcode or 0, changes, seconds, output)


def _child(folder: Path, command: list[str], kill: Kill, sender) -> None:
    import torch
    from support.load_script import SCRIPTS

    torch.set_num_threads(1)
    os.environ |= {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    os.environ.pop("FLUX_WEIGHTS", None)
    os.chdir(folder)
    printed = Printed()
    sys.stdout = sys.stderr = printed
    name, *arguments = command
    sys.argv = [str(SCRIPTS / f"{name}.py"), *arguments]
    sys.path[:0] = [str(SCRIPTS)]
    module = __import__(name)
    if name == "train":
        module.can_plot = lambda: False  # importing matplotlib takes a second
        module.check_memory = lambda *_: None  # which takes longer than these steps
    changes, start = _count_changes(folder, kill.change), time.monotonic()
    if kill.byte is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_DFL)  # which Python ignores
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_FSIZE, (kill.byte, kill.byte))
    if kill.seconds is not None:
        timer = threading.Timer(kill.seconds, os.kill, (os.getpid(), signal.SIGKILL))
        timer.daemon = True
        timer.start()
    code = module.main()
    sender.send((changes[0], time.monotonic() - start, printed.getvalue()))
    sender.close()
    os._exit(code)


class Printed(io.StringIO):
    """Standard output and standard error, which keep their text."""

    def reconfigure(self, **_) -> None: ...


def _count_changes(folder: Path, last: int | None) -> list[int]:
    """Count what this process changes in `folder` from now on; kill it before change `last`."""
    count, inside = [0], str(folder)

    def hook(event: str, arguments: tuple) -> None:
        if event == "open":
            changes = bool(arguments[2] & WRITING)
        else:
            changes = event in CHANGES
        if changes and os.path.abspath(os.fsdecode(arguments[0])).startswith(inside):
            count[0] += 1
            if count[0] == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(hook)
    return count
