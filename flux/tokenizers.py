"""Prompt -> token ids, exactly as in the released pipelines: T5 and CLIP, Qwen3 (VL), Mistral.

Each tokenizer is read from the folder in its repository: from `tokenizer.json` where there is one,
otherwise from the older files that the class names; T5's the other way round. Special tokens typed
inside a prompt (`</s>`, `<|im_end|>`, `[/INST]`) are parsed as special tokens, as in the released
pipelines.
"""

import base64
import re
import struct
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux.errors import UserError
from flux.plain_files import MAX_JSON, parse_json, read_plain_file
from flux.weights.tokenizers_in_files import read_gguf_bpe, read_gguf_unigram, read_spiece

NOT_TEXT = re.compile("[\0\ud800-\udfff]")  # NUL and lone surrogates, left by a wrong decoding
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
TOKEN_FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token


MAX_SPIECE = 2**24  # bytes of a spiece.model; T5's has 0.8 million


class Tokens(NamedTuple):
    """A batch of prompts as token ids, padded to one length."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool, True on real tokens
    truncated: list[str]  # B: the end of each prompt that was cut off, "" if nothing was


class PromptTokenizer:
    """Base of the five tokenizers. Each states its files, template and padding.

    UserError for a folder without its files, a broken file, and the vocabulary of another model.
    """

    repository_hint: str  # where the files come from, for error messages
    files: tuple[str, ...] = ()  # what to read where there is no tokenizer.json
    prefers_files = False  # to a tokenizer.json beside them
    special_token_template = "$A"  # special tokens around the ids $A; truncation keeps them
    prefix = ""  # text before the prompt, tokenized with it; truncation cuts it like the prompt
    suffix = ""  # text after the prompt, likewise
    pad: str  # the token that pads
    pad_side = "right"
    required: tuple[str, ...] = ()  # special tokens in `prefix` and `suffix`

    def __init__(self, folder: Path):
        from tokenizers.processors import TemplateProcessing

        self.folder = Path(folder)
        self.tokenizer = self._load(self.folder)
        names = (*re.findall(r"<\S+>", self.special_token_template), self.pad, *self.required)
        special = {name: self.tokenizer.token_to_id(name) for name in names}
        for name, index in special.items():
            if index is None:
                raise UserError(
                    f"{folder}: the tokenizer has no token {name!r}, it is another model's. "
                    f"Take the files from {self.repository_hint}."
                )
        # Replaces the file's template, which would add a second <s> to Mistral's.
        self.tokenizer.post_processor = TemplateProcessing(
            single=self.special_token_template, special_tokens=list(special.items())
        )
        self.pad_id = special[self.pad]

    def __call__(self, prompts: list[str], length: int) -> Tokens:
        """Return each prompt as `length` ids, truncated at the right or padded.

        UserError for NUL and lone surrogates in a prompt.
        """
        check_text(prompts)
        # encode_batch would start threads, and every later fork (a data loader's) would warn.
        encodings = [self._encode(prompt, length) for prompt in prompts]
        ids = torch.tensor([encoding.ids for encoding in encodings])  # (B, L)
        mask = torch.tensor([encoding.attention_mask for encoding in encodings]).bool()  # (B, L)
        truncated = [self._truncated(p, encoding) for p, encoding in zip(prompts, encodings)]
        return Tokens(ids, mask, truncated)

    def positions(self, prompt: str, word: str, length: int) -> list[int]:
        """Return where the tokens of a part of a prompt stand among its `length` ids.

        `word` may be several words. UserError if the prompt does not contain it, or is cut off
        before it.
        """
        first = prompt.find(word)
        if not word or first < 0:
            raise UserError(f"word: {word!r} is not in the prompt {prompt!r:.200}.")
        start, end = (len(self.prefix) + at for at in (first, first + len(word)))
        offsets = self._encode(prompt, length).offsets
        found = [i for i, (a, b) in enumerate(offsets) if a < end and b > start]
        if not found:
            raise UserError(f"word: {word!r} is beyond the {length} tokens of a prompt.")
        return found

    def _encode(self, prompt: str, length: int):
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(
            direction=self.pad_side, pad_id=self.pad_id, pad_token=self.pad, length=length
        )
        return self.tokenizer.encode(self.prefix + prompt + self.suffix)

    def _truncated(self, prompt: str, encoding) -> str:
        """Return the end of the prompt from the first character that lost a token."""
        if not encoding.overflowing:
            return ""
        lost = encoding.overflowing[0]
        starts = [
            start
            for (start, _), special in zip(lost.offsets, lost.special_tokens_mask)
            if not special
        ]
        return prompt[max(0, starts[0] - len(self.prefix)) :]

    def _load(self, folder: Path):
        if folder.is_file():  # of weights, which holds its tokenizer
            return self._guarded(folder.name, folder, lambda: self._from_weights(folder))
        sources = [names for names in (("tokenizer.json",), self.files) if names]
        if self.prefers_files:
            sources.reverse()
        complete = (x for x in sources if all((folder / name).is_file() for name in x))
        if not (names := next(complete, ())):
            wanted = "tokenizer.json"
            if self.files:
                wanted += " or " + " with ".join(self.files)
            raise UserError(
                f"{folder}: no tokenizer ({wanted}). Take it from {self.repository_hint}."
            )
        what = " with ".join(names)
        if names == ("tokenizer.json",):
            return self._guarded(what, folder, lambda: self._from_json(folder / "tokenizer.json"))
        return self._guarded(what, folder, lambda: self._build(folder))

    def _guarded(self, what: str, folder: Path, build: Callable[[], Any]):
        """Return what `build` returns; any error of the library becomes a UserError."""
        try:
            return build()
        except BaseException as error:  # the library raises no narrower type, or even panics
            if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
                raise
            reason = " ".join(str(error).split())  # which may quote the file
            raise UserError(
                f"{folder}: cannot read {what} ({reason:.200}). "
                f"Download the files again from {self.repository_hint}."
            ) from error

    def _from_json(self, path: Path):
        from tokenizers import Tokenizer

        return Tokenizer.from_file(str(path))

    def _build(self, folder: Path):
        """Build the tokenizer that `files` describe, without a post-processor."""
        raise NotImplementedError

    def _from_weights(self, file: Path):
        """Build the tokenizer that lies in a file of weights."""
        raise NotImplementedError


class T5Tokenizer(PromptTokenizer):
    """Tokenize for T5 in FLUX.1: Unigram pieces and a final `</s>`, 512 ids (schnell: 256)."""

    repository_hint = "tokenizer_2/ of a FLUX.1 repository"
    files = ("spiece.model",)
    prefers_files = True
    special_token_template = "$A </s>"
    pad = "<pad>"

    # The pipelines run T5TokenizerFast: sentencepiece's vocabulary and character map, without
    # sentencepiece. The latter reads special tokens in a prompt as text, and maps combining
    # characters differently. transformers 5 takes no more from a tokenizer.json either: what the
    # files have around it differs, in a strip at the end and in U+0085.

    def _build(self, folder: Path):
        data = read_plain_file(folder / "spiece.model", MAX_SPIECE, "a sentencepiece model")
        return self._unigram(*_read_sentencepiece(data))

    def _from_json(self, path: Path):
        return self._unigram(*_read_unigram(parse_json(read_plain_file(path, MAX_JSON))))

    def _from_weights(self, file: Path):
        if (data := read_spiece(file)) is not None:
            return self._unigram(*_read_sentencepiece(data))
        return self._unigram(*read_gguf_unigram(file))

    @staticmethod
    def _unigram(pieces: list[tuple[str, float]], charsmap: bytes):
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        names = [name for name, _ in pieces]
        sentinels = [f"<extra_id_{i}>" for i in reversed(range(100))]  # not in spiece.model
        pieces += [(name, 0.0) for name in sentinels if name not in names]
        tokenizer = Tokenizer(models.Unigram(pieces, unk_id=names.index("<unk>")))
        if charsmap:
            tokenizer.normalizer = normalizers.Precompiled(charsmap)
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *sentinels])
        return tokenizer


class CLIPTokenizer(PromptTokenizer):
    """Tokenize for CLIP in FLUX.1: lower-cased byte-level BPE in two special tokens, 77 ids."""

    repository_hint = "tokenizer/ of a FLUX.1 repository"
    files = ("vocab.json", "merges.txt")
    special_token_template = "<|startoftext|> $A <|endoftext|>"
    pad = "<|endoftext|>"  # also ends the text: only the mask tells the two apart

    def _build(self, folder: Path):
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

        paths = [str(folder / name) for name in self.files]
        bpe = models.BPE.from_file(*paths, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        tokenizer = Tokenizer(bpe)
        # The slow tokenizer of transformers before 5 differs. With ftfy, it repaired mojibake;
        # without, it split Chinese characters, and dropped control and format characters.
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        steps = [normalizers.NFC(), spaces, normalizers.Lowercase()]
        tokenizer.normalizer = normalizers.Sequence(steps)
        words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        # As in FLUX.1's tokenizer_config.json: the first is matched after lower-casing, the second
        # before.
        start = AddedToken("<|startoftext|>", normalized=True)
        tokenizer.add_special_tokens([start, "<|endoftext|>"])
        return tokenizer


class QwenTokenizer(PromptTokenizer):
    """Tokenize for Qwen3 in FLUX.2 klein: one user turn of its chat, without thinking, 512 ids.

    Truncation cuts the text at its right end: a truncated prompt has also lost `suffix`.
    """

    repository_hint = "tokenizer/ of a FLUX.2-klein repository, or Qwen/Qwen3-4B or -8B"
    files = ("vocab.json", "merges.txt", "tokenizer_config.json")
    prefix = "<|im_start|>user\n"
    suffix = "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n"
    pad = "<|endoftext|>"
    required: tuple[str, ...] = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")

    def _build(self, folder: Path):
        from tokenizers import models

        bpe = models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        tokenizer = self._byte_level(bpe)
        _add_listed_tokens(tokenizer, folder / "tokenizer_config.json")
        return tokenizer

    def _from_weights(self, file: Path):
        from tokenizers import models

        vocabulary, merges, added = read_gguf_bpe(file)
        tokenizer = self._byte_level(models.BPE(vocabulary, merges))
        _add_tokens(tokenizer, {i: (name, {"normalized": False}) for i, name in added.items()})
        return tokenizer

    @staticmethod
    def _byte_level(bpe):
        from tokenizers import Regex, Tokenizer, normalizers, pre_tokenizers

        tokenizer = Tokenizer(bpe)
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        return tokenizer


class QwenVLTokenizer(QwenTokenizer):
    """Tokenize for Qwen3-VL in FLUX 3: one user turn of its chat, in a multiple of 80 ids."""

    repository_hint = "text_encoder/ of a FLUX 3 repository, or Qwen/Qwen3-VL-4B-Instruct"
    suffix = "<|im_end|>\n<|im_start|>assistant\n"
    required = ("<|im_start|>", "<|im_end|>")
    multiple = 80

    def __call__(self, prompts: list[str], length: int) -> Tokens:
        """Return each prompt as ids padded for the longest of them, of at most `length` ids."""
        return super().__call__(prompts, self.padded_length(prompts, length))

    def padded_length(self, prompts: list[str], length: int) -> int:
        """Return the length of the longest prompt, padding included, at most `length`."""
        check_text(prompts)
        self.tokenizer.no_truncation()
        self.tokenizer.no_padding()
        texts = (self.prefix + prompt + self.suffix for prompt in prompts)
        longest = max(len(self.tokenizer.encode(text).ids) for text in texts)
        return min(-(-longest // self.multiple) * self.multiple, length)


class MistralTokenizer(PromptTokenizer):
    """Tokenize for Mistral in FLUX.2 [dev]: BFL's system message and one user turn, 512 ids.

    Padding is on the LEFT. Truncation cuts the text at its right end: a truncated prompt has also
    lost its `[/INST]`.
    """

    repository_hint = "tokenizer/ of the FLUX.2-dev repository"
    prefix = (
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give "
        "structured responses focusing on object relationships, object\nattribution and actions "
        "without speculation.[/SYSTEM_PROMPT][INST]"
    )
    suffix = "[/INST]"
    pad = "<pad>"
    pad_side = "left"
    required = ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")

    def __call__(self, prompts: list[str], length: int) -> Tokens:
        """Tokenize without `[IMG]`, which would stand for an image."""
        return super().__call__([prompt.replace("[IMG]", "") for prompt in prompts], length)


def check_text(prompts: list[str]) -> None:
    """Raise UserError for NUL and lone surrogates in a prompt."""
    for number, prompt in enumerate(prompts, 1):
        if found := NOT_TEXT.search(prompt):
            raise UserError(
                f"prompts: prompt {number} contains {found[0]!r} at position {found.start()}, "
                "which is not text. Remove it."
            )


def _add_listed_tokens(tokenizer, config: Path) -> None:
    """Add the tokens that tokenizer_config.json lists; ValueError if their ids differ."""
    listed = parse_json(read_plain_file(config, MAX_JSON))["added_tokens_decoder"]
    added = {}
    for index, token in listed.items():
        # of an unknown flag, the library would print the name
        flags = {flag: value for flag, value in token.items() if flag in TOKEN_FLAGS}
        added[int(index)] = token["content"], flags
    _add_tokens(tokenizer, added)


def _add_tokens(tokenizer, added: dict[int, tuple[str, dict[str, bool]]]) -> None:
    """Add tokens by id: (name, flags). ValueError if an id differs."""
    from tokenizers import AddedToken

    for index, (name, flags) in sorted(added.items()):
        tokenizer.add_tokens([AddedToken(name, **flags)])
        actual = tokenizer.token_to_id(name)
        if actual != index:
            raise ValueError(f"{name!r} has the id {index} by one list, and {actual} by the other")


def _read_sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Return (piece, score) of each piece, and the normalizer's character map, of a ModelProto.

    Fields, by sentencepiece's src/sentencepiece_model.proto: pieces = 1 {piece = 1, score = 2},
    then normalizer_spec = 3 {precompiled_charsmap = 2}. The sentencepiece package hides the map.
    """
    pieces: list[tuple[str, float]] = []
    charsmap = None
    for number, value in _protobuf_fields(data):
        if number == 1:
            piece = dict(_protobuf_fields(value))
            pieces.append((piece[1].decode(), struct.unpack("<f", piece[2])[0]))
        elif number == 3:
            charsmap = dict(_protobuf_fields(value)).get(2, b"")
    if charsmap is None:
        raise ValueError("the file ends before its normalizer_spec")
    return pieces, charsmap


