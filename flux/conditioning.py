"""What input images add to a generation, as tensors: three kinds of conditioning, and a start.

channels    (1, L, C')    next to the latents' channels in every image token    Fill, Canny, Depth
references  (1, R, C)     image tokens after the image's, with their ids        Kontext, FLUX.2
text        (1, T', D)    text tokens after the prompt's                        Redux
init        (1, C, h, w)  latents to mix noise into, and a mask of where        image to image,
                          the image may change                                  inpainting

`ModelSpec.image_mode` says which of them a model uses. `flux.image_io.request` has what happens to
the images before they are encoded: sizes and masks.
"""

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import sampling
from flux.arguments import shown
from flux.autoencoder import pack
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io import request
from flux.image_io.control import control_pixels
from flux.image_io.output import to_images, to_mask, to_pixels
from flux.image_io.request import ImageInputs, InitImage
from flux.runtime.checks import check_size

Encode = Callable[[Tensor], Tensor]  # pixels (1, 3, H, W) -> latents (1, C, H/16, W/16), float32
Embed = Callable[[Image.Image], Tensor]  # image -> text tokens (1, T, D): SigLIP and Redux


@dataclass(frozen=True)
class Conditions:
    """Conditioning for an image of `height` x `width` pixels; float32 tensors with batch 1 or B."""

    height: int
    width: int
    references: Tensor | None = None  # (1, R, C)
    reference_ids: Tensor | None = None  # (R, axes)
    kv_cache: bool = False  # compute the references once, not at every step
    channels: Tensor | None = None  # (1, L, C')
    text: Tensor | None = None  # (1, T', D)
    init: Tensor | None = None  # (1, C, h, w)
    mask: Tensor | None = None  # (1, 1 | C, h, w); 1 is where the image may change
    strength: float | None = 1.0  # the share of the steps that is run; None: `start_strength`'s
    control_image: Image.Image | None = None  # what the channels were encoded from, to look at
    init_image: InitImage | None = None  # for `request.postprocess`
    crop: tuple[int, int, int, int] | None = None  # of the output: left, top, right, bottom

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that depend on the images, by field name."""
        names = ("references", "channels", "text", "init", "mask")
        return {name: getattr(self, name) for name in names if getattr(self, name) is not None}

    @property
    def batch_key(self) -> tuple:
        """Return a value that is equal for conditions that can be sampled in one batch."""
        ids = None if self.reference_ids is None else tuple(self.reference_ids.flatten().tolist())
        shapes = tuple((name, tensor.shape) for name, tensor in self.tensors.items())
        return self.height, self.width, ids, shapes, self.kv_cache, self.strength


def collate(conditions: Sequence[Conditions]) -> Conditions:
    """Concatenate conditions of equal `batch_key` into one of batch B."""
    first = conditions[0]
    if all(other is first for other in conditions):
        return first
    batch: dict[str, Any] = {}
    for name in first.tensors:
        batch[name] = torch.cat([each.tensors[name] for each in conditions])
    return replace(first, **batch)


def batches(
    conditions: Sequence[Conditions | None], lengths: Sequence[int], num_images: int
) -> list[list[int]]:
    """Group image numbers whose conditions, and lengths of prompts, can share a batch.

    That is one group, unless prompts have different input images or, in FLUX 3, other lengths.
    """
    groups = defaultdict(list)
    for number in range(len(conditions) * num_images):
        used, length = conditions[number // num_images], lengths[number // num_images]
        groups[used and used.batch_key, length].append(number)
    return list(groups.values())


def text_to_image(spec: ModelSpec, width: int | None, height: int | None) -> Conditions:
    """Return conditions without images, of the requested size or the model's."""
    height = spec.size if height is None else height
    width = spec.size if width is None else width
    return Conditions(*check_size(height, width))


