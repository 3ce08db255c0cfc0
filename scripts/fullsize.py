"""A transformer at its full size without its weights: does it load mapped, in no memory of its own, and does it run?

    python scripts/fullsize.py                                           klein 4B: 7.75 GB of disk, a few minutes
    python scripts/fullsize.py --model flux.2-tiny --folder /tmp/tiny    the same in a second

The file is named and laid out as the released one, and filled with random bfloat16; a file that is already there is taken as
it is, and none is deleted. A fresh process then loads it as flux.load does, and makes one step at 256x256 on the CPU.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from datetime import date
from multiprocessing import get_context
from pathlib import Path
from time import perf_counter

import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from flux import sampling  # noqa: E402
from flux.configs import ModelSpec  # noqa: E402
from flux.errors import UserError  # noqa: E402
from flux.models import find_spec  # noqa: E402
from flux.transformer import Flux, FluxConfig  # noqa: E402
from flux.weights import load_module  # noqa: E402

SIDE = 256 // 16  # tokens


def main() -> int:
    what = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what.add_argument("--model", default="flux.2-klein-4b", help="a name of flux.MODELS (default: flux.2-klein-4b)")
    what.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir()) / "flux-fullsize", help="for the file")
    args = what.parse_args()
    try:
        spec = find_spec(args.model)
        path = args.folder / spec.transformer_file
        written = write(path, on_meta(spec.transformer))
        with get_context("spawn").Pool(1) as fresh:
            measured, finite = fresh.apply(measure, (spec, path))
    except (UserError, OSError) as error:
        print(f"fullsize.py: {error}", file=sys.stderr)
        return 2
    rows = [("what", f"{spec.name}, {path.stat().st_size / 1e9:.3f} GB"), *machine(), ("written", written), *measured]
    print("| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows))
    return 0 if finite else 1


def on_meta(config: FluxConfig) -> Flux:
    with torch.device("meta"):
        return Flux(config)


def write(path: Path, module: nn.Module) -> str:
    """Makes a safetensors file of random weights, tensor by tensor: the model is never in memory. Says how long it took."""
    if path.exists():
        return "no, it was there"
    header, end = {}, 0
    for name, like in module.state_dict().items():
        begin, end = end, end + 2 * like.numel()
        header[name] = {"dtype": "BF16", "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # so that the tensors are aligned, as in released files
    path.parent.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(path.parent).free) < end + 10**9:
        raise UserError(f"{path.parent} has {free / 1e9:.1f} GB free and {end / 1e9 + 1:.1f} are needed: give another --folder")
    start, generator, partial = perf_counter(), torch.Generator().manual_seed(0), path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for like in module.state_dict().values():
            mean = 1.0 if like.ndim == 1 else 0.0  # scales of norms, and biases
            tensor = torch.empty(like.shape, dtype=torch.bfloat16).normal_(mean, 0.02, generator=generator)
            file.write(tensor.view(torch.uint8).numpy())
    partial.replace(path)
    return f"in {perf_counter() - start:.1f} s"


@torch.inference_mode()
def measure(spec: ModelSpec, path: Path) -> tuple[list[tuple[str, str]], bool]:
    """The rows of the table on loading and on one step; whether its velocity is finite. To be run in a process of its own."""
    config, before, start = spec.transformer, anonymous(), perf_counter()
    model = on_meta(config)
    load_module(model, [path])
    seconds, after = perf_counter() - start, anonymous()
    growth = f"{(after - before) / 1e6:.1f} MB, {(after - before) / path.stat().st_size:.2%} of the file"

    random = lambda *shape: torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()  # noqa: E731
    axes = len(config.axes_dim)
    img, txt = random(1, SIDE**2, config.in_channels), random(1, spec.text_length, config.context_dim)
    ids = dict(img_ids=sampling.image_ids(SIDE, SIDE, axes), txt_ids=sampling.text_ids(spec.text_length, axes))
    guidance = torch.tensor([4.0]) if config.guidance else None
    vector = random(1, config.vector_dim) if config.vector_dim else None
    start = perf_counter()
    velocity = model(img=img, txt=txt, t=torch.ones(1), guidance=guidance, vector=vector, **ids)
    step, finite = perf_counter() - start, velocity.isfinite().all().item()
    rows = [
        ("loaded", f"in {seconds:.2f} s"),
        ("anonymous memory that loading took", growth),
        ("one step", f"in {step:.2f} s, {SIDE**2} image and {spec.text_length} text tokens, bfloat16"),
        ("anonymous memory after it", f"{(anonymous() - before) / 1e6:.1f} MB more than before loading"),
        ("velocity", f"{'finite' if finite else 'NOT FINITE'}, standard deviation {velocity.float().std():.3f}"),
    ]
    return rows, finite


def anonymous() -> int:
    """Bytes of memory that this process holds and no file backs (Linux only)."""
    status = Path("/proc/self/status")
    if not status.exists():
        raise UserError("memory is read from /proc/self/status, which only Linux has")
    return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith("RssAnon"))


def machine() -> list[tuple[str, str]]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(":")[1].strip() for line in info if line.startswith("model name")), platform.machine())
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = f"{name}, {os.cpu_count()} cores ({torch.get_num_threads()} used), {memory / 1e9:.0f} GB of memory"
    return [("machine", hardware), ("torch", torch.__version__), ("date", date.today().isoformat())]


if __name__ == "__main__":
    sys.exit(main())
