"""Prompt -> text features: the tokenizers and encoders of a family, loaded when a new prompt needs them."""

import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from flux.clip import CLIP
from flux.configs import FLUX1Text, FLUX2Text
from flux.language_model import LanguageModel
from flux.runtime.lazy_module import LazyModule
from flux.t5 import T5
from flux.tokenizers import CLIPTokenizer, MistralTokenizer, QwenTokenizer, T5Tokenizer, Tokens


class TextFeatures(NamedTuple):
    """What the transformer reads of a prompt: a token sequence and, in FLUX.1, one pooled vector."""

    tokens: Tensor  # (B, T, D)
    pooled: Tensor | None  # (B, V)

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "TextFeatures":
        return TextFeatures(*(None if x is None else x.to(device, dtype) for x in self))


class TextEncoder:
    """`encode` keeps every prompt's features, on the CPU; `release` lets the networks go and keeps the features."""

    def __init__(self, length: int):
        self.length = length
        self.cache: dict[str, TextFeatures] = {}

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Prompts -> features, on the CPU. One prompt at a time, so that its features do not depend on the others'."""
        for prompt in prompts:
            if prompt not in self.cache:
                with torch.inference_mode():
                    self.cache[prompt] = self.encode_one(prompt).to("cpu", self.dtype)
        rows = [self.cache[prompt] for prompt in prompts]
        pooled = None if rows[0].pooled is None else torch.cat([r.pooled for r in rows])
        return TextFeatures(torch.cat([r.tokens for r in rows]), pooled)

    def release(self) -> None:
        for network in self.networks:
            network.release()

    @property
    def dtype(self) -> torch.dtype:
        return self.networks[0].dtype


class FLUX1TextEncoder(TextEncoder):
    def __init__(
        self,
        t5: LazyModule,
        clip: LazyModule,
        t5_tokenizer: Path,
        clip_tokenizer: Path,
        length: int,
    ):
        super().__init__(length)
        self.networks = self.t5, self.clip = t5, clip
        self.t5_tokenizer, self.clip_tokenizer = (
            T5Tokenizer(t5_tokenizer),
            CLIPTokenizer(clip_tokenizer),
        )

    def encode_one(self, prompt: str) -> TextFeatures:
        long = self.t5_tokenizer([prompt], self.length)
        short = self.clip_tokenizer([prompt], self.clip.config.max_length)
        warn_if_cut(
            long, self.length
        )  # CLIP's 77 are few, but only set the tone: what T5 read is not lost
        tokens = self.t5()(long.ids.to(self.t5.device))  # (1, T, D)
        return TextFeatures(tokens, self.clip()(short.ids.to(self.clip.device)))


class FLUX2TextEncoder(TextEncoder):
    def __init__(self, model: LazyModule, tokenizer: Path, length: int):
        super().__init__(length)
        self.networks = (self.model,) = (model,)
        self.tokenizer = (QwenTokenizer if model.config.qk_norm else MistralTokenizer)(tokenizer)

    def encode_one(self, prompt: str) -> TextFeatures:
        tokens = self.tokenizer([prompt], self.length)
        warn_if_cut(tokens, self.length)
        return TextFeatures(
            self.model()(tokens.ids.to(self.model.device), tokens.mask.to(self.model.device)), None
        )


def warn_if_cut(tokens: Tokens, length: int) -> None:
    for lost in filter(None, tokens.cut):
        shown = lost if len(lost) <= 200 else f"{lost[:200]}..."
        warnings.warn(
            f"the prompt is longer than {length} tokens; what did not fit was cut off: {shown!r}",
            stacklevel=4,
        )


def text_encoder(text: FLUX1Text | FLUX2Text, files: dict, length: int, **options) -> TextEncoder:
    """The text encoder of a row of the table, from the files that `models.locate` found for it.

    `options`: device, dtype and others, as of LazyModule.
    """
    if isinstance(text, FLUX1Text):
        t5 = LazyModule(
            T5,
            text.t5,
            files["t5"],
            ignore_keys=t5_ignore_keys,
            block_lists=("encoder.block",),
            **options,
        )
        clip = LazyModule(CLIP, text.clip, files["clip"], ignore_keys=clip_ignore_keys, **options)
        return FLUX1TextEncoder(t5, clip, files["t5_tokenizer"], files["clip_tokenizer"], length)
    last = max(text.model.layers)
    prefixes = ("model.", "language_model.model.", "model.language_model.", "")

    def ignore_keys(name):
        return language_model_ignore_keys(name, last)

    model = LazyModule(
        LanguageModel,
        text.model,
        files["model"],
        prefixes=prefixes,
        ignore_keys=ignore_keys,
        block_lists=("layers",),
        **options,
    )
    return FLUX2TextEncoder(model, files["tokenizer"], length)


def t5_ignore_keys(name: str) -> bool:
    """The decoder, in files of the whole T5, and the second name of the shared embedding."""
    return name == "encoder.embed_tokens.weight" or name.startswith(("decoder.", "lm_head."))


def clip_ignore_keys(name: str) -> bool:
    """The image tower and the projections, in files of the whole CLIP; and positions, which are just counted."""
    others = ("vision_model.", "visual_projection.", "text_projection.", "logit_scale")
    return name.startswith(others) or name.endswith("embeddings.position_ids")


def language_model_ignore_keys(name: str, last: int) -> bool:
    """Everything above the last layer that is read, and what Mistral Small sees pictures with."""
    if layer := re.match(r"layers\.(\d+)\.", name):
        return int(layer[1]) >= last
    parts = (
        "norm.",
        "lm_head.",
        "language_model.lm_head.",
        "vision_tower.",
        "multi_modal_projector.",
    )
    return name.removeprefix("model.").startswith(parts)
