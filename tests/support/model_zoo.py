"""Repositories of tiny random models under the released names, for tests that need many models."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from support.lora_files import control_lora
from support.tiny_repositories import write_tokenizers

import flux
from flux.configs import MODELS, FLUX1Text, FLUX2Text
from flux.parity.reference import (
    FLUX1_TINY,
    KLEIN_TINY,
    TINY_AE1,
    TINY_AE2,
    TINY_CLIP,
    TINY_MISTRAL,
    TINY_QWEN,
    TINY_T5,
    networks,
    randomise,
    write_weights,
)
from flux.pipeline import Pipeline
from flux.siglip import Redux, ReduxConfig, SigLIP, SigLIPConfig

FILL, REDUX, KONTEXT = "flux.1-fill-dev", "flux.1-redux-dev", "flux.1-kontext-dev"
KLEIN, BASE, KV = "flux.2-klein-4b", "flux.2-klein-base-4b", "flux.2-klein-9b-kv"
CONTROL = {"flux.1-canny-dev", "flux.1-depth-dev", "flux.1-canny-dev-lora", "flux.1-depth-dev-lora"}
FLUX2 = {name for name in MODELS if name.startswith("flux.2")}
FLUX3 = {name for name in MODELS if name.startswith("flux.3")}
START = {"flux.1-schnell", "flux.1-dev", "flux.1-krea-dev", "flux.1-tiny"}
RELEASED = dict(MODELS)  # before tiny rows take the place of some

TINY_SIGLIP = SigLIPConfig(image_size=60, hidden_size=48, num_heads=4, mlp_size=80, depth=2)
TINY_REDUX = ReduxConfig(48, 3 * FLUX1_TINY.context_dim, FLUX1_TINY.context_dim)
SMALL_KONTEXT_SIZES = [(64, 144), (80, 96), (96, 80), (144, 64)]  # that a test can generate


class Zoo:
    """Tiny random models, each written when it is first used."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.patch = folder, patch
        self.pipes: dict[str, Pipeline] = {}

    def __call__(self, name: str) -> tuple:
        """Return the flags that choose a model."""
        if name == "flux.2-tiny":
            return ()
        if name not in self.pipes:
            self.write(name)
            self.pipes[name] = self.load(name)
        return "--model", name, "--weights", self.folder, "--dtype", "float32"

    def load(self, name: str, dtype: torch.dtype = torch.float32) -> Pipeline:
        return flux.load(name, weights=self.folder, device="cpu", dtype=dtype)

    def pipe(self, name: str) -> Pipeline:
        self(name)
        if name not in self.pipes:
            self.pipes[name] = flux.load(name, device="cpu")
        return self.pipes[name]

    def write(self, name: str) -> None:
        row, flux1 = MODELS[name], name.startswith("flux.1")
        home = self.folder / row.repository.split("/")[1]
        if not home.exists():
            write_tokenizers(home, "flux.1-dev" if flux1 else name)
        last = len(json.loads((home / "tokenizer/vocab.json").read_text())) - 1 if flux1 else 0
        language_model = TINY_MISTRAL if name == "flux.2-dev" else TINY_QWEN
        tiny = FLUX1_TINY if flux1 else replace(KLEIN_TINY, context_dim=TINY_QWEN.features)
        released = row.transformer
        channels = tiny.in_channels * released.in_channels // released.out_channels
        clip = replace(TINY_CLIP, eos_id=last)
        spec = replace(
            row,
            transformer=replace(tiny, in_channels=channels, guidance=released.guidance),
            text=FLUX1Text(TINY_T5, clip) if flux1 else FLUX2Text(language_model),
            text_length=24 if flux1 else 256,
            autoencoder=TINY_AE1 if flux1 else TINY_AE2,
            size=96,
        )
        self.patch.setitem(MODELS, name, spec)
        parts = networks(spec)
        if not (home / spec.transformer_file).exists():  # several rows share FLUX.1-dev
            write_weights(home, spec, parts)
        if spec.addon:
            self.write_addon(spec, parts["transformer"])

    def write_addon(self, spec, transformer) -> None:
        home = self.folder / spec.addon.repository.split("/")[1]
        (home / "image_encoder").mkdir(parents=True)
        files = {part: home / file for part, file in spec.addon.files}
        if "lora" in files:
            control_lora(files["lora"], transformer)
        else:
            save_file(randomise(SigLIP(TINY_SIGLIP)).state_dict(), files["siglip"])
            save_file(randomise(Redux(TINY_REDUX)).state_dict(), files["redux"])
