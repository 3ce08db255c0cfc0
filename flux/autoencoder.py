"""Pixels <-> latents, for FLUX.1 and FLUX.2: the whole autoencoder, top to bottom.

*Pixels* are (B, 3, H, W) in [-1, 1]; *latents* are (B, C, H/16, W/16) with C = 4·z: the convolutions shrink by 8, and 2x2
neighbours are then packed into channels, so that one latent column is one token of the transformer, in both families.
Attribute names are the keys of Black Forest Labs' `ae.safetensors`.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.errors import UserError
from flux.runtime.fast import stripes


@dataclass(frozen=True)
class AutoEncoderConfig:
    """`scale_factor` None means FLUX.2: 1x1 quant convolutions, and latents normalised by the running statistics in `bn`."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float | None = 0.3611
    shift_factor: float | None = 0.1159
    decoder_ch: int | None = (
        None  # the FLUX.2 small decoder is narrower (96) than its encoder (128)
    )
    norm_groups: int = 32  # 8 in the toy: with a channel a group, the norms would erase the colour of a flat picture

    @property
    def latent_channels(self) -> int:
        return 4 * self.z_channels


class AutoEncoder(nn.Module):
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.scale_factor is None:
            self.bn = nn.BatchNorm2d(
                config.latent_channels, eps=1e-4, affine=False
            )  # holds statistics; never called

    def encode(self, pixels: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, 4z, H/16, W/16): the posterior's mean (never a sample), packed and normalised."""
        means = [
            self.encoder(picture).chunk(2, dim=1)[0] for picture in pixels.split(1)
        ]  # (1, z, H/8, W/8) each
        return self.normalise(pack(torch.cat(means)))

    def decode(self, latents: Tensor) -> Tensor:
        """(B, 4z, h, w) -> (B, 3, 16h, 16w), nominally in [-1, 1]; the caller clamps.

        Here as in `encode`, each picture of a batch is made alone: it takes the memory of one, and depends on no other.
        """
        z = unpack(self.denormalise(latents))  # (B, z, 2h, 2w)
        return torch.cat([self.decoder(one) for one in z.split(1)])

    def decode_tiled(self, latents: Tensor, tile: int = 64, overlap: int = 16) -> Tensor:
        """`decode` for pictures that do not fit into memory: in squares of `tile` latents that fade into their neighbours.

        Lossy. The group norms and the attention in the middle see a tile where they should see the picture, so that the tone
        of tiles differs, from the whole's and from each other's; `overlap` latents at least, in which both are blended
        linearly, hide the steps. A picture of one tile is what `decode` makes.
        """
        if not 0 < overlap < tile:
            raise UserError(
                f"tiles of {tile} latents that overlap by {overlap}: the overlap must be from 1 to {tile - 1}"
            )
        batch, _, h, w = latents.shape
        out = torch.zeros(batch, 3, 16 * h, 16 * w, device=latents.device)
        for y, rows in tiles(h, tile, overlap, device=latents.device):
            for x, columns in tiles(w, tile, overlap, device=latents.device):
                pixels = self.decode(latents[:, :, y : y + tile, x : x + tile])
                place = out[:, :, 16 * y : 16 * (y + tile), 16 * x : 16 * (x + tile)]
                place += pixels * rows[:, None] * columns
        return out.to(latents.dtype)

    def normalise(self, packed: Tensor) -> Tensor:
        mean, std = self.statistics()
        return ((widened(packed) - mean) / std).to(
            packed.dtype
        )  # rounded once: an error here goes through all that follows

    def denormalise(self, latents: Tensor) -> Tensor:
        mean, std = self.statistics()
        return (widened(latents) * std + mean).to(latents.dtype)

    def statistics(self) -> tuple[Tensor | float, Tensor | float]:
        """Mean and standard deviation of packed latents: two constants in FLUX.1, one pair a channel in FLUX.2."""
        if self.config.scale_factor is not None:
            return self.config.shift_factor, 1 / self.config.scale_factor
        mean = rearrange(widened(self.bn.running_mean), "c -> c 1 1")
        std = rearrange(torch.sqrt(widened(self.bn.running_var) + self.bn.eps), "c -> c 1 1")
        return mean, std


