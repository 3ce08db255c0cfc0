"""The FLUX 3 image transformer, all of it in this file.

Tokens have one of three modes: generated image, reference images, text. Each mode first passes
alone through *mode* blocks, with weights of its own. Then all tokens pass, as one sequence, through
*single* blocks. All blocks are of one kind: attention and MLP in parallel, on the same input.

Image tokens are modulated by the time t, text and references by time 0. A *flow map*, the model
that was distilled to few steps, also reads its target: the time to which the step will jump.

References:
1) FLUX 3: https://github.com/black-forest-labs/flux-3-image-klein; its code was not at hand
2) diffusers 0.42.1, models/transformers/transformer_flux3.py, which computes the same
3) flow maps: Boffi et al. 2024, https://arxiv.org/abs/2406.07507

Attribute names are the keys of the released checkpoints. In comments: B batch, L image tokens, T
text tokens, R reference tokens, N = T + L + R, N' the tokens of one mode, C channels of latents,
D hidden size, H heads, d = D / H channels of a head.
"""

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Flux3Config:
    """Sizes, and one switch. The defaults are FLUX 3 Image [klein] base."""

    in_channels: int = 128  # of image tokens and of reference tokens
    context_dim: int = 20480
    hidden_size: int = 3072
    num_heads: int = 24
    depth: int = 5  # mode blocks of each mode
    depth_single: int = 28
    mlp_ratio: float = 3.0
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)
    theta: int = 10_000
    flow_map: bool = False  # the target time is an input


