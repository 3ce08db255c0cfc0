"""Pixels <-> picture files: rounding, formats, metadata, and writing so that nothing is ever half written or overwritten."""

import json
import os
import tempfile
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import BinaryIO
from uuid import uuid4

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux.errors import NonFiniteError, UserError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
KEY = "flux"  # the name of our JSON in a PNG; JPEG and WebP carry it as XMP
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><flux><![CDATA[{}]]></flux></x:xmpmeta>'
JPEG_ROOM = 65_504  # bytes: a segment of 65,535, less its length (2) and the name of XMP (29)


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), nominally in [-1, 1] -> pictures. Rounded to the nearest level; BFL's code truncates, which darkens."""
    if (
        not torch.stack(pixels.aminmax()).isfinite().all()
    ):  # NaN is the least and the greatest, if there is one
        raise NonFiniteError(
            "the decoded pixels are not finite: decode in float32 with --dtype float32"
        )
    levels = (
        pixels.permute(0, 2, 3, 1).float().clamp(-1, 1)
    )  # (B, H, W, 3); on a GPU too: bytes are less to copy
    levels = levels.div_(2).add_(0.5).mul_(255).round_().byte().contiguous()
    return [Image.fromarray(picture) for picture in levels.cpu().numpy()]


def to_pixels(picture: Image.Image) -> Tensor:
    """An RGB picture -> (1, 3, H, W) in [-1, 1], float32; `to_images` gives back its very bytes."""
    return rearrange(torch.from_numpy(np.array(picture)), "h w c -> 1 c h w").float() / 127.5 - 1


def to_mask(mask: Image.Image) -> Tensor:
    """A grey ("L") mask -> (1, 1, H, W) in [0, 1], float32."""
    return rearrange(torch.from_numpy(np.array(mask)), "h w -> 1 1 h w").float() / 255


def check_output(path: Path, texts: Iterable[str] = (), flag: str = "--output") -> None:
    """Refuse, before any work is done, an output that could not be written, or could not hold one of these texts."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"{flag} {path}: {path.suffix or 'no suffix'} is not a picture format; use {', '.join(FORMATS)}"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        next_free_path(path)  # raises if the name is too long for the file system
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(
            f"{flag} {path}: cannot be written there ({error.strerror}); choose another folder or name"
        ) from None
    for text in texts:
        check_metadata_fits(path, {"prompt": text}, flag)


def check_metadata_fits(path: Path, metadata: dict, flag: str = "--output") -> None:
    """Refuse parameters that a picture could not hold, before it is made: a JPEG keeps them in one segment."""
    if FORMATS[path.suffix.lower()] == "JPEG" and len(_xmp(metadata)) > JPEG_ROOM:
        raise UserError(
            f"{flag} {path}: a JPEG has no room for so long a prompt; shorten it, or use .png or .webp"
        )


def _xmp(metadata: dict) -> bytes:
    return XMP.format(
        json.dumps(metadata).replace("]]>", "]]\\u003e")
    ).encode()  # CDATA may not hold its own end


def next_free_path(path: Path, beside: Sequence[str] = ()) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist, nor does any with a suffix of `beside`."""
    candidate, number = path, 2
    taken = lambda file: file.exists() or file.is_symlink()  # noqa: E731  a link that leads nowhere is there, too
    while any(map(taken, (candidate, *map(candidate.with_suffix, beside)))):
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def save(image: Image.Image, path: Path, metadata: dict, beside: Sequence[str] = ()) -> Path:
    """Write a picture and its parameters under a new name; returns the name. `beside`: as for `next_free_path`."""
    options: dict = {"format": FORMATS[path.suffix.lower()]}
    if options["format"] == "PNG":
        from PIL import PngImagePlugin  # which Pillow too waits with

        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(KEY, json.dumps(metadata))
        options["compress_type"] = (
            zlib.Z_RLE
        )  # after PNG's filters, faster than zlib's level 1, and smaller than its usual 6
    else:
        options |= {"quality": 95, "xmp": _xmp(metadata)}
    if options["format"] == "JPEG":
        options["subsampling"] = 0
    return write_exclusive(path, lambda file: image.save(file, **options), beside)


def write_exclusive(
    path: Path, write: Callable[[BinaryIO], object], beside: Sequence[str] = ()
) -> Path:
    """Have a file written under an `next_free_path` name; returns the name. Atomic: there is a whole file or none."""
    part = path.parent / f".{uuid4().hex}.part"
    try:
        with part.open("xb") as file:
            write(file)
        while True:
            target = next_free_path(path, beside)
            try:
                os.link(
                    part, target
                )  # fails, where a rename would overwrite, if the name was taken meanwhile
                return target
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                os.replace(part, target)
                return target
    finally:
        part.unlink(missing_ok=True)


def read_metadata(path: Path) -> dict:
    """The parameters that `save` wrote into a picture."""
    try:
        with Image.open(path) as image:
            if image.format == "PNG" and KEY not in image.info:
                image.load()  # other programs may have put it behind the picture
            text = image.info.get(KEY)
            if text is None and (xmp := image.info.get("xmp")):
                text = xmp.decode("utf-8").partition("<![CDATA[")[2].partition("]]>")[0]
        if isinstance(metadata := json.loads(text), dict):
            return metadata
        raise ValueError
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except PermissionError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): check its rights") from None
    except (OSError, TypeError, ValueError, RecursionError, Image.DecompressionBombError):
        raise UserError(
            f"{path} is not a picture that carries flux parameters (were they stripped by another program?)"
        ) from None
