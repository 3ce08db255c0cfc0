"""Write image files: rounded pixels, metadata, and atomic writes that never overwrite a file."""

import io
import json
import os
import struct
import warnings
import zlib
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux.atomic_files import make_folder, remove_leftovers, unfinished_file, write_atomically
from flux.errors import NonFiniteError, UserError
from flux.image_io.input import open_image
from flux.image_io.metadata import parameters, source_type
from flux.plain_files import MAX_JSON, parse_json

FORMATS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}
KEY = "flux"  # the name of our JSON in a PNG; JPEG and WebP carry it as XMP
XMP = (
    '<?xpacket begin="" id="W5M0MpCehiHzreSzNTczkc9d"?><x:xmpmeta xmlns:x="adobe:ns:meta/">'
    '<rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description rdf:about="">{}</rdf:Description></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
)
XMP_RECORD = '<flux:metadata xmlns:flux="urn:flux:"><![CDATA[{}]]></flux:metadata>'
XMP_SOURCE = (  # IPTC Photo Metadata Standard: where an image comes from
    '<Iptc4xmpExt:DigitalSourceType xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/">'
    "{}</Iptc4xmpExt:DigitalSourceType>"
)
JPEG_ROOM = 65_504  # bytes: a segment of 65,535, less its length (2) and the name of XMP (29)
EXIF_ROOM = 65_527  # bytes, likewise; the name of EXIF has 6


def to_images(pixels: Tensor, dtype: torch.dtype = torch.float32) -> list[Image.Image]:
    """Return the images of pixels (B, 3, H, W), nominally in [-1, 1].

    Levels are rounded to the nearest; BFL's code truncates, which darkens. `dtype`: of the map to
    [0, 1]; diffusers maps in the model's. Raise NonFiniteError for NaN or infinity.
    """
    if not torch.stack(pixels.aminmax()).isfinite().all():
        raise NonFiniteError("pixels: not finite after decoding. Try `decode_dtype=float32`.")
    levels = (pixels.to(dtype) / 2 + 0.5).clamp(0, 1).permute(0, 2, 3, 1)  # (B, H, W, 3)
    levels = levels.float().mul_(255).round_().byte().contiguous().cpu()
    return [Image.fromarray(image) for image in levels.numpy()]


def to_pixels(image: Image.Image) -> Tensor:
    """Return an RGB image as (1, 3, H, W) in [-1, 1], float32; the inverse of `to_images`."""
    return rearrange(torch.from_numpy(np.array(image)), "h w c -> 1 c h w").float() / 127.5 - 1


def to_mask(mask: Image.Image) -> Tensor:
    """Return a mask ("L") as (1, 1, H, W) in [0, 1], float32."""
    return rearrange(torch.from_numpy(np.array(mask)), "h w -> 1 1 h w").float() / 255


# ------------------------------------------------------------------------------ checks


def check_output(path: Path, texts: Iterable[str] = (), name: str = "output") -> None:
    """Create the folder of `path`; UserError if no image with any of these texts fits there.

    What killed processes left unfinished in the folder is removed. `name`: the argument to blame.
    """
    if path.suffix.lower() not in FORMATS:
        raise UserError(
            f"{name}: {path} has {path.suffix or 'no suffix'} (expected {', '.join(FORMATS)})."
        )
    try:
        make_folder(path.parent)
        next_free_path(path)  # raises if the name is too long for the file system
        with unfinished_file(path, wait=True) as unfinished:
            unfinished.touch()
        remove_leftovers(path.parent)  # of other numbers, and of latents
    except OSError as error:
        raise UserError(
            f"{name}: {path} cannot be written ({error.strerror}). Use another folder or name."
        ) from None
    for text in texts:
        check_metadata_fits(path, {"prompt": text}, name)


def check_metadata_fits(path: Path, metadata: dict, name: str = "output") -> None:
    """Raise UserError for metadata that could not be written, or not be read again.

    A JPEG keeps them in one segment; of any file, at most MAX_JSON bytes are read.
    """
    size = len(_xmp(metadata))
    if size > MAX_JSON:
        raise UserError(
            f"{name}: the prompt is too long for the metadata of an image ({path}: {size:,} bytes, "
            f"at most {MAX_JSON:,}). Use a shorter prompt."
        )
    if FORMATS[path.suffix.lower()] == "JPEG" and size > JPEG_ROOM:
        raise UserError(
            f"{name}: the prompt is too long for the metadata of a JPEG ({path}). Use a shorter "
            "prompt, or .png or .webp."
        )


