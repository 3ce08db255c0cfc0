"""A tokenizer in a file of weights gives the ids of the tokenizer's own files.

The package `gguf` writes the files, as llama.cpp's converter does.
"""

import json
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from support.tiny_repositories import home, tiny_repositories
from support.tokenizer_files import PROSE, make_qwen, make_t5
from support.weight_files import refusal, saved

import flux
from flux.tokenizers import QwenTokenizer, T5Tokenizer, _read_sentencepiece
from flux.weights.tokenizers_in_files import holds_tokenizer

HARD = [
    *PROSE,
    "",
    "  two  spaces\n\nand lines\x85 ",
    "caf\u00e9 cafe\u0301 \u732b \U0001f431 1234",
    "</s> <pad> <extra_id_3> <|im_end|> <think> <|endoftext|>",
]


def write(path: Path, model: str, **lists) -> Path:
    writer = gguf.GGUFWriter(path, "t5encoder" if model == "t5" else "qwen3")
    writer.add_tokenizer_model(model)
    if "pre" in lists:
        writer.add_tokenizer_pre(lists["pre"])
    writer.add_token_list(lists["tokens"])
    writer.add_token_types(lists["types"])
    if "scores" in lists:
        writer.add_token_scores(lists["scores"])
        writer.add_precompiled_charsmap(lists["charsmap"])
    if "merges" in lists:
        writer.add_token_merges(lists["merges"])
    writer.add_tensor("x.weight", np.zeros(4, np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def t5_gguf(path: Path, spiece: Path) -> Path:
    pieces, charsmap = _read_sentencepiece(spiece.read_bytes())
    names, scores = (list(column) for column in zip(*pieces))
    types = [3 if name in ("<pad>", "</s>") else 2 if name == "<unk>" else 1 for name in names]
    for i in range(len(names), len(names) + 50):  # the converter's, up to the embedding's size
        names.append(f"[PAD{i}]")
        scores.append(-10000.0)
        types.append(5)
    return write(path, "t5", tokens=names, scores=scores, types=types, charsmap=charsmap)


def qwen_gguf(path: Path, file: Path, pre: str = "qwen2") -> Path:
    content = json.loads(file.read_text())
    names = {index: (name, 1) for name, index in content["model"]["vocab"].items()}
    for token in content["added_tokens"]:
        names[token["id"]] = token["content"], 3 if token["special"] else 4
    tokens, types = zip(*(names[index] for index in sorted(names)))
    merges = [x if isinstance(x, str) else " ".join(x) for x in content["model"]["merges"]]
    tokens, types = list(tokens), list(types)
    return write(path, "gpt2", tokens=tokens, types=types, merges=merges, pre=pre)


def comfy(path: Path, spiece: Path) -> Path:
    data = np.frombuffer(spiece.read_bytes(), np.uint8).copy()
    return saved(path, {"spiece_model": torch.from_numpy(data), "x": torch.zeros(1)})


@pytest.mark.parametrize("write_file", [t5_gguf, comfy])
def test_t5_in_a_file_of_weights(tmp_path, write_file):
    make_t5(tmp_path)
    path = write_file(tmp_path / "x", tmp_path / "spiece.model")
    assert holds_tokenizer(path, "t5") and not holds_tokenizer(path, "qwen")
    ours, theirs = T5Tokenizer(path), T5Tokenizer(tmp_path)
    for prompt in HARD:
        assert torch.equal(ours([prompt], 24).ids, theirs([prompt], 24).ids), prompt


def test_qwen_in_gguf(tmp_path):
    make_qwen(tmp_path)
    path = qwen_gguf(tmp_path / "x.gguf", tmp_path / "tokenizer.json")
    assert holds_tokenizer(path, "qwen") and not holds_tokenizer(path, "t5")
    ours, theirs = QwenTokenizer(path), QwenTokenizer(tmp_path)
    for prompt in HARD:
        assert torch.equal(ours([prompt], 64).ids, theirs([prompt], 64).ids), prompt


def test_tokenizer_whose_words_are_not_told_is_left_alone(tmp_path):
    make_qwen(tmp_path)
    path = qwen_gguf(tmp_path / "x.gguf", tmp_path / "tokenizer.json", pre="tekken")
    assert not holds_tokenizer(path, "qwen")


def test_damaged_tokenizer_is_a_sentence(tmp_path):
    path = write(tmp_path / "x.gguf", "gpt2", tokens=["a"], types=[1], merges=["a b"], pre="qwen2")
    assert "cannot read x.gguf" in refusal(QwenTokenizer, path)
    assert "no token '<|endoftext|>'" in refusal(
        QwenTokenizer, write(path, "gpt2", tokens=["a"], types=[1], merges=[], pre="qwen2")
    ) or "cannot read" in refusal(QwenTokenizer, path)


def test_pipeline_reads_the_tokenizer_that_lies_in_the_text_encoder(tmp_path):
    """Where the repository has none: nothing is downloaded."""
    name = "flux.2-klein-4b"
    with tiny_repositories(tmp_path, [name]):
        folder = home(tmp_path, name)
        source = folder / "tokenizer/tokenizer.json"
        written = qwen_gguf(tmp_path / "t.gguf", source)
        expected = QwenTokenizer(folder / "tokenizer")(["a cat"], 64).ids
        from flux.loading import tokenizers_in_weights

        spec = flux.MODELS[name]
        assert tokenizers_in_weights(spec, tmp_path, {"model": [written]}) == {}
        source.unlink()
        with pytest.warns(UserWarning, match="the tokenizer is read from"):
            found = tokenizers_in_weights(spec, tmp_path, {"model": [written]})
        assert found == {"tokenizer": written}
        assert torch.equal(QwenTokenizer(written)(["a cat"], 64).ids, expected)
