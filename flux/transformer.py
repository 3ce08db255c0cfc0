"""The FLUX transformer, FLUX.1 and FLUX.2, whole and top to bottom.

Text and image tokens first pass through *double* blocks (two sets of weights, one joint attention), then, as one sequence,
through *single* blocks (attention and MLP side by side). Time, guidance and, in FLUX.1, the pooled text make one vector, from
which each block is given its modulation: a block does not know which family it is in. Attribute names are the keys of
Black Forest Labs' files.

    img (B, L, C)    image tokens, one per 16x16 pixels          img_ids (L, 3|4)   their coordinates (t, row, column[, l])
    txt (B, T, D)    text features                               txt_ids (T, 3|4)
    t (B,)           time, from 1 (noise) to 0 (picture)         guidance (B,)      vector (B, V) pooled text, FLUX.1 only
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.runtime.fast import in_stripes


@dataclass(frozen=True)
class FluxConfig:
    """The four switches `vector_dim`, `bias`, `gated_mlp`, `shared_modulation` tell FLUX.1 from FLUX.2; the rest are sizes."""

    in_channels: int = (
        128  # 64 latent channels in FLUX.1, and up to 384 where conditions are stacked on them
    )
    out_channels: int = 128
    context_dim: int = 15360
    hidden_size: int = 6144
    num_heads: int = 48
    depth: int = 8
    depth_single: int = 48
    mlp_ratio: float = 3.0
    axes_dim: tuple[int, ...] = (32, 32, 32, 32)
    theta: int = 2000
    vector_dim: int | None = None
    guidance: bool = True
    bias: bool = False
    gated_mlp: bool = True
    shared_modulation: bool = True


@dataclass(frozen=True)
class Numerics:
    """Where published codes round differently. In float32 only `rope` matters; in bf16 `time` outweighs everything else."""

    time: Literal["float32", "bfl", "diffusers"] = (
        "float32"  # how t·1000 and guidance·1000 are rounded
    )
    rope: torch.dtype = (
        torch.float64
    )  # dtype of the rotation angles; the tables are kept in float32
    norm_scale: Literal["before", "after"] = (
        "before"  # QK-norm's scale is multiplied before or after rounding to bf16
    )
    state: Literal["float32", "bfl", "diffusers"] = (
        "float32"  # how the sampler carries the latents between steps
    )


NUMERICS = {
    "exact": Numerics(),
    "bfl": Numerics(time="bfl", rope=torch.float32, norm_scale="after", state="bfl"),
    "diffusers": Numerics(time="diffusers", state="diffusers"),
}


class ModulationOut(NamedTuple):
    """What time does to one residual branch: x + gate · f(norm(x) · scale + shift); each (B, 1, D).

    A modulator gives the scale less 1: it is added here, once a time, and not again wherever the scale is used.
    """

    shift: Tensor
    scale: Tensor
    gate: Tensor


class Modulations(NamedTuple):
    """All that one time does to the network."""

    vec: Tensor  # (B, D), which the final layer makes its own of
    double: list[
        tuple[list[ModulationOut], list[ModulationOut]]
    ]  # of each block: the image's two, the text's two
    single: list[ModulationOut]


class Memory(NamedTuple):
    """Keys, turned already, and values of tokens that one block attends to without computing them; each (B, R, H, d)."""

    k: Tensor
    v: Tensor


BLOCK_LISTS = (
    "double_blocks",
    "single_blocks",
)  # paths of the lists of blocks, in the order of their use


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
            self.double_stream_modulation_img = Modulation(c.hidden_size, 2, c.bias)
            self.double_stream_modulation_txt = Modulation(c.hidden_size, 2, c.bias)
            self.single_stream_modulation = Modulation(c.hidden_size, 1, c.bias)
        self.double_blocks = nn.ModuleList(DoubleStreamBlock(c, numerics) for _ in range(c.depth))
        self.single_blocks = nn.ModuleList(
            SingleStreamBlock(c, numerics) for _ in range(c.depth_single)
        )
        self.final_layer = FinalLayer(c)

    def forward(
        self,
        img: Tensor,
        img_ids: Tensor,
        txt: Tensor,
        txt_ids: Tensor,
        t: Tensor,
        guidance: Tensor | None = None,
        vector: Tensor | None = None,
    ) -> Tensor:
        """Velocity of the image tokens, (B, L, out_channels)."""
        return self.velocity(
            img, txt, self.rope(txt_ids, img_ids), self.modulations(self.vec(t, guidance, vector))
        )

    def velocity(
        self,
        img: Tensor,
        txt: Tensor,
        rope: Tensor,
        mods: Modulations,
        memories: Sequence[Memory] | None = None,
    ) -> Tensor:
        """The same, given `rope`, the same at every step, and `mods`, the same for every picture at this time.

        `memories`, one a block, are what `remember` made of reference pictures.
        """
        memories = iter(memories or [None] * (self.config.depth + self.config.depth_single))
        img, txt = self.img_in(img), self.txt_in(txt)  # (B, L, D), (B, T, D)
        for block, (img_mod, txt_mod) in zip(self.double_blocks, mods.double, strict=True):
            img, txt = block(img, txt, rope, img_mod, txt_mod, next(memories))
        x = torch.cat([txt, img], dim=1)  # (B, T + L, D)
        for block, mod in zip(self.single_blocks, mods.single, strict=True):
            x = block(x, rope, mod, next(memories))
        return self.final_layer(x[:, txt.shape[1] :], mods.vec)  # (B, L, out_channels)

    def remember(self, references: Tensor, rope: Tensor, mods: Modulations) -> list[Memory]:
        """Reference tokens (B, R, C), alone with each other, with the `mods` of t = 0 -> what each block keeps of them.

        So FLUX.2 [klein] 9B KV was trained: references see neither text nor picture, and no time passes for them. Hence
        they need to be computed only once a generation, where elsewhere they are part of every step.
        """
        x, memories = self.img_in(references), []  # (B, R, D)
        for block, (mod, _) in zip(self.double_blocks, mods.double, strict=True):
            x, memory = block.remember(x, rope, mod)
            memories.append(memory)
        for block, mod in zip(self.single_blocks, mods.single, strict=True):
            x, memory = block.remember(x, rope, mod)
            memories.append(memory)
        return memories

    def rope(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """Rotations of the joint sequence, text first: (T + L, head_dim/2, 2, 2), float32."""
        ids = torch.cat([txt_ids, img_ids])
        return rope_table(ids, self.config.axes_dim, self.config.theta, self.numerics.rope)

    def vec(
        self, t: Tensor, guidance: Tensor | None = None, vector: Tensor | None = None
    ) -> Tensor:
        """Everything that is the same for all tokens, as one (B, D)."""
        dtype = next(self.parameters()).dtype  # of what is never quantised
        vec = self.time_in(timestep_embedding(scale_time(t, self.numerics.time, dtype)).to(dtype))
        if self.config.guidance:
            if guidance is None:
                raise ValueError("this model has guidance built in: pass guidance, a (B,) tensor")
            # BFL and diffusers agree here: guidance is rounded, then its thousandfold
            rounding = "float32" if self.numerics.time == "float32" else "bfl"
            vec = vec + self.guidance_in(
                timestep_embedding(scale_time(guidance, rounding, dtype)).to(dtype)
            )
        if self.config.vector_dim is not None:
            if vector is None:
                raise ValueError(
                    "this model reads the pooled text: pass vector, a (B, vector_dim) tensor"
                )
            vec = vec + self.vector_in(vector)
        return vec

    def modulations(self, vec: Tensor) -> Modulations:
        """(B, D) -> what each block is given, which depends on time, guidance and pooled text only."""
        return self.tabulate([vec])[0]

    def tabulate(self, vecs: Sequence[Tensor]) -> list[Modulations]:
        """The `modulations` of several times, in one way through the blocks: they may be streamed."""
        active = [F.silu(vec) for vec in vecs]
        if self.config.shared_modulation:  # FLUX.2: computed once, handed to every block
            both = [
                (self.double_stream_modulation_img(a), self.double_stream_modulation_txt(a))
                for a in active
            ]
            single = [self.single_stream_modulation(a)[0] for a in active]
            depth, depth_single = self.config.depth, self.config.depth_single
            return [
                Modulations(vec, [d] * depth, [s] * depth_single)
                for vec, d, s in zip(vecs, both, single)
            ]
        double = [
            [(block.img_mod(a), block.txt_mod(a)) for a in active] for block in self.double_blocks
        ]
        single = [[block.modulation(a)[0] for a in active] for block in self.single_blocks]
        return [
            Modulations(vec, [d[i] for d in double], [s[i] for s in single])
            for i, vec in enumerate(vecs)
        ]


class DoubleStreamBlock(nn.Module):
    """Image and text, each with its own weights, meet in one attention."""

    def __init__(self, c: FluxConfig, numerics: Numerics):
        super().__init__()
        self.numerics = numerics
        if not c.shared_modulation:
            self.img_mod = Modulation(c.hidden_size, 2, c.bias)
            self.txt_mod = Modulation(c.hidden_size, 2, c.bias)
        self.img_attn = SelfAttention(c)
        self.txt_attn = SelfAttention(c)
        self.img_mlp = mlp(c)
        self.txt_mlp = mlp(c)

    def forward(
        self,
        img: Tensor,
        txt: Tensor,
        rope: Tensor,
        img_mod: list[ModulationOut],
        txt_mod: list[ModulationOut],
        memory: Memory | None = None,
    ) -> tuple[Tensor, Tensor]:
        length = txt.shape[1]
        img_qkv = self.img_attn.heads(modulate(img, img_mod[0]))  # (3, B, L, H, d)
        txt_qkv = self.txt_attn.heads(modulate(txt, txt_mod[0]))  # (3, B, T, H, d)
        qkv = torch.cat([txt_qkv, img_qkv], dim=2)  # (3, B, T + L, H, d)
        del img_qkv, txt_qkv
        attended = attention(*self.turned(qkv[:2], rope, length), qkv[2], memory)  # (B, T + L, D)
        # contiguous, or in bf16 a Linear with bias would round once more, and a row would depend on the size of its batch;
        # and viewed as if made so, or one without bias would copy its weights: of one picture, a slice keeps a longer stride
        txt_attended, img_attended = (
            x.contiguous().view(x.shape) for x in attended.split([length, img.shape[1]], dim=1)
        )
        img = residuals(img, img_attended, self.img_attn.proj, self.img_mlp, img_mod)
        return img, residuals(txt, txt_attended, self.txt_attn.proj, self.txt_mlp, txt_mod)

    def turned(self, qk: Tensor, rope: Tensor, length: int) -> Tensor:
        """q and k, (2, B, T + L, H, d), normed and turned; `length` of the tokens are text, which has scales of its own."""

        def some(before: int, qk: Tensor, rope: Tensor) -> Tensor:
            unit, text = unit_rms(qk, self.numerics), max(0, min(length - before, qk.shape[2]))
            parts = self.txt_attn.norm(unit[:, :, :text]), self.img_attn.norm(unit[:, :, text:])
            return rotate(torch.cat(parts, dim=2), rope)

        return in_stripes(
            some, (qk, 2), (rope, 0), watched=[self.txt_attn.norm, self.img_attn.norm]
        )

    def remember(self, x: Tensor, rope: Tensor, mod: list[ModulationOut]) -> tuple[Tensor, Memory]:
        """The image stream alone."""
        qkv = self.img_attn.heads(modulate(x, mod[0]))  # (3, B, R, H, d)
        q, k = turned(qkv[:2], rope, self.img_attn.norm, self.numerics)
        attended = attention(q, k, qkv[2])  # (B, R, D)
        return residuals(x, attended, self.img_attn.proj, self.img_mlp, mod), Memory(k, qkv[2])


def residuals(
    x: Tensor, attended: Tensor, proj: nn.Module, mlp: nn.Module, mod: list[ModulationOut]
) -> Tensor:
    """The two branches of one stream of a double block, after its attention."""
    x = x + mod[0].gate * proj(attended)
    return x + mod[1].gate * mlp(modulate(x, mod[1]))


class SingleStreamBlock(nn.Module):
    """Attention and MLP in parallel: one matrix in (`linear1` = q, k, v, mlp), one out (`linear2` of attention, mlp)."""

    def __init__(self, c: FluxConfig, numerics: Numerics):
        super().__init__()
        self.numerics = numerics
        self.widths = [3 * c.hidden_size, mlp_width(c) * (2 if c.gated_mlp else 1)]
        self.num_heads = c.num_heads
        self.linear1 = nn.Linear(c.hidden_size, sum(self.widths), bias=c.bias)
        self.linear2 = nn.Linear(c.hidden_size + mlp_width(c), c.hidden_size, bias=c.bias)
        self.norm = QKNorm(c.hidden_size // c.num_heads)
        self.activation = GatedSiLU() if c.gated_mlp else nn.GELU(approximate="tanh")
        if not c.shared_modulation:
            self.modulation = Modulation(c.hidden_size, 1, c.bias)

    def forward(
        self, x: Tensor, rope: Tensor, mod: ModulationOut, memory: Memory | None = None
    ) -> Tensor:
        qkv, hidden = self.project(x, mod)
        return self.residual(
            x,
            attention(*turned(qkv[:2], rope, self.norm, self.numerics), qkv[2], memory),
            hidden,
            mod,
        )

    def remember(self, x: Tensor, rope: Tensor, mod: ModulationOut) -> tuple[Tensor, Memory]:
        qkv, hidden = self.project(x, mod)
        q, k = turned(qkv[:2], rope, self.norm, self.numerics)
        return self.residual(x, attention(q, k, qkv[2]), hidden, mod), Memory(k, qkv[2])

    def project(self, x: Tensor, mod: ModulationOut) -> tuple[Tensor, Tensor]:
        """q, k and v, (3, B, N, H, d), and the MLP's hidden layer."""
        qkv, hidden = self.linear1(modulate(x, mod)).split(self.widths, dim=-1)
        return split_heads(qkv, self.num_heads), hidden

    def residual(self, x: Tensor, attended: Tensor, hidden: Tensor, mod: ModulationOut) -> Tensor:
        return x + mod.gate * self.linear2(self.joined(attended, hidden))

    def joined(self, attended: Tensor, hidden: Tensor) -> Tensor:
        """What `linear2` reads, (B, N, D + mlp): the attention's result, and the MLP's hidden layer activated."""

        def some(_, hidden, attended):
            return torch.cat([attended, self.activation(hidden)], dim=-1)

        return in_stripes(some, (hidden, 1), (attended, 1), watched=[self.activation])