# ------------------------------------------------------------------ position and time


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int) -> Tensor:
    """Return the rotation matrices of positions: (N, axes) -> (N, d/2, 2, 2), float32.

    Each axis rotates its own share of the channels (RoPE, Su et al. 2021, arXiv:2104.09864).
    Angles are float64.
    """
    angles = []
    for position, dim in zip(ids.cpu().unbind(-1), axes_dim, strict=True):  # MPS has no float64
        frequency = 1 / theta ** (torch.arange(0, dim, 2, dtype=torch.float64) / dim)  # (dim/2,)
        angles.append(torch.outer(position.double(), frequency))  # (N, dim/2)
    angle = torch.cat(angles, dim=-1)  # (N, d/2)
    cos, sin = angle.cos(), angle.sin()
    matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (N, d/2, 2, 2)
    return matrices.float().to(ids.device)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels: (B, N, H, d) float32 -> the same."""
    pairs = x.unflatten(-1, (-1, 1, 2))  # (B, N, H, d/2, 1, 2)
    rope = rope[:, None]  # (N, 1, d/2, 2, 2)
    return (rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]).flatten(-2)


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10_000) -> Tensor:
    """Return cosines, then sines, of t at geometric frequencies: (B,) -> (B, dim), float32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(max_period) * exponent / half)  # (dim/2,)
    angle = t.float()[:, None] * frequency  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    """Embed a time from 0 to 1: (B,) -> (B, D)."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.in_layer = nn.Linear(256, hidden_size, bias=False)
        self.out_layer = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, t: Tensor) -> Tensor:
        dtype = self.out_layer.weight.dtype
        # The product is rounded to the network's dtype, in diffusers and in most ports of BFL's
        # code. In bfloat16 this rounding outweighs all other arithmetic.
        wave = timestep_embedding(1000 * t.to(dtype))  # (B, 256)
        return self.out_layer(F.silu(self.in_layer(wave.to(dtype))))


# ------------------------------------------------------------------ modulation


class ModulationOut(NamedTuple):
    """x + gate * block((1 + scale) * norm(x) + shift); each is (B, 1 | N, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """Map the activated conditioning vector (B, 1, D) to a mode's modulation in all its blocks."""

    def __init__(self, hidden_size: int):
        super().__init__()
        self.lin = nn.Linear(hidden_size, 3 * hidden_size, bias=False)

    def forward(self, vec: Tensor) -> ModulationOut:
        return ModulationOut(*self.lin(vec).chunk(3, dim=-1))


def modulate(x: Tensor, shift: Tensor, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Return (1 + scale) * norm(x) + shift, computed in `dtype`, in the dtype of x."""
    norm = F.layer_norm(x.to(dtype), x.shape[-1:], eps=1e-6)
    return ((1 + scale.to(dtype)) * norm + shift.to(dtype)).to(x.dtype)


# ------------------------------------------------------------------ the block


class RMSNorm(nn.Module):
    """x / rms(x) * scale, in float32."""

    def __init__(self, dim: int):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), x.shape[-1:], self.scale.float(), eps=1e-6)


class QKNorm(nn.Module):
    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = RMSNorm(dim)
        self.key_norm = RMSNorm(dim)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """(B, N, H, d) each -> (B, N, D). Without a mask: padding took part in training."""
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


class Block(nn.Module):
    """Attention and a gated MLP (SwiGLU, Shazeer 2020, arXiv:2002.05202) in parallel."""

    def __init__(self, c: Flux3Config, modulation_dtype: torch.dtype | None):
        super().__init__()
        self.num_heads, self.modulation_dtype = c.num_heads, modulation_dtype
        width = int(c.mlp_ratio * c.hidden_size)
        self.q_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.k_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.v_proj = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.attn_out = nn.Linear(c.hidden_size, c.hidden_size, bias=False)
        self.mlp_in = nn.Linear(c.hidden_size, 2 * width, bias=False)
        self.mlp_out = nn.Linear(width, c.hidden_size, bias=False)
        self.norm = QKNorm(c.hidden_size // c.num_heads)

    def forward(self, x: Tensor, rope: Tensor, mod: ModulationOut) -> Tensor:
        y = modulate(x, mod.shift, mod.scale, self.modulation_dtype or x.dtype)  # (B, N, D)

        q = self.q_proj(y).unflatten(-1, (self.num_heads, -1))  # (B, N, H, d), as k and v
        k = self.k_proj(y).unflatten(-1, (self.num_heads, -1))
        v = self.v_proj(y).unflatten(-1, (self.num_heads, -1))
        q, k = self.norm(q, k)  # float32, and rounded once, after RoPE
        q, k = apply_rope(q, rope).to(v.dtype), apply_rope(k, rope).to(v.dtype)
        attended = self.attn_out(attention(q, k, v))  # (B, N, D)

        gate, up = self.mlp_in(y).chunk(2, dim=-1)  # (B, N, 3 D) each
        return x + mod.gate * (attended + self.mlp_out(F.silu(gate) * up))


class FinalLayer(nn.Module):
    def __init__(self, c: Flux3Config, modulation_dtype: torch.dtype | None):
        super().__init__()
        self.modulation_dtype = modulation_dtype
        self.linear = nn.Linear(c.hidden_size, c.in_channels, bias=False)
        lin = nn.Linear(c.hidden_size, 2 * c.hidden_size, bias=False)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), lin)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec).chunk(2, dim=-1)  # (B, 1, D) each
        y = modulate(x, shift, scale, self.modulation_dtype or x.dtype)  # (B, L, D)
        return self.linear(y)  # (B, L, C)


# ------------------------------------------------------------------ the model


class Stream(NamedTuple):
    """The tokens of one mode after its mode blocks, and what the single blocks need for them."""

    x: Tensor  # (B, N', D)
    rope: Tensor  # (N', d/2, 2, 2)
    mod: ModulationOut  # of the single blocks, (B, 1, D) each


BLOCK_LISTS = (  # in the order in which they run
    "txt_mode_blocks",
    "content_mode_blocks.image_cond",
    "content_mode_blocks.image",
    "single_blocks",
)


class Flux3(nn.Module):
    """modulation_dtype: what norms and modulation are computed in; None: the network's dtype.

    Ports of BFL's code compute them in float32, diffusers in the network's dtype.
    """

    def __init__(self, config: Flux3Config, modulation_dtype: torch.dtype | None = torch.float32):
        super().__init__()
        c = self.config = config
        images, modes = ("image", "image_cond"), ("image", "image_cond", "txt")

        def blocks(count: int) -> nn.ModuleList:
            return nn.ModuleList(Block(c, modulation_dtype) for _ in range(count))

        self.time_in = MLPEmbedder(c.hidden_size)
        if c.flow_map:
            self.ref_time_in = MLPEmbedder(c.hidden_size)
        self.emb_in = nn.ModuleDict(
            {mode: nn.Linear(c.in_channels, c.hidden_size, bias=False) for mode in images}
        )
        self.txt_in = nn.Linear(c.context_dim, c.hidden_size, bias=False)
        self.early_stream_modulations = nn.ModuleDict(
            {mode: Modulation(c.hidden_size) for mode in modes}
        )
        self.single_stream_modulations = nn.ModuleDict(
            {mode: Modulation(c.hidden_size) for mode in modes}
        )
        self.content_mode_blocks = nn.ModuleDict({mode: blocks(c.depth) for mode in images})
        self.txt_mode_blocks = blocks(c.depth)
        self.single_blocks = blocks(c.depth_single)
        self.final_layer = nn.ModuleDict({"image": FinalLayer(c, modulation_dtype)})

    def forward(
        self,
        img: Tensor,  # (B, L, C) image tokens, one for 16x16 pixels
        img_ids: Tensor,  # (L, 4) their positions: 0, row / 2, column / 2, 0
        txt: Tensor,  # (B, T, D') text features
        txt_ids: Tensor,  # (T, 4) positions 0, 0, 0, number
        t: Tensor,  # (B,) from 1 (noise) to 0 (image)
        references: Tensor | None = None,  # (B, R, C)
        reference_ids: Tensor | None = None,  # (R, 4): 0, row / 2, column / 2, -1 | -2 | ...
        target: Tensor | None = None,  # (B,) the next time; flow maps only
    ) -> Tensor:
        """Return the velocity of the image tokens, noise - image, (B, L, C)."""
        vec, vec_0 = self.vec(t, target), self.vec(torch.zeros_like(t), target)  # (B, 1, D)
        text = self.stream("txt", txt, self.rope(txt_ids), vec_0)
        others = []
        if (references is None) != (reference_ids is None):
            raise ValueError("reference_ids: are the positions of `references`. Pass both.")
        if references is not None and reference_ids is not None:
            others = [self.stream("image_cond", references, self.rope(reference_ids), vec_0)]
        return self.denoise(img, self.rope(img_ids), vec, text, *others)

    def rope(self, ids: Tensor) -> Tensor:
        """Return the rotations of positions: (N', 4) -> (N', d/2, 2, 2), float32."""
        return rope_table(ids, self.config.axes_dim, self.config.theta)

    def vec(self, t: Tensor, target: Tensor | None = None) -> Tensor:
        """Return the conditioning vector of a time: (B,) -> (B, 1, D)."""
        if self.config.flow_map != (target is not None):
            raise ValueError(
                "target: is needed by flow maps (`config.flow_map`), and by no others."
            )
        vec = self.time_in(t)
        if target is not None:
            vec = vec + self.ref_time_in(target)
        return vec[:, None]

    def stream(self, mode: str, tokens: Tensor, rope: Tensor, vec: Tensor) -> Stream:
        """Run the mode blocks of "image", "image_cond" or "txt" on its tokens (B, N', C | D').

        Without a flow map, text and references have the same vec at all times: their streams are
        the same in all steps.
        """
        x = self.txt_in(tokens) if mode == "txt" else self.emb_in[mode](tokens)  # (B, N', D)
        active = F.silu(vec)  # (B, 1, D)
        mod = self.early_stream_modulations[mode](active)
        blocks: Any = self.txt_mode_blocks if mode == "txt" else self.content_mode_blocks[mode]
        for block in blocks:
            x = block(x, rope, mod)
        return Stream(x, rope, self.single_stream_modulations[mode](active))

    def denoise(
        self, img: Tensor, rope: Tensor, vec: Tensor, text: Stream, *references: Stream
    ) -> Tensor:
        """Do what `forward` does, from the streams of the text and of references."""
        streams = [text, self.stream("image", img, rope, vec), *references]
        x = torch.cat([stream.x for stream in streams], dim=1)  # (B, N, D)
        rope = torch.cat([stream.rope for stream in streams])  # (N, d/2, 2, 2)
        mods = [[part.expand(-1, s.x.shape[1], -1) for part in s.mod] for s in streams]
        mod = ModulationOut(*(torch.cat(parts, dim=1) for parts in zip(*mods)))  # (B, N, D) each
        for block in self.single_blocks:
            x = block(x, rope, mod)
        start = text.x.shape[1]
        return self.final_layer["image"](x[:, start : start + img.shape[1]], vec)  # (B, L, C)