def checked(
    spec: ModelSpec, conditions: Conditions | None, width: int | None, height: int | None
) -> Conditions:
    """Return conditions that `spec` and the requested size fit; UserError if they do not."""
    if conditions is None:
        request.check_images(spec, None)  # some models need an image
        return text_to_image(spec, width, height)
    if not isinstance(conditions, Conditions):
        raise UserError(
            f"conditions: must be conditions (got {shown(conditions)}). Pass what "
            "`condition` returns."
        )
    if width not in (None, conditions.width) or height not in (None, conditions.height):
        raise UserError(
            f"conditions: made for {conditions.width}x{conditions.height}. "
            "Leave `width` and `height` out."
        )
    check_size(conditions.height, conditions.width)
    tokens, ids = conditions.references, conditions.reference_ids
    shapes = [None if x is None else tuple(x.shape[-2:]) for x in (tokens, ids)]
    channels, axes = spec.autoencoder.latent_channels, len(spec.transformer.axes_dim)
    count = 0 if ids is None else len(ids)
    if shapes not in ([None, None], [(count, channels), (count, axes)]):
        raise UserError(
            f"conditions: `references` must be (B, R, {channels}), and `reference_ids` (R, {axes}) "
            f"(got {shown(tokens)} and {shown(ids)}). Pass what `condition` returns."
        )
    return conditions


def initial_latents(
    noise: Tensor, t: float, conditions: Conditions, device: torch.device, contiguous: bool
) -> tuple[Tensor, Callable[[Tensor, float], Tensor] | None]:
    """Return tokens (B, L, C) at time t, and a function that restores protected parts.

    Text to image starts from noise (B, C, h, w), image to image from an image with noise.
    Inpainting also restores, after each step, what the mask protects. `contiguous`: for a network
    with biases, which would round twice in bfloat16 on strided input.
    """

    def to_tokens(grid: Tensor) -> Tensor:
        tokens = rearrange(grid, "b c h w -> b (h w) c")
        return (tokens.contiguous() if contiguous else tokens).to(device)

    noise = to_tokens(noise)
    if conditions.init is None:
        return noise, None
    image = to_tokens(conditions.init)
    x = sampling.scale_noise(image, noise, t)
    if conditions.mask is None:
        return x, None
    mask = to_tokens(conditions.mask)  # (1, L, 1 | C), 1 where the image may change

    def blend(x: Tensor, t: float) -> Tensor:
        return (1 - mask) * sampling.scale_noise(image, noise, t) + mask * x

    return x, blend


# ------------------------------------------------------------------------------ the layouts


def reference_tokens(
    latents: Sequence[Tensor], axes: int, flux3: bool = False
) -> tuple[Tensor, Tensor]:
    """Flatten the latents (1, C, h, w) of all references into tokens (1, R, C) and ids (R, axes).

    FLUX.2 (4 axes) numbers its references by t = 10, 20, ... FLUX.1 Kontext was trained with one,
    at t = 1. Several stand side by side there: the columns of the next one go on. FLUX 3 numbers
    its references on the last axis.
    """
    tokens, ids, left = [], [], 0
    for number, x in enumerate(latents, start=1):
        height, width = x.shape[2:]
        tokens.append(rearrange(x, "b c h w -> b (h w) c"))
        if flux3:
            ids.append(sampling.flux3_image_ids(height, width, number))
            continue
        t = 10 * number if axes == 4 else 1
        ids.append(sampling.image_ids(height, width, axes, t=t, left=left))
        left += 0 if axes == 4 else width
    return torch.cat(tokens, dim=1), torch.cat(ids)


def fill_channels(masked: Tensor, mask: Tensor) -> Tensor:
    """Return the channels of FLUX.1 Fill (1, hw, 64 + 256).

    `masked`: latents (1, 64, h, w) of the masked image; `mask`: (1, 1, 16h, 16w). The 16x16 mask
    values of a token become its channels: first the place within 8x8 pixels, then the 2x2 packing.
    """
    values = rearrange(mask, "b 1 (h y) (w x) -> b (y x) h w", y=8, x=8)  # (1, 64, 2h, 2w)
    x = torch.cat([masked, pack(values)], dim=1)  # (1, 64 + 256, h, w)
    return rearrange(x, "b c h w -> b (h w) c")


