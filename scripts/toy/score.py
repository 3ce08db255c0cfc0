"""Scores an embedded model: asks for images that it was not trained on, and measures what it makes against what was asked.

    python scripts/toy/score.py                          # forty minutes on two cores
    python scripts/toy/score.py --only text,edits
    python scripts/toy/score.py --model flux.1-tiny      # which makes no edits
    python scripts/toy/score.py --sheets images        # contact sheets instead

One row is one use of the model: text to image in a few ways, edits, what else it does with images, negative prompts, and
each way to make its matrices small. The first two rows are the measure's own: drawn images, and the same through the
autoencoder. A cell is the share of the images that are right in what was asked of them. Prompts to make images
of name combinations of colour, shape and background, or words, that no caption of the training does, but for one row; and the
results of edits have such combinations. What else it does with images is asked of all.
"""

import argparse
import itertools
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/toy")]

import numpy as np
import torch
from benchmarks.lossy import modes
from PIL import Image
from toy.sheets import write_sheets
from tqdm import tqdm

import flux
from flux import toy
from flux.configs import ModelSpec
from flux.errors import UserError
from flux.toy import Edit, Item, Layout, Object, Scene

SCENES, EDITS, OTHERS = 1_000_000, 1_100_000, 1_200_000  # seeds that no training has used
COLUMNS = (*toy.ATTRIBUTES, "each letter", "all")
BATCH = 20
STRENGTH = 0.8  # of image to image


class Task(NamedTuple):
    """A prompt, the images that go with it, and what the result is measured against."""

    prompt: str
    asked: Scene | Edit
    images: flux.ImageInputs | None = None


class Row(NamedTuple):
    """One use of the model; `groups` are rows of their own, about those of its images of which something else was asked."""

    name: str
    tasks: list[Task]
    options: dict  # of the pipeline's call
    score: Callable[[Sequence[np.ndarray], Sequence], dict[str, float]]
    groups: dict[str, Callable[[Scene | Edit], bool]] = {}


def main() -> int:
    args = arguments()
    torch.set_flush_denormal(
        True
    )  # SiLU's tails are denormal numbers, on which a CPU is ten times slower
    try:
        pipe = flux.load(args.model)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if args.sheets:
        write_sheets(pipe, args.sheets, args.seed)
        return 0
    print(
        f"{pipe.spec.name}: {pipe.spec.steps} steps, guidance {pipe.spec.guidance}; torch {torch.__version__}, "
        f"{platform.machine()} {pipe.device.type.upper()}, {date.today()}\n"
    )
    print("| images | number | " + " | ".join(COLUMNS) + " |")
    print("|---" * (len(COLUMNS) + 2) + "|")
    for name, count, shares in rows(
        pipe, args.only or parts_of(pipe.spec), args.prompts, args.edits, args.seed
    ):
        cells = (f"{shares[column]:.1%}" if column in shares else "" for column in COLUMNS)
        print(f"| {name} | {count} | " + " | ".join(cells) + " |", flush=True)
    return 0


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    embedded = [spec for spec in flux.MODELS.values() if spec.embedded]
    parser.add_argument("--model", choices=[spec.name for spec in embedded], default="flux.2-tiny")
    parser.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="PART[,PART]",
        help=f"of {', '.join(PARTS)}",
    )
    parser.add_argument(
        "--prompts",
        type=int,
        default=500,
        metavar="N",
        help="of text to image; fewer for other rows",
    )
    parser.add_argument("--edits", type=int, default=300, metavar="N", help="of one image or two")
    parser.add_argument("--seed", type=int, default=0, help="of what is asked for and of the noise")
    parser.add_argument(
        "--sheets",
        type=Path,
        metavar="FOLDER",
        help="write contact sheets there, and score nothing",
    )
    args = parser.parse_args()
    known = parts_of(flux.MODELS[args.model])
    if strange := [part for part in args.only or () if part not in known]:
        parser.error(f"--only {strange[0]}: choose from {', '.join(known)}")
    if args.prompts < 1 or args.edits < 1 or args.seed < 0:
        parser.error("--prompts and --edits are 1 at least, and --seed 0")
    return args


