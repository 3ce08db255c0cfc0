"""Training data: folders of images and captions, sizes, cached latents and features."""

import hashlib
import math
import os
import warnings
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path
from typing import Literal, NamedTuple, cast

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import conditioning
from flux.autoencoder import AutoEncoder
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io import input as inputs
from flux.image_io.control import control_pixels
from flux.image_io.output import to_mask, to_pixels
from flux.image_io.references3 import check_reference3, pad_to_canvas
from flux.pipeline import Pipeline
from flux.plain_files import parse_json, read_plain_file, require_plain_file
from flux.training.checkpoint import (
    CHECKSUM,
    check_header,
    check_tensors,
    is_finite,
    load_tensors,
    read_own_header,
    remove_unfinished,
    save_tensors,
)
from flux.training.loss import seeded_generator
from flux.weights.files import preview, read_header

# -------------------------------------------------------------------------------- folders and sizes

MAX_IMAGES = 1_000_000
MAX_CAPTION, MAX_LIST = 2**20, 2**30  # bytes of a .txt file, and of a metadata.jsonl file
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
KEYS = {"image", "caption", "references", "control", "mask"}  # of a line of metadata.jsonl
MAX_ASPECT_RATIO = 4
Fit = Literal["bucket", "reference", "canvas"]  # how an image is scaled; "canvas": `references3`


@dataclass(frozen=True)
class Sample:
    """One training image as files, with its caption."""

    image: Path
    caption: str
    references: tuple[Path, ...] = ()  # the images of which `image` is an edit
    control: Path | None = None  # Canny and Depth; None: computed from the image
    mask: Path | None = None  # Fill, white where to paint; None: a random rectangle

    @property
    def files(self) -> list[Path]:
        return [x for x in (self.image, *self.references, self.control, self.mask) if x]


def read_folder(folder: Path) -> list[Sample]:
    """Read the samples of `metadata.jsonl`, or else each image with the .txt file next to it."""
    if not folder.is_dir():
        raise UserError(f"{folder}: is not a folder. Name a folder of images and captions.")
    if os.path.lexists(folder / "metadata.jsonl"):  # a broken link is told
        return _read_list(folder / "metadata.jsonl")
    found = (path for path in folder.iterdir() if _is_image_name(path.name))
    images = sorted(islice(found, MAX_IMAGES + 1))
    _check_count(folder, len(images))
    if not images:
        raise UserError(
            f"{folder}: has no images ({', '.join(SUFFIXES)}) and no metadata.jsonl that lists any"
        )
    samples = [Sample(path, _read_text(path.with_suffix(".txt"), MAX_CAPTION)) for path in images]
    missing = [sample.image.name for sample in samples if not sample.caption]
    if missing:
        raise UserError(
            f"{folder}: {len(missing)} of {len(images)} images have no caption "
            f"({preview(missing)}). Write it to {Path(missing[0]).stem}.txt, or list all images in "
            "metadata.jsonl."
        )
    return samples


def _is_image_name(name: str) -> bool:
    """Return whether a file is an image by its name. Other systems' hidden files are not.

    macOS keeps what it knows of a.png in ._a.png, on disks and in archives of other systems.
    """
    return Path(name).suffix.lower() in SUFFIXES and not name.startswith("._")


def _check_count(source: Path, images: int) -> None:
    if images > MAX_IMAGES:
        raise UserError(f"{source}: has more than {MAX_IMAGES:,} images. Use fewer of them.")


def _read_text(path: Path, limit: int) -> str:
    """Return the text of a file, stripped; "" if there is no file."""
    try:
        if not os.path.lexists(path):
            return ""
        return read_plain_file(path, limit, "a text file").decode("utf-8-sig").strip()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Check its name and permissions."
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: is not UTF-8 text ({error}). Save it as UTF-8.") from None


def _read_list(path: Path) -> list[Sample]:
    """Read a metadata.jsonl file. Its paths are relative to its folder. A line of the file:

    {"image": "b.png", "caption": "...", "references": ["a.png"]}

    "control" or "mask" may name an image instead of "references".
    """
    text = _read_text(path, MAX_LIST)
    _check_count(path, text.count("\n") + 1)
    lines = text.split("\n") if text else []  # not splitlines(), which splits at U+2028 too
    if not lines:
        raise UserError(f"{path}: is empty. List images and their captions in it.")
    samples = [_read_line(path, number, line) for number, line in enumerate(lines, start=1)]
    folder = path.parent.resolve()
    files = {file for sample in samples for file in sample.files}
    outside = [str(file) for file in sorted(files) if folder not in file.resolve().parents]
    if outside:
        warnings.warn(
            f"{path}: names {len(outside)} files outside its folder ({preview(outside)})",
            stacklevel=3,
        )
    return samples