class SelfAttention(nn.Module):
    """The weights of one stream; the attention itself is shared with the other stream."""

    def __init__(self, c: FluxConfig):
        super().__init__()
        self.num_heads = c.num_heads
        self.qkv = nn.Linear(c.hidden_size, 3 * c.hidden_size, bias=c.bias)
        self.norm = QKNorm(c.hidden_size // c.num_heads)
        self.proj = nn.Linear(c.hidden_size, c.hidden_size, bias=c.bias)

    def heads(self, x: Tensor) -> Tensor:
        return split_heads(self.qkv(x), self.num_heads)


def split_heads(qkv: Tensor, num_heads: int) -> Tensor:
    """(B, N, 3·H·d) -> (3, B, N, H, d)."""
    return qkv.unflatten(-1, (3, num_heads, -1)).permute(2, 0, 1, 3, 4)


def attention(q: Tensor, k: Tensor, v: Tensor, memory: Memory | None = None) -> Tensor:
    """(B, N, H, d) x 3 -> (B, N, H·d). No mask: padding takes part, as it did in training. `memory` is attended to as well."""
    if memory is not None:
        k, v = torch.cat([memory.k, k], dim=1), torch.cat([memory.v, v], dim=1)  # (B, R + N, H, d)
    out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, k, v)))  # (B, H, N, d)
    return out.transpose(1, 2).flatten(2)


