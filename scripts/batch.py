"""Make very many images, one for each line of a manifest, on any number of GPUs and machines.

python scripts/batch.py requests.jsonl images --model flux.2-klein-4b
torchrun --nproc-per-node 8 scripts/batch.py requests.jsonl images --model flux.2-klein-4b
python scripts/batch.py requests.jsonl images --merge

A line is a JSON object: {"prompt": "a cat"}, with any of seed, negative_prompt, width, height,
steps, guidance, images (paths) and id. Start the command as often as there are GPUs, and again
after a stop: what is done is not done again.
"""

import argparse
import os
import sys
from collections.abc import Mapping
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sample
from modules.command_line import Parser, add_quiet, exit_code, say, set_quiet, show
from modules.safety_flags import (
    FILTER,
    PROVENANCE,
    REFUSED,
    licence_note,
    load_filters,
    load_provenance,
)

from flux.errors import UserError

DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]
DEFAULTS = ("negative_prompt", "width", "height", "steps", "guidance")  # for lines without them
SAMPLING = ("true_cfg_scale", "solver", "sigmas", "shift")
# flags of sample.py that do not change an image
HOW_TO_RUN = ("weights", "device", "offload", "max_vram", "check_finite")
# and those that may
MODEL = (
    *("model", "transformer", "autoencoder", "text_encoder", "text_encoder_2", "tokenizer"),
    *("lora", "lora_ignore_unmatched", "numerics", "dtype", "decode_dtype", "quantize"),
    *("fp8_matmul", "compile", "vae_tile"),
)
FLAGS = sample.flags_of(sample.parser()) | {
    "manifest": "MANIFEST",
    "out": "OUT",
    "batch_size": "--batch-size",
}


def main() -> int:
    args = parser().parse_args()
    set_quiet(args.quiet)
    stopped = "stopped; the same command goes on"
    return exit_code(lambda: run(args), FLAGS, args.out, stopped)


