"""A program for torchrun, or for one process: run scripts/sample.py several times.

Its argument is a JSON file: {"runs": lists of arguments, "of_process_1": what that process does
instead in the last run}. Each process writes its exit codes to codes.RANK.json.
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
            if how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise NonFiniteError("latents: not finite here")
        return call(self, x, t)

    velocity.Velocity.__call__ = failing


def main() -> int:
    import sample

    work, number = json.loads(Path(sys.argv[1]).read_text()), os.environ.get("RANK", "0")
    written = Path(f"codes.{number}.json").absolute()
    other, codes = work.get("of_process_1", {}) if number == "1" else {}, []
    for count, arguments in enumerate(work["runs"], start=1):
        if count == len(work["runs"]):
            arguments = other.get("arguments", arguments)
            os.chdir(other.get("folder", "."))
            if "fails" in other:
                fail_in_step_two(other["fails"])
        sys.argv = ["sample.py", *arguments]
        codes.append(sample.main())
        written.write_text(json.dumps(codes))
    return codes[-1]


if __name__ == "__main__":
    sys.exit(main())