def turned(qk: Tensor, rope: Tensor, norm: "QKNorm", numerics: Numerics) -> Tensor:
    """q and k, (2, B, N, H, d), normed and turned."""

    def some(_, qk, rope):
        return rotate(norm(unit_rms(qk, numerics)), rope)

    return in_stripes(some, (qk, 2), (rope, 0), watched=[norm])


def rope_table(ids: Tensor, axes_dim: tuple[int, ...], theta: int, dtype: torch.dtype) -> Tensor:
    """(N, axes) positions -> (N, sum(axes_dim)/2, 2, 2) float32: a rotation by position · theta^(-2i/dim), axis by axis."""
    angles = []
    for position, dim in zip(ids.unbind(-1), axes_dim, strict=True):
        frequency = 1 / theta ** (
            torch.arange(0, dim, 2, dtype=dtype) / dim
        )  # on the CPU: no float64 on Apple GPUs
        angles.append(torch.outer(position.cpu().to(dtype), frequency))  # (N, dim/2)
    angle = torch.cat(angles, dim=-1)
    cos, sin = angle.cos(), angle.sin()
    columns = torch.stack([cos, sin], dim=-1), torch.stack([-sin, cos], dim=-1)
    return (
        torch.stack(columns).float().to(ids.device).movedim(0, -1)
    )  # in memory a column lies together: see `turn`


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turns neighbouring pairs of channels (x0, x1), in float32: (..., N, H, d) -> the same."""
    return (
        turn(x.float().contiguous().unflatten(-1, (-1, 2)), rope[:, None]).flatten(-2).to(x.dtype)
    )


def turn(pairs: Tensor, rope: Tensor) -> Tensor:
    """(..., N, H, d/2, 2), each by its matrix of (N, 1, d/2, 2, 2)."""
    columns = rope.unbind(-1)  # (N, 1, d/2, 2) each
    if torch.compiler.is_compiling() or pairs.is_mps:  # which know little of complex numbers
        return columns[0] * pairs[..., :1] + columns[1] * pairs[..., 1:]
    # (x0 + i·x1) · (cos + i·sin): one kernel, and the same bits
    return torch.view_as_real(
        torch.view_as_complex(pairs) * torch.view_as_complex(columns[0].contiguous())
    )


class QKNorm(nn.Module):
    """The scales of the two norms. What they scale is of length one already: `unit_rms` takes all q and k together."""

    def __init__(self, dim: int):
        super().__init__()
        self.query_norm = nn.ParameterDict({"scale": torch.ones(dim)})
        self.key_norm = nn.ParameterDict({"scale": torch.ones(dim)})

    def forward(self, unit: Tensor) -> Tensor:
        """(2, B, N, H, d), queries and keys -> the same."""
        scale = torch.cat([self.query_norm.scale, self.key_norm.scale]).view(2, 1, 1, 1, -1)
        return (unit * scale).to(scale.dtype)


def unit_rms(x: Tensor, numerics: Numerics) -> Tensor:
    """x / sqrt(mean(x²) + 1e-6) over the last axis; BFL rounds it to bf16, others scale it first, and it stays in float32."""
    return F.rms_norm(x if numerics.norm_scale == "after" else x.float(), x.shape[-1:], eps=1e-6)


def modulate(x: Tensor, mod: ModulationOut) -> Tensor:
    return mod.scale * F.layer_norm(x, x.shape[-1:], eps=1e-6) + mod.shift


class Modulation(nn.Module):
    """silu(vec) (B, D) -> `branches` modulations, in the checkpoint's order shift, scale - 1, gate."""

    def __init__(self, hidden_size: int, branches: int, bias: bool):
        super().__init__()
        self.lin = nn.Linear(hidden_size, 3 * branches * hidden_size, bias=bias)

    def forward(self, activated: Tensor) -> list[ModulationOut]:
        parts = rearrange(
            self.lin(activated),
            "b (branch three d) -> branch three b 1 d",
            three=3,
            d=activated.shape[-1],
        )
        return [ModulationOut(shift, 1 + scale, gate) for shift, scale, gate in parts]


