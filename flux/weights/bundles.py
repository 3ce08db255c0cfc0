"""Checkpoints of a whole model: ComfyUI saves the transformer and all else in one file."""

import warnings
from collections.abc import Container
from pathlib import Path

from flux.configs import ModelSpec
from flux.weights.families import looks_like
from flux.weights.files import preview
from flux.weights.load import read_headers, split_parts

PARTS = {  # what a part of a file looks like -> the part of `locate`
    "a CLIP text encoder": "clip",
    "a T5 text encoder": "t5",
    "a language model": "model",
    "an autoencoder": "autoencoder",
    "an autoencoder in diffusers' layout": "autoencoder",
}


def bundled_parts(
    files: list[Path], spec: ModelSpec, given: Container[str] = ()
) -> dict[str, list[Path]]:
    """Return `files` for each other network of `spec` that lies in the transformer's files.

    A warning names these networks. `given`: parts that come from other files.
    """
    infos, _ = read_headers(files)
    found = {}
    for prefix, tensors in split_parts(infos).items():
        part = PARTS.get(looks_like(tensors), "")
        if part in (*spec.text.networks, "autoencoder") and part not in given:
            found[part] = f"{prefix}*"
    if found:
        listed = preview(list(found.values()))
        warnings.warn(
            f"{files[0]} also holds other networks, which are used: {listed}", stacklevel=3
        )
    return dict.fromkeys(found, files)
