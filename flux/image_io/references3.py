"""The sizes at which FLUX 3 encodes reference images.

One reference stays whole: it is padded to a canvas, and the output is cropped back. Several are
scaled down further, and cropped to multiples of 16. As in diffusers' `Flux3ImageProcessor`, which
follows Black Forest Labs' code.
"""

import math
from typing import NamedTuple

import numpy as np
from PIL import Image

from flux.errors import UserError
from flux.image_io.input import fit_reference

Box = tuple[int, int, int, int]  # left, top, right, bottom
MIN_SIDE, MAX_SIDE = 64, 4096  # of a canvas
ONE, SEVERAL = 4 * 1024**2, 1024**2  # pixels: most of a canvas, and of each of several references


class Reference(NamedTuple):
    """A reference at the size to encode, and where the given image lies in it."""

    image: Image.Image
    box: Box | None  # None: the edges were cropped off


def check_reference3(image: Image.Image, name: str, alone: bool) -> None:
    """Raise UserError for an image of less than a token, which has 16x16 pixels."""
    scale = 1.0 if alone else min(1.0, math.sqrt(SEVERAL / (image.width * image.height)))
    if min(image.size) * scale < 16:
        raise UserError(
            f"{name} is {image.width}x{image.height}: too small for a reference (expected at least "
            "16 pixels a side, after scaling down). Use a larger one, or crop it."
        )


def prepare_references(
    images: tuple[Image.Image, ...], limit: int | None = None
) -> list[Reference]:
    """Return the references at the sizes to encode; `limit`: the most pixels of each."""
    if len(images) == 1:
        return [pad_to_canvas(images[0], limit or ONE)]
    return [Reference(fit_reference(image, limit or SEVERAL), None) for image in images]


def canvas_of(size: tuple[int, int], limit: int = ONE) -> tuple[tuple[int, int], tuple[int, int]]:
    """Return the size to which an image is scaled down, and the size of its canvas.

    A canvas is the image, rounded up to multiples of 16, of at most `limit` pixels.
    """
    width, height = size
    scale = min(1.0, math.sqrt(limit / (width * height)), MAX_SIDE / max(size))
    while True:
        fitted = max(1, round(width * scale)), max(1, round(height * scale))
        w, h = (min(MAX_SIDE, max(MIN_SIDE, -(-side // 16) * 16)) for side in fitted)
        if w * h <= limit or (w, h) == (MIN_SIDE, MIN_SIDE):
            return fitted, (w, h)
        scale *= 0.995  # rounding up had passed the limit


def pad_to_canvas(image: Image.Image, limit: int) -> Reference:
    """Scale an image down if needed, center it on its canvas, and reflect it beyond its edges."""
    fitted, (width, height) = canvas_of(image.size, limit)
    if fitted != image.size:
        image = image.resize(fitted, Image.Resampling.LANCZOS)
    left, top = (width - image.width) // 2, (height - image.height) // 2
    right, bottom = left + image.width, top + image.height
    if (width, height) != image.size:
        # a reflection leaves out the edge itself, which a narrow image cannot spare
        mode = "reflect" if min(image.size) > 16 else "symmetric"
        padding = ((top, height - bottom), (left, width - right), (0, 0))
        image = Image.fromarray(np.pad(np.asarray(image), padding, mode))  # type: ignore[call-overload]
    return Reference(image, (left, top, right, bottom))
