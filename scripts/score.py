"""Scores the embedded toy model: draws prompts that it was not trained on, and measures its pictures against them.

    python scripts/score.py                             # 500 prompts, some minutes on two cores
    python scripts/score.py --prompts 48 --sheet s.png  # and a contact sheet

Three rows: freshly drawn pictures of the prompts (the check itself), the same through the autoencoder, and the model's.
"""

import argparse
import itertools
import platform
import sys
import textwrap
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

import flux
from flux import images, shapes


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=500, metavar="N")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--seed", type=int, default=0, help="of the prompts and of the noise")
    parser.add_argument("--trained", action="store_true", help="prompts of the kind that it was trained on, for comparison")
    parser.add_argument("--sheet", type=Path, metavar="PNG", help="write the first pictures as one contact sheet")
    parser.add_argument("--columns", type=int, default=8, help="of the sheet")
    args = parser.parse_args()
    torch.set_flush_denormal(True)  # SiLU's tails are denormal numbers, on which a CPU is ten times slower

    scenes = list(itertools.islice(shapes.scenes(1_000_000 + args.seed, held=not args.trained), args.prompts))
    pipe = flux.load()
    rng = np.random.default_rng(args.seed)
    drawn = [shapes.draw(scene, pipe.spec.size, pipe.spec.size, rng) for scene in scenes]
    made = pictures(pipe, [str(scene) for scene in scenes], args.seed, args.steps)
    rows = {"drawn": drawn, "drawn, through the autoencoder": through(pipe, drawn), "made by the model": made}
    kind = "trained" if args.trained else "held-out"
    print(f"{pipe.spec.name}: {args.prompts} {kind} prompts, {args.steps or pipe.spec.steps} steps; torch {torch.__version__}, "
          f"{platform.machine()} CPU, {date.today()}\n")  # fmt: skip
    print("| pictures | " + " | ".join(shapes.ATTRIBUTES) + " | all |")
    print("|---" * (len(shapes.ATTRIBUTES) + 2) + "|")
    for name, row in rows.items():
        print(f"| {name} | " + " | ".join(f"{v:.1%}" for v in shapes.score(row, scenes).values()) + " |")
    if args.sheet:
        contact_sheet([str(scene) for scene in scenes], made, args.columns).save(args.sheet)
    return 0


def contact_sheet(prompts: list[str], made: list[np.ndarray], columns: int) -> Image.Image:
    """The pictures in rows, each with its prompt below."""
    font, gap, below = ImageFont.load_default(11), 8, 56
    height, width = made[0].shape[:2]
    rows = -(-len(made) // columns)
    sheet = Image.new("RGB", (columns * (width + gap) - gap, rows * (height + below)), "white")
    write = ImageDraw.Draw(sheet)
    for number, (prompt, picture) in enumerate(zip(prompts, made, strict=True)):
        x, y = number % columns * (width + gap), number // columns * (height + below)
        sheet.paste(Image.fromarray(picture), (x, y))
        write.multiline_text((x, y + height + 3), textwrap.fill(prompt, 24), fill="black", font=font, spacing=1)
    return sheet


def pictures(pipe: flux.Pipeline, prompts: list[str], seed: int, steps: int | None = None, batch: int = 25) -> list[np.ndarray]:
    """The model's picture of each prompt, (H, W, 3) uint8."""
    made = []
    for start in tqdm(range(0, len(prompts), batch), disable=None):
        made += pipe(prompts[start : start + batch], steps=steps, seed=seed + start)
    return [np.asarray(image) for image in made]


def through(pipe: flux.Pipeline, drawn: list[np.ndarray]) -> list[np.ndarray]:
    """Pictures, encoded and decoded."""
    autoencoder = pipe.autoencoder()
    result = []
    for picture in drawn:
        pixels = images.to_pixels(picture).to(pipe.device, pipe.dtype)  # (1, 3, H, W)
        with torch.inference_mode():
            result.append(np.asarray(images.to_images(autoencoder.decode(autoencoder.encode(pixels)))[0]))
    return result


if __name__ == "__main__":
    sys.exit(main())
