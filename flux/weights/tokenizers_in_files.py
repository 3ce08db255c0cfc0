"""Tokenizers that lie in files of weights: llama.cpp's in GGUF, and T5's in ComfyUI's files."""

import re
from pathlib import Path

from flux.weights.load import read_headers
from flux.weights.mapping import map_tensor
from flux.weights.quantization.gguf import read_arrays

PREFIX = "tokenizer.ggml."
NORMAL, ADDED, UNUSED = 1, (3, 4), 5  # enum llama_token_type
SPIECE = re.compile(r"(^|\.)spiece_model$")  # ComfyUI's name of the bytes of spiece.model


def holds_tokenizer(file: Path, kind: str) -> bool:
    """Return whether a file of weights holds a tokenizer from which all ids follow.

    kind: "t5" or "qwen". Of Mistral's, files do not hold how a text is split into words.
    """
    infos, metadata = read_headers([file])
    model = metadata.get(f"{PREFIX}model")
    if kind == "t5":
        return model == "t5" or any(map(SPIECE.search, infos))
    return model == "gpt2" and metadata.get(f"{PREFIX}pre") == "qwen2"


def read_spiece(file: Path) -> bytes | None:
    """Return the spiece.model that ComfyUI stores beside the weights; None if there is none."""
    infos, _ = read_headers([file])
    for name, info in infos.items():
        if SPIECE.search(name) and info.dtype == "U8":
            return map_tensor(info).numpy().tobytes()
    return None


def read_gguf_unigram(file: Path) -> tuple[list[tuple[str, float]], bytes]:
    """Return T5's pieces with their scores, and the character map.

    llama.cpp fills the list up to the size of the embedding, with [PADn].
    """
    arrays = read_arrays(file, PREFIX)
    rows = zip(arrays["tokens"], arrays["scores"], arrays["token_type"], strict=True)
    pieces = [
        (name, score)
        for name, score, kind in rows
        if not (kind == UNUSED and re.fullmatch(r"\[PAD\d+\]", name))
    ]
    return pieces, bytes(arrays["precompiled_charsmap"])


def read_gguf_bpe(file: Path) -> tuple[dict[str, int], list[tuple[str, str]], dict[int, str]]:
    """Return a byte-level vocabulary, its merges, and the added tokens by id."""
    arrays = read_arrays(file, PREFIX)
    rows = list(enumerate(zip(arrays["tokens"], arrays["token_type"], strict=True)))
    merges = []
    for merge in arrays["merges"]:
        left, _, right = merge.partition(" ")
        merges.append((left, right))
    vocabulary = {name: index for index, (name, kind) in rows if kind == NORMAL}
    added = {index: name for index, (name, kind) in rows if kind in ADDED}
    return vocabulary, merges, added
