"""ImageInputs and captions for training: folders, sizes, the cache of latents and text features, and what a step draws of them."""

import hashlib
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from PIL import Image
from torch import Tensor

from flux import conditioning
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.image_io import input as inputs
from flux.image_io.control import control_pixels
from flux.image_io.output import to_mask, to_pixels
from flux.pipeline import Pipeline
from flux.text_encoder import TextFeatures
from flux.training.trainer import Batch, generator, load, write
from flux.weights.files import preview, read_header

# ---------------------------------------------------------------------------------------------------------- folders and sizes

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".avif", ".bmp", ".tif", ".tiff")
KEYS = {"image", "caption", "references", "control", "mask"}  # of a line of metadata.jsonl
LONGEST = 4  # one side may be so many times the other


@dataclass(frozen=True)
class Item:
    picture: Path
    caption: str
    references: tuple[Path, ...] = ()  # of which the picture is an edit
    control: Path | None = None  # for Canny and Depth, if it is not to be made from the picture
    mask: Path | None = (
        None  # for Fill, white where the picture is to be filled in; without, a rectangle is drawn
    )


def read_folder(folder: Path) -> list[Item]:
    """ImageInputs with their captions: those that `metadata.jsonl` lists, or all in the folder, each with a .txt beside it."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder: name one with pictures and their captions")
    if (folder / "metadata.jsonl").exists():
        return _listed(folder / "metadata.jsonl")
    pictures = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not pictures:
        raise UserError(
            f"{folder} has no pictures ({', '.join(SUFFIXES)}) and no metadata.jsonl that lists any"
        )
    captions = {path: _text(path.with_suffix(".txt")) for path in pictures}
    if without := [path.name for path, caption in captions.items() if not caption]:
        raise UserError(
            f"{folder}: {len(without)} of {len(pictures)} pictures have no caption ({preview(without)}): put it in "
            f"{Path(without[0]).stem}.txt beside it, or list all in metadata.jsonl"
        )
    return [Item(path, caption) for path, caption in captions.items()]


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8-sig").strip() if path.exists() else ""
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check its name and its rights"
        ) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a text in UTF-8 ({error}): save it as UTF-8") from None


def _listed(path: Path) -> list[Item]:
    """A line: {"image": "b.png", "caption": "...", "references": ["a.png"]}, with paths from the folder of the list; in place
    of references, "control" or "mask" may name a picture."""
    items = []
    text = _text(path)
    for number, line in enumerate(
        text.split("\n") if text else (), start=1
    ):  # not at what else Unicode has for a new line
        try:
            entry = json.loads(line)
            image, caption, references = (
                entry["image"],
                entry["caption"].strip(),
                entry.get("references", []),
            )
            files = [path.parent / name for name in (image, *references)]
            others = {
                kind: path.parent / entry[kind] for kind in ("control", "mask") if kind in entry
            }
            if not caption or not isinstance(references, list):
                raise ValueError
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            raise UserError(
                f'{path}, line {number}, is not {{"image": FILE, "caption": TEXT}}, with "references": [FILE, ...] '
                f'for an edit, "control": FILE or "mask": FILE: {line!r:.120}'
            ) from None
        if strange := entry.keys() - KEYS:
            raise UserError(
                f"{path}, line {number}, has {preview(sorted(map(repr, strange)))}, which means nothing here: the "
                f"names are {', '.join(sorted(KEYS))}"
            )
        if missing := [str(file) for file in (*files, *others.values()) if not file.is_file()]:
            raise UserError(
                f"{path}, line {number}, names {preview(missing)}, where there is no file"
            )
        items.append(Item(files[0], caption, tuple(files[1:]), **others))
    if not items:
        raise UserError(f"{path} is empty: it should list pictures and their captions")
    return items


def bucket(width: int, height: int, size: int) -> tuple[int, int]:
    """The width and height in which a picture is trained on: about size² pixels in its shape, multiples of 16.

    The longer side comes in steps of a sixteenth of `size`, so that many pictures share a size, and a batch.
    """
    step = max(16, size // 256 * 16)
    longer = size * math.sqrt(max(width, height) / min(width, height)) - size
    long = size + step * round(longer / step)
    short = max(64, 16 * round(size * size / long / 16))
    return (long, short) if width >= height else (short, long)


def fit(picture: Image.Image, size: int) -> Image.Image:
    """A picture, scaled to cover its bucket, and cropped about its centre."""
    width, height = bucket(*picture.size, size)
    scale = max(width / picture.width, height / picture.height)
    left, top = (picture.width - width / scale) / 2, (picture.height - height / scale) / 2
    box = (left, top, left + width / scale, top + height / scale)
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def fit_reference(spec: ModelSpec, picture: Image.Image, size: int) -> Image.Image:
    """As at sampling, in proportion: for `size` 1024, Kontext's preferred sizes, and of FLUX.2's at most 1024² pixels."""
    if spec.flux1:
        sides = [side * size / 1024 for side in inputs.preferred_size(*picture.size)]
        return picture.resize(inputs.round_to_16(sides), Image.Resampling.LANCZOS)
    return inputs.fit_reference(picture, size**2)


# ---------------------------------------------------------------------------------------------------------- the cache


class Example(NamedTuple):
    """An item as files of the cache."""

    latents: Path
    features: Path
    references: tuple[Path, ...]
    shape: Hashable  # equal for those that may share a batch
    channels: Path | None = None


class Cache:
    """Latents and text features, each computed once, in a file whose name is a hash of all that it was made of."""

    def __init__(self, folder: Path, pipe: Pipeline, size: int):
        self.folder, self.pipe, self.size = folder, pipe, size
        self.content_of = cache(
            content_of
        )  # a picture is read beside its mask too, and may be before several edits
        self.pixels_by = fingerprint(pipe.image_encoder.files)
        self.text_by = (
            *(fingerprint(network.files) for network in pipe.text.networks),
            pipe.spec.text_length,
            pipe.text.dtype,
        )
        folder.mkdir(parents=True, exist_ok=True)

    def example(self, item: Item) -> Example:
        """UserError for a picture that cannot be read."""
        latents = self.latents(item.picture)
        references = tuple(self.latents(path, reference=True) for path in item.references)
        shape = tuple(read_header(file)[0]["latents"].shape for file in (latents, *references))
        channels = self.channels(item) if self.pipe.spec.image_mode in ("control", "fill") else None
        return Example(
            latents, self.features(item.caption, item.picture.name), references, shape, channels
        )

    def latents(self, path: Path, reference: bool = False) -> Path:
        """Of a picture, (C, h, w), float32."""
        file = self._file("latents", self.content_of(path), reference, self.size, self.pixels_by)
        if not sound(file):
            picture = inputs.read_image(path)
            if max(picture.size) > LONGEST * min(picture.size):
                raise UserError(
                    f"{path} is {picture.width}x{picture.height}: one side may be at most {LONGEST} times the "
                    "other; crop it"
                )
            if reference and not self.pipe.spec.flux1:
                inputs.check_reference(picture, str(path))
            if not reference and 4 * picture.width * picture.height < self.size**2:
                warnings.warn(
                    f"{path} is {picture.width}x{picture.height}, and enlarged for --size {self.size}",
                    stacklevel=2,
                )
            fitted = (
                fit_reference(self.pipe.spec, picture, self.size)
                if reference
                else fit(picture, self.size)
            )
            write(file, {"latents": self._encode(to_pixels(fitted))[0]})
        return file

    def channels(self, item: Item) -> Path:
        """What Fill, Canny and Depth read beside the latents, (L, C'), float32; UserError if it is of another size."""
        other, spec = item.control or item.mask, self.pipe.spec
        contents = [self.content_of(path) for path in (item.picture, other) if path]
        file = self._file(
            "channels", contents, spec.image_mode, spec.control, self.size, self.pixels_by
        )
        if not sound(file):
            picture = beside = inputs.read_image(item.picture)
            if spec.image_mode == "fill":
                beside = (
                    inputs.read_mask(item.mask) if item.mask else a_mask(picture.size, contents[0])
                )
            elif item.control:
                beside = inputs.read_image(item.control)
            if beside.size != picture.size:
                raise UserError(
                    f"{other} is {beside.width}x{beside.height}, and {item.picture} {picture.width}x"
                    f"{picture.height}: make them of one size"
                )
            if spec.image_mode == "fill":
                inputs.require_nonempty_mask(beside, str(item.mask))
            picture, beside = fit(picture, self.size), fit(beside, self.size)
            if spec.image_mode == "fill":
                mask = to_mask(beside)
                channels = conditioning.fill_channels(
                    self._encode(to_pixels(picture) * (1 - mask)), mask
                )
            else:
                pixels = (
                    to_pixels(beside) if item.control else control_pixels(spec.control, picture)
                )
                channels = rearrange(self._encode(pixels), "1 c h w -> 1 (h w) c")
            write(file, {"channels": channels[0]})
        return file

    @torch.inference_mode()
    def _encode(self, pixels: Tensor) -> Tensor:
        return self.pipe.image_encoder().encode(pixels.to(self.pipe.device)).cpu()

    def features(self, caption: str, name: str = "--prompt") -> Path:
        """Of a caption, (T, D) and, in FLUX.1, the pooled (V,); `name` is for what the tokenizer may have to say."""
        file = self._file("text", caption, self.text_by)
        if not sound(file):
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                try:
                    features = self.pipe.text.encode([caption])
                except UserError as error:
                    raise UserError(f"{name}: {error}") from None
            for warning in caught:
                warnings.warn(f"{name}: {warning.message}", stacklevel=2)
            self.pipe.text.cache.pop(caption)  # the file keeps it
            write(file, {key: x[0] for key, x in features._asdict().items() if x is not None})
        return file

    def _file(self, kind: str, *parts) -> Path:
        return (
            self.folder
            / f"{kind}-{hashlib.sha256(repr(parts).encode()).hexdigest()[:40]}.safetensors"
        )


def sound(file: Path) -> bool:
    """Whether it is there, and whole: what is damaged is made anew."""
    try:
        return file.exists() and bool(read_header(file))
    except UserError:
        return False


def content_of(path: Path) -> str:
    """Its hash. UserError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(
            f"{path} cannot be read ({error.strerror}): check its name and its rights"
        ) from None


def a_mask(size: tuple[int, int], content: str) -> Image.Image:
    """A white rectangle on black, of a third of each side at least, and where chance has it, often at a border, as what is
    painted outwards is: always the same in a picture."""
    draw, corners = generator(int(content[:12], 16)), []
    for side in size:
        length, place = torch.rand(2, generator=draw).tolist()
        length = round(side * (1 + 2 * length) / 3)
        corners.append((round(min(max(1.5 * place - 0.25, 0), 1) * (side - length)), length))
    (left, width), (top, height) = corners
    mask = Image.new("L", size, 0)
    mask.paste(255, (left, top, left + width, top + height))
    return mask


def fingerprint(files: Sequence[Path]) -> str:
    """Of weights, by their headers and sixteen pieces of each file: a hash of all of 20 GB would take a minute."""
    digest = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        with path.open("rb") as file:
            for start in sorted({0, *(size * k // 16 for k in range(16)), max(0, size - 65536)}):
                file.seek(start)
                digest.update(file.read(65536))
        digest.update(repr((path.suffix, size)).encode())
    return digest.hexdigest()


def batch_of(examples: Sequence[Example], axes: int) -> Batch:
    """Examples of one shape, from the cache."""
    latents = torch.stack([load(e.latents)["latents"] for e in examples])
    batch, references = (
        Batch(latents, features_of(examples)),
        [references_of(e, axes) for e in examples],
    )
    if references[0]:
        batch = batch._replace(
            references=torch.cat([tokens for tokens, _ in references]),
            reference_ids=references[0][1],
        )
    return batch._replace(channels=channels_of(examples))


def features_of(examples: Sequence[Example]) -> TextFeatures:
    texts = [load(e.features) for e in examples]
    pooled = torch.stack([x["pooled"] for x in texts]) if "pooled" in texts[0] else None
    return TextFeatures(torch.stack([x["tokens"] for x in texts]), pooled)


def channels_of(examples: Sequence[Example]) -> Tensor | None:
    """(B, L, C'), if the model reads any beside the latents."""
    return (
        torch.stack([load(e.channels)["channels"] for e in examples])
        if examples[0].channels
        else None
    )


def references_of(example: Example, axes: int) -> tuple[Tensor, Tensor] | None:
    """Tokens (1, R, C) and coordinates (R, axes) of all references, if there are any."""
    latents = [load(file)["latents"][None] for file in example.references]
    return conditioning.reference_tokens(latents, axes) if latents else None


def order(shapes: Sequence[Hashable], size: int, seed: int, epoch: int) -> list[list[int]]:
    """Numbers of the examples in each batch of an epoch: all are there, and those of a batch have one shape.

    The last batch of a shape is filled up with its first examples.
    """
    draw, members = generator(seed, epoch), defaultdict(list)
    for number in torch.randperm(len(shapes), generator=draw).tolist():
        members[shapes[number]].append(number)

    def filled(each, start):
        return [each[(start + k) % len(each)] for k in range(size)]

    made = [filled(each, start) for each in members.values() for start in range(0, len(each), size)]
    return [made[number] for number in torch.randperm(len(made), generator=draw).tolist()]


@dataclass
class Draws:
    """`draws(n)` is all that chance decides of the n-th batch of a run, which counts from 0."""

    examples: Sequence[Example]
    size: int  # of a batch
    seed: int
    axes: int  # of coordinates
    empty: Path  # features of the empty caption
    dropped: float = (
        0.0  # the share of captions that it takes the place of, for classifier-free guidance
    )
    known: tuple[int, list[list[int]]] = (-1, [])  # the last epoch, and its order

    def __call__(self, number: int) -> tuple[Batch, Tensor, Tensor]:
        """A batch, standard normal numbers (B,) for its times, and its noise (B, C, h, w)."""
        epoch, place = divmod(number, self.count)
        chosen = [self.examples[row] for row in self._order(epoch)[place]]
        draw = generator(self.seed, number, 0)
        dropped = (torch.rand(self.size, generator=draw) < self.dropped).tolist()
        chosen = [
            e._replace(features=self.empty) if drop else e
            for e, drop in zip(chosen, dropped, strict=True)
        ]
        batch = batch_of(chosen, self.axes)
        return (
            batch,
            torch.randn(self.size, generator=draw),
            torch.randn(batch.latents.shape, generator=draw),
        )

    @cached_property
    def count(self) -> int:
        """Batches in an epoch."""
        return len(self._order(0))

    def _order(self, epoch: int) -> list[list[int]]:
        if self.known[0] != epoch:
            self.known = epoch, order([e.shape for e in self.examples], self.size, self.seed, epoch)
        return self.known[1]
