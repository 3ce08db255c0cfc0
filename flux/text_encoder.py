"""Prompt -> text features: the tokenizers and text encoders of a model family."""

import re
import sys
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from flux.clip import CLIP
from flux.configs import FLUX1Text, FLUX2Text
from flux.errors import UserError
from flux.language_model import LanguageModel, LanguageModelConfig
from flux.runtime.lazy_module import LazyModule
from flux.t5 import T5
from flux.tokenizers import (
    CLIPTokenizer,
    MistralTokenizer,
    PromptTokenizer,
    QwenTokenizer,
    QwenVLTokenizer,
    T5Tokenizer,
    Tokens,
)
from flux.weights.families import qwen_kind
from flux.weights.files import TensorInfo
from flux.weights.llama_cpp_names import (
    halves_from_pairs,
    language_model_from_llama_cpp,
    t5_from_llama_cpp,
)
from flux.weights.load import read_headers

MAX_CACHE = 2**30  # bytes of features that are kept for later calls: 136 prompts of klein 4B


FOREIGN_SYNTAX = {  # of A1111 and ComfyUI -> what to say of it, the same for all prompts
    r"[^\s\d:]:\s?\d*\.?\d+\s?[)\]]": "weights such as (word:1.3) have no meaning here",
    r"(?<!\S)BREAK(?!\S)": "BREAK has no meaning here",
    r"<(lora|lyco|hypernet):": "<lora:...> loads no LoRA; `load_lora` does",
    r"(?<!\S)embedding:\S": "embedding:... loads no embedding",
}


class TextFeatures(NamedTuple):
    """What the transformer reads of a prompt."""

    tokens: Tensor  # (B, T, D)
    pooled: Tensor | None = None  # (B, V); None in FLUX.2
    ids: Tensor | None = None  # (T, axes) positions; None: those of `sampling.text_ids`
    # (T + L, T + L), of text tokens, then image tokens; True where a row may see a column
    mask: Tensor | None = None

    @property
    def nbytes(self) -> int:
        return self.tokens.nbytes + (0 if self.pooled is None else self.pooled.nbytes)

    def rows(self, rows: Sequence[int]) -> "TextFeatures":
        """Return the features of some of the prompts, which may repeat."""
        index = list(rows)
        pooled = None if self.pooled is None else self.pooled[index]
        return self._replace(tokens=self.tokens[index], pooled=pooled)

    def expand(self, count: int) -> "TextFeatures":
        """Repeat the features of a single prompt `count` times; those of `count` prompts stay."""
        return self.rows([0] * count) if len(self.tokens) == 1 else self

    def append(self, tokens: Tensor) -> "TextFeatures":
        """Append the same tokens (1, T', D) to every prompt's: (B, T + T', D)."""
        if self.ids is not None or self.mask is not None:
            raise UserError(
                "features: with `ids` or `mask`, they cannot be extended by tokens of images. "
                "Append those to the tokens, ids and mask."
            )
        tokens = tokens.to(self.tokens).expand(len(self.tokens), -1, -1)
        return self._replace(tokens=torch.cat([self.tokens, tokens], dim=1))

    def to(self, device: torch.device | str, dtype: torch.dtype) -> "TextFeatures":
        pooled = None if self.pooled is None else self.pooled.to(device, dtype)
        return self._replace(tokens=self.tokens.to(device, dtype), pooled=pooled)


class TextEncoder:
    """Base of the families' text encoders, and of your own: `flux.load(text=...)`.

    A subclass has `encode_one`. `cache` keeps the features of the last prompts.
    """

    networks: tuple[LazyModule, ...] = ()  # what is loaded, planned and released by itself

    def __init__(self, length: int):
        self.length = length  # tokens of a prompt, padding included; FLUX 3: at most
        self.cache: dict[str, TextFeatures] = {}

    def encode(self, prompts: Sequence[str]) -> TextFeatures:
        """Return the prompts' features, on the CPU.

        Prompts are encoded one at a time: features do not depend on the batch.
        """
        encoded = {prompt: self.features(prompt) for prompt in dict.fromkeys(prompts)}
        return concatenate([encoded[prompt] for prompt in prompts])

    def padded_length(self, prompts: Sequence[str]) -> int:
        """Return the tokens of the longest prompt, padding included."""
        return self.length

    def features(self, prompt: str) -> TextFeatures:
        """Return one prompt's features from the cache, or encode the prompt and cache them."""
        features = self.cache.pop(prompt, None)
        if features is None:
            warn_of_foreign_syntax(prompt)
            with torch.no_grad():  # not in inference mode, whose tensors autograd cannot use
                features = self.encode_one(prompt).to("cpu", self.dtype)
        self.cache[prompt] = features  # the last is the most recent
        while len(self.cache) > 1 and sum(f.nbytes for f in self.cache.values()) > MAX_CACHE:
            del self.cache[next(iter(self.cache))]
        return features

    def encode_one(self, prompt: str) -> TextFeatures:
        """Return the features of a prompt: tokens (1, T, D) and, in FLUX.1, pooled (1, V)."""
        raise NotImplementedError

    def positions(self, prompt: str, word: str) -> list[int]:
        """Return the positions of a word of the prompt among the T text tokens."""
        raise NotImplementedError

    def release(self) -> None:
        """Unload the networks. The cache stays."""
        for network in self.networks:
            network.release()

    @property
    def dtype(self) -> torch.dtype:
        return self.networks[0].dtype if self.networks else torch.float32


