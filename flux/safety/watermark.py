"""An invisible watermark of 48 bits in an image's luma, of no weights: a spread-spectrum tile.

A tile of 128x128 pixels is repeated over the image. It consists of 32x32 chips, squares of 4x4
pixels, each with a known sign. 3/8 of the chips tell where the tile begins, even after a crop. The
others carry 64 bits by keeping or turning their signs: the payload and its CRC-16. The strength
follows the texture of the image, which hides the mark.

The signs are public. So the mark is a label for honest programs, and no lock: who knows this file
can remove or forge it. It survives JPEG, scaling and crops; it does not survive a rotation or
mirroring. `scripts/benchmarks/watermark.py` measures it.
"""

import binascii
import hashlib
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from flux.errors import UserError

PAYLOAD_BITS, CHECK_BITS = 48, 16
BITS = PAYLOAD_BITS + CHECK_BITS
TILE, CHIP = 128, 4  # pixels
CHIPS = TILE // CHIP  # on a side of the tile
MIN_SIDE = 256  # pixels; in less, too few chips carry each bit
SEED = b"flux watermark 1"
LOWEST = 0.8  # gain of the chips that tell the place: less may lose the place in the last round
PRESENT = 4.5  # standard deviations of the peak; unmarked images stay below in nearly all cases
CERTAIN = 7.0  # from here on, no other scale is tried
ROUNDS = 4  # of embedding, each of which looks at what the one before reached
MARGINS = 4.5, 9.0  # standard deviations that embedding aims at: of each bit, of the peak


class Watermark(NamedTuple):
    payload: int  # of 48 bits
    peak: float  # standard deviations of the tile's place above chance
    scale: float  # by which the image was resized to find the mark


class Layout(NamedTuple):
    signs: Tensor  # (1024,) of -1 and 1
    sync: Tensor  # indices of chips that tell the place
    data: Tensor  # indices of chips that carry bit `index % 64`


