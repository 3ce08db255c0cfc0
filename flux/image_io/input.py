"""ImageInputs as input: read from any file or refused with a reason, then brought to the sizes that the models take.

A picture is 8-bit RGB from here on, and a mask 8-bit grey ("L"), in which white is what to change.
"""

import io
import math
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter, ImageOps

from flux.errors import UserError

# Not all that Pillow knows: EPS and WMF would start other programs
FORMATS = (
    "PNG",
    "JPEG",
    "WEBP",
    "AVIF",
    "JPEG2000",
    "TIFF",
    "BMP",
    "DIB",
    "GIF",
    "PPM",
    "TGA",
    "QOI",
)
MAX_PIXELS = 2**24  # of a canvas

# (width, height), what FLUX.1 Kontext was trained on; black-forest-labs/flux, src/flux/util.py, PREFERED_KONTEXT_RESOLUTIONS
KONTEXT_SIZES = [
    (672, 1568),
    (688, 1504),
    (720, 1456),
    (752, 1392),
    (800, 1328),
    (832, 1248),
    (880, 1184),
    (944, 1104),
    (1024, 1024),
    (1104, 944),
    (1184, 880),
    (1248, 832),
    (1328, 800),
    (1392, 752),
    (1456, 720),
    (1504, 688),
    (1568, 672),
]

# ---------------------------------------------------------------------------------------------------------- reading


def read_picture(path: str | Path) -> Image.Image:
    """A file -> an upright RGB picture. UserError if it is none, has several frames, or too many pixels."""
    return as_picture(_open(Path(path)), str(path))


def read_mask(path: str | Path) -> Image.Image:
    """A file -> a mask, "L", white where to change. UserError as for a picture, and for colours or transparency."""
    return as_mask(_open(Path(path)), str(path))


def as_picture(image: Image.Image, name: str = "the picture") -> Image.Image:
    """Any picture of Pillow's -> RGB. What is transparent is put on white, as browsers show it."""
    profile = _profile(image)
    image = _eight_bit(image, name)
    if profile and image.mode != "CMYK" and "srgb" not in profile.lower():
        warnings.warn(
            f"{name} has the colour profile {profile!r:.60}, which is not applied: colours may be off; save it in "
            "sRGB to have them kept",
            stacklevel=3,
        )
    if image.mode == "CMYK":
        warnings.warn(
            f"{name} is CMYK and was made RGB without its colour profile; colours may be off",
            stacklevel=3,
        )
    if _is_transparent(image):
        warnings.warn(f"{name} has transparent parts, which were put on white", stacklevel=3)
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image.convert("RGBA"))
    return image.convert("RGB")


def as_mask(image: Image.Image, name: str = "the mask") -> Image.Image:
    """Any picture of Pillow's, if it is grey and opaque -> "L"."""
    image = _eight_bit(image, name)
    if _is_transparent(image):  # some programs mean by it what to change, and some what to keep
        raise UserError(
            f"{name} has transparent parts, which a mask may not: save it opaque, white where to change"
        )
    rgb = image.convert("RGB")
    if is_coloured(rgb):
        raise UserError(
            f"{name} has colours, which a mask may not: paint it black and white, white where to change"
        )
    return rgb.convert("L")


def is_coloured(picture: Image.Image) -> bool:
    """Whether an RGB picture is more than grey."""
    levels = np.asarray(picture)  # (H, W, 3)
    return bool(
        (levels.max(axis=2) - levels.min(axis=2)).max() > 64
    )  # JPEG tints greys, but never so much


