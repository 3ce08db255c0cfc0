"""Check on a GPU, within ten minutes, what was counted without one.

    python scripts/benchmarks/gpu.py          measured beside predicted; saved in results/
    python scripts/benchmarks/gpu.py --dry    tiny sizes on a CPU: does every check run?

The order gives the most in the first two minutes: the rates of the machine, results that would be
wrong, then each stage of klein 4B, also in float8; then streaming, references, FLUX.1 and FLUX 3;
then compilation, and all of klein 4B against diffusers, which takes four minutes. Each row is
printed when it is measured. No check starts after --minutes. A check that fails leaves a row, and
the next one starts. A figure with a limit is an error, and must not exceed the limit.
"""

import argparse
import copy
import os
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from modules.command_line import Parser, exit_code, imports, show


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    p.add_argument("--minutes", type=float, default=10, help="start no check later")
    p.add_argument("--json", type=Path, metavar="FILE", help="default: in results/")
    return p


with imports(__name__, parser):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from benchmarks.correctness import FAILED, bits, correctness, picture
    from benchmarks.count import counted
    from benchmarks.counts import float8_stepping, referring
    from benchmarks.full import Stage, decoding, encoding, full_rows, memory, stepping
    from benchmarks.machine import BF16, Machine
    from benchmarks.references import generate
    from benchmarks.rows import Report, Row, check_json, installed
    from benchmarks.setting import Setting
    from benchmarks.steps import inputs, our_step, same_attention
    from benchmarks.timing import random_weights
    from flux.autoencoder import Upsample
    from flux.configs import KLEIN_9B, MODELS, ModelSpec
    from flux.errors import UserError
    from flux.parity.reference import KLEIN_TINY
    from flux.parity.reference3 import tiny_models3
    from flux.runtime.compilation import compile_blocks
    from flux.runtime.fast import FusedUpsample, fast_transformer
    from flux.runtime.streaming import stream, unstream
    from flux.transformer import BLOCK_LISTS, Flux, KVCache


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    command = shlex.join(["gpu.py", *arguments])
    return exit_code(lambda: run(args, command), {}, args.json, "stopped; no file is kept")


def run(args: argparse.Namespace, command: str) -> int:
    if not args.dry and not torch.cuda.is_available():
        raise UserError("--dry: missing, and there is no GPU here. Add --dry for a trial on a CPU.")
    machine = Machine(args.dry)
    report = Report(command, machine.name)
    path = args.json
    if path is None and not args.dry:
        name = machine.name.replace(" ", "-").lower()
        path = Path(__file__).with_name("results") / f"{report.date}-{name}.json"
    if path is not None:
        check_json(path)
    report.print_heading()
    end = perf_counter() + 60 * args.minutes
    report.print_rows(rows(machine, end))
    if path is not None:
        show("", report.save(path))
    return 0


def rows(machine: Machine, end: float) -> Iterator[Row]:
    for check in CHECKS:
        if perf_counter() > end:
            yield Row(f"{check.__name__}: not started in time", "", FAILED, limit=0)
            continue
        try:
            with torch.no_grad():
                yield from check(machine)
        except Exception as error:
            message = f"{check.__name__}: {type(error).__name__}: {str(error)[:200]}"
            message = message.replace("\n", " ").replace("|", "/")
            yield Row(message, "", FAILED, limit=0)
        torch._dynamo.reset()


# ------------------------------------------------------------------ the first two minutes