class FLUX1TextEncoder(TextEncoder):
    """T5 gives the tokens, CLIP the pooled vector."""

    def __init__(
        self,
        t5: LazyModule,
        clip: LazyModule,
        t5_tokenizer: Path,
        clip_tokenizer: Path,
        length: int,
    ):
        super().__init__(length)
        self.t5, self.clip = t5, clip
        self.networks = t5, clip
        self.t5_tokenizer = T5Tokenizer(t5_tokenizer)
        self.clip_tokenizer = CLIPTokenizer(clip_tokenizer)

    def encode_one(self, prompt: str) -> TextFeatures:
        t5_tokens = self.t5_tokenizer([prompt], self.length)
        clip_tokens = self.clip_tokenizer([prompt], self.clip.config.max_length)
        # No warning for CLIP's 77 tokens: T5 still reads all of it.
        warn_if_truncated(t5_tokens, self.length)
        require_known_ids(t5_tokens, self.t5_tokenizer, self.t5)
        require_known_ids(clip_tokens, self.clip_tokenizer, self.clip)
        tokens = self.t5()(t5_tokens.ids.to(self.t5.device))  # (1, T, D)
        pooled = self.clip()(clip_tokens.ids.to(self.clip.device))  # (1, V)
        return TextFeatures(tokens, pooled)

    def positions(self, prompt: str, word: str) -> list[int]:
        return self.t5_tokenizer.positions(prompt, word, self.length)


class FLUX2TextEncoder(TextEncoder):
    """Qwen3 or Mistral gives the tokens; there is no pooled vector."""

    def __init__(self, model: LazyModule, tokenizer: Path, length: int):
        super().__init__(length)
        self.model = model
        self.networks = (model,)
        self.tokenizer = tokenizer_of(model.config)(tokenizer)

    def encode_one(self, prompt: str) -> TextFeatures:
        tokens = self.tokenizer([prompt], self.length)
        warn_if_truncated(tokens, self.length)
        require_known_ids(tokens, self.tokenizer, self.model)
        ids, mask = tokens.ids.to(self.model.device), tokens.mask.to(self.model.device)
        return TextFeatures(self.model()(ids, mask), None)  # (1, T, D)

    def positions(self, prompt: str, word: str) -> list[int]:
        return self.tokenizer.positions(prompt, word, self.length)


class FLUX3TextEncoder(FLUX2TextEncoder):
    """Qwen3-VL gives the tokens, as many as the prompt's, rounded up to a multiple of 80."""

    tokenizer: QwenVLTokenizer

    def padded_length(self, prompts: Sequence[str]) -> int:
        return self.tokenizer.padded_length(list(prompts), self.length)


def tokenizer_of(config: LanguageModelConfig) -> type[PromptTokenizer]:
    """Return the tokenizer of Qwen3-VL, Qwen3 or Mistral."""
    if config.padding_position is not None:
        return QwenVLTokenizer
    return QwenTokenizer if config.qk_norm else MistralTokenizer


def concatenate(features: Sequence[TextFeatures]) -> TextFeatures:
    """Concatenate the features of prompts. UserError if they have different lengths (FLUX 3)."""
    lengths = sorted({one.tokens.shape[1] for one in features})
    if len(lengths) > 1:
        raise UserError(
            f"prompts: have from {lengths[0]} to {lengths[-1]} tokens, padding included, which do "
            "not fit into one tensor. Encode each prompt alone."
        )
    tokens = torch.cat([one.tokens for one in features])  # (B, T, D)
    pooled = [one.pooled for one in features if one.pooled is not None]
    return features[0]._replace(tokens=tokens, pooled=torch.cat(pooled) if pooled else None)


def require_known_ids(tokens: Tokens, tokenizer: PromptTokenizer, network: LazyModule) -> None:
    """Raise UserError for an id beyond the network's embedding, before the network is loaded."""
    last, size = int(tokens.ids.max()), network.config.vocab_size
    if last >= size:
        raise UserError(
            f"{tokenizer.folder}: the tokenizer gives the id {last:,}, but {network.files[0]} has "
            f"{size:,} tokens. Take the tokenizer from {tokenizer.repository_hint}."
        )


def warn_of_foreign_syntax(prompt: str) -> None:
    """Warn of each kind of syntax that other programs interpret, and that is plain text here."""
    for pattern, meaning in FOREIGN_SYNTAX.items():
        if re.search(pattern, prompt):
            warnings.warn(f"the prompt is read as it stands: {meaning}", stacklevel=4)


