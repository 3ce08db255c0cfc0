"""Processes of one gloo group that wait for functions to call: started once for many cases."""

import multiprocessing
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

PRELOADED = ["torch.distributed.device_mesh", "flux.loading", "support.parallel_cases"]
SECONDS = 300  # of a list of cases on a busy machine; a hang is a failure


class Processes:
    """Call functions of a module in `count` processes; a context manager."""

    def __init__(self, count: int, folder: Path):
        context = multiprocessing.get_context("forkserver")  # with torch imported already
        context.set_forkserver_preload(PRELOADED)
        self.pipes, self.processes = [], []
        for rank in range(count):
            ours, theirs = context.Pipe()
            arguments = theirs, rank, count, str(folder / "rendezvous")
            process = context.Process(target=_work, args=arguments, daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def __call__(self, function: Callable, *arguments: Any) -> list[Any]:
        """Return what `function(*arguments)` returns in each process."""
        for pipe in self.pipes:
            pipe.send((function, arguments))
        deadline, results = time.monotonic() + SECONDS, []
        for pipe in self.pipes:
            if not pipe.poll(max(0, deadline - time.monotonic())):
                raise TimeoutError("a process did not answer")
            results.append(pipe.recv())
        for _result, error in results:
            assert error is None, error
        return [result for result, _ in results]

    def __enter__(self) -> "Processes":
        return self

    def __exit__(self, *_: object) -> None:
        for pipe in self.pipes:
            pipe.close()  # which ends the process
        for process in self.processes:
            process.join(5)
            process.kill()


def _work(pipe: Any, rank: int, count: int, rendezvous: str) -> None:
    import torch
    import torch.distributed as dist

    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=count)
    while True:
        try:
            function, arguments = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(*arguments), None))
        except Exception:
            pipe.send((None, traceback.format_exc()))
