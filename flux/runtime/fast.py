"""The same networks, faster and leaner. Applied from outside, after loading.

    fast_transformer(flux)  norms, RoPE and activations in fewer passes: the same bits on a CPU
    fast_autoencoder(ae)    channels_last, chunks of rows, fused upsampling: 3e-6 of relative L2

On a CPU, work is done in chunks that stay in its cache. On a GPU, each pass over memory counts and
each kernel has a cost, so chunks are few and large. The meta device stands for a GPU, whose kernels
can be counted there. Modules get a subclass of their class. Names, weights, `state_dict()` and
hooks stay as they are.
"""

import itertools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flux.autoencoder import AutoEncoder, Decoder, PointwiseConv, ResnetBlock, Upsample
from flux.transformer import (
    NUMERICS,
    DoubleStreamBlock,
    Flux,
    GatedSiLU,
    KVCache,
    Modulation,
    ModulationOut,
    Numerics,
    RMSNorm,
    SelfAttention,
    SingleStreamBlock,
    modulate,
    rope_table,
)


@dataclass(frozen=True)
class Chunks:
    """Elements of a chunk of each kind of work."""

    tokens: int
    rows: int
    fewest: int  # a convolution with fewer chunks of rows is not divided
    statistics: int


# q of 340 tokens of 24 heads; 32 rows of 512 pixels of 256 channels; what a core's cache holds
CPU = Chunks(tokens=2**20, rows=2**22, fewest=2, statistics=2**18)
# only the convolutions of 1024x1024 pixels of 256 channels, the decoder's peak, are divided
GPU = Chunks(tokens=2**60, rows=2**26, fewest=4, statistics=2**60)


_counted: str | None = None  # the type of the device for which a function is counted
_smaller = 1  # the factor by which the network that is counted is smaller


@contextmanager
def counted_for(device_type: str, smaller: int = 1) -> Iterator[None]:
    """Take the branches of another device, to count its kernels and its memory without it.

    Chunks are divided by `smaller`, the factor by which tensors are smaller than those counted for.
    """
    global _counted, _smaller
    before = _counted, _smaller
    _counted, _smaller = device_type, smaller
    try:
        yield
    finally:
        _counted, _smaller = before


def on_cpu(x: Tensor) -> bool:
    return x.is_cpu if _counted is None else _counted == "cpu"