def _xmp(metadata: dict, record: bool = True) -> bytes:
    """Return an XMP packet: the mark of generated media, and the metadata if `record` is set."""
    source = source_type(metadata)
    parts = [XMP_SOURCE.format(source)] if source else []
    if record:
        text = to_json(metadata).replace("]]>", "]]\\u003e")  # CDATA may not hold its own end
        parts.append(XMP_RECORD.format(text))
    return XMP.format("".join(parts)).encode()


def _exif(text: str) -> bytes:
    """Return EXIF whose UserComment is `text`, big-endian, as web UIs write and read it.

    Pillow would give the comment another type than EXIF does: bytes instead of undefined (7).
    """
    comment = b"UNICODE\0" + text.encode("utf-16-be", "replace")
    head = struct.pack(">4sI", b"MM\0*", 8)
    first = struct.pack(">HHHIII", 1, 0x8769, 4, 1, 26, 0)  # at 8: one tag, where EXIF's are
    tags = struct.pack(">HHHIII", 1, 0x9286, 7, len(comment), 44, 0)  # at 26: UserComment
    return b"Exif\0\0" + head + first + tags + comment


def to_json(metadata: dict) -> str:
    """Return strict JSON in ASCII, without control characters: NaN has no spelling there."""
    return json.dumps(metadata, allow_nan=False).replace("\x7f", "\\u007f")


# ------------------------------------------------------------------------------ files


def next_free_path(path: Path, suffixes: Sequence[str] = ()) -> Path:
    """Return `path`, or the first of path-2, path-3, ... that does not exist.

    Nor may the same name exist with any of `suffixes`.
    """
    candidate, number = path, 2
    while any(_exists(file) for file in (candidate, *map(candidate.with_suffix, suffixes))):
        candidate = path.with_stem(f"{path.stem}-{number}")
        number += 1
    return candidate


def _exists(path: Path) -> bool:
    return path.exists() or path.is_symlink()  # a link that leads nowhere exists too


def save(
    image: Image.Image,
    path: Path,
    metadata: dict,
    suffixes: Sequence[str] = (),
    record: bool = True,
    seal: Callable[[bytes], bytes] | None = None,
) -> Path:
    """Write an image and its metadata under a free name, and return the name.

    The file holds the metadata, the text of `flux.image_io.metadata.parameters` unless it is too
    long for a JPEG, and IPTC's mark of generated media. `record=False` leaves only the mark.
    `suffixes`: as in `next_free_path`. `seal`: from the file's bytes to those to write, to sign it.
    """
    image = image.copy()
    image.info.clear()  # a JPEG would repeat the comment of an input image
    kind = FORMATS[path.suffix.lower()]
    options = {"format": kind} | metadata_options(kind, metadata, record)
    if kind == "PNG":
        # After PNG's filters, RLE is faster than zlib's level 1, and smaller than its level 6.
        options["compress_type"] = zlib.Z_RLE
    else:
        options["quality"] = 95
    if kind == "JPEG":
        options["subsampling"] = 0
    if seal is None:
        return write_exclusive(path, lambda file: image.save(file, **options), suffixes)
    whole = io.BytesIO()
    image.save(whole, **options)
    sealed = seal(whole.getvalue())
    return write_exclusive(path, lambda file: file.write(sealed), suffixes)


def metadata_options(kind: str, metadata: dict, record: bool = True) -> dict[str, Any]:
    """Return the options of Pillow that write metadata into a "PNG", "JPEG" or "WEBP"."""
    text = parameters(metadata) if record else ""
    source = source_type(metadata)
    options: dict[str, Any] = {}
    if kind == "PNG":
        from PIL import PngImagePlugin  # imported here, as Pillow itself does

        info = options["pnginfo"] = PngImagePlugin.PngInfo()
        if record:
            info.add_itxt(KEY, to_json(metadata))
        if text:
            info.add_text("parameters", text)
        if source:
            info.add_itxt("XML:com.adobe.xmp", _xmp(metadata, record=False).decode())
        return options
    if record or source:
        options["xmp"] = _xmp(metadata, record)
    if text:
        exif = _exif(text)
        if kind != "JPEG" or len(exif) <= EXIF_ROOM:
            options["exif"] = exif
    return options


