"""Make `tests/golden`: outputs of diffusers and transformers for tiny random models.

    python scripts/dev/golden.py --output FOLDER

Each file holds inputs (`in.*`), outputs (`out.*`), for a pipeline its tokenizer's files (`file.*`),
and a fingerprint of the weights, which `flux/parity/reference.py` draws from seeds. The metadata
names the versions of the libraries. Needs a clone of the repository.

Files are never overwritten unasked: other versions and processors are tested against them.
`--output tests/golden --overwrite` replaces them, if they were made with the versions that are
installed, or `--other-versions` says that they need not be.
"""

import argparse
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "scripts")]

from modules.command_line import Parser, exit_code, imports, show


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--output", type=Path, required=True, metavar="FOLDER", help="of the files")
    p.add_argument("--overwrite", action="store_true", help="replace files in the folder")
    p.add_argument(
        "--other-versions",
        action="store_true",
        help="replace files that other versions of diffusers, transformers or torch made",
    )
    return p


with imports(__name__, parser):
    import diffusers
    import numpy as np
    import torch
    import transformers
    from einops import rearrange
    from safetensors import safe_open
    from safetensors.torch import save as as_file
    from support import transformer3_inputs
    from support.parity_rows import reference_of
    from support.tiny_repositories import home, write_tokenizers
    from support.tokenizer_files import MISTRAL_TEMPLATE
    from support.transformer_inputs import inputs
    from torch import Tensor

    from flux.atomic_files import write_atomically
    from flux.configs import FLUX1Text
    from flux.errors import UserError
    from flux.parity import reference
    from flux.transformer3 import Flux3Config

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


def files_of(folder: Path) -> list[Path]:
    names = [*reference.golden_networks(), *(f"pipeline-{name}" for name in RUNS)]
    return [folder / f"{name}.safetensors" for name in names]


def check_files(folder: Path, overwrite: bool, other_versions: bool) -> None:
    """UserError for a file that is not to be replaced."""
    for path in filter(Path.exists, files_of(folder)):
        if not overwrite:
            raise UserError(f"output: {path} exists. Choose another folder, or add --overwrite.")
        with safe_open(path, "pt") as file:
            made = {name: file.metadata().get(name) for name in VERSIONS}
        if made != VERSIONS and not other_versions:
            raise UserError(
                f"output: {path} was made with {made}, and this is {VERSIONS}. Install the same "
                "versions, or add --other-versions."
            )


def save(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    tensors = {key: tensor.contiguous() for key, tensor in tensors.items()}
    with write_atomically(path) as unfinished:
        unfinished.write_bytes(as_file(tensors, metadata=VERSIONS | metadata))
    show(path)


def main() -> int:
    args = parser().parse_args()
    return exit_code(lambda: write(args), {"output": "--output"}, args.output, "stopped")


@torch.no_grad()
def write(args: argparse.Namespace) -> int:
    check_files(args.output, args.overwrite, args.other_versions)
    args.output.mkdir(parents=True, exist_ok=True)
    files = iter(files_of(args.output))
    for name, ours in reference.golden_networks().items():
        given, expected = answer(name, ours)
        tensors = {f"in.{k}": x for k, x in given.items()} | {
            f"out.{k}": x for k, x in expected.items()
        }
        save(next(files), tensors | {"fingerprint": reference.fingerprint(ours)}, {})
    for name, guidance in RUNS.items():
        with tempfile.TemporaryDirectory() as folder:
            modules, tensors = pipeline_tensors(name, guidance, Path(folder))
        request = {"prompts": "\n".join(PROMPTS)}
        if guidance is not None:
            request["guidance"] = str(guidance)
        fingerprint = reference.fingerprint(*modules)
        save(next(files), tensors | {"fingerprint": fingerprint}, request)
    return 0


if __name__ == "__main__":
    sys.exit(main())
