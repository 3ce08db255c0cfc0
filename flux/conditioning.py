"""What pictures add to a generation: image tokens, channels, text tokens, or a place to start from.

    references   tokens beside the image tokens, told apart by their coordinates      (Kontext, FLUX.2)
    channels     beside the noisy latents' own, in every image token                  (Fill, Canny, Depth)
    text         tokens after the prompt's                                            (Redux)
    start, mask  latents that noise is mixed into; where the picture may change       (image to image, inpainting)

There are no other ways. What a model does with a picture is one word of its row in the table: `USES` below.
"""

import math
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import sampling
from flux.autoencoder import pack
from flux.configs import MODELS, ModelSpec
from flux.errors import UserError
from flux.image_io import control
from flux.image_io import input as inputs
from flux.image_io.output import to_images, to_mask, to_pixels


@dataclass(frozen=True)
class ImageInputs:
    """ImageInputs, and what is to be done with them; what concerns another kind of model is refused."""

    images: tuple[Image.Image, ...]
    mask: Image.Image | None = None  # "L"; white is what may change
    strength: float | None = (
        None  # image to image and inpainting: the share of the steps that is run
    )
    expand: tuple[int, int, int, int] | None = (
        None  # Fill: pixels of new canvas at the left, top, right, bottom
    )
    mask_threshold: float | None = None  # Fill: makes a soft mask hard; else it stays as it is
    composite: bool = True  # what the mask leaves alone is the input's own pixels
    photo: bool = (
        False  # Canny, Depth: the picture is a photo, and what controls is yet to be made from it
    )
    weights: tuple[float, ...] | None = None  # Redux: of each picture; they share 1 by default
    match: int | None = None  # references: make a picture of the size of the k-th, counted from 1
    keep_size: bool = False  # Kontext: the references' own sizes, not the nearest of the preferred
    limit: int | None = None  # FLUX.2: side of the square that a reference's pixels must not exceed
    cached: bool | None = (
        None  # FLUX.2: references computed once; an approximation but for the model trained so
    )


