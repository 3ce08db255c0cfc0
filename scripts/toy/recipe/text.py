"""Captions to features: the tokenizers, and the text encoders, trained with the transformer.

Between the two are a caption's *words*, which are saved with the latents: token ids of T5 and of
CLIP; or of a language model, with their mask; (B, T) each.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from flux.clip import CLIP
from flux.configs import FLUX1Text, FLUX2Text, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.t5 import T5
from flux.text_encoder import TextFeatures
from flux.tokenizers import CLIPTokenizer, PromptTokenizer, QwenTokenizer, T5Tokenizer, Tokens

Words = dict[str, Tensor]
NEAR = (-3, -2, -1, 1, 2, 3)  # distances of the neighbours that a token of T5 predicts

TOKENIZERS = {
    "t5_tokenizer": T5Tokenizer,
    "clip_tokenizer": CLIPTokenizer,
    "tokenizer": QwenTokenizer,
}


class Tokenizer:
    """The tokenizers of a model, from the files of a run."""

    def __init__(self, run: Path, spec: ModelSpec):
        self.spec, self.parts = spec, {}
        for part, names in spec.text.tokenizers.items():
            self.parts[part] = TOKENIZERS[part]((run / names[0]).parent)

    def __call__(self, texts: list[str]) -> Words:
        """Return the words of texts. UserError if a text has more tokens than the model takes."""
        text = self.spec.text
        if isinstance(text, FLUX1Text):
            t5, clip = self.parts["t5_tokenizer"], self.parts["clip_tokenizer"]
            return {
                "t5": untruncated(t5, texts, self.spec.text_length).ids,
                "clip": untruncated(clip, texts, text.clip.max_length).ids,
            }
        tokens = untruncated(self.parts["tokenizer"], texts, self.spec.text_length)
        return {"ids": tokens.ids, "mask": tokens.mask}

    def first_that_fits(self, texts: Iterator[str]) -> Words:
        """Return the words of the first text that has no more tokens than the model takes."""
        for text in texts:
            with suppress(UserError):
                return self([text])
        raise ValueError("texts: none fits")


def untruncated(tokenizer: PromptTokenizer, texts: list[str], length: int) -> Tokens:
    """Return the tokens of texts. UserError if a text has more than `length`."""
    tokens = tokenizer(texts, length)
    for text, rest in zip(texts, tokens.truncated, strict=True):
        if rest:
            raise UserError(
                f"text_length: {text!r} has more than {length} tokens. Give the model more."
            )
    return tokens


class TextEncoder(nn.Module):
    """The networks of a model's text encoder, under the names of its spec.

    `near` is for training: it predicts neighbours from T5's tokens. None: nothing to train.
    """

    def __init__(self, text: FLUX1Text | FLUX2Text):
        super().__init__()
        if isinstance(text, FLUX1Text):
            self.t5, self.clip = T5(text.t5), CLIP(text.clip)
            look_around(self.t5)
            self.near = nn.Linear(text.t5.hidden_size, len(NEAR) * text.t5.hidden_size, bias=False)
        else:
            self.model, self.near = LanguageModel(text.model), None

    def forward(self, **words: Tensor) -> TextFeatures:
        if "t5" in words:
            return TextFeatures(self.t5(words["t5"]), self.clip(words["clip"]))
        return TextFeatures(self.model(words["ids"], words["mask"]), None)

    def blocks(self) -> list[nn.Module]:
        if hasattr(self, "t5"):
            return [*self.t5.encoder.block, *self.clip.text_model.encoder.layers]
        return list(self.model.layers)


@torch.no_grad()
def look_around(t5: T5) -> None:
    """Let heads first attend back and ahead in turn, each pair farther than the one before."""
    attention = t5.encoder.block[0].layer[0].SelfAttention
    table = attention.relative_attention_bias.weight  # (buckets, heads)
    distance = torch.arange(len(table) // 2)  # buckets of keys before a token, then of keys after
    for head in range(table.shape[1]):
        slope = 0.3 ** (head // 2)
        halves = -slope * distance, -8 * slope * distance
        table[:, head] = torch.cat(halves if head % 2 == 0 else halves[::-1])
