"""Read images and masks from files, and bring them to the sizes that the models take.

An image is 8-bit RGB from here on. A mask is 8-bit gray ("L"): white is what may change.
"""

import io
import math
import os
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageFile, ImageFilter, ImageOps

from flux.arguments import shown
from flux.errors import UserError
from flux.plain_files import require_plain_file

# Pillow knows more formats; EPS and WMF would start other programs.
# fmt: off
FORMATS = (
    "PNG", "JPEG", "WEBP", "AVIF", "JPEG2000", "TIFF", "BMP", "DIB", "GIF", "PPM", "TGA", "QOI",
)
# fmt: on
ImageLike = Any  # an image of Pillow, an array or tensor of levels, or the path of a file
MAX_TEXT = 2**26  # bytes of the texts and of the color profile of a PNG, uncompressed
MAX_PIXELS = 2**24  # of an output, or of an outpainting canvas

# (width, height): the sizes that FLUX.1 Kontext was trained on. Source: black-forest-labs/flux,
# src/flux/util.py, PREFERED_KONTEXT_RESOLUTIONS
# fmt: off
KONTEXT_SIZES = [
    (672, 1568), (688, 1504), (720, 1456), (752, 1392), (800, 1328), (832, 1248),
    (880, 1184), (944, 1104), (1024, 1024), (1104, 944), (1184, 880), (1248, 832),
    (1328, 800), (1392, 752), (1456, 720), (1504, 688), (1568, 672),
]
# fmt: on

# ------------------------------------------------------------------------------ reading


def read_image(path: str | os.PathLike) -> Image.Image:
    """Read a file as an upright RGB image; UserError if no image, several frames, or too large."""
    return as_image(_read(Path(path)), str(path))


def read_mask(path: str | os.PathLike) -> Image.Image:
    """Read a file as a mask ("L"); UserError as in `read_image`, and for colors or transparency."""
    return as_mask(_read(Path(path)), str(path))


def as_image(image: ImageLike, name: str = "images") -> Image.Image:
    """Return an image in memory or in a file as RGB, on white where transparent, as browsers do.

    `image`: an image of Pillow in any mode, an array or tensor of levels, or a path. A file, also
    one that Image.open has opened, is turned upright by its EXIF orientation.
    """
    if isinstance(image, str | os.PathLike):
        return read_image(image)
    image = _from_memory(image, name)
    profile = _profile(image)
    image = _eight_bit(image, name)
    if profile and image.mode != "CMYK" and "srgb" not in profile.lower():
        warnings.warn(
            f"{name}: the color profile {profile!r:.60} is not applied, so that colors may be off; "
            "save the image in sRGB to keep them",
            stacklevel=3,
        )
    if image.mode == "CMYK":
        warnings.warn(
            f"{name}: converted from CMYK to RGB without a color profile; colors may be off",
            stacklevel=3,
        )
    if _is_transparent(image):
        warnings.warn(f"{name}: transparent parts were put on white", stacklevel=3)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def as_mask(image: ImageLike, name: str = "mask") -> Image.Image:
    """Return a gray and opaque image, in any form that `as_image` takes, as "L"."""
    if isinstance(image, str | os.PathLike):
        return read_mask(image)
    image = _eight_bit(_from_memory(image, name), name)
    if _is_transparent(image):  # programs differ: the transparent part changes, or is kept
        raise UserError(
            f"{name}: a mask must be opaque (got transparent parts). Save it without transparency, "
            "white where the image may change."
        )
    rgb = image.convert("RGB")
    if is_color(rgb):
        raise UserError(
            f"{name}: a mask must be gray (got colors). Paint it black and white, white where the "
            "image may change."
        )
    return rgb.convert("L")


def is_color(image: Image.Image) -> bool:
    """Return whether an RGB image has colors; JPEG tints grays, but by less than 64 levels."""
    levels = np.asarray(image)  # (H, W, 3)
    return bool((levels.max(axis=2) - levels.min(axis=2)).max() > 64)