def widened(x: Tensor) -> Tensor:
    """In float32 at least."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def pack(x: Tensor) -> Tensor:
    """(B, z, 2h, 2w) -> (B, 4z, h, w)."""
    return rearrange(x, "b c (h ph) (w pw) -> b (c ph pw) h w", ph=2, pw=2)


def unpack(x: Tensor) -> Tensor:
    """(B, 4z, h, w) -> (B, z, 2h, 2w)."""
    return rearrange(x, "b (c ph pw) h w -> b c (h ph) (w pw)", ph=2, pw=2)


def tiles(
    size: int, tile: int, overlap: int, device: torch.device | None = None
) -> list[tuple[int, Tensor]]:
    """Where tiles of `tile` latents begin along an axis of `size`, and the weights of each one's pixels.

    They are spread evenly, `overlap` is the least that any two share, and for each pixel of the axis the weights sum to 1.
    """
    count = 1 + max(0, -(-(size - tile) // (tile - overlap)))
    starts = [n * (size - tile) // max(count - 1, 1) for n in range(count)]
    rises, falls = (
        [-size, *starts[1:]],
        [*(start + tile for start in starts[:-1]), 2 * size],
    )  # none at the ends of the axis
    pixel = torch.arange(16 * size, device=device) + 0.5
    hats = [
        torch.minimum(pixel - 16 * rise, 16 * fall - pixel).clamp(min=0)
        for rise, fall in zip(rises, falls, strict=True)
    ]
    weights = torch.stack(hats) / sum(hats)
    return [
        (start, row[16 * start :][: 16 * tile]) for start, row in zip(starts, weights, strict=True)
    ]


class Encoder(nn.Module):
    """(B, 3, H, W) -> moments (B, 2z, H/8, W/8): mean and log-variance of the posterior."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        z2 = 2 * config.z_channels
        self.conv_in = conv3(3, config.ch)
        self.down = nn.ModuleList()
        groups = config.norm_groups
        for level, width in enumerate(widths):
            previous = widths[level - 1] if level else config.ch
            self.down.append(Level(previous, width, config.num_res_blocks, groups))
            if level < len(widths) - 1:
                self.down[-1].downsample = Downsample(width)
        self.mid = Middle(widths[-1], config.norm_groups)
        self.norm_out = norm(widths[-1], groups)
        self.conv_out = conv3(widths[-1], z2)
        if config.scale_factor is None:
            self.quant_conv = nn.Conv2d(z2, z2, 1)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if hasattr(level, "downsample"):
                x = level.downsample(x)  # (B, c, h, w) -> (B, c, h/2, w/2)
        x = self.mid(x)
        x = activated(self.norm_out, self.conv_out, x)
        return self.quant_conv(x) if hasattr(self, "quant_conv") else x


class Decoder(nn.Module):
    """(B, z, h, w) -> (B, 3, 8h, 8w)."""

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        ch = config.decoder_ch or config.ch
        widths = [ch * m for m in config.ch_mult]
        if config.scale_factor is None:
            self.post_quant_conv = nn.Conv2d(config.z_channels, config.z_channels, 1)
        self.conv_in = conv3(config.z_channels, widths[-1])
        self.mid = Middle(widths[-1], config.norm_groups)
        self.up = nn.ModuleList()  # up[0] works at full resolution and runs last
        for level, width in enumerate(widths):
            below = widths[min(level + 1, len(widths) - 1)]
            self.up.append(Level(below, width, config.num_res_blocks + 1, config.norm_groups))
            if level > 0:
                self.up[-1].upsample = Upsample(width)
        self.norm_out = norm(ch * config.ch_mult[0], config.norm_groups)
        self.conv_out = conv3(ch * config.ch_mult[0], 3)

    def forward(self, z: Tensor) -> Tensor:
        x = self.post_quant_conv(z) if hasattr(self, "post_quant_conv") else z
        x = self.mid(self.conv_in(x))
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample(x)  # (B, c, h, w) -> (B, c, 2h, 2w)
        return activated(self.norm_out, self.conv_out, x)


