"""The cost of a start, in new processes: imports, the toy's first image, loading."""

import statistics
import subprocess
import sys
from collections.abc import Callable, Iterator
from itertools import pairwise
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
    # the names too: the import of the package alone does nothing
    "import flux": "import flux; flux.MODELS; flux.load",
    "import diffusers": "from diffusers import FluxPipeline",
}
IMAGES = 9  # of a run under torchrun
LINUX = Path("/proc/self/status").exists()  # the kernel's report of a process's memory
PEAK = """
for line in open("/proc/self/status"):
    if line.startswith("VmHWM"):
        print(line.split()[1])
"""


def start_rows(setting: Setting) -> Iterator[Row]:
    """Time `import flux`, and the toy's first image, over `import torch` alone."""
    commands = {}
    for name, code in IMPORTS.items():
        if name != "import diffusers" or installed("diffusers"):
            commands[name] = ["-c", code]
    with TemporaryDirectory() as folder:
        script = Path(__file__).parents[1] / "sample.py"
        sample = [str(script), "a red circle on a white background"]
        commands["sample.py, prompt to image"] = [*sample, "--output", f"{folder}/a.png"]
        seconds, _ = in_turn(commands, setting.rounds)
    torch_alone, runs = seconds.pop("import torch"), 2 * setting.rounds
    for name, median in seconds.items():
        goal = 1.10 if name == "import flux" else None
        yield Row(name, "s", median, torch_alone, "import torch", goal=goal, runs=runs)


def cold_rows(setting: Setting) -> Iterator[Row]:
    """Compare the imports with diffusers': time, and peak memory of the process."""
    commands = {name: ["-c", code + PEAK if LINUX else code] for name, code in IMPORTS.items()}
    seconds, printed = in_turn(commands, setting.rounds)
    ours, theirs, runs = seconds["import flux"], seconds["import diffusers"], 2 * setting.rounds
    alone = seconds["import torch"]
    yield Row("cold start, import", "s", ours, theirs, goal=0.40, runs=runs)
    yield Row("cold start, import", "s", ours, alone, "import torch", goal=1.10, runs=runs)
    if LINUX:
        names = "import flux", "import diffusers"
        peaks = [1024 * statistics.median(map(int, printed[name])) for name in names]
        yield Row("cold start, memory", "B", *peaks, goal=0.65, runs=runs)


def torchrun_rows(setting: Setting) -> Iterator[Row]:
    """Compare one process of torchrun with a plain run: an image, and the whole command.

    The time of an image is that between two files; the start, where torchrun takes longer, is not
    in it.
    """
    script, torchrun = Path(__file__).parents[1] / "sample.py", "-m torch.distributed.run"
    with TemporaryDirectory() as folder:
        sample = [str(script), "a red circle", "--output", f"{folder}/a.png"]
        sample += ["--num-images", str(IMAGES), "--device", setting.device.type]
        alone = [*torchrun.split(), "--standalone", "--nproc-per-node", "1", *sample]
        whole, printed = in_turn({"torchrun": alone, "plain": sample}, setting.rounds)
        image = [
            statistics.median(map(seconds_of_an_image, printed[name]))
            for name in ("torchrun", "plain")
        ]
    against, runs = "a plain run", 2 * setting.rounds
    yield Row("an image, under torchrun", "s", *image, against, goal=1.02, runs=runs)
    command = f"the command of {IMAGES} images, under torchrun"
    yield Row(command, "s", whole["torchrun"], whole["plain"], against, runs=runs)


def seconds_of_an_image(paths: str) -> float:
    """Return the median seconds between the files of a run, which printed their paths."""
    times = [Path(path).stat().st_mtime for path in paths.splitlines()]
    return statistics.median(after - before for before, after in pairwise(times))


def in_turn(
    commands: dict[str, list[str]], rounds: int
) -> tuple[dict[str, float], dict[str, list[str]]]:
    """Return the median seconds of Python processes, and what they print, by name.

    Each runs once before, so that files are in the page cache.
    """
    seconds: dict[str, list[float]] = {name: [] for name in commands}
    printed: dict[str, list[str]] = {name: [] for name in commands}
    for command in commands.values():
        run(command)
    for _ in range(rounds):
        for name in [*commands, *reversed(commands)]:
            took, line = run(commands[name])
            seconds[name].append(took)
            printed[name].append(line)
    return {name: statistics.median(each) for name, each in seconds.items()}, printed


def run(arguments: list[str]) -> tuple[float, str]:
    """Run Python and return its seconds and its output. UserError if it fails."""
    start = perf_counter()
    done = subprocess.run([sys.executable, *arguments], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        last_line = done.stderr.strip().splitlines()[-1]
        raise UserError(f"{' '.join(arguments):.120} failed: {last_line:.200}")
    return perf_counter() - start, done.stdout


def load_rows(setting: Setting) -> Iterator[Row]:
    """Load a transformer's file: seconds, and memory that is not pages of the file.

    Each side loads in a process of its own.
    """
    config = setting.cut(KLEIN_4B)
    with (
        TemporaryDirectory() as folder,
        get_context("spawn").Pool(1) as our_process,
        get_context("spawn").Pool(1) as their_process,
    ):
        ours, theirs = Path(folder, "ours.safetensors"), Path(folder, "theirs")
        kind = write(config, ours, theirs)

        def load(k: int) -> tuple[float, int]:
            if k == 0:
                return our_process.apply(load_ours, (config, ours))
            return their_process.apply(load_theirs, (kind, theirs))

        load(0), load(1)  # they import what they need
        measured: tuple[list, list] = [], []
        for k in [0, 1, 1, 0] * setting.rounds:
            measured[k].append(load(k))
        size = ours.stat().st_size
    case, runs = f"load, {shown(size, 'B')} of bfloat16", 2 * setting.rounds
    seconds, growth = [], []
    for each in measured:
        all_seconds, all_growth = zip(*each)
        seconds.append(statistics.median(all_seconds))
        growth.append(statistics.median(all_growth) / size)
    yield Row(case, "s", *seconds, goal=1.0, runs=runs)
    if LINUX:
        name = f"{case}, anonymous memory over the file's size"
        yield Row(name, "", *growth, limit=0.02, runs=runs)


def write(config: FluxConfig, ours: Path, theirs: Path) -> type:
    """Write the same random weights for both, in one file each. Return diffusers' class."""
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
    """Return the seconds, and the bytes of anonymous memory that the process gained."""
    before, start = anonymous(), perf_counter()
    model = load()
    seconds, growth = perf_counter() - start, anonymous() - before
    del model  # not before its memory is measured
    return seconds, growth


def anonymous() -> int:
    return resident().anonymous if LINUX else 0
