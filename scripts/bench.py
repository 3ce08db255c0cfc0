"""What things cost, measured on this machine.

    python scripts/bench.py                what a start costs: imports, and the toy's first picture, each in a fresh process
    python scripts/bench.py --references   what it saves to compute reference pictures once, at the width of klein 9B

What is compared takes turns, forwards and backwards (A B C C B A), so that a machine that slows down slows all; medians.
"""

import argparse
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import date
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
USE = "import flux; flux.MODELS; flux.load"  # the names, not just the package, whose own import does nothing
IMPORTS = {"import torch": "import torch", "import flux": USE, "diffusers": "from diffusers import FluxPipeline"}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--references", action="store_true", help="reference pictures, with and without a cache")
    parser.add_argument("--rounds", type=int, default=3, metavar="N", help="each runs everything twice (default: 3)")
    args = parser.parse_args()
    print(f"torch {version('torch')}, Python {platform.python_version()}, {processor()}, {date.today()}\n")
    return references(args.rounds) if args.references else start(args.rounds)


def start(rounds: int) -> int:
    with tempfile.TemporaryDirectory() as folder:
        sample = [str(ROOT / "scripts" / "sample.py"), "a red circle on a white background", "--output", f"{folder}/a.png"]
        commands = {name: ["-c", code] for name, code in IMPORTS.items() if name != "diffusers" or installed("diffusers")}
        commands["prompt to picture"] = sample
        seconds: dict[str, list[float]] = {name: [] for name in commands}
        for name in commands:
            run(commands[name])  # once unmeasured, so that files are in the page cache
        for _ in range(rounds):
            for name in [*commands, *reversed(commands)]:
                seconds[name].append(run(commands[name]))

    medians = {name: statistics.median(values) for name, values in seconds.items()}
    print("| command | seconds | over `import torch` |\n|---|---|---|")
    for name, median in medians.items():
        print(f"| {name} | {median:.2f} | {median / medians['import torch']:.2f} |")
    return 0


def references(rounds: int) -> int:
    """Four steps at 512x512 of klein 9B, cut to one double and one single block, with references as large as the picture."""
    import torch

    from flux.configs import KLEIN_9B
    from flux.transformer import Flux

    config = replace(KLEIN_9B, depth=1, depth_single=1)
    torch.manual_seed(0)
    with torch.device("meta"):
        model = Flux(config)
    model = model.to_empty(device="cpu").to(torch.bfloat16).requires_grad_(False)
    for p in model.parameters():
        p.normal_(std=p[0].numel() ** -0.5) if p.ndim > 1 else p.fill_(1)

    print("| references | 4 steps | computed once | gain | gain in FLOPs | share reached | FLOPs of the whole model at 1 MP |")
    print("|---|---|---|---|---|---|---|")
    for count in (1, 2, 4):
        seconds = {cached: [] for cached in (False, True)}
        generate(model, 32, count, cached=True)  # once unmeasured
        for _ in range(rounds):
            for cached in (False, True, True, False):
                begun = time.perf_counter()
                generate(model, 32, count, cached)
                seconds[cached].append(time.perf_counter() - begun)
        plain, cached = (statistics.median(seconds[cached]) for cached in (False, True))
        due, whole = flop_gain(config, 32, count), flop_gain(KLEIN_9B, 64, count)
        print(f"| {count} | {plain:.1f} s | {cached:.1f} s | {plain / cached:.2f} | {due:.2f} | {plain / cached / due:.2f} "
              f"| {whole:.2f} |", flush=True)  # fmt: skip
    return 0


def flop_gain(config, side: int, count: int) -> float:
    """FLOPs of four steps, plain over cached, counted by torch on the meta device."""
    import torch
    from torch.utils.flop_counter import FlopCounterMode

    from flux.transformer import Flux

    with torch.device("meta"):
        model = Flux(config)
    totals = []
    for cached in (False, True):
        with FlopCounterMode(display=False) as counter:
            generate(model, side, count, cached)
        totals.append(counter.get_total_flops())
    return totals[0] / totals[1]


def generate(model, side: int, count: int, cached: bool, steps: int = 4) -> None:
    """Four steps of side² image tokens with 512 of text and `count` references of the same size; values do not matter."""
    import torch

    from flux import sampling

    weight, axes = model.img_in.weight, len(model.config.axes_dim)
    random = lambda n, width: torch.randn(1, n, width, dtype=weight.dtype, device=weight.device)  # noqa: E731
    img, txt = random(side**2, model.config.in_channels), random(512, model.config.context_dim)
    references = random(count * side**2, model.config.in_channels)
    img_ids, txt_ids = sampling.image_ids(side, side, axes), sampling.text_ids(512, axes)
    ids = torch.cat([sampling.image_ids(side, side, axes, t=10 * k) for k in range(1, count + 1)])
    turned = lambda *ids: model.rope(*ids).to(weight.device)  # noqa: E731
    vec = lambda t: model.vec(torch.full((1,), t, device=weight.device))  # noqa: E731
    memories = model.remember(references, turned(ids[:0], ids), vec(0.0)) if cached else None
    rope = turned(txt_ids, img_ids if cached else torch.cat([img_ids, ids]))
    for step in range(steps):
        tokens = img if cached else torch.cat([img, references], dim=1)
        model.velocity(tokens, txt, rope, vec(1 - step / steps), memories)


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
