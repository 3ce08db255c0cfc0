"""What a start costs: imports, and the first picture of the embedded toy, each in a fresh process.

    python scripts/bench.py

The commands take turns, forwards and backwards (A B C C B A), so that a machine that slows down slows all of them; medians.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
USE = "import flux; flux.MODELS; flux.load"  # the names, not just the package, whose own import does nothing
IMPORTS = {"import torch": "import torch", "import flux": USE, "diffusers": "from diffusers import FluxPipeline"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="each runs every command twice (default: 3)")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        sample = [str(ROOT / "scripts" / "sample.py"), "a red circle on a white background", "--output", f"{folder}/a.png"]
        commands = {name: ["-c", code] for name, code in IMPORTS.items() if name != "diffusers" or installed("diffusers")}
        commands["prompt to picture"] = sample
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for name in commands:
            run(commands[name])  # once unmeasured, so that files are in the page cache
        for _ in range(args.rounds):
            for name in [*commands, *reversed(commands)]:
                seconds[name].append(run(commands[name]))

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"torch {version('torch')}, Python {platform.python_version()}, {processor()}, {date.today()}\n")
    print("| command | seconds | over `import torch` |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / medians['import torch']:.2f} |")
    return 0


def run(arguments: list[str]) -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, capture_output=True)
    return time.perf_counter() - start


def installed(package: str) -> bool:
    try:
        return bool(version(package))
    except PackageNotFoundError:
        return False


def processor() -> str:
    info = Path("/proc/cpuinfo")
    names = (
        [line.split(": ")[1] for line in info.read_text().splitlines() if line.startswith("model name")]
        if info.exists()
        else []
    )
    return f"{names[0]}, {len(names)} cores" if names else platform.processor()


if __name__ == "__main__":
    sys.exit(main())
