"""From the prompt to the file, by tiny models in the layouts of released ones: what is spent around the networks."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch
from support.tiny_repositories import home, write_tokenizers
from support.tokenizer_files import MISTRAL_TEMPLATE

import flux
from benchmarks.measure import peak_bytes
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.timing import by_turns
from flux.configs import MODELS
from flux.image_io import output as images
from flux.parity import reference
from flux.pipeline import Pipeline

NAMES = ("flux.1-dev", "flux.2-klein-4b")
PROMPT, SIDE, STEPS = "a photo of a cat", 256, 4


def pipeline_rows(setting: Setting) -> Iterator[Row]:
    for name in NAMES:
        with (
            TemporaryDirectory() as folder,
            pipelines(name, Path(folder), setting.device) as (ours, theirs),
        ):
            yield from prompt_rows(name, ours, theirs, Path(folder), setting)


@contextmanager
def pipelines(name: str, folder: Path, device: torch.device):
    """Ours, loaded from a repository with random weights, and diffusers' with the same, both in float32."""
    repository = home(folder, name)
    spec = reference.tiny_models(write_tokenizers(repository, name))[name]
    parts = reference.networks(spec)
    text = reference.diffusers_text(spec, parts, repository, MISTRAL_TEMPLATE)
    whole = parts | ({"model": text["text_encoder"]} if "model" in parts else {})
    reference.write_weights(repository, spec, whole)
    with patch.dict(MODELS, {name: spec}):
        ours = flux.load(name, weights=folder, device=str(device), dtype=torch.float32)
        yield ours, reference.diffusers_pipeline(spec, parts, text).to(device)


def prompt_rows(name: str, ours: Pipeline, theirs, folder: Path, setting: Setting) -> Iterator[Row]:
    """Time from the prompt to the PNG, and the peak of activations of all that; text is encoded anew each time."""
    limits = dict(max_sequence_length=ours.spec.text_length)
    if not ours.spec.flux1:
        limits |= dict(text_encoder_out_layers=ours.spec.text.model.layers, guidance_scale=1.0)

    def mine() -> None:
        ours.text.cache.clear()
        image = ours(PROMPT, SIDE, SIDE, STEPS)[0]
        images.save(image, folder / "ours.png", {"prompt": PROMPT}).unlink()

    def other() -> None:
        generator = torch.Generator().manual_seed(0)
        made = theirs(
            prompt=PROMPT,
            width=SIDE,
            height=SIDE,
            num_inference_steps=STEPS,
            generator=generator,
            **limits,
        )
        made.images[0].save(folder / "theirs.png")

    case = f"prompt to PNG, {name}, tiny networks, {STEPS} steps, {SIDE}x{SIDE}"
    yield Row(
        case, "s", *by_turns([mine, other], setting.rounds, setting.enough), runs=2 * setting.rounds
    )
    yield Row(f"{case}, peak of activations", "B", peak_bytes(mine), peak_bytes(other))
