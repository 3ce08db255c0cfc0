"""Weak scaling of batch.py: images a second of several workers, each with as many lines.

python scripts/benchmarks/batch_scaling.py --workers 1 2 --lines 128

Each worker is a process with one thread. Its start is left out: the rate is that between the first
and the last image of a run.
"""

import argparse
import json
import os
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

SCRIPTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(SCRIPTS.parent), str(SCRIPTS)]

from modules.command_line import Parser, exit_code, show

FLAGS = {"workers": "--workers", "lines": "--lines"}


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    p.add_argument("--workers", type=int, nargs="+", default=[1, 2], metavar="N",
                   help="numbers of processes (default: 1 2)")  # fmt: skip
    p.add_argument("--lines", type=int, default=128, metavar="N",
                   help="lines for each worker, 64 a block (default: 128)")  # fmt: skip
    p.add_argument("--size", type=int, default=64, help="side in pixels (default: 64)")
    p.add_argument("--steps", type=int, default=4, help="default: 4")
    return p


def main() -> int:
    args = parser().parse_args()
    return exit_code(lambda: run(args), FLAGS, "standard output", "stopped")


def run(args: argparse.Namespace) -> int:
    from benchmarks.rows import Report
    from flux.errors import UserError

    if min(args.workers) < 1 or args.lines < 2:
        raise UserError("workers: at least 1, with at least 2 lines each, are needed.")
    Report(shlex.join(["batch_scaling.py", *sys.argv[1:]]), "cpu").print_heading()
    columns = "| workers | images | images a second | of the first row's, a worker |"
    show("", columns, "|---|---|---|---|")
    first = None
    for workers in args.workers:
        count, rate = measure(workers, args)
        first = first or rate / workers
        show(f"| {workers} | {count} | {rate:.3g} | {rate / workers / first:.2f} |")
    return 0


def measure(workers: int, args: argparse.Namespace) -> tuple[int, float]:
    """Run so many workers on one manifest; return the number of images, and images a second."""
    with tempfile.TemporaryDirectory() as name:
        folder, size = Path(name), {"width": args.size, "height": args.size, "steps": args.steps}
        lines = (
            json.dumps({"prompt": f"a red star {number}"} | size)
            for number in range(workers * args.lines)
        )
        (folder / "m.jsonl").write_text("".join(f"{line}\n" for line in lines))
        command = [sys.executable, SCRIPTS / "batch.py", "m.jsonl", "out", "--device", "cpu"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        started = [
            subprocess.Popen(
                [*command, "--shard", f"{number}/{workers}"],
                cwd=folder,
                env=environment,
                stderr=subprocess.DEVNULL,
            )
            for number in range(workers)
        ]
        try:
            codes = [process.wait() for process in started]
        finally:
            for process in started:
                process.kill()
        if any(codes):
            raise OSError(f"a worker ended with exit code {max(codes)}")
        times = sorted(image.stat().st_mtime for image in folder.glob("out/0*/*.png"))
    return len(times), (len(times) - 1) / (times[-1] - times[0])


if __name__ == "__main__":
    sys.exit(main())
