"""What the transformer learns from: scenes and edits that are not held out, drawn once, as latents and words."""

import copy
import itertools
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from einops import rearrange
from tqdm import tqdm

from flux import toy
from flux.autoencoder import AutoEncoder
from flux.toy.drawing import TOKEN, ink, spelled
from flux.toy.scenes import LETTERS
from flux.training.checkpoint import save_tensors
from recipe.images import to_pixels
from recipe.text import Tokenizer
from recipe.trainer import bfloat16_is_faster, device_of

SCENES = {(256, 256): 12000, (320, 192): 1500, (192, 320): 1500}  # width, height: images
EDITS = {
    "edits-1": 8000,
    "families": 24000,
    "edits-2": 1500,
}  # of one image, of the same few, and of two; all 256x256
CHANGES = (
    "colour",
    "size",
    "pattern",
    "shape",
    "remove",
)  # kinds of edits about one of the things that an image shows
THINGS = (None, *toy.SHAPES, *LETTERS)  # what a token can show; None is the background
PART = 4  # pixels: the side of the parts of a token in which it is told how much is covered


def images(width: int, height: int) -> Iterator[tuple[toy.Scene, list[toy.Layout]]]:
    """Endless scenes of one size, always the same, each with its layout."""
    rng = np.random.default_rng((width, height))
    for scene in toy.scenes(1000 + width, held=False):
        layout = toy.arrange(scene, rng)
        if not toy.shows_held_out(layout):  # where the caption leaves the background open
            yield scene, [layout]


def edits(kind: str) -> Iterator[tuple[toy.Edit, list[toy.Layout]]]:
    """Endless edits of a kind of EDITS, always the same; each with the layouts of all its images, the result first.

    Of edits of one image two thirds are CHANGES, which take the most images to learn. Which thing is meant is learnt of
    families: of images of which there is one edit, it is learnt by heart.
    """
    if kind == "families":
        for edit in itertools.chain.from_iterable(toy.families(3000)):
            if not any(map(toy.shows_held_out, layouts := [edit.after, *edit.before])):
                yield edit, layouts
        return
    count = int(kind[-1])
    rng = np.random.default_rng(count)
    for edit in toy.edits(2000 + count, held=False):
        if len(edit.before) == count and (count > 1 or edit.kind in CHANGES or rng.random() < 0.4):
            yield edit, [edit.after, *edit.before]


def shown(layout: toy.Layout, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """What each token of an image shows: its place in THINGS, (h, w); and how much of each of its 4x4 parts is covered by
    anything, (h, w, 16) from 0 to 255; both uint8."""
    size = height // TOKEN, TOKEN, width // TOKEN, TOKEN
    things, most, covered = (
        np.zeros(size[::2], np.uint8),
        np.zeros(size[::2]),
        np.zeros((height, width)),
    )
    for item in layout.items:
        for thing, inked in parts(item, width, height):
            covered = np.maximum(covered, inked)
            share = inked.reshape(size).mean((1, 3))
            things[share > most] = THINGS.index(thing)
            most = np.maximum(share, most)
    cells = TOKEN // PART
    covered = covered.reshape(height // TOKEN, cells, PART, width // TOKEN, cells, PART).mean(
        (2, 5)
    )
    return things, np.rint(255 * rearrange(covered, "h y w x -> h w (y x)")).astype(np.uint8)


def box(covered: np.ndarray) -> tuple[int, int, int, int]:
    """The first row and column of tokens of which something is covered, and those behind the last; (h, w, 16) as of `shown`."""
    there = np.any(covered, axis=2)
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def parts(item: toy.Item, width: int, height: int) -> Iterator[tuple[str, np.ndarray]]:
    """A shape, or each letter of a word, and what it covers, (H, W) from 0 to 1."""
    if isinstance(item.thing, toy.Object):
        yield item.thing.shape, ink(item, width, height)
    else:
        yield from zip(
            item.thing.letters,
            spelled(item.thing.letters, item.y * height, width, height),
            strict=True,
        )


@torch.no_grad()
def encode_all(run: Path, model: AutoEncoder, words: Tokenizer, edited: bool = True) -> None:
    """One file a kind. Of its images, each once: latents (P, C, h, w), as float16; what their tokens show, as `shown` tells
    it, (P, h, w) and (P, h, w, 16); and the box of tokens outside which nothing is shown: its first row and column, and those
    behind its last, (P, 4). Of its texts: their words, and which images are theirs, (N, 1), of edits the result first and
    then those before, (N, 1 + R).

    Files that are there are kept. `edited`: with edits.
    """
    device = device_of(model)
    dtype = torch.bfloat16 if bfloat16_is_faster(device) else torch.float32
    model = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last)
    kinds = {f"latents-{w}x{h}": (images(w, h), count, (w, h)) for (w, h), count in SCENES.items()}
    if edited:
        kinds |= {kind: (edits(kind), count, (256, 256)) for kind, count in EDITS.items()}
    for name, (some, count, size) in kinds.items():
        path = run / f"{name}.safetensors"
        if path.exists():
            continue
        places, texts, which = {}, [], []
        for text, layouts in itertools.islice(some, count):
            texts.append(str(text))
            which.append([places.setdefault(layout, len(places)) for layout in layouts])
        latents, things, covered, boxes = [], [], [], []
        for layout in tqdm(places, name, mininterval=5):
            pixels = to_pixels(toy.draw(layout, *size)[None])
            latents += (
                model.encode(pixels.to(device, dtype, memory_format=torch.channels_last))
                .half()
                .cpu()
            )
            shows, covers = shown(layout, *size)
            things.append(torch.from_numpy(shows))
            covered.append(torch.from_numpy(covers))
            boxes.append(torch.tensor(box(covers)))
        some_of_it = dict(latents=latents, things=things, covered=covered, boxes=boxes)
        of_images = {name: torch.stack(tensors) for name, tensors in some_of_it.items()}
        save_tensors(path, of_images | words(texts) | {"images": torch.tensor(which)})
