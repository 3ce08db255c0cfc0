"""The FLUX.1 and FLUX.2 image transformers, all of it in this file.

Image and text tokens pass through *double-stream* blocks: two sets of weights, one joint attention.
Then they pass, as one sequence, through *single-stream* blocks: attention and MLP in parallel.
Time, guidance and, in FLUX.1, the pooled text are summed into one vector. Every block is modulated
by this vector (adaLN-Zero, as in DiT).

References:
1) FLUX.1: https://github.com/black-forest-labs/flux/blob/main/src/flux/model.py
2) FLUX.2: https://github.com/black-forest-labs/flux2/blob/main/src/flux2/model.py
3) DiT: Peebles & Xie 2022, https://arxiv.org/abs/2212.09748

Attribute names are the keys of the released checkpoints. A module computes what the module of that
name computes in the original code. In comments: B batch, L image tokens, T text tokens,
N = T + L, D hidden size, H heads, d = D / H channels of a head, R reference tokens.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class FluxConfig:
    """Sizes and switches. The defaults are FLUX.2 [dev].

    Four switches tell FLUX.1 from FLUX.2: vector_dim, bias, gated_mlp and shared_modulation.
    """

    in_channels: int = 128  # FLUX.1: 64, and up to 384 with conditioning channels
    out_channels: int = 128
    context_dim: int = 15360
    hidden_size: int = 6144
    num_heads: int = 48
    depth: int = 8
    depth_single: int = 48
    mlp_ratio: float = 3.0
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)
    theta: int = 2000
    vector_dim: int | None = None  # width of the pooled text (FLUX.1: CLIP's 768)
    guidance: bool = True  # the guidance scale is an input
    bias: bool = False
    gated_mlp: bool = True
    shared_modulation: bool = True  # one modulation for all blocks of a kind, not one for each


@dataclass(frozen=True)
class Numerics:
    """Where the published implementations round differently. `NUMERICS` names the presets.

    The first three fields concern this network, the others what runs around it, and FLUX 3.
    In float32, `time`, `norm_scale` and `state` make no difference.
    """

    time: Literal["float32", "bfl", "diffusers"] = "float32"  # rounding of 1000 t, 1000 guidance
    rope: torch.dtype = torch.float64  # of the rotation angles; the table itself is float32
    norm_scale: Literal["before", "after"] = "before"  # QK-norm scales before or after rounding
    state: Literal["float32", "bfl", "diffusers"] = "float32"  # of the latents between steps
    schedule: Literal["float64", "bfl", "diffusers"] = "float64"  # arithmetic of the times
    decode: Literal["float32", "bfl", "model"] = "float32"  # dtype of the decoder
    images: Literal["rounded", "bfl"] = "rounded"  # levels of control maps, steps of a strength
    noise: Literal["tokens", "grid"] = "tokens"  # FLUX 3: the order in which it is drawn
    modulation: Literal["float32", "model"] = "float32"  # FLUX 3: dtype of norms and modulation


NUMERICS = {
    "exact": Numerics(),
    "bfl": Numerics(
        time="bfl",
        rope=torch.float32,
        norm_scale="after",
        state="bfl",
        schedule="bfl",
        decode="bfl",
        images="bfl",
    ),
    "diffusers": Numerics(
        time="diffusers",
        state="diffusers",
        schedule="diffusers",
        decode="model",
        noise="grid",
        modulation="model",
    ),
}


class KVCache:
    """Keys (after RoPE) and values of one block's reference tokens, (B, R, H, d) each.

    FLUX.2 [klein] 9B KV was trained with references that attend only to each other, at t = 0.
    The first pass, over the references alone, stores them. Later passes attend to them, between
    the text and the image, where they stood in training.
    """

    def __init__(self, text_length: int):
        self.text_length = text_length
        self.k: Tensor | None = None
        self.v: Tensor | None = None

    def update(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Store k and v, or return them with the stored ones inserted: (B, T + R + L, H, d)."""
        if self.k is None or self.v is None:
            self.k, self.v = k.clone(), v.clone()  # v is a view, and would keep q and k alive
            return k, v
        return self._insert(self.k, k), self._insert(self.v, v)

    def _insert(self, cached: Tensor, x: Tensor) -> Tensor:
        txt, img = x.tensor_split([self.text_length], dim=1)
        return torch.cat([txt, cached.expand(len(x), -1, -1, -1), img], dim=1)