def _open(path: Path) -> Image.Image:
    """The picture in a file, whole and upright."""
    try:
        if not path.is_file():
            what = (
                "is a folder"
                if path.is_dir()
                else "is not a plain file"
                if path.exists()
                else "does not exist"
            )
            raise UserError(f"{path} {what}: name a picture file")
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            with Image.open(path, formats=FORMATS) as image:
                frames = getattr(image, "n_frames", 1)
                if (
                    frames > 1 and image.format != "MPO"
                ):  # a photo, with a preview or a gain map as its second frame
                    raise UserError(
                        f"{path} holds {frames} pictures: save the one that you mean as a PNG"
                    )
                return ImageOps.exif_transpose(image)
    except UserError:
        raise
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        most = f"{Image.MAX_IMAGE_PIXELS / 1e6:.0f} megapixels"
        raise UserError(f"{path} has more than {most}: scale it down") from None
    except Image.UnidentifiedImageError:
        raise UserError(
            f"{path} is not a picture of a kind that can be read: save it as PNG, JPEG or WebP"
        ) from None
    except Exception as error:  # on a damaged file Pillow's readers may fail in any way
        if isinstance(error, OSError) and error.strerror:
            raise UserError(
                f"{path} cannot be read ({error.strerror}): check its name and its rights"
            ) from None
        raise UserError(
            f"{path} is damaged ({error}): get it again, or save it anew as PNG"
        ) from None


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """To 8 bits a channel, by the range that the mode stands for: Pillow's own conversion cuts off at 255."""
    if image.mode not in ("I", "F") and not image.mode.startswith("I;16"):
        if image.mode == "LAB":
            raise UserError(f"{name} is in the LAB colour space, which is not read: save it as RGB")
        return image
    values, top = np.asarray(image), 1 if image.mode == "F" else 65535
    if not (values.min() >= 0 and values.max() <= top):  # NaN, too, fails this
        spread = f"values from {values.min():g} to {values.max():g}, where 0 to {top} is understood"
        raise UserError(f"{name} has {spread}: scale them, or save it as an 8-bit or 16-bit PNG")
    return Image.fromarray(np.rint(values * (255 / top)).astype(np.uint8))


def _profile(image: Image.Image) -> str:
    """The name of its colour profile, if it has one."""
    if not (data := image.info.get("icc_profile")):
        return ""
    from PIL import ImageCms  # not above: few pictures have one

    try:
        return ImageCms.getProfileDescription(ImageCms.ImageCmsProfile(io.BytesIO(data))).strip()
    except (
        ImportError,
        OSError,
        ImageCms.PyCMSError,
    ):  # a Pillow without it, or a damaged profile: as if there were none
        return ""


def _is_transparent(image: Image.Image) -> bool:
    return image.has_transparency_data and image.convert("RGBA").getextrema()[3][0] < 255


# ---------------------------------------------------------------------------------------------------------- sizes


def check_reference(picture: Image.Image, name: str = "the reference picture") -> None:
    """FLUX.2 takes references with sides of at least 64 pixels, in shapes up to 8:1."""
    width, height = picture.size
    if min(width, height) < 64:
        raise UserError(
            f"{name} is {width}x{height}: both sides must be at least 64 pixels; give a larger one"
        )
    if max(width, height) > 8 * min(width, height):
        raise UserError(
            f"{name} is {width}x{height}: one side may be at most 8 times the other; crop it"
        )


def fit_reference(picture: Image.Image, limit: int) -> Image.Image:
    """A FLUX.2 reference, scaled down to at most `limit` pixels, then cropped about its centre to multiples of 16.

    Black Forest Labs' limit is 2024² for one reference and 1024² for each of several; diffusers' is 1024² for any.
    """
    width, height = picture.size
    if width * height > limit:
        scale = math.sqrt(limit / (width * height))
        picture = picture.resize(
            (int(width * scale), int(height * scale)), Image.Resampling.LANCZOS
        )
    width, height = picture.width // 16 * 16, picture.height // 16 * 16
    left, top = (picture.width - width) // 2, (picture.height - height) // 2
    return picture.crop((left, top, left + width, top + height))


def preferred_size(width: int, height: int) -> tuple[int, int]:
    """The size of nearest shape among those that FLUX.1 Kontext was trained on; of two as near, the narrower."""
    return min(KONTEXT_SIZES, key=lambda size: (abs(width / height - size[0] / size[1]), size))


def round_to_16(
    size: tuple[float, float], rounding: Callable[[float], int] = round
) -> tuple[int, int]:
    """Width and height -> multiples of 16, of which the smallest is 64."""
    width, height = (max(64, 16 * rounding(side / 16)) for side in size)
    return width, height


def pad_to_16(picture: Image.Image) -> Image.Image:
    """A picture or mask whose last column and row are repeated up to multiples of 16; cropping at (0, 0) undoes it."""
    values = np.asarray(picture)  # (H, W, 3), or of a mask (H, W)
    more = [(0, -picture.height % 16), (0, -picture.width % 16)] + [(0, 0)] * (values.ndim - 2)
    return Image.fromarray(np.pad(values, more, "edge"))


