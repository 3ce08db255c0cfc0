"""Measure time and memory on this machine.

    python scripts/bench.py                       a start: imports, and the toy's first image
    python scripts/bench.py --against diffusers   every part from the prompt to the file
    python scripts/bench.py --floor               a step over its matrix products and attentions
    python scripts/bench.py --model flux.2-dev    a full-size model of random weights, no files
    python scripts/bench.py --references          the gain of computing reference images once
    python scripts/bench.py --lossy               the error of each lossy mode
    python scripts/bench.py --torchrun            one process of torchrun against a plain run
    python scripts/bench.py --count               what a GPU would run, counted without one

Both sides have the same random weights and inputs. They take turns after a warm-up, A B B A, so
that a machine that slows down slows both. Figures are medians; lower is better. A goal is a bound
of ours / theirs. The README of the benchmarks has results.
"""

import argparse
import itertools
import shlex
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

from modules.command_line import Parser, as_typed, exit_code, imports, show


def parser() -> argparse.ArgumentParser:
    parser = Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_argument_group("what (default: a start)")
    what.add_argument(
        "--against",
        choices=["diffusers"],
        help="compare every part, or the model of --model, with diffusers",
    )
    what.add_argument(
        "--model", metavar="NAME", help="a model of flux.MODELS at full size, with random weights"
    )
    what.add_argument(
        "--floor", action="store_true", help="a step over the hardware's floor; --model includes it"
    )
    what.add_argument(
        "--references", action="store_true", help="reference images, with and without a cache"
    )
    what.add_argument(
        "--lossy", action="store_true", help="the error of each lossy mode against float32"
    )
    what.add_argument(
        "--torchrun", action="store_true", help="the overhead of torchrun with one process"
    )
    what.add_argument(
        "--count",
        action="store_true",
        help="kernels, bytes and FLOPs of every model, or of --model, and their time on a --gpu",
    )
    what.add_argument(
        "--parallel",
        metavar="AXIS=N,...",
        help="with torchrun: a step over its processes, by context and tensor, against one process",
    )
    how = parser.add_argument_group("how")
    how.add_argument(
        "--gpu", default="H200", help="H200, H100, RTX 4090 or RTX 5090 (default: H200)"
    )
    how.add_argument(
        "--quick", action="store_true", help="smaller sizes: under three minutes on two cores"
    )
    how.add_argument(
        "--rounds", type=int, default=3, metavar="N", help="two runs of each a round (default: 3)"
    )
    how.add_argument("--device", help="cuda, mps or cpu (default: the best available)")
    how.add_argument(
        "--json",
        type=Path,
        metavar="FILE",
        help="save the rows with the command, machine, versions and date",
    )
    return parser


with imports(__name__, parser):
    import torch
    from benchmarks.rows import Report, Row, check_json, installed
    from benchmarks.setting import Setting

    from flux.configs import ModelSpec
    from flux.errors import UserError, install_command
    from flux.image_io.output import write_exclusive
    from flux.runtime.devices import choose_device
    from flux.weights.locate import get_spec

FLAGS = {"name": "--model", "device": "--device"}


def main(arguments: list[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else arguments
    args = parser().parse_args(arguments)
    command = f"{as_typed('bench.py')} {shlex.join(arguments)}".rstrip()
    stopped = "stopped; --json keeps the rows that were measured"
    return exit_code(lambda: measure(args, command), FLAGS, args.json, stopped)


def measure(args: argparse.Namespace, command: str) -> int:
    if args.parallel is not None:
        return measure_parallel(args, command)
    setting, rows = plan(args)
    if args.count:
        return count(args)
    report = Report(command, device_name(setting.device))
    report.print_heading()
    try:
        if rows:
            report.print_rows(itertools.chain(*rows))
        if args.lossy:
            report.print_losses(losses(setting))
    finally:  # rows that were measured before a failure are kept
        if args.json and (report.rows or report.losses):
            path = report.save(args.json)
            show("", path)
    return 0


def measure_parallel(args: argparse.Namespace, command: str) -> int:
    """Measure on the processes of torchrun, of which the first one prints."""
    from modules import several_processes

    from flux.runtime import processes

    several_processes.start()
    others = args.against, args.model, args.floor, args.references, args.lossy, args.count
    if any((*others, args.torchrun)):
        raise UserError("--parallel: measures nothing else. Leave the other measurements out.")
    args.device = processes.join(args.device)
    try:
        from benchmarks.several import parallel_rows, sizes_of

        sizes = sizes_of(args.parallel)
        setting, _ = plan(args)
        report, rows = Report(command, device_name(setting.device)), parallel_rows(setting, sizes)
        if processes.rank():
            for _ in rows:
                pass
            return 0
        report.print_heading()
        report.print_rows(rows)
        if args.json:
            show("", report.save(args.json))
    finally:
        processes.leave()
    return 0


def plan(args: argparse.Namespace) -> tuple[Setting, list[Iterator[Row]]]:
    """Return sizes and rows. All flags are checked here; rows are measured as they are read."""
    if not 1 <= args.rounds <= 1000:
        raise UserError(f"--rounds: must be from 1 to 1000 (got {args.rounds})")
    if args.against and not installed("diffusers"):
        raise UserError(f"--against: diffusers is not installed. Run `{install_command('test')}`.")
    if args.json:
        check_json(args.json)
    if args.count:
        check_count(args)
    device = choose_device(args.device)
    spec = get_spec(args.model) if args.model else None
    setting = Setting(device, args.rounds)
    if device.type == "cpu":
        setting = replace(setting, full_side=256, replayed=0.5)
    if args.quick:
        setting = setting.quick()
    rows = []
    if args.count:
        return setting, []
    if spec:
        rows.append(full_model(spec, setting, bool(args.against)))
    elif args.against:
        rows.append(against_diffusers(setting))
    if args.floor and not spec:
        rows.append(over_floor(setting))
    if args.references:
        rows.append(references(setting))
    if args.torchrun:
        rows.append(under_torchrun(setting))
    if not rows and not args.lossy:
        rows.append(start(setting))
    return setting, rows


def check_count(args: argparse.Namespace) -> None:
    from benchmarks.count import GPUS

    if args.gpu not in GPUS:
        raise UserError(f"--gpu: unknown (got {args.gpu!r}, expected one of {', '.join(GPUS)}).")
    if args.floor or args.references or args.lossy or args.torchrun:
        raise UserError("--count: measures nothing. Leave the measurements out.")


def count(args: argparse.Namespace) -> int:
    """Print the counts and, with --json, save those of each stage."""
    from benchmarks import counts

    names = [get_spec(args.model).name] if args.model else counts.NAMES
    found = counts.print_counts(names, args.gpu, bool(args.against))
    counts.print_sites(found, args.gpu)
    if args.json:
        text = counts.as_json(found, args.gpu).encode()
        show("", write_exclusive(args.json, lambda file: file.write(text)))
    return 0


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


def full_model(spec: ModelSpec, setting: Setting, against: bool) -> Iterator[Row]:
    from benchmarks.full import full_rows

    yield from full_rows(spec, setting, against)


def references(setting: Setting) -> Iterator[Row]:
    from benchmarks.references import reference_rows

    yield from reference_rows(setting)


def under_torchrun(setting: Setting) -> Iterator[Row]:
    from benchmarks.start import torchrun_rows

    yield from torchrun_rows(setting)


def losses(setting: Setting) -> Iterator[NamedTuple]:
    from benchmarks.lossy import losses

    yield from losses(setting.prompts)


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


if __name__ == "__main__":
    sys.exit(main())
