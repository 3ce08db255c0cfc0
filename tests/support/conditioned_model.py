"""A tiny model in its repositories' files, with our pipeline and diffusers' pipelines."""

import inspect
from dataclasses import replace

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from safetensors.torch import save_file
from support.model_zoo import TINY_REDUX, TINY_SIGLIP
from support.tiny_repositories import write_tokenizers
from torch import Tensor

import flux
from flux import sampling
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
    diffusers_pipeline,
    networks,
    randomise,
    write_weights,
)
from flux.siglip import Redux, SigLIP
from flux.text_encoder import TextFeatures

WIDTH, HEIGHT, STEPS, SEEDS = 96, 64, 4, (5, 6)

KLEIN = replace(KLEIN_TINY, context_dim=TINY_QWEN.features)
TRANSFORMERS = {
    "flux.1-dev": FLUX1_TINY,
    "flux.1-fill-dev": replace(FLUX1_TINY, in_channels=384),
    "flux.1-canny-dev": replace(FLUX1_TINY, in_channels=128),
    "flux.1-kontext-dev": FLUX1_TINY,
    "flux.1-redux-dev": FLUX1_TINY,
    "flux.2-dev": replace(KLEIN, guidance=True),
    "flux.2-klein-4b": KLEIN,
    "flux.2-klein-9b-kv": KLEIN,
    "flux.2-klein-base-4b": KLEIN,
}


class Model:
    """A tiny model in its repositories' files; `ours` and `theirs`: pipelines for text to image."""

    def __init__(self, name: str, folder, patch):
        home = folder / MODELS[name].repository.split("/")[1]
        flux1 = name.startswith("flux.1")
        last = write_tokenizers(home, "flux.1-dev" if flux1 else name)
        text = (
            FLUX1Text(TINY_T5, replace(TINY_CLIP, eos_id=last))
            if flux1
            else FLUX2Text(TINY_MISTRAL if name == "flux.2-dev" else TINY_QWEN)
        )
        self.spec = replace(
            MODELS[name],
            transformer=TRANSFORMERS[name],
            text=text,
            text_length=64,
            autoencoder=TINY_AE1 if flux1 else TINY_AE2,
        )
        patch.setitem(MODELS, name, self.spec)
        self.parts = networks(self.spec)
        write_weights(home, self.spec, self.parts)
        if self.spec.addon:
            self.write_redux(folder / self.spec.addon.repository.split("/")[1])
        self.ours = flux.load(name, weights=folder, device="cpu", dtype=torch.float32)
        self.theirs = diffusers_pipeline(self.spec, self.parts)
        self.flux1 = flux1

    def write_redux(self, home):
        self.siglip, self.redux = randomise(SigLIP(TINY_SIGLIP)), randomise(Redux(TINY_REDUX))
        (home / "image_encoder").mkdir(parents=True)
        save_file(self.siglip.state_dict(), home / "image_encoder/model.safetensors")
        save_file(self.redux.state_dict(), home / "flux1-redux-dev.safetensors")

    def features(self, seed: int = 1, rows: int = len(SEEDS)) -> TextFeatures:
        config, generator = self.spec.transformer, torch.Generator().manual_seed(seed)
        pooled = torch.randn(rows, config.vector_dim, generator=generator) if self.flux1 else None
        return TextFeatures(torch.randn(rows, 7, config.context_dim, generator=generator), pooled)

    def variant(self, family: str, patch):
        """Return another of diffusers' pipelines, with the same parts and the posterior's mean."""
        import diffusers

        kind, posterior = (
            getattr(diffusers, family),
            diffusers.models.autoencoders.vae.DiagonalGaussianDistribution,
        )
        patch.setattr(posterior, "sample", lambda self, generator=None: self.mean)
        takes = inspect.signature(kind).parameters
        distilled = {"is_distilled": not self.spec.cfg} if "Klein" in family else {}
        pipe = kind(
            **{part: value for part, value in self.theirs.components.items() if part in takes},
            **distilled,
        )
        pipe.set_progress_bar_config(disable=True)
        return pipe


def grid(tokens: Tensor, height: int) -> Tensor:
    """Arrange tokens (B, hw, C) as (B, C, h, w)."""
    return rearrange(tokens, "b (h w) c -> b c h w", h=height // 16)


def noise(model, seeds, width: int = WIDTH, height: int = HEIGHT) -> Tensor:
    """Return our noise as diffusers takes it: FLUX.1 as tokens, FLUX.2 as a grid."""
    channels = model.spec.autoencoder.latent_channels
    h, w = height // 16, width // 16
    drawn = sampling.noise(seeds, channels, h, w, spatial=model.flux1)
    return rearrange(drawn, "b c h w -> b (h w) c").contiguous() if model.flux1 else drawn


def levels(a: Image.Image, b: Image.Image) -> int:
    """Return the largest difference of two images, of 255."""
    assert a.size == b.size and a.mode == b.mode == "RGB"
    return int(np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max())