# ---------------------------------------------------------------------------------------------------------- masks


def expand(
    picture: Image.Image, left: int, top: int, right: int, bottom: int
) -> tuple[Image.Image, Image.Image]:
    """Outpainting: the picture, its edges drawn out over a larger canvas, and the mask of what is new there."""
    margins = f"margins of {left}, {top}, {right}, {bottom} (left, top, right, bottom)"
    if min(left, top, right, bottom) < 0 or not (left or top or right or bottom):
        raise UserError(f"{margins}: give numbers of pixels from 0, of which one at least is not 0")
    size = picture.width + left + right, picture.height + top + bottom
    if size[0] * size[1] > MAX_PIXELS:
        made = f"{size[0]}x{size[1]}, which is {size[0] * size[1] / 1e6:.0f} megapixels"
        raise UserError(
            f"{margins} make the picture {made}, and at most {MAX_PIXELS / 1e6:.1f} are possible: give smaller ones"
        )
    margin = (top, bottom), (left, right), (0, 0)
    canvas, mask = (
        Image.fromarray(np.pad(np.asarray(picture), margin, "edge")),
        Image.new("L", size, 255),
    )
    mask.paste(0, (left, top, left + picture.width, top + picture.height))
    return canvas, mask


def reconcile(picture: Image.Image, mask: Image.Image) -> Image.Image:
    """The mask in the picture's size. UserError if it has another shape, or marks nothing."""
    (width, height), (mask_width, mask_height) = picture.size, mask.size
    if mask.size != picture.size:
        sizes = f"the mask is {mask_width}x{mask_height} and the picture {width}x{height}"
        # one may be the other scaled, each side to within a pixel
        if abs(mask_width * height - mask_height * width) > max(
            width, height, mask_width, mask_height
        ):
            raise UserError(
                f"{sizes}, which is another shape: make the mask from the picture, in its size"
            )
        warnings.warn(f"{sizes}: the mask was resized", stacklevel=2)
        mask = mask.resize(
            picture.size, Image.Resampling.BILINEAR
        )  # LANCZOS would overshoot at edges
    check_mask(mask)
    if mask.getextrema()[0] == 255:
        warnings.warn("the mask is white all over: nothing of the picture is kept", stacklevel=2)
    return mask


def check_mask(mask: Image.Image, name: str = "the mask") -> None:
    if mask.getextrema()[1] == 0:
        raise UserError(
            f"{name} is black all over, so that nothing would change: paint white what is to change"
        )


def harden(mask: Image.Image, threshold: float) -> Image.Image:
    """White from `threshold` on, in (0, 1], and else black. UserError if nothing is left white."""
    hard = mask.point(lambda level: 255 * (level >= threshold * 255))
    if hard.getextrema()[1] == 0:
        lightest = f"its lightest grey is {mask.getextrema()[1]} of 255"
        raise UserError(
            f"the mask is dark all over ({lightest}), so that nothing would change: paint white what is to change"
        )
    return hard


def composite(
    result: Image.Image, original: Image.Image, mask: Image.Image, feather: int = 4
) -> Image.Image:
    """The result where the mask is white, the original, byte for byte, where it is black, and a blend where it is grey.

    The seam is blended over up to `feather` pixels inside the mask, fewer where the mask is narrow, so that its middle is
    wholly the result's.
    """
    depth, eroded = (
        np.zeros((mask.height, mask.width), np.uint8),
        mask.point(lambda level: 255 * (level > 0)),
    )
    for _ in range(feather + 1):  # how far inside a pixel lies, counted up to feather + 1
        depth, eroded = depth + (np.asarray(eroded) > 0), eroded.filter(ImageFilter.MinFilter(3))
    deepest = np.asarray(
        Image.fromarray(depth).filter(ImageFilter.MaxFilter(2 * feather + 1))
    )  # nearby
    weight = np.asarray(mask, np.float32) / 255 * depth / np.maximum(deepest, 1)
    weight = weight[..., None]  # (H, W, 1), exactly 0 and 1 at its ends
    blend = np.asarray(original) * (1 - weight) + np.asarray(result) * weight
    return Image.fromarray(np.rint(blend).astype(np.uint8))
