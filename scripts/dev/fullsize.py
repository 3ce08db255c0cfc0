"""A transformer at its full size without its weights: does it load mapped, in no memory of its own, and run, and train?

    python scripts/dev/fullsize.py                                           klein base 4B: 7.75 GB of disk, a few minutes
    python scripts/dev/fullsize.py --lora-rank 16                            two steps of a LoRA of it
    python scripts/dev/fullsize.py --model flux.2-tiny --folder /tmp/tiny    the same as the first in a second

The file has the name and the layout of the released one, in bfloat16 whatever that is in, and random values; a file that is
already there is taken as it is, and none is deleted. A fresh process then loads it as flux.load does, and makes one step at
256x256 on the CPU; or it trains a LoRA as scripts/train.py --checkpointing does, on a drawn image of that size, and leaves
lora.safetensors there.
"""

import argparse
import json
import os
import platform
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import date
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from threading import Event, Thread
from time import perf_counter

import torch
from torch import Tensor, nn

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from benchmarks.measure import proc

from flux import sampling
from flux.configs import ModelSpec
from flux.errors import NonFiniteError, UserError
from flux.text_encoder import TextFeatures
from flux.training import loss as training
from flux.training.checkpoint import load_tensors, save_tensors
from flux.training.lora import LoRALinear, add_lora, lora_state_dict
from flux.training.memory import build_for_training, enable_gradient_checkpointing, estimate_memory
from flux.training.trainer import Trainer, make_optimizer, trainable_parameters, warmup_cosine
from flux.transformer import Flux
from flux.weights.load import init_empty, load_module
from flux.weights.locate import get_spec

SIDE = 256 // 16  # tokens
CPU = torch.device("cpu")


def main() -> int:
    what = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what.add_argument(
        "--model",
        default="flux.2-klein-base-4b",
        help="of flux.MODELS (default: flux.2-klein-base-4b)",
    )
    what.add_argument(
        "--lora-rank", type=int, metavar="R", help="train a LoRA of this rank, for two steps"
    )
    what.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "flux-fullsize",
        help="for the file",
    )
    args = what.parse_args()
    try:
        if args.lora_rank is not None and args.lora_rank < 1:
            raise UserError(f"--lora-rank {args.lora_rank}: must be at least 1")
        spec = get_spec(args.model)
        path = args.folder / spec.transformer_file
        written = write(path, init_empty(lambda: Flux(spec.transformer)))
        with get_context("spawn").Pool(1) as fresh:
            work = partial(train, rank=args.lora_rank) if args.lora_rank else measure
            measured, good = fresh.apply(work, (spec, path))
    except (UserError, NonFiniteError, OSError) as error:
        print(f"fullsize.py: {error}", file=sys.stderr)
        return 1 if isinstance(error, NonFiniteError) else 2
    rows = [
        ("what", f"{spec.name}, {path.stat().st_size / 1e9:.3f} GB"),
        *machine(),
        ("written", written),
        *measured,
    ]
    print("| | |\n| --- | --- |\n" + "\n".join(f"| {name} | {value} |" for name, value in rows))
    return 0 if good else 1


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
        raise UserError(
            f"{path.parent} has {free / 1e9:.1f} GB free and {end / 1e9 + 1:.1f} are needed: give another --folder"
        )
    start, generator, partial = (
        perf_counter(),
        torch.Generator().manual_seed(0),
        path.with_suffix(".partial"),
    )
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for like in module.state_dict().values():
            mean = 1.0 if like.ndim == 1 else 0.0  # scales of norms, and biases
            tensor = torch.empty(like.shape, dtype=torch.bfloat16).normal_(
                mean, 0.02, generator=generator
            )
            file.write(tensor.view(torch.uint8).numpy())
    partial.replace(path)
    return f"in {perf_counter() - start:.1f} s"


