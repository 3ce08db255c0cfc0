"""A program for torchrun, or for one process: run scripts/sample.py several times.

Its argument is a JSON file: a list of runs, each with its "arguments" and, as "of_process_1", what
that process does instead. Each process writes its exit codes to codes.RANK.json.
"""

import json
import os
import signal
import sys
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]


def fail_in_step_two(how: str) -> None:
    """Kill this process, or raise, in the second step."""
    from flux import velocity
    from flux.errors import NonFiniteError

    call, steps = velocity.Velocity.__call__, []

    def failing(self, x, t):
        steps.append(t)
        if len(steps) == 2:
            Path("failed").touch()
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise NonFiniteError("latents: not finite here")
        return call(self, x, t)

    velocity.Velocity.__call__ = failing


def forget_failure() -> None:
    """Let the next run fail, too: a real one would be the last of its processes."""
    import torch.distributed as dist

    from flux.runtime import processes

    if processes.world_size() > 1:
        dist.barrier()
        if processes.rank() == 0:
            processes._store.delete_key("failed")
            processes._store.delete_key("said")
        dist.barrier()


def main() -> int:
    import sample

    runs, number = json.loads(Path(sys.argv[1]).read_text()), os.environ.get("RANK", "0")
    home, codes = Path.cwd(), []
    written = home / f"codes.{number}.json"
    for run in runs:
        if codes and codes[-1] not in (0, 3):
            forget_failure()
        other = run.get("of_process_1", {}) if number == "1" else {}
        os.chdir(other.get("folder", home))
        if "fails" in other:
            fail_in_step_two(other["fails"])
        sys.argv = ["sample.py", *map(str, other.get("arguments", run["arguments"]))]
        codes.append(sample.main())
        written.write_text(json.dumps(codes))
    return codes[-1]


if __name__ == "__main__":
    sys.exit(main())
