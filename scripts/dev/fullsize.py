"""Load, run and train a transformer of full size, with a file of random weights.

    python scripts/dev/fullsize.py                        klein base 4B: 7.75 GB of disk, minutes
    python scripts/dev/fullsize.py --lora-rank 16         two steps of a LoRA of it
    python scripts/dev/fullsize.py --model flux.3-image-klein-base           11.1 GB of disk
    python scripts/dev/fullsize.py --model flux.2-tiny --folder /tmp/tiny    in a second

The file has the name and the layout of the released one, in bfloat16 and with random values, which
are the same in tensors of one shape. An existing file is used as it is, and no file is deleted. A
new process loads it as flux.load does, without memory of its own, and runs one step at 256x256 on
the CPU. With --lora-rank it trains a LoRA as scripts/train.py --gradient-checkpointing does, on one
random image of this size, and writes lora.safetensors.
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

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from modules.command_line import Parser, exit_code, imports, show


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model",
        default="flux.2-klein-base-4b",
        help="a model of flux.MODELS (default: flux.2-klein-base-4b)",
    )
    parser.add_argument(
        "--lora-rank", type=int, metavar="R", help="train a LoRA of this rank, for two steps"
    )
    parser.add_argument(
        "--folder",
        type=Path,
        default=Path(tempfile.gettempdir()) / "flux-fullsize",
        help="of the file (default: flux-fullsize in the folder of temporary files)",
    )
    return parser


with imports(__name__, parser):
    import torch
    from benchmarks.measure import proc
    from modules.training_options import refuse_flow_map
    from torch import Tensor, nn

    from flux import sampling
    from flux.configs import ModelSpec
    from flux.errors import UserError
    from flux.text_encoder import TextFeatures
    from flux.tokenizers import QwenVLTokenizer
    from flux.training import loss as training
    from flux.training.checkpoint import load_tensors, save_tensors
    from flux.training.lora import LoRALinear, add_lora, lora_state_dict
    from flux.training.memory import (
        build_for_training,
        enable_gradient_checkpointing,
        estimate_memory,
    )
    from flux.training.networks import Network, new_network
    from flux.training.trainer import Trainer, make_optimizer, trainable_parameters, warmup_cosine
    from flux.transformer3 import Flux3Config
    from flux.weights.load import init_empty, load_module
    from flux.weights.locate import get_spec

SIDE = 256 // 16  # tokens
CPU = torch.device("cpu")
FLAGS = {"name": "--model", "model": "--model"}


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return exit_code(lambda: run(args), FLAGS, args.folder, "stopped")


def run(args: argparse.Namespace) -> int:
    if args.lora_rank is not None and not 1 <= args.lora_rank <= 1024:
        raise UserError(f"--lora-rank: must be from 1 to 1024 (got {args.lora_rank})")
    spec = get_spec(args.model)
    if args.lora_rank is not None:
        refuse_flow_map(spec)
    path = args.folder / spec.transformer_file
    written = write(path, empty(spec))
    with get_context("spawn").Pool(1) as fresh:
        work = partial(train, rank=args.lora_rank) if args.lora_rank else measure
        measured, good = fresh.apply(work, (spec, path))
    rows = [
        ("model", f"{spec.name}, {path.stat().st_size / 1e9:.3f} GB"),
        *machine(),
        ("written", written),
        *measured,
    ]
    show("| | |", "| --- | --- |", *(f"| {name} | {value} |" for name, value in rows))
    return 0 if good else 1


def empty(spec: ModelSpec) -> Network:
    """Return the transformer on the meta device."""
    return init_empty(lambda: new_network(spec.transformer))


def write(path: Path, module: nn.Module) -> str:
    """Write random weights to a safetensors file, one tensor at a time. Report the time."""
    if path.exists():
        return "no, the file exists"
    header, end = {}, 0
    for name, like in module.state_dict().items():
        begin, end = end, end + 2 * like.numel()
        header[name] = {"dtype": "BF16", "shape": list(like.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # tensors are aligned, as in released files
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if free < end + 10**9:
        raise UserError(
            f"--folder: {path.parent} has {free / 1e9:.1f} GB free, and {end / 1e9 + 1:.1f} are "
            "needed. Choose another folder."
        )
    start, generator = perf_counter(), torch.Generator().manual_seed(0)
    partial = path.with_suffix(".partial")
    with partial.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        drawn: dict[torch.Size, Tensor] = {}  # billions of numbers would take minutes
        for like in module.state_dict().values():
            if like.shape not in drawn:
                mean = 1.0 if like.ndim == 1 else 0.0  # scales of norms, and biases
                tensor = torch.empty(like.shape, dtype=torch.bfloat16)
                drawn[like.shape] = tensor.normal_(mean, 0.02, generator=generator)
            file.write(drawn[like.shape].view(torch.uint8).numpy())
    partial.replace(path)
    return f"in {perf_counter() - start:.1f} s"


@torch.inference_mode()
def measure(spec: ModelSpec, path: Path) -> tuple[list[tuple[str, str]], bool]:
    """Load and run one step. Return rows of the table, and whether the velocity is finite.

    Memory is measured of the process, so this needs a process of its own.
    """
    before, start = resident("RssAnon"), perf_counter()
    model = empty(spec)
    load_module(model, [path])
    seconds, after = perf_counter() - start, resident("RssAnon")
    share = (after - before) / path.stat().st_size
    growth = f"{(after - before) / 1e6:.1f} MB, {share:.2%} of the file"

    inputs = inputs_of(spec)
    start = perf_counter()
    velocity = model(**inputs)
    step, finite = perf_counter() - start, velocity.isfinite().all().item()
    text = inputs["txt"].shape[1]
    total, verdict = resident("RssAnon") - before, "finite" if finite else "NOT FINITE"
    rows = [
        ("loaded", f"in {seconds:.2f} s"),
        ("anonymous memory that loading took", growth),
        ("one step", f"in {step:.2f} s, {SIDE**2} image and {text} text tokens"),
        ("anonymous memory after the step", f"{total / 1e6:.1f} MB more than before loading"),
        ("peak of memory", f"{gb(resident('VmHWM'))} GB resident, with the pages of the file"),
        ("velocity", f"{verdict}, standard deviation {velocity.float().std():.3f}"),
    ]
    return rows, finite


def inputs_of(spec: ModelSpec) -> dict[str, Tensor | None]:
    """Return the inputs of the first step."""

    def random(*shape):
        return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()

    config, length, t = spec.transformer, text_tokens(spec), torch.ones(1)
    if isinstance(config, Flux3Config):
        img_ids, axes = sampling.flux3_image_ids(SIDE, SIDE), 4
        target = sampling.schedule(spec.schedule, spec.steps, SIDE**2)[1:2]
        own: dict[str, Tensor | None] = {"target": target if config.flow_map else None}
    else:
        axes = len(config.axes_dim)
        img_ids = sampling.image_ids(SIDE, SIDE, axes)
        own = dict(
            guidance=torch.tensor([4.0]) if config.guidance else None,
            vector=random(1, config.vector_dim) if config.vector_dim else None,
        )
    return dict(
        img=random(1, SIDE**2, config.in_channels),
        img_ids=img_ids,
        txt=random(1, length, config.context_dim),
        txt_ids=sampling.text_ids(length, axes),
        t=t,
        **own,
    )


def text_tokens(spec: ModelSpec) -> int:
    """Return the length of a prompt, padding included; in FLUX 3 that of a short one."""
    return QwenVLTokenizer.multiple if spec.flux3 else spec.text_length


def train(spec: ModelSpec, path: Path, rank: int) -> tuple[list[tuple[str, str]], bool]:
    """Train a LoRA for two steps. Return rows, and whether all of the LoRA, and only it, changed.

    Memory is measured of the process, so this needs a process of its own.
    """
    torch.manual_seed(0)
    build = partial(build_for_training, spec.transformer, torch.bfloat16, rank, references=False)
    estimate = estimate_memory(
        spec,
        build,
        SIDE**2,
        1,
        CPU,
        torch.bfloat16,
        ema=False,
        gradient_checkpointing=True,
        text_tokens=text_tokens(spec),
    )
    network = empty(spec)
    load_module(network, [path])
    add_lora(network, rank, references=False)
    enable_gradient_checkpointing(network)
    optimizer = make_optimizer("adamw", trainable_parameters(network).values(), 1e-4)
    trainer = Trainer(network, path.with_name("not saved"), {}, [optimizer], warmup_cosine(2))
    steps = []
    with watching("RssAnon") as held:
        for number in range(2):
            start = perf_counter()
            loss, length = trainer.update([partial(loss_of, spec, network, number)])
            seconds = perf_counter() - start
            steps.append(f"in {seconds:.1f} s: loss {loss:.4f}, gradient norm {length:.4g}")
    count = sum(p.numel() for p in trainer.parameters.values())
    predicted = (
        f"at least {gb(estimate.total)} GB: weights {gb(estimate.weights)}, gradients and the "
        f"optimizer {gb(estimate.states)}, activations {gb(estimate.activations)}"
    )
    peak = f"{gb(resident('VmHWM'))} GB resident, {gb(max(held))} GB of it anonymous"
    rows = [
        ("trainable", f"{count:,} parameters: a LoRA of rank {rank}"),
        ("memory, predicted", predicted),
        ("peak of memory", f"{peak}; the rest is pages of files"),
        *zip(("first step", "second step"), steps, strict=True),
    ]
    found, good = result(network, path)
    return rows + found, good


def result(network: Network, path: Path) -> tuple[list[tuple[str, str]], bool]:
    """Return rows on the changes of training, and on the LoRA's file; and whether all is right."""
    layers = [layer for layer in network.modules() if isinstance(layer, LoRALinear)]
    changed = sum(layer.lora_B.weight.any().item() for layer in layers)  # they start at 0
    kept = {}
    for name, p in network.named_parameters():
        if not p.requires_grad:
            kept[name.replace(".base.", ".")] = p
    same = sum(torch.equal(tensor, kept[name]) for name, tensor in load_tensors(path).items())
    file = path.with_name("lora.safetensors")
    save_tensors(file, lora_state_dict(network), {"format": "pt"})
    rows = [
        ("changed", f"{changed} of {len(layers)} matrices B"),
        ("equal to the file", f"{same} of {len(kept)} tensors of the transformer"),
        (file.name, f"{file.stat().st_size / 1e6:.1f} MB"),
    ]
    return rows, changed == len(layers) and same == len(kept)


