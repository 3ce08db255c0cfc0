"""Measure the watermarks: what reads them after each attack, false alarms, visibility, time.

python scripts/benchmarks/watermark.py
python scripts/benchmarks/watermark.py --images 50 --unmarked 500

Images are the toy's drawings and random textures with the spectrum of photos (amplitude 1 / f).
Times are those of the process, so that other programs do not count.
"""

import argparse
import io
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[2]), str(Path(__file__).resolve().parents[1])]

from modules.command_line import Parser, exit_code, show

SIZES = (256, 512, 1024)


def parser() -> argparse.ArgumentParser:
    p = Parser(description=__doc__.split("\n", 1)[0], allow_abbrev=False)
    p.add_argument(
        "--images",
        type=int,
        default=10,
        metavar="N",
        help="of each size, half of them at 1024 (default: 10)",
    )
    p.add_argument("--unmarked", type=int, default=500, metavar="N",
                   help="images of 256x256 without a mark (default: 500)")  # fmt: skip
    return p


def main() -> int:
    args = parser().parse_args()
    return exit_code(lambda: run(args), {}, "standard output", "stopped")


def samples(size: int) -> Iterator:
    """Yield drawings and textures of size x size pixels, in turn."""
    import numpy as np
    from PIL import Image

    from flux import toy
    from flux.toy.scenes import arrange, scenes

    rng = np.random.default_rng(size)
    frequency = np.hypot(np.fft.fftfreq(size)[:, None], np.fft.fftfreq(size))
    frequency[0, 0] = np.inf
    for scene in scenes(size, None):
        yield Image.fromarray(toy.draw(arrange(scene, rng), size, size))
        white = np.fft.fft2(rng.standard_normal((3, size, size)))
        texture = np.fft.ifft2(white / frequency**1.4).real
        texture = 128 + 45 * texture / texture.std()
        yield Image.fromarray(texture.clip(0, 255).astype(np.uint8).transpose(1, 2, 0).copy())


def attacks() -> dict[str, Callable]:
    import numpy as np
    from PIL import Image, ImageEnhance

    def saved(kind: str, quality: int):
        def attack(image):
            file = io.BytesIO()
            image.save(file, kind, quality=quality)
            return Image.open(file).convert("RGB")

        return attack

    def crop(share: float):
        def attack(image):
            cut = int(image.width * (1 - (1 - share) ** 0.5) / 2)
            return image.crop((cut, cut, image.width - cut, image.height - cut))

        return attack

    def noise(image):
        added = np.random.default_rng(0).normal(0, 5, (image.height, image.width, 3))
        return Image.fromarray((np.asarray(image) + added).round().clip(0, 255).astype(np.uint8))

    half = Image.Resampling.LANCZOS
    return {
        "none": lambda image: image,
        **{f"JPEG {quality}": saved("JPEG", quality) for quality in (95, 90, 75, 50)},
        "WebP 80": saved("WEBP", 80),
        "half size": lambda image: image.resize((image.width // 2, image.height // 2), half),
        "crop 10 %": crop(0.1),
        "crop 50 %": crop(0.5),
        "brightness 1.2": lambda image: ImageEnhance.Brightness(image).enhance(1.2),
        "noise 5": noise,
        "rotation 2°": lambda image: image.rotate(2, Image.Resampling.BICUBIC),
    }


def run(args: argparse.Namespace) -> int:
    import itertools

    import numpy as np

    from flux.safety import bfl_watermark, watermark

    show("| mark | size | PSNR (least) | embed | read | " + " | ".join(attacks()) + " |")
    show("|---|---|---|---|---|" + "---|" * len(attacks()))
    for kind, size in itertools.product(("tile", "bfl"), SIZES):
        psnr, embedding, reading = [], [], []
        right: dict[str, int] = dict.fromkeys(attacks(), 0)
        images = args.images if size < 1024 else -(-args.images // 2)
        for number, image in enumerate(itertools.islice(samples(size), images)):
            start = time.process_time()
            marked = (
                watermark.embed(image, number) if kind == "tile" else bfl_watermark.embed(image)
            )
            embedding.append(time.process_time() - start)
            error = np.square(np.asarray(marked, float) - np.asarray(image, float)).mean()
            psnr.append(10 * math.log10(255**2 / error))
            for name, attack in attacks().items():
                attacked = attack(marked)
                start = time.process_time()
                if kind == "tile":
                    found = watermark.detect(attacked)
                    right[name] += found is not None and found.payload == number
                else:
                    equal = bfl_watermark.count_equal_bits(attacked)
                    right[name] += equal >= bfl_watermark.LIKELY
                reading.append(time.process_time() - start)
        cells = [f"{count}/{images}" for count in right.values()]
        times = [f"{1e3 * np.median(seconds):.0f} ms" for seconds in (embedding, reading)]
        level = f"{np.mean(psnr):.1f} dB ({min(psnr):.1f})"
        show(f"| {' | '.join([kind, str(size), level, *times, *cells])} |")
    tile = bfl = 0
    for image in itertools.islice(samples(256), args.unmarked):
        tile += watermark.detect(image) is not None
        bfl += bfl_watermark.count_equal_bits(image) >= bfl_watermark.LIKELY
    show(f"false alarms of {args.unmarked} unmarked images of 256x256: tile {tile}, bfl {bfl}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