def _read_unigram(content: Any) -> tuple[list[tuple[str, float]], bytes]:
    """Return the same of the content of a tokenizer.json.

    The scores were float32. Others may have rounded them, and a tie is decided by the last bit.
    """
    model = content.get("model") if isinstance(content, dict) else None
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if not (vocabulary and isinstance(vocabulary, list)):
        raise ValueError("its model is not T5's, which is called Unigram")
    pieces = [(str(name), struct.unpack("<f", struct.pack("<f", x))[0]) for name, x in vocabulary]
    normalizers = [content.get("normalizer") or {}]
    for normalizer in normalizers:  # which grows
        if "precompiled_charsmap" in normalizer:
            return pieces, base64.b64decode(normalizer["precompiled_charsmap"] or "")
        normalizers += normalizer.get("normalizers", [])
    raise ValueError("it has no precompiled_charsmap")


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, Any]]:
    """Yield (field number, value) of a protobuf message: varints as int, everything else as bytes.

    https://protobuf.dev/programming-guides/encoding
    """
    start = 0
    while start < len(data):
        tag, start = _varint(data, start)
        number, wire_type = divmod(tag, 8)
        if wire_type == 0:
            value, start = _varint(data, start)
            yield number, value
            continue
        if wire_type == 2:  # length-delimited
            size, start = _varint(data, start)
        else:
            size = {1: 8, 5: 4}[wire_type]
        if start + size > len(data):
            raise ValueError("the file ends inside a field")
        yield number, data[start : start + size]
        start += size


def _varint(data: bytes, start: int) -> tuple[int, int]:
    """Return the integer at `start`, seven bits a byte, lowest first, and where it ends."""
    value = shift = 0
    while True:
        byte = data[start]
        value |= (byte & 127) << shift
        start, shift = start + 1, shift + 7
        if byte < 128:
            return value, start