def rows(
    pipe: flux.Pipeline, parts: Sequence[str], prompts: int, edits: int, seed: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Name, number of images and score of each row."""
    scenes = first(toy.scenes(SCENES + seed, held=True, complete=True), prompts)
    few = scenes[: -(-prompts // 5)]
    size, rng = pipe.spec.size, np.random.default_rng(seed)
    if "text" in parts:
        drawn = [toy.draw(scene, size, size, rng) for scene in scenes]
        yield "drawn", len(scenes), toy.score(drawn, scenes)
        yield (
            "drawn, through the autoencoder",
            len(scenes),
            toy.score(through(pipe, drawn), scenes),
        )
    for row in itertools.chain.from_iterable(
        PARTS[part](pipe, scenes, few, edits, seed) for part in parts
    ):
        images, asked = made(pipe, row, seed), [task.asked for task in row.tasks]
        yield row.name, len(asked), row.score(images, asked)
        for name, belongs in row.groups.items():
            if some := [pair for pair in zip(images, asked, strict=True) if belongs(pair[1])]:
                yield name, len(some), row.score(*zip(*some, strict=True))


def text_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], edits: int, seed: int
) -> Iterator[Row]:
    tasks = [Task(str(scene), scene) for scene in scenes]
    trained = first(toy.scenes(SCENES + seed, held=False, complete=True), len(few))
    sparse = first(toy.scenes(SCENES + seed, held=True), len(few))
    yield Row("text to image", tasks, {}, toy.score)
    yield Row("the same in 4 steps", tasks, {"steps": 4}, toy.score)
    yield Row("the same with guidance 1", tasks[: len(few)], {"guidance": 1.0}, toy.score)
    yield Row(
        "combinations that it was trained on",
        [Task(str(scene), scene) for scene in trained],
        {},
        toy.score,
    )
    yield Row(
        "prompts that leave something open",
        [Task(str(scene), scene) for scene in sparse],
        {},
        toy.score,
    )
    for width, height in ((320, 192), (192, 320)):
        yield Row(
            f"{width}x{height}", tasks[: len(few)], {"width": width, "height": height}, toy.score
        )


def edit_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], count: int, seed: int
) -> Iterator[Row]:
    """Instructions, and images before that are freshly drawn."""
    size, rng = pipe.spec.size, np.random.default_rng(seed)
    asked = first(toy.edits(EDITS + seed, held=True), count)
    tasks = [Task(str(edit), edit, drawings(edit.before, size, rng)) for edit in asked]
    groups = {
        "of them, of one image": lambda edit: len(edit.before) == 1,
        "of them, of two images": lambda edit: len(edit.before) == 2,
    }
    yield Row("edits", tasks, {}, toy.score_edits, groups)


def mode_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], edits: int, seed: int
) -> Iterator[Row]:
    """What else it does with images, and what it is told not to do; of any scenes, held out or not."""
    size, rng, count = pipe.spec.size, np.random.default_rng(seed), len(few)
    some = toy.scenes(OTHERS + seed, held=None, complete=True)
    singles = first(
        (s for s in some if s.relation is None and isinstance(s.objects[0], Object)), count
    )
    pairs = first((s for s in some if s.relation in ("to the left of", "to the right of")), count)
    yield Row(
        "image to image: another colour",
        [recoloured(scene, size, rng) for scene in singles],
        {},
        toy.score_edits,
    )
    yield Row(
        "inpainting: another thing",
        [half(scene, size, rng, another(scene)) for scene in pairs],
        {},
        toy.score,
    )
    yield Row(
        "outpainting: the other half",
        [half(scene, size, rng, None) for scene in pairs],
        {},
        toy.score,
    )
    open_ = [replace(s, objects=(replace(s.objects[0], size=None, pattern=""),)) for s in singles]
    tasks = [Task(str(scene), scene) for scene in open_]
    negative = "a large circle"
    options = {"negative_prompt": negative}
    if not pipe.spec.cfg:  # two passes, in place of the guidance that is an input, not on top of it
        options |= {"true_cfg_scale": pipe.spec.guidance, "guidance": 1.0}
    yield Row("sizes left open: those that are not large", tasks, {}, not_large)
    yield Row(f'the same, negative prompt "{negative}"', tasks, options, not_large)


def quantised_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], edits: int, seed: int
) -> Iterator[Row]:
    """The transformer is in a row's mode until the next row is asked for; half as many images as in others, of many rows."""
    tasks = [Task(str(scene), scene) for scene in few[: -(-len(few) // 2)]]
    for mode in modes():
        pipe.transformer.set_transform(mode.change)
        yield Row(mode.name, tasks, {}, toy.score)
    pipe.transformer.set_transform(None)


PARTS = {"text": text_rows, "edits": edit_rows, "modes": mode_rows, "quantised": quantised_rows}


def parts_of(spec: ModelSpec) -> list[str]:
    """All, but edits are for models that take references."""
    return [part for part in PARTS if part != "edits" or spec.image_mode == "reference"]


def recoloured(scene: Scene, size: int, rng: np.random.Generator) -> Task:
    """The image of a scene, and the caption of the same scene in another colour.

    The caption does not say where the thing is, or a model that ignores the image could be right.
    """
    before, (thing,) = toy.arrange(scene, rng), scene.objects
    free = [colour for colour in toy.COLOURS if colour not in (thing.colour, scene.background)]
    thing = replace(thing, colour=free[rng.integers(len(free))], place=None)
    (item,) = before.items
    after = replace(before, items=(replace(item, thing=replace(item.thing, colour=thing.colour)),))
    caption = str(replace(scene, objects=(thing,)))
    return Task(
        caption,
        Edit(caption, (before,), after, "recolour"),
        drawings([before], size, rng, strength=STRENGTH),
    )


def half(scene: Scene, size: int, rng: np.random.Generator, other: Object | None) -> Task:
    """A pair's caption, and its image with `other` or nothing in the second one's half, where a mask lets it change.

    What the model can get wrong is in this half; the first thing is given.
    """
    layout = toy.arrange(scene, rng)
    kept, gone = layout.items
    left = gone.x < kept.x
    mask = np.zeros((size, size), np.uint8)
    mask[:, : size // 2] = 255 * left
    mask[:, size // 2 :] = 255 * (not left)
    items = (kept,) if other is None else (kept, Item(other, gone.x, gone.y, toy.SIZES[other.size]))
    image = toy.draw(Layout(items, layout.background), size, size, rng)
    if other is None:
        image[mask == 255] = 128  # canvas
    images = flux.ImageInputs((Image.fromarray(image),), mask=Image.fromarray(mask), strength=1.0)
    return Task(str(scene), scene, images)


def another(scene: Scene) -> Object:
    """A thing that the scene does not have."""
    used = {thing.colour for thing in scene.objects} | {scene.background}
    colour = next(colour for colour in toy.COLOURS if colour not in used)
    shape = next(
        shape for shape in toy.SHAPES if shape not in {thing.shape for thing in scene.objects}
    )
    return Object(shape, colour, "medium")


def not_large(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """As `toy.score`, of scenes of one thing in any size: its size is right where the thing is seen, and not large."""

    def right(image: np.ndarray, scene: Scene) -> bool:
        things = [replace(item.thing, place=None) for item in toy.look(image).items]
        return any(
            replace(scene.objects[0], place=None, size=size) in things
            for size in ("small", "medium")
        )

    return toy.score(images, scenes) | {"size": float(np.mean(list(map(right, images, scenes))))}


def drawings(
    layouts: Iterable[Layout], size: int, rng: np.random.Generator, strength: float | None = None
) -> flux.ImageInputs:
    drawn = [Image.fromarray(toy.draw(layout, size, size, rng)) for layout in layouts]
    return flux.ImageInputs(tuple(drawn), strength=strength)


def made(pipe: flux.Pipeline, row: Row, seed: int) -> list[np.ndarray]:
    """The model's image for each task, (H, W, 3) uint8; that of task k has seed + k."""
    result = []
    for start in tqdm(range(0, len(row.tasks), BATCH), row.name, disable=None, leave=False):
        tasks = row.tasks[start : start + BATCH]
        images = [task.images for task in tasks] if tasks[0].images else None
        result += pipe(
            [task.prompt for task in tasks], seed=seed + start, images=images, **row.options
        )
    return [np.asarray(image) for image in result]


def through(pipe: flux.Pipeline, drawn: list[np.ndarray]) -> list[np.ndarray]:
    """ImageInputs (H, W, 3) uint8, encoded and decoded."""
    encoder, result = pipe.image_encoder(), []
    for image in drawn:
        with torch.inference_mode():
            result += pipe.decode(
                encoder.encode(flux.image_io.output.to_pixels(image).to(pipe.device))
            )
    return [np.asarray(image) for image in result]


def first(some: Iterable, count: int) -> list:
    return list(itertools.islice(some, count))


if __name__ == "__main__":
    sys.exit(main())
