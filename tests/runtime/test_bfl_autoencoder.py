"""flux.runtime.bfl_autoencoder against BFL's equations, written again as functions of weights."""

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from support.autoencoders import TINY, random_latents, random_pixels
from torch import Tensor

from flux.autoencoder import AutoEncoder
from flux.parity.reference import randomise
from flux.runtime.bfl_autoencoder import bfl_autoencoder

both_families = pytest.mark.parametrize("name", ["flux.1", "flux.2"])


class BFL:
    """Encoder and decoder of a state dict, with 32 norm groups, as BFL's code computes them."""

    def __init__(self, state: dict[str, Tensor]):
        self.state = state

    def conv(self, x: Tensor, name: str, **options) -> Tensor:
        return F.conv2d(x, self.state[f"{name}.weight"], self.state[f"{name}.bias"], **options)

    def norm(self, x: Tensor, name: str) -> Tensor:
        return F.group_norm(x, 32, self.state[f"{name}.weight"], self.state[f"{name}.bias"], 1e-6)

    def norm_swish_conv(self, x: Tensor, norm: str, conv: str) -> Tensor:
        h = self.norm(x, norm)
        h = h * torch.sigmoid(h)
        return self.conv(h, conv, padding=1)

    def block(self, x: Tensor, name: str) -> Tensor:
        h = self.norm_swish_conv(x, f"{name}.norm1", f"{name}.conv1")
        h = self.norm_swish_conv(h, f"{name}.norm2", f"{name}.conv2")
        if f"{name}.nin_shortcut.weight" in self.state:
            x = self.conv(x, f"{name}.nin_shortcut")
        return x + h

    def middle(self, x: Tensor, name: str) -> Tensor:
        x = self.block(x, f"{name}.block_1")
        h = self.norm(x, f"{name}.attn_1.norm")
        qkv = [self.conv(h, f"{name}.attn_1.{part}").flatten(2).mT.contiguous() for part in "qkv"]
        h = F.scaled_dot_product_attention(*(part[:, None] for part in qkv))
        h = rearrange(h, "b 1 (h w) c -> b c h w", h=x.shape[2])
        x = x + self.conv(h, f"{name}.attn_1.proj_out")
        return self.block(x, f"{name}.block_2")

    def encode(self, pixels: Tensor) -> Tensor:
        x = self.conv(pixels, "encoder.conv_in", padding=1)
        for level in range(4):
            for block in range(2):
                x = self.block(x, f"encoder.down.{level}.block.{block}")
            if level < 3:
                x = F.pad(x, (0, 1, 0, 1))
                x = self.conv(x, f"encoder.down.{level}.downsample.conv", stride=2)
        x = self.middle(x, "encoder.mid")
        x = self.norm_swish_conv(x, "encoder.norm_out", "encoder.conv_out")
        if "encoder.quant_conv.weight" in self.state:
            x = self.conv(x, "encoder.quant_conv")
        z = x.chunk(2, dim=1)[0]
        if "bn.running_mean" not in self.state:
            return F.pixel_unshuffle(0.3611 * (z - 0.1159), 2)
        z = F.pixel_unshuffle(z, 2)
        return F.batch_norm(
            z, self.state["bn.running_mean"], self.state["bn.running_var"], eps=1e-4
        )

    def decode(self, latents: Tensor) -> Tensor:
        if "bn.running_mean" in self.state:
            std = torch.sqrt(self.state["bn.running_var"].view(1, -1, 1, 1) + 1e-4)
            z = latents * std + self.state["bn.running_mean"].view(1, -1, 1, 1)
            return self.decoder(self.conv(F.pixel_shuffle(z, 2), "decoder.post_quant_conv"))
        with torch.autocast("cpu", torch.bfloat16):
            return self.decoder(F.pixel_shuffle(latents.float(), 2) / 0.3611 + 0.1159)

    def decoder(self, z: Tensor) -> Tensor:
        x = self.conv(z, "decoder.conv_in", padding=1)
        x = self.middle(x, "decoder.mid").float()
        for level in (3, 2, 1, 0):
            for block in range(3):
                x = self.block(x, f"decoder.up.{level}.block.{block}")
            if level > 0:
                x = F.interpolate(x, scale_factor=2.0, mode="nearest")
                x = self.conv(x, f"decoder.up.{level}.upsample.conv", padding=1)
        return self.norm_swish_conv(x, "decoder.norm_out", "decoder.conv_out")


@both_families
@torch.no_grad()
def test_bfl_autoencoder_decodes_bfloat16_latents_to_the_bit(name):
    ours = bfl_autoencoder(randomise(AutoEncoder(TINY[name])))
    theirs = BFL(ours.state_dict())
    for batch, h, w in ((1, 2, 3), (2, 5, 3)):
        latents = random_latents(TINY[name], batch, h, w).bfloat16()
        decoded = ours.decode(latents)
        assert decoded.dtype == (torch.bfloat16 if name == "flux.1" else torch.float32)
        assert torch.equal(decoded, theirs.decode(latents))


@both_families
@torch.no_grad()
def test_bfl_autoencoder_encodes_to_the_bit(name):
    ours = bfl_autoencoder(randomise(AutoEncoder(TINY[name])))
    theirs = BFL(ours.state_dict())
    for batch, h, w in ((1, 2, 3), (2, 5, 3)):
        pixels = random_pixels(batch, 16 * h, 16 * w)
        assert torch.equal(ours.encode(pixels), theirs.encode(pixels))