def chunk_sizes(x: Tensor) -> Chunks:
    sizes = CPU if on_cpu(x) else GPU
    return sizes if _smaller == 1 else replace(sizes, rows=max(1, sizes.rows // _smaller))


def runs_fast(numerics: Numerics, device_type: str) -> bool:
    """Return whether `flux.load` applies these forwards.

    The plain networks are the reference, and run wherever exactness is the point.
    """
    return numerics == NUMERICS["exact"] and device_type in ("cpu", "cuda")


def fast_transformer(flux: Flux) -> Flux:
    """Make the blocks of `flux`, loaded or on the meta device, work in chunks. Return `flux`."""
    for module in flux.modules():
        module.__class__ = TRANSFORMER_CLASSES.get(type(module), type(module))
    return flux


def fast_autoencoder(ae: AutoEncoder) -> AutoEncoder:
    """Make `ae`, after loading, work in chunks and in channels_last. Return `ae`.

    Weights in channels_last take a copy of 0.2 GB. A GPU has fast kernels for float32 only with the
    channels first, and for bfloat16 only with the channels last.
    """
    weight = ae.decoder.conv_in.weight
    if on_cpu(weight) or weight.dtype != torch.float32:
        ae.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    for module in ae.modules():
        module.__class__ = AUTOENCODER_CLASSES.get(type(module), type(module))
    return ae


def runs_plain(module: nn.Module, x: Tensor) -> bool:
    """Return whether `module` must run its plain forward on `x`.

    Autograd needs every intermediate tensor, a compiler chunks better, and a hook on an inner
    module must see whole tensors. Modulations have run before.
    """
    if torch.is_grad_enabled() or torch.compiler.is_compiling():
        return True
    inner = [m for m in module.modules() if m is not module and not isinstance(m, Modulation)]
    return any(m._forward_hooks or m._forward_pre_hooks for m in inner)


def chunked(function: Callable[..., Tensor], out: Tensor, *inputs: Tensor) -> None:
    """Write `function(*inputs)` to `out`, in chunks of tokens, which are the second dimension."""
    count = max(1, inputs[0].numel() // chunk_sizes(out).tokens)
    chunks = [x.chunk(count, dim=1) for x in (out, *inputs)]
    for out_chunk, *input_chunks in zip(*chunks, strict=True):
        out_chunk.copy_(function(*input_chunks))


# ------------------------------------------------------------------ transformer


class FastFlux(Flux):
    def rope(self, txt_ids: Tensor, img_ids: Tensor) -> Tensor:
        """Compute the rotations of each position of an axis once, however many tokens have it."""
        tables = []
        for positions, dim in zip(torch.cat([txt_ids, img_ids]).unbind(-1), self.config.axes_dim):
            distinct, number = positions.unique(return_inverse=True)
            table = rope_table(distinct[:, None], (dim,), self.config.theta, self.numerics.rope)
            tables.append(table[number])  # (T + L, dim/2, 2, 2)
        return torch.cat(tables, dim=1)


class ChunkedDoubleStreamBlock(DoubleStreamBlock):
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
        if runs_plain(self, img):
            return super().forward(img, txt, rope, img_mod, txt_mod, cache, mask)
        length = txt.shape[1]
        txt_qkv = split_qkv(self.txt_attn, modulate(txt, txt_mod[0].shift, txt_mod[0].scale))
        img_qkv = split_qkv(self.img_attn, modulate(img, img_mod[0].shift, img_mod[0].scale))
        v = torch.cat([txt_qkv[2], img_qkv[2]], dim=1)  # (B, T + L, H, d)
        q, k = torch.empty_like(v), torch.empty_like(v)
        rotations = complex_rotations(rope)
        for attn, qkv, tokens in (
            (self.txt_attn, txt_qkv, slice(0, length)),
            (self.img_attn, img_qkv, slice(length, None)),
        ):
            norm_and_rotate(attn.norm.query_norm, q[:, tokens], qkv[0], rotations[:, tokens])
            norm_and_rotate(attn.norm.key_norm, k[:, tokens], qkv[1], rotations[:, tokens])
        del txt_qkv, img_qkv, qkv
        txt_out, img_out = attend(q, k, v, cache, mask).split([length, img.shape[1]], dim=1)
        del q, k, v
        img = finish_stream(img, img_out.contiguous(), self.img_attn, self.img_mlp, img_mod)
        txt = finish_stream(txt, txt_out.contiguous(), self.txt_attn, self.txt_mlp, txt_mod)
        return img, txt


class ChunkedSingleStreamBlock(SingleStreamBlock):
    def forward(
        self,
        x: Tensor,
        rope: Tensor,
        mod: ModulationOut,
        cache: KVCache | None = None,
        mask: Tensor | None = None,
    ) -> Tensor:
        if runs_plain(self, x):
            return super().forward(x, rope, mod, cache, mask)
        return x + mod.gate * self.linear2(self.attention_and_mlp(x, rope, mod, cache, mask))

    def attention_and_mlp(
        self,
        x: Tensor,
        rope: Tensor,
        mod: ModulationOut,
        cache: KVCache | None,
        mask: Tensor | None,
    ) -> Tensor:
        """Return what linear2 reads, (B, N, D + MLP width), and let go of all that made it."""
        hidden = self.linear1(modulate(x, mod.shift, mod.scale))  # (B, N, 3 D + inner)
        qkv, hidden = hidden.split(self.widths, dim=-1)
        raw_q, raw_k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).unbind(2)  # (B, N, H, d)
        rotations = complex_rotations(rope)
        q, k = v.new_empty(v.shape), v.new_empty(v.shape)
        norm_and_rotate(self.norm.query_norm, q, raw_q, rotations)
        norm_and_rotate(self.norm.key_norm, k, raw_k, rotations)
        out = attend(q, k, v, cache, mask)  # (B, N, D)
        del q, k
        joined = out.new_empty(*x.shape[:2], self.linear2.in_features)
        joined[..., : out.shape[2]] = out
        activate(self.mlp_act, joined[..., out.shape[2] :], hidden)
        return joined


def activate(activation: nn.Module, out: Tensor, x: Tensor) -> None:
    """Write `activation(x)` to `out`: in chunks on a CPU, without an intermediate copy on a GPU."""
    if on_cpu(x):
        chunked(activation, out, x)
    elif isinstance(activation, GatedSiLU):
        gate, up = x.chunk(2, dim=-1)
        torch.mul(F.silu(gate), up, out=out)
    else:
        torch.ops.aten.gelu.out(x, approximate="tanh", out=out)


def split_qkv(attn: SelfAttention, x: Tensor) -> tuple[Tensor, ...]:
    """(B, N, D) -> q, k, v before their norms, (B, N, H, d) each."""
    return attn.qkv(x).unflatten(-1, (3, attn.num_heads, -1)).unbind(2)


def complex_rotations(rope: Tensor) -> Tensor:
    """(N, d/2, 2, 2) rotation matrices -> (1, N, 1, d/2) complex numbers of the same rotations."""
    return torch.complex(rope[..., 0, 0], rope[..., 1, 0])[None, :, None]


def norm_and_rotate(norm: RMSNorm, out: Tensor, x: Tensor, rotations: Tensor) -> None:
    """Write what QK-norm and RoPE make of x (B, N, H, d) to `out`, in chunks of tokens."""

    def function(x: Tensor, rotations: Tensor) -> Tensor:
        pairs = torch.view_as_complex(norm(x).float().unflatten(-1, (-1, 2)))  # (B, n, H, d/2)
        return torch.view_as_real(pairs * rotations).flatten(-2)

    chunked(function, out, x, rotations)


def attend(q: Tensor, k: Tensor, v: Tensor, cache: KVCache | None, mask: Tensor | None) -> Tensor:
    """(B, N, H, d) each, rotated already -> (B, N, D)."""
    if cache is not None:
        k, v = cache.update(k, v)
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H, N, d)
    return F.scaled_dot_product_attention(q, k, v, mask).transpose(1, 2).flatten(2)


def finish_stream(
    x: Tensor, attended: Tensor, attn: SelfAttention, mlp: nn.Module, mod: list[ModulationOut]
) -> Tensor:
    """Add the two residual branches of one stream, the second of which is the MLP."""
    x = x + mod[0].gate * attn.proj(attended)
    return x + mod[1].gate * mlp(modulate(x, mod[1].shift, mod[1].scale))


# ------------------------------------------------------------------ autoencoder


class ChunkedResnetBlock(ResnetBlock):
    norm1: "ChannelsLastGroupNorm"
    norm2: "ChannelsLastGroupNorm"

    def forward(self, x: Tensor) -> Tensor:
        if runs_plain(self, x) or len(x) > 1:
            return super().forward(x)
        # in one expression: a name would keep the inner result in memory
        h = norm_silu_conv(
            self.norm2, self.conv2, norm_silu_conv(self.norm1, self.conv1, x), overwrite=True
        )
        h += x if self.nin_shortcut is None else self.nin_shortcut(x)
        return h


def layout(x: Tensor) -> torch.memory_format:
    return torch.contiguous_format if x.is_contiguous() else torch.channels_last


def norm_silu_conv(
    norm: "ChannelsLastGroupNorm", conv: nn.Conv2d, x: Tensor, overwrite: bool = False
) -> Tensor:
    """Return conv(silu(norm(x))) of one image and a 3x3 convolution, in chunks of rows.

    A chunk sees one row more on either side. `overwrite` writes the result to x, of the same shape:
    a chunk is written when the next one, which sees its last row, has been read.
    """
    height = x.shape[2]
    sizes = chunk_sizes(x)
    count = min(height, x.numel() // sizes.rows)
    if count < sizes.fewest:
        x = F.silu(norm(x), inplace=True)
        return conv(x)
    statistics = norm.statistics(x)
    out = x
    if not overwrite:
        shape = (1, conv.out_channels, height, x.shape[3])
        out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=layout(x))
    previous = out[:, :, :0]  # the rows of the chunk before, which are still to be written
    for number in range(count):
        top, bottom = height * number // count, height * (number + 1) // count
        rows = norm.apply_statistics(x[:, :, max(top - 1, 0) : bottom + 1], *statistics)
        rows = F.silu(rows, inplace=True)
        out[:, :, top - previous.shape[2] : top] = previous
        if number in (0, count - 1):
            rows = F.pad(rows, (0, 0, int(top == 0), int(bottom == height)))
        previous = F.conv2d(rows, conv.weight, conv.bias, padding=(0, 1))
    out[:, :, height - previous.shape[2] :] = previous
    return out


class ChunkedDecoder(Decoder):
    norm_out: "ChannelsLastGroupNorm"

    def forward(self, z: Tensor) -> Tensor:
        if runs_plain(self, z) or len(z) > 1:
            return super().forward(z)
        x = z if self.post_quant_conv is None else self.post_quant_conv(z)
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if level.upsample is not None:
                x = level.upsample(x)
        return norm_silu_conv(self.norm_out, self.conv_out, x)


class ChannelsLastGroupNorm(nn.GroupNorm):
    """torch's own group norm of channels_last tensors has an error of 5e-5 in float32 on a CPU.

    On a GPU it copies such tensors to channels first.
    """

    def forward(self, x: Tensor) -> Tensor:
        ordered = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        if not ordered or runs_plain(self, x):
            return super().forward(x)
        if len(x) > 1:
            return torch.cat([self.forward(image) for image in x.split(1)])
        return self.apply_statistics(x, *self.statistics(x))

    def statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean and variance of each channel's group, (C,) each, of one image."""
        parts = x.chunk(max(1, x.numel() // chunk_sizes(x).statistics), dim=2)
        sums = reduce(add, map(channel_sums, parts))  # (2, C)
        groups = sums.unflatten(1, (self.num_groups, -1)).mean(2) / x[0, 0].numel()  # (2, groups)
        mean, var = groups[0], (groups[1] - groups[0] ** 2).clamp(min=0)
        repeats = self.num_channels // self.num_groups
        return mean.repeat_interleave(repeats), var.repeat_interleave(repeats)

    def apply_statistics(self, x: Tensor, mean: Tensor, var: Tensor) -> Tensor:
        """Normalise any part of an image by statistics of the whole image."""
        weight, bias = self.weight.to(mean.dtype), self.bias.to(mean.dtype)
        return F.batch_norm(x, mean, var, weight, bias, eps=self.eps)


def channel_sums(x: Tensor) -> Tensor:
    """Return the sums of the values and of their squares, (2, C) float32, of x (1, C, h, w)."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    if not on_cpu(x):
        squares = torch.linalg.vector_norm(x, dim=(0, 2, 3), dtype=dtype) ** 2
        return torch.stack([x.sum((0, 2, 3), dtype=dtype), squares])
    n = x[0, 0].numel()
    mean, var = x.new_zeros(2, x.shape[1], dtype=dtype)
    # batch norm writes mean and var: the fastest way to them on a CPU
    F.batch_norm(x, mean, var, training=True, momentum=1.0)
    return torch.stack([mean, var * ((n - 1) / n) + mean**2]) * n


class ChannelsLastPointwiseConv(PointwiseConv):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) if runs_plain(self, x) else nn.Conv2d.forward(self, x)


class FusedUpsample(Upsample):
    """The 3x3 convolution of the enlarged image, which is never made.

    Weights that meet copies of one pixel are summed beforehand. 2x2 of them are left for each of
    the four copies, 4/9 of the multiplications.
    """

    def forward(self, x: Tensor) -> Tensor:
        if runs_plain(self, x):
            return super().forward(x)
        if not on_cpu(x):  # GPUs are slower at transposed convolutions
            return self.copy_by_copy(x)
        weight = self.conv.weight.flip(2, 3).transpose(0, 1)
        weight = weight.contiguous(memory_format=torch.channels_last)
        sums = F.avg_pool2d(weight, 2, stride=1, padding=1, divisor_override=1)  # (c, c, 4, 4)
        return F.conv_transpose2d(x, sums, self.conv.bias, stride=2, padding=1)

    def copy_by_copy(self, x: Tensor) -> Tensor:
        """Make the pixels of each of the four copies by a 2x2 convolution."""
        batch, channels, height, width = x.shape
        sums = F.avg_pool2d(self.conv.weight, 2, stride=1, padding=1, divisor_override=1)
        out = torch.empty(
            (batch, channels, 2 * height, 2 * width),
            dtype=x.dtype,
            device=x.device,
            memory_format=layout(x),
        )
        for i, j in itertools.product((0, 1), repeat=2):
            weight = sums[:, :, i::2, j::2].contiguous(memory_format=layout(x))
            copy = F.conv2d(x, weight, self.conv.bias, padding=1)  # (B, c, h + 1, w + 1)
            out[:, :, i::2, j::2] = copy[:, :, i : i + height, j : j + width]
        return out


# ------------------------------------------------------------------ plain classes, faster ones

TRANSFORMER_CLASSES: dict[type, type] = {
    Flux: FastFlux,
    DoubleStreamBlock: ChunkedDoubleStreamBlock,
    SingleStreamBlock: ChunkedSingleStreamBlock,
}
AUTOENCODER_CLASSES: dict[type, type] = {
    ResnetBlock: ChunkedResnetBlock,
    Decoder: ChunkedDecoder,
    nn.GroupNorm: ChannelsLastGroupNorm,
    PointwiseConv: ChannelsLastPointwiseConv,
    Upsample: FusedUpsample,
}
