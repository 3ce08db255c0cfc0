"""Images as input: the options, which model supports which, the check of a request, and sizes.

`ImageInputs` is what a user passes. `check_images` is the only validation of such a request. The
rest brings the images to the sizes that `flux.conditioning` encodes: an init image with its mask,
or references.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple

from PIL import Image

from flux.arguments import optional, shown, to_flag, to_integer, to_integers, to_number, to_numbers
from flux.configs import MODELS, ModelSpec
from flux.errors import UserError
from flux.image_io import control
from flux.image_io import input as inputs
from flux.image_io.references3 import Box, check_reference3, prepare_references
from flux.sampling import skipped_steps

Size = tuple[int, int]  # width, height


@dataclass(frozen=True)
class ImageInputs:
    """Images and what to do with them. An option that the model does not support is refused.

    A pipeline also takes one image alone, arrays of uint8 (height, width, 3), paths of files, and
    numbers of other libraries: see `convert_values`.
    """

    images: tuple[Image.Image, ...]
    mask: Image.Image | None = None  # mode "L"; white is what may change
    strength: float | None = None  # image to image, inpainting: share of the steps that is run
    outpaint: tuple[int, int, int, int] | None = None  # Fill: new pixels left, top, right, bottom
    mask_threshold: float | None = None  # Fill: binarizes a soft mask; None keeps the mask soft
    composite: bool = True  # put the input's pixels back where the mask is black
    image_weights: tuple[float, ...] | None = None  # Redux: one an image; by default they share 1
    match_image_size: int | None = None  # make the size of the k-th reference, counted from 1
    keep_input_size: bool = False  # Kontext: do not resize to a preferred resolution
    reference_limit: int | None = None  # FLUX.2, FLUX 3: a reference has at most SIDE x SIDE pixels
    kv_cache: bool | None = None  # FLUX.2: compute references once; None: as the model was trained
    preprocess_control: bool = False  # Canny, Depth: the image is a photo: find its edges or depth


class InitImage(NamedTuple):
    """An init image and its mask at the size to encode, and what `postprocess` needs."""

    image: Image.Image
    mask: Image.Image | None
    original: tuple[Image.Image, Image.Image] | None  # image and mask to composite over
    size: Size  # of the output after the padding is cropped off


OPTIONS = tuple(f.name for f in fields(ImageInputs) if f.name not in ("images", "composite"))
SUPPORTED_OPTIONS = {  # image mode of a model -> options that have a meaning there
    "start": {"mask", "strength"},
    "reference": {
        "mask",
        "strength",
        "match_image_size",
        "keep_input_size",
        "reference_limit",
        "kv_cache",
    },
    "control": {"preprocess_control"},
    "fill": {"mask", "outpaint", "mask_threshold"},
    "redux": {"image_weights"},
}
REQUIRES_IMAGE = ("fill", "control", "redux")  # image modes that do nothing without an image
DEFAULT_STRENGTH = 0.8  # as in BFL's demos
MAX_IMAGES = {"reference": 10, "redux": 10}  # by image mode; 1 in the other modes


# ------------------------------------------------------------------------------ which options


def non_default_options(images: ImageInputs) -> list[str]:
    """Return the names of the options that differ from their defaults, without `composite`."""
    return [name for name in OPTIONS if getattr(images, name) != getattr(ImageInputs, name)]


def supported_options(spec: ModelSpec) -> set[str]:
    """Return the names of the options that have a meaning to a model."""
    other_family = {"reference_limit", "kv_cache"} if spec.flux1 else {"keep_input_size"}
    if spec.flux3:
        other_family = {"keep_input_size", "kv_cache"}
    return SUPPORTED_OPTIONS[spec.image_mode] - other_family


def has_init_image(spec: ModelSpec, images: ImageInputs) -> bool:
    """Return whether the first image is what changes: filled, inpainted, or image to image."""
    changes = images.mask is not None or images.strength is not None
    return changes or spec.image_mode in ("start", "fill")


# ------------------------------------------------------------------------------ the values


def convert_values(images: Any) -> ImageInputs:
    """Return `images` with RGB images, an "L" mask and plain numbers; UserError names what fails.

    An image alone stands for `ImageInputs((image,))`.
    """
    if not isinstance(images, ImageInputs):
        images = ImageInputs(images)
    given: Any = images.images
    several = isinstance(given, Sequence | Iterator) or getattr(given, "ndim", 0) == 4
    alone = not several or isinstance(given, str | bytes) or hasattr(given, "read")
    margins = optional(to_integers, "outpaint", images.outpaint)
    if margins is not None and len(margins) != 4:
        raise UserError(
            "outpaint: must be four numbers of pixels, left, top, right and bottom "
            f"(got {shown(images.outpaint)})."
        )
    weights = optional(to_numbers, "image_weights", images.image_weights)
    return ImageInputs(
        tuple(map(inputs.as_image, [given] if alone else given)),
        None if images.mask is None else inputs.as_mask(images.mask),
        strength=optional(to_number, "strength", images.strength),
        outpaint=None if margins is None else (margins[0], margins[1], margins[2], margins[3]),
        mask_threshold=optional(to_number, "mask_threshold", images.mask_threshold),
        composite=to_flag("composite", images.composite),
        image_weights=None if weights is None else tuple(weights),
        match_image_size=optional(to_integer, "match_image_size", images.match_image_size),
        keep_input_size=to_flag("keep_input_size", images.keep_input_size),
        reference_limit=optional(to_integer, "reference_limit", images.reference_limit),
        kv_cache=optional(to_flag, "kv_cache", images.kv_cache),
        preprocess_control=to_flag("preprocess_control", images.preprocess_control),
    )


# ------------------------------------------------------------------------------ the one check


def check_images(spec: ModelSpec, images: ImageInputs | None) -> None:
    """Raise UserError for image inputs that `spec` cannot use; None is a request without images.

    Images are RGB and the mask is "L" already: see `convert_values`.
    """
    if images is None:
        if spec.image_mode in REQUIRES_IMAGE:
            raise UserError(f"images: {spec.name} needs an image. Pass one.")
        return
    _check_options(spec, images)
    _check_count(spec, len(images.images))
    _check_where(spec, images)
    _check_values(images)
    for number, image in enumerate(images.images, start=1):
        if spec.flux3:
            check_reference3(image, f"images: image {number}", alone=len(images.images) == 1)
        else:
            inputs.check_reference(image, f"images: image {number}")
    if images.preprocess_control:
        control.check(spec.control)
    if has_init_image(spec, images):
        init_image_and_mask(images)  # raises where the mask or the margins do not fit
    _warn(spec, images)


def _check_options(spec: ModelSpec, images: ImageInputs) -> None:
    for name in non_default_options(images):
        if not images.images:
            raise UserError(f"{name}: needs an image. Pass one in `images`.")
        if name not in supported_options(spec):
            able = [model.name for model in MODELS.values() if name in supported_options(model)]
            reason = ""
            if name == "kv_cache" and spec.flux3:
                reason = "No FLUX 3 was trained with it: keys of references change with the time. "
            raise UserError(
                f"{name}: not supported by {spec.name} (only by {', '.join(able)}). {reason}"
                "Leave it out."
            )


def _check_count(spec: ModelSpec, count: int) -> None:
    most = MAX_IMAGES.get(spec.image_mode, 1)
    if 1 <= count <= most:
        return
    if most > 1:
        raise UserError(f"images: {spec.name} takes 1 to {most} images (got {count}).")
    several = [m.name for m in MODELS.values() if MAX_IMAGES.get(m.image_mode, 1) > 1]
    raise UserError(
        f"images: {spec.name} takes one image (got {count}). Several are supported by "
        f"{', '.join(several)}."
    )


def _check_where(spec: ModelSpec, images: ImageInputs) -> None:
    if images.mask is not None or images.outpaint is not None:
        return
    if spec.image_mode == "fill":
        raise UserError(
            f"mask: {spec.name} needs to know where to fill. Pass a mask (white is what may "
            "change), or pass `outpaint` margins."
        )
    if not images.composite:
        raise UserError(
            "composite=False: has no effect without `mask` or `outpaint`. Leave it out."
        )


def _check_values(images: ImageInputs) -> None:
    count, weights = len(images.images), images.image_weights
    for name in ("strength", "mask_threshold"):
        value = getattr(images, name)
        if value is not None and not 0 < value <= 1:  # refuses NaN too
            raise UserError(f"{name}: must be above 0 and at most 1 (got {value:g}).")
    if weights is not None and len(weights) != count:
        raise UserError(
            f"image_weights: {len(weights)} values for {count} images. Pass one for each image."
        )
    if weights is not None and not all(map(math.isfinite, weights)):
        raise UserError("image_weights: must be finite numbers.")
    if images.reference_limit is not None and images.reference_limit < 64:
        raise UserError(
            f"reference_limit: must be at least 64 (got {images.reference_limit}), the smallest "
            "side of a reference."
        )
    if images.match_image_size is not None and not 1 <= images.match_image_size <= count:
        raise UserError(
            f"match_image_size: must be the number of an image, from 1 to {count} "
            f"(got {images.match_image_size})."
        )


def _warn(spec: ModelSpec, images: ImageInputs) -> None:
    if images.kv_cache is not None and images.kv_cache != spec.kv_cached_references:
        warnings.warn(
            f"{spec.name} was not trained with `kv_cache={images.kv_cache}`: the result is an "
            "approximation",
            stacklevel=4,
        )
    is_photo = spec.image_mode == "control" and inputs.is_color(images.images[0])
    if is_photo and not images.preprocess_control:
        usual = "white edges on black" if spec.control == "canny" else "gray, the nearest brightest"
        warnings.warn(
            f"the image has colors, but the control images of {spec.name} are {usual}: if the "
            "image is a photo, add `preprocess_control`",
            stacklevel=4,
        )


# ------------------------------------------------------------------------------ strength


def start_strength(
    strength: float | None, steps: int, rounding: Literal["rounded", "bfl"] = "rounded"
) -> float:
    """Return the share of the steps to run: by default 0.8, or less where 0.8 would run all steps.

    Warn if all steps are run at a strength below 1: the run then starts from noise alone.
    `rounding`: as in `flux.sampling.skipped_steps`.
    """
    able = (k / 1000 for k in range(999, 0, -1) if skipped_steps(steps, k / 1000, rounding))
    largest = next(able, 0.0)  # that skips a step
    if strength is None:
        strength = min(DEFAULT_STRENGTH, largest or DEFAULT_STRENGTH)
    if strength < 1 and not skipped_steps(steps, strength, rounding):
        fix = f"use {largest:g} or less" if largest else "use 2 steps or more"
        warnings.warn(
            f"`strength={strength:g}` runs {'all ' * (steps > 1)}{steps} step{'s' * (steps > 1)} "
            f"from noise alone: what changes keeps nothing of the image; {fix}",
            stacklevel=3,
        )
    return strength


# ------------------------------------------------------------------------------ sizes


def output_size(
    spec: ModelSpec, images: ImageInputs | None, width: int | None, height: int | None
) -> Size:
    """Return width and height of the output; a side of None follows from the images or the model.

    The images' size is capped at twice the model's default size, except with `match_image_size`.
    In FLUX 3 it is the first reference's as it is encoded, or is capped at four megapixels.
    """
    if images is None or spec.image_mode == "redux" or None not in (width, height):
        return spec.size if width is None else width, spec.size if height is None else height
    wanted = _size_of_images(spec, images)
    if spec.flux3 and not (images.match_image_size or has_init_image(spec, images)):
        # a canvas has its own bound, and a missing side is the canvas's
        return width or max(wanted[0], 64), height or max(wanted[1], 64)
    most = (4 if spec.flux3 else 2) * spec.size**2
    if wanted[0] * wanted[1] > most and not images.match_image_size:
        scale = math.sqrt(most / (wanted[0] * wanted[1]))
        large = wanted
        wanted = inputs.round_to_16((large[0] * scale, large[1] * scale), math.floor)
        if width is None and height is None:
            warnings.warn(
                f"the image of {large[0]}x{large[1]} is large for {spec.name}: the output is "
                f"{wanted[0]}x{wanted[1]}, unless `width` and `height` say otherwise",
                stacklevel=2,
            )
    if width is not None:  # the other side keeps the image's shape
        scale = width / wanted[0]
        return width, inputs.round_to_16((wanted[0] * scale, wanted[1] * scale))[1]
    if height is not None:
        scale = height / wanted[1]
        return inputs.round_to_16((wanted[0] * scale, wanted[1] * scale))[0], height
    return wanted


def _size_of_images(spec: ModelSpec, images: ImageInputs) -> Size:
    """Return the output size that the images stand for, in multiples of 16, before any cap."""
    if images.match_image_size:
        return inputs.round_to_16(images.images[images.match_image_size - 1].size, math.floor)
    if has_init_image(spec, images):  # padded, and cropped again by `postprocess`
        return inputs.round_to_16(init_image_and_mask(images)[0].size, math.ceil)
    if spec.image_mode == "control":
        return inputs.round_to_16(images.images[0].size)
    if spec.flux1 or spec.flux3:
        return resize_references(spec, images)[0].size
    limit = min(images.reference_limit or spec.size, spec.size)
    return inputs.fit_reference(images.images[0], limit**2).size


# ------------------------------------------------------------------------------ images to encode


def init_image_and_mask(images: ImageInputs) -> tuple[Image.Image, Image.Image | None]:
    """Return the init image and its mask at one size, on the larger canvas of `outpaint`."""
    image, mask = images.images[0], images.mask
    if mask is not None:
        mask = inputs.match_mask_size(image, mask)
    if images.outpaint is None:
        return image, mask
    canvas, new_area = inputs.outpaint_canvas(image, *images.outpaint)
    if mask is not None:
        new_area.paste(mask, images.outpaint[:2])
    return canvas, new_area


def prepare_init_image(spec: ModelSpec, images: ImageInputs, width: int, height: int) -> InitImage:
    """Pad the init image to width x height if that is its size rounded up, else resize it."""
    image, mask = init_image_and_mask(images)
    pad = (width, height) == inputs.round_to_16(image.size, math.ceil)
    if not pad:
        if abs(width - height * image.width / image.height) > 16:
            warnings.warn(
                f"the image of {image.width}x{image.height} is stretched to {width}x{height}: "
                "leave `width` or `height` out to keep its shape",
                stacklevel=4,
            )
        image = image.resize((width, height), Image.Resampling.LANCZOS)
        mask = mask and mask.resize((width, height), Image.Resampling.LANCZOS)
    # Fill takes a soft mask; in inpainting, a place changes or does not
    threshold = images.mask_threshold if spec.image_mode == "fill" else 0.5
    if mask and threshold:
        mask = inputs.binarize_mask(mask, threshold)
    original = (image, mask) if mask and images.composite else None
    size = image.size
    if pad:
        image = inputs.pad_to_16(image)
        mask = mask and inputs.pad_to_16(mask)
    return InitImage(image, mask, original, size)


def resize_references(spec: ModelSpec, images: ImageInputs) -> list[Image.Image]:
    """Return the references at the sizes that their family encodes."""
    if spec.flux1:
        return [_resize_kontext(image, images.keep_input_size) for image in images.images]
    if spec.flux3:
        side = images.reference_limit
        return [image for image, _ in prepare_references(images.images, side and side**2)]
    default = 2024 if len(images.images) == 1 else 1024  # BFL; diffusers: always 1024
    limit = images.reference_limit or (spec.size if spec.embedded else default)
    return [inputs.fit_reference(image, limit**2) for image in images.images]


def _resize_kontext(image: Image.Image, keep_input_size: bool) -> Image.Image:
    width, height = image.size if keep_input_size else inputs.preferred_size(*image.size)
    return image.resize((width // 16 * 16, height // 16 * 16), Image.Resampling.LANCZOS)


def crop_box(spec: ModelSpec, images: ImageInputs) -> Box | None:
    """Return where FLUX 3's only reference lies in the output of its canvas's size."""
    plain = not (images.match_image_size or has_init_image(spec, images))
    if not (spec.flux3 and plain and len(images.images) == 1):
        return None
    side = images.reference_limit
    return prepare_references(images.images, side and side**2)[0].box


def postprocess(image: Image.Image, init: InitImage | None) -> Image.Image:
    """Crop the padding off an output, and put the original pixels back where the mask is black."""
    if init is None:
        return image
    image = image.crop((0, 0, *init.size))
    return inputs.composite(image, *init.original) if init.original else image