class Level(nn.Module):
    """The residual blocks of one resolution; the first of them changes the width. No more than a name around them.

    As a module that is called, it would keep what it was given in memory until its last block is done.
    """

    def __init__(self, c_in: int, c_out: int, blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList(
            ResnetBlock(c_in if i == 0 else c_out, c_out, groups) for i in range(blocks)
        )


class Middle(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)
        self.block_2 = ResnetBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = norm(c_in, groups)
        self.conv1 = conv3(c_in, c_out)
        self.norm2 = norm(c_out, groups)
        self.conv2 = conv3(c_out, c_out)
        if c_in != c_out:
            self.nin_shortcut = nn.Conv2d(c_in, c_out, 1)  # "network in network": a 1x1 convolution

    def forward(self, x: Tensor) -> Tensor:
        # decoding takes the most memory here, at full resolution: what lies between has no name that would keep it
        h = activated(self.norm2, self.conv2, activated(self.norm1, self.conv1, x), inplace=True)
        h += self.nin_shortcut(x) if hasattr(self, "nin_shortcut") else x
        return h


class AttnBlock(nn.Module):
    """Single-head attention over all positions; 1x1 convolutions stand for the Linears, as in the checkpoint."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = norm(c, groups)
        self.q = nn.Conv2d(c, c, 1)
        self.k = nn.Conv2d(c, c, 1)
        self.v = nn.Conv2d(c, c, 1)
        self.proj_out = nn.Conv2d(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (rearrange(f(n), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, hw, c)
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(
            F.pad(x, (0, 1, 0, 1))
        )  # padded at right and bottom only, as it was trained


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = FusedUpsampleConv(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class FusedUpsampleConv(nn.Conv2d):
    """A 3x3 convolution of the nearest-neighbour enlargement (B, c, 2h, 2w), which is never made.

    Weights that meet copies of one pixel are summed beforehand, so that 2x2 are left for each of the four copies: 4/9 of the
    multiplications. The four together are a transposed convolution of 4x4.
    """

    def forward(self, x: Tensor) -> Tensor:
        weight = (
            self.weight.flip(2, 3).transpose(0, 1).contiguous(memory_format=torch.channels_last)
        )
        sums = F.avg_pool2d(
            weight, 2, stride=1, padding=1, divisor_override=1
        )  # (c_in, c_out, 4, 4), rounded once
        return F.conv_transpose2d(x, sums, self.bias, stride=2, padding=1)


def channels_last(autoencoder: AutoEncoder) -> AutoEncoder:
    """Its weights in the order of memory in which convolutions are fastest; it takes a copy of 0.2 GB."""
    return autoencoder.to(memory_format=torch.channels_last)


def conv3(c_in: int, c_out: int) -> nn.Conv2d:
    return nn.Conv2d(c_in, c_out, 3, padding=1)


def norm(c: int, groups: int) -> "GroupNorm":
    return GroupNorm(groups, c, eps=1e-6)


# ---------------------------------------------------------------- what need not be in memory as a whole

STRIPE = 2**22  # elements: 32 rows of 512 pixels of 256 channels
CACHED = 2**18  # elements that a CPU need not fetch from memory twice


def activated(norm: "GroupNorm", conv: nn.Conv2d, x: Tensor, inplace: bool = False) -> Tensor:
    """conv(silu(norm(x))) of a 3x3 convolution; `inplace`: `x` may be overwritten, if that has the shape of the result.

    By stripes of rows. A GPU is no faster so, and works in stripes only where they lower the peak.
    """
    of_use = len(x) == 1 and (x.is_cpu or conv.out_channels < x.shape[1])
    count = stripes(x, STRIPE, norm, conv) if of_use else 1
    if count > 1:
        return striped(conv, norm, x, count, inplace)
    x = norm(x)
    return conv(F.silu(x, inplace=True))


def striped(conv: nn.Conv2d, norm: "GroupNorm", x: Tensor, count: int, inplace: bool) -> Tensor:
    """The same in stripes. One sees a row more on either side, and is written when the next, which sees its last, was read."""
    height, normed, y = x.shape[2], norm.of(x), None
    size = (1, conv.out_channels, *x.shape[2:])
    out = (
        x
        if inplace
        else torch.empty(size, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    )
    for number in range(count):
        top, bottom = height * number // count, height * (number + 1) // count
        part = F.silu(normed(x[:, :, max(top - 1, 0) : bottom + 1]), inplace=True)
        if y is not None:
            out[:, :, top - y.shape[2] : top] = y
        if number in (0, count - 1):
            part = F.pad(part, (0, 0, int(top == 0), int(bottom == height)))
        y = F.conv2d(part, conv.weight, conv.bias, padding=(0, 1))
    out[:, :, height - y.shape[2] :] = y
    return out


class GroupNorm(nn.GroupNorm):
    """As torch's, which on a GPU gives tensors in channels_last another order, and on a CPU their variance too coarsely."""

    def forward(self, x: Tensor) -> Tensor:
        ordered = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        own = (
            ordered and len(x) == 1 and not torch.is_grad_enabled() and not x.is_mps
        )  # which has no batch norm of two dtypes
        return self.of(x)(x) if own else super().forward(x)

    def of(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The norm by the statistics of `x`, one picture, for any part of it; with these known, it is a batch norm."""
        sums, wide = 0, torch.promote_types(x.dtype, torch.float32)
        mean, var = x.new_zeros(2, self.num_channels, dtype=wide)
        for part in x.chunk(max(1, x.numel() // (CACHED if x.is_cpu else STRIPE)), dim=2):
            n = part[0, 0].numel()
            F.batch_norm(
                part, mean, var, training=True, momentum=1.0
            )  # writes both: the fastest way to them on a CPU
            sums = sums + torch.stack([mean, var * ((n - 1) / n) + mean**2]) * n  # (2, C)
        mean, power = (
            sums.unflatten(1, (self.num_groups, -1)).mean(2) / x[0, 0].numel()
        )  # (groups,) each

        def each(of_groups):
            return of_groups.repeat_interleave(self.num_channels // self.num_groups)

        known = (
            each(mean),
            each((power - mean**2).clamp(min=0)),
            self.weight.to(mean.dtype),
            self.bias.to(mean.dtype),
        )
        return lambda part: F.batch_norm(part, *known, eps=self.eps)
