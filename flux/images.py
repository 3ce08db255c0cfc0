"""Pixels <-> picture files: rounding, formats, metadata, and writing so that nothing is ever half written or overwritten."""

import json
import os
import tempfile
from pathlib import Path

import torch
from PIL import Image, PngImagePlugin
from torch import Tensor

from flux.errors import NonFiniteError, UserError

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
KEY = "flux"  # the name of our JSON in a PNG; JPEG and WebP carry it as XMP
XMP = '<x:xmpmeta xmlns:x="adobe:ns:meta/"><flux><![CDATA[{}]]></flux></x:xmpmeta>'


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(B, 3, H, W), nominally in [-1, 1] -> pictures. Rounded to the nearest level; BFL's code truncates, which darkens."""
    if not torch.isfinite(pixels).all():
        raise NonFiniteError("the decoded pixels are not finite: decode in float32 with --dtype float32")
    levels = ((pixels.float().clamp(-1, 1) / 2 + 0.5) * 255).round().byte()  # (B, 3, H, W)
    return [Image.fromarray(picture) for picture in levels.permute(0, 2, 3, 1).cpu().numpy()]


def check_output(path: Path) -> None:
    """Refuse, before any work is done, an output that could not be written."""
    if path.suffix.lower() not in FORMATS:
        raise UserError(f"--output {path}: {path.suffix or 'no suffix'} is not a picture format; use {', '.join(FORMATS)}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {path}: cannot write into {path.parent} ({error.strerror}); choose another folder") from None


def unused(path: Path) -> Path:
    """`path`, or the first of path-2, path-3, ... that does not exist."""
    candidate, number = path, 2
    while candidate.exists():
        candidate, number = path.with_stem(f"{path.stem}-{number}"), number + 1
    return candidate


def save(image: Image.Image, path: Path, metadata: dict) -> Path:
    """Write a picture and its parameters under a new name; returns the name. Atomic: there is a whole file or none."""
    text = json.dumps(metadata, ensure_ascii=True)
    kind = FORMATS[path.suffix.lower()]
    options: dict = {"format": kind}
    if kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt(KEY, text)
    else:  # CDATA may not hold its own end
        options |= {"quality": 95, "xmp": XMP.format(text.replace("]]>", "]]\\u003e")).encode()}
    if kind == "JPEG":
        options["subsampling"] = 0
    handle, part = tempfile.mkstemp(dir=path.parent, prefix=".", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            image.save(file, **options)
        os.chmod(part, 0o666 & ~_umask())  # mkstemp makes private files
        while True:
            target = unused(path)
            try:
                os.link(part, target)  # fails, where a rename would overwrite, if the name was taken meanwhile
                return target
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                os.replace(part, target)
                return target
    finally:
        Path(part).unlink(missing_ok=True)


def read_metadata(path: Path) -> dict:
    """The parameters that `save` wrote into a picture."""
    try:
        with Image.open(path) as image:
            text = image.info.get(KEY)
            if text is None and (xmp := image.info.get("xmp")):
                text = xmp.decode("utf-8").partition("<![CDATA[")[2].partition("]]>")[0]
        return json.loads(text)
    except FileNotFoundError:
        raise UserError(f"{path} does not exist") from None
    except (OSError, TypeError, ValueError):
        raise UserError(f"{path} is not a picture that carries flux parameters (were they stripped by another program?)") from None


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
