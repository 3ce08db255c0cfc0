"""Train text encoders that read what people type; the transformer stays as it is.

The features of what somebody types become those that the first encoder gives for the completed
caption (`recipe/reading.py`). The reader has twice the layers. Its first half finds the tokens of
the completed caption, and its second half starts as the first encoder.
"""

import itertools
import re
import string
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from modules.command_line import say
from torch import Tensor, nn

from flux import toy
from flux.configs import FLUX1Text, FLUX2Text, ModelSpec
from flux.errors import UserError
from flux.transformer import Flux
from recipe.networks import EDGES, Networks
from recipe.reading import MOST, completed, places, reading
from recipe.text import TextEncoder, Tokenizer, Words
from recipe.tokenizer import texts, train_tokenizers
from recipe.trainer import TimedTrainer, device_of, optimizers

BATCH = 24
AROUND = {FLUX1Text: (0, 1), FLUX2Text: (3, 9)}  # tokens before and after a prompt
T5_EOS = 1
TEXTS = 20_000  # for tokenizers
OUTPUT = re.compile(r"(\bo|o_proj|out_proj|wo|down_proj|fc2)\.(weight|bias)")


class Reading(NamedTuple):
    """A batch: the words that somebody typed, and the features that a reader learns for them."""

    words: Words  # (B, T) each
    rows: Tensor  # where the features belong, (B, N)
    tokens: Tensor  # the first encoder's features, each token at its place, (B, N, D)
    numbers: Tensor  # of these tokens among the known ones; padding where none belongs, (B, N)
    padding: Tensor  # the features of all other rows, (B, 1, D)
    pooled: Tensor | None  # (B, V)


class Readings:
    """Pairs of `reading`, as tokens and features.

    `table` has the first encoder's embeddings of the tokens of the grammar, whose ids are `known`.
    Parts of words never occur, and their embeddings are close to those of the words.
    """

    def __init__(self, networks: Networks, first: Tokenizer, new: Tokenizer):
        self.networks, self.first, self.new = networks, first, new
        self.known = next(iter(first(texts()[::3]).values())).unique()
        self.table = next(iter(tables(networks.text).values()))[self.known].detach()
        self.before, self.behind = AROUND[type(first.spec.text)]
        self.count = self.before + MOST + self.behind

    def that_fit(self, pairs: Iterator[tuple[str, str]]) -> Iterator[tuple[str, str]]:
        """Drop what has too many tokens; T5's features need rows behind them."""
        for text, caption in pairs:
            with suppress(UserError):
                words = self.new([text])
                if self.begin(words) + self.count <= self.new.spec.text_length:
                    yield text, caption

    def begin(self, words: Words) -> Tensor:
        """Return the first row of the features, (B,).

        Qwen3 knows its rows: the features are at the end. T5 only knows distances: they follow the
        end of the text.
        """
        if "t5" in words:
            return (words["t5"] == T5_EOS).int().argmax(1) + 1
        return torch.full((len(words["ids"]),), self.new.spec.text_length - self.count)

    @torch.no_grad()
    def __call__(self, pairs: Sequence[tuple[str, str]]) -> Reading:
        prompts, captions = map(list, zip(*pairs, strict=True))
        device = device_of(self.networks)
        words, known = self.new(prompts), self.first(captions)
        features = self.networks.text(**{name: x.to(device) for name, x in known.items()})
        order = torch.tensor(list(map(self.order, captions)))  # (B, N)
        numbers = torch.searchsorted(self.known, next(iter(known.values())).gather(1, order))
        rows = self.begin(words)[:, None] + torch.arange(self.count)
        return Reading(
            {name: x.to(device) for name, x in words.items()},
            rows.to(device),
            pick_rows(features.tokens, order.to(device)),
            numbers.to(device),
            features.tokens[:, -1:],
            features.pooled,
        )

    def order(self, caption: str) -> list[int]:
        """Return the first encoder's row for each row of the features: its last one is padding."""
        found, padding = places(caption), self.first.spec.text_length - 1
        end = self.before + len(found)
        order = [*range(self.before), *MOST * [padding], *range(end, end + self.behind)]
        for number, place in enumerate(found, self.before):
            order[self.before + place] = number
        return order


def pick_rows(tokens: Tensor, rows: Tensor) -> Tensor:
    """(B, T, D), (B, N) -> (B, N, D)."""
    return tokens.gather(1, rows[..., None].expand(-1, -1, tokens.shape[2]))


def reading_spec(spec: ModelSpec) -> ModelSpec:
    """Return the row of a model whose text encoders read, of the row that it was trained by."""
    text = spec.text
    if isinstance(text, FLUX1Text):
        # with enough buckets, each distance has its own
        t5 = replace(text.t5, vocab_size=1024, depth=2 * text.t5.depth, num_buckets=128)
        clip = replace(text.clip, vocab_size=1024, eos_id=1023, depth=3, max_length=48)
        return replace(spec, text=replace(text, t5=t5, clip=clip), text_length=48)
    depth = max(text.model.layers)
    layers = tuple(depth + layer for layer in text.model.layers)
    model = replace(text.model, vocab_size=1024, layers=layers)
    return replace(spec, text=replace(text, model=model), text_length=64)