class RecordedImage(Image.Image):
    """An image whose `save` writes its metadata into PNG, JPEG and WebP, as `save` of this file.

    What Pillow makes of it (`crop`, `copy`) is a plain image, since the metadata do not make it.
    """

    metadata: dict
    seal: Callable[[bytes], bytes] | None = None  # from a file's bytes to those to write: signs
    verdicts: Sequence[Any] = ()  # of the filters that let the image pass

    def __eq__(self, other: object) -> bool:
        """Equal pixels: a plain image has no metadata."""
        if not isinstance(other, Image.Image):
            return NotImplemented
        same = (self.mode, self.size) == (other.mode, other.size)
        return same and self.tobytes() == other.tobytes()

    def save(self, fp, format: str | None = None, **params: Any) -> None:
        suffix = Path(os.fsdecode(fp)).suffix.lower() if isinstance(fp, str | Path) else ""
        kind = (format or FORMATS.get(suffix, "")).upper()
        options: dict[str, Any] = {}
        if kind in FORMATS.values():
            options = metadata_options(kind, self.metadata)
        if kind == "JPEG" and len(options["xmp"]) > JPEG_ROOM:
            warnings.warn(
                "the prompt is too long for the metadata of a JPEG, which is saved without",
                stacklevel=2,
            )
            options = {}
        if self.seal is None:
            return super().save(fp, format, **(options | params))
        if kind not in FORMATS.values():
            raise UserError(
                f"sign: images of {kind or fp!s:.80} are not signed. Use a PNG, JPEG or WebP."
            )
        whole = io.BytesIO()
        super().save(whole, kind, **(options | params))
        sealed = self.seal(whole.getvalue())
        if not isinstance(fp, str | Path):
            fp.write(sealed)
            return
        with write_atomically(Path(fp)) as unfinished:
            unfinished.write_bytes(sealed)


def recorded(image: Image.Image, metadata: dict) -> RecordedImage:
    """Return the image with its metadata, also as text in `info["flux"]`."""
    out = RecordedImage.__new__(RecordedImage)
    vars(out).update(vars(image.copy()))
    out.metadata = metadata
    out.info = {KEY: to_json(metadata)}
    return out


def write_exclusive(
    path: Path, write: Callable[[BinaryIO], object], suffixes: Sequence[str] = ()
) -> Path:
    """Call `write` with a file of a free name, and return the name. Atomic; never overwrites.

    Of several processes that write to one `path`, one waits for the other. OSError names `path`.
    """
    with unfinished_file(path, wait=True) as unfinished:
        try:
            with unfinished.open("xb") as file:
                write(file)
        except OSError as error:
            error.filename = str(path)
            raise
        while True:
            target = next_free_path(path, suffixes)
            try:
                os.link(unfinished, target)  # unlike a rename, fails if the name is taken now
                return target
            except FileExistsError:
                continue
            except OSError:  # a file system without hard links
                os.replace(unfinished, target)
                return target


def read_metadata(path: Path) -> dict:
    """Return the metadata that `save` wrote into an image file."""
    with open_image(path) as image:
        text = record_text(image)
    try:
        metadata = parse_json(text or "")
        if not isinstance(metadata, dict):
            raise ValueError
        return metadata
    except (TypeError, ValueError):
        raise UserError(
            f"{path}: is not an image with flux metadata. Another program may have removed them, "
            "or they were left out."
        ) from None


def record_text(image: Image.Image) -> str | None:
    """Return the JSON that `save` wrote into an image that is open; None if there is none."""
    if image.format == "PNG" and KEY not in image.info:
        image.load()  # other programs may have put it behind the pixels
    if KEY in image.info:
        return image.info[KEY]
    xmp = image.info.get("xmp") or b""
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    _, start, text = xmp.partition(b"<![CDATA[")
    return text.partition(b"]]>")[0].decode("utf-8", "replace") if start else None