def _read(path: Path) -> Image.Image:
    """Read the upright image in a file, with all of its pixels."""
    with open_image(path) as image:
        frames = getattr(image, "n_frames", 1)
        if frames > 1 and image.format != "MPO":  # MPO: a photo and its preview
            raise UserError(f"{path}: holds {frames} images. Save one of them as PNG.")
        image.load()
        return _upright(image, str(path))


def _upright(image: Image.Image, name: str) -> Image.Image:
    """Turn a loaded image by its EXIF orientation; leave it as stored where that is damaged."""
    try:
        return ImageOps.exif_transpose(image)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's readers may fail in any way, and the pixels are sound
        warnings.warn(
            f"{name}: the EXIF data are damaged ({error!s:.80}), so that the image is not turned",
            stacklevel=4,
        )
        return image.copy()


def upright_size(path: Path) -> tuple[int, int]:
    """Return the width and height of the upright image in a file, without reading its pixels."""
    with open_image(path) as image:
        try:
            turned = image.getexif().get(ExifTags.Base.Orientation) in (5, 6, 7, 8)
        except Exception:  # as in `_upright`
            turned = False
        return image.size[::-1] if turned else image.size


def _from_memory(image: Any, name: str) -> Image.Image:
    """Return the image of Pillow, with all of its pixels, that an image or an array is."""
    if isinstance(image, Image.Image):
        with _errors_of_pillow(name):
            image.load()
        # What is made of an opened file keeps its orientation tag, but may have been turned.
        return _upright(image, name) if isinstance(image, ImageFile.ImageFile) else image
    levels = np.empty(0)
    if hasattr(image, "__array__"):
        levels = np.asarray(image.detach().cpu() if hasattr(image, "detach") else image)
    if levels.dtype == bool:
        levels = levels * np.uint8(255)
    depths = {2: (np.uint8, np.uint16), 3: (np.uint8,)}  # by axes
    colors = levels.shape[2:] in ((), (3,), (4,))
    if not (levels.size and colors and levels.dtype in depths.get(levels.ndim, ())):
        raise UserError(
            f"{name}: must be an image of Pillow, the path of a file, or an array of uint8, "
            "(height, width, 3), (height, width, 4) or (height, width) "
            f"(got {shown(image)}).{' Open it with PIL.Image.open.' * hasattr(image, 'read')}"
        )
    return Image.fromarray(np.ascontiguousarray(levels))


@contextmanager
def open_image(path: Path) -> Iterator[Image.Image]:
    """Open an image file. Any error of Pillow, also while the file is read, becomes a UserError."""
    require_plain_file(path, "an image file")
    _allow_large_texts()
    with _errors_of_pillow(str(path)):
        if not path.stat().st_size:
            raise UserError(f"{path}: is empty (0 bytes). Get it again.")
        with Image.open(path, formats=FORMATS) as image:
            yield image


def _allow_large_texts() -> None:
    """Let Pillow read PNGs with a color profile or a compressed text of more than 1 MB."""
    from PIL import PngImagePlugin  # imported here, as Pillow itself does

    PngImagePlugin.MAX_TEXT_CHUNK = max(MAX_TEXT, PngImagePlugin.MAX_TEXT_CHUNK)
    PngImagePlugin.MAX_TEXT_MEMORY = max(MAX_TEXT, PngImagePlugin.MAX_TEXT_MEMORY)