def rates(machine: Machine) -> Iterator[Row]:
    """Time what predictions rest on: the bandwidth, a product, an attention, a convolution."""
    gpu, size, random = machine.gpu, machine.size, machine.random

    def row(name: str, function: Callable[[], object], predicted: float) -> Row:
        return Row(name, "s", machine.seconds(function), predicted, "predicted")

    x = random(size(4096), size(65536))
    target = torch.empty_like(x)
    yield row(f"copy of {x.nbytes:,} bytes", lambda: target.copy_(x), 2 * x.nbytes / gpu.bandwidth)
    b = random(size(21504), size(3072))
    for tokens in (4608, 512):
        a = random(size(tokens), size(3072))
        predicted = 2 * a.numel() * len(b) / gpu.matmul
        yield row(f"product of {tokens}x3072x21504", lambda a=a: F.linear(a, b), predicted)
    q = random(1, 24, size(4608), 128)
    predicted = 4 * q.numel() * q.shape[2] / gpu.attention
    backends = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION]
    for backend in [SDPBackend.MATH] if machine.dry else backends:
        with sdpa_kernel(backend):
            yield row(
                f"attention of 24 heads, 4608 tokens, {backend.name}",
                lambda: F.scaled_dot_product_attention(q, q, q),
                predicted,
            )
    q = random(1, 1, size(16384), 512)
    yield row(
        "attention of one head of 512, 16384 tokens",
        lambda: F.scaled_dot_product_attention(q, q, q),
        4 * q.numel() * q.shape[2] / gpu.attention,
    )
    x = random(1, size(256), size(1024), size(1024)).to(memory_format=torch.channels_last)
    for side in (3, 2):
        weight = random(size(256), size(256), side, side).to(memory_format=torch.channels_last)
        flops = 2 * x.numel() * len(weight) * side**2
        name = f"convolution {side}x{side} of 256 channels, 1024x1024"
        predicted = flops / gpu.convolution
        yield row(name, lambda weight=weight: F.conv2d(x, weight, padding=1), predicted)
    heads = random(size(4608) * 24, 128)
    weight = random(128)
    predicted = max(2 * heads.nbytes / gpu.bandwidth, 0.7e-9 * len(heads))
    yield row("rms_norm of rows of 128", lambda: F.rms_norm(heads, (128,), weight, 1e-6), predicted)


def klein(machine: Machine) -> Iterator[Row]:
    yield from stages(small(machine), machine)


def klein_in_float8(machine: Machine) -> Iterator[Row]:
    for how in ("dequantized", "multiplied"):
        build = partial(float8_stepping, small(machine), machine.side, matmul=how == "multiplied")
        yield from beside(f"step, {small(machine).name}, fp8, {how}", build, machine)


def small(machine: Machine) -> ModelSpec:
    return MODELS["flux.2-tiny" if machine.dry else "flux.2-klein-4b"]


def stages(spec: ModelSpec, machine: Machine) -> Iterator[Row]:
    for name, build in (("step", stepping), ("decode", decoding), ("text", encoding)):
        yield from beside(f"{name}, {spec.name}", partial(build, spec, machine.side), machine)


def beside(case: str, build: Callable[..., Stage], machine: Machine) -> Iterator[Row]:
    """Measure seconds, bytes and kernels of a stage beside their predictions."""
    predicted = counted(build(device="meta").run).totals(machine.gpu)
    stage = build(device=machine.device)
    with same_attention():
        yield Row(case, "s", machine.seconds(stage.run), predicted.eager, "predicted")
        held = memory(stage._replace(modules=[]), machine.device)
        yield Row(f"{case}, peak", "B", held, predicted.peak, "predicted")
        kernels = launched(stage, machine)
    yield Row(f"{case}, kernels", "", kernels, predicted.kernels, "predicted")


def launched(stage: Stage, machine: Machine) -> int:
    """Return the kernels that a run launches, by torch's profiler; on a CPU, its operations."""
    activity = torch.profiler.ProfilerActivity
    with torch.profiler.profile(activities=[activity.CPU if machine.dry else activity.CUDA]) as p:
        stage.run()
    return sum(event.count for event in p.key_averages())


# ------------------------------------------------------------------ what follows


