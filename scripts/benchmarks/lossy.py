"""Measure what each lossy mode costs against float32; `scripts/bench.py --lossy` prints the table.

    for loss in losses():
        print(loss)

Formats of files are measured by rounding weights to what such a file can hold. Double quantization
of NF4, which changes little, and GGUF's K-quants, which only llama.cpp writes, are not measured.
"""

import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import flux
from flux import sampling, toy
from flux.configs import KLEIN_4B
from flux.transformer import Flux, FluxConfig
from flux.weights.quantization.fp8 import E4M3_MAX, enable_fp8_matmul
from flux.weights.quantization.nvfp4 import e2m1
from flux.weights.quantization.quantize import SCHEMES, large_linears, quantize_

E4M3 = torch.float8_e4m3fn
GGUF = {
    "Q8_0": 1.0625,
    "Q5_1": 0.75,
    "Q5_0": 0.6875,
    "Q4_1": 0.625,
    "Q4_0": 0.5625,
}  # bytes a weight


class Loss(NamedTuple):
    mode: str
    bytes: float  # a weight of the quantized layers
    velocity: float  # relative L2 for the embedded model at t = 0.5
    psnr: float  # of its images to those of float32, in dB: the median
    score: float  # share of the images that `flux.toy` judges right
    block: float  # relative L2 for one double and one single block of full width, random weights


class Mode(NamedTuple):
    name: str
    bytes: float
    change: Callable[[nn.Module], object]  # applied to a float32 network


@torch.inference_mode()
def losses(prompts: int = 24, config: FluxConfig = KLEIN_4B) -> Iterator[Loss]:
    """Yield a `Loss` for each mode, float32 first.

    prompts: number of images of the embedded model. config: gives the width of the blocks.
    """
    scenes = list(itertools.islice(toy.scenes(3_000_000, held=True), prompts))
    pipe, texts = flux.load(device="cpu"), [str(scene) for scene in scenes]
    features = pipe.encode(texts[:1]).tokens
    one_of_each = replace(config, depth=1, depth_single=1, guidance=False, vector_dim=None)
    state = randomised(Flux(one_of_each)).state_dict()
    generator = torch.Generator().manual_seed(0)
    txt = torch.randn(1, 16, config.context_dim, generator=generator)
    expected = None
    for mode in modes():
        pipe.transformer.set_transform(mode.change)
        images = [np.asarray(image) for image in pipe(texts, seed=0)]
        with torch.device("meta"):
            block = Flux(one_of_each)
        block.load_state_dict(state, assign=True)
        mode.change(block)
        found = velocity(pipe.transformer(), features), images, velocity(block, txt)
        expected = expected or found
        yield Loss(
            mode.name,
            mode.bytes,
            velocity=relative_l2(found[0], expected[0]),
            psnr=float(np.median([psnr(a, b) for a, b in zip(images, expected[1])])),
            score=toy.score(images, scenes)["all"],
            block=relative_l2(found[2], expected[2]),
        )


def modes() -> list[Mode]:
    """Return float32, the schemes of `--quantize`, and formats of files.

    GGUF is measured only where the `gguf` package is installed.
    """
    schemes = {scheme: partial(quantize_, scheme=scheme) for scheme in SCHEMES}
    found = [
        Mode("float32", 4, lambda network: None),
        Mode("bfloat16 weights", 2, rounding(lambda weight: weight.bfloat16().float())),
        Mode("--quantize fp8", 1, schemes["fp8"]),
        Mode(
            "--quantize fp8, products in float8",
            1,
            lambda network: (quantize_(network, "fp8"), enable_fp8_matmul(network)),
        ),
        Mode("--quantize int8", 1, schemes["int8"]),
        Mode("--quantize int4", 0.5625, schemes["int4"]),
        Mode("FP8, one scale for all", 1, rounding(fp8)),
        Mode(
            "FP8, cast",
            1,
            rounding(lambda weight: weight.clamp(-E4M3_MAX, E4M3_MAX).to(E4M3).float()),
        ),
        Mode("FP8, blocks of 128x128", 1, rounding(fp8_blocks)),
        Mode("NVFP4", 0.5625, rounding(nvfp4)),
        Mode("NF4", 0.5625, rounding(nf4)),
    ]
    if find_spec("gguf"):
        found += [
            Mode(f"GGUF {kind}", size, rounding(partial(gguf, kind=kind)))
            for kind, size in GGUF.items()
        ]
    return found


