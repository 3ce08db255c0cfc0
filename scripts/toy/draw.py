"""Draw images of the embedded models' world with captions, as data for `scripts/train.py`.

    python scripts/toy/draw.py framed --framed               # 64 images in a wooden frame
    python scripts/toy/draw.py edits --edits --images 500    # instructions, images before and after

No held-out combination is among them, so that held-out prompts can test the trained model.
"""

import argparse
import itertools
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "scripts")]

from modules.command_line import Parser, add_hidden_alias, exit_code, imports


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("folder", type=Path, help="a new or empty folder")
    p.add_argument("--images", type=int, default=64, metavar="N", help="how many (default: 64)")
    p.add_argument(
        "--size", type=int, default=256, metavar="PIXELS", help="side of an image (default: 256)"
    )
    p.add_argument(
        "--seed", type=int, default=5_000_000, help="of the scenes (default: an unused one)"
    )
    kind = p.add_mutually_exclusive_group()
    kind.add_argument("--framed", action="store_true", help="a frame around each: a style to learn")
    kind.add_argument(
        "--edits", action="store_true", help="edits of one image or two, with metadata.jsonl"
    )
    add_hidden_alias(p, "--pictures", "--images")
    return p


with imports(__name__, parser):
    import numpy as np
    from PIL import Image

    from flux import toy
    from flux.atomic_files import make_folder, write_atomically


def main() -> int:
    args = arguments()
    return exit_code(lambda: draw(args), {}, args.folder, "stopped; nothing was written")


def draw(args: argparse.Namespace) -> int:
    make_folder(args.folder.parent)
    with write_atomically(args.folder, overwrite=False) as folder:
        folder.mkdir()
        if args.edits:
            draw_edits(args, folder)
        else:
            draw_scenes(args, folder)
    return 0


def draw_scenes(args: argparse.Namespace, folder: Path) -> None:
    rng = np.random.default_rng(args.seed)
    scenes = toy.scenes(args.seed, held=False, complete=True)
    for number, scene in enumerate(itertools.islice(scenes, args.images)):
        image = toy.draw(scene, args.size, args.size, rng)
        if args.framed:
            image = toy.framed(image)
        Image.fromarray(image).save(folder / f"{number:04d}.png")
        (folder / f"{number:04d}.txt").write_text(f"{scene}\n")


def draw_edits(args: argparse.Namespace, folder: Path) -> None:
    rng, lines = np.random.default_rng(args.seed), []
    edits = toy.edits(args.seed, held=False)
    for number, edit in enumerate(itertools.islice(edits, args.images)):
        after = f"{number:04d}.png"
        before = [f"{number:04d}-before-{k}.png" for k in range(1, len(edit.before) + 1)]
        for name, layout in zip([after, *before], [edit.after, *edit.before], strict=True):
            image = toy.draw(layout, args.size, args.size, rng)
            Image.fromarray(image).save(folder / name)
        lines.append(json.dumps({"image": after, "caption": str(edit), "references": before}))
    (folder / "metadata.jsonl").write_text("\n".join(lines) + "\n")


def arguments() -> argparse.Namespace:
    args = parser().parse_args()
    if args.folder.exists() and (not args.folder.is_dir() or any(args.folder.iterdir())):
        parser().error(f"folder: must be new or empty (got {args.folder})")
    if not 1 <= args.images <= 10**6:
        parser().error(f"--images: must be from 1 to 1000000 (got {args.images})")
    if not 64 <= args.size <= 4096:
        parser().error(f"--size: must be from 64 to 4096 (got {args.size})")
    if args.seed < 0:
        parser().error(f"--seed: must be at least 0 (got {args.seed})")
    return args


if __name__ == "__main__":
    sys.exit(main())
