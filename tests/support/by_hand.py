"""Parts of the networks in float64, written by hand from recorded tensors and weights.

Nothing of the project computes here. Ports with known bugs are made of these parts.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flux.parity.capture_file import Capture

UP = "decoder.up.3.upsample"


class Hand:
    """Recorded tensors and weights in float64."""

    def __init__(self, recorded: Capture, pipe):
        self.recorded, self.pipe, self.config = recorded, pipe, pipe.spec.transformer

    def __call__(self, name: str) -> Tensor:
        """`/q` is short for `step.001/q`."""
        x = self.recorded.tensors[f"step.001{name}" if name.startswith("/") else name]
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
    """The input of qkv in the image (0) or text (1) stream of the first double-stream block."""
    shift = h(f"/double_blocks.0/arg.{3 + 6 * stream}")
    scale = h(f"/double_blocks.0/arg.{4 + 6 * stream}")
    return (1 + scale) * normed(h(f"/double_blocks.0/in.{stream}"), eps) + shift


def scale_of(h: Hand, which: str, stream: str = "img") -> Tensor:
    return h.weight(f"double_blocks.0.{stream}_attn.norm.{which}_norm.scale")


def joint(h: Hand, number: int) -> Tensor:
    """q (0) or k (1) of the first double-stream block, normalised, before RoPE: (B, H, N, d)."""
    streams = [h(f"/double_blocks.0.{x}_attn.norm/out.{number}") for x in ("txt", "img")]
    return torch.cat(streams, dim=2)


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
        if "text/t5/in" in h.recorded.names
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
    """(1, C, h, w) -> (1, C/4, 2h, 2w), with (c, row, column) in this order in the channels."""
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


def raw(h: Hand, number: int, stream: str = "img", where: str = "step.001") -> Tensor:
    """q (0) or k (1) of the first double-stream block before its norm, (B, H, N, d)."""
    qkv = h(f"{where}/double_blocks.0.{stream}_attn.qkv/out")
    qkv = qkv.unflatten(-1, (3, h.config.num_heads, -1))  # (B, N, 3, H, d)
    return qkv[..., number, :, :].transpose(1, 2)


def raw_query(h: Hand) -> Tensor:
    return raw(h, 0)


def scaled_query(h: Hand, x: Tensor) -> Tensor:
    return x * scale_of(h, "query")


def by_heads(h: Hand) -> Tensor:
    qkv = h("/double_blocks.0.img_attn.qkv/out").unflatten(-1, (h.config.num_heads, 3, -1))
    return qkv[..., 0, :].transpose(1, 2)


def early(h: Hand, number: int) -> Tensor:
    """q (0) or k (1) of the double-stream block, normalised after RoPE."""
    angle, which = angles(h, positions(h)), ("query", "key")[number]
    q = torch.cat([raw(h, number, stream) for stream in ("txt", "img")], dim=2)
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
