"""Write a transformer file in another format or layout.

    python scripts/convert.py IN.safetensors OUT.safetensors --to int8-convrot
    python scripts/convert.py IN.gguf OUT.safetensors --to bf16
    python scripts/convert.py IN.safetensors OUT.safetensors --layout diffusers

The error of the new weights against the given ones is printed. Weights are read and written layer
by layer, so memory holds one matrix. OUT is complete or absent, and never overwritten.
"""

import argparse
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from modules.command_line import Parser, exit_code, show

FLAGS = {"source": "IN", "path": "OUT", "format": "--to", "layout": "--layout"}
FORMATS = ("bf16", "fp8", "int8", "int8-convrot", "nvfp4", "mxfp8")


def main(arguments: list[str] | None = None) -> int:
    args = parser().parse_args(arguments)
    return exit_code(lambda: convert(args), FLAGS, args.out, "stopped; nothing was written")


def parser() -> argparse.ArgumentParser:
    parser = Parser(
        description="Write a transformer file in another format or layout, and print the error.",
        epilog="fp8: one scale for a matrix. int8: a scale for each row. int8-convrot: also turned "
        "by Hadamard matrices. nvfp4, mxfp8: scales of blocks. All are the layouts that ComfyUI "
        "reads; the input, output, time and modulation layers stay in bfloat16.",
    )
    parser.add_argument("source", metavar="IN", type=Path, help="a transformer file")
    parser.add_argument("out", metavar="OUT", type=Path, help="a new file, *.safetensors")
    parser.add_argument(
        "--to", choices=FORMATS, help="the format of the weights (default: as they are)"
    )
    parser.add_argument(
        "--layout",
        choices=("bfl", "diffusers"),
        default="bfl",
        help="the names and rows of Black Forest Labs (default) or of diffusers",
    )
    return parser


def convert(args: argparse.Namespace) -> int:
    from flux.weights.convert import convert

    report = convert(args.source, args.out, args.to, args.layout)
    show(f"{args.out}: {report.bytes / 1e9:.3f} GB, layout {args.layout}")
    for kind, count in sorted(report.counts.items()):
        show(f"{count} matrices in {kind}")
    if report.errors:
        worst = max(report.errors, key=lambda name: report.errors[name])
        show(
            f"error against {args.source}, relative L2: {report.error:.2g} of all, "
            f"at most {report.errors[worst]:.2g} ({worst})"
        )
    else:
        show("no weight changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