class FinalLayer(nn.Module):
    def __init__(self, c: FluxConfig):
        super().__init__()
        self.linear = nn.Linear(c.hidden_size, c.out_channels, bias=c.bias)
        self.adaLN_modulation = nn.Sequential(
            nn.SiLU(), nn.Linear(c.hidden_size, 2 * c.hidden_size, bias=c.bias)
        )

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(
            2, dim=-1
        )  # diffusers stores scale first, BFL shift
        return self.linear(modulate(x, ModulationOut(shift, 1 + scale, gate=None)))


def mlp_width(c: FluxConfig) -> int:
    return int(c.mlp_ratio * c.hidden_size)


def mlp(c: FluxConfig) -> nn.Sequential:
    """FLUX.1: Linear, GELU, Linear. FLUX.2: the first Linear is twice as wide, and one half gates the other."""
    inner = nn.Linear(c.hidden_size, mlp_width(c) * (2 if c.gated_mlp else 1), bias=c.bias)
    outer = nn.Linear(mlp_width(c), c.hidden_size, bias=c.bias)
    return nn.Sequential(inner, GatedSiLU() if c.gated_mlp else nn.GELU(approximate="tanh"), outer)


class GatedSiLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up


class MLPEmbedder(nn.Module):
    def __init__(self, in_dim: int, hidden_size: int, bias: bool):
        super().__init__()
        self.in_layer = nn.Linear(in_dim, hidden_size, bias=bias)
        self.out_layer = nn.Linear(hidden_size, hidden_size, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


def scale_time(t: Tensor, rounding: str, dtype: torch.dtype) -> Tensor:
    """t·1000, float32. Rounding it as the published codes do moves the sinusoids more than all other bf16 arithmetic."""
    if rounding == "float32":
        return 1000 * t.float()
    if (
        rounding == "diffusers"
    ):  # its scheduler hands out t·1000, which is rounded, and undone, before the model redoes it
        t = (1000 * t.float()).to(dtype) / 1000
    return (1000 * t.to(dtype)).float()


def timestep_embedding(t: Tensor, dim: int = 256, max_period: float = 10_000) -> Tensor:
    """(B,) -> (B, dim) float32: cosines, then sines, of t · max_period^(-i/(dim/2))."""
    frequency = torch.exp(
        -math.log(max_period)
        * torch.arange(dim // 2, dtype=torch.float32, device=t.device)
        / (dim // 2)
    )
    angle = t.float()[:, None] * frequency  # (B, dim/2)
    return torch.cat([angle.cos(), angle.sin()], dim=-1)
