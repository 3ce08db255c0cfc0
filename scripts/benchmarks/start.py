"""What a start costs, in fresh processes: imports, the toy's first picture, loading."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from safetensors.torch import save_file

from benchmarks.measure import resident
from benchmarks.rows import Row, installed, shown
from benchmarks.setting import Setting
from benchmarks.timing import random_weights
from flux.configs import KLEIN_4B
from flux.errors import UserError
from flux.transformer import Flux, FluxConfig
from flux.weights.load import load_module

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = {
    "import torch": "import torch",
    "import flux": "import flux; flux.MODELS; flux.load",  # the names, not just the package, whose own import does nothing
    "import diffusers": "from diffusers import FluxPipeline",
}
LINUX = Path("/proc/self/status").exists()  # where the kernel says what a process has in memory
PEAK = "; print(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"


def start_rows(setting: Setting) -> Iterator[Row]:
    """What it takes until flux is there, and until the toy's first picture is, over what torch takes alone."""
    with TemporaryDirectory() as folder:
        sample = [
            str(ROOT / "scripts/sample.py"),
            "a red circle on a white background",
            "--output",
            f"{folder}/a.png",
        ]
        commands = {
            name: ["-c", code]
            for name, code in IMPORTS.items()
            if name != "import diffusers" or installed("diffusers")
        }
        seconds, _ = in_turn(commands | {"sample.py, prompt to picture": sample}, setting.rounds)
    torch_alone = seconds.pop("import torch")
    for name, median in seconds.items():
        goal = 1.10 if name == "import flux" else None
        yield Row(
            name, "s", median, torch_alone, "import torch", goal=goal, runs=2 * setting.rounds
        )


def cold_rows(setting: Setting) -> Iterator[Row]:
    """Imports against diffusers': time, and the most memory that the process had."""
    commands = {name: ["-c", code + PEAK if LINUX else code] for name, code in IMPORTS.items()}
    seconds, printed = in_turn(commands, setting.rounds)
    ours, theirs = seconds["import flux"], seconds["import diffusers"]
    yield Row("cold start, import", "s", ours, theirs, goal=0.40, runs=2 * setting.rounds)
    yield Row(
        "cold start, import",
        "s",
        ours,
        seconds["import torch"],
        "import torch",
        goal=1.10,
        runs=2 * setting.rounds,
    )
    if LINUX:
        ours, theirs = (
            1024 * statistics.median(map(int, printed[name]))
            for name in ("import flux", "import diffusers")
        )
        yield Row("cold start, memory", "B", ours, theirs, goal=0.65, runs=2 * setting.rounds)


def in_turn(
    commands: dict[str, list[str]], rounds: int
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Median seconds of Python processes, and what they print; after each has run once, so that files are in the page cache."""
    seconds, printed = {name: [] for name in commands}, {name: [] for name in commands}
    for command in commands.values():
        run(command)
    for _ in range(rounds):
        for name in [*commands, *reversed(commands)]:
            took, line = run(commands[name])
            seconds[name].append(took)
            printed[name].append(line)
    return {name: statistics.median(each) for name, each in seconds.items()}, printed


def run(arguments: list[str]) -> tuple[float, str]:
    start = perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise UserError(
            f"{' '.join(arguments):.120} failed: {done.stderr.strip().splitlines()[-1]:.200}"
        )
    return perf_counter() - start, done.stdout


def load_rows(setting: Setting) -> Iterator[Row]:
    """Opening a transformer's file: seconds, and memory that is not the file's own pages. Each in a process of its own."""
    config = setting.cut(KLEIN_4B)
    with (
        TemporaryDirectory() as folder,
        get_context("spawn").Pool(1) as mine,
        get_context("spawn").Pool(1) as other,
    ):
        ours, theirs = Path(folder, "ours.safetensors"), Path(folder, "theirs")
        kind, measured = write(config, ours, theirs), ([], [])
        loads = [
            lambda: mine.apply(load_ours, (config, ours)),
            lambda: other.apply(load_theirs, (kind, theirs)),
        ]
        for load in loads:
            load()  # imports what it needs
        for k in [0, 1, 1, 0] * setting.rounds:
            measured[k].append(loads[k]())
        size = ours.stat().st_size
    case, runs = f"load, {shown(size, 'B')} of bfloat16", 2 * setting.rounds
    seconds, growth = zip(
        *([statistics.median(column) for column in zip(*each)] for each in measured)
    )
    yield Row(case, "s", *seconds, goal=1.0, runs=runs)
    if LINUX:
        shares = [grown / size for grown in growth]
        yield Row(
            f"{case}, anonymous memory over the file's size", "", *shares, limit=0.02, runs=runs
        )


def write(config: FluxConfig, ours: Path, theirs: Path) -> type:
    """The same random weights as each loads them best, in one file; returns the class that diffusers has for them."""
    from flux.parity.reference import diffusers_transformer, loaded, transformer_to_diffusers

    state = random_weights(lambda: Flux(config), "cpu", torch.bfloat16).state_dict()
    save_file(state, ours)
    model = loaded(diffusers_transformer(config), transformer_to_diffusers(state, config))
    model.save_pretrained(theirs, max_shard_size="100GB")
    return type(model)


def load_ours(config: FluxConfig, path: Path) -> tuple[float, int]:
    def load() -> Flux:
        with torch.device("meta"):
            model = Flux(config)
        load_module(model, [path])
        return model

    return cost(load)


def load_theirs(kind: type, path: Path) -> tuple[float, int]:
    return cost(lambda: kind.from_pretrained(path, torch_dtype=torch.bfloat16))


def cost(load: Callable[[], object]) -> tuple[float, int]:
    """Seconds, and by how many bytes the process grew."""
    before, start = anonymous(), perf_counter()
    model = load()
    seconds, growth = perf_counter() - start, anonymous() - before
    del model  # only now: what it takes has been seen
    return seconds, growth


def anonymous() -> int:
    return resident().anonymous if LINUX else 0
