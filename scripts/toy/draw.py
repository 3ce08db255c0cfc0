"""Draws images of the embedded models' world, each with its caption, for `scripts/train.py` to learn from.

    python scripts/toy/draw.py framed --framed                     # 64 images in a wooden frame, which it has not seen
    python scripts/toy/draw.py edits --edits --images 500        # images before and after, with instructions

Nothing that is held out is among them, so that it can be asked of what was trained.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import numpy as np
from PIL import Image

from flux import toy


def main() -> int:
    try:
        draw_all(arguments())
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}", file=sys.stderr)
        return 2
    return 0


def draw_all(args: argparse.Namespace) -> None:
    args.folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(args.seed)
    style = toy.framed if args.framed else lambda image: image

    def draw(what):
        return Image.fromarray(style(toy.draw(what, args.size, args.size, rng)))

    if args.edits:
        lines = []
        for number, edit in enumerate(
            itertools.islice(toy.edits(args.seed, held=False), args.images)
        ):
            before = [f"{number:04d}-before-{k}.png" for k in range(1, len(edit.before) + 1)]
            for name, layout in zip(
                [f"{number:04d}.png", *before], [edit.after, *edit.before], strict=True
            ):
                draw(layout).save(args.folder / name)
            lines.append(
                json.dumps(
                    {"image": f"{number:04d}.png", "caption": str(edit), "references": before}
                )
            )
        (args.folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")
        return
    for number, scene in enumerate(
        itertools.islice(toy.scenes(args.seed, held=False, complete=True), args.images)
    ):
        draw(scene).save(args.folder / f"{number:04d}.png")
        (args.folder / f"{number:04d}.txt").write_text(f"{scene}\n")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="it is made, or must be empty")
    parser.add_argument("--images", type=int, default=64, metavar="N")
    parser.add_argument("--size", type=int, default=256, metavar="PIXELS")
    parser.add_argument(
        "--seed",
        type=int,
        default=5_000_000,
        help="of what is drawn (default: one that nothing else uses)",
    )
    kind = parser.add_mutually_exclusive_group()
    kind.add_argument("--framed", action="store_true", help="a frame around each: a style to learn")
    kind.add_argument(
        "--edits", action="store_true", help="of one image or two, with metadata.jsonl"
    )
    args = parser.parse_args()
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        parser.error(f"{args.folder} has something in it: name a folder that is new or empty")
    if args.images < 1 or not 64 <= args.size <= 4096 or args.seed < 0:
        parser.error("--images is 1 at least, --size from 64 to 4096, and --seed 0 at least")
    return args


if __name__ == "__main__":
    sys.exit(main())
