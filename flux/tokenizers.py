"""Prompt -> token ids, exactly as the released pipelines make them: FLUX.1's T5 and CLIP, FLUX.2's Qwen3 and Mistral.

Each tokenizer is read from the folder that its repository ships: from `tokenizer.json` when there is one, else from the
older files that the class names. Special tokens typed inside a prompt (`</s>`, `<|im_end|>`, `[/INST]`) are parsed as
special tokens, as the released pipelines do.
"""

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flux.errors import UserError

NOT_TEXT = re.compile(
    "[\0\ud800-\udfff]"
)  # NUL and lone surrogates: the debris of a broken decoding
CLIP_WORDS = (
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"
)
QWEN_WORDS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"


class Tokens(NamedTuple):
    """A batch of prompts as ids, padded to one length, and per prompt the text that did not fit ("" if all did)."""

    ids: Tensor  # (B, L) int64
    mask: Tensor  # (B, L) bool, True on real tokens
    cut: list[str]  # B


class PromptTokenizer:
    """What the four tokenizers share; each of them states its files, its template and its padding.

    Raises UserError for a folder without its files, for a broken file, and for the vocabulary of another model.
    """

    home: str  # the repositories' folder that holds the files, for error messages
    files: tuple[str, ...] = ()  # what to read where there is no tokenizer.json
    frame = "$A"  # special tokens around the ids $A of the text: truncation keeps these
    before, after = (
        "",
        "",
    )  # text around the prompt, tokenized with it: truncation cuts this like the prompt
    pad: str
    pad_side = "right"
    required: tuple[str, ...] = ()  # special tokens that `before` and `after` need

    def __init__(self, folder: Path):
        from tokenizers.processors import TemplateProcessing

        self.tokenizer = self._load(Path(folder))
        names = (*re.findall(r"<\S+>", self.frame), self.pad, *self.required)
        special = {name: self.tokenizer.token_to_id(name) for name in names}
        for name, index in special.items():
            if index is None:
                raise UserError(
                    f"the tokenizer in {folder} has no token {name!r}, so it is not the one of {self.home}"
                )
        # In place of the file's own, which would add a second <s> to Mistral's template.
        self.tokenizer.post_processor = TemplateProcessing(
            single=self.frame, special_tokens=list(special.items())
        )
        self.pad_id = special[self.pad]

    def __call__(self, prompts: list[str], length: int) -> Tokens:
        """Every prompt as `length` ids, cut at the right or padded. Raises UserError for NUL and lone surrogates."""
        for number, prompt in enumerate(prompts, 1):
            if bad := NOT_TEXT.search(prompt):
                where = f"prompt {number} holds {bad[0]!r} at position {bad.start()}"
                raise UserError(f"{where}, which is not text: remove it")
        self.tokenizer.enable_truncation(length)
        self.tokenizer.enable_padding(
            direction=self.pad_side, pad_id=self.pad_id, pad_token=self.pad, length=length
        )
        # Not encode_batch: its threads make every later fork (a data loader's) warn.
        rows = [self.tokenizer.encode(self.before + prompt + self.after) for prompt in prompts]
        ids = torch.tensor([row.ids for row in rows])  # (B, L)
        mask = torch.tensor([row.attention_mask for row in rows], dtype=torch.bool)  # (B, L)
        return Tokens(ids, mask, [self._cut(prompt, row) for prompt, row in zip(prompts, rows)])

    def _cut(self, prompt: str, row) -> str:
        """The end of the prompt from the first character that lost a token, as it was typed."""
        if not row.overflowing:
            return ""
        lost = row.overflowing[0]
        start = next(
            start
            for (start, _), special in zip(lost.offsets, lost.special_tokens_mask)
            if not special
        )
        return prompt[max(0, start - len(self.before)) :]

    def _load(self, folder: Path):
        from tokenizers import Tokenizer

        names = ("tokenizer.json",) if (folder / "tokenizer.json").is_file() else self.files
        if not names or not all((folder / name).is_file() for name in names):
            wanted = " or ".join(filter(None, ("tokenizer.json", " with ".join(self.files))))
            raise UserError(f"{folder} lacks its tokenizer, {wanted}: take it from {self.home}")
        try:
            return (
                Tokenizer.from_file(str(folder / names[0]))
                if names[0] == "tokenizer.json"
                else self._build(folder)
            )
        except Exception as error:  # the library raises no narrower type
            broken = f"{' with '.join(names)} in {folder}"
            raise UserError(
                f"{broken} cannot be read ({error}): take it anew from {self.home}"
            ) from error

    def _build(self, folder: Path):
        """The tokenizer that `files` describe; it needs no post-processor."""
        raise NotImplementedError


