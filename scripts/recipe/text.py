"""Captions to features: the tokenizer, and the text encoder that learns with the transformer.

Between the two are a caption's *words*: its ids and their mask by name, (B, T) each, as they are kept with the latents.
"""

from pathlib import Path

from torch import Tensor, nn

from flux.configs import FLUX2Text, ModelSpec
from flux.errors import UserError
from flux.language_model import LanguageModel
from flux.text import TextFeatures
from flux.tokenizers import QwenTokenizer

Words = dict[str, Tensor]


class Tokenizer:
    def __init__(self, run: Path, spec: ModelSpec):
        self.tokenizer, self.length = QwenTokenizer(run / "tokenizer"), spec.text_length

    def __call__(self, texts: list[str]) -> Words:
        """UserError if a text has more tokens than the model's row takes."""
        tokens = self.tokenizer(texts, self.length)
        if cut := [text for text, rest in zip(texts, tokens.cut, strict=True) if rest]:
            raise UserError(f"{cut[0]!r} has more than {self.length} tokens: give the model a larger text_length, or the "
                            "grammar less")  # fmt: skip
        return {"ids": tokens.ids, "mask": tokens.mask}


class TextEncoder(nn.Module):
    def __init__(self, text: FLUX2Text):
        super().__init__()
        self.model = LanguageModel(text.model)

    def forward(self, ids: Tensor, mask: Tensor) -> TextFeatures:
        return TextFeatures(self.model(ids, mask), None)
