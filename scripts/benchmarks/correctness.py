"""Results that would be wrong on a GPU only; an error has a limit."""

import warnings
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

import flux
from benchmarks.machine import BF16, FLOAT32, Machine
from benchmarks.rows import Row
from benchmarks.steps import inputs, our_step, sharing_weights
from benchmarks.timing import random_weights
from flux.autoencoder import AutoEncoder
from flux.configs import MODELS
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity.reference import FLUX2_TINY, relative_l2
from flux.runtime.devices import no_tf32
from flux.runtime.fast import fast_autoencoder, fast_transformer
from flux.transformer import Flux, apply_rope, rope_table
from flux.weights.quantization import FP8Linear
from flux.weights.quantization.fp8 import quotient_in_float8

FAILED = 1e9  # above every limit


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

    pixels = random(1, 3, 64, 64, dtype=FLOAT32)
    encoder = random_weights(lambda: AutoEncoder(spec.autoencoder), "cpu", FLOAT32)
    expected = encoder.double().encode(pixels.cpu().double())
    with no_tf32():
        found = fast_autoencoder(encoder.float().to(device)).encode(pixels).cpu()
    yield error("encoder in float32 against float64", relative_l2(found, expected.float()), 2e-5)

    yield from float8(machine, error)


def float8(machine: Machine, error: Callable[[str, float, float], Row]) -> Iterator[Row]:
    """Check the bytes of activations, and all kinds of products."""
    x = machine.random(512, 256)
    for clamp, scale in (
        (False, x.abs().amax(1, keepdim=True).float() / 448),
        (True, torch.full((1, 1), 0.005, device=x.device)),
    ):
        rounded = (x.float() / scale).clamp(-448, 448).to(torch.float8_e4m3fn)
        differ = quotient_in_float8(x, scale, clamp).view(torch.uint8) != rounded.view(torch.uint8)
        name = f"division into float8{', clamped' * clamp}, bytes that differ"
        yield error(name, differ.sum().item(), 0)
    scales: tuple[tuple[tuple[int, ...], tuple[int, ...] | None], ...]
    scales = ((512,), None), ((), None), ((), ())
    for weight_scale, input_scale in scales:
        layer = FP8Linear(256, 512, True, scale=weight_scale, input_scale=input_scale)
        layer = layer.to(x.device, BF16).requires_grad_(False)
        layer.weight.copy_(machine.random(512, 256))
        layer.bias.copy_(machine.random(512))
        layer.weight_scale.fill_(0.02)
        if layer.input_scale is not None:
            layer.input_scale.fill_(0.02)
        wanted = F.linear(x.float(), layer.dequantize(), layer.bias.float())
        name = f"scales of {'a row' if weight_scale else 'the matrix'}"
        name += " and of the input" if input_scale == () else ""
        yield error(f"product in float8, {name}", relative_l2(layer.scaled_mm(x), wanted), 0.05)
        scaled = relative_l2(layer.scaled_product(x), wanted)
        yield error(f"scaled product of a float8 weight, {name}", scaled, 2**-8)


def bits(machine: Machine) -> Iterator[Row]:
    """Count values that differ from what a CPU would compute: on a GPU, bits are not promised."""
    x, scale = machine.random(1, 640, 8, 128), machine.random(128)
    norms = F.rms_norm(x, (128,), scale, 1e-6), F.rms_norm(x.float(), (128,), eps=1e-6) * scale
    differ = (norms[0] != norms[1].to(BF16)).float().mean().item()
    yield Row("norm with a scale, share of values that differ from two steps", "", differ)
    wide = x.float()
    rope = rope_table(torch.arange(2560).view(640, 4), (32,) * 4, 2000).to(x.device)
    rotations = torch.complex(rope[..., 0, 0], rope[..., 1, 0])[None, :, None]
    pairs = torch.view_as_complex(wide.unflatten(-1, (-1, 2)))
    rotated = torch.view_as_real(pairs * rotations).flatten(-2)
    differ = (rotated != apply_rope(wide, rope)).float().mean().item()
    yield Row("complex rotation, share of values that differ from real numbers", "", differ)


def picture(machine: Machine) -> Iterator[Row]:
    """Compare the toy's image with that of the CPU, and count where the host waits for the GPU."""
    prompt = "a small yellow star above a large blue ring on a white background"
    size = dict(width=64, height=64, steps=1) if machine.dry else {}
    images = []
    for device in ("cpu", machine.device.type):
        pipe = flux.load("flux.2-tiny", device=device)
        (image,) = pipe(prompt, **size)
        images.append(torch.from_numpy(np.array(image)).int())
    levels = (images[0] - images[1]).abs().max().item()
    yield Row("picture of the toy, levels from that of the CPU", "", levels, limit=2)
    if not machine.dry:
        torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as waits:
            warnings.simplefilter("always")
            pipe(prompt, seed=1, **size)
    finally:
        if not machine.dry:
            torch.cuda.set_sync_debug_mode("default")
    yield Row("waits for the GPU in a picture of 8 steps", "", len(waits), 23, "expected")
