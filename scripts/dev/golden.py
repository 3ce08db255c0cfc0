"""Make `tests/golden`: outputs of diffusers and transformers for tiny random models.

    python scripts/dev/golden.py

Each file holds inputs (`in.*`), outputs (`out.*`), for a pipeline its tokenizer's files (`file.*`),
and a fingerprint of the weights, which `flux/parity/reference.py` draws from seeds. The metadata
names the versions of the libraries. Needs a clone of the repository.
"""

import sys
import tempfile
from pathlib import Path

import diffusers
import numpy as np
import torch
import transformers
from einops import rearrange
from safetensors.torch import save_file
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from command_line import Parser
from support import transformer3_inputs
from support.parity_rows import reference_of
from support.tiny_repositories import home, write_tokenizers
from support.tokenizer_files import MISTRAL_TEMPLATE
from support.transformer_inputs import inputs

from flux.configs import FLUX1Text
from flux.parity import reference
from flux.transformer3 import Flux3Config

GOLDEN = ROOT / "tests/golden"
PROMPTS = ["a photo of a cat", "an oil painting of a naïve café"]
VERSIONS = {library.__name__: library.__version__ for library in (diffusers, transformers, torch)}
RUNS = {
    "flux.1-dev": 3.0,
    "flux.1-schnell": None,
    "flux.2-dev": 3.0,
    "flux.2-klein-4b": None,
    "flux.2-klein-base-4b": 3.0,
}


def answer(name: str, ours) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Return inputs, and the outputs of the reference with the weights of `ours`."""
    given, (_, theirs) = random_inputs(name, ours.config), reference_of(name, ours)
    names = (
        ["encoded", "decoded"]
        if name.endswith("autoencoder")
        else ["velocity" if name.startswith("flux") else "features"]
    )
    return given, dict(zip(names, theirs(given), strict=True))


def random_inputs(name: str, config) -> dict[str, Tensor]:
    """Return random inputs of a network."""
    generator = torch.Generator().manual_seed(7)
    if name.endswith("autoencoder"):
        pixels = torch.rand(2, 3, 32, 48, generator=generator) * 2 - 1
        return {
            "pixels": pixels,
            "latents": torch.randn(2, config.latent_channels, 2, 3, generator=generator),
        }
    if isinstance(config, Flux3Config):
        return transformer3_inputs.inputs(config)
    if name.startswith("flux"):
        return inputs(config)
    length, real = 24, torch.tensor([24, 17, 1])[:, None]
    ids = torch.randint(2, config.vocab_size - 1, (3, length), generator=generator)
    if name == "t5":
        return {"ids": ids}
    if name == "clip":
        ids[torch.arange(length) >= real - 1] = config.eos_id
        return {"ids": ids}
    mask = torch.arange(length) < real
    return {"ids": ids, "mask": mask.flip(1) if name == "mistral" else mask}


def pipeline_tensors(
    name: str, guidance: float | None, folder: Path
) -> tuple[list, dict[str, Tensor]]:
    """Return our networks, and the tensors of a run of diffusers' pipeline."""
    repository, seen = home(folder, name), []
    spec = reference.tiny_models(write_tokenizers(repository, name))[name]
    parts, flux1 = reference.networks(spec), isinstance(spec.text, FLUX1Text)
    theirs = reference.diffusers_pipeline(
        spec, parts, reference.diffusers_text(spec, parts, repository, MISTRAL_TEMPLATE)
    )
    words = dict(prompt=PROMPTS, max_sequence_length=spec.text_length)
    words |= {"prompt_2": None} if flux1 else {"text_encoder_out_layers": spec.text.model.layers}
    features, pooled, *_ = theirs.encode_prompt(**words)
    images = theirs(
        **words,
        width=96,
        height=64,
        num_inference_steps=4,
        guidance_scale=guidance or 1.0,
        generator=[torch.Generator().manual_seed(seed) for seed in (5, 6)],
        callback_on_step_end=lambda pipe, step, t, values: seen.append(values["latents"]) or {},
    ).images
    tensors = {
        "out.features": features,
        "out.latents": rearrange(seen[-1], "b (h w) c -> b c h w", h=4),
    }
    tensors["out.pictures"] = torch.from_numpy(
        np.stack([np.asarray(image) for image in images])
    )  # (B, H, W, 3)
    tensors |= {"out.pooled": pooled} if flux1 else {}
    names = spec.text.t5_tokenizer + spec.text.clip_tokenizer if flux1 else spec.text.tokenizer
    files = {
        f"file.{n}": torch.frombuffer(bytearray((repository / n).read_bytes()), dtype=torch.uint8)
        for n in names
    }
    return list(parts.values()), tensors | files


def save(name: str, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    save_file(tensors, GOLDEN / f"{name}.safetensors", metadata=VERSIONS | metadata)


@torch.no_grad()
def main() -> None:
    Parser(description="Write tests/golden again. Takes no arguments.").parse_args()
    GOLDEN.mkdir(exist_ok=True)
    for name, ours in reference.golden_networks().items():
        given, expected = answer(name, ours)
        tensors = {f"in.{k}": x for k, x in given.items()} | {
            f"out.{k}": x for k, x in expected.items()
        }
        save(name, tensors | {"fingerprint": reference.fingerprint(ours)}, {})
    for name, guidance in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            modules, tensors = pipeline_tensors(name, guidance, Path(folder))
        request = {"prompts": "\n".join(PROMPTS)}
        if guidance is not None:
            request["guidance"] = str(guidance)
        fingerprint = reference.fingerprint(*modules)
        save(f"pipeline-{name}", tensors | {"fingerprint": fingerprint}, request)


if __name__ == "__main__":
    main()