def warn_if_truncated(tokens: Tokens, length: int) -> None:
    """Warn of each prompt that is longer than `length` tokens, with the text that is lost."""
    for lost in tokens.truncated:
        if lost:
            shown = lost if len(lost) <= 200 else f"{lost[:200]}..."
            warnings.warn(
                f"the prompt is longer than {length} tokens; this end was cut off: {shown!r}",
                stacklevel=4,
            )


def build_text_encoder(
    text: FLUX1Text | FLUX2Text, files: Mapping[str, Any], length: int, **loading
) -> TextEncoder:
    """Build the text encoder of a model from the files that `weights.locate` found for it.

    `loading`: options of LazyModule that all networks share, such as device and dtype.
    """
    networks = build_networks(text, files, **loading)
    if isinstance(text, FLUX1Text):
        tokenizers = files["t5_tokenizer"], files["clip_tokenizer"]
        return FLUX1TextEncoder(networks["t5"], networks["clip"], *tokenizers, length)
    kind = FLUX2TextEncoder if text.model.padding_position is None else FLUX3TextEncoder
    return kind(networks["model"], files["tokenizer"], length)


def build_networks(
    text: FLUX1Text | FLUX2Text, files: Mapping[str, Any], **loading
) -> dict[str, LazyModule]:
    """Build those networks of a text encoder that have files: "t5" and "clip", or "model"."""
    options: dict[str, tuple] = {}
    if isinstance(text, FLUX1Text):
        t5: dict[str, Any] = dict(
            ignore_keys=t5_ignore_keys,
            rename=t5_from_llama_cpp,
            second_names={"encoder.embed_tokens.weight": "shared.weight"},
            block_lists=("encoder.block",),
        )
        clip: dict[str, Any] = dict(ignore_keys=clip_ignore_keys, rename=with_text_model)
        options = {"t5": (T5, text.t5, t5), "clip": (CLIP, text.clip, clip)}
    else:
        model, depth = text.model, max(text.model.layers)
        if model.qk_norm and "model" in files:
            check_qwen(files["model"], model)

        def ignore_keys(name: str) -> bool:
            return language_model_ignore_keys(name, depth)

        def reorder(info: TensorInfo, rows: Tensor, metadata: Mapping) -> Tensor:
            return halves_from_pairs(info, rows, metadata, model.head_dim)

        language_model: dict[str, Any] = dict(
            ignore_keys=ignore_keys,
            rename=language_model_from_llama_cpp,
            reorder=reorder,
            block_lists=("layers",),
        )
        options = {"model": (LanguageModel, model, language_model)}
    return {
        part: LazyModule(build, config, files[part], **own, **loading)
        for part, (build, config, own) in options.items()
        if part in files
    }


def check_qwen(files: Sequence[Path], model: LanguageModelConfig) -> None:
    """Raise UserError for Qwen3-VL in place of Qwen3, and the other way round."""
    of = {"Qwen3": "FLUX.2 [klein]", "Qwen3-VL": "FLUX 3"}
    wanted = "Qwen3" if model.padding_position is None else "Qwen3-VL"
    read = max(model.layers) if wanted == "Qwen3-VL" else sys.maxsize
    found = qwen_kind(*read_headers(files), read)
    if found is not None and found != wanted:
        raise UserError(
            f"text_encoder: {files[0]} is {found}, of {of[found]}, but {of[wanted]} reads "
            f"{wanted}. Pass text_encoder/ of a repository of {of[wanted]}."
        )


def with_text_model(name: str) -> str:
    """Return a name of CLIP with the `text_model.` that transformers has not written since 5.6."""
    flat = re.match(r"(embeddings|encoder\.layers|final_layer_norm)\.", name)
    return f"text_model.{name}" if flat else name


# The following tell of a tensor's name in a file whether the network has no use for the tensor.


def t5_ignore_keys(name: str) -> bool:
    """The decoder, in files of all of T5, and the second name of the shared embedding."""
    return name == "encoder.embed_tokens.weight" or name.startswith(("decoder.", "lm_head."))


def clip_ignore_keys(name: str) -> bool:
    """The image encoder and the projections, in files of all of CLIP; the numbers of positions."""
    parts = ("vision_model.", "visual_projection.", "text_projection", "logit_scale")
    return name.startswith(parts) or name.endswith("embeddings.position_ids")


def language_model_ignore_keys(name: str, depth: int) -> bool:
    """Everything above the first `depth` layers, and vision parts of Mistral Small and Qwen3-VL."""
    if layer := re.match(r"layers\.(\d{1,9})\.", name):
        return int(layer[1]) >= depth
    parts = (
        "norm.",
        "rope_freqs.",
        "lm_head.",
        "language_model.lm_head.",
        "vision_tower.",
        "multi_modal_projector.",
        "visual.",
    )
    return name.removeprefix("model.").startswith(parts)