@contextmanager
def _errors_of_pillow(name: str) -> Iterator[None]:
    """Turn any error while Pillow reads the image `name` into a UserError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            yield
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = f"{(Image.MAX_IMAGE_PIXELS or 0) / 1e6:.0f} megapixels"
        raise UserError(f"{name}: has more than {most}. Scale it down.") from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{name}: is not an image of a supported format, or is damaged. "
            "Save it as PNG, JPEG or WebP."
        ) from None
    except Exception as error:  # on a damaged file Pillow's readers may fail in any way
        if isinstance(error, OSError) and error.strerror:
            raise UserError(
                f"{name}: cannot be read ({error.strerror}). Check its name and permissions."
            ) from None
        if "MAX_TEXT" in str(error):
            raise UserError(
                f"{name}: has texts or a color profile of more than {MAX_TEXT / 1e6:.0f} MB. Save "
                "it again without them."
            ) from None
        raise UserError(
            f"{name}: is damaged ({error!s:.120}). Get it again, or save it again as PNG."
        ) from None


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Scale to 8 bits a channel by the range of the mode; Pillow's conversion clips at 255."""
    if image.mode == "LAB":
        raise UserError(f"{name}: the LAB color space is not supported. Save it as RGB.")
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        return image
    values: np.ndarray = np.asarray(image)
    top = 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN, too, fails this
        raise UserError(
            f"{name}: has values from {values.min():g} to {values.max():g} (expected 0 to {top}). "
            "Scale them, or save it as an 8-bit or 16-bit PNG."
        )
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _profile(image: Image.Image) -> str:
    """Return the name of the color profile; "" for none, or for one that cannot be read."""
    if not (data := image.info.get("icc_profile")):
        return ""
    try:
        from PIL import ImageCms  # imported here: few images have a profile

        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (ImportError, OSError):  # Pillow without LittleCMS
        return ""
    except ImageCms.PyCMSError:  # a damaged profile
        return ""


def _is_transparent(image: Image.Image) -> bool:
    if not image.has_transparency_data:
        return False
    alpha = np.asarray(image.convert("RGBA").getchannel("A"))
    return bool(alpha.min() < 255)


# ------------------------------------------------------------------------------ sizes


def check_reference(image: Image.Image, name: str = "the reference image") -> None:
    """Raise UserError for sides below 64 pixels or a shape beyond 8:1, which FLUX.2 refuses."""
    width, height = image.size
    if min(width, height) < 64:
        raise UserError(
            f"{name} is {width}x{height}: both sides must be at least 64 pixels. Use a larger one."
        )
    if max(width, height) > 8 * min(width, height):
        raise UserError(
            f"{name} is {width}x{height}: one side may be at most 8 times the other. Crop it."
        )


def fit_reference(image: Image.Image, limit: int) -> Image.Image:
    """Scale a FLUX.2 reference down to at most `limit` pixels; crop the center to multiples of 16.

    BFL's limit is 2024² for one reference and 1024² for each of several; diffusers' is 1024².
    """
    width, height = image.size
    if width * height > limit:
        scale = math.sqrt(limit / (width * height))
        size = int(width * scale), int(height * scale)
        image = image.resize(size, Image.Resampling.LANCZOS)
    width, height = image.width // 16 * 16, image.height // 16 * 16
    left, top = (image.width - width) // 2, (image.height - height) // 2
    return image.crop((left, top, left + width, top + height))


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """Return the size of `KONTEXT_SIZES` of nearest shape; of two equally near, the narrower."""
    return min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[0] / size[1]), size))


def round_to_16(
    size: tuple[float, float], rounding: Callable[[float], int] = round
) -> tuple[int, int]:
    """Round width and height to multiples of 16, to 64 at least."""
    width, height = size
    return max(64, 16 * rounding(width / 16)), max(64, 16 * rounding(height / 16))


def pad_to_16(image: Image.Image) -> Image.Image:
    """Repeat the last column and row of an image or mask up to multiples of 16."""
    values = np.asarray(image)  # (H, W, 3), or (H, W) of a mask
    padding = [(0, -image.height % 16), (0, -image.width % 16), (0, 0)][: values.ndim]
    return Image.fromarray(np.pad(values, padding, "edge"))


# ------------------------------------------------------------------------------ masks


