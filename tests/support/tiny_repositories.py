"""Folders that look like the released repositories, of tiny networks with random weights."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from support.tokenizer_files import make_clip, make_mistral, make_qwen, make_t5

from flux.configs import MODELS
from flux.parity.reference import networks, tiny_models, write_weights


def home(folder: Path, name: str) -> Path:
    """The folder of a model's repository inside `folder`."""
    return folder / MODELS[name].repository.split("/")[1]


def write_tokenizers(folder: Path, name: str) -> int:
    """Write tiny tokenizers in the released formats. Return the last id of CLIP's, or 0."""
    (folder / "tokenizer").mkdir(parents=True)
    if not name.startswith("flux.1"):
        make = make_mistral if name == "flux.2-dev" else make_qwen
        make(folder / "tokenizer")
        return 0
    (folder / "tokenizer_2").mkdir()
    make_clip(folder / "tokenizer")
    make_t5(folder / "tokenizer_2")
    return len(json.loads((folder / "tokenizer/vocab.json").read_text())) - 1


@contextmanager
def tiny_repositories(
    folder: Path, names, dtype: torch.dtype = torch.float32, **sizes: int
) -> Iterator[Path]:
    """Write a repository for each name; inside the block, flux.MODELS describes these tiny models.

    `sizes`: fields of the transformer's config to replace, such as `depth=1`.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        for name in names:
            spec = tiny_models(write_tokenizers(home(folder, name), name))[name]
            spec = replace(spec, transformer=replace(spec.transformer, **sizes))
            patch.setitem(MODELS, name, spec)
            parts = {part: network.to(dtype) for part, network in networks(spec).items()}
            write_weights(home(folder, name), spec, parts, sharded=False)
        yield folder