def references(machine: Machine) -> Iterator[Row]:
    """Measure a step with a reference; count the bytes that cached keys and values keep alive."""
    spec = small(machine)
    build = partial(referring, spec, machine.side, count=1)
    yield from beside(f"step, {spec.name}, 1 reference", build, machine)
    config = KLEIN_TINY if machine.dry else KLEIN_9B
    model = fast_transformer(random_weights(lambda: Flux(config), machine.device, BF16))
    caches: list[KVCache] = []
    start = KVCache.__init__

    def noted(self: KVCache, text_length: int) -> None:
        start(self, text_length)
        caches.append(self)

    KVCache.__init__ = noted  # type: ignore[method-assign]
    try:
        generate(model, machine.side // 16, 1, cached=True, steps=1)
    finally:
        KVCache.__init__ = start  # type: ignore[method-assign]
    tensors = [x for cache in caches for x in (cache.k, cache.v) if x is not None]
    held = {x.untyped_storage().data_ptr(): x.untyped_storage().nbytes() for x in tensors}
    need = sum(x.nbytes for x in tensors)
    yield Row("cached references, bytes that they keep", "B", sum(held.values()), need, "needed")


def against_diffusers(machine: Machine) -> Iterator[Row]:
    """Time every stage of klein 4B over its floor and, if it is installed, against diffusers."""
    setting = Setting(machine.device, rounds=1)
    if machine.dry:
        setting = Setting(machine.device, 1, 1e-4, full_side=64, replayed=1e-4, compiled=False)
    yield from full_rows(small(machine), setting, against=bool(installed("diffusers")))


def streaming(machine: Machine) -> Iterator[Row]:
    """Stream all blocks from the host: the same bits?"""
    config = KLEIN_TINY if machine.dry else MODELS["flux.2-klein-4b"].transformer
    model = random_weights(lambda: Flux(config), machine.device, BF16)
    tensors = inputs(config, machine.side, 64, machine.device, BF16)
    step = our_step(model, tensors)
    expected = step()
    stream(model.cpu(), BLOCK_LISTS, machine.device)
    differ = (step() != expected).sum().item()
    yield Row("streamed step, values that differ", "", differ, limit=0)
    yield Row("streamed step", "s", machine.seconds(step), 0.15, "PCIe")
    stream(unstream(model, BLOCK_LISTS), BLOCK_LISTS, machine.device, pinned=2**40)
    for _ in range(2):  # the first pins
        differ = (step() != expected).sum().item()
    yield Row("streamed step, pinned, values that differ", "", differ, limit=0)
    yield Row("streamed step, pinned", "s", machine.seconds(step), 0.15, "PCIe")


def upsampling(machine: Machine) -> Iterator[Row]:
    """Time the decoder's largest upsampling as it is done on a GPU, and as it is written."""
    channels, side = machine.size(256), machine.size(512)
    plain = random_weights(lambda: Upsample(channels), machine.device, BF16)
    plain.to(memory_format=torch.channels_last)
    fused = copy.deepcopy(plain)
    fused.__class__ = FusedUpsample
    x = machine.random(1, channels, side, side).to(memory_format=torch.channels_last)
    runs = [machine.seconds(lambda each=each: each(x)) for each in (fused, plain)]
    yield Row(f"upsampling of {channels} channels to 1024x1024", "s", *runs, "plain")


def flux1(machine: Machine) -> Iterator[Row]:
    yield from stages(MODELS["flux.1-tiny" if machine.dry else "flux.1-dev"], machine)


def flux3(machine: Machine) -> Iterator[Row]:
    name = "flux.3-image-klein"
    spec = tiny_models3()[name] if machine.dry else MODELS[name]
    for stage, build in (("step", stepping), ("text", encoding)):
        yield from beside(f"{stage}, {name}", partial(build, spec, machine.side), machine)


def compilation(machine: Machine) -> Iterator[Row]:
    """Compile a step; run sample.py twice with --compile: the second run reads what is kept."""
    spec = small(machine)
    predicted = counted(stepping(spec, machine.side, "meta").run).totals(machine.gpu)
    stage = stepping(spec, machine.side, machine.device)
    if not machine.dry:  # it takes a minute on a CPU
        compile_blocks(*stage.modules, BLOCK_LISTS)
    with same_attention():
        seconds = machine.seconds(stage.run)
    yield Row(f"step, {spec.name}, compiled", "s", seconds, predicted.compiled, "predicted")
    del stage
    script = Path(__file__).parents[1] / "sample.py"
    with TemporaryDirectory() as folder:
        command = [sys.executable, str(script), "a red star", "--output", f"{folder}/a.png"]
        command += ["--device", machine.device.type, "--seed", "1"]
        command += ["--width", "64", "--height", "64", "--steps", "1"] if machine.dry else []
        command += [] if machine.dry else ["--compile"]
        environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": f"{folder}/compiled"}
        runs = []
        for _ in range(2):
            start = perf_counter()
            subprocess.run(command, env=environment, check=True, capture_output=True)
            runs.append(perf_counter() - start)
    yield Row("toy with --compile again, from prompt to PNG", "s", runs[1], runs[0], "first")


CHECKS = (
    rates,
    correctness,
    picture,
    klein,
    klein_in_float8,
    streaming,
    references,
    flux1,
    flux3,
    bits,
    upsampling,
    compilation,
    against_diffusers,
)

if __name__ == "__main__":
    sys.exit(main())