class T5Tokenizer(PromptTokenizer):
    """FLUX.1's long prompt: Unigram pieces and a final `</s>`, 512 ids (schnell: 256). Its encoder gets no mask."""

    home = "tokenizer_2/ of a FLUX.1 repository"
    files = ("spiece.model",)
    frame, pad = "$A </s>", "<pad>"

    def _build(self, folder: Path):
        # The pipelines run T5TokenizerFast: sentencepiece's vocabulary and character map, but not sentencepiece itself,
        # which reads special tokens in a prompt as text and maps combining characters differently.
        from tokenizers import Tokenizer, models, normalizers, pre_tokenizers

        pieces, charsmap = _read_sentencepiece((folder / "spiece.model").read_bytes())
        names = [name for name, _ in pieces]
        extra = [
            f"<extra_id_{i}>" for i in reversed(range(100))
        ]  # T5's sentinels, which the file leaves out
        model = models.Unigram(
            [*pieces, *((name, 0.0) for name in extra)], unk_id=names.index("<unk>")
        )
        tokenizer = Tokenizer(model)
        if charsmap:
            tokenizer.normalizer = normalizers.Precompiled(charsmap)
        words = [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(words)
        tokenizer.add_special_tokens(["<pad>", "</s>", "<unk>", *extra])
        return tokenizer


class CLIPTokenizer(PromptTokenizer):
    """FLUX.1's pooled prompt: lower-cased byte-level BPE between `<|startoftext|>` and `<|endoftext|>`, 77 ids."""

    home = "tokenizer/ of a FLUX.1 repository"
    files = ("vocab.json", "merges.txt")
    frame = "<|startoftext|> $A <|endoftext|>"
    pad = "<|endoftext|>"  # so the mask, not the id, tells the end from the padding

    def _build(self, folder: Path):
        from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers

        paths = [str(folder / name) for name in self.files]
        tokenizer = Tokenizer(
            models.BPE.from_file(*paths, end_of_word_suffix="</w>", unk_token="<|endoftext|>")
        )
        # transformers before 5 also mended mojibake here when ftfy was installed, and dropped control characters.
        spaces = normalizers.Replace(Regex(r"\s+"), " ")
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.NFC(), spaces, normalizers.Lowercase()]
        )
        words = pre_tokenizers.Split(Regex(CLIP_WORDS), behavior="removed", invert=True)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
            [words, pre_tokenizers.ByteLevel(add_prefix_space=False)]
        )
        # As FLUX.1's tokenizer_config.json has it, the first is found after lower-casing and the second before.
        tokenizer.add_special_tokens(
            [AddedToken("<|startoftext|>", normalized=True), "<|endoftext|>"]
        )
        return tokenizer


