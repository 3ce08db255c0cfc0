"""BFL's watermark: a fixed message of 46 bits, in the scheme "dwtDct" of invisible-watermark.

Black Forest Labs' code embeds it in all images of FLUX.1 (src/flux/util.py, 802fb47). In spite of
its name the scheme has no DCT: it is quantization index modulation of one coefficient in each 4x4
block of the low band of a Haar wavelet transform, in the chroma U alone. JPEG erases it.
"""

import numpy as np
from PIL import Image

from flux.errors import UserError

# BFL writes 48 digits and loses two zeros at the start, since its code counts from the first one.
MESSAGE = np.array([int(digit) for digit in f"{0x2AFE879CF52E:b}"])  # (46,)
STEP = 36  # of the quantization, in levels
BLOCK = 4
MIN_PIXELS = 256 * 256  # as in the library
LIKELY = 38  # equal bits of 46 from which on the mark is taken to be there: 5e-6 for fair coins


def check_size(width: int, height: int) -> None:
    """Raise UserError if an image is too small for the library that reads the mark."""
    if width * height < MIN_PIXELS:
        raise UserError(
            f"watermark: an image of {width}x{height} is too small for BFL's mark (expected at "
            f"least {MIN_PIXELS:,} pixels). Make a larger one, or leave the watermark out."
        )


def embed(image: Image.Image) -> Image.Image:
    """Return the RGB image with BFL's message; UserError if it is too small."""
    check_size(*image.size)
    marked = embed_levels(np.asarray(image, np.float32))
    return Image.fromarray(np.rint(marked.clip(0, 255)).astype(np.uint8))


def embed_levels(rgb: np.ndarray) -> np.ndarray:
    """Levels (H, W, 3) float32 -> the same with the message, neither rounded nor clipped."""
    y, u, v = _to_yuv(rgb)
    height, width = (side // 4 * 4 for side in u.shape)
    low, across, along, diagonal = _haar(u[:height, :width])
    blocks = _blocks(low)  # (blocks, 16), a copy
    rows, places = np.arange(len(blocks)), _largest(blocks)
    values = blocks[rows, places]
    bits = np.resize(MESSAGE, len(blocks))
    magnitudes = (np.abs(values) // STEP + 0.25 + 0.5 * bits) * STEP  # float64, as in the library
    blocks[rows, places] = np.where(values >= 0, magnitudes, -magnitudes)
    high, wide = (side // BLOCK for side in low.shape)
    inner = blocks.reshape(high, wide, BLOCK, BLOCK).swapaxes(1, 2)
    low[: high * BLOCK, : wide * BLOCK] = inner.reshape(high * BLOCK, wide * BLOCK)
    # The library exchanges the two bands of edges, which blurs U.
    u[:height, :width] = _inverse_haar(low, along, across, diagonal)
    return _to_rgb(y, u, v)


def count_equal_bits(image: Image.Image) -> int:
    """Return how many of the 46 bits that an image seems to carry are BFL's; 23 by chance."""
    if image.width * image.height < MIN_PIXELS:
        return 0
    _, u, _ = _to_yuv(np.asarray(image.convert("RGB"), np.float32))
    height, width = (side // 4 * 4 for side in u.shape)
    blocks = _blocks(_haar(u[:height, :width])[0])
    values = np.abs(blocks[np.arange(len(blocks)), _largest(blocks)])
    ones = (values % STEP) > 0.5 * STEP
    index = np.arange(len(blocks)) % len(MESSAGE)
    share = np.bincount(index, ones, len(MESSAGE)) / np.bincount(index, minlength=len(MESSAGE))
    return int(((share * 255 > 127) == MESSAGE).sum())


def _blocks(low: np.ndarray) -> np.ndarray:
    high, wide = (side // BLOCK for side in low.shape)
    inner = low[: high * BLOCK, : wide * BLOCK].reshape(high, BLOCK, wide, BLOCK)
    return inner.swapaxes(1, 2).reshape(high * wide, BLOCK * BLOCK).copy()


def _largest(blocks: np.ndarray) -> np.ndarray:
    """Return the place of the largest magnitude in each block, the first value left out."""
    return np.abs(blocks[:, 1:]).argmax(1) + 1


def _haar(x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return the bands of one level, rows first: low, then the edges across, along, diagonal."""
    smooth, edges = _split(x[::2], x[1::2])
    low, along = _split(smooth[:, ::2], smooth[:, 1::2])
    across, diagonal = _split(edges[:, ::2], edges[:, 1::2])
    return low, across, along, diagonal


def _inverse_haar(
    low: np.ndarray, across: np.ndarray, along: np.ndarray, diagonal: np.ndarray
) -> np.ndarray:
    x = np.empty((2 * low.shape[0], 2 * low.shape[1]), np.float32)
    rows = np.empty((2, low.shape[0], x.shape[1]), np.float32)
    rows[0, :, ::2], rows[0, :, 1::2] = _split(low, along)
    rows[1, :, ::2], rows[1, :, 1::2] = _split(across, diagonal)
    x[::2], x[1::2] = _split(*rows)
    return x


def _split(first: np.ndarray, second: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Return sum and difference over the square root of 2; each its own inverse."""
    half = np.float32(0.5**0.5)
    return half * second + half * first, half * first - half * second


def _to_yuv(rgb: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """As OpenCV's BGR2YUV for floats, which adds 0.5 whatever the range of the levels is."""
    r, g, b = (rgb[..., channel] for channel in range(3))
    y = _fused(b, 0.114, _fused(g, 0.587, r * np.float32(0.299)))
    return y, _fused(b - y, 0.492, np.float32(0.5)), _fused(r - y, 0.877, np.float32(0.5))


def _to_rgb(y: np.ndarray, u: np.ndarray, v: np.ndarray) -> np.ndarray:
    half = np.float32(0.5)
    u, v = u - half, v - half
    green = _fused(v, -0.581, _fused(u, -0.395, y))
    return np.stack([_fused(v, 1.14, y), green, _fused(u, 2.032, y)], -1)


def _fused(x: np.ndarray, factor: float, added: np.ndarray | np.float32) -> np.ndarray:
    """Return x * factor + added, rounded once to float32, as OpenCV's vector code computes it."""
    return (x.astype(np.float64) * np.float64(np.float32(factor)) + added).astype(np.float32)
