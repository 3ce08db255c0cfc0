"""The metadata of images that a pipeline makes in Python, the same as scripts/sample.py writes."""

from argparse import Namespace
from functools import lru_cache
from pathlib import Path
from typing import Any

from flux.image_io.metadata import (
    IMAGE_OPTIONS,
    PARTS,
    describe,
    describe_file,
    describe_files,
    short,
)
from flux.image_io.request import ImageInputs
from flux.transformer import NUMERICS


def describe_call(
    pipe: Any, images: Any, width: int, height: int, steps: int, guidance: Any, **given: Any
) -> dict:
    """Return the metadata of an image of a call, without its prompt and seed.

    `given`: negative_prompt, true_cfg_scale, solver, sigmas and shift. What no file holds cannot be
    made again: input images in memory, a solver that is a function, a text encoder in Python.
    """
    options, loras = pipe.options, pipe._loras
    presets = [name for name, numerics in NUMERICS.items() if numerics == pipe.numerics]
    solver = given["solver"]
    given["true_cfg_scale"] = _plain(given["true_cfg_scale"])
    args = Namespace(
        **given | {"solver": solver if isinstance(solver, str) else repr(solver)},
        numerics=presets[0] if presets else "custom",
        decode_dtype=options.decode_dtype and short(options.decode_dtype),
        quantize=options.quantize,
        fp8_matmul=options.fp8_matmul,
        compile=options.compile,
        vae_tile=options.vae_tile,
        image=[],
        mask=None,
        latents=None,
        **{part: pipe.replaced.get(part) for part in PARTS},
    )
    metadata = describe(args, pipe, "", width, height, steps, guidance, 0)
    files: dict[str, Any] = dict(images=[], mask=None, loras=[])
    for path, (_, scale) in loras.files.items():
        if path not in loras.builtin:
            changed = path.stat().st_mtime_ns
            files["loras"].append(_lora(path, scale, path in loras.lenient, changed))
    if images is not None:
        inputs = images if isinstance(images, ImageInputs) else ImageInputs(images)
        given_images = inputs.images
        if isinstance(given_images, str | Path) or not isinstance(given_images, list | tuple):
            given_images = [given_images]
        files["images"] = _described(given_images)
        if inputs.mask is not None:  # False: of no file, so the image cannot be made again
            described = _described([inputs.mask])
            files["mask"] = described[0] if described else False
        metadata["image_options"] = {name: _plain(getattr(inputs, name)) for name in IMAGE_OPTIONS}
    return metadata | files


@lru_cache(maxsize=64)
def _lora(path: Path, scale: float, ignore_unmatched: bool, changed: int) -> dict:
    """Describe a LoRA; its hash takes a second for each GB, so a file is read once."""
    args = Namespace(
        lora=[(path, scale)],
        lora_ignore_unmatched=ignore_unmatched,
        image=[],
        mask=None,
        latents=None,
    )
    return describe_files(args)["loras"][0]


def _plain(value: Any) -> Any:
    """Return numbers of other libraries, or texts that spell one, as plain numbers."""
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return float(value)
    value = value.tolist() if hasattr(value, "tolist") else value
    return list(map(_plain, value)) if isinstance(value, list | tuple) else value


def _described(images: Any) -> list[dict] | None:
    """Return the descriptions of image files; None if one is no file."""
    if not all(isinstance(image, str | Path) for image in images):
        return None
    return [describe_file(Path(image)) for image in images]