def outpaint_canvas(
    image: Image.Image, left: int, top: int, right: int, bottom: int
) -> tuple[Image.Image, Image.Image]:
    """Return the image on a larger canvas, its edges repeated, and the mask of what is new."""
    margins = f"outpaint: margins of {left}, {top}, {right}, {bottom} (left, top, right, bottom)"
    if min(left, top, right, bottom) < 0 or not (left or top or right or bottom):
        raise UserError(f"{margins} must be numbers of pixels from 0, at least one above 0.")
    width, height = image.width + left + right, image.height + top + bottom
    if width * height > MAX_PIXELS:
        raise UserError(
            f"{margins} make a canvas of {width}x{height}, {width * height / 1e6:.0f} megapixels "
            f"(at most {MAX_PIXELS / 1e6:.1f}). Use smaller margins."
        )
    padding = [(top, bottom), (left, right), (0, 0)]
    canvas = Image.fromarray(np.pad(np.asarray(image), padding, "edge"))
    mask = Image.new("L", (width, height), 255)
    mask.paste(0, (left, top, left + image.width, top + image.height))
    return canvas, mask


def match_mask_size(image: Image.Image, mask: Image.Image) -> Image.Image:
    """Resize the mask to the image's size; UserError for another shape, or an all black mask."""
    (width, height), (mask_width, mask_height) = image.size, mask.size
    if mask.size != image.size:
        sizes = f"the mask of {mask_width}x{mask_height} for an image of {width}x{height}"
        # of equal shape: one is the other scaled, each side to within a pixel
        difference = abs(mask_width * height - mask_height * width)
        if difference > max(width, height, mask_width, mask_height):
            raise UserError(f"mask: {sizes} has another shape. Make the mask from the image.")
        warnings.warn(f"{sizes} was resized", stacklevel=2)
        mask = mask.resize(image.size, Image.Resampling.BILINEAR)  # LANCZOS overshoots at edges
    require_nonempty_mask(mask)
    if mask.getextrema()[0] == 255:
        warnings.warn("the mask is all white: nothing of the image is kept", stacklevel=2)
    return mask


def require_nonempty_mask(mask: Image.Image, name: str = "mask") -> None:
    """Raise UserError for a mask that is all black."""
    if mask.getextrema()[1] == 0:
        raise UserError(
            f"{name}: is all black, so that nothing would change. Paint white what may change."
        )


def binarize_mask(mask: Image.Image, threshold: float) -> Image.Image:
    """Make levels from `threshold` in (0, 1] white and others black; UserError if none is white."""
    binary = mask.point(lambda level: 255 * (level >= threshold * 255))
    if binary.getextrema()[1] == 0:
        raise UserError(
            f"mask: is too dark, so that nothing would change (its lightest gray is "
            f"{mask.getextrema()[1]} of 255). Paint white what may change."
        )
    return binary


def composite(
    result: Image.Image, original: Image.Image, mask: Image.Image, feather: int = 4
) -> Image.Image:
    """Blend: `result` where the mask is white, `original`, byte for byte, where it is black.

    The seam runs over up to `feather` pixels inside the mask. Where the mask is narrow, the seam is
    narrower: the middle is always `result`.
    """
    depth = np.zeros((mask.height, mask.width), np.uint8)  # how deep inside, up to feather + 1
    eroded = mask.point(lambda level: 255 * (level > 0))
    for _ in range(feather + 1):
        depth += np.asarray(eroded) > 0
        eroded = eroded.filter(ImageFilter.MinFilter(3))
    deepest_nearby = np.asarray(
        Image.fromarray(depth).filter(ImageFilter.MaxFilter(2 * feather + 1))
    )
    weight = np.asarray(mask, np.float32) / 255 * depth / np.maximum(deepest_nearby, 1)
    weight = weight[..., None]  # (H, W, 1), exactly 0 and 1 at its ends
    blend = np.asarray(original) * (1 - weight) + np.asarray(result) * weight
    return Image.fromarray(np.rint(blend).astype(np.uint8))
