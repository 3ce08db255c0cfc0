"""Images of prompts during training, sampled as the pipeline samples them, and their scores."""

import itertools
from pathlib import Path

import numpy as np
import torch
from modules.command_line import say
from torch import Tensor

from flux import sampling, toy
from flux.autoencoder import AutoEncoder
from flux.configs import ModelSpec
from recipe.images import contact_sheet, to_images, to_pixels
from recipe.networks import Networks, expanded
from recipe.text import Tokenizer, Words
from recipe.trainer import device_of


class Sampler:
    """Samples images with the networks in training."""

    def __init__(self, spec: ModelSpec, autoencoder: AutoEncoder, words: Tokenizer):
        self.spec, self.autoencoder, self.words = spec, autoencoder, words
        self.edits = spec.image_mode == "reference"
        self.device = device_of(autoencoder)
        self.empty = self.words_of([""])

    def words_of(self, prompts: list[str]) -> Words:
        return {name: x.to(self.device) for name, x in self.words(prompts).items()}

    def sheet(self, networks: Networks, path: Path) -> None:
        """Save a sheet of complete scenes, of open prompts, and of edits, if supported.

        Print their scores.
        """
        scenes = list(itertools.islice(toy.scenes(7, held=True, complete=True), 40))
        prompts = toy.open_prompts()[::6][:70]
        drawn = [
            self.images(networks, list(map(str, scenes))),
            self.images(networks, [prompt.text for prompt in prompts]),
        ]
        reports = [
            toy.score(drawn[0], scenes),
            toy.score(drawn[1], [prompt.scene for prompt in prompts]),
        ]
        if self.edits:
            edits = list(itertools.islice(toy.edits(7, held=True), 40))
            drawn.append(self.edited(networks, edits))
            reports.append(toy.score_edits(drawn[2], edits))
        contact_sheet(path, np.concatenate(drawn), 10)
        for report in reports:
            shares = "  ".join(f"{name} {share:.0%}" for name, share in report.items())
            say("", shares)

    def edited(self, networks: Networks, edits: list[toy.Edit]) -> np.ndarray:
        """Return the results of edits, whose images are drawn here, (N, H, W, 3) uint8."""
        rng, size, drawn = np.random.default_rng(0), self.spec.size, []
        for edit in edits:
            before = [toy.draw(layout, size, size, rng) for layout in edit.before]
            pixels = to_pixels(np.stack(before))
            with torch.no_grad():
                references = self.autoencoder.encode(pixels.to(self.device))[None]
            drawn.append(self.images(networks, [str(edit)], references))
        return np.concatenate(drawn)

    @torch.no_grad()
    @torch.compiler.set_stance("force_eager")  # too few passes to pay for another compilation
    def images(
        self, networks: Networks, prompts: list[str], references: Tensor | None = None
    ) -> np.ndarray:
        """Return images (N, H, W, 3) uint8. Image k has seed k. References are (1, R, C, h, w)."""
        spec, side, count = self.spec, self.spec.size // 16, len(prompts)
        features, empty = (networks.text(**words) for words in (self.words_of(prompts), self.empty))
        empty = expanded(empty, count)
        x = sampling.noise(
            range(count), spec.autoencoder.latent_channels, side, side, spatial=spec.flux1
        )
        times = sampling.schedule(spec.schedule, spec.steps, side * side)

        def velocity(x: Tensor, t: float) -> Tensor:
            t = torch.full((count,), t, device=self.device)
            if networks.transformer.config.guidance:
                return networks.velocity(features, x, t, guidance=spec.guidance)
            return networks.guided(features, empty, x, t, spec.guidance, references)

        latents = sampling.denoise(velocity, x.to(self.device), times)
        return np.concatenate([to_images(self.autoencoder.decode(z)) for z in latents.split(8)])
