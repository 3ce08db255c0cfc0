"""The FLUX.1 and FLUX.2 autoencoders, all of it in this single file.

Pixels are (B, 3, H, W) in [-1, 1]. Latents are (B, 4z, H/16, W/16): convolutions shrink an image by
8, then each 2x2 patch is packed into channels. One position is one transformer token.

References:
1) FLUX.1: https://github.com/black-forest-labs/flux/blob/main/src/flux/modules/autoencoder.py
2) FLUX.2: https://github.com/black-forest-labs/flux2/blob/main/src/flux2/autoencoder.py

Attribute names are the keys of the released `ae.safetensors`. On a CPU, results equal diffusers'
AutoencoderKL and AutoencoderKLFlux2 to the bit.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn


@dataclass(frozen=True)
class AutoEncoderConfig:
    """Defaults: FLUX.1. Without `scale_factor`: FLUX.2, which has quant convolutions and `bn`."""

    ch: int = 128
    ch_mult: tuple[int, ...] = (1, 2, 4, 4)
    num_res_blocks: int = 2
    z_channels: int = 16
    scale_factor: float | None = 0.3611
    shift_factor: float | None = 0.1159
    decoder_ch: int | None = None  # 96 in the FLUX.2 small decoder
    norm_groups: int = 32  # 8 in the toy, whose narrow norms would otherwise erase flat colours

    @property
    def latent_channels(self) -> int:
        return 4 * self.z_channels


# ------------------------------------------------------------------ layers


class ResnetBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))  # (B, c_in, h, w) -> (B, c_out, h, w)
        h = self.conv2(F.silu(self.norm2(h)))
        shortcut = x if self.nin_shortcut is None else self.nin_shortcut(x)
        return shortcut + h


class PointwiseConv(nn.Conv2d):
    """A 1x1 convolution, computed as the Linear over channels that diffusers has here."""

    def forward(self, x: Tensor) -> Tensor:
        out = F.linear(x.flatten(2).mT, self.weight.flatten(1), self.bias)  # (B, hw, c)
        return out.mT.unflatten(2, x.shape[2:])  # (B, c, h, w)


class AttnBlock(nn.Module):
    """Single-head attention over all positions."""

    def __init__(self, c: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, c, eps=1e-6)
        self.q = PointwiseConv(c, c, 1)
        self.k = PointwiseConv(c, c, 1)
        self.v = PointwiseConv(c, c, 1)
        self.proj_out = PointwiseConv(c, c, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q, k, v)  # (B, 1, hw, c)
        out = self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))
        return out + x  # the first summand decides the memory layout, and so how norms round


class Downsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # at the right and bottom only, as in training


class Upsample(nn.Module):
    def __init__(self, c: int):
        super().__init__()
        self.conv = nn.Conv2d(c, c, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Mid(nn.Module):
    def __init__(self, c: int, groups: int):
        super().__init__()
        self.block_1 = ResnetBlock(c, c, groups)
        self.attn_1 = AttnBlock(c, groups)
        self.block_2 = ResnetBlock(c, c, groups)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Level(nn.Module):
    """The residual blocks of one resolution, and the change to the next one. A container only."""

    def __init__(self, c_in: int, c_out: int, num_blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList()
        for i in range(num_blocks):
            self.block.append(ResnetBlock(c_in if i == 0 else c_out, c_out, groups))
        self.downsample: Downsample | None = None
        self.upsample: Upsample | None = None


# ------------------------------------------------------------------ encoder, decoder


class Encoder(nn.Module):
    """(B, 3, H, W) -> mean and log-variance of the posterior, (B, 2z, H/8, W/8)."""

    down: list[Level]

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [config.ch * m for m in config.ch_mult]
        groups, z2 = config.norm_groups, 2 * config.z_channels
        self.conv_in = nn.Conv2d(3, config.ch, 3, padding=1)
        self.down = nn.ModuleList()  # type: ignore[assignment]
        c = config.ch
        for width in widths:
            level = Level(c, width, config.num_res_blocks, groups)
            if len(self.down) < len(widths) - 1:
                level.downsample = Downsample(width)
            self.down.append(level)
            c = width
        self.mid = Mid(c, groups)
        self.norm_out = nn.GroupNorm(groups, c, eps=1e-6)
        self.conv_out = nn.Conv2d(c, z2, 3, padding=1)
        self.quant_conv = nn.Conv2d(z2, z2, 1) if config.scale_factor is None else None

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if level.downsample is not None:
                x = level.downsample(x)  # (B, c, h, w) -> (B, c, h/2, w/2)
        x = self.mid(x)
        x = self.conv_out(F.silu(self.norm_out(x)))  # (B, 2z, H/8, W/8)
        return x if self.quant_conv is None else self.quant_conv(x)


class Decoder(nn.Module):
    """(B, z, h, w) -> (B, 3, 8h, 8w)."""

    up: list[Level]

    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        widths = [(config.decoder_ch or config.ch) * m for m in config.ch_mult]
        groups, z = config.norm_groups, config.z_channels
        self.post_quant_conv = nn.Conv2d(z, z, 1) if config.scale_factor is None else None
        self.conv_in = nn.Conv2d(z, widths[-1], 3, padding=1)
        self.mid = Mid(widths[-1], groups)
        self.up = nn.ModuleList()  # type: ignore[assignment]  # up[0] is the finest, and runs last
        for c, width in zip([*widths[1:], widths[-1]], widths, strict=True):
            level = Level(c, width, config.num_res_blocks + 1, groups)
            if len(self.up) > 0:
                level.upsample = Upsample(width)
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        x = z if self.post_quant_conv is None else self.post_quant_conv(z)
        x = self.mid(self.conv_in(x))  # (B, c, h, w)
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if level.upsample is not None:
                x = level.upsample(x)  # (B, c, h, w) -> (B, c, 2h, 2w)
        return self.conv_out(F.silu(self.norm_out(x)))


# ------------------------------------------------------------------ the model


def pack(x: Tensor) -> Tensor:
    """Move each 2x2 patch into channels: (B, z, 2h, 2w) -> (B, 4z, h, w)."""
    return rearrange(x, "b c (h ph) (w pw) -> b (c ph pw) h w", ph=2, pw=2)


def unpack(x: Tensor) -> Tensor:
    """Undo `pack`: (B, 4z, h, w) -> (B, z, 2h, 2w)."""
    return rearrange(x, "b (c ph pw) h w -> b c (h ph) (w pw)", ph=2, pw=2)


class AutoEncoder(nn.Module):
    def __init__(self, config: AutoEncoderConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        if config.scale_factor is None:  # a store of statistics, never called
            self.bn = nn.BatchNorm2d(config.latent_channels, eps=1e-4, affine=False)

    def encode(self, pixels: Tensor) -> Tensor:
        """Return the posterior's mean, packed, normalised: (B, 3, H, W) -> (B, 4z, H/16, W/16)."""
        mean, _ = self.encoder(pixels).chunk(2, dim=1)  # (B, z, H/8, W/8)
        return self.normalise(pack(mean))

    def decode(self, latents: Tensor) -> Tensor:
        """Return pixels, nominally in [-1, 1]: (B, 4z, h, w) -> (B, 3, 16h, 16w)."""
        return self.decoder(unpack(self.denormalise(latents)))

    def normalise(self, latents: Tensor) -> Tensor:
        scale, shift = self.config.scale_factor, self.config.shift_factor
        if scale is None or shift is None:  # FLUX.2
            mean, std = self.statistics()
            return (latents - mean) / std
        return (latents - shift) * scale

    def denormalise(self, latents: Tensor) -> Tensor:
        scale, shift = self.config.scale_factor, self.config.shift_factor
        if scale is None or shift is None:  # FLUX.2
            mean, std = self.statistics()
            return latents * std + mean
        return latents / scale + shift

    def statistics(self) -> tuple[Tensor, Tensor]:
        """Return FLUX.2's mean and standard deviation of packed latents, (4z, 1, 1) each."""
        mean, var = self.bn.get_buffer("running_mean"), self.bn.get_buffer("running_var")
        return mean[:, None, None], torch.sqrt(var + self.bn.eps)[:, None, None]
