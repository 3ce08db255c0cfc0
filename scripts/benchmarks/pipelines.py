"""From the prompt to the file, by tiny models in released layouts: the cost around the networks."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory
from unittest.mock import patch

import torch

import flux
from benchmarks.measure import peak_bytes
from benchmarks.rows import Row
from benchmarks.setting import Setting
from benchmarks.timing import by_turns
from flux.configs import EMBEDDED, MODELS, FLUX1Text, ModelSpec
from flux.image_io import output
from flux.parity import reference
from flux.pipeline import Pipeline

NAMES = ("flux.1-dev", "flux.2-klein-4b")
PROMPT, SIDE, STEPS = "a red circle", 256, 4
QWEN_TEMPLATE = (  # Qwen3's, of one message of the user and without thinking
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{{ message.content }}<|im_end|>\n{% endfor %}"
    "{{ '<|im_start|>assistant\n<think>\n\n</think>\n\n' }}"  # jinja strips a last newline
)


def pipeline_rows(setting: Setting) -> Iterator[Row]:
    for name in NAMES:
        with (
            TemporaryDirectory() as folder,
            pipelines(name, Path(folder), setting.device) as (ours, theirs),
        ):
            yield from prompt_rows(name, ours, theirs, Path(folder), setting)


@contextmanager
def pipelines(name: str, folder: Path, device: torch.device) -> Iterator[tuple]:
    """Yield our pipeline and diffusers' pipeline, with the same random weights in float32."""
    repository = folder / MODELS[name].repository.split("/")[1]
    spec = tiny_spec(name, repository)
    parts = reference.networks(spec)
    text = reference.diffusers_text(spec, parts, repository, mistral_template="")
    if spec.flux1:
        text["tokenizer"].model_max_length = spec.text.clip.max_length
    else:
        text["tokenizer"].chat_template = QWEN_TEMPLATE
    saved = dict(parts)
    if "model" in parts:  # with the layers that ours leaves out
        saved["model"] = text["text_encoder"]
    reference.write_weights(repository, spec, saved)
    with patch.dict(MODELS, {name: spec}):
        ours = flux.load(name, weights=folder, device=str(device), dtype=torch.float32)
        yield ours, reference.diffusers_pipeline(spec, parts, text).to(device)


def tiny_spec(name: str, repository: Path) -> ModelSpec:
    """Copy an embedded model's tokenizers to the repository, and return the spec that fits them."""
    embedded = MODELS["flux.1-tiny" if MODELS[name].flux1 else "flux.2-tiny"]
    for folder in (EMBEDDED / embedded.name).glob("tokenizer*"):
        shutil.copytree(folder, repository / folder.name)
    theirs = embedded.text
    if isinstance(theirs, FLUX1Text):
        spec = reference.tiny_models(clip_eos=theirs.clip.eos_id)[name]
        t5 = replace(spec.text.t5, vocab_size=theirs.t5.vocab_size)
        clip = replace(spec.text.clip, vocab_size=theirs.clip.vocab_size)
        return replace(spec, text=replace(spec.text, t5=t5, clip=clip))
    spec = reference.tiny_models(clip_eos=0)[name]
    model = replace(spec.text.model, vocab_size=theirs.model.vocab_size)
    return replace(spec, text=replace(spec.text, model=model))


def prompt_rows(name: str, ours: Pipeline, theirs, folder: Path, setting: Setting) -> Iterator[Row]:
    """Yield the time from the prompt to the PNG, and its peak of activations.

    The prompt is encoded in every run.
    """
    options = dict(max_sequence_length=ours.spec.text_length)
    if not ours.spec.flux1:
        options |= dict(text_encoder_out_layers=ours.spec.text.model.layers, guidance_scale=1.0)

    def run_ours() -> None:
        ours.text.cache.clear()
        image = ours(PROMPT, SIDE, SIDE, STEPS)[0]
        output.save(image, folder / "ours.png", {"prompt": PROMPT}).unlink()

    def run_theirs() -> None:
        result = theirs(
            prompt=PROMPT,
            width=SIDE,
            height=SIDE,
            num_inference_steps=STEPS,
            generator=torch.Generator().manual_seed(0),
            **options,
        )
        result.images[0].save(folder / "theirs.png")

    case = f"prompt to PNG, {name}, tiny networks, {STEPS} steps, {SIDE}x{SIDE}"
    seconds = by_turns([run_ours, run_theirs], setting.rounds, setting.enough)
    yield Row(case, "s", *seconds, runs=2 * setting.rounds)
    peaks = peak_bytes(run_ours), peak_bytes(run_theirs)
    yield Row(f"{case}, peak of activations", "B", *peaks)
