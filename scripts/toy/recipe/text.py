"""Captions to features: the tokenizers, and the text encoders that learn with the transformer.

Between the two are a caption's *words*, as they are kept with the latents: token ids of T5 and of CLIP; or those of a language
model, and their mask; (B, T) each.
"""

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
NEAR = (-3, -2, -1, 1, 2, 3)  # how far from a token of T5 are those that it shall know of


class Tokenizer:
    """Of a row's family, from the files of a run."""

    def __init__(self, run: Path, spec: ModelSpec):
        kinds = {
            "t5_tokenizer": T5Tokenizer,
            "clip_tokenizer": CLIPTokenizer,
            "tokenizer": QwenTokenizer,
        }
        self.parts = {
            part: kinds[part]((run / names[0]).parent)
            for part, names in spec.text.tokenizers.items()
        }
        self.spec = spec

    def __call__(self, texts: list[str]) -> Words:
        """UserError if a text has more tokens than the model takes."""
        if isinstance(text := self.spec.text, FLUX1Text):
            t5, clip = self.parts["t5_tokenizer"], self.parts["clip_tokenizer"]
            return {
                "t5": whole(t5, texts, self.spec.text_length).ids,
                "clip": whole(clip, texts, text.clip.max_length).ids,
            }
        tokens = whole(self.parts["tokenizer"], texts, self.spec.text_length)
        return {"ids": tokens.ids, "mask": tokens.mask}


def whole(tokenizer: PromptTokenizer, texts: list[str], length: int) -> Tokens:
    """UserError if a text has more tokens."""
    tokens = tokenizer(texts, length)
    if cut := [text for text, rest in zip(texts, tokens.truncated, strict=True) if rest]:
        raise UserError(
            f"{cut[0]!r} has more than {length} tokens: give the model a larger text_length, or the grammar less"
        )
    return tokens


class TextEncoder(nn.Module):
    """The networks of a row's text encoder, under the names that the row has for their files.

    For training alone, `near` tells of T5's tokens which ones stand at the distances NEAR. None: there is nothing to learn.
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
    """Heads begin with a look back or ahead, in turn, and each pair of them farther than the one before."""
    table = (
        t5.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight
    )  # (buckets, heads)
    distance = torch.arange(
        len(table) // 2
    )  # the first buckets are of keys before a token, the rest of those after it
    for head in range(table.shape[1]):
        slope = 0.3 ** (head // 2)
        halves = -slope * distance, -8 * slope * distance
        table[:, head] = torch.cat(halves if head % 2 == 0 else halves[::-1])
