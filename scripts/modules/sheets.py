"""Contact sheets of an embedded model: prompts, edits, guidance from 1 to 5, steps from 1 to 8."""

import itertools
import textwrap
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

import flux
from flux import toy

SEED = 4_000_000  # of the requests
SIDE, GAP, LINE = 144, 8, 12  # pixels: of an image, between two cells, of a line of text
GUIDANCE, STEPS = (1.0, 2.0, 3.0, 4.0, 5.0), (1, 2, 3, 4, 6, 8)

Cell = tuple[list[Image.Image], str]  # images in a row, and the text below


def write_sheets(pipe: flux.Pipeline, folder: Path, seed: int) -> None:
    """Write PNG files of 256 colours, named by the model and by their content."""
    folder.mkdir(parents=True, exist_ok=True)
    scenes = itertools.islice(toy.scenes(SEED + seed, held=True, complete=True), 24)
    prompts = [str(scene) for scene in scenes]
    images = pipe(prompts, seed=seed)
    sheets = {"text": sheet([([i], prompt) for i, prompt in zip(images, prompts, strict=True)], 8)}
    for name, values in (("guidance", GUIDANCE), ("steps", STEPS)):
        columns = [pipe(prompts[:3], seed=seed, **{name: value}) for value in values]
        cells: list[Cell] = []
        for row in zip(*columns, strict=True):
            for value, image in zip(values, row, strict=True):
                cells.append(([image], f"{name} {value:g}"))
        sheets[name] = sheet(cells, len(values))
    if pipe.spec.image_mode == "reference":
        sheets["edits"] = edits_sheet(pipe, seed)
    for name, page in sheets.items():
        page.quantize(256).save(folder / f"{pipe.spec.name}-{name}.png", optimize=True)


def edits_sheet(pipe: flux.Pipeline, seed: int) -> Image.Image:
    """Draw at most two edits of each kind: the images before, and the result."""
    size, rng = pipe.spec.size, np.random.default_rng(seed)
    kinds: dict[str, list[toy.Edit]] = {}
    for edit in itertools.islice(toy.edits(SEED + seed, held=True), 200):
        kinds.setdefault(edit.kind, []).append(edit)
    cells: list[Cell] = []
    for edit in [edit for edits in kinds.values() for edit in edits[:2]]:
        before = [Image.fromarray(toy.draw(layout, size, size, rng)) for layout in edit.before]
        result = pipe(str(edit), seed=seed, images=flux.ImageInputs(tuple(before)))
        cells.append(([*before, *result], str(edit)))
    return sheet(sorted(cells, key=lambda cell: len(cell[0])), 4)


def sheet(cells: Sequence[Cell], columns: int) -> Image.Image:
    """Arrange cells in rows of `columns`, all as wide as the widest.

    Images are square, and a text has up to five lines.
    """
    font, below = ImageFont.load_default(11), 5 * LINE + GAP
    width = max(len(images) for images, _ in cells) * (SIDE + 2) + GAP
    rows = -(-len(cells) // columns)
    page = Image.new("RGB", (columns * width - GAP, rows * (SIDE + below)), "white")
    canvas = ImageDraw.Draw(page)
    for number, (images, text) in enumerate(cells):
        x, y = number % columns * width, number // columns * (SIDE + below)
        for place, image in enumerate(images):
            small = image.resize((SIDE, SIDE), Image.Resampling.LANCZOS)
            page.paste(small, (x + place * (SIDE + 2), y))
        lines = textwrap.fill(text, len(images) * SIDE // 6)
        canvas.multiline_text((x, y + SIDE + 3), lines, fill="black", font=font, spacing=1)
    return page
