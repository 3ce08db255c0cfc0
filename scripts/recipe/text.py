"""Captions to features: the tokenizers, and the text encoders that learn with the transformer.

Between the two are a caption's *words*, as they are kept with the latents: token ids of T5 and of CLIP; or those of a language
model, and their mask; (B, T) each.
"""

from pathlib import Path

from torch import Tensor, nn

from flux.clip import CLIP
from flux.configs import FLUX1Text, FLUX2Text, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.t5 import T5
from flux.text import TextFeatures
from flux.tokenizers import CLIPTokenizer, PromptTokenizer, QwenTokenizer, T5Tokenizer, Tokens

Words = dict[str, Tensor]


class Tokenizer:
    """Of a row's family, from the files of a run."""

    def __init__(self, run: Path, spec: ModelSpec):
        kinds = {"t5_tokenizer": T5Tokenizer, "clip_tokenizer": CLIPTokenizer, "tokenizer": QwenTokenizer}
        self.parts = {part: kinds[part]((run / names[0]).parent) for part, names in spec.text.tokenizers.items()}
        self.spec = spec

    def __call__(self, texts: list[str]) -> Words:
        """UserError if a text has more tokens than the model takes."""
        if isinstance(text := self.spec.text, FLUX1Text):
            t5, clip = self.parts["t5_tokenizer"], self.parts["clip_tokenizer"]
            return {"t5": whole(t5, texts, self.spec.text_length).ids, "clip": whole(clip, texts, text.clip.max_length).ids}
        tokens = whole(self.parts["tokenizer"], texts, self.spec.text_length)
        return {"ids": tokens.ids, "mask": tokens.mask}


def whole(tokenizer: PromptTokenizer, texts: list[str], length: int) -> Tokens:
    """UserError if a text has more tokens."""
    tokens = tokenizer(texts, length)
    if cut := [text for text, rest in zip(texts, tokens.cut, strict=True) if rest]:
        raise UserError(f"{cut[0]!r} has more than {length} tokens: give the model a larger text_length, or the grammar less")
    return tokens


class TextEncoder(nn.Module):
    """The networks of a row's text encoder, under the names that the row has for their files."""

    def __init__(self, text: FLUX1Text | FLUX2Text):
        super().__init__()
        if isinstance(text, FLUX1Text):
            self.t5, self.clip = T5(text.t5), CLIP(text.clip)
        else:
            self.model = LanguageModel(text.model)

    def forward(self, **words: Tensor) -> TextFeatures:
        if "t5" in words:
            return TextFeatures(self.t5(words["t5"]), self.clip(words["clip"]))
        return TextFeatures(self.model(words["ids"], words["mask"]), None)

    def blocks(self) -> list[nn.Module]:
        if hasattr(self, "t5"):
            return [*self.t5.encoder.block, *self.clip.text_model.encoder.layers]
        return list(self.model.layers)
