"""Tiny models of both families, every weight of which is random: nothing is left at 0 or 1, where a mistake could hide."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

from flux.configs import MODELS
from flux.parity import reference

TOKENIZER = ("tokenizer/tokenizer.json",)
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
    """While this lasts, the name of a new row of the table, "flux.1-random" or "flux.2-random", and the folder of its files.

    Both take guidance, as the dev models do. The weights are the same every time.
    """
    name = f"{family}-random"
    tiny = reference.tiny_models(clip_eos=SPECIAL.index("<|endoftext|>"))
    spec, text = (
        tiny[f"{family}-dev"],
        tiny["flux.2-klein-4b"].text,
    )  # whose template is shorter than that of FLUX.2 [dev]
    if spec.flux1:
        text = replace(spec.text, t5_tokenizer=TOKENIZER, clip_tokenizer=TOKENIZER)
    spec = replace(spec, name=name, repository=name, text=text, text_length=96, size=128)
    with TemporaryDirectory() as folder:
        reference.write_weights(Path(folder), spec, reference.networks(spec), sharded=False)
        write_tokenizer(Path(folder, *TOKENIZER))
        MODELS[name] = spec
        try:
            yield name, Path(folder)
        finally:
            del MODELS[name]


def write_tokenizer(path: Path) -> None:
    """A token for each character, and those that the templates of T5, CLIP and Qwen need."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {token: number for number, token in enumerate((*SPECIAL, *CHARACTERS))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(list(SPECIAL))
    path.parent.mkdir(parents=True)
    tokenizer.save(str(path))