@torch.inference_mode()
def measure(spec: ModelSpec, path: Path) -> tuple[list[tuple[str, str]], bool]:
    """The rows of the table on loading and on one step; whether its velocity is finite. To be run in a process of its own."""
    config, before, start = spec.transformer, resident("RssAnon"), perf_counter()
    model = init_empty(lambda: Flux(config))
    load_module(model, [path])
    seconds, after = perf_counter() - start, resident("RssAnon")
    growth = (
        f"{(after - before) / 1e6:.1f} MB, {(after - before) / path.stat().st_size:.2%} of the file"
    )

    def random(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    axes = len(config.axes_dim)
    img, txt = (
        random(1, SIDE**2, config.in_channels),
        random(1, spec.text_length, config.context_dim),
    )
    ids = dict(
        img_ids=sampling.image_ids(SIDE, SIDE, axes),
        txt_ids=sampling.text_ids(spec.text_length, axes),
    )
    guidance = torch.tensor([4.0]) if config.guidance else None
    vector = random(1, config.vector_dim) if config.vector_dim else None
    start = perf_counter()
    velocity = model(img=img, txt=txt, t=torch.ones(1), guidance=guidance, vector=vector, **ids)
    step, finite = perf_counter() - start, velocity.isfinite().all().item()
    rows = [
        ("loaded", f"in {seconds:.2f} s"),
        ("anonymous memory that loading took", growth),
        (
            "one step",
            f"in {step:.2f} s, {SIDE**2} image and {spec.text_length} text tokens, bfloat16",
        ),
        (
            "anonymous memory after it",
            f"{(resident('RssAnon') - before) / 1e6:.1f} MB more than before loading",
        ),
        (
            "velocity",
            f"{'finite' if finite else 'NOT FINITE'}, standard deviation {velocity.float().std():.3f}",
        ),
    ]
    return rows, finite


def train(spec: ModelSpec, path: Path, rank: int) -> tuple[list[tuple[str, str]], bool]:
    """The rows on two steps of a LoRA; whether all of it, and nothing else, has moved. To be run in a process of its own."""
    torch.manual_seed(0)
    build = partial(build_for_training, spec.transformer, torch.bfloat16, rank)
    estimate = estimate_memory(
        spec, build, SIDE**2, 1, CPU, torch.bfloat16, ema=False, gradient_checkpointing=True
    )
    network = init_empty(lambda: Flux(spec.transformer))
    load_module(network, [path])
    add_lora(network, rank)
    enable_gradient_checkpointing(network)
    optimizer = make_optimizer("adamw", trainable_parameters(network).values(), 1e-4)
    trainer = Trainer(network, path.with_name("not saved"), {}, [optimizer], warmup_cosine(2))
    steps = []
    with watching("RssAnon") as held:
        for number in range(2):
            start = perf_counter()
            loss, length = trainer.update([partial(loss_of, spec, network, number)])
            steps.append(
                f"in {perf_counter() - start:.1f} s: loss {loss:.4f}, gradient {length:.4g} long"
            )

    def gb(size):
        return f"{size / 1e9:.3g}"

    peak = f"{gb(resident('VmHWM'))} GB resident, {gb(max(held))} GB of it anonymous; the rest is files' pages"
    rows = [
        (
            "to train",
            f"{sum(p.numel() for p in trainer.parameters.values()):,} parameters: a LoRA of rank {rank}",
        ),
        (
            "memory, told in advance",
            f"at least {gb(estimate.total)} GB: weights {gb(estimate.weights)}, gradients and the optimizer "
            f"{gb(estimate.states)}, activations {gb(estimate.activations)}",
        ),
        ("memory at its peak", peak),
        *zip(("first step", "second step"), steps, strict=True),
    ]
    found, good = result(network, path)
    return rows + found, good


def result(network: Flux, path: Path) -> tuple[list[tuple[str, str]], bool]:
    """The rows on what training has changed, and on the file of it."""
    layers = [layer for layer in network.modules() if isinstance(layer, LoRALinear)]
    moved = sum(layer.lora_B.weight.any().item() for layer in layers)  # they were 0
    kept = {
        name.replace(".base.", "."): p
        for name, p in network.named_parameters()
        if not p.requires_grad
    }
    same = sum(torch.equal(tensor, kept[name]) for name, tensor in load_tensors(path).items())
    file = path.with_name("lora.safetensors")
    save_tensors(file, lora_state_dict(network), {"format": "pt"})
    rows = [
        ("moved", f"{moved} of {len(layers)} matrices B"),
        ("as in the file", f"{same} of {len(kept)} tensors of the transformer, bit for bit"),
        (file.name, f"{file.stat().st_size / 1e6:.1f} MB"),
    ]
    return rows, moved == len(layers) and same == len(kept)


def loss_of(spec: ModelSpec, network: Flux, number: int) -> Tensor:
    """Of the n-th drawn image and caption: in training, both come from the cache, and what has made them is not in memory."""
    config, draw = spec.transformer, training.seeded_generator(0, number)

    def random(*shape):
        return torch.randn(shape, generator=draw)

    vector = random(1, config.vector_dim) if config.vector_dim else None
    features = TextFeatures(random(1, spec.text_length, config.context_dim), vector)
    latents, noise = random(2, 1, config.out_channels, SIDE, SIDE)
    t = training.shifted_times(random(1), training.schedule_mu(spec, SIDE**2))
    with training.autocast_matmul(CPU, torch.bfloat16):
        velocity = partial(
            training.predict_velocity, network, training.Batch(latents, features), 1.0
        )
        return training.rectified_flow_loss(velocity, latents, t, noise)


@contextmanager
def watching(field: str) -> Iterator[list[int]]:
    """What is `resident`, a hundred times a second."""
    seen, done = [resident(field)], Event()

    def watch() -> None:
        while not done.wait(0.01):
            seen.append(resident(field))

    thread = Thread(target=watch)
    thread.start()
    try:
        yield seen
    finally:
        done.set()
        thread.join()


def resident(field: str) -> int:
    """Bytes of memory that this process holds: RssAnon, what no file backs; VmHWM, the most of all that it ever held."""
    if not Path("/proc/self/status").exists():
        raise UserError("memory is read from /proc/self/status, which only Linux has")
    return proc("status")[field]


def machine() -> list[tuple[str, str]]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    name = next(
        (line.split(":")[1].strip() for line in info if line.startswith("model name")),
        platform.machine(),
    )
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = f"{name}, {os.cpu_count()} cores ({torch.get_num_threads()} used), {memory / 1e9:.0f} GB of memory"
    return [("machine", hardware), ("torch", torch.__version__), ("date", date.today().isoformat())]


if __name__ == "__main__":
    sys.exit(main())