def latent_mask(mask: Tensor, channels: int, spatial: bool) -> Tensor:
    """Resize a mask (1, 1, 16h, 16w) of 0 and 1 to (1, 1 | channels, h, w), to blend latents by.

    As diffusers' pipelines do. FLUX.1 (`spatial`) takes the nearest pixel of each 8x8 latent, then
    packs. FLUX.2 interpolates straight to tokens, which leaves soft edges.
    """
    height, width = mask.shape[2] // 16, mask.shape[3] // 16
    if not spatial:
        return F.interpolate(mask, (height, width), mode="bilinear", align_corners=False)
    nearest = F.interpolate(mask, (2 * height, 2 * width), mode="nearest")
    return pack(nearest.expand(-1, channels // 4, -1, -1))


# ------------------------------------------------------------------------------ from images


def condition(
    spec: ModelSpec,
    images: ImageInputs,
    width: int,
    height: int,
    encode: Encode,
    embed: Embed,
    bfl_levels: bool = False,
) -> Conditions:
    """Encode checked image inputs as `spec` uses them; `bfl_levels`: see `control_pixels`."""
    conditions = Conditions(height, width)
    if spec.image_mode == "redux":
        return replace(conditions, text=_redux_tokens(images, embed))
    if spec.image_mode == "control":
        image = images.images[0].resize((width, height), Image.Resampling.LANCZOS)  # as BFL
        if images.preprocess_control:
            pixels = control_pixels(spec.control, image, bfl_levels)  # (1, 3, H, W)
        else:
            pixels = to_pixels(image)
        channels = rearrange(encode(pixels), "b c h w -> b (h w) c")
        return replace(conditions, channels=channels, control_image=to_images(pixels)[0])
    if not request.has_init_image(spec, images):
        latents = [encode(to_pixels(image)) for image in request.resize_references(spec, images)]
        return _with_references(conditions, spec, images, latents)

    init_image = request.prepare_init_image(spec, images, width, height)
    conditions = replace(conditions, init_image=init_image)
    pixels = to_pixels(init_image.image)  # (1, 3, H, W)
    mask = None if init_image.mask is None else to_mask(init_image.mask)  # (1, 1, H, W)
    if spec.image_mode == "fill":
        assert mask is not None  # `check_images` saw to it
        masked = encode(pixels * (1 - mask))  # (1, 64, h, w)
        return replace(conditions, channels=fill_channels(masked, mask))
    init = encode(pixels)  # (1, C, h, w)
    conditions = replace(conditions, init=init, strength=images.strength)
    if mask is not None:
        mask = latent_mask(mask, init.shape[1], spec.flux1)  # (1, 1 | C, h, w)
        if not mask.any():
            raise UserError(
                "mask: its white parts are too thin: they fall between latents, of which there is "
                "one for 8 or 16 pixels. Paint them wider."
            )
        conditions = replace(conditions, mask=mask)
    if spec.image_mode == "reference":  # the model also sees the image that it changes
        limit = images.reference_limit or min(spec.size, 1024)
        others = replace(images, images=images.images[1:], reference_limit=limit)
        latents = [encode(to_pixels(image)) for image in request.resize_references(spec, others)]
        conditions = _with_references(conditions, spec, images, [init, *latents])
    return conditions


def _redux_tokens(images: ImageInputs, embed: Embed) -> Tensor:
    """Return the weighted sum of the images' text tokens, (1, T, D)."""
    count = len(images.images)
    weights = images.image_weights or [1 / count] * count
    tokens = weights[0] * embed(images.images[0])
    for weight, image in zip(weights[1:], images.images[1:], strict=True):
        tokens = tokens + weight * embed(image)
    return tokens


def _with_references(
    conditions: Conditions, spec: ModelSpec, images: ImageInputs, latents: Sequence[Tensor]
) -> Conditions:
    tokens, ids = reference_tokens(latents, len(spec.transformer.axes_dim), spec.flux3)
    kv_cache = spec.kv_cached_references if images.kv_cache is None else images.kv_cache
    return replace(conditions, references=tokens, reference_ids=ids, kv_cache=kv_cache)
