"""Score an embedded model: measure its images of prompts that it was not trained on.

    python scripts/toy/score.py                          # forty minutes on two cores
    python scripts/toy/score.py --only text,edits
    python scripts/toy/score.py --model flux.1-tiny      # which has no edits
    python scripts/toy/score.py --sheets sheets          # write contact sheets instead

A row is one use of the model: text to image in a few ways, edits, image to image, inpainting,
outpainting, negative prompts, and each lossy mode. The first two rows measure the measure: drawn
images, and drawn images through the autoencoder. A cell is the share of the images that are right
in one attribute. Prompts have combinations of colour, shape and background, and words, that were
not trained, except in one row; so have the results of edits. The rows of image to image, inpainting
and outpainting have all combinations.
"""

import argparse
import itertools
import platform
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts"), str(ROOT / "scripts/toy")]

from modules.command_line import Parser, exit_code, imports, show

NAMES = ("text", "open", "edits", "modes", "quantised")  # of the parts


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--model", choices=("flux.1-tiny", "flux.2-tiny"), default="flux.2-tiny")
    p.add_argument(
        "--only",
        type=lambda text: text.split(","),
        metavar="PART[,PART]",
        help=f"some of {', '.join(NAMES)} (default: all)",
    )
    p.add_argument(
        "--prompts",
        type=int,
        default=500,
        metavar="N",
        help="images of text to image (default: 500); fewer for other rows",
    )
    p.add_argument(
        "--edits",
        type=int,
        default=300,
        metavar="N",
        help="edits of one image or two (default: 300)",
    )
    p.add_argument(
        "--seed", type=int, default=0, help="of the requests and of the noise (default: 0)"
    )
    p.add_argument(
        "--sheets", type=Path, metavar="FOLDER", help="write contact sheets there instead of scores"
    )
    return p


with imports(__name__, parser):
    import numpy as np
    import torch
    from benchmarks.lossy import modes
    from modules.sheets import write_sheets
    from PIL import Image
    from tqdm import tqdm

    import flux
    from flux import toy
    from flux.configs import ModelSpec
    from flux.image_io.output import to_pixels
    from flux.toy import Edit, Item, Layout, Object, Scene

SCENES, EDITS, OTHERS = 1_000_000, 1_100_000, 1_200_000  # seeds that no training uses
COLUMNS = (*toy.ATTRIBUTES, "each letter", "all")
BATCH = 20
STRENGTH = 0.8  # of image to image
SIZES = ((192, 192), (320, 320), (384, 384), (320, 192), (192, 320), (384, 192), (192, 384))
FLAGS = {"name": "--model"}


class Task(NamedTuple):
    """A prompt with its images, and the request that the result is measured against."""

    prompt: str
    request: Scene | Edit
    images: flux.ImageInputs | None = None


class Row(NamedTuple):
    """One use of the model. `groups` are rows about some of its images, by their numbers."""

    name: str
    tasks: list[Task]
    options: dict  # of the pipeline's call
    score: Callable[[Sequence[np.ndarray], Sequence], dict[str, float]]
    groups: Mapping[str, list[int]] = {}


def main() -> int:
    args = arguments()
    return exit_code(lambda: score(args), FLAGS, args.sheets, "stopped; printed rows are complete")


def score(args: argparse.Namespace) -> int:
    torch.set_flush_denormal(True)  # a CPU is ten times slower on the tails of SiLU
    pipe = flux.load(args.model)
    if args.sheets:
        write_sheets(pipe, args.sheets, args.seed)
        return 0
    spec, machine = pipe.spec, f"{platform.machine()} {pipe.device.type.upper()}"
    settings = f"{spec.name}: {spec.steps} steps, guidance {spec.guidance}"
    show(f"{settings}; torch {torch.__version__}, {machine}, {date.today()}", "")
    show("| images | number | " + " | ".join(COLUMNS) + " |", "|---" * (len(COLUMNS) + 2) + "|")
    parts = args.only or parts_of(spec)
    for name, count, shares in rows(pipe, parts, args.prompts, args.edits, args.seed):
        cells = (f"{shares[column]:.1%}" if column in shares else "" for column in COLUMNS)
        show(f"| {name} | {count} | " + " | ".join(cells) + " |")
    return 0


