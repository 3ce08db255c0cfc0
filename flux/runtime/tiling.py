"""Decode an image tile by tile, where it does not fit into memory at once."""

import torch
from torch import Tensor

from flux.autoencoder import AutoEncoder
from flux.errors import UserError


def decode_tiled(
    ae: AutoEncoder, latents: Tensor, tile_size: int = 64, overlap: int = 16
) -> Tensor:
    """Decode latents (B, 4z, h, w) in squares of `tile_size` latents, to (B, 3, 16h, 16w).

    Neighbours share `overlap` latents at least, and are blended linearly there. An image of one
    tile equals `ae.decode`. Others are approximate: group norms and attention see one tile only.
    """
    if not 0 < overlap < tile_size:
        raise UserError(
            f"overlap: must be from 1 to `tile_size` - 1 (got {overlap} of {tile_size} latents). "
            "Use a fourth of `tile_size`."
        )
    batch, _, h, w = latents.shape
    out = torch.zeros(batch, 3, 16 * h, 16 * w, device=latents.device)
    for y, rows in tiles(h, tile_size, overlap, latents.device):
        for x, columns in tiles(w, tile_size, overlap, latents.device):
            pixels = ae.decode(latents[:, :, y : y + tile_size, x : x + tile_size])
            bottom, right = 16 * (y + tile_size), 16 * (x + tile_size)
            out[:, :, 16 * y : bottom, 16 * x : right] += pixels * rows[:, None] * columns
    return out.to(pixels.dtype)


def tiles(
    size: int, tile_size: int, overlap: int, device: torch.device | None = None
) -> list[tuple[int, Tensor]]:
    """Return where tiles begin along an axis of `size` latents, and the weights of their pixels.

    Tiles are spread evenly and share `overlap` latents at least. The weights of a pixel sum to 1.
    """
    count = 1 + max(0, -(-(size - tile_size) // (tile_size - overlap)))
    starts = [n * (size - tile_size) // max(count - 1, 1) for n in range(count)]
    # a weight rises from the tile's start and falls to its end; at the image's border it does not
    rises = [-size, *starts[1:]]
    falls = [*(start + tile_size for start in starts[:-1]), 2 * size]
    pixel = torch.arange(16 * size, device=device) + 0.5
    weights = []
    for rise, fall in zip(rises, falls, strict=True):
        weights.append(torch.minimum(pixel - 16 * rise, 16 * fall - pixel).clamp(min=0))
    total = sum(weights)
    out = []
    for start, weight in zip(starts, weights, strict=True):
        out.append((start, (weight / total)[16 * start : 16 * (start + tile_size)]))
    return out