def _read_line(path: Path, number: int, line: str) -> Sample:
    """Read one line of a metadata.jsonl file."""
    try:
        entry = parse_json(line)
        caption, references = entry["caption"].strip(), entry.get("references", [])
        image = path.parent / entry["image"]
        files = [path.parent / name for name in references]
        others = {kind: path.parent / entry[kind] for kind in ("control", "mask") if kind in entry}
        if not caption or not isinstance(references, list):
            raise ValueError
    except (ValueError, LookupError, TypeError, AttributeError):
        raise UserError(
            f'{path}, line {number}: must be {{"image": FILE, "caption": TEXT}}, optionally with '
            f'"references": [FILE, ...], "control": FILE or "mask": FILE (got {line!r:.120})'
        ) from None
    if unknown := entry.keys() - KEYS:
        raise UserError(
            f"{path}, line {number}: unknown name {preview(sorted(map(repr, unknown)))}. "
            f"Use {', '.join(sorted(KEYS))}."
        )
    named = (image, *files, *others.values())
    # unlike Path.is_file, isfile does not fail at names that are too long
    if missing := [f"{file!s:.200}" for file in named if not os.path.isfile(file)]:
        raise UserError(f"{path}, line {number}: not a file: {preview(missing)}")
    return Sample(image, caption, tuple(files), **others)


