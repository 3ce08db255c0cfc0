"""What things cost, measured on this machine.

    python scripts/bench.py                       what a start costs: imports, and the toy's first picture
    python scripts/bench.py --against diffusers   every part of the way from the prompt to the file, against diffusers
    python scripts/bench.py --floor               a step over the bare matrix products and attentions in it
    python scripts/bench.py --model flux.2-dev    a whole model of random weights: needs room for it, and no files
    python scripts/bench.py --references          what it saves to compute reference pictures once
    python scripts/bench.py --lossy               how far off each lossy mode is

What is compared has the same random weights and inputs, and takes turns after a warm-up, forwards and backwards (A B B A), so
that a machine that slows down slows both. Figures are medians, lower is better, and goals are of ours / theirs.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [
    str(ROOT),
    str(ROOT / "scripts"),
    str(ROOT / "tests"),
]  # tests: their reference.py builds diffusers' side

import torch
from benchmarks.rows import Report, Row, check_json, installed
from benchmarks.setting import Setting

from flux.configs import ModelSpec
from flux.errors import UserError
from flux.runtime.devices import choose_device
from flux.weights.locate import get_spec


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    try:
        setting, rows = asked(args)
        report = Report(shlex.join(["bench.py", *arguments]), device_name(setting.device))
        report.print_heading()
        try:
            if rows:
                report.print_rows(itertools.chain(*rows))
            if args.lossy:
                report.print_losses(losses(setting))
        finally:  # what was measured before something failed is kept too
            if args.json and (report.rows or report.losses):
                print(f"\n{report.save(args.json)}")
    except (UserError, OSError) as error:
        print(f"bench.py: {error}", file=sys.stderr)
        return 2
    return 0


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    what = parser.add_argument_group("what (default: what a start costs)")
    what.add_argument(
        "--against",
        choices=["diffusers"],
        help="everything, or with --model that model, against diffusers",
    )
    what.add_argument(
        "--model", metavar="NAME", help="a model of flux.MODELS at full size, with random weights"
    )
    what.add_argument(
        "--floor", action="store_true", help="a step over the hardware's floor; a part of --model"
    )
    what.add_argument(
        "--references", action="store_true", help="reference pictures, with and without a cache"
    )
    what.add_argument(
        "--lossy", action="store_true", help="the error of each lossy mode against float32"
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--quick", action="store_true", help="smaller sizes: under three minutes on two cores"
    )
    how.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="each runs everything twice (default: 3)"
    )
    how.add_argument("--device", help="cuda, mps, cpu (default: the best that is here)")
    how.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="keep the rows there, with the command, machine, versions and date",
    )
    return parser


def asked(args: argparse.Namespace) -> tuple[Setting, list[Iterator[Row]]]:
    """How to measure, and what: all is checked now, and measured when it is iterated over."""
    if args.rounds < 1:
        raise UserError(f"--rounds {args.rounds}: must be at least 1")
    if args.against and not installed("diffusers"):
        raise UserError(
            "--against diffusers: diffusers is not installed here; install it with pip install -e '.[test]'"
        )
    if args.json:
        check_json(args.json)
    device = choose_device(args.device)
    sizes = dict(whole=256, replayed=0.5) if device.type == "cpu" else {}
    setting = Setting(device, args.rounds, **sizes)
    setting = setting.quick() if args.quick else setting
    rows = []
    if args.model:
        rows.append(whole_model(get_spec(args.model), setting, bool(args.against)))
    elif args.against:
        rows.append(against_diffusers(setting))
    if args.floor and not args.model:  # which has its floor anyway
        rows.append(over_floor(setting))
    if args.references:
        rows.append(references(setting))
    return setting, rows or ([] if args.lossy else [start(setting)])


def start(setting: Setting) -> Iterator[Row]:
    from benchmarks.start import start_rows

    yield from start_rows(setting)


def against_diffusers(setting: Setting) -> Iterator[Row]:
    from benchmarks import pipelines, stages, start, steps

    yield from start.cold_rows(setting)
    yield from start.load_rows(setting)
    yield from stages.text_rows(setting)
    yield from steps.step_rows(setting)
    yield from stages.autoencoder_rows(setting)
    yield stages.saving_row(setting)
    yield from pipelines.pipeline_rows(setting)


def over_floor(setting: Setting) -> Iterator[Row]:
    from benchmarks.floor import floor_rows

    yield from floor_rows(setting)


def whole_model(spec: ModelSpec, setting: Setting, against: bool) -> Iterator[Row]:
    from benchmarks.full import full_rows

    yield from full_rows(spec, setting, against)


def references(setting: Setting) -> Iterator[Row]:
    from benchmarks.references import reference_rows

    yield from reference_rows(setting)


def losses(setting: Setting) -> Iterator[NamedTuple]:
    from benchmarks.lossy import losses

    yield from losses(setting.prompts)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())