def gb(size: int) -> str:
    return f"{size / 1e9:.3g}"


def loss_of(spec: ModelSpec, network: Network, number: int) -> Tensor:
    """Return the loss of the n-th random image and caption, which training reads from its cache."""
    draw = training.seeded_generator(0, number)

    def random(*shape):
        return torch.randn(shape, generator=draw)

    vector = random(1, spec.pooled_dim) if spec.pooled_dim else None
    features = TextFeatures(random(1, text_tokens(spec), spec.transformer.context_dim), vector)
    latents, noise = random(2, 1, spec.autoencoder.latent_channels, SIDE, SIDE)
    t = training.shifted_times(random(1), training.schedule_mu(spec, SIDE**2))
    with training.autocast_matmul(CPU, torch.bfloat16):
        batch = training.Batch(latents, features)
        velocity = partial(training.predict_velocity, network, batch, 1.0)
        return training.rectified_flow_loss(velocity, latents, t, noise)


@contextmanager
def watching(field: str) -> Iterator[list[int]]:
    """Collect `resident` a hundred times a second."""
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
    """Return bytes of this process: RssAnon, not backed by files; VmHWM, the peak of all."""
    if not Path("/proc/self/status").exists():
        raise UserError("/proc/self/status: this needs Linux, to measure memory.")
    return proc("status")[field]


def machine() -> list[tuple[str, str]]:
    info = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.split(":")[1].strip() for line in info if line.startswith("model name")]
    name = names[0] if names else platform.machine()
    cores = f"{os.cpu_count()} cores ({torch.get_num_threads()} used)"
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    hardware = f"{name}, {cores}, {memory / 1e9:.0f} GB of memory"
    return [("machine", hardware), ("torch", torch.__version__), ("date", date.today().isoformat())]


if __name__ == "__main__":
    sys.exit(main())