@dataclass(frozen=True)
class Conditions:
    """ImageInputs as the sampler takes them, for a picture of `height` x `width` pixels; tensors float32, of batch 1 or B."""

    height: int
    width: int
    references: Tensor | None = None  # (1, R, C)
    reference_ids: Tensor | None = None  # (R, axes)
    cached: bool = False
    channels: Tensor | None = None  # (1, L, C')
    text: Tensor | None = None  # (1, T', D)
    start: Tensor | None = None  # (1, C, h, w)
    mask: Tensor | None = None  # (1, 1 | C, h, w), 1 where the picture may change
    strength: float = 1.0
    control: Image.Image | None = None  # what controls, to look at
    original: tuple[Image.Image, Image.Image] | None = None  # picture and mask, for the composite
    size: tuple[int, int] | None = (
        None  # width, height to which the result is cropped, where the input was padded
    )

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Those that differ from picture to picture."""
        named = {
            name: getattr(self, name)
            for name in ("references", "channels", "text", "start", "mask")
        }
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    @property
    def likeness(self) -> tuple:
        """Equal for conditions that can be sampled in one batch."""
        ids = None if self.reference_ids is None else tuple(self.reference_ids.flatten().tolist())
        shapes = tuple((name, tensor.shape) for name, tensor in self.tensors.items())
        return self.height, self.width, ids, shapes, self.cached, self.strength


def joined(conditions: Sequence[Conditions]) -> Conditions:
    """Conditions of equal likeness -> one, for a batch."""
    first = conditions[0]
    if all(each is first for each in conditions):
        return first
    return replace(
        first,
        **{name: torch.cat([each.tensors[name] for each in conditions]) for name in first.tensors},
    )


def reference_tokens(latents: Sequence[Tensor], axes: int) -> tuple[Tensor, Tensor]:
    """Latents (1, C, h, w) of each reference -> tokens (1, R, C) and coordinates (R, axes).

    FLUX.2 (4 axes) tells references apart by their t: 10, 20, ... FLUX.1 Kontext knows one, at t = 1; users put several
    side by side, and so their columns go on here.
    """
    tokens, ids, left = [], [], 0
    for number, x in enumerate(latents, start=1):
        height, width = x.shape[2:]
        tokens.append(rearrange(x, "b c h w -> b (h w) c"))
        ids.append(
            sampling.image_ids(height, width, axes, t=10 * number if axes == 4 else 1, left=left)
        )
        left += 0 if axes == 4 else width
    return torch.cat(tokens, dim=1), torch.cat(ids)


def fill_channels(masked: Tensor, mask: Tensor) -> Tensor:
    """FLUX.1 Fill: latents (1, 64, h, w) of the masked picture, mask (1, 1, 16h, 16w) -> (1, hw, 64 + 256).

    All 16x16 mask values of a token are its channels: first the place within 8x8 pixels, then, as latents, packed 2x2.
    """
    values = pack(rearrange(mask, "b 1 (h y) (w x) -> b (y x) h w", y=8, x=8))  # (1, 256, h, w)
    return rearrange(torch.cat([masked, values], dim=1), "b c h w -> b (h w) c")


def latent_mask(mask: Tensor, channels: int, spatial: bool) -> Tensor:
    """Mask (1, 1, 16h, 16w) of 0 and 1 -> what inpainting blends latents by, (1, 1 | channels, h, w).

    As diffusers' pipelines do: FLUX.1 (`spatial`) takes the pixel nearest to each 8x8 latent and packs; FLUX.2 interpolates
    straight to tokens, which leaves soft edges.
    """
    height, width = mask.shape[2] // 16, mask.shape[3] // 16
    if not spatial:
        return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
    return pack(
        F.interpolate(mask, (2 * height, 2 * width), mode="nearest").expand(
            -1, channels // 4, -1, -1
        )
    )


# ---------------------------------------------------------------- from pictures

USES = {  # what a model does with a picture -> which of the options of `ImageInputs` have a meaning there
    "start": {"mask", "strength"},
    "reference": {"mask", "strength", "match", "keep_size", "limit", "cached"},
    "control": {"photo"},
    "fill": {"mask", "expand", "mask_threshold"},
    "redux": {"weights"},
}
NEEDY = ("fill", "control", "redux")  # without a picture, there is nothing that these could do
FLAGS = {  # as the command line calls them
    "mask": "--mask",
    "strength": "--strength",
    "expand": "--expand",
    "mask_threshold": "--mask-threshold",
    "weights": "--image-weight",
    "match": "--match-image-size",
    "keep_size": "--keep-input-size",
    "limit": "--reference-limit",
    "cached": "--kv-cache",
    "photo": "--photo",
}
MOST = {"reference": 10, "redux": 10}  # pictures at once; else one
DEFAULT_STRENGTH = 0.8  # of BFL's demos


def asked(pictures: ImageInputs) -> list[str]:
    """The options that are not left at their defaults."""
    return [field for field in FLAGS if getattr(pictures, field) != getattr(ImageInputs, field)]


def options_of(spec: ModelSpec) -> set[str]:
    """Those that have a meaning to a model."""
    return USES[spec.image_mode] - ({"limit", "cached"} if spec.flux1 else {"keep_size"})


def check_pictures(spec: ModelSpec, pictures: ImageInputs) -> None:
    """UserError where a model cannot do what is asked for, saying which can."""
    for field in asked(pictures):
        if field not in options_of(spec):
            able = [m.name for m in MODELS.values() if field in options_of(m)]
            raise UserError(
                f"{FLAGS[field]} means nothing to {spec.name}; choose from {', '.join(able)}, or leave it out"
            )
    count, most = len(pictures.images), MOST.get(spec.image_mode, 1)
    if not 1 <= count <= most:
        takes = f"takes {'one --image' if most == 1 else f'1 to {most} times --image'}, not {count}"
        several = ", ".join(m.name for m in MODELS.values() if MOST.get(m.image_mode, 1) > 1)
        raise UserError(
            f"{spec.name} {takes}" + (f"; several are for {several}" if most == 1 else "")
        )
    if spec.image_mode == "fill" and pictures.mask is None and pictures.expand is None:
        raise UserError(
            f"{spec.name} fills in: say where, with --mask FILE (white is what may change) or --expand L,T,R,B"
        )
    if not pictures.composite and pictures.mask is None and pictures.expand is None:
        raise UserError("--no-composite means nothing without --mask or --expand: leave it out")
    if pictures.photo:
        control.check(spec.control)
    if pictures.strength is not None and not 0 < pictures.strength <= 1:
        raise UserError(
            f"--strength {pictures.strength:g}: must be above 0, and at most 1, which keeps nothing of the picture"
        )
    if pictures.mask_threshold is not None and not 0 < pictures.mask_threshold <= 1:
        raise UserError(
            f"--mask-threshold {pictures.mask_threshold:g}: must be above 0 and at most 1"
        )
    if pictures.weights is not None and len(pictures.weights) != count:
        raise UserError(
            f"--image-weight is given {len(pictures.weights)} times, for {count} pictures: once for each"
        )
    if not all(map(math.isfinite, pictures.weights or ())):
        raise UserError("--image-weight must be a finite number")
    if pictures.limit is not None and pictures.limit < 64:
        raise UserError(
            f"--reference-limit {pictures.limit}: references have at least 64x64 pixels; give more"
        )
    if pictures.match is not None and not 1 <= pictures.match <= count:
        raise UserError(
            f"--match-image-size {pictures.match}: there are {count} pictures, counted from 1"
        )
    if pictures.cached is not None and pictures.cached != spec.kv_cached_references:
        flag = "--kv-cache" if pictures.cached else "--no-kv-cache"
        warnings.warn(
            f"{spec.name} was not trained with {flag}: what it makes is an approximation",
            stacklevel=3,
        )
    for number, image in enumerate(pictures.images, start=1):
        inputs.check_reference(image, f"--image {number}")


def size_of(
    spec: ModelSpec, pictures: ImageInputs | None, width: int | None, height: int | None
) -> tuple[int, int]:
    """Width and height to make where they are not given: the model's own, or what the pictures ask for.

    Without --match-image-size, pictures ask for twice the pixels that are the model's own at most: it has seen no more.
    """
    if pictures is None or spec.image_mode == "redux" or None not in (width, height):
        return spec.size if width is None else width, spec.size if height is None else height
    if pictures.match:
        own = inputs.round_to_16(pictures.images[pictures.match - 1].size, math.floor)
    elif begins(spec, pictures):
        own = inputs.round_to_16(
            canvas(pictures)[0].size, math.ceil
        )  # padded, and cropped in the end
    elif spec.image_mode == "control":
        own = inputs.round_to_16(pictures.images[0].size)
    elif spec.flux1:
        own = fitted(spec, pictures)[0].size
    else:
        own = inputs.fit_reference(
            pictures.images[0], min(pictures.limit or spec.size, spec.size) ** 2
        ).size
    most = 2 * spec.size**2
    if own[0] * own[1] > most and not pictures.match:
        scale = math.sqrt(most / (own[0] * own[1]))
        own, asked_for = inputs.round_to_16((own[0] * scale, own[1] * scale), math.floor), own
        if width is None and height is None:
            shown = "{}x{} would be large for {}: {}x{} is made, unless --width and --height say otherwise"
            warnings.warn(shown.format(*asked_for, spec.name, *own), stacklevel=2)
    if width is None and height is None:
        return own
    scale = (
        height / own[1] if width is None else width / own[0]
    )  # one side is given: the other follows from the shape
    follows = inputs.round_to_16((own[0] * scale, own[1] * scale))
    return (follows[0], height) if width is None else (width, follows[1])


def begins(spec: ModelSpec, pictures: ImageInputs) -> bool:
    """Whether the first picture is what is changed: filled in, painted over, or begun from."""
    return (
        spec.image_mode in ("start", "fill")
        or pictures.mask is not None
        or pictures.strength is not None
    )


def canvas(pictures: ImageInputs) -> tuple[Image.Image, Image.Image | None]:
    """The picture to change and its mask, of one size, expanded if that is asked for."""
    picture, mask = pictures.images[0], pictures.mask
    if mask is not None:
        mask = inputs.reconcile(picture, mask)
    if pictures.expand is None:
        return picture, mask
    wider, border = inputs.expand(picture, *pictures.expand)
    if mask is not None:
        border.paste(mask, pictures.expand[:2])
    return wider, border


def fitted(spec: ModelSpec, pictures: ImageInputs) -> list[Image.Image]:
    """References, at the sizes in which their families take them."""
    if spec.flux1:
        sized = [
            (p, p.size if pictures.keep_size else inputs.preferred_size(*p.size))
            for p in pictures.images
        ]
        return [
            p.resize([side // 16 * 16 for side in size], Image.Resampling.LANCZOS)
            for p, size in sized
        ]
    usual = 2024 if len(pictures.images) == 1 else 1024  # as BFL; diffusers: always 1024
    limit = pictures.limit or (spec.size if spec.embedded else usual)
    return [inputs.fit_reference(p, limit**2) for p in pictures.images]


Encode = Callable[[Tensor], Tensor]  # pixels (1, 3, H, W) -> latents (1, C, H/16, W/16), float32


def condition(
    spec: ModelSpec,
    pictures: ImageInputs,
    width: int,
    height: int,
    encode: Encode,
    embed: Callable[[Image.Image], Tensor],
) -> Conditions:
    """ImageInputs -> what the sampler takes. `embed` gives a picture's text tokens (1, T, D), for Redux."""
    whole = Conditions(height, width)
    if spec.image_mode == "redux":
        weights = pictures.weights or [1 / len(pictures.images)] * len(pictures.images)
        return replace(
            whole,
            text=sum(w * embed(image) for w, image in zip(weights, pictures.images, strict=True)),
        )
    if spec.image_mode == "control":
        if not pictures.photo and inputs.is_coloured(pictures.images[0]):
            usual = (
                "white edges on black"
                if spec.control == "canny"
                else "greys, the nearest the brightest"
            )
            warnings.warn(
                f"the picture has colours, and {spec.name} knows {usual}: is it a photo? Add --photo",
                stacklevel=3,
            )
        picture = pictures.images[0].resize(
            (width, height), Image.Resampling.LANCZOS
        )  # whatever its shape was, as BFL does
        pixels = control_pixels(spec.control, picture) if pictures.photo else to_pixels(picture)
        channels = rearrange(encode(pixels), "b c h w -> b (h w) c")
        return replace(whole, channels=channels, control=to_images(pixels)[0])
    if not begins(spec, pictures):
        return replace(
            whole,
            **references(spec, pictures, [encode(to_pixels(p)) for p in fitted(spec, pictures)]),
        )

    picture, mask = canvas(pictures)
    size = picture.size
    if (width, height) == inputs.round_to_16(size, math.ceil):
        fit = inputs.pad_to_16  # nothing is resampled, and the padding is cropped off again
    else:

        def fit(p):
            return p.resize((width, height), Image.Resampling.LANCZOS)

        if abs(width - height * size[0] / size[1]) > 16:
            warnings.warn(
                f"the picture is {size[0]}x{size[1]}, and stretched to {width}x{height}: leave --width or --height "
                "out to keep its shape",
                stacklevel=3,
            )
        picture, mask, size = fit(picture), mask and fit(mask), (width, height)
    threshold = (
        pictures.mask_threshold if spec.image_mode == "fill" else 0.5
    )  # elsewhere a place changes, or does not
    mask = inputs.harden(mask, threshold) if mask and threshold else mask
    original = (picture, mask) if mask and pictures.composite else None
    whole = replace(
        whole, size=size, original=original, strength=pictures.strength or DEFAULT_STRENGTH
    )
    pixels = to_pixels(fit(picture))  # (1, 3, H, W)

    if spec.image_mode == "fill":
        changes = to_mask(fit(mask))  # (1, 1, H, W)
        return replace(
            whole, strength=1.0, channels=fill_channels(encode(pixels * (1 - changes)), changes)
        )
    start = encode(pixels)
    if mask:
        whole = replace(whole, mask=latent_mask(to_mask(fit(mask)), start.shape[1], spec.flux1))
        if not whole.mask.any():
            raise UserError(
                "the mask's white parts are so thin that they fall between latents, of which there is one for 8 or "
                "16 pixels: paint them wider"
            )
    if spec.image_mode == "reference":  # such a model looks at what it changes, too
        others = replace(
            pictures, images=pictures.images[1:], limit=pictures.limit or min(spec.size, 1024)
        )
        latents = [start] + [encode(to_pixels(p)) for p in fitted(spec, others)]
        whole = replace(whole, **references(spec, pictures, latents))
    return replace(whole, start=start)


def control_pixels(kind: str, photo: Image.Image) -> Tensor:
    return control.depth(photo) if kind == "depth" else to_pixels(control.canny(photo))


def references(spec: ModelSpec, pictures: ImageInputs, latents: Sequence[Tensor]) -> dict:
    tokens, ids = reference_tokens(latents, len(spec.transformer.axes_dim))
    return dict(
        references=tokens,
        reference_ids=ids,
        cached=spec.kv_cached_references if pictures.cached is None else pictures.cached,
    )


def finish(image: Image.Image, conditions: Conditions) -> Image.Image:
    """Without padding, and with the input's own pixels wherever the mask left it alone."""
    if conditions.size:
        image = image.crop((0, 0, *conditions.size))
    return inputs.composite(image, *conditions.original) if conditions.original else image
