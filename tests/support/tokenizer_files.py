"""Tiny tokenizers in the released file formats.

Only the size of the vocabulary differs from the released files.
"""

import json
import sys
from pathlib import Path

from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

sys.path.append(str(Path(__file__).resolve().parents[2] / "scripts/toy"))
from recipe.tokenizer import train_byte_level_bpe

PROSE = [
    "a photo of a cat sitting on a mat beside the window",
    "The quick brown fox doesn't jump over 1234567890 lazy dogs!",
    "an oil painting of a naïve café façade in the rain, 35mm",
    "FLUX draws images from words: they're wide, tall or square.",
]
QWEN_TEMPLATE = """
{%- if messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if message.role == 'user' %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}"""
MISTRAL_SPECIAL = (
    "<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] "
    "[/TOOL_RESULTS] [TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] "
    "[SYSTEM_PROMPT] [/SYSTEM_PROMPT] [TOOL_CONTENT]"
).split()
MISTRAL_TEMPLATE = """{{- bos_token }}
{%- for message in messages %}
    {%- if message['role'] == 'system' %}
        {{- '[SYSTEM_PROMPT]' + message['content'][0]['text'] + '[/SYSTEM_PROMPT]' }}
    {%- else %}
        {{- '[INST]' }}
        {%- for block in message['content'] %}
            {{- block['text'] if block['type'] == 'text' else '[IMG]' }}
        {%- endfor %}
        {{- '[/INST]' }}
    {%- endif %}
{%- endfor %}"""


def write_json(path: Path, content) -> None:
    path.write_text(json.dumps(content), encoding="utf-8")


def make_t5(folder: Path) -> None:
    """Write spiece.model as google/t5-v1_1-xxl has it: nmt_nfkc, pad 0, eos 1, unk 2, no bos."""
    import sentencepiece

    with open(folder / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(PROSE * 20),
            model_writer=file,
            vocab_size=130,
            hard_vocab_limit=False,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            pad_piece="<pad>",
            minloglevel=2,
        )


def make_clip(folder: Path) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json.

    The vocabulary: bytes, bytes with </w>, merges, then the two special tokens.
    """
    trained = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    trained.normalizer = normalizers.Lowercase()
    trained.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=350, end_of_word_suffix="</w>", show_progress=False)
    trained.train_from_iterator(PROSE, trainer)
    merges = [tuple(merge) for merge in json.loads(trained.to_str())["model"]["merges"]]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = ["<|startoftext|>", "<|endoftext|>"]
    vocabulary = [*alphabet, *(char + "</w>" for char in alphabet), *map("".join, merges), *special]
    write_json(folder / "vocab.json", {token: index for index, token in enumerate(vocabulary)})
    lines = ["#version: 0.2", *map(" ".join, merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "special": True}
    first, last = len(vocabulary) - 2, len(vocabulary) - 1
    added = {  # `normalized` as in the released file: one True, one False
        first: {"content": special[0], "normalized": True, **flags},
        last: {"content": special[1], "normalized": False, **flags},
    }
    config = {
        "added_tokens_decoder": added,
        "model_max_length": 77,
        "bos_token": special[0],
        "eos_token": special[1],
        "pad_token": special[1],
        "unk_token": special[1],
    }
    write_json(folder / "tokenizer_config.json", config)


def make_qwen(folder: Path) -> None:
    """Write tokenizer.json, and the older files with the same content."""
    tokenizer = train_byte_level_bpe(PROSE, 400, folder / "tokenizer.json")
    tokenizer.model.save(str(folder))
    flags = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    added = {}
    for index, token in tokenizer.get_added_tokens_decoder().items():
        added[index] = {flag: getattr(token, flag) for flag in flags}
    config = {
        "added_tokens_decoder": added,
        "pad_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "bos_token": None,
        "chat_template": QWEN_TEMPLATE,
        "model_max_length": 131072,
    }
    write_json(folder / "tokenizer_config.json", config)


def make_mistral(folder: Path) -> None:
    """Write tokenizer.json in tekken's format.

    The special tokens come first, and a post-processor adds <s>.
    """
    tokenizer = Tokenizer(models.BPE(ignore_merges=True))
    words = (
        r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = pre_tokenizers.Split(Regex(words), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, byte_level])
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=MISTRAL_SPECIAL,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(PROSE, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
