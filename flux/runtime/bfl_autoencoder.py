"""The autoencoder in the arithmetic of Black Forest Labs' code, which rounds differently.

SiLU is x * sigmoid(x). The attention projects by convolutions, and its sum begins with its input.
FLUX.2's encoder normalises by a batch norm. FLUX.1 is run under bfloat16 autocast, and the decoder
widens what its middle gives. Results equal BFL's to the bit on a CPU, in float32 weights.

Reference: https://github.com/black-forest-labs/flux/blob/main/src/flux/modules/autoencoder.py
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from flux.autoencoder import AttnBlock, AutoEncoder, Decoder, Encoder, PointwiseConv, ResnetBlock


def bfl_autoencoder(ae: AutoEncoder) -> AutoEncoder:
    """Make `ae`, in float32 weights, compute as BFL's code does. Return `ae`."""
    for module in ae.modules():
        module.__class__ = BFL_CLASSES.get(type(module), type(module))
    return ae


def swish(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x)


class BFLResnetBlock(ResnetBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(swish(self.norm1(x)))
        h = self.conv2(swish(self.norm2(h)))
        return (x if self.nin_shortcut is None else self.nin_shortcut(x)) + h


class BFLPointwiseConv(PointwiseConv):
    def forward(self, x: Tensor) -> Tensor:
        return nn.Conv2d.forward(self, x)


class BFLAttnBlock(AttnBlock):
    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        q, k, v = (rearrange(f(h), "b c h w -> b 1 (h w) c") for f in (self.q, self.k, self.v))
        out = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous())
        return x + self.proj_out(rearrange(out, "b 1 (h w) c -> b c h w", h=x.shape[2]))


class BFLEncoder(Encoder):
    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv_in(pixels)
        for level in self.down:
            for block in level.block:
                x = block(x)
            if level.downsample is not None:
                x = level.downsample(x)
        x = self.conv_out(swish(self.norm_out(self.mid(x))))
        return x if self.quant_conv is None else self.quant_conv(x)


class BFLDecoder(Decoder):
    def forward(self, z: Tensor) -> Tensor:
        x = z if self.post_quant_conv is None else self.post_quant_conv(z)
        x = self.mid(self.conv_in(x)).to(self.conv_out.weight.dtype)
        for level in reversed(self.up):
            for block in level.block:
                x = block(x)
            if level.upsample is not None:
                x = level.upsample(x)
        return self.conv_out(swish(self.norm_out(x)))


class BFLAutoEncoder(AutoEncoder):
    def decode(self, latents: Tensor) -> Tensor:
        """FLUX.1 widens its latents and decodes under autocast, FLUX.2 decodes in float32."""
        if self.config.scale_factor is None:
            return super().decode(latents)
        with torch.autocast(latents.device.type, torch.bfloat16):
            return super().decode(latents.float())

    def normalise(self, latents: Tensor) -> Tensor:
        if self.config.scale_factor is not None:
            return super().normalise(latents)
        return F.batch_norm(latents, self.bn.running_mean, self.bn.running_var, eps=self.bn.eps)


BFL_CLASSES: dict[type, type] = {
    ResnetBlock: BFLResnetBlock,
    PointwiseConv: BFLPointwiseConv,
    AttnBlock: BFLAttnBlock,
    Encoder: BFLEncoder,
    Decoder: BFLDecoder,
    AutoEncoder: BFLAutoEncoder,
}
