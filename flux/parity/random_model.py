"""Tiny models of both families with random weights; a weight of 0 or 1 could hide a mistake."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flux.configs import MODELS, FLUX1Text, FLUX2Text
from flux.parity import reference

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


@contextmanager
def random_model(family: str) -> Iterator[tuple[str, Path]]:
    """Add "flux.1-random" or "flux.2-random" to flux.MODELS; yield its name and folder.

    Both have a guidance input. The weights are the same every time.
    """
    name = f"{family}-random"
    tiny = reference.tiny_models(clip_eos=SPECIAL.index("<|endoftext|>"))
    spec = tiny[f"{family}-dev"]
    # the klein's template is shorter than that of FLUX.2 [dev]
    text: FLUX1Text | FLUX2Text = tiny["flux.2-klein-4b"].text
    if isinstance(spec.text, FLUX1Text):
        text = replace(spec.text, t5_tokenizer=T5_TOKENIZER, clip_tokenizer=TOKENIZER)
    spec = replace(spec, name=name, repository=name, text=text, text_length=96, size=128)
    with TemporaryDirectory() as folder:
        reference.write_weights(Path(folder), spec, reference.networks(spec), sharded=False)
        write_tokenizer(Path(folder, *TOKENIZER))
        write_t5_tokenizer(Path(folder, *T5_TOKENIZER))
        MODELS[name] = spec
        try:
            yield name, Path(folder)
        finally:
            del MODELS[name]


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
