"""The tokenizer, trained on the grammar's captions and instructions: any text has ids, and a word of the grammar has one."""

import itertools
import string
from pathlib import Path

from flux import shapes
from flux.configs import FLUX2Text
from flux.tokenizers import QWEN_WORDS, QwenTokenizer


def train_tokenizer(run: Path, text: FLUX2Text) -> None:
    """Unless it is there, into the folder where the family's repositories have it."""
    path = run / text.tokenizer[0]
    if not path.exists():
        path.parent.mkdir(exist_ok=True)
        train_byte_level_bpe(["user\nassistant\n\n"] * 4000 + texts(), text.model.vocab_size, path)


def texts() -> list[str]:
    """Captions and instructions, held-out ones too. The letters of words stand alone: no two of them shall be one token."""
    captions = (str(scene) for scene in shapes.scenes(0, held=None) if not isinstance(scene.objects[0], shapes.Word))
    instructions = map(str, shapes.edits(0, held=None))
    words = [f'the word "{letter}" in the' for letter in string.ascii_uppercase] * 40
    return [*itertools.islice(captions, 4000), *itertools.islice(instructions, 4000), *words]


def train_byte_level_bpe(texts: list[str], vocab_size: int, path: Path):
    """Trains byte-level BPE of `vocab_size` tokens, and writes and returns it: a tokenizer.json in Qwen's format.

    As in Qwen's vocabulary, the special tokens come last; `<think>` and `</think>` are added tokens, but not special.
    """
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = [QwenTokenizer.pad, "<|im_start|>", "<|im_end|>"]
    added = [AddedToken("<think>", normalized=False), AddedToken("</think>", normalized=False)]
    size = vocab_size - len(special) - len(added)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=size, initial_alphabet=alphabet, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.add_special_tokens(special)
    tokenizer.add_tokens(added)
    tokenizer.save(str(path))
    return tokenizer
