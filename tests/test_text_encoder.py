"""flux.text_encoder loads text encoders from the original repositories' files too.

These files have other prefixes and more tensors: openai/clip-vit-large-patch14 (an image encoder,
projections, positions), google/t5-v1_1-xxl (the decoder, and the embedding under two names),
Qwen/Qwen3-8B (a head, a final norm, more layers) and Mistral-Small-3.2 (a vision tower; two
spellings of the prefix). tests/test_pipeline.py compares features with transformers'.
"""

import warnings
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from support.tiny_repositories import tiny_repositories

import flux
from flux.clip import CLIP, CLIPConfig
from flux.errors import UserError
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.parity.reference import randomise
from flux.t5 import T5, T5Config
from flux.text_encoder import (
    clip_ignore_keys,
    language_model_ignore_keys,
    t5_ignore_keys,
    warn_of_foreign_syntax,
)
from flux.weights.load import load_module

CLIP_TINY = CLIPConfig(vocab_size=50, hidden_size=16, num_heads=2, mlp_size=32, depth=2, eos_id=49)
T5_TINY = T5Config(vocab_size=50, hidden_size=16, head_dim=8, num_heads=2, mlp_size=32, depth=2)
LM_TINY = LanguageModelConfig(
    layers=(1, 2),
    vocab_size=50,
    hidden_size=16,
    mlp_size=32,
    num_heads=2,
    num_kv_heads=1,
    head_dim=8,
)


def two_layers_ignore_keys(name: str) -> bool:
    return language_model_ignore_keys(name, 2)


def reload(tmp_path, kind, config, others, prefix="", **options):
    """Save random weights under `prefix` among other tensors; check that load_module finds them."""
    original = randomise(kind(config)).state_dict()
    tensors = {prefix + name: tensor.clone() for name, tensor in original.items()}
    save_file(tensors | {name: torch.ones(2) for name in others}, tmp_path / "model.safetensors")
    with torch.device("meta"):
        loaded = kind(config)
    load_module(loaded, [tmp_path / "model.safetensors"], **options)
    assert original.keys() == loaded.state_dict().keys()
    for name, tensor in loaded.state_dict().items():
        assert torch.equal(tensor, original[name]), name


SYNTAX = {  # what A1111 and ComfyUI interpret -> what is said
    "weights": [
        "(red hair:1.3)",
        "((a) b:0.5), c",
        "[a:b:0.5]",
        "('x':2)",
        "(a:.9 )",
        "(((é:1.21)))",
    ],
    "BREAK": ["a cat BREAK a dog", "BREAK", "a\nBREAK\nb"],
    "<lora:": ["a cat <lora:style:0.8>", "<lora:x>", "<lyco:x:1>", "<hypernet:x:1>"],
    "embedding:": ["embedding:easynegative, a cat", "a embedding:x.pt"],
}
PLAIN = [
    "a cat",
    "(a cat)",
    "at 12:30)",
    "(16:9)",
    "a sign 'BREAKFAST'",
    "smile :3)",
    "[INST] a",
    "",
]
PLAIN += [
    "</s> <|im_end|>",
    "ratio: 2",
    "let it break",
    "x embedding: y",
    "(" * 50_000,
    "a:" * 50_000,
]


def test_syntax_of_other_programs_is_said_to_be_plain_text():
    for kind, prompts in SYNTAX.items():
        for prompt in prompts:
            with pytest.warns(UserWarning) as told:
                warn_of_foreign_syntax(prompt)
            (message,) = [str(warning.message) for warning in told]
            assert message.startswith("the prompt is read as it stands: ") and kind in message
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for prompt in PLAIN:
            warn_of_foreign_syntax(prompt)


def test_file_of_all_of_clip_loads(tmp_path):
    others = [
        "vision_model.embeddings.class_embedding",
        "visual_projection.weight",
        "text_projection.weight",
        "logit_scale",
    ]
    reload(
        tmp_path,
        CLIP,
        CLIP_TINY,
        [*others, "text_model.embeddings.position_ids"],
        ignore_keys=clip_ignore_keys,
    )


def test_file_of_all_of_t5_loads(tmp_path):
    others = [
        "encoder.embed_tokens.weight",
        "decoder.embed_tokens.weight",
        "decoder.block.0.layer.0.layer_norm.weight",
    ]
    reload(tmp_path, T5, T5_TINY, [*others, "lm_head.weight"], ignore_keys=t5_ignore_keys)


@pytest.mark.parametrize(
    ("prefix", "head"),
    [
        ("model.", "lm_head."),
        ("language_model.model.", "language_model.lm_head."),
        ("model.language_model.", "lm_head."),
        ("", "lm_head."),
    ],
)
def test_file_of_a_language_model_loads(tmp_path, prefix, head):
    vision = [f"{before}vision_tower.patch_conv.weight" for before in ("", "model.")]
    above = [
        f"{prefix}layers.2.mlp.up_proj.weight",
        f"{prefix}norm.weight",
        f"{head}weight",
        "multi_modal_projector.norm.weight",
    ]
    for qk_norm in (True, False):
        config = replace(LM_TINY, qk_norm=qk_norm)
        reload(
            tmp_path,
            LanguageModel,
            config,
            [*vision, *above],
            prefix,
            ignore_keys=two_layers_ignore_keys,
        )


def test_unknown_tensor_of_a_layer_is_refused(tmp_path):
    name = "layers.0.mlp.up_proj.extra"
    with pytest.raises(UserError, match=name):
        reload(tmp_path, LanguageModel, LM_TINY, [name], ignore_keys=two_layers_ignore_keys)


@pytest.mark.parametrize(
    "name, part, field",
    [
        ("flux.1-dev", "t5", "t5_tokenizer"),
        ("flux.1-dev", "clip", "clip_tokenizer"),
        ("flux.2-klein-4b", "model", "tokenizer"),
    ],
)
def test_ids_beyond_the_embedding_are_refused_before_the_network_runs(tmp_path, name, part, field):
    """torch raises IndexError on the CPU; on a GPU, the process could not go on."""
    with tiny_repositories(tmp_path, [name]):
        encoder = flux.load(name, weights=tmp_path, device="cpu").text
        network, tokenizer = getattr(encoder, part), getattr(encoder, field)
        encoder.encode(["a cat"])
        ids = tokenizer(["a dog"], 16).ids
        network.config = replace(network.config, vocab_size=int(ids.max()))
        for other in encoder.networks:
            other.release()
        with pytest.raises(UserError, match=f"{tokenizer.folder}: the tokenizer gives the id"):
            encoder.encode(["a dog"])
        assert all(other.module is None for other in encoder.networks[:1])
