"""Networks with the module names and signatures of BFL's code, to test `--against bfl` without it.

They are written from the equations in plain torch, and share no code with the project: RoPE is a
complex product, and attention is torch's. Biases, modulations and MLPs follow the family.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


def sinusoids(t):
    frequencies = torch.exp(-math.log(10000) * torch.arange(128) / 128)
    angles = 1000 * t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], -1).to(t)


def rotation(ids, axes, theta):
    """(1, N, axes) -> complex (N, d / 2)."""
    angles = [
        ids[0, :, i, None].double() * theta ** (-torch.arange(0, n, 2).double() / n)
        for i, n in enumerate(axes)
    ]
    angles = torch.cat(angles, -1)
    return torch.polar(torch.ones_like(angles), angles)


def rotate(x, turns):
    pairs = torch.view_as_complex(x.double().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * turns).flatten(-2).to(x)


def attend(q, k, v, turns):
    x = F.scaled_dot_product_attention(rotate(q, turns), rotate(k, turns), v)
    return x.transpose(1, 2).flatten(2)


class Embedder(nn.Module):
    def __init__(self, width, hidden, bias):
        super().__init__()
        self.in_layer = nn.Linear(width, hidden, bias)
        self.out_layer = nn.Linear(hidden, hidden, bias)

    def forward(self, x):
        return self.out_layer(F.silu(self.in_layer(x)))


class Scale(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))

    def forward(self, x):
        return F.normalize(x, dim=-1, eps=0) * x.shape[-1] ** 0.5 * self.scale


class Norms(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.query_norm, self.key_norm = Scale(width), Scale(width)

    def forward(self, q, k, v):
        return self.query_norm(q), self.key_norm(k)


class Gelu(nn.Module):
    def forward(self, x):
        return F.gelu(x, approximate="tanh")


class Gated(nn.Module):
    def forward(self, x):
        gate, value = x.chunk(2, -1)
        return F.silu(gate) * value


@dataclass
class Triple:
    shift: torch.Tensor
    scale: torch.Tensor
    gate: torch.Tensor


class Modulation(nn.Module):
    def __init__(self, width, double, bias):
        super().__init__()
        self.double = double
        self.lin = nn.Linear(width, (6 if double else 3) * width, bias)

    def forward(self, vec):
        parts = self.lin(F.silu(vec))[:, None].chunk(6 if self.double else 3, -1)
        return Triple(*parts[:3]), Triple(*parts[3:]) if self.double else None


class Attention(nn.Module):
    def __init__(self, width, heads, bias):
        super().__init__()
        self.heads = heads
        self.qkv, self.proj = nn.Linear(width, 3 * width, bias), nn.Linear(width, width, bias)
        self.norm = Norms(width // heads)

    def split(self, x):
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        return *self.norm(q, k, v), v


def modulated(x, mod):
    return (1 + mod.scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + mod.shift


class DoubleBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        width, hidden = c.hidden_size, int(c.hidden_size * c.mlp_ratio)
        for stream in ("img", "txt"):
            if not c.flux2:
                setattr(self, f"{stream}_mod", Modulation(width, True, True))
            setattr(self, f"{stream}_attn", Attention(width, c.num_heads, not c.flux2))
            up = nn.Linear(width, hidden * (2 if c.flux2 else 1), not c.flux2)
            down = nn.Linear(hidden, width, not c.flux2)
            activation = Gated() if c.flux2 else Gelu()
            setattr(self, f"{stream}_mlp", nn.Sequential(up, activation, down))

    def forward(self, img, txt, turns, mods):
        (a, b), (c, d) = mods
        parts = [self.txt_attn.split(modulated(txt, c)), self.img_attn.split(modulated(img, a))]
        q, k, v = (torch.cat(pair, 2) for pair in zip(*parts))
        out = attend(q, k, v, turns)
        img = img + a.gate * self.img_attn.proj(out[:, txt.shape[1] :])
        txt = txt + c.gate * self.txt_attn.proj(out[:, : txt.shape[1]])
        img = img + b.gate * self.img_mlp(modulated(img, b))
        txt = txt + d.gate * self.txt_mlp(modulated(txt, d))
        return img, txt


class SingleBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.width, self.heads = c.hidden_size, c.num_heads
        hidden = int(c.hidden_size * c.mlp_ratio)
        up = hidden * (2 if c.flux2 else 1)
        self.linear1 = nn.Linear(c.hidden_size, 3 * c.hidden_size + up, not c.flux2)
        self.linear2 = nn.Linear(c.hidden_size + hidden, c.hidden_size, not c.flux2)
        self.norm = Norms(c.hidden_size // c.num_heads)
        self.mlp_act = Gated() if c.flux2 else Gelu()
        if not c.flux2:
            self.modulation = Modulation(c.hidden_size, False, True)

    def forward(self, x, turns, mod):
        qkv, mlp = self.linear1(modulated(x, mod)).tensor_split([3 * self.width], -1)
        q, k, v = qkv.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.norm(q, k, v)
        out = attend(q, k, v, turns)
        return x + mod.gate * self.linear2(torch.cat([out, self.mlp_act(mlp)], -1))


class LastLayer(nn.Module):
    def __init__(self, width, out, bias):
        super().__init__()
        self.linear = nn.Linear(width, out, bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width, bias))

    def forward(self, x, vec):
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, -1)
        return self.linear(modulated(x, Triple(shift, scale, scale)))


class Network(nn.Module):
    """The transformer of both families."""

    def __init__(self, c):
        super().__init__()
        self.c, bias, width = c, not c.flux2, c.hidden_size
        self.img_in = nn.Linear(c.in_channels, width, bias)
        self.txt_in = nn.Linear(c.context_in_dim, width, bias)
        self.time_in = Embedder(256, width, bias)
        if c.guidance_embed:
            self.guidance_in = Embedder(256, width, bias)
        if not c.flux2:
            self.vector_in = Embedder(c.vec_in_dim, width, bias)
        else:
            self.double_stream_modulation_img = Modulation(width, True, False)
            self.double_stream_modulation_txt = Modulation(width, True, False)
            self.single_stream_modulation = Modulation(width, False, False)
        self.double_blocks = nn.ModuleList(DoubleBlock(c) for _ in range(c.depth))
        self.single_blocks = nn.ModuleList(SingleBlock(c) for _ in range(c.depth_single_blocks))
        self.final_layer = LastLayer(width, c.out_channels, bias)

    def run(self, img, img_ids, txt, txt_ids, t, y, guidance):
        c, img, txt = self.c, self.img_in(img), self.txt_in(txt)
        vec = self.time_in(sinusoids(t))
        if c.guidance_embed:
            vec = vec + self.guidance_in(sinusoids(guidance))
        if y is not None:
            vec = vec + self.vector_in(y)
        turns = rotation(torch.cat([txt_ids, img_ids], 1), c.axes_dim, c.theta)
        if c.flux2:
            shared = (
                self.double_stream_modulation_img(vec),
                self.double_stream_modulation_txt(vec),
            )
            single, _ = self.single_stream_modulation(vec)
        for block in self.double_blocks:
            mods = shared if c.flux2 else (block.img_mod(vec), block.txt_mod(vec))
            img, txt = block(img, txt, turns, mods)
        x = torch.cat([txt, img], 1)
        for block in self.single_blocks:
            x = block(x, turns, single if c.flux2 else block.modulation(vec)[0])
        return self.final_layer(x[:, txt.shape[1] :], vec)