def parser() -> argparse.ArgumentParser:
    p = Parser(
        usage="%(prog)s MANIFEST OUT [FLAG ...]",
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    p.add_argument("manifest", type=Path, metavar="MANIFEST", help="one JSON object a line")
    p.add_argument("out", type=Path, metavar="OUT", help="folder for the images and their records")
    p.add_argument(
        "--shard",
        type=shard,
        metavar="I/N",
        help="begin with every N-th block of lines, then help with the others (default: the rank "
        "and world size of torchrun; the process of srun and the task of a SLURM array; else 0/1)",
    )
    p.add_argument(
        "--batch-size",
        type=int,
        default=1,
        metavar="N",
        help="make up to N images of a block at a time, if their sizes, steps and guidance are "
        "equal; the bits of an image then depend on the other lines of its block (default: 1)",
    )
    p.add_argument(
        "--merge",
        action="store_true",
        help="make no images: check that all are there, and write OUT/images.jsonl",
    )
    add_quiet(p)
    for action in sample.parser()._actions:
        if action.dest in (*DEFAULTS, *SAMPLING, *HOW_TO_RUN, *MODEL, *FILTER, *PROVENANCE):
            p._add_action(action)
    return p


def shard(text: str) -> tuple[int, int]:
    """Parse I/N, with 0 <= I < N."""
    try:
        number, count = map(int, text.split("/"))
        if not 0 <= number < count:
            raise ValueError
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected I/N with 0 <= I < N (got {text!r})") from None
    return number, count


def shard_of(environment: Mapping[str, str]) -> tuple[int, int]:
    """Return the shard that torchrun or SLURM gave this process.

    Each task of a SLURM array may have several processes of srun.
    """

    def pair(number: str, count: str, first: str = "") -> tuple[int, int]:
        if number not in environment or count not in environment:
            return 0, 1
        return int(environment[number]) - int(environment.get(first, 0)), int(environment[count])

    if "RANK" in environment and "WORLD_SIZE" in environment:
        return pair("RANK", "WORLD_SIZE")
    task, tasks = pair("SLURM_ARRAY_TASK_ID", "SLURM_ARRAY_TASK_COUNT", "SLURM_ARRAY_TASK_MIN")
    process, processes = pair("SLURM_PROCID", "SLURM_NTASKS")
    # an array may have gaps: its numbers then exceed its count
    return (task * processes + process) % (tasks * processes), tasks * processes


def device_of(environment: Mapping[str, str], gpus: int) -> str:
    """Return the GPU of this process; a scheduler may show each process one GPU alone."""
    number = environment.get("LOCAL_RANK") or environment.get("SLURM_LOCALID") or "0"
    return f"cuda:{int(number) % gpus}"


def run(args: argparse.Namespace) -> int:
    from flux.batch.manifest import Manifest
    from flux.batch.records import Records, check_settings, merge

    manifest = Manifest(args.manifest)
    if args.batch_size < 1:
        raise UserError(f"batch_size: must be at least 1 (got {args.batch_size}).")
    kept = (*DEFAULTS, *SAMPLING, *MODEL, "filter", *PROVENANCE)
    given = {name: getattr(args, name) for name in kept}
    given["batch_size"] = args.batch_size if args.batch_size > 1 else None  # changes the bits
    settings = as_json({k: value for k, value in given.items() if value not in (None, [], False)})
    if args.out.exists() and not args.out.is_dir():
        raise UserError(f"out: {args.out} is a file. Choose a folder.")
    is_begun = (args.out / "batch.json").is_file()
    if args.merge:
        if not is_begun:
            raise UserError(f"out: {args.out} has no batch.json. Pass the folder of a batch.")
        summary = merge(Records(args.out, manifest, settings, begun=True))
        show(args.out / "images.jsonl")
        return report(args.out, summary)
    if is_begun:
        check_settings(args.out / "batch.json", manifest, settings)

    import torch

    from flux.batch.worker import Worker

    torch.set_flush_denormal(True)  # SiLU's tails are denormal: ten times slower on a CPU
    if args.device is None and torch.cuda.is_available():
        args.device = device_of(os.environ, torch.cuda.device_count())
    # before the model: a filter or a key that is not there ends the run, and leaves no folder
    filters, provenance = load_filters(args), load_provenance(args)
    pipe = sample.load(args)
    pipe.filters, pipe.provenance = filters, provenance
    if note := licence_note(pipe.spec.licence, filters):
        say(note)
    calls = {name: value for name, value in given.items() if name in (*DEFAULTS, *SAMPLING)}
    defaults = {name: value for name, value in calls.items() if value is not None}
    part = args.shard or shard_of(os.environ)
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"out: {args.out} cannot be made ({error.strerror}).") from None
    records = Records(args.out, manifest, settings)
    Worker(pipe, manifest, records, part, defaults, say, args.batch_size).run()
    return report(args.out, records.summary())


def as_json(settings: dict) -> dict:
    """Return settings as JSON keeps them: paths as absolute texts."""

    def plain(value):
        if isinstance(value, Path):
            return str(value.resolve())
        return [plain(x) for x in value] if isinstance(value, list | tuple) else value

    return {name: plain(value) for name, value in settings.items()}


def report(out: Path, summary) -> int:
    """Print what is done. 0: all images are there; 1: some are left; 2: wrong lines; 3: refused."""
    done, wrong, refused, left, first_left = summary
    counts = f"{done:,} images, {wrong:,} wrong lines, {left:,} images left"
    say(counts + (f", {refused:,} refused by a filter" if refused else ""))
    if left:
        first = ", ".join(str(line + 1) for line in first_left)
        say(f"left: line {first}{' and more' if left > len(first_left) else ''}")
        return 1
    return 2 if wrong else REFUSED if refused else 0


if __name__ == "__main__":
    sys.exit(main())
