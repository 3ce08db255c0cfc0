"""Tiny models of each family with random weights; a weight of 0 or 1 could hide a mistake."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from flux.configs import MODELS, FLUX1Text, FLUX2Text, ModelSpec
from flux.errors import UserError
from flux.parity import reference, reference3
from flux.weights.files import read_header
from flux.weights.mapping import map_tensors

FAMILIES = ("flux.1", "flux.2", "flux.3", "flux.3-base")
TOKENIZER = ("tokenizer/tokenizer.json",)
T5_TOKENIZER = ("tokenizer_2/tokenizer.json",)
SPECIAL = (
    "<pad>",
    "</s>",
    "<unk>",
    "<|startoftext|>",
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<think>",
    "</think>",
)
CHARACTERS = ("\n", *map(chr, range(32, 127)))


def model_of_kit(recipe: Mapping, kit: Path) -> AbstractContextManager[Path | None]:
    """Make the random model of a kit again, with the kit's weights if they are in its folder.

    `recipe`: of the kit's capture. Yield the model's folder; None for every other model.
    """
    family = str(recipe.get("model", "")).removesuffix("-random")
    if family not in FAMILIES or recipe["model"] in MODELS:
        return nullcontext()
    weights = kit / "weights"
    return _folder_of(random_model(family, weights if weights.is_dir() else None))


@contextmanager
def _folder_of(model: AbstractContextManager[tuple[str, Path]]) -> Iterator[Path]:
    with model as (_, folder):
        yield folder


@contextmanager
def random_model(family: str, weights: Path | None = None) -> Iterator[tuple[str, Path]]:
    """Add "flux.1-random", or another of `FAMILIES`, to flux.MODELS; yield its name and folder.

    FLUX.1 and FLUX.2 have a guidance input. "flux.3" is a flow map, "flux.3-base" has guidance.
    The autoencoders have norms with 32 groups, as BFL's. The weights
    are the same every time, but other versions of torch may draw others. `weights`: a folder of
    weights to use instead, those of a kit. UserError if they do not fit.
    """
    name = f"{family}-random"
    spec, tokenizer = _tiny_spec(family)
    autoencoder = replace(spec.autoencoder, ch=32, norm_groups=32)
    spec = replace(spec, name=name, repository=name, size=128, autoencoder=autoencoder)
    with TemporaryDirectory() as folder:
        networks = reference3.networks3(spec) if spec.flux3 else reference.networks(spec)
        if weights is not None:
            for part, network in networks.items():
                load_part(network, weights / f"{part}.safetensors")
        reference.write_weights(Path(folder), spec, networks, sharded=False)
        write_tokenizer(Path(folder, tokenizer))
        write_t5_tokenizer(Path(folder, *T5_TOKENIZER))
        MODELS[name] = spec
        try:
            yield name, Path(folder)
        finally:
            del MODELS[name]


def _tiny_spec(family: str) -> tuple[ModelSpec, str]:
    """Return a tiny row of the table, and the file of its tokenizer."""
    if family.startswith("flux.3"):
        tiny3 = reference3.tiny_models3()
        spec = tiny3["flux.3-image-klein" + family.removeprefix("flux.3")]
        return spec, spec.text.tokenizers["tokenizer"][0]
    tiny = reference.tiny_models(clip_eos=SPECIAL.index("<|endoftext|>"))
    spec = tiny[f"{family}-dev"]
    # the klein's template is shorter than that of FLUX.2 [dev]
    text: FLUX1Text | FLUX2Text = tiny["flux.2-klein-4b"].text
    if isinstance(spec.text, FLUX1Text):
        text = replace(spec.text, t5_tokenizer=T5_TOKENIZER, clip_tokenizer=TOKENIZER)
    return replace(spec, text=text, text_length=96), TOKENIZER[0]


def load_part(network: nn.Module, file: Path) -> None:
    """Load a kit's file into a network. UserError if it has other tensors."""
    stored, _ = read_header(file)
    try:
        network.load_state_dict(dict(map_tensors(stored)), strict=True)
    except RuntimeError:
        raise UserError(
            f"{file}: has other tensors than the random model of the kit. Write the kit again."
        ) from None


def write_tokenizer(path: Path) -> None:
    """Write a token for each character, and the special tokens of CLIP and Qwen."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(list(SPECIAL))
    path.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(path))


def write_t5_tokenizer(path: Path) -> None:
    """Write Unigram pieces, one for each character, with the ids of `write_tokenizer`."""
    pieces = [(token.replace(" ", "▁"), -1.0) for token in (*SPECIAL, *CHARACTERS)]
    content = {
        "model": {"type": "Unigram", "vocab": pieces},
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(content), "utf-8")