def arguments() -> argparse.Namespace:
    args = parser().parse_args()
    known = parts_of(flux.MODELS[args.model])
    for part in args.only or ():
        if part not in known:
            parser().error(f"--only: {part} is no part. Choose from {', '.join(known)}.")
    for name, least, most in (("prompts", 1, 100_000), ("edits", 1, 100_000), ("seed", 0, 2**62)):
        if not least <= getattr(args, name) <= most:
            parser().error(f"--{name}: must be from {least} to {most} (got {getattr(args, name)})")
    return args


def rows(
    pipe: flux.Pipeline, parts: Sequence[str], prompts: int, edits: int, seed: int
) -> Iterator[tuple[str, int, dict[str, float]]]:
    """Yield the name, the number of images and the score of each row."""
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
        images, requests = generate(pipe, row, seed), [task.request for task in row.tasks]
        yield row.name, len(requests), row.score(images, requests)
        for name, numbers in row.groups.items():
            some = [[all_[n] for n in numbers] for all_ in (images, requests)]
            yield name, len(numbers), row.score(*some)


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
    for width, height in SIZES:
        yield Row(
            f"{width}x{height}", tasks[: len(few)], {"width": width, "height": height}, toy.score
        )


def open_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], edits: int, seed: int
) -> Iterator[Row]:
    """Yield the fixed open prompts, in all and by their forms, and prompts about other worlds."""
    prompts = toy.open_prompts()
    tasks = [Task(prompt.text, prompt.scene) for prompt in prompts]
    groups = numbered(f"of them, {prompt.form}" for prompt in prompts)
    yield Row("open prompts, as people type them", tasks, {}, toy.score, groups)
    anything = Scene((Object("", ""),))
    strange = [Task(text, anything) for text in toy.strange_prompts()]
    yield Row("what the world lacks: a whole thing", strange, {}, whole_things)


def numbered(names: Iterable[str]) -> dict[str, list[int]]:
    """Return the numbers of the tasks of each name, in the names' order."""
    groups: dict[str, list[int]] = {}
    for number, name in enumerate(names):
        groups.setdefault(name, []).append(number)
    return groups