def bucket_size(width: int, height: int, size: int) -> tuple[int, int]:
    """Return the training width and height of an image: about size² pixels, multiples of 16.

    The longer side is a multiple of a sixteenth of `size`, so that many images share a size, and a
    batch. The aspect ratio is kept as far as possible.
    """
    step = max(16, size // 256 * 16)
    longer = size * math.sqrt(max(width, height) / min(width, height)) - size
    long = size + step * round(longer / step)
    short = max(64, 16 * round(size * size / long / 16))
    return (long, short) if width >= height else (short, long)


def fit_to_bucket(image: Image.Image, size: int) -> Image.Image:
    """Scale an image to cover its bucket, and crop the image at its centre."""
    width, height = bucket_size(*image.size, size)
    scale = max(width / image.width, height / image.height)
    left, top = (image.width - width / scale) / 2, (image.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    return image.resize((width, height), Image.Resampling.LANCZOS, box=box)


def fit_reference(spec: ModelSpec, image: Image.Image, size: int) -> Image.Image:
    """Scale a reference as the sampler does, in proportion to `size`.

    At size 1024, FLUX.1 Kontext uses its preferred sizes, and FLUX.2 and FLUX 3 at most 1024²
    pixels.
    """
    if spec.flux1:
        width, height = inputs.preferred_size(*image.size)
        sides = (width * size / 1024, height * size / 1024)
        return image.resize(inputs.round_to_16(sides), Image.Resampling.LANCZOS)
    return inputs.fit_reference(image, size**2)


# ---------------------------------------------------------------------------------------- the cache


class CachedSample(NamedTuple):
    """A sample as files of the cache."""

    latents: Path
    features: Path
    references: tuple[Path, ...]
    shape: Hashable  # of all latents; equal for samples that may share a batch
    channels: Path | None = None
    text_tokens: int = 0  # of the caption, padding included; equal within a batch


class Cache:
    """Latents and text features on disk. A file's name is a hash of everything it depends on.

    The metadata of a file repeat its name and hold a checksum of its bytes. A file that is cut,
    rotten or under another's name is made again. The checksum is no signature: a program that
    writes other tensors with a right checksum is believed. Several runs may share the folder.
    """

    def __init__(self, folder: Path, pipe: Pipeline, size: int):
        self.folder, self.pipe, self.size = folder, pipe, size
        # one image may be the reference of several edits
        self.file_sha256 = cache(file_sha256)
        self.encoder_id = fingerprint(pipe.image_encoder.files)
        self.text_id = (
            *(fingerprint(network.files) for network in pipe.text.networks),
            pipe.spec.text_length,
            pipe.text.dtype,
        )
        folder.mkdir(parents=True, exist_ok=True)
        remove_unfinished(folder)

    def sample(self, sample: Sample) -> CachedSample:
        """Encode a sample, except for what is cached. UserError if an image is unusable."""
        fit: Fit = "bucket"
        fit_references: Fit = "reference"
        if self.pipe.spec.flux3 and len(sample.references) == 1:
            fit_references = "canvas"
            sizes = {inputs.upright_size(path) for path in (sample.image, *sample.references)}
            if len(sizes) == 1:  # an edit, whose output the sampler puts on the same canvas
                fit = "canvas"
        latents = self.latents(sample.image, fit)
        references = tuple(self.latents(path, fit_references) for path in sample.references)
        shape = tuple(read_header(file)[0]["latents"].shape for file in (latents, *references))
        channels = None
        if self.pipe.spec.image_mode in ("control", "fill"):
            channels = self.channels(sample, math.prod(shape[0][1:]))
        features = self.features(sample.caption, sample.image.name)
        return CachedSample(latents, features, references, shape, channels, text_tokens(features))

    def latents(self, path: Path, fit: Fit = "bucket") -> Path:
        """Encode an image to {"latents": (C, h, w)}, float32."""
        spec, key = self.pipe.spec, {"bucket": False, "reference": True}.get(fit, fit)
        file = self._file("latents", self.file_sha256(path), key, self.size, self.encoder_id)
        if self._is_intact(file, latents=(spec.autoencoder.latent_channels, -1, -1)):
            return file
        image = inputs.read_image(path)
        if max(image.size) > MAX_ASPECT_RATIO * min(image.size):
            raise UserError(
                f"{path}: aspect ratio must be at most {MAX_ASPECT_RATIO}:1 "
                f"(got {image.width}x{image.height}). Crop the image."
            )
        if spec.flux3 and fit != "bucket":
            check_reference3(image, str(path), alone=fit == "canvas")
        elif fit == "reference" and not spec.flux1:
            inputs.check_reference(image, str(path))
        if fit == "bucket" and 4 * image.width * image.height < self.size**2:
            warnings.warn(
                f"{path}: {image.width}x{image.height} is enlarged for `size={self.size}`",
                stacklevel=2,
            )
        if fit == "canvas":
            fitted = pad_to_canvas(image, self.size**2).image
        elif fit == "reference":
            fitted = fit_reference(spec, image, self.size)
        else:
            fitted = fit_to_bucket(image, self.size)
        return self._save(file, str(path), latents=self._encode(to_pixels(fitted))[0])

    def channels(self, sample: Sample, tokens: int) -> Path:
        """Encode the extra input of Fill, Canny and Depth to {"channels": (L, C')}, float32.

        `tokens`: L, the number of latent tokens of the image.
        """
        spec, other = self.pipe.spec, sample.control or sample.mask
        hashes = [self.file_sha256(path) for path in (sample.image, other) if path]
        file = self._file(
            "channels", hashes, spec.image_mode, spec.control, self.size, self.encoder_id
        )
        c = spec.flux_config
        if self._is_intact(file, channels=(tokens, c.in_channels - c.out_channels)):
            return file
        image = inputs.read_image(sample.image)
        if spec.image_mode == "fill":
            channels = self._fill_channels(sample, image, hashes[0])
        else:
            channels = self._control_channels(sample, image)
        return self._save(file, str(sample.image), channels=channels[0])

    def _fill_channels(self, sample: Sample, image: Image.Image, image_sha256: str) -> Tensor:
        if sample.mask:
            mask_image = inputs.read_mask(sample.mask)
            _check_same_size(sample.mask, mask_image, sample.image, image)
        else:
            mask_image = random_rect_mask(image.size, image_sha256)
        inputs.require_nonempty_mask(mask_image, str(sample.mask))
        pixels = to_pixels(fit_to_bucket(image, self.size))
        mask = to_mask(fit_to_bucket(mask_image, self.size))
        return conditioning.fill_channels(self._encode(pixels * (1 - mask)), mask)

    def _control_channels(self, sample: Sample, image: Image.Image) -> Tensor:
        if sample.control:
            control = inputs.read_image(sample.control)
            _check_same_size(sample.control, control, sample.image, image)
            pixels = to_pixels(fit_to_bucket(control, self.size))
        else:
            fitted = fit_to_bucket(image, self.size)
            pixels = control_pixels(self.pipe.spec.control, fitted)
        return rearrange(self._encode(pixels), "1 c h w -> 1 (h w) c")

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> Tensor:
        encoder = cast(AutoEncoder, self.pipe.image_encoder())
        return encoder.encode(pixels.to(self.pipe.device)).cpu()

    def features(self, caption: str, source: str = "prompt") -> Path:
        """Encode a caption to {"tokens": (T, D)} and, for FLUX.1, {"pooled": (V,)}.

        Errors and warnings about the caption begin with `source`.
        """
        file = self._file("text", caption, self.text_id)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                length = self.pipe.text.padded_length([caption])
                shapes: dict[str, tuple[int, ...]] = {
                    "tokens": (length, self.pipe.spec.transformer.context_dim)
                }
                if width := self.pipe.spec.pooled_dim:
                    shapes["pooled"] = (width,)
                if self._is_intact(file, self.pipe.text.dtype, **shapes):
                    return file
                features = self.pipe.text.encode([caption])
            except UserError as error:
                raise UserError(f"{source}: {error}") from None
        for warning in caught:
            warnings.warn(f"{source}: {warning.message}", stacklevel=2)
        self.pipe.text.cache.pop(caption)  # the file keeps the features
        tensors = {key: x[0] for key, x in features._asdict().items() if x is not None}
        return self._save(file, source, **tensors)

    def _file(self, kind: str, *parts: object) -> Path:
        digest = hashlib.sha256(repr(parts).encode()).hexdigest()[:40]
        return self.folder / f"{kind}-{digest}.safetensors"

    def _save(self, file: Path, source: str, **tensors: Tensor) -> Path:
        """Write a file of the cache. UserError if the encoder's output is not finite."""
        if not all(map(is_finite, tensors.values())):
            raise UserError(f"{source}: is not finite when encoded. Use `dtype=float32`.")
        save_tensors(file, tensors, {"name": file.stem}, checksum=True)
        return file

    def _is_intact(
        self, file: Path, dtype: torch.dtype = torch.float32, **shapes: tuple[int, ...]
    ) -> bool:
        """Return whether a file is what the cache wrote. In a shape, -1 is any positive number."""
        if not file.exists():
            return False
        try:
            header = read_header(file)[0]
            expected = {}
            for name, shape in shapes.items():
                found = header[name].shape if name in header else ()
                found = found if len(found) == len(shape) else shape
                sides = [b if a == -1 else a for a, b in zip(shape, found, strict=True)]
                sides = [max(1, side) for side in sides]
                expected[name] = torch.empty(sides, dtype=dtype, device="meta")
            check_header(file, header, expected)
            load_cached(file)
            return True
        except UserError:
            return False


def text_tokens(features: Path) -> int:
    """Return the number of text tokens in a file of the cache."""
    return read_own_header(features)[0]["tokens"].shape[0]


def load_cached(file: Path) -> dict[str, Tensor]:
    """Read a file of the cache. UserError if the file is not what the cache wrote."""
    try:
        metadata = read_own_header(file)[1]
        tensors = load_tensors(file)
        check_tensors(file, tensors, metadata)
        if CHECKSUM not in metadata or metadata.get("name") != file.stem:
            raise UserError(f"{file}: was not written under this name.")
    except UserError as error:
        raise UserError(f"{error} Repeat the command to make this file again.") from None
    return tensors


def file_sha256(path: Path) -> str:
    """Return the SHA-256 of a file. UserError if the file cannot be read."""
    try:
        with require_plain_file(path, "an image file").open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(
            f"{path}: cannot be read ({error.strerror}). Check its name and permissions."
        ) from None


def _check_same_size(path: Path, other: Image.Image, image_path: Path, image: Image.Image) -> None:
    if other.size != image.size:
        raise UserError(
            f"{path}: must have the size of {image_path} "
            f"(got {other.width}x{other.height}, expected {image.width}x{image.height})"
        )


def random_rect_mask(size: tuple[int, int], seed_sha256: str) -> Image.Image:
    """Return a mask with a white rectangle, a function of the image's hash.

    Each side is at least a third of the image's. The rectangle often touches a border, as the mask
    of an outpainted image does.
    """
    generator = seeded_generator(int(seed_sha256[:12], 16))
    spans = []  # (start, length) along the width, and along the height
    for side in size:
        length, place = torch.rand(2, generator=generator).tolist()
        length = round(side * (1 + 2 * length) / 3)
        place = min(max(1.5 * place - 0.25, 0), 1)
        spans.append((round(place * (side - length)), length))
    (left, width), (top, height) = spans
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, top, left + width, top + height))
    return mask


def fingerprint(files: Sequence[Path]) -> str:
    """Return a hash of the headers and of sixteen pieces of each file of weights.

    Hashing all of a 20 GB file would take a minute.
    """
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in sorted({0, *(size * k // 16 for k in range(16)), max(0, size - 65536)}):
                file.seek(start)
                digest.update(file.read(65536))
        digest.update(repr((path.suffix, size)).encode())
    return digest.hexdigest()
