"""flux.parity.diagnose: each mistake of its table, made by hand in float64 from what a capture holds, is named.

Nothing of ours computes what is expected: attention, norms, RoPE and the rest are written out here, wrongly as a port might.
"""

import math
import re
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import save_file
from support.load_script import script
from support.tiny_repositories import home, write_tokenizers
from torch import Tensor

import flux
from flux import transformer
from flux.configs import MODELS
from flux.image_io.request import ImageInputs
from flux.parity.capture import Request, Selection, capture
from flux.parity.capture_file import Capture
from flux.parity.compare import compare
from flux.parity.diagnose import Diagnosis, diagnose, told
from flux.parity.known_bugs import MISTAKES
from flux.parity.reference import networks, tiny_models, write_weights

FLUX1, FLUX2 = "flux.1-dev", "flux.2-klein-4b"
WIDE = Request(
    "a photo of a cat", width=96, height=80, steps=2, seed=5
)  # 30 image tokens; 24 and 64 of text
REQUESTS = {
    FLUX1: replace(WIDE, guidance=3.3, cfg_scale=2.5, negative_prompt="a dog"),
    FLUX2: WIDE,
}  # bfloat16 has no 3.3
pytestmark = pytest.mark.filterwarnings(
    "ignore:.* was distilled for", "ignore:.* was not trained with"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name in REQUESTS:
            spec = tiny_models(write_tokenizers(home(folder, name), name))[name]
            spec = replace(spec, transformer=replace(spec.transformer, depth=1, depth_single=2))
            patch.setitem(MODELS, name, spec)
            write_weights(home(folder, name), spec, networks(spec), sharded=False)
        yield folder


@pytest.fixture(scope="module")
def pipes(folder):
    return {
        name: flux.load(name, weights=folder, device="cpu", dtype=torch.float32)
        for name in REQUESTS
    }


@pytest.fixture(scope="module")
def captures(pipes, tmp_path_factory):
    out = tmp_path_factory.mktemp("captures")
    return {
        name: capture(pipes[name], request, out / f"{name}.safetensors")
        for name, request in REQUESTS.items()
    }


class Hand:
    """What was recorded, and the weights, in float64."""

    def __init__(self, taken: Capture, pipe):
        self.taken, self.pipe, self.config = taken, pipe, pipe.spec.transformer

    def __call__(self, name: str) -> Tensor:
        """`/q` is short for `step.001/q`."""
        x = self.taken.tensors[f"step.001{name}" if name.startswith("/") else name]
        return x.double() if x.is_floating_point() else x

    def weight(self, key: str, part: str = "transformer") -> Tensor:
        network = (
            getattr(self.pipe.text, part)
            if part in ("t5", "clip", "model")
            else getattr(self.pipe, part)
        )
        return network().state_dict()[key].double()


def normed(x: Tensor, eps: float = 1e-6) -> Tensor:
    return (x - x.mean(-1, keepdim=True)) / (x.var(-1, correction=0, keepdim=True) + eps).sqrt()


def rms(x: Tensor, dims=-1, eps: float = 1e-6) -> Tensor:
    return x / (x.square().mean(dims, keepdim=True) + eps).sqrt()


def modulated(h: Hand, stream: int, eps: float = 1e-6) -> Tensor:
    """What the image (0) or text (1) stream of the first double block gives to its qkv."""
    shift, scale = (
        h(f"/double_blocks.0/in.{3 + 6 * stream}"),
        h(f"/double_blocks.0/in.{4 + 6 * stream}"),
    )
    return scale * normed(h(f"/double_blocks.0/in.{stream}"), eps) + shift


def scale_of(h: Hand, which: str, stream: str = "img") -> Tensor:
    return h.weight(f"double_blocks.0.{stream}_attn.norm.{which}_norm.scale")


def joint(h: Hand, number: int) -> Tensor:
    """q (0) or k (1) of the first double block, after its norm and before RoPE, (B, H, N, d)."""
    both = torch.cat(
        [h(f"/double_blocks.0.{stream}_attn.norm/out") for stream in ("txt", "img")], dim=2
    )
    return both[number].transpose(1, 2)


def angles(h: Hand, ids: Tensor, theta: float | None = None) -> Tensor:
    columns = [
        ids[:, [axis]].double()
        * (theta or h.config.theta) ** (-torch.arange(0, dim, 2).double() / dim)
        for axis, dim in enumerate(h.config.axes_dim)
    ]
    return torch.cat(columns, dim=-1)  # (N, d/2)


def table(angle: Tensor) -> Tensor:
    return torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(
        -1, (2, 2)
    )


def turned(x: Tensor, angle: Tensor) -> Tensor:
    pairs = torch.view_as_complex(x.unflatten(-1, (-1, 2)).contiguous())
    return torch.view_as_real(pairs * torch.polar(torch.ones_like(angle), angle)).flatten(-2)


def in_halves(x: Tensor, angle: Tensor) -> Tensor:
    a, b = x.chunk(2, dim=-1)
    return torch.cat([a * angle.cos() - b * angle.sin(), b * angle.cos() + a * angle.sin()], dim=-1)


def positions(h: Hand) -> Tensor:
    return torch.cat([h("ids/txt"), h("ids/img")])


def moved(h: Hand, row: int, column: int) -> Tensor:
    ids = h("ids/img").clone()
    ids[:, 1] += row
    ids[:, 2] += column
    return ids


def transposed(h: Hand) -> Tensor:
    ids = h("ids/img").clone()
    ids[:, 1], ids[:, 2] = h("ids/img")[:, 2], h("ids/img")[:, 1]
    return ids


def attended(
    h: Hand,
    place: str,
    scale: float = 1.0,
    hidden: Tensor | None = None,
    bias: Tensor | float = 0.0,
) -> Tensor:
    """Attention written out; `scale` besides 1 / sqrt(d); `hidden` keys are not seen."""
    q, k, v = (h(f"{place}/attention/{tap}") for tap in "qkv")
    scores = q @ k.mT * scale / q.shape[-1] ** 0.5 + bias
    return (
        torch.softmax(scores if hidden is None else scores.masked_fill(hidden, -math.inf), dim=-1)
        @ v
    )


def padded(h: Hand, keys: int, prompt: str = "text") -> Tensor:
    """(keys,) True at the padded text tokens, with which the joint sequence begins."""
    of_text = (
        h(f"{prompt}/t5/in")[0] == 0
        if "text/t5/in" in h.taken.names
        else ~h(f"{prompt}/model/in.1")[0]
    )
    assert 0 < of_text.sum() < len(of_text)
    return torch.cat([of_text, torch.zeros(keys - len(of_text), dtype=torch.bool)])


def causal(n: int) -> Tensor:
    return ~torch.ones(n, n, dtype=torch.bool).tril()


def gelu(x: Tensor) -> Tensor:
    return x * (1 + torch.erf(x / 2**0.5)) / 2


def waves(t: float, last: int = 128) -> Tensor:
    """Sinusoids of t, which was multiplied by 1000 or should have been."""
    angle = t * 10_000 ** (-torch.arange(128).double() / last)
    return torch.cat([angle.cos(), angle.sin()])[None]


def bf16(x: float) -> float:
    return torch.tensor(x).bfloat16().item()


def t_of(h: Hand, step: int) -> float:
    return h("schedule")[step - 1].item()


def shifted(h: Hand, shift: float, even: Tensor) -> Tensor:
    return shift / (shift + 1 / even - 1)


def mu(h: Hand) -> float:
    """FLUX.1's, of 30 tokens."""
    return 0.5 + 0.65 * (30 - 256) / 3840


def regrouped(x: Tensor, axis: int, order: tuple[int, int, int]) -> Tensor:
    """Channels (c, row, column) in another order."""
    parts = x.movedim(axis, -1).unflatten(-1, (-1, 2, 2))
    return (
        parts.permute(*range(x.ndim - 1), *(x.ndim - 1 + place for place in order))
        .flatten(-3)
        .movedim(-1, axis)
    )


def spread_out(x: Tensor, order: tuple[int, int, int] = (0, 1, 2)) -> Tensor:
    """(1, C, h, w) -> (1, C/4, 2h, 2w), with the channels' parts (c, row, column) found in this order."""
    _, channels, height, width = x.shape
    sizes = [(channels // 4, 2, 2)[place] for place in order]
    parts = x.reshape(1, *sizes, height, width).permute(
        0, *(1 + order.index(place) for place in range(3)), 4, 5
    )
    return parts.permute(0, 1, 4, 2, 5, 3).reshape(1, channels // 4, 2 * height, 2 * width)


def statistics(h: Hand) -> tuple[Tensor | float, Tensor | float]:
    config = h.pipe.spec.autoencoder
    if config.scale_factor is not None:
        return config.shift_factor, 1 / config.scale_factor
    mean, var = (
        h.weight(f"bn.running_{which}", "autoencoder")[:, None, None] for which in ("mean", "var")
    )
    return mean, (var + 1e-4).sqrt()


def stepped(h: Hand, dt: float) -> Tensor:
    velocity = h("/velocity").mT.unflatten(2, h("noise").shape[2:])
    return h("noise") + dt * velocity


def in_clip(h: Hand, prompt: str = "text") -> Tensor:
    last = h(f"{prompt}/clip/text_model.encoder.layers.1/out")[:, -1]
    weight, bias = (
        h.weight(f"text_model.final_layer_norm.{key}", "clip") for key in ("weight", "bias")
    )
    return normed(last, 1e-5) * weight + bias


def raw(h: Hand, stream: str = "img", where: str = "step.001") -> Tensor:
    """q and k of the first double block before their norm, (2, B, N, H, d)."""
    qkv = h(f"{where}/double_blocks.0.{stream}_attn.qkv/out").unflatten(
        -1, (3, h.config.num_heads, -1)
    )
    return qkv[..., :2, :, :].movedim(-3, 0)


def scaled(h: Hand, x: Tensor) -> Tensor:
    return x * torch.stack([scale_of(h, which) for which in ("query", "key")])[:, None, None, None]


def by_heads(h: Hand) -> Tensor:
    qkv = h("/double_blocks.0.img_attn.qkv/out").unflatten(-1, (h.config.num_heads, 3, -1))
    return rms(qkv[..., :2, :].movedim(-2, 0))


def early(h: Hand, number: int) -> Tensor:
    """q (0) or k (1) of the double block, normed after RoPE."""
    angle, which = angles(h, positions(h)), ("query", "key")[number]
    q = torch.cat([raw(h, stream)[number] for stream in ("txt", "img")], dim=1).transpose(1, 2)
    scale = torch.cat([scale_of(h, which, "txt").expand(24, -1), scale_of(h, which).expand(30, -1)])
    return rms(turned(q, angle)) * scale


def last_modulated(h: Hand) -> Tensor:
    shift, scale = h("/final_layer.adaLN_modulation.1/out")[:, None].chunk(2, dim=-1)
    return (1 + shift) * normed(h("/final_layer/in.0")) + scale


def gated(h: Hand) -> Tensor:
    a, b = h("/double_blocks.0.img_mlp.0/out").chunk(2, dim=-1)
    return a * b * torch.sigmoid(b)


def guided(h: Hand, formula: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    return formula(h("/out"), h("/negative/out"))


def level(h: Hand) -> Tensor:
    return (((h("pixels")[0].clamp(-1, 1) + 1) * 127.5).floor()).byte().permute(1, 2, 0)


def of_middle(h: Hand) -> list[Tensor]:
    return [
        h.weight(f"decoder.mid.block_1.norm1.{key}", "autoencoder") for key in ("weight", "bias")
    ]


def of_upsampling(h: Hand) -> list[Tensor]:
    return [h.weight(f"{UP}.conv.{key}", "autoencoder") for key in ("weight", "bias")]


QKV, NORM, Q = (
    "/double_blocks.0.img_attn.qkv/in",
    "/double_blocks.0.img_attn.norm/out",
    "/double_blocks.0/attention/q",
)
MOD = "/double_blocks.0.img_mod/out"
AXIS, PACKING, BF16 = (
    "QK-norm over the wrong axis",
    "packing order of latents",
    "t rounded to bfloat16",
)
NO = "step.001/negative"
T5, CLIP, QWEN = (
    "text/t5/encoder.block.0.layer",
    "text/clip/text_model.encoder.layers.0",
    "text/model/layers.0",
)
UP = "decoder.up.3.upsample"

KNOWN = (  # model, tensor, what a port has there, and what the doctor should say; the last: a budget, where it must be small
    (
        FLUX1,
        QKV,
        lambda h: (
            (1 + h("/double_blocks.0/in.3")) * normed(h("/double_blocks.0/in.0"))
            + h("/double_blocks.0/in.4")
            - 1
        ),
        "shift and scale swapped",
    ),
    (FLUX1, f"{MOD}.0", lambda h: h(f"{MOD}.1") - 1, "shift and scale swapped"),
    (FLUX2, "/final_layer.linear/in", last_modulated, "shift and scale swapped"),
    (
        FLUX2,
        "/single_blocks.0.linear1/in",
        lambda h: (
            (h("/single_blocks.0/in.3") - 1) * normed(h("/single_blocks.0/in.0"))
            + h("/single_blocks.0/in.2")
        ),
        "1 + scale missing",
    ),
    (
        FLUX1,
        f"{MOD}.1",
        lambda h: 1 + h("/double_blocks.0.img_mod.lin/out").chunk(6, dim=-1)[2][:, None],
        "modulation cut by kind",
    ),
    (FLUX1, "/double_blocks.0.img_mod/in", lambda h: h("/vec"), "SiLU missing"),
    (FLUX1, QKV, lambda h: modulated(h, 0, 1e-5), "eps 1e-05", 1e-6),
    (FLUX2, "/double_blocks.0.txt_attn.qkv/in", lambda h: modulated(h, 1, 1e-5), "eps 1e-05", 1e-6),
    (FLUX2, NORM, lambda h: scaled(h, rms(raw(h), eps=1e-3)), "eps 0.001", 1e-6),
    (
        FLUX1,
        "text/t5/encoder.final_layer_norm/out",
        lambda h: (
            rms(h("text/t5/encoder.final_layer_norm/in"), eps=1e-3)
            * h.weight("encoder.final_layer_norm.weight", "t5")
        ),
        "eps 0.001",
        1e-6,
    ),
    (
        FLUX2,
        f"{QWEN}.input_layernorm/out",
        lambda h: (
            rms(h(f"{QWEN}.input_layernorm/in"), eps=1e-3)
            * h.weight("layers.0.input_layernorm.weight", "model")
        ),
        "eps 0.001",
        1e-6,
    ),
    (
        FLUX1,
        "decoder/decoder.mid.block_1.norm1/out",
        lambda h: F.group_norm(h("decoder/decoder.mid.block_1.norm1/in"), 16, *of_middle(h), 1e-3),
        "eps 0.001",
        1e-6,
    ),
    (FLUX1, NORM, raw, "QK-norm left out"),
    (FLUX2, NORM, lambda h: rms(raw(h)), "QK-norm without its scale"),
    (FLUX1, NORM, lambda h: scaled(h, rms(raw(h)).flip(0)).flip(0), "QK-norm's scales swapped"),
    (FLUX1, NORM, lambda h: scaled(h, rms(raw(h), 2)), AXIS),
    (FLUX1, NORM, lambda h: scaled(h, rms(raw(h), (3, 4))), AXIS),
    (FLUX2, NORM, lambda h: scaled(h, rms(raw(h), 3)), AXIS),
    (
        FLUX2,
        "/single_blocks.0.norm/in",
        lambda h: turned(h("/single_blocks.0.norm/in"), angles(h, positions(h))[:, None]),
        "QK-norm after RoPE",
    ),
    (FLUX1, Q, lambda h: early(h, 0), "QK-norm after RoPE"),
    (FLUX1, "/double_blocks.0/attention/k", lambda h: early(h, 1), "QK-norm after RoPE"),
    (FLUX1, Q, lambda h: in_halves(joint(h, 0), angles(h, positions(h))), "RoPE turns halves"),
    (
        FLUX2,
        Q,
        lambda h: (
            turned(joint(h, 0), angles(h, positions(h))).unflatten(-1, (-1, 2)).mT.flatten(-2)
        ),
        "RoPE's pairs stored as halves",
    ),
    (FLUX2, Q, lambda h: turned(joint(h, 0), -angles(h, positions(h))), "RoPE turns backwards"),
    (FLUX1, Q, lambda h: joint(h, 0), "RoPE left out"),
    (FLUX1, "rope", lambda h: table(angles(h, positions(h), 2000)), "RoPE's theta"),
    (FLUX2, "rope", lambda h: table(angles(h, positions(h), 10_000)), "RoPE's theta"),
    (FLUX1, "ids/img", transposed, "rows and columns swapped"),
    (
        FLUX2,
        "rope",
        lambda h: table(angles(h, torch.cat([h("ids/txt"), transposed(h)]))),
        "rows and columns swapped",
    ),
    (
        FLUX2,
        Q,
        lambda h: turned(joint(h, 0), angles(h, torch.cat([h("ids/txt"), transposed(h)]))),
        "rows and columns swapped",
    ),
    (FLUX1, "ids/img", lambda h: moved(h, 1, 0), "rows off by one"),
    (
        FLUX2,
        "rope",
        lambda h: table(angles(h, torch.cat([h("ids/txt"), moved(h, 0, 1)]))),
        "columns off by one",
    ),
    (
        FLUX1,
        Q,
        lambda h: turned(joint(h, 0), angles(h, torch.cat([h("ids/txt"), moved(h, 1, 1)]))),
        "rows and columns off by one",
    ),
    (FLUX2, "ids/txt", lambda h: 0 * h("ids/txt"), "text coordinates"),
    (FLUX1, "rope", lambda h: table(angles(h, positions(h).roll(30, 0))), "text and image order"),
    (
        FLUX2,
        "/single_blocks.0/in.0",
        lambda h: torch.cat(h("/single_blocks.0/in.0").split([64, 30], 1)[::-1], 1),
        "text and image order",
    ),
    (
        FLUX1,
        "/final_layer/in.0",
        lambda h: h("/single_blocks.1/out")[:, :30],
        "text and image order",
    ),
    (FLUX1, "/double_blocks.0.img_attn.norm/in", by_heads, "q, k, v cut by heads"),
    (
        FLUX1,
        "/double_blocks.0.img_mlp.1/out",
        lambda h: gelu(h("/double_blocks.0.img_mlp.1/in")),
        "GELU by erf",
    ),
    (FLUX1, f"{CLIP}.mlp.fc2/in", lambda h: gelu(h(f"{CLIP}.mlp.fc1/out")), "GELU by erf"),
    (
        FLUX1,
        f"{T5}.1.DenseReluDense.wo/in",
        lambda h: gelu(h(f"{T5}.1.DenseReluDense.wi_0/out")) * h(f"{T5}.1.DenseReluDense.wi_1/out"),
        "GELU by erf",
    ),
    (FLUX2, "/double_blocks.0.img_mlp.1/out", gated, "gate and value swapped"),
    (
        FLUX2,
        "/double_blocks.0/attention/out",
        lambda h: attended(h, "/double_blocks.0", scale=32**0.5),
        "attention not scaled",
    ),
    (
        FLUX1,
        "/double_blocks.0/attention/out",
        lambda h: attended(h, "/double_blocks.0", hidden=padded(h, 54)),
        "padding of the prompt masked",
    ),
    (
        FLUX2,
        "/single_blocks.1/attention/out",
        lambda h: attended(h, "/single_blocks.1", hidden=padded(h, 94)),
        "padding of the prompt masked",
    ),
    (
        FLUX1,
        f"{T5}.0.SelfAttention/attention/out",
        lambda h: attended(
            h, f"{T5}.0.SelfAttention", 8**0.5, padded(h, 24), h(f"{T5}.0.SelfAttention/in.1")
        ),
        "padding of the prompt masked",
    ),
    (
        FLUX2,
        "text/features",
        lambda h: h("text/features") * ~padded(h, 64)[:, None],
        "padding of the prompt zeroed",
    ),
    (
        FLUX2,
        f"{QWEN}.self_attn/attention/out",
        lambda h: attended(h, f"{QWEN}.self_attn", hidden=causal(64)),
        "padding of the prompt seen",
    ),
    (FLUX2, f"{QWEN}/in.2", lambda h: ~causal(64)[None, None], "padding of the prompt seen"),
    (
        FLUX1,
        f"{NO}/double_blocks.0/attention/out",
        lambda h: attended(h, f"{NO}/double_blocks.0", hidden=padded(h, 54, "text/negative")),
        "padding of the prompt masked",
    ),
    (
        FLUX1,
        f"{NO}/double_blocks.0.img_attn.norm/out",
        lambda h: raw(h, "img", NO),
        "QK-norm left out",
    ),
    (
        FLUX1,
        "negative/rope",
        lambda h: table(angles(h, torch.cat([h("negative/ids/txt"), transposed(h)]))),
        "rows and columns swapped",
    ),
    (FLUX1, "text/pooled", in_clip, "pooled at the last token"),
    (
        FLUX1,
        "text/negative/clip/out",
        lambda h: in_clip(h, "text/negative"),
        "pooled at the last token",
    ),
    (
        FLUX2,
        "text/model/out",
        lambda h: torch.cat(
            [h(f"text/model/{part}/out") for part in ("embed_tokens", "layers.0", "layers.2")],
            dim=-1,
        ),
        "hidden states off by one",
    ),
    (FLUX1, "step.002/time_in/in", lambda h: waves(t_of(h, 2)), "t not times 1000"),
    (FLUX1, "/guidance_in/in", lambda h: waves(3.3), "t not times 1000"),
    (FLUX1, "step.002/time_in/in", lambda h: waves(1000 * bf16(t_of(h, 2))), BF16),
    (FLUX2, "step.002/time_in/in", lambda h: waves(bf16(1000 * bf16(t_of(h, 2)))), BF16),
    (FLUX1, "step.002/time_in/in", lambda h: waves(bf16(1000 * t_of(h, 2))), BF16),
    (FLUX2, "/time_in/in", lambda h: waves(1000).roll(128, -1), "sines before cosines"),
    (FLUX2, "/time_in/in", lambda h: waves(1000, last=127), "frequencies off by one"),
    (FLUX2, "/time_in/in", lambda h: waves(1000 * t_of(h, 2)), "schedule off by one"),
    (
        FLUX1,
        "schedule",
        lambda h: shifted(h, math.exp(mu(h)), torch.tensor([2, 1, 0]).double() / 3),
        "schedule off by one",
    ),
    (
        FLUX1,
        "schedule",
        lambda h: shifted(h, math.exp(mu(h)), torch.tensor([3, 2, 1]).double() / 3),
        "schedule off by one",
    ),
    (FLUX2, "schedule", lambda h: torch.tensor([1, 0.5, 0]), "schedule unshifted"),
    (
        FLUX1,
        "schedule",
        lambda h: shifted(h, mu(h), torch.tensor([1, 0.5, 0]).double()),
        "schedule's mu",
    ),
    (
        FLUX2,
        "schedule",
        lambda h: shifted(h, math.exp(mu(h)), torch.tensor([1, 0.5, 0]).double()),
        "schedule's mu",
    ),
    (FLUX1, "schedule", lambda h: 1000 * h("schedule"), "t times 1000"),
    (FLUX1, "noise", lambda h: regrouped(h("noise"), 1, (1, 2, 0)), PACKING),
    (FLUX1, "noise", lambda h: regrouped(h("noise"), 1, (0, 2, 1)), PACKING),
    (FLUX2, "/in", lambda h: regrouped(h("/in"), 2, (1, 2, 0)), PACKING),
    (
        FLUX1,
        "decoder/decoder/in",
        lambda h: spread_out(
            h("step.002/latents") * statistics(h)[1] + statistics(h)[0], (1, 2, 0)
        ),
        PACKING,
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out(
            h("step.002/latents") * statistics(h)[1] + statistics(h)[0], (0, 2, 1)
        ),
        PACKING,
    ),
    (
        FLUX1,
        "/in",
        lambda h: h("/in").unflatten(1, (5, 6)).transpose(1, 2).flatten(1, 2),
        "image tokens column by column",
    ),
    (
        FLUX1,
        "noise",
        lambda h: torch.randn(1, 64, 5, 6, generator=torch.Generator().manual_seed(5)),
        "noise drawn in another layout",
    ),
    (FLUX1, "/out", lambda h: -h("/out"), "velocity's sign"),
    (FLUX2, "/latents", lambda h: stepped(h, t_of(h, 1) - t_of(h, 2)), "velocity's sign"),
    (FLUX1, "/latents", lambda h: stepped(h, t_of(h, 3) - t_of(h, 2)), "schedule off by one"),
    (FLUX1, "/velocity", lambda h: h("/out"), "guidance left out"),
    (
        FLUX1,
        "/velocity",
        lambda h: guided(h, lambda a, b: a + 2.5 * (b - a)),
        "guidance the wrong way",
    ),
    (
        FLUX1,
        "/velocity",
        lambda h: guided(h, lambda a, b: a + 2.5 * (a - b)),
        "guidance from the prompt",
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents")),
        "latent normalisation missing",
    ),
    (
        FLUX1,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents")),
        "latent normalisation missing",
    ),
    (
        FLUX1,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents") / 0.3611),
        "latent normalisation half missing",
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out(h("step.002/latents") + statistics(h)[0]),
        "latent normalisation half missing",
    ),
    (
        FLUX2,
        "decoder/decoder/in",
        lambda h: spread_out((h("step.002/latents") - statistics(h)[0]) / statistics(h)[1]),
        "latent normalisation inverted",
    ),
    (
        FLUX1,
        f"decoder/{UP}.conv/out",
        lambda h: F.conv2d(
            F.interpolate(h(f"decoder/{UP}/in"), scale_factor=2, mode="bilinear"),
            *of_upsampling(h),
            padding=1,
        ),
        "upsampling smooth",
    ),
    (FLUX1, "picture", level, "pixels truncated", 1e-3),
    (FLUX2, "picture", lambda h: h("picture").flip(-1), "red and blue swapped"),
)


def ported(folder: Path, tensors: dict[str, Tensor]) -> Capture:
    """What a port in another language writes: a plain file."""
    save_file({name: x.contiguous() for name, x in tensors.items()}, folder / "port.safetensors")
    return Capture(folder / "port.safetensors")


def examined(
    port: Capture, reference: Capture, pipe, budget: float | None = None
) -> Diagnosis | None:
    return diagnose(compare(port, reference, budget), port, reference, pipe)


@pytest.mark.parametrize(
    "case",
    KNOWN,
    ids=[re.sub("^/", "", f"{case[1]} {case[3]}").replace("/", ":") for case in KNOWN],
)
def test_known(case, pipes, captures, tmp_path):
    model, name, by_hand, cause, *budget = case
    reference, full = captures[model], f"step.001{name}" if name.startswith("/") else name
    wrong = by_hand(Hand(reference, pipes[model]))
    truth = reference.tensors[full]
    assert wrong.shape == truth.shape
    port = ported(tmp_path, {full: wrong.to(truth.dtype)})
    found = examined(port, reference, pipes[model], *budget)
    assert found.cause and found.cause.name == cause, told(found)
    assert found.unsound is None and f"cause: {cause}: {found.cause.sentence}" in told(found)


def test_every_mistake_is_tested():
    ours = {case[3] for case in KNOWN} | {"downsampling padded on all sides", "t kept in float32"}
    untested = {mistake.name for mistake in MISTAKES} - ours
    assert untested == {"eps 1e-06", "eps 1e-08", "eps 0.0001"}  # beside eps 1e-05 and 0.001


def test_encoding(pipes, tmp_path):
    """A stride of 2 with a border of zeros all around, where the encoder has one at the right and bottom."""
    picture = Image.fromarray(
        np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
    )
    pipe, request = pipes[FLUX2], replace(WIDE, pictures=ImageInputs((picture,)))
    reference = capture(
        pipe, request, tmp_path / "reference.safetensors", Selection(("encoder.1",))
    )
    h, name = Hand(reference, pipe), "encoder.1/encoder.down.0.downsample"
    weight, bias = (
        h.weight(f"encoder.down.0.downsample.conv.{key}", "encoder") for key in ("weight", "bias")
    )
    wrong = F.conv2d(h(f"{name}/in"), weight, bias, stride=2, padding=1)
    found = examined(ported(tmp_path, {f"{name}/out": wrong.float()}), reference, pipe)
    assert found.cause.name == "downsampling padded on all sides"
    latents = reference.tensors["encoder.1/latents"].double() * statistics(h)[1] + statistics(h)[0]
    found = examined(ported(tmp_path, {"encoder.1/latents": latents.float()}), reference, pipe)
    assert found.cause.name == "latent normalisation missing"


def test_references_that_are_seen_once(pipes, tmp_path):
    """They go another way through the blocks, with coordinates of their own."""
    request = replace(
        WIDE, pictures=ImageInputs((Image.new("RGB", (80, 64), "teal"),), kv_cache=True)
    )
    reference = capture(
        pipes[FLUX2], request, tmp_path / "reference.safetensors", Selection(("references",))
    )
    h, place = Hand(reference, pipes[FLUX2]), "references/double_blocks.0"
    wrong = in_halves(
        h(f"{place}.img_attn.norm/out")[1].transpose(1, 2), angles(h, h("references/ids/img"))
    )
    found = examined(
        ported(tmp_path, {f"{place}/attention/k": wrong.float()}), reference, pipes[FLUX2]
    )
    assert found.cause.name == "RoPE turns halves" and found.unsound is None


# ---------------------------------------------------------------- ports that tell less, or more


def test_of_a_block_only_its_output(pipes, captures, tmp_path):
    reference, block = captures[FLUX1], pipes[FLUX1].transformer().single_blocks[0]
    x, rope, shift, scale, gate = (
        reference.tensors[f"step.001/single_blocks.0/in.{number}"] for number in range(5)
    )
    with torch.inference_mode():
        wrong = block(x, rope, transformer.ModulationOut(scale - 1, 1 + shift, gate))
    found = examined(
        ported(tmp_path, {"step.001/single_blocks.0/out": wrong}), reference, pipes[FLUX1]
    )
    assert found.cause.name == "shift and scale swapped"


def test_of_a_network_only_its_output(pipes, captures, tmp_path):
    reference, network = captures[FLUX2], pipes[FLUX2].transformer()
    t = reference.tensors
    with torch.inference_mode():
        rope = network.rope(t["ids/txt"], transposed(Hand(reference, pipes[FLUX2])))
        wrong = network.velocity(
            t["step.001/in"], t["text/features"], rope, network.modulations(t["step.001/vec"])
        )
    found = examined(ported(tmp_path, {"step.001/out": wrong}), reference, pipes[FLUX2])
    assert found.cause.name == "rows and columns swapped" and found.unsound is None


def test_in_one_place_of_several(pipes, captures, tmp_path):
    """Shift and scale are swapped for the MLP alone: what went before, attention's, is as it should be."""
    reference = captures[FLUX1]
    h, proj = Hand(reference, pipes[FLUX1]), "/double_blocks.0.img_attn.proj/out"
    gate, shift, scale = (h(f"/double_blocks.0/in.{number}") for number in (5, 6, 7))
    x = h("/double_blocks.0/in.0") + gate * h(proj)
    wrong = ((1 + shift) * normed(x) + scale - 1).float()
    wrong = {f"step.001{proj}": h(proj).float(), "step.001/double_blocks.0.img_mlp/in": wrong}
    found = examined(ported(tmp_path, wrong), reference, pipes[FLUX1])
    assert found.row.name.endswith("img_mlp/in") and found.cause.name == "shift and scale swapped"


def test_in_bfloat16(folder, tmp_path):
    """Rounding is a hundredth, and a mistake is told from it."""
    pipe = flux.load(FLUX2, weights=folder, device="cpu", dtype=torch.bfloat16)
    reference = capture(pipe, WIDE, tmp_path / "reference.safetensors", Selection(("step.001",)))
    h, block = Hand(reference, pipe), "/single_blocks.0"
    shift, scale = h(f"{block}/in.2"), h(f"{block}/in.3")
    wrong = {
        f"step.001{block}.linear1/in": (
            (1 + shift) * normed(h(f"{block}/in.0")) + scale - 1
        ).bfloat16()
    }
    found = examined(ported(tmp_path, wrong), reference, pipe)
    assert found.cause.name == "shift and scale swapped" and 1e-4 < found.trials[0].residual < 1e-2


def test_rounding_that_is_left_out(folder, tmp_path):
    pipe = flux.load(FLUX2, weights=folder, device="cpu", dtype=torch.bfloat16, numerics="bfl")
    reference = capture(
        pipe, WIDE, tmp_path / "reference.safetensors", Selection(("time_in", "schedule"))
    )
    wrong = waves(1000 * t_of(Hand(reference, pipe), 2)).bfloat16()
    found = examined(ported(tmp_path, {"step.002/time_in/in": wrong}), reference, pipe)
    assert found.cause.name == "t kept in float32" and found.unsound is None


def test_probes(pipes, captures, tmp_path):
    """Of the port, a probe is enough."""
    from flux.parity.capture_file import Writer

    reference, name = captures[FLUX1], "step.001/double_blocks.0.img_mlp.1/out"
    with Writer(tmp_path / "port.safetensors", {}) as writer:
        writer.add(
            name, gelu(reference.tensors[name.replace("out", "in")].double()).float(), "probe"
        )
    port = Capture(tmp_path / "port.safetensors")
    assert port.kind(name) == "probe"
    assert examined(port, reference, pipes[FLUX1]).cause.name == "GELU by erf"


def test_nothing_is_wrong(pipes, captures, tmp_path):
    reference = captures[FLUX1]
    port = ported(tmp_path, {f"step.001{NORM}": reference.tensors[f"step.001{NORM}"]})
    assert examined(port, reference, pipes[FLUX1]) is None


def test_none_fits(pipes, captures, tmp_path):
    reference, name = captures[FLUX1], f"step.001{QKV}"
    truth = reference.tensors[name]
    other = torch.randn(truth.shape, generator=torch.Generator().manual_seed(0))
    broken = truth.clone()
    broken[0, 3, 7] = torch.nan
    for wrong in (other, truth + 0.01 * other, 1.02 * truth, broken):
        found = examined(ported(tmp_path, {name: wrong}), reference, pipes[FLUX1])
        assert found.cause is None and found.unsound is None and len(found.trials) > 3
        assert f"none of the {len(MISTAKES)} known mistakes explains it" in told(found)
    found = examined(ported(tmp_path, {name: truth[:, :7]}), reference, pipes[FLUX1])
    assert found.cause is None and "(1, 7, 128) and should be (1, 30, 128)" in told(found)


def test_other_weights(pipes, captures, folder, tmp_path):
    """The reference was not captured with them, and that is said."""
    pipe = flux.load(FLUX2, weights=folder, device="cpu", dtype=torch.float32)
    pipe.transformer().single_blocks[0].linear1.weight.mul_(1.1)
    reference, name = captures[FLUX2], "step.001/single_blocks.0.linear1/out"
    port = ported(tmp_path, {name: 2 * reference.tensors[name]})
    found = examined(port, reference, pipe)
    assert found.cause is None and found.unsound == pytest.approx(0.1, rel=1e-3)
    assert "they are not what it was captured with" in told(found)


# ---------------------------------------------------------------- the command


@pytest.fixture
def run(monkeypatch, capsys):
    module = script("parity")

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
        return module.main(), *capsys.readouterr()

    return run


def test_command(run, pipes, captures, folder, tmp_path):
    reference = captures[FLUX1]
    port = ported(tmp_path, {"ids/img": transposed(Hand(reference, pipes[FLUX1]))})
    code, out, _ = run("doctor", port.path, reference.path, "--weights", folder, "--device", "cpu")
    assert (
        code == 1
        and "the first is ids/img" in out
        and "cause: rows and columns swapped: the second coordinate" in out
    )
    code, out, _ = run("doctor", reference.path, reference.path)
    assert code == 0 and out.startswith("all ")
    code, _, err = run("doctor", reference.path, port.path)
    assert code == 2 and "is a plain file" in err
