"""Images beyond the grammar, for the autoencoder; and arrays to pixels and back."""

from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from flux import toy
from flux.toy.drawing import coverage


def busy_image(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return an image (S, S, 3) uint8: shapes or regions of noise, on a ramp or on noise."""
    image = smooth(rng, size, rng.uniform(1.0, 2.4)) if rng.random() < 0.5 else ramp(rng, size)
    if rng.random() < 0.5:  # regions of noise with sharp borders
        for _ in range(rng.integers(1, 4)):
            field = smooth(rng, size, rng.uniform(1.8, 2.6))[..., :1]
            edge = np.clip(
                (field - np.quantile(field, rng.uniform(0.3, 0.8))) / rng.uniform(0.5, 6), 0, 1
            )
            image = image * (1 - edge) + smooth(rng, size, rng.uniform(0.8, 2.4)) * edge
    else:
        for _ in range(rng.integers(2, 7)):
            shape, radius = str(rng.choice(toy.SHAPES)), rng.uniform(0.06, 0.3) * size
            pattern = str(rng.choice(["", "", *toy.PATTERNS]))
            x, y = rng.uniform(0, size, 2)
            alpha = coverage(shape, x, y, radius, size, size, pattern)[..., None]
            image = image * (1 - alpha) + rng.uniform(0, 255, 3).astype(np.float32) * alpha
    return np.rint(image.clip(0, 255)).astype(np.uint8)


def ramp(rng: np.random.Generator, size: int) -> np.ndarray:
    """Return a ramp from one colour to another, (S, S, 3) float32."""
    along = np.linspace(0, 1, size, dtype=np.float32)
    along = along[:, None, None] if rng.random() < 0.5 else along[None, :, None]
    first, second = rng.uniform(0, 255, (2, 3)).astype(np.float32)
    image = first * along + second * (1 - along)
    return np.broadcast_to(image, (size, size, 3))


def smooth(rng: np.random.Generator, size: int, power: float) -> np.ndarray:
    """Return noise (S, S, 3) float32 of amplitude frequency^-power, as photos have."""
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.rfftfreq(size)[None]) * size
    spectrum = (
        np.fft.rfft2(rng.standard_normal((3, size, size))) / np.maximum(frequency, 1) ** power
    )
    fields = np.fft.irfft2(spectrum, (size, size))
    fields = (fields - fields.mean((1, 2), keepdims=True)) / fields.std((1, 2), keepdims=True)
    colours = rng.normal(0, 1, (3, 3)) * np.array([[0.2], [0.35], [0.35]])
    colours[0] += 1  # the first field is brightness
    image = np.einsum("fhw,fc->hwc", fields, colours) * rng.uniform(15, 60)
    image = image + rng.uniform(40, 215, 3)
    return image.astype(np.float32)


def to_pixels(images: np.ndarray) -> Tensor:
    """(B, H, W, 3) uint8 -> (B, 3, H, W) in [-1, 1]."""
    return torch.from_numpy(images).permute(0, 3, 1, 2).float() / 127.5 - 1


def to_images(pixels: Tensor) -> np.ndarray:
    """(B, 3, H, W) -> (B, H, W, 3) uint8, clamped."""
    return ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).cpu().numpy()


def contact_sheet(path: Path, images: np.ndarray, columns: int) -> None:
    """Save images (N, H, W, 3) in rows. N is a multiple of `columns`."""
    rows = [
        np.concatenate(list(images[i : i + columns]), axis=1)
        for i in range(0, len(images), columns)
    ]
    Image.fromarray(np.concatenate(rows)).save(path)
