"""Tiny FLUX 3 models in their repository's files, with our pipeline and diffusers'."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.tokenizer_files import make_qwen

import flux
from flux.configs import MODELS
from flux.parity.reference import DEPTH
from flux.parity.reference3 import (
    QwenVLProcessor,
    diffusers_pipeline3,
    networks3,
    qwen_vl_with,
    tiny_models3,
    transformers_qwen_vl,
)

BASE, DISTILLED = "flux.3-image-klein-base", "flux.3-image-klein"


@contextmanager
def both_models(folder: Path) -> Iterator[dict[str, "Flux3Model"]]:
    """Make a tiny base and a tiny distilled model in `folder`; they stay in the table meanwhile."""
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        yield {name: Flux3Model(name, folder, patch) for name in (BASE, DISTILLED)}


class Flux3Model:
    """A tiny row of the table, its networks, and its files in `home`, as released.

    The text encoder's file is the whole Qwen3-VL: with more layers and an image encoder.
    """

    def __init__(self, name: str, folder: Path, patch, dtype: torch.dtype = torch.float32):
        self.spec = tiny_models3()[name]
        patch.setitem(MODELS, name, self.spec)
        self.folder, self.home = folder, folder / self.spec.repository.split("/")[1]
        self.dtype, parts = dtype, networks3(self.spec)
        self.parts = {
            part: network if part == "autoencoder" else network.to(dtype)
            for part, network in parts.items()
        }
        (self.home / "text_encoder").mkdir(parents=True)
        make_qwen(self.home / "text_encoder")
        self.qwen = qwen_vl_with(
            transformers_qwen_vl(self.spec.text.model, DEPTH), self.parts["model"].state_dict()
        )
        text = dict(self.qwen.state_dict())
        del text["lm_head.weight"]  # tied to the embedding, and not saved
        save_file(text, self.home / "text_encoder/model.safetensors")
        save_file(self.parts["transformer"].state_dict(), self.home / "model.safetensors")
        save_file(self.parts["autoencoder"].state_dict(), self.home / "ae.safetensors")

    def load(self, **options) -> flux.Pipeline:
        options = dict(weights=self.folder, device="cpu", dtype=self.dtype) | options
        return flux.load(self.spec.name, **options)

    @cached_property
    def theirs(self):
        """diffusers' pipeline."""
        import transformers

        tokenizer = transformers.Qwen2TokenizerFast.from_pretrained(self.home / "text_encoder")
        text = {"text_encoder": self.qwen, "tokenizer": QwenVLProcessor(tokenizer)}
        return diffusers_pipeline3(self.spec, self.parts, text)