class QwenTokenizer(PromptTokenizer):
    """FLUX.2 klein's prompt: one user turn of Qwen3's chat, answered without thinking, 512 ids.

    Truncation cuts the templated text at its right end, so a prompt that is cut has also lost the template's tail.
    """

    home = "tokenizer/ of a FLUX.2-klein repository, or Qwen/Qwen3-4B or -8B"
    files = ("vocab.json", "merges.txt", "tokenizer_config.json")
    before, after = (
        "<|im_start|>user\n",
        "<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
    )
    pad = "<|endoftext|>"
    required = ("<|im_start|>", "<|im_end|>", "<think>", "</think>")

    def _build(self, folder: Path):
        from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers

        tokenizer = Tokenizer(
            models.BPE.from_file(str(folder / "vocab.json"), str(folder / "merges.txt"))
        )
        tokenizer.normalizer = normalizers.NFC()
        words = pre_tokenizers.Split(Regex(QWEN_WORDS), behavior="isolated")
        byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
        tokenizer.pre_tokenizer = pre_tokenizers.Sequence([words, byte_level])
        _add_listed_tokens(tokenizer, folder / "tokenizer_config.json")
        return tokenizer


class MistralTokenizer(PromptTokenizer):
    """FLUX.2-dev's prompt: BFL's system message and one user turn, 512 ids, padded on the LEFT.

    Truncation cuts the templated text at its right end, so a prompt that is cut has also lost its `[/INST]`.
    """

    home = "tokenizer/ of the FLUX.2-dev repository"
    before = (
        "<s>[SYSTEM_PROMPT]You are an AI that reasons about image descriptions. You give structured responses focusing "
        "on object relationships, object\nattribution and actions without speculation.[/SYSTEM_PROMPT][INST]"
    )
    after = "[/INST]"
    pad, pad_side = "<pad>", "left"
    required = ("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]")

    def __call__(self, prompts: list[str], length: int) -> Tokens:
        """As every PromptTokenizer. `[IMG]` is dropped from the prompts: it stands for an image, and none is given."""
        return super().__call__([prompt.replace("[IMG]", "") for prompt in prompts], length)


def _add_listed_tokens(tokenizer, config: Path) -> None:
    """Add the tokens that tokenizer_config.json lists beside the vocabulary; their ids must come out as listed."""
    from tokenizers import AddedToken

    listed = json.loads(config.read_text(encoding="utf-8"))["added_tokens_decoder"]
    for index, token in sorted(listed.items(), key=lambda item: int(item[0])):
        name = token["content"]
        tokenizer.add_tokens([AddedToken(**token)])
        if tokenizer.token_to_id(name) != int(index):
            raise ValueError(
                f"{config.name} gives {name!r} the id {index}, vocab.json {tokenizer.token_to_id(name)}"
            )


def _read_sentencepiece(data: bytes) -> tuple[list[tuple[str, float]], bytes]:
    """Pieces with their scores, and the normaliser's character map, of a serialised sentencepiece ModelProto.

    Its fields, by sentencepiece's src/sentencepiece_model.proto: pieces = 1 {piece = 1, score = 2} and, after them,
    normalizer_spec = 3 {precompiled_charsmap = 2}. The sentencepiece package does not give the map away.
    """
    pieces, charsmap = [], None
    for number, value in _protobuf_fields(data):
        if number == 1:
            piece = dict(_protobuf_fields(value))
            pieces.append((piece[1].decode(), *struct.unpack("<f", piece[2])))
        elif number == 3:
            charsmap = dict(_protobuf_fields(value)).get(2, b"")
    if charsmap is None:
        raise ValueError("it ends before its normalizer_spec")
    return pieces, charsmap


def _protobuf_fields(data: bytes) -> Iterator[tuple[int, int | bytes]]:
    """(field number, value) of a protobuf message: varints as integers, all else as bytes."""
    at = 0

    def varint() -> int:
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            value |= (byte & 127) << shift
            at, shift = at + 1, shift + 7
            if byte < 128:
                return value

    while at < len(data):
        number, kind = divmod(varint(), 8)
        if kind == 0:
            yield number, varint()
            continue
        size = varint() if kind == 2 else {1: 8, 5: 4}[kind]
        if at + size > len(data):
            raise ValueError("it ends in the middle of a field")
        yield number, data[at : at + size]
        at += size
