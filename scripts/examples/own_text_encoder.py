"""A text encoder of one's own: here one that understands German, and a table of vectors.

python scripts/examples/own_text_encoder.py --output german.png
"""

from example import parse, save

args = parse(__doc__, prompt="ein kleiner roter Stern auf blauem Grund")

import torch

import flux

GERMAN = {"ein": "a", "eine": "a", "kleiner": "small", "grosser": "large", "roter": "red"}
GERMAN |= {"blauem": "blue", "weissem": "white", "stern": "star", "kreis": "circle"}
GERMAN |= {"auf": "on a", "grund": "background"}


class German(flux.TextEncoder):
    """Translates word by word for another encoder, whose networks it shares."""

    def __init__(self, inner):
        super().__init__(inner.length)
        self.inner, self.networks = inner, inner.networks

    def encode_one(self, prompt):
        return self.inner.encode_one(" ".join(GERMAN.get(w.lower(), w) for w in prompt.split()))


class Table(flux.TextEncoder):
    """A random vector for each word, and no network: as a start for training."""

    def __init__(self, width, words=1000):
        super().__init__(length=32)
        self.table = torch.nn.Embedding(words, width, _weight=torch.randn(words, width) / 50)

    def encode_one(self, prompt):
        rows = [sum(map(ord, word)) % self.table.num_embeddings for word in prompt.split()]
        return flux.TextFeatures(self.table(torch.tensor([rows])))


english = flux.load(args.model)
pipe = flux.load(args.model, text=German(english.text))
image = pipe(args.prompt, seed=args.seed, steps=args.steps)[0]
untrained = flux.load(text=Table(english.spec.transformer.context_dim))  # needs no encoder's files
noise = untrained(args.prompt, seed=args.seed, steps=args.steps, guidance=1.0)[0]
print(f"encoded {list(pipe.text.cache)[0]!r}")
save(args.output, [image, noise])