@lru_cache
def layout() -> Layout:
    """Return the tile's chips, drawn from a hash, so that they stay the same in all versions."""
    count = CHIPS**2
    stream = hashlib.shake_256(SEED).digest(9 * count)
    signs = torch.tensor([1.0 - 2 * (byte & 1) for byte in stream[:count]])
    order = np.argsort(np.frombuffer(stream[count:], "<u8"), kind="stable")
    places = torch.from_numpy(order.astype(np.int64))
    return Layout(signs, places[: count * 3 // 8], places[count * 3 // 8 :])


def to_bits(payload: int) -> list[int]:
    """Return the 64 bits of a payload of 48 bits and its CRC-16 (CCITT), highest first."""
    data = payload.to_bytes(PAYLOAD_BITS // 8, "big")
    word = payload << CHECK_BITS | binascii.crc_hqx(data, 0xFFFF)
    return [word >> shift & 1 for shift in reversed(range(BITS))]


def from_bits(bits: list[int]) -> int | None:
    """Return the payload, or None if the CRC does not fit."""
    word = sum(bit << shift for bit, shift in zip(bits, reversed(range(BITS))))
    payload = word >> CHECK_BITS
    return payload if to_bits(payload) == bits else None


# ------------------------------------------------------------------------------ embedding


def check_size(width: int, height: int) -> None:
    """Raise UserError if an image is too small to carry the mark."""
    if min(width, height) < MIN_SIDE:
        raise UserError(
            f"watermark: an image of {width}x{height} is too small (expected sides of at least "
            f"{MIN_SIDE} pixels). Make a larger one, or leave the watermark out."
        )


@torch.inference_mode()
def embed(image: Image.Image, payload: int) -> Image.Image:
    """Return the RGB image with the payload, of 48 bits, in its luma.

    Each round reads the mark in the rounded levels, and raises the bits that stand out too little.
    UserError if the image is too small.
    """
    check_size(*image.size)
    levels = torch.from_numpy(np.array(image)).float()  # (H, W, 3)
    height, width = levels.shape[:2]
    luma = _luma(levels)
    deviation = (_mean(luma.square(), 4) - _mean(luma, 4).square()).clamp(min=0).sqrt()
    amplitude = (1.2 + 0.25 * deviation).clamp(max=5)  # (H, W), in levels
    tile, bits = layout(), torch.tensor(to_bits(payload)).float() * 2 - 1  # (64,)
    carried = torch.arange(len(tile.data)) % BITS
    gains, sync_gain = torch.ones(BITS), 1.0
    for step in range(ROUNDS):
        chips = tile.signs.clone()
        chips[tile.sync] *= sync_gain
        chips[tile.data] *= (bits * gains)[carried]
        pattern = _grow(chips).repeat(-(-height // TILE), -(-width // TILE))[:height, :width]
        marked = (levels + (amplitude * pattern)[..., None]).round().clamp(0, 255)
        if step == ROUNDS - 1:
            break
        folded = _fold(_residual(_luma(marked)))
        reached, noise = _read_bits(folded, 0, 0)
        lack = MARGINS[0] / (reached * bits / noise).clamp(min=0.8)
        gains = (gains * lack.clamp(0.6, 1.8)).clamp(0.35, 3)
        lack_of_peak = MARGINS[1] / max(_peak(folded)[0], 1e-3)
        sync_gain = min(2.0, max(LOWEST, sync_gain * min(1.6, max(0.8, lack_of_peak))))
    return Image.fromarray(marked.byte().numpy())


# ------------------------------------------------------------------------------ detection


@torch.inference_mode()
def detect(image: Image.Image) -> Watermark | None:
    """Return the watermark of an image; None if there is none, or if the CRC does not fit.

    If no tile of 128 pixels stands out, the periods that the image shows are tried as the tile's.
    """
    luma = _luma(torch.from_numpy(np.array(image.convert("RGB"))).float())
    if min(luma.shape) < TILE // 2:
        return None
    residual = _residual(luma)
    best = _attempt(residual, 1.0)
    if best[0] < CERTAIN:
        for period in _periods(residual):
            scale = TILE / period
            size = [round(side * scale) for side in luma.shape]
            if min(size) < TILE // 2 or max(size) > 6000:
                continue
            scaled = F.interpolate(
                luma[None, None], size, mode="bilinear", antialias=scale < 1, align_corners=False
            )
            best = max(best, _attempt(_residual(scaled[0, 0]), scale), key=lambda found: found[0])
    peak, scale, bits = best
    payload = from_bits(bits)
    return None if payload is None or peak < PRESENT else Watermark(payload, peak, scale)


def _attempt(residual: Tensor, scale: float) -> tuple[float, float, list[int]]:
    folded = _fold(residual)
    peak, row, column = _peak(folded)
    values, _ = _read_bits(folded, row, column)
    return peak, scale, (values > 0).int().tolist()


def _periods(residual: Tensor, count: int = 6) -> list[float]:
    """Return the most likely periods of the tile, 40 to 300 pixels, by the autocorrelation."""
    height, width = residual.shape
    spectrum = torch.fft.rfft2(residual, s=(2 * height, 2 * width))
    correlation = torch.fft.irfft2(spectrum.abs().square(), s=(2 * height, 2 * width))
    correlation = correlation[:height, :width]
    rows, columns = height - torch.arange(height).float(), width - torch.arange(width).float()
    overlap = rows[:, None] * columns
    correlation = correlation / overlap.sqrt()  # of equal noise everywhere
    periods = torch.arange(40, min(300, int(0.8 * max(height, width))), 0.05)
    score, terms = torch.zeros_like(periods), torch.zeros_like(periods)
    for i in range(9):
        for j in range(9):
            y, x = (periods * i).round().long(), (periods * j).round().long()
            inside = (y < 0.8 * height) & (x < 0.8 * width) & ((y > 0) | (x > 0))
            value = correlation[y.clamp(max=height - 1), x.clamp(max=width - 1)]
            score, terms = score + value * inside, terms + inside
    score = score / terms.clamp(min=1).sqrt()
    found = []
    for _ in range(count if len(periods) else 0):
        index = int(score.argmax())
        found.append(float(periods[index]))
        score[max(0, index - 6) : index + 7] = -torch.inf
    return found


# ------------------------------------------------------------------------------ the signal


def _luma(levels: Tensor) -> Tensor:
    """Levels (H, W, 3) -> (H, W): ITU-R BT.601, as JPEG."""
    return levels @ torch.tensor([0.299, 0.587, 0.114])


def _mean(x: Tensor, radius: int) -> Tensor:
    """Return the mean over the square of side 2 radius + 1 around each pixel of x (H, W)."""
    x = x[None, None]
    x = F.avg_pool2d(F.pad(x, (radius, radius, 0, 0), "reflect"), (1, 2 * radius + 1), 1)
    return F.avg_pool2d(F.pad(x, (0, 0, radius, radius), "reflect"), (2 * radius + 1, 1), 1)[0, 0]


def _residual(luma: Tensor) -> Tensor:
    """Return luma without what is smooth, at an even strength, so that edges do not dominate."""
    detail = luma - _mean(luma, 6)
    return detail / (_mean(detail.square(), 8).clamp(min=0).sqrt() + 1.5)


def _grow(chips: Tensor) -> Tensor:
    """Chips (1024,) -> the tile (128, 128)."""
    return chips.view(CHIPS, CHIPS).repeat_interleave(CHIP, 0).repeat_interleave(CHIP, 1)


def _fold(residual: Tensor) -> Tensor:
    """Add up all tiles of (H, W): (128, 128)."""
    height, width = residual.shape
    padded = F.pad(residual, (0, -width % TILE, 0, -height % TILE))
    return padded.unflatten(0, (-1, TILE)).unflatten(2, (-1, TILE)).sum((0, 2))


def _peak(folded: Tensor) -> tuple[float, int, int]:
    """Return how far the best place of the tile stands out, in deviations, and its row, column."""
    tile = layout()
    chips = torch.zeros_like(tile.signs)
    chips[tile.sync] = tile.signs[tile.sync]
    product = torch.fft.rfft2(folded) * torch.fft.rfft2(_grow(chips)).conj()
    correlation = torch.fft.irfft2(product, s=folded.shape)
    index = int(correlation.argmax())
    height = (correlation.max() - correlation.mean()) / correlation.std().clamp(min=1e-9)
    return float(height), index // TILE, index % TILE


def _read_bits(folded: Tensor, row: int, column: int) -> tuple[Tensor, Tensor]:
    """Return the sum of the chips of each bit (64,), above 0 for a one, and the sums' noise."""
    tile = layout()
    folded = folded.roll((-row, -column), (0, 1))
    chips = folded.view(CHIPS, CHIP, CHIPS, CHIP).sum((1, 3)).flatten()
    carried = torch.arange(len(tile.data)) % BITS
    sums = torch.zeros(BITS).index_add_(0, carried, (chips * tile.signs)[tile.data])
    return sums, chips.std().clamp(min=1e-9) * (len(tile.data) / BITS) ** 0.5