# ------------------------------------------------------------------ position, time, modulation


def rope_table(
    ids: Tensor, axes_dim: tuple[int, ...], theta: int, dtype: torch.dtype = torch.float64
) -> Tensor:
    """Return the rotation matrices of positions: (N, axes) -> (N, d/2, 2, 2), float32.

    Each axis rotates its own share of the channels (RoPE, Su et al. 2021, arXiv:2104.09864).
    """
    angles = []
    for position, dim in zip(ids.cpu().unbind(-1), axes_dim, strict=True):  # MPS has no float64
        frequency = 1 / theta ** (torch.arange(0, dim, 2, dtype=dtype) / dim)  # (dim/2,)
        angles.append(torch.outer(position.to(dtype), frequency))  # (N, dim/2)
    angle = torch.cat(angles, dim=-1)  # (N, d/2)
    cos, sin = angle.cos(), angle.sin()
    matrices = torch.stack([cos, -sin, sin, cos], dim=-1).unflatten(-1, (2, 2))  # (N, d/2, 2, 2)
    return matrices.float().to(ids.device)


def apply_rope(x: Tensor, rope: Tensor) -> Tensor:
    """Rotate neighbouring pairs of channels in float32: (B, N, H, d) -> (B, N, H, d)."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))  # (B, N, H, d/2, 1, 2)
    rope = rope[:, None]  # (N, 1, d/2, 2, 2)
    out = rope[..., 0] * pairs[..., 0] + rope[..., 1] * pairs[..., 1]  # (B, N, H, d/2, 2)
    return out.flatten(-2).to(x.dtype)  # (B, N, H, d)


def scale_time(t: Tensor, rounding: str, dtype: torch.dtype) -> Tensor:
    """Return 1000 t in float32, rounded on the way as a published implementation does.

    Rounding 1000 t to bfloat16 outweighs all other bfloat16 arithmetic of the network.
    """
    if rounding == "float32":
        return 1000 * t.float()
    if rounding == "diffusers":  # the scheduler rounds 1000 t, the pipeline divides by 1000
        t = (1000 * t.float()).to(dtype) / 1000
    return (1000 * t.to(dtype)).float()


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10_000) -> Tensor:
    """Return cosines, then sines, of t at geometric frequencies: (B,) -> (B, dim), float32."""
    half = dim // 2
    exponent = torch.arange(half, dtype=torch.float32, device=t.device)
    frequency = torch.exp(-math.log(max_period) * exponent / half)  # (dim/2,)
    angle = t.float()[:, None] * frequency  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_size: int, bias: bool):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size, bias=bias)
        self.out_layer = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class ModulationOut(NamedTuple):
    """x + gate * branch((1 + scale) * norm(x) + shift); each is (B, 1, D)."""

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulation(nn.Module):
    """Map vec (B, D) to one ModulationOut for each residual branch of a block.

    A double-stream block has two branches a stream, a single-stream block has one.
    """

    def __init__(self, c: FluxConfig, branches: int):
        super().__init__()
        self.lin = nn.Linear(c.hidden_size, 3 * branches * c.hidden_size, bias=c.bias)

    def forward(self, vec: Tensor) -> list[ModulationOut]:
        chunks = self.lin(F.silu(vec))[:, None].split(vec.shape[-1], dim=-1)  # (B, 1, D) each
        return [ModulationOut(*chunks[i : i + 3]) for i in range(0, len(chunks), 3)]


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return (1 + scale) * F.layer_norm(x, x.shape[-1:], eps=1e-6) + shift


# ------------------------------------------------------------------ attention and MLP


class RMSNorm(nn.Module):
    """x / rms(x) * scale. BFL rounds before it scales, diffusers after (`Numerics.norm_scale`)."""

    def __init__(self, dim: int, numerics: Numerics):
        super().__init__()
        self.numerics = numerics
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        if self.numerics.norm_scale == "after":
            return F.rms_norm(x, x.shape[-1:], eps=1e-6) * self.scale
        wide = x.to(self.scale.dtype)  # which is float32 in training under autocast
        return F.rms_norm(wide, x.shape[-1:], self.scale, eps=1e-6).to(x.dtype)


class QKNorm(nn.Module):
    def __init__(self, dim: int, numerics: Numerics):
        super().__init__()
        self.query_norm = RMSNorm(dim, numerics)
        self.key_norm = RMSNorm(dim, numerics)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.query_norm(q), self.key_norm(k)


class SelfAttention(nn.Module):
    """The projections of one stream. The attention itself is shared with the other stream."""

    def __init__(self, c: FluxConfig, numerics: Numerics):
        super().__init__()
        self.num_heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=c.bias)
        self.norm = QKNorm(c.hidden_size // c.num_heads, numerics)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size, bias=c.bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return normalised q, normalised k and v: (B, N, D) -> (B, N, H, d) each."""
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).unbind(2)
        q, k = self.norm(q, k)
        return q, k, v


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rope: Tensor,
    cache: KVCache | None = None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attend: (B, N, H, d) each -> (B, N, D).

    No released model has a mask: padding took part in training. `mask`, (N, N) or (B, 1, N, N), is
    True where a query (row) may see a key (column).
    """
    q, k = apply_rope(q, rope), apply_rope(k, rope)
    if cache is not None:
        k, v = cache.update(k, v)  # (B, N + R, H, d)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


class GatedSiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


def mlp_widths(c: FluxConfig) -> tuple[int, int]:
    """Return the widths before and after the activation. A gated activation halves the width."""
    width = int(c.mlp_ratio * c.hidden_size)
    return (2 * width if c.gated_mlp else width), width


def mlp_activation(c: FluxConfig) -> nn.Module:
    return GatedSiLU() if c.gated_mlp else nn.GELU(approximate="tanh")


def mlp(c: FluxConfig) -> nn.Sequential:
    inner, outer = mlp_widths(c)
    return nn.Sequential(
        nn.Linear(c.hidden_size, inner, bias=c.bias),
        mlp_activation(c),
        nn.Linear(outer, c.hidden_size, bias=c.bias),
    )


# ------------------------------------------------------------------ blocks


class DoubleStreamBlock(nn.Module):
    """Image and text have separate weights, and meet in one joint attention."""

    def __init__(self, c: FluxConfig, numerics: Numerics):
        super().__init__()
        if not c.shared_modulation:
            self.img_mod = Modulation(c, 2)
            self.txt_mod = Modulation(c, 2)
        self.img_attn = SelfAttention(c, numerics)
        self.txt_attn = SelfAttention(c, numerics)
        self.img_mlp = mlp(c)
        self.txt_mlp = mlp(c)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        rope: Tensor,
        img_mod: list[ModulationOut],
        txt_mod: list[ModulationOut],
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        img_mod1, img_mod2 = img_mod
        txt_mod1, txt_mod2 = txt_mod

        # joint attention, text first
        img_qkv = self.img_attn(modulate(img, img_mod1.shift, img_mod1.scale))
        txt_qkv = self.txt_attn(modulate(txt, txt_mod1.shift, txt_mod1.scale))
        q, k, v = (torch.cat(pair, dim=1) for pair in zip(txt_qkv, img_qkv))  # (B, T + L, H, d)
        out = attention(q, k, v, rope, cache, mask)  # (B, T + L, D)
        # contiguous: a Linear with a bias rounds twice in bfloat16 if its input is strided
        txt_out = out[:, : txt.shape[1]].contiguous()  # (B, T, D)
        img_out = out[:, txt.shape[1] :].contiguous()  # (B, L, D)

        img = img + img_mod1.gate * self.img_attn.proj(img_out)
        img = img + img_mod2.gate * self.img_mlp(modulate(img, img_mod2.shift, img_mod2.scale))
        txt = txt + txt_mod1.gate * self.txt_attn.proj(txt_out)
        txt = txt + txt_mod2.gate * self.txt_mlp(modulate(txt, txt_mod2.shift, txt_mod2.scale))
        return img, txt


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel. linear1 gives q, k, v and the MLP's hidden layer.

    linear2 reads the attention's output and the activated hidden layer.
    """

    def __init__(self, c: FluxConfig, numerics: Numerics):
        super().__init__()
        inner, outer = mlp_widths(c)
        self.num_heads = c.num_heads
        self.widths = [3 * c.hidden_size, inner]
        self.linear1 = nn.Linear(c.hidden_size, 3 * c.hidden_size + inner, bias=c.bias)
        self.linear2 = nn.Linear(c.hidden_size + outer, c.hidden_size, bias=c.bias)
        self.norm = QKNorm(c.hidden_size // c.num_heads, numerics)
        self.mlp_act = mlp_activation(c)
        if not c.shared_modulation:
            self.modulation = Modulation(c, 1)

    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mod: ModulationOut,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        hidden = self.linear1(modulate(x, mod.shift, mod.scale))  # (B, N, 3 D + inner)
        qkv, hidden = hidden.split(self.widths, dim=-1)
        q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, H, d) each
        q, k = self.norm(q, k)
        out = attention(q, k, v, rope, cache, mask)  # (B, N, D)
        return x + mod.gate * self.linear2(torch.cat([out, self.mlp_act(hidden)], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, c: FluxConfig):
        super().__init__()
        self.linear = nn.Linear(c.hidden_size, c.out_channels, bias=c.bias)
        lin = nn.Linear(c.hidden_size, 2 * c.hidden_size, bias=c.bias)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), lin)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)  # (B, 1, D) each
        return self.linear(modulate(x, shift, scale))