@torch.no_grad()
def new_reader(spec: ModelSpec, first: TextEncoder, old: Tokenizer, new: Tokenizer) -> TextEncoder:
    """Return a reader. Its last layers, and embeddings of known tokens, are the first encoder's."""
    reader = TextEncoder(spec.text)
    reader.near = None
    for name, table in tables(reader).items():
        ours, theirs = (each.parts[name].tokenizer.get_vocab() for each in (new, old))
        both = [token for token in ours if token in theirs]
        known = tables(first)[name][[theirs[token] for token in both]]
        table[[ours[token] for token in both]] = known
    for ours, theirs in zip(stacks(reader), stacks(first), strict=True):
        for block, start in zip(ours[-len(theirs) :], theirs, strict=True):
            block.load_state_dict(start.state_dict(), strict=False)
            for name, weight in block.named_parameters():
                if OUTPUT.search(name):
                    weight *= 0.3  # the first half has to be heard
    for name, norm in reader.named_modules():
        if name.endswith("final_layer_norm"):
            norm.load_state_dict(first.get_submodule(name).state_dict())
    return reader


def tables(text: TextEncoder) -> dict[str, Tensor]:
    """Return the tables of embeddings by their tokenizers' names; that of the tokens first."""
    if not hasattr(text, "t5"):
        return {"tokenizer": text.model.embed_tokens.weight}
    clip = text.clip.text_model.embeddings.token_embedding.weight
    return {"t5_tokenizer": text.t5.shared.weight, "clip_tokenizer": clip}


def stacks(text: TextEncoder) -> list[nn.ModuleList]:
    """Return the stacks of layers; that of the tokens first."""
    if not hasattr(text, "t5"):
        return [text.model.layers]
    return [text.t5.encoder.block, text.clip.text_model.encoder.layers]


# ---------------------------------------------------------------- training


class Reader(nn.Module):
    """A text encoder that learns to read. `halfway` are its hidden states in the middle."""

    def __init__(self, text: TextEncoder):
        super().__init__()
        self.text, self.halfway = text, None
        blocks = stacks(text)[0]
        blocks[len(blocks) // 2].register_forward_pre_hook(self.keep)

    def keep(self, block: nn.Module, inputs: tuple) -> None:
        self.halfway = inputs[0]  # (B, T, D)

    def logits(self, rows: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        """Return the logits of the first encoder's tokens, and squared distances to them.

        Both are (B, N, vocabulary); distances are in units of the table's deviation.
        """
        hidden = pick_rows(self.halfway, rows).float()
        products = hidden @ table.T
        lengths = hidden.square().sum(-1, keepdim=True) + table.square().sum(-1)
        distance = (lengths - 2 * products) / table.var()
        return -distance / 8, distance / table.shape[1]


def reading_loss(reader: Reader, transformer: Flux, table: Tensor, batch: Reading) -> Tensor:
    """Return the error of the features as the transformer reads them, and of the tokens halfway."""
    features = reader.text(**batch.words)
    wanted = batch.padding.expand_as(features.tokens)
    index = batch.rows[..., None].expand_as(batch.tokens)
    error = seen_error(transformer.txt_in, features.tokens, wanted.scatter(1, index, batch.tokens))
    found = error.gather(1, batch.rows)
    logits, distance = reader.logits(batch.rows, table)
    loss = (
        found.mean()
        + 0.25 * (error.sum() - found.sum()) / (error.numel() - found.numel())
        + 0.3 * F.cross_entropy(logits.flatten(0, 1), batch.numbers.flatten())
        + 0.1 * distance.gather(2, batch.numbers[..., None]).mean()
    )
    if features.pooled is not None:
        layer = transformer.vector_in.in_layer
        loss = loss + 0.5 * seen_error(layer, features.pooled, batch.pooled).mean()
    return loss


def seen_error(layer: nn.Linear, ours: Tensor, theirs: Tensor) -> Tensor:
    """Return the squared error behind a layer, over the variance there: (..., D) -> (...)."""
    error = F.linear(ours.float() - theirs, layer.weight).square().mean(-1)
    return error / F.linear(theirs, layer.weight).var(correction=0)


@torch.no_grad()
def understood(reader: Reader, table: Tensor, batch: Reading) -> Tensor:
    """Return for each text whether all tokens of its completed caption are found halfway."""
    reader.text(**batch.words)
    return (reader.logits(batch.rows, table)[0].argmax(-1) == batch.numbers).all(1)


def train_reader(
    run: Path, spec: ModelSpec, networks: Networks, first: Tokenizer, minutes: float
) -> TextEncoder:
    """Return the text encoder of `spec`, which reads for the transformer of `networks`."""
    edited = spec.image_mode == "reference"
    train_tokenizers(run, spec.text, typed(edited))
    readings = Readings(networks.requires_grad_(False), first, Tokenizer(run, spec))
    torch.manual_seed(0)
    text = new_reader(spec, networks.text, first, readings.new)
    reader, pairs = Reader(text.to(device_of(networks))), readings.that_fit(reading(edited))
    some = [(prompt.text, str(completed(prompt.scene))) for prompt in toy.open_prompts()]
    some = readings(list(readings.that_fit(iter(some))))

    def loss(step: int) -> Tensor:
        batch = readings(list(itertools.islice(pairs, BATCH)))
        return reading_loss(reader, networks.transformer, readings.table, batch)

    def report() -> None:
        share = understood(reader, readings.table, some).float().mean()
        say("", f"{share:.1%} of the open prompts are read")

    trainer = TimedTrainer(
        reader,
        optimizers(reader, 3e-3, 1e-3, EDGES),
        run / "reader.safetensors",
        minutes,
        ema=0.998,
        cooling=0.5,
    )
    trainer.run(loss, every_minutes=4, sheet=report)
    return text


def typed(edited: bool) -> list[str]:
    """Return texts for tokenizers. No two letters of a written word become one token."""
    some = (text for text, meant in itertools.islice(reading(edited), TEXTS) if '"' not in meant)
    letters = [f'the word "{letter}" in the' for letter in string.ascii_uppercase] * 40
    return [text for text in some if not text.isupper()] + letters
