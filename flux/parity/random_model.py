"""Tiny models of both families with random weights; a weight of 0 or 1 could hide a mistake."""

import json
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from torch import nn

from flux.configs import MODELS, FLUX1Text, FLUX2Text
from flux.errors import UserError
from flux.parity import reference
from flux.weights.files import read_header
from flux.weights.mapping import map_tensors

FAMILIES = ("flux.1", "flux.2")
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
    """Add "flux.1-random" or "flux.2-random" to flux.MODELS; yield its name and folder.

    Both have a guidance input, and the 32 groups of the norms in BFL's autoencoders. The weights
    are the same every time, but other versions of torch may draw others. `weights`: a folder of
    weights to use instead, those of a kit. UserError if they do not fit.
    """
    name = f"{family}-random"
    tiny = reference.tiny_models(clip_eos=SPECIAL.index("<|endoftext|>"))
    spec = tiny[f"{family}-dev"]
    # the klein's template is shorter than that of FLUX.2 [dev]
    text: FLUX1Text | FLUX2Text = tiny["flux.2-klein-4b"].text
    if isinstance(spec.text, FLUX1Text):
        text = replace(spec.text, t5_tokenizer=T5_TOKENIZER, clip_tokenizer=TOKENIZER)
    autoencoder = replace(spec.autoencoder, ch=32, norm_groups=32)
    spec = replace(spec, name=name, repository=name, text=text, text_length=96, size=128)
    spec = replace(spec, autoencoder=autoencoder)
    with TemporaryDirectory() as folder:
        networks = reference.networks(spec)
        if weights is not None:
            for part, network in networks.items():
                load_part(network, weights / f"{part}.safetensors")
        reference.write_weights(Path(folder), spec, networks, sharded=False)
        write_tokenizer(Path(folder, *TOKENIZER))
        write_t5_tokenizer(Path(folder, *T5_TOKENIZER))
        MODELS[name] = spec
        try:
            yield name, Path(folder)
        finally:
            del MODELS[name]


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
    path.parent.mkdir(parents=True)
    tokenizer.save(str(path))


def write_t5_tokenizer(path: Path) -> None:
    """Write Unigram pieces, one for each character, with the ids of `write_tokenizer`."""
    pieces = [(token.replace(" ", "▁"), -1.0) for token in (*SPECIAL, *CHARACTERS)]
    content = {
        "model": {"type": "Unigram", "vocab": pieces},
        "normalizer": {"type": "Precompiled", "precompiled_charsmap": ""},
    }
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(content), "utf-8")