def rounding(function: Callable[[Tensor], Tensor]) -> Callable[[nn.Module], None]:
    """Return a change that replaces each large weight of a network by `function` of the weight."""

    def change(network: nn.Module) -> None:
        for path in large_linears(network):
            layer = network.get_submodule(path)
            layer.weight = nn.Parameter(function(layer.weight), requires_grad=False)

    return change


# ---------------------------------------------------------------- formats


def fp8(weight: Tensor) -> Tensor:
    scale = weight.abs().max() / E4M3_MAX
    return (weight / scale).to(E4M3).float() * scale


def fp8_blocks(weight: Tensor) -> Tensor:
    rows, columns = weight.shape
    padded = F.pad(weight, (0, -columns % 128, 0, -rows % 128))
    tiles = padded.unflatten(1, (-1, 128)).unflatten(0, (-1, 128))  # (a, 128, b, 128)
    scale = tiles.abs().amax(dim=(1, 3), keepdim=True).clamp(min=1e-12) / E4M3_MAX
    return ((tiles / scale).to(E4M3).float() * scale).flatten(0, 1).flatten(1)[:rows, :columns]


def nvfp4(weight: Tensor) -> Tensor:
    blocks, scale_2 = weight.unflatten(1, (-1, 16)), weight.abs().max() / (6 * E4M3_MAX)
    scale = (blocks.abs().amax(dim=-1, keepdim=True) / 6 / scale_2).to(E4M3).float() * scale_2
    return (nearest(blocks / scale, e2m1(weight.device).sort().values) * scale).flatten(1)


def nf4(weight: Tensor) -> Tensor:
    blocks = weight.view(-1, 64)
    scale = blocks.abs().amax(dim=-1, keepdim=True)
    return (nearest(blocks / scale, nf4_values()) * scale).view_as(weight)


def nf4_values() -> Tensor:
    """Return 7 normal quantiles below 0, 0, and 8 above, from -1 to 1: (16,).

    arXiv:2305.14314, section 3.
    """
    outermost = (1 - 1 / 30 + 1 - 1 / 32) / 2
    halves = (
        torch.special.ndtri(torch.linspace(outermost, 0.5, n, dtype=torch.float64)[:-1])
        for n in (8, 9)
    )
    below, above = (half / half[0] for half in halves)
    return torch.cat([-below, below.new_zeros(1), above.flip(0)]).float()


def gguf(weight: Tensor, kind: str) -> Tensor:
    from gguf import GGMLQuantizationType, quants

    kind = GGMLQuantizationType[kind]
    return torch.from_numpy(quants.dequantize(quants.quantize(weight.numpy(), kind), kind))


def nearest(x: Tensor, code: Tensor) -> Tensor:
    """Return the nearest number in `code`, which is sorted, for each number."""
    return code[torch.bucketize(x, (code[1:] + code[:-1]) / 2, out_int32=True)]


# ---------------------------------------------------------------- measures


def randomised(network: nn.Module) -> nn.Module:
    """Draw random weights that keep the size of their inputs."""
    generator = torch.Generator().manual_seed(0)
    for parameter in network.requires_grad_(False).parameters():
        if parameter.ndim == 2:
            parameter.normal_(std=parameter.shape[1] ** -0.5, generator=generator)
    return network


def velocity(network: Flux, txt: Tensor) -> Tensor:
    """Return the velocity of random image tokens, 8x8, at t = 0.5."""
    c, generator = network.config, torch.Generator().manual_seed(1)
    img, axes = torch.randn(1, 64, c.in_channels, generator=generator), len(c.axes_dim)
    ids = sampling.image_ids(8, 8, axes), sampling.text_ids(txt.shape[1], axes)
    return network(img, ids[0], txt, ids[1], torch.tensor([0.5]))


def relative_l2(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


def psnr(a: np.ndarray, b: np.ndarray) -> float:
    """Return the PSNR in dB of images from 0 to 255; infinite if they are equal."""
    error = np.mean((a.astype(np.float64) - b) ** 2)
    return 10 * math.log10(255**2 / error) if error else math.inf
