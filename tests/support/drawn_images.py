"""Images and masks for tests, drawn by formulas."""

import numpy as np
from PIL import Image


def photo(width: int = 96, height: int = 64, seed: int = 0) -> Image.Image:
    """Return smooth waves of color, so that resizing does not make the image gray."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:height, :width] / 40
    waves = [np.sin(a * x + b * y + c) for a, b, c in rng.uniform(-3, 3, (3, 3))]
    return Image.fromarray(np.rint(127.5 + 127 * np.stack(waves, -1)).astype(np.uint8))


def soft_mask(width: int = 96, height: int = 64) -> Image.Image:
    """Return a black mask with a white block and, below, a ramp from black to white."""
    mask = np.zeros((height, width), np.uint8)
    mask[height // 4 : height // 2, width // 3 :] = 255
    mask[height // 2 :, : width // 2] = np.linspace(0, 255, width // 2)
    return Image.fromarray(mask)


def block_mask(width: int, height: int) -> Image.Image:
    """Return a black mask with a large white block and a soft edge at the bottom left."""
    values = np.zeros((height, width), np.uint8)
    values[height // 4 : -height // 4, width // 3 :] = 255
    values[-height // 4 :, : width // 2] = np.linspace(0, 255, width // 2)
    return Image.fromarray(values)


A, B = photo(90, 70, seed=1), photo(70, 110, seed=2)  # sides that are not multiples of 16
A.paste((250, 240, 20), (20, 15, 60, 50))  # so that A has edges
M = block_mask(*A.size)