def whole_things(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Return the share of images that show at least one whole thing."""
    return {"all": float(np.mean([toy.shows_a_whole_thing(image) for image in images]))}


def edit_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], count: int, seed: int
) -> Iterator[Row]:
    """Yield the row of edits, whose images before are drawn."""
    size, rng = pipe.spec.size, np.random.default_rng(seed)
    edits = first(toy.edits(EDITS + seed, held=True), count)
    tasks = [Task(str(edit), edit, drawings(edit.before, size, rng)) for edit in edits]
    images = {1: "of one image", 2: "of two images"}
    groups = numbered(f"of them, {images[len(edit.before)]}" for edit in edits)
    yield Row("edits", tasks, {}, toy.score_edits, dict(sorted(groups.items())))


def mode_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], edits: int, seed: int
) -> Iterator[Row]:
    """Yield rows of image to image, inpainting, outpainting and negative prompts, of all scenes."""
    size, rng, count = pipe.spec.size, np.random.default_rng(seed), len(few)
    every = toy.scenes(OTHERS + seed, held=None, complete=True)
    singles = first(
        (s for s in every if isinstance(s.objects[0], Object) and not s.relation), count
    )
    pairs = first((s for s in every if s.relation in ("to the left of", "to the right of")), count)
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
    if not pipe.spec.cfg:  # two passes replace the guidance that is an input
        options |= {"true_cfg_scale": pipe.spec.guidance, "guidance": 1.0}
    yield Row("sizes left open: those that are not large", tasks, {}, not_large)
    yield Row(f'the same, negative prompt "{negative}"', tasks, options, not_large)


def quantised_rows(
    pipe: flux.Pipeline, scenes: list[Scene], few: list[Scene], edits: int, seed: int
) -> Iterator[Row]:
    """Yield a row for each lossy mode. The transformer is in this mode until the next row."""
    tasks = [Task(str(scene), scene) for scene in few[: -(-len(few) // 2)]]
    for mode in modes():
        pipe.transformer.set_transform(mode.change)
        yield Row(mode.name, tasks, {}, toy.score)
    pipe.transformer.set_transform(None)


PARTS = dict(zip(NAMES, (text_rows, open_rows, edit_rows, mode_rows, quantised_rows), strict=True))


def parts_of(spec: ModelSpec) -> list[str]:
    """Return the parts of a model. Edits are for models with references."""
    return [part for part in PARTS if part != "edits" or spec.image_mode == "reference"]


def recoloured(scene: Scene, size: int, rng: np.random.Generator) -> Task:
    """Return the image of a scene, and the caption of the same scene in another colour.

    The caption leaves the place open, or a model that ignores the image could be right.
    """
    before, (thing,) = toy.arrange(scene, rng), scene.objects
    free = [colour for colour in toy.COLOURS if colour not in (thing.colour, scene.background)]
    thing = replace(thing, colour=free[rng.integers(len(free))], place=None)
    (item,) = before.items
    after = replace(before, items=(replace(item, thing=replace(item.thing, colour=thing.colour)),))
    caption = str(replace(scene, objects=(thing,)))
    edit = Edit(caption, (before,), after, "recolour")
    return Task(caption, edit, drawings([before], size, rng, strength=STRENGTH))


def half(scene: Scene, size: int, rng: np.random.Generator, other: Object | None) -> Task:
    """Return a pair's caption, and its image with `other`, or nothing, in the masked half.

    The model must fill the half of the second thing. The first thing stays.
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
        image[mask == 255] = 128  # an empty canvas
    images = flux.ImageInputs((Image.fromarray(image),), mask=Image.fromarray(mask), strength=1.0)
    return Task(str(scene), scene, images)


def another(scene: Scene) -> Object:
    """Return a thing in a colour and a shape that the scene does not have."""
    colours = {thing.colour for thing in scene.objects} | {scene.background}
    shapes = {thing.shape for thing in scene.objects}
    colour = next(colour for colour in toy.COLOURS if colour not in colours)
    shape = next(shape for shape in toy.SHAPES if shape not in shapes)
    return Object(shape, colour, "medium")


def not_large(images: Sequence[np.ndarray], scenes: Sequence[Scene]) -> dict[str, float]:
    """Score scenes of one thing: its size is right if the thing is found, and not large."""

    def right(image: np.ndarray, scene: Scene) -> bool:
        things = [replace(item.thing, place=None) for item in toy.look(image).items]
        wanted = [replace(scene.objects[0], place=None, size=size) for size in ("small", "medium")]
        return any(thing in things for thing in wanted)

    share = float(np.mean([right(*pair) for pair in zip(images, scenes, strict=True)]))
    return toy.score(images, scenes) | {"size": share}


def drawings(
    layouts: Iterable[Layout], size: int, rng: np.random.Generator, strength: float | None = None
) -> flux.ImageInputs:
    drawn = [Image.fromarray(toy.draw(layout, size, size, rng)) for layout in layouts]
    return flux.ImageInputs(tuple(drawn), strength=strength)


def generate(pipe: flux.Pipeline, row: Row, seed: int) -> list[np.ndarray]:
    """Return the image of each task, (H, W, 3) uint8. Task k has the seed `seed` + k."""
    result = []
    for start in tqdm(range(0, len(row.tasks), BATCH), row.name, disable=None, leave=False):
        tasks = row.tasks[start : start + BATCH]
        images = [task.images for task in tasks] if tasks[0].images else None
        prompts = [task.prompt for task in tasks]
        result += pipe(prompts, seed=seed + start, images=images, **row.options)
    return [np.asarray(image) for image in result]


def through(pipe: flux.Pipeline, drawn: list[np.ndarray]) -> list[np.ndarray]:
    """Encode and decode images (H, W, 3) uint8."""
    encoder, result = pipe.image_encoder(), []
    for image in drawn:
        with torch.inference_mode():
            pixels = to_pixels(image).to(pipe.device)
            result += pipe.decode(encoder.encode(pixels))
    return [np.asarray(image) for image in result]


def first(some: Iterable, count: int) -> list:
    return list(itertools.islice(some, count))


if __name__ == "__main__":
    sys.exit(main())
