"""The image so far, while a model samples: a linear map from latents to colours.

    preview = flux.Preview(pipe)
    pipe(prompt, callback=lambda step, t, latents: preview()[0].save("now.png"))

Latents are nearly linear in the mean colours of 8x8 pixels. The map is fitted to the autoencoder at
hand, which encodes known colours once: so every family, and every fine-tune, has a map of its own.
"""

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux.autoencoder import unpack
from flux.errors import UserError
from flux.image_io.output import to_images
from flux.pipeline import Pipeline

SIDE, CELL = 256, 32  # pixels of the image that is encoded, and of its 8x8 squares of one colour
RIDGE = 1e-3  # of the variance: keeps channels that say nothing about colours small


class Preview:
    """Call it in a callback of `pipe`: it returns the images that the network predicts at present.

    The images of the run stay the same, to the bit. To build a Preview, `pipe` encodes one image of
    256x256 pixels. `weight` (z, 3) and `bias` (3,) are the map from the autoencoder's z channels.
    """

    def __init__(self, pipe: Pipeline):
        self.pipe = pipe
        pixels = random_squares()
        pipe.plan_memory(SIDE, SIDE, encoded_pixels=SIDE**2)
        with torch.no_grad():
            latents = pipe._encode_image(pixels)  # (1, 4z, h, w)
            # undoing the normalisation of latents is a factor and a summand for each channel
            undo = pipe.image_encoder().denormalise
            zeros = torch.zeros(1, latents.shape[1], 1, 1, device=pipe.device)
            self.shift = undo(zeros).cpu()
            self.scale = undo(zeros + 1).cpu() - self.shift
        pipe.residency.done(pipe.image_encoder)
        self.weight, self.bias = fit(self._channels(latents), F.avg_pool2d(pixels, 8))

    def __call__(self) -> list[Image.Image]:
        """Return an image of the output's size for each of the batch; UserError between runs."""
        denoised = self.pipe.now.denoised
        if denoised is None:
            raise UserError("preview: nothing is sampled now. Call it in a `callback`.")
        colours = self.colours(denoised())
        images = to_images(F.interpolate(colours, scale_factor=8, mode="bilinear"))
        if self.pipe.filters is not None:
            self.pipe.filters.check_images(images, name="preview")
        return images

    @torch.no_grad()
    def colours(self, latents: Tensor) -> Tensor:
        """Map latents (B, 4z, h, w) to the mean colours of 8x8 pixels, (B, 3, 2h, 2w)."""
        out = self._channels(latents.float().cpu()).movedim(1, -1) @ self.weight + self.bias
        return out.movedim(-1, 1)

    def _channels(self, latents: Tensor) -> Tensor:
        """Latents (B, 4z, h, w) -> the autoencoder's own channels (B, z, 2h, 2w)."""
        return unpack(latents * self.scale + self.shift)


def random_squares() -> Tensor:
    """Return squares of random colours as pixels, (1, 3, SIDE, SIDE) in [-1, 1]."""
    colours = torch.rand(
        1, 3, SIDE // CELL, SIDE // CELL, generator=torch.Generator().manual_seed(0)
    )
    return F.interpolate(2 * colours - 1, (SIDE, SIDE), mode="nearest")


def fit(channels: Tensor, colours: Tensor) -> tuple[Tensor, Tensor]:
    """Return the weight (z, 3) and the bias (3,) of the least squares from channels to colours.

    channels: (1, z, h, w); colours: (1, 3, h, w).
    """
    x = rearrange(channels.double(), "1 z h w -> (h w) z")
    y = rearrange(colours.double(), "1 c h w -> (h w) c")
    mean, std = x.mean(0), x.std(0) + 1e-12
    x = (x - mean) / std
    ridge = RIDGE * len(x) * torch.eye(x.shape[1], dtype=x.dtype)
    weight = torch.linalg.solve(x.T @ x + ridge, x.T @ (y - y.mean(0))) / std[:, None]
    return weight.float(), (y.mean(0) - mean @ weight).float()
