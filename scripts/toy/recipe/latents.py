"""The training data of the transformer: scenes and edits, drawn once, as latents."""

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
from recipe.trainer import bfloat16_is_faster, device_of

SCENES = {  # width, height: images
    (256, 256): 12000,
    (192, 192): 1000,
    (320, 320): 1000,
    (384, 384): 600,
    (320, 192): 1000,
    (192, 320): 1000,
    (384, 192): 600,
    (192, 384): 600,
}
ALIKE, ALONE = 0.12, 0.3  # shares of scenes with two or three like things, and with one thing
# edits of one image, of the same few images, and of two; all 256x256
EDITS = {"edits-1": 8000, "families": 24000, "edits-2": 1500}
CHANGES = ("colour", "size", "pattern", "shape", "remove")  # kinds of edits of one thing
THINGS = (None, *toy.SHAPES, *LETTERS)  # None is the background
PART = 4  # pixels: the side of the parts of a token whose coverage is predicted


def images(width: int, height: int) -> Iterator[toy.Layout]:
    """Yield the layouts of one size without end, always the same."""
    rng = np.random.default_rng((width, height))
    scenes = toy.scenes(1000 + width, held=None)
    alone = (scene for scene in scenes if is_alone(scene))
    while True:
        chance = rng.random()
        scene = (
            toy.alike(rng) if chance < ALIKE else next(alone if chance < ALIKE + ALONE else scenes)
        )
        layout = toy.arrange(scene, rng)
        if not toy.shows_held_out(layout):
            yield layout


def is_alone(scene: toy.Scene) -> bool:
    """Return whether a scene is of one object."""
    (first, *others) = scene.objects
    return not others and scene.count == 1 and isinstance(first, toy.Object)


def edits(kind: str) -> Iterator[tuple[toy.Edit, list[toy.Layout]]]:
    """Yield edits of a kind without end, always the same, with the layouts of their images.

    The result comes first. Two thirds of the edits of one image are CHANGES, which need the most
    images. Families teach which thing an instruction means: a model memorizes an image that has a
    single edit.
    """
    if kind == "families":
        for edit in itertools.chain.from_iterable(toy.families(3000)):
            layouts = [edit.after, *edit.before]
            if not any(map(toy.shows_held_out, layouts)):
                yield edit, layouts
        return
    count = int(kind[-1])
    rng = np.random.default_rng(count)
    for edit in toy.edits(2000 + count, held=False):
        if len(edit.before) == count and (count > 1 or edit.kind in CHANGES or rng.random() < 0.4):
            yield edit, [edit.after, *edit.before]


def shown(layout: toy.Layout, width: int, height: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the index in THINGS of each token, (h, w), and the coverage of its 4x4 parts.

    Coverage is (h, w, 16) from 0 to 255. Both are uint8.
    """
    size = height // TOKEN, TOKEN, width // TOKEN, TOKEN
    things, most = np.zeros(size[::2], np.uint8), np.zeros(size[::2])
    covered = np.zeros((height, width))
    for item in layout.items:
        for thing, inked in parts(item, width, height):
            covered = np.maximum(covered, inked)
            share = inked.reshape(size).mean((1, 3))
            things[share > most] = THINGS.index(thing)
            most = np.maximum(share, most)
    cells = TOKEN // PART
    covered = covered.reshape(height // TOKEN, cells, PART, width // TOKEN, cells, PART)
    covered = covered.mean((2, 5))
    return things, np.rint(255 * rearrange(covered, "h y w x -> h w (y x)")).astype(np.uint8)


def box(covered: np.ndarray) -> tuple[int, int, int, int]:
    """Return the first row and column of covered tokens, and those behind the last.

    covered: (h, w, 16), as of `shown`.
    """
    there = np.any(covered, axis=2)
    rows, columns = np.flatnonzero(there.any(1)), np.flatnonzero(there.any(0))
    return int(rows[0]), int(columns[0]), int(rows[-1]) + 1, int(columns[-1]) + 1


def parts(item: toy.Item, width: int, height: int) -> Iterator[tuple[str, np.ndarray]]:
    """Yield a shape, or each letter of a word, and its coverage, (H, W) from 0 to 1."""
    if isinstance(item.thing, toy.Object):
        yield item.thing.shape, ink(item, width, height)
    else:
        letters = item.thing.letters
        yield from zip(letters, spelled(letters, item.y * height, width, height), strict=True)


@torch.no_grad()
def encode_all(run: Path, model: AutoEncoder, edited: bool = True) -> None:
    """Write a file for each kind of data. Existing files are kept. `edited`: with edits.

    Each image once: latents (P, C, h, w) in float16; things (P, h, w) and covered (P, h, w, 16), as
    of `shown`; boxes (P, 4), as of `box`. Each text: the numbers of its images, (N, 1), or of the
    result and then the references, (N, 1 + R).
    """
    device = device_of(model)
    dtype = torch.bfloat16 if bfloat16_is_faster(device) else torch.float32
    model = copy.deepcopy(model).to(dtype, memory_format=torch.channels_last)
    kinds = {
        f"latents-{w}x{h}": (([layout] for layout in images(w, h)), count, (w, h))
        for (w, h), count in SCENES.items()
    }
    if edited:
        kinds |= {
            kind: ((layouts for _, layouts in edits(kind)), count, (256, 256))
            for kind, count in EDITS.items()
        }
    for name, (some, count, size) in kinds.items():
        path = run / f"{name}.safetensors"
        if path.exists():
            continue
        places: dict[toy.Layout, int] = {}
        which = [
            [places.setdefault(layout, len(places)) for layout in layouts]
            for layouts in itertools.islice(some, count)
        ]
        latents, things, covered, boxes = [], [], [], []
        for layout in tqdm(places, name, mininterval=5):
            pixels = to_pixels(toy.draw(layout, *size)[None])
            pixels = pixels.to(device, dtype, memory_format=torch.channels_last)
            latents += model.encode(pixels).half().cpu()
            shows, covers = shown(layout, *size)
            things.append(torch.from_numpy(shows))
            covered.append(torch.from_numpy(covers))
            boxes.append(torch.tensor(box(covers)))
        lists = dict(latents=latents, things=things, covered=covered, boxes=boxes)
        of_images = {name: torch.stack(tensors) for name, tensors in lists.items()}
        save_tensors(path, of_images | {"images": torch.tensor(which)})
