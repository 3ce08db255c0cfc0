"""Train tokenizers on the grammar: any text has ids, and each word of the grammar has one id."""

import itertools
import json
import re
import string
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

from flux import toy
from flux.configs import FLUX1Text, FLUX2Text
from flux.tokenizers import CLIP_WORDS, QWEN_WORDS, QwenTokenizer
from flux.toy.scenes import WORDS

OFTEN = 20  # times: so frequent a word becomes one piece of T5's
SENTINELS = 100  # <extra_id_0> and so on, which T5's tokenizer adds to the pieces of its file


def train_tokenizers(
    run: Path, text: FLUX1Text | FLUX2Text, some: Iterable[str] | None = None
) -> None:
    """Train the missing tokenizers, into the folders of the family's repositories.

    On `some` texts, or on captions and instructions of the grammar.
    """
    learned = texts() if some is None else list(some)
    common = Counter(itertools.chain.from_iterable(re.findall("[a-z]+", one) for one in learned))
    words = sorted(WORDS if some is None else (word for word, n in common.items() if n >= OFTEN))
    for part, names in text.tokenizers.items():
        path = run / names[0]
        if path.exists():
            continue
        path.parent.mkdir(exist_ok=True)
        if part == "t5_tokenizer":
            train_sentencepiece(learned + 100 * words, text.t5.vocab_size - SENTINELS, path)
        elif part == "clip_tokenizer":
            train_clip(learned, text.clip.vocab_size, path.parent)
        else:
            train_byte_level_bpe(
                ["user\nassistant\n\n"] * 4000 + learned, text.model.vocab_size, path
            )


def texts() -> list[str]:
    """Return captions and instructions, held-out ones too.

    Letters of words stand alone, so that no two letters become one token.
    """
    scenes = toy.scenes(0, held=None)
    captions = (str(scene) for scene in scenes if not isinstance(scene.objects[0], toy.Word))
    instructions = map(str, toy.edits(0, held=None))
    letters = [f'the word "{letter}" in the' for letter in string.ascii_uppercase] * 40
    return [*itertools.islice(captions, 4000), *itertools.islice(instructions, 4000), *letters]


def train_byte_level_bpe(texts: list[str], vocab_size: int, path: Path):
    """Train byte-level BPE of `vocab_size` tokens, write it in Qwen's format, and return it.

    As in Qwen's vocabulary, special tokens come last. `<think>` and `</think>` are added tokens,
    but not special.
    """
    from tokenizers import (
        AddedToken,
        Regex,
        Tokenizer,
        decoders,
        models,
        normalizers,
        pre_tokenizers,
        processors,
        trainers,
    )

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


def train_sentencepiece(texts: list[str], vocab_size: int, path: Path) -> None:
    """Train a Unigram model of at most `vocab_size` pieces, as T5's: pad 0, eos 1, unk 2."""
    import sentencepiece

    alphabet = "".join(sorted(set(string.printable) - set(string.whitespace)))
    with open(path, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=file,
            vocab_size=vocab_size,
            hard_vocab_limit=False,
            required_chars=alphabet,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            num_threads=1,
            minloglevel=2,
        )


def train_clip(texts: list[str], vocab_size: int, folder: Path) -> None:
    """Train byte-level BPE in lower case, written as CLIP's vocab.json and merges.txt.

    The order: bytes, bytes that end a word, merges, two special tokens. The end of text is last.
    """
    from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Lowercase()
    words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bytes_ = [*alphabet, *(byte + "</w>" for byte in alphabet)]
    special = ["<|startoftext|>", "<|endoftext|>"]
    merges = json.loads(tokenizer.to_str())["model"]["merges"]
    merges = merges[: vocab_size - len(bytes_) - len(special)]
    vocabulary = [*bytes_, *map("".join, merges), *special]
    (folder / "vocab.json").write_text(
        json.dumps({token: number for number, token in enumerate(vocabulary)}), "utf-8"
    )
    (folder / "merges.txt").write_text(
        "\n".join(["#version: 0.2", *map(" ".join, merges), ""]), "utf-8"
    )
