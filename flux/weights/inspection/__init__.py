"""Say of any file what it is, what it fits and why it would be refused. Only headers are read.

    found = inspect(path)
    found.lines     # ("kind", "a transformer of FLUX.1"), ("tensors", "780, BF16"), ...
    found.refusal   # of a file that is not understood, else ""

What would be refused is told by the error of the code that loads such a file.
"""

import re
from collections.abc import Mapping
from pathlib import Path

from flux.errors import UserError
from flux.plain_files import require_plain_file
from flux.weights import families
from flux.weights.files import SHARD, TensorInfo, is_index, read_header, shard_files
from flux.weights.inspection.loras import inspect_lora
from flux.weights.inspection.networks import inspect_one, inspect_parts, inspect_transformer
from flux.weights.inspection.other_files import (
    describe_tokenizer,
    identify_json,
    inspect_capture,
    inspect_image,
    inspect_kit,
    inspect_tokenizer,
)
from flux.weights.inspection.report import MAX_LISTED, Describe, Inspection, inspect_plain
from flux.weights.load import infer_config, read_headers, split_parts

CHECKPOINT = re.compile(r"(model|ema|average|optimizer)\.")  # names in a training run's file
CACHED = {"latents", "channels", "tokens", "pooled"}  # names in the files of its cache
IMAGE = re.compile(rb"\x89PNG|\xff\xd8\xff|RIFF....WEBP|GIF8|BM|II\*\0|MM\0\*|....ftyp", re.DOTALL)
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif")
TOKENIZER_FILES = ("tokenizer.json", "spiece.model", "vocab.json", "merges.txt", "tekken.json")
TRANSFORMERS = (
    "a FLUX.1 transformer",
    "a FLUX.2 transformer",
    "a FLUX 3 transformer",
    "a transformer in diffusers' layout",
)


def inspect(path: Path) -> Inspection:
    """Describe a file, or a folder. Never raises UserError: see `Inspection.refusal`."""
    found = Inspection()
    try:
        if path.is_dir():
            _inspect_folder(path, found)
        else:
            _inspect_file(path, found)
    except UserError as error:
        found.refusal = str(error)
    return found


def _inspect_file(path: Path, found: Inspection) -> None:
    require_plain_file(path, "a file or a folder")
    found.add("file", f"{path}, {path.stat().st_size:,} bytes")
    kind, describe = _identify(path)
    found.add("kind", kind)
    describe(path, found)


def _identify(path: Path) -> tuple[str, Describe]:
    """Return what a file is, and what describes such a file. UserError if it is not understood."""
    try:
        with require_plain_file(path).open("rb") as file:
            start = file.read(16)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}).") from None
    if path.name in TOKENIZER_FILES:
        return f"a file of a tokenizer, {describe_tokenizer(path.parent)[0]}", inspect_tokenizer
    if is_index(path) or start[:4] == b"GGUF" or start[8:9] == b"{":
        return _identify_tensors(path)
    if IMAGE.match(start) or path.suffix.lower() in IMAGE_SUFFIXES:
        from flux.image_io.input import open_image

        with open_image(path) as image:
            kind = f"an image: {image.format}, {image.width}x{image.height}, {image.mode}"
        return kind, inspect_image
    if path.suffix == ".json":
        return identify_json(path), _no_more
    read_header(path)  # raises an error that says what the file is
    raise AssertionError(path)


def _no_more(path: Path, found: Inspection) -> None:
    """There is no more to say."""


# ---------------------------------------------------------------- files of tensors


def _identify_tensors(path: Path) -> tuple[str, Describe]:
    from flux.parity.capture_file import KEY

    infos, metadata = read_headers(shard_files(path))
    names = set(infos)
    if KEY in metadata:
        return "a capture of a run (`parity.py`)", inspect_capture
    if {"step", "sha256"} <= metadata.keys() and all(map(CHECKPOINT.match, names)):
        return "a checkpoint of a training run, which `train.py` resumes", inspect_plain
    if {"name", "sha256"} <= metadata.keys() and names <= CACHED:
        return "an encoded image or caption, of a training run's cache", inspect_plain
    if names == {"latents"}:
        return "the latents of an image, as --save-latents writes them", inspect_plain
    if any(map(families.is_lora_name, names)):
        foreign = families.foreign_family(names)
        return f"a LoRA of {foreign}" if foreign else "a LoRA", inspect_lora
    parts = split_parts(infos)
    main = families.looks_like(_without(infos, parts))
    if main in TRANSFORMERS:
        return main, inspect_transformer
    if main == "something else" and parts:
        return "other networks than a transformer, without one", inspect_parts
    if main == "something else":
        infer_config(path)  # raises the error of a file that no network has written
    return main, inspect_one


def _without(
    infos: Mapping[str, TensorInfo], parts: Mapping[str, Mapping[str, TensorInfo]]
) -> dict[str, TensorInfo]:
    """Return the tensors that are in no part."""
    inside = {f"{prefix}{name}" for prefix, part in parts.items() for name in part}
    return {name: info for name, info in infos.items() if name not in inside}


# ---------------------------------------------------------------- folders


def _inspect_folder(folder: Path, found: Inspection) -> None:
    found.add("folder", folder)
    names = _names(folder)
    kind, describe = _identify_folder(folder, names)
    found.add("kind", kind)
    describe(folder, found)
    if describe is _no_more:
        for name in names[:MAX_LISTED]:
            found.add(name, _brief(folder / name))
        if not names:
            raise UserError(f"{folder}: is an empty folder.")


def _names(folder: Path) -> list[str]:
    try:
        names = sorted(file.name for file in folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror}).") from None
    return [name for name in names if not name.startswith((".", "@"))]


def _identify_folder(folder: Path, names: list[str]) -> tuple[str, Describe]:
    if "adapter_model.safetensors" in names:
        return "a PEFT adapter: a LoRA", inspect_lora
    if {"expected.safetensors", "README.md", "run.safetensors"} <= set(names):
        kit = "a golden kit for a port (`parity.py golden-kit`)"
        return kit, inspect_kit
    if set(names) & set(TOKENIZER_FILES):
        return "the files of a tokenizer", inspect_tokenizer
    if any(SHARD.fullmatch(name) or name.endswith(".index.json") for name in names):
        return _identify_tensors(folder)
    return f"a folder of {len(names)} files", _no_more


def _brief(path: Path) -> str:
    try:
        if path.is_dir():
            return _identify_folder(path, _names(path))[0]
        return _identify(path)[0]
    except UserError as error:
        return f"not understood: {error}"
