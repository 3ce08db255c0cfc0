"""Record any tensor of a run, compare two runs, and find the first tensor that differs.

python scripts/parity.py capture "a red circle" --output a.safetensors
python scripts/parity.py capture "a red circle" --model flux.2-klein-4b --output b.safetensors \\
    --only "double_blocks.3.*" --steps-of 1,4 --keep probe
python scripts/parity.py compare port.safetensors a.safetensors

Exit codes: 0 within budget, 1 over budget, 2 a mistake in what was asked, 130 Ctrl-C.
"""

import argparse
import sys
import warnings
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sample  # noqa: E402  its flags say what to make

DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]
NOT_OURS = (  # of sample.py's flags: about many pictures, and about where they go
    "help", "num_images", "seed", "remake", "upsample", "upsample_model", "save_control", "output", "save_latents",
    "list_models",
)  # fmt: skip


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=DESCRIPTION, epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (add_capture, add_compare):
        add(commands)
    return p


def command(commands, run, name: str, text: str) -> argparse.ArgumentParser:
    """A subcommand, which is done by `run(args)`, whose result is the exit code."""
    p = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    p.set_defaults(run=run)
    return p


# ---------------------------------------------------------------- capture


def add_capture(commands) -> None:
    p = command(commands, capture, "capture", "run a model and record its tensors in one file")
    add_request(p)
    add_selection(p)
    p.add_argument("--output", type=Path, required=True, metavar="FILE", help="a .safetensors file that is not there yet")


def add_request(p: argparse.ArgumentParser) -> None:
    """What to make: the very flags of sample.py."""
    for group in sample.parser()._action_groups:
        wanted = [action for action in group._group_actions if action.dest not in NOT_OURS]
        ours = p.add_argument_group(group.title) if wanted else None
        for action in wanted:
            ours._add_action(action)
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.set_defaults(save_control=None)


def add_selection(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("what to record of it")
    group.add_argument("--only", action="append", default=[], metavar="PATTERN", help="tensors whose name, a part of it, or a "
                       "module around it fits: 'double_blocks.3.*', '*.img_attn', step.001, out (repeatable)")  # fmt: skip
    group.add_argument("--steps-of", type=numbers, default=(), metavar="N,N..", help="these steps alone (default: all)")
    group.add_argument("--keep", choices=("full", "probe", "statistics", "slice"), default="full", help="of each tensor: all "
                       "of it, 4096 values and each token's norm, a summary, or a corner (default: full)")  # fmt: skip
    group.add_argument("--limit", type=float, default=10.0, metavar="GB", help="refuse to record more (default: 10)")


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas") from None


def capture(args: argparse.Namespace) -> int:
    from flux.parity.capture import capture

    pipe, request = prepare(args)
    capture(pipe, request, args.output, selection(args), say)
    print(args.output)
    return 0


def prepare(args: argparse.Namespace):
    """The pipeline, and the request to it."""
    import torch

    from flux import pipeline
    from flux.errors import UserError
    from flux.parity.capture import Request

    prompts = sample.gather_prompts(args)
    if len(prompts) > 1:
        raise UserError(f"a capture is of one prompt, and {len(prompts)} are given: capture them one by one")
    pictures = sample.gather_pictures(args, pipeline.find_spec(args.model, args.transformer))
    dtype = getattr(torch, args.dtype) if args.dtype else None
    pipe = pipeline.load(
        args.model, args.weights, args.device, dtype, args.numerics, args.transformer, args.autoencoder, args.check_weights
    )
    for path, scale in args.lora:
        pipe.load_lora(path, scale, args.lora_partial)
    size = args.width, args.height, args.steps, args.guidance
    return pipe, Request(prompts[0], *size, args.seed, args.negative_prompt, args.cfg_scale, pictures)


def selection(args: argparse.Namespace):
    from flux.parity.capture import Selection

    return Selection(tuple(args.only), args.steps_of, args.keep, args.limit * 1e9)


# ---------------------------------------------------------------- compare


def add_compare(commands) -> None:
    p = command(commands, compare, "compare", "compare two captures, tensor by tensor")
    p.add_argument("judged", type=Path, metavar="A", help="a capture, or any safetensors file of tensors by the same names")
    p.add_argument("reference", type=Path, metavar="B", help="what A should be")
    p.add_argument("--only", action="append", default=[], metavar="PATTERN", help="as for capture (repeatable)")
    p.add_argument("--budget", type=float, metavar="X", help="relative L2 that is allowed (default: what was measured and "
                   "stored in B, else by dtype: 1e-4 in float32, 2e-2 in bfloat16)")  # fmt: skip
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")


def compare(args: argparse.Namespace) -> int:
    from flux.parity import compare
    from flux.parity.record import Capture

    a, b = Capture(args.judged), Capture(args.reference)
    rows = compare.compare(a, b, args.budget, args.only)
    print(compare.table(rows))
    for path, lost in zip((args.judged, args.reference), compare.unmatched(a, b)):
        if lost:
            say(f"note: {len(lost):,} tensors are in {path} alone: {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}")
    if args.json:
        args.json.write_text(compare.to_json(rows), encoding="utf-8")
    return int(compare.first_over(rows) is not None)


# ---------------------------------------------------------------- running


def main() -> int:
    args = parser().parse_args()
    noted: set[str] = set()

    def note(message, *_, **__) -> None:
        if str(message) not in noted:
            noted.add(str(message))
            say(f"note: {message}")

    warnings.showwarning = note
    from flux.errors import UserError

    try:
        return args.run(args)
    except UserError as error:
        return fail(str(error))
    except ModuleNotFoundError as error:
        return fail(f"the package {error.name!r} is missing: run `pip install -e .` in the repository")
    except OSError as error:
        return fail(f"{error.filename or 'the output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("stopped, and nothing is kept", 130)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(x in str(error) for x in ("out of memory", "can't allocate memory")):
            raise
        return fail("out of memory: make the picture smaller, or choose a smaller model")


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def fail(text: str, code: int = 2) -> int:
    say(f"error: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())
