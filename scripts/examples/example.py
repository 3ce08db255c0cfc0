"""What the examples share: flags, errors in one sentence, and sheets of images."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path += [str(ROOT), str(ROOT / "scripts")]

from modules.command_line import Parser, exit_code

SCENE = "a small yellow star above a large blue ring on a white background"


def parse(doc: str, **more) -> argparse.Namespace:
    """Return the flags of an example; `more`: name=default of its own flags.

    Call this before torch is imported. Errors after that end the example with one sentence.
    """
    parser = Parser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="default: the toy flux.2-tiny")
    parser.add_argument("--steps", type=int, help="default: the model's")
    parser.add_argument("--seed", type=int, default=3)
    parser.add_argument("--output", metavar="FILE", help="PNG to write (default: none)")
    for name, default in more.items():
        kind = type(default)
        parser.add_argument(f"--{name}", type=kind, default=default, help=f"default: {default}")
    args = parser.parse_args()

    def end(kind, error, traceback) -> None:
        def failed() -> int:
            raise error

        sys.exit(exit_code(failed, {}, args.output or "an example", "stopped"))

    sys.excepthook = end
    return args


def save(path: str | None, images: Sequence) -> None:
    """Write images side by side; nothing without a path, and nothing over an existing file."""
    if path is None:
        return
    from PIL import Image

    from flux.image_io.output import write_exclusive

    sheet = Image.new("RGB", (sum(i.width for i in images), images[0].height), "white")
    left = 0
    for image in images:
        sheet.paste(image, (left, 0))
        left += image.width
    made = write_exclusive(Path(path), lambda file: sheet.quantize(64).save(file, "PNG"))
    print(made)
