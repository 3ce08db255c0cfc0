"""The watermarks that an image may carry, and what their payload says."""

import hashlib
import warnings

from PIL import Image

from flux.image_io.metadata import REQUIRED
from flux.image_io.output import to_json
from flux.safety import bfl_watermark, watermark

KINDS = ("tile", "bfl")


def check_size(kind: str, width: int, height: int) -> None:
    """Raise UserError if an image is too small for the mark."""
    (watermark if kind == "tile" else bfl_watermark).check_size(width, height)


def payload_of(metadata: dict) -> int:
    """Return the first 48 bits of the SHA-256 of what decides an image, prompt and seed included.

    So the mark of an image that is made again is the same, and fits no other record.
    """
    decisive = {name: metadata.get(name) for name in sorted(REQUIRED)}
    return int.from_bytes(hashlib.sha256(to_json(decisive).encode()).digest()[:6], "big")


def mark(image: Image.Image, kind: str, metadata: dict) -> Image.Image:
    """Return the image with a mark; warn if the mark cannot be read back from it."""
    if kind == "tile":
        payload = payload_of(metadata)
        marked = watermark.embed(image, payload)
        found = watermark.detect(marked)
        if found is None or found.payload != payload:
            warnings.warn("the watermark cannot be read back from this image", stacklevel=2)
        return marked
    marked = bfl_watermark.embed(image)
    if bfl_watermark.count_equal_bits(marked) < bfl_watermark.LIKELY:
        warnings.warn("BFL's watermark cannot be read back from this image", stacklevel=2)
    return marked


def find(image: Image.Image) -> dict[str, str]:
    """Return the marks that are found: {"tile": payload in hexadecimal, "bfl": bits that fit}."""
    found = {}
    if tile := watermark.detect(image):
        found["tile"] = f"{tile.payload:012x}"
    equal = bfl_watermark.count_equal_bits(image)
    if equal >= bfl_watermark.LIKELY:
        found["bfl"] = f"{equal} of {len(bfl_watermark.MESSAGE)} bits"
    return found