# ------------------------------------------------------------------ the model


class Modulations(NamedTuple):
    """What one time (with guidance and pooled text) does to the network."""

    vec: Tensor  # (B, D), for the final layer
    double: list[tuple[list[ModulationOut], list[ModulationOut]]]  # image's and text's, by block
    single: list[ModulationOut]  # by block


class Residuals(NamedTuple):
    """What a ControlNet adds to the image tokens after each block, (B, L, D); None: nothing."""

    double: list[Tensor | None]
    single: list[Tensor | None]


BLOCK_LISTS = ("double_blocks", "single_blocks")  # in the order in which they run


class Flux(nn.Module):
    def __init__(self, config: FluxConfig, numerics: Numerics = NUMERICS["exact"]):
        super().__init__()
        c = self.config = config
        self.numerics = numerics
        self.img_in = nn.Linear(c.in_channels, c.hidden_size, bias=c.bias)
        self.txt_in = nn.Linear(c.context_dim, c.hidden_size, bias=c.bias)
        self.time_in = MLPEmbedder(256, c.hidden_size, c.bias)
        if c.guidance:
            self.guidance_in = MLPEmbedder(256, c.hidden_size, c.bias)
        if c.vector_dim is not None:
            self.vector_in = MLPEmbedder(c.vector_dim, c.hidden_size, c.bias)
        if c.shared_modulation:
            self.double_stream_modulation_img = Modulation(c, 2)
            self.double_stream_modulation_txt = Modulation(c, 2)
            self.single_stream_modulation = Modulation(c, 1)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(c, numerics) for _ in range(c.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(c, numerics) for _ in range(c.depth_single)
        )
        self.final_layer = FinalLayer(c)

    def forward(
        self,
        img: Tensor,  # (B, L, C) image tokens, one for 16x16 pixels
        img_ids: Tensor,  # (L, 3|4) their positions: image number, row, column[, 0]
        txt: Tensor,  # (B, T, D') text features
        txt_ids: Tensor,  # (T, 3|4)
        t: Tensor,  # (B,) from 1 (noise) to 0 (image)
        guidance: Tensor | None = None,  # (B,)
        vector: Tensor | None = None,  # (B, V) pooled text, FLUX.1 only
    ) -> Tensor:
        """Return the velocity of the image tokens, (B, L, out_channels)."""
        mods = self.modulations([self.vec(t, guidance, vector)])[0]
        return self.denoise(img, txt, self.rope(txt_ids, img_ids), mods)

    def denoise(
        self,
        img: Tensor,
        txt: Tensor,
        rope: Tensor,
        mods: Modulations,
        caches: list[KVCache] | None = None,
        mask: Tensor | None = None,
        residuals: Residuals | None = None,
    ) -> Tensor:
        """Do what `forward` does, from the RoPE table and the modulations of one time.

        The table is the same for every step, the modulations for every image. `caches`, one for
        each block, hold the keys and values of reference tokens. `mask`: see `attention`.
        """
        count = self.config.depth + self.config.depth_single
        all_caches: Iterator[KVCache | None] = iter(caches if caches else [None] * count)
        nothing: list[Tensor | None] = [None] * count
        doubles, singles = map(iter, residuals or Residuals(nothing, nothing))
        img, txt = self.img_in(img), self.txt_in(txt)  # (B, L, D), (B, T, D)
        for block, (img_mod, txt_mod) in zip(self.double_blocks, mods.double, strict=True):
            img, txt = block(img, txt, rope, img_mod, txt_mod, next(all_caches), mask)
            img = img if (added := next(doubles)) is None else img + added
        x = torch.cat([txt, img], dim=1)  # (B, T + L, D)
        for block, mod in zip(self.single_blocks, mods.single, strict=True):
            x = block(x, rope, mod, next(all_caches), mask)
            if (added := next(singles)) is not None:
                x = torch.cat([x[:, : txt.shape[1]], x[:, txt.shape[1] :] + added], dim=1)
        return self.final_layer(x[:, txt.shape[1] :], mods.vec)  # (B, L, out_channels)

    def rope(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """Return the rotations of the joint sequence, text first: (T + L, d/2, 2, 2), float32."""
        ids = torch.cat([txt_ids, img_ids])
        return rope_table(ids, self.config.axes_dim, self.config.theta, self.numerics.rope)

    def vec(
        self, t: Tensor, guidance: Tensor | None = None, vector: Tensor | None = None
    ) -> Tensor:
        """Return the conditioning vector, the same for all tokens: (B, D)."""
        dtype = next(self.parameters()).dtype
        time = timestep_embedding(scale_time(t, self.numerics.time, dtype))  # (B, 256)
        vec = self.time_in(time.to(dtype))  # (B, D)
        if self.config.guidance:
            if guidance is None:
                raise ValueError("guidance: missing (this model reads it). Pass a (B,) tensor.")
            # diffusers rounds guidance as BFL does
            rounding = "float32" if self.numerics.time == "float32" else "bfl"
            scale = timestep_embedding(scale_time(guidance, rounding, dtype))  # (B, 256)
            vec = vec + self.guidance_in(scale.to(dtype))
        if self.config.vector_dim is not None:
            if vector is None:
                raise ValueError("vector: missing (this model reads pooled text). Pass (B, V).")
            vec = vec + self.vector_in(vector)
        return vec

    def modulations(self, vecs: list[Tensor]) -> list[Modulations]:
        """Return the modulations of several times, each from its vec (B, D).

        One call serves all times of a run, since the blocks' weights may be streamed.
        """
        if self.config.shared_modulation:  # FLUX.2: computed once, handed to every block
            img_mod, txt_mod = self.double_stream_modulation_img, self.double_stream_modulation_txt
            double = [[(img_mod(vec), txt_mod(vec)) for vec in vecs]] * self.config.depth
            single = [[self.single_stream_modulation(vec)[0] for vec in vecs]]
            single = single * self.config.depth_single
        else:
            double = [
                [(b.img_mod(vec), b.txt_mod(vec)) for vec in vecs] for b in self.double_blocks
            ]
            single = [[b.modulation(vec)[0] for vec in vecs] for b in self.single_blocks]
        return [
            Modulations(vec, [mods[i] for mods in double], [mods[i] for mods in single])
            for i, vec in enumerate(vecs)
        ]
