"""Check on a GPU, within ten minutes, what was counted without one.

    python scripts/benchmarks/gpu.py          measured beside predicted; saved in results/
    python scripts/benchmarks/gpu.py --dry    tiny sizes on a CPU: does every check run?

The order gives the most in the first two minutes: the rates of the machine, results that would be
wrong, then each stage of klein 4B, then the same against diffusers, then streaming and FLUX.1. No
check starts after --minutes. A check that fails leaves a row, and the next one starts. A figure
with a limit is an error, and must not exceed the limit.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from time import perf_counter

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

import torch
import torch.nn.functional as F
from command_line import Parser, exit_code, show
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.count import GPUS, counted
from benchmarks.full import Stage, decoding, encoding, full_rows, memory, stepping
from benchmarks.references import generate
from benchmarks.rows import Report, Row, check_json, installed
from benchmarks.setting import Setting
from benchmarks.steps import inputs, our_step, same_attention, sharing_weights
from benchmarks.timing import by_turns, random_weights
from flux.autoencoder import AutoEncoder
from flux.configs import KLEIN_9B, MODELS, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity.reference import FLUX2_TINY, KLEIN_TINY, relative_l2
from flux.runtime.devices import no_tf32
from flux.runtime.fast import fast_autoencoder, fast_transformer
from flux.runtime.streaming import stream
from flux.transformer import BLOCK_LISTS, Flux, KVCache
from flux.weights.quantization import FP8Linear
from flux.weights.quantization.fp8 import quotient_in_float8

BF16, FLOAT32 = torch.bfloat16, torch.float32
FAILED = 1e9  # above every limit


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dry", action="store_true", help="tiny sizes, on the CPU")
    parser.add_argument("--minutes", type=float, default=10, help="start no check later")
    parser.add_argument("--json", type=Path, metavar="FILE", help="default: in results/")
    args = parser.parse_args(arguments)
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
    report.print_rows(itertools.chain.from_iterable(rows(machine, end)))
    if path is not None:
        show("", report.save(path))
    return 0


class Machine:
    """The device, and the sizes that suit it."""

    def __init__(self, dry: bool) -> None:
        self.dry = dry
        self.device = torch.device("cpu" if dry else "cuda")
        self.name = "cpu" if dry else torch.cuda.get_device_name()
        known = [gpu for name, gpu in GPUS.items() if name in self.name]
        self.gpu = known[0] if known else GPUS["H200"]
        self.side = 64 if dry else 1024
        self.rounds = 1 if dry else 3

    def size(self, number: int) -> int:
        return max(16, number // 64 // 16 * 16) if self.dry else number

    def random(self, *shape: int, dtype: torch.dtype = BF16) -> Tensor:
        return torch.randn(shape, device=self.device).to(dtype)

    def seconds(self, function: Callable[[], object]) -> float:
        with torch.inference_mode():
            return by_turns([function], self.rounds, 1e-4 if self.dry else 0.05)[0]


def rows(machine: Machine, end: float) -> Iterator[list[Row]]:
    for check in CHECKS:
        if perf_counter() > end:
            yield [Row(f"{check.__name__}: not started in time", "", FAILED, limit=0)]
            continue
        found = []
        try:
            with torch.no_grad():
                for row in check(machine):
                    found.append(row)
        except Exception as error:
            message = f"{check.__name__}: {type(error).__name__}: {str(error)[:200]}"
            message = message.replace("\n", " ").replace("|", "/")
            found.append(Row(message, "", FAILED, limit=0))
        yield found
        torch._dynamo.reset()


# ------------------------------------------------------------------ the first two minutes


def rates(machine: Machine) -> Iterator[Row]:
    """Time what predictions rest on: the bandwidth, a product, an attention, a convolution."""
    gpu, size, random = machine.gpu, machine.size, machine.random

    def row(name: str, function: Callable[[], object], predicted: float) -> Row:
        return Row(name, "s", machine.seconds(function), predicted, "predicted")

    x = random(size(4096), size(65536))
    copy = torch.empty_like(x)
    yield row(f"copy of {x.nbytes:,} bytes", lambda: copy.copy_(x), 2 * x.nbytes / gpu.bandwidth)
    a, b = random(size(4608), size(3072)), random(size(21504), size(3072))
    flops = 2 * a.numel() * len(b)
    yield row("product of 4608x3072x21504", lambda: F.linear(a, b), flops / gpu.matmul)
    q = random(1, 24, size(4608), 128)
    flops = 4 * q.numel() * q.shape[2]
    with same_attention():
        attend = row(
            "attention of 24 heads, 4608 tokens",
            lambda: F.scaled_dot_product_attention(q, q, q),
            flops / gpu.attention,
        )
    yield attend
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


def correctness(machine: Machine) -> Iterator[Row]:
    """Find results that would be wrong on a GPU only."""
    device, random = machine.device, machine.random

    def error(name: str, value: float, limit: float) -> Row:
        return Row(name, "", value if value == value else FAILED, limit=limit)

    length = 128
    config = LanguageModelConfig(
        layers=(1, 2), vocab_size=64, hidden_size=256, mlp_size=512, num_heads=4, num_kv_heads=2,
        head_dim=64, qk_norm=False,
    )  # fmt: skip
    model = random_weights(lambda: LanguageModel(config), device, BF16)
    ids = torch.arange(length, device=device)[None] % 64
    real = torch.arange(length, device=device)[None] >= 100
    seen: list[Tensor] = []
    for layer in model.layers:
        layer.self_attn.register_forward_hook(lambda module, args, out: seen.append(out))
    backends = [SDPBackend.MATH, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.CUDNN_ATTENTION]
    for backend in backends[:1] if machine.dry else backends:
        seen.clear()
        with sdpa_kernel(backend):
            model(ids, real)
        largest = max(out[~real].abs().max().item() for out in seen)
        yield error(f"attention of padding that sees nothing, {backend.name}", largest, 0)

    plain = random_weights(lambda: Flux(FLUX2_TINY), device, BF16)
    tensors = inputs(FLUX2_TINY, 64, 16, device, BF16)
    reference = our_step(plain, tensors)()
    fast = our_step(fast_transformer(sharing_weights(plain)), tensors)()
    yield error("fast step against plain, bfloat16", relative_l2(fast, reference.float()), 5e-3)

    spec = MODELS["flux.2-tiny" if machine.dry else "flux.2-klein-4b"]
    latents = random(1, spec.autoencoder.latent_channels, 8, 8, dtype=FLOAT32)
    ae = random_weights(lambda: AutoEncoder(spec.autoencoder), "cpu", FLOAT32)
    expected = ae.double().decode(latents.cpu().double())
    ae = ae.float().to(device)
    with no_tf32():
        for name in ("plain", "fast"):
            found = ae.decode(latents)
            name = f"{name} decoder in float32 against float64"
            yield error(name, relative_l2(found.cpu(), expected.float()), 2e-5)
            ae = fast_autoencoder(ae)
    found = fast_autoencoder(ae.to(BF16)).decode(latents.to(BF16)).cpu().float()
    yield error("fast decoder in bfloat16 against float64", relative_l2(found, expected), 5e-2)

    x = random(512, 256)
    scale = x.abs().amax(1, keepdim=True).float() / 448
    both = [
        quotient_in_float8(x, scale, clamp=False),
        (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn),
    ]
    differ = both[0].view(torch.uint8) != both[1].view(torch.uint8)
    yield error("division into float8, bytes that differ", differ.sum().item(), 0)
    layer = FP8Linear(256, 512, bias=False, scale=(512,)).to(device)
    layer.weight.copy_(random(512, 256))
    layer.weight_scale.fill_(0.02)
    product, wanted = layer.scaled_mm(x), F.linear(x.float(), layer.dequantize())
    yield error("product in float8", relative_l2(product, wanted), 0.05)


def klein(machine: Machine) -> Iterator[Row]:
    spec = MODELS["flux.2-tiny" if machine.dry else "flux.2-klein-4b"]
    yield from stages(spec, machine)


def stages(spec: ModelSpec, machine: Machine) -> Iterator[Row]:
    """Measure seconds, bytes and kernels of each stage beside their predictions."""
    for name, build in (("step", stepping), ("decode", decoding), ("text", encoding)):
        predicted = counted(build(spec, machine.side, "meta").run).totals(machine.gpu)
        stage = build(spec, machine.side, machine.device)
        case = f"{name}, {spec.name}"
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
    """Count the bytes that cached keys and values keep alive, over those that are needed."""
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
    spec = MODELS["flux.2-klein-4b"]
    if machine.dry:
        spec = MODELS["flux.2-tiny"]
        setting = Setting(machine.device, 1, 1e-4, full_side=64, replayed=1e-4, compiled=False)
    yield from full_rows(spec, setting, against=bool(installed("diffusers")))


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


def flux1(machine: Machine) -> Iterator[Row]:
    yield from stages(MODELS["flux.1-tiny" if machine.dry else "flux.1-dev"], machine)


CHECKS = (rates, correctness, klein, references, against_diffusers, streaming, flux1)

if __name__ == "__main__":
    sys.exit(main())
