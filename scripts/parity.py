"""Record any tensor of a run, compare two runs, and find the first tensor that differs.

python scripts/parity.py capture "a red circle" --output a.safetensors
python scripts/parity.py capture "a red circle" --model flux.2-klein-4b --output b.safetensors \\
    --only "double_blocks.3.*" --steps-of 1,4 --keep probe
python scripts/parity.py compare port.safetensors a.safetensors
python scripts/parity.py compare a.safetensors --against diffusers
python scripts/parity.py doctor port.safetensors a.safetensors
python scripts/parity.py report port.safetensors a.safetensors --output report.html
python scripts/parity.py kit --output kit
python scripts/parity.py kit --random flux.1 --output kit
python scripts/parity.py replay a.safetensors --dtype bfloat16
python scripts/parity.py bisect a.safetensors --transformer mine.safetensors
python scripts/parity.py budgets a.safetensors
python scripts/parity.py table

Exit codes: 0 within budget, 1 over budget or stopped at NaN, 2 a mistake in what was asked, 130 Ctrl-C.
"""

import argparse
import math
import sys
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sample
from command_line import add_hidden_alias, close_stdout, say, with_flags

FLAGS = sample.flags_of(sample.parser())
DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]
NOT_OURS = (  # of sample.py's flags: about many pictures, and about where they go
    "help",
    "num_images",
    "seed",
    "from_image",
    "upsample",
    "upsample_model",
    "save_control",
    "output",
    "save_latents",
    "list_models",
)


def parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for add in (
        add_capture,
        add_compare,
        add_kit,
        add_replay,
        add_bisect,
        add_budgets,
        add_report,
        add_doctor,
        add_table,
    ):
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
    p.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="a .safetensors file that is not there yet",
    )


def add_request(p: argparse.ArgumentParser) -> None:
    """What to make: the very flags of sample.py."""
    for group in sample.parser()._action_groups:
        wanted = [action for action in group._group_actions if action.dest not in NOT_OURS]
        ours = p.add_argument_group(group.title) if wanted else None
        for action in wanted:
            ours._add_action(action)
    add_aliases(p)
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.set_defaults(save_control=None)


def add_aliases(p: argparse.ArgumentParser) -> None:
    """Accept the older names of those flags of sample.py that `p` has."""
    for old, new in sample.ALIASES.items():
        if new in p._option_string_actions:
            add_hidden_alias(p, old, new)


def add_selection(p: argparse.ArgumentParser) -> None:
    group = p.add_argument_group("what to record of it")
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="tensors whose name, a part of it, or a "
        "module around it fits: 'double_blocks.3.*', '*.img_attn', step.001, out (repeatable)",
    )
    group.add_argument(
        "--steps-of",
        type=numbers,
        default=(),
        metavar="N,N..",
        help="these steps alone (default: all)",
    )
    group.add_argument(
        "--keep",
        choices=("full", "probe", "statistics", "slice"),
        default="full",
        help="of each tensor: all "
        "of it, 4096 values and each token's norm, a summary, or a corner (default: full)",
    )
    group.add_argument(
        "--limit",
        type=amount,
        default=10.0,
        metavar="GB",
        help="refuse to record more (default: 10)",
    )


def numbers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers with commas") from None


def capture(args: argparse.Namespace) -> int:
    from flux.parity.capture import capture

    pipe, request = prepare(args)
    made = capture(pipe, request, args.output, selection(args), say)
    print(args.output)
    return int("stopped" in made.recipe)


def amount(text: str) -> float:
    """A finite number that is not negative."""
    if not 0 <= (number := float(text)) < math.inf:
        raise argparse.ArgumentTypeError(f"{text} is no number from 0 on")
    return number


def prepare(args: argparse.Namespace):
    """The pipeline, and the request to it."""
    from flux.errors import UserError
    from flux.parity.capture import Request
    from flux.weights import locate as models

    prompts = sample.gather_prompts(args)
    if len(prompts) > 1:
        raise UserError(
            f"a capture is of one prompt, and {len(prompts)} are given: capture them one by one"
        )
    pictures = sample.gather_images(args, models.get_spec(args.model, args.transformer))
    pipe = sample.load(args)
    size = args.width, args.height, args.steps, args.guidance
    return pipe, Request(
        prompts[0], *size, args.seed, args.negative_prompt, args.true_cfg_scale, pictures
    )


def selection(args: argparse.Namespace):
    from flux.parity.capture import Selection

    return Selection(tuple(args.only), args.steps_of, args.keep, args.limit * 1e9)


# ---------------------------------------------------------------- compare


def add_compare(commands) -> None:
    p = command(
        commands,
        compare,
        "compare",
        "compare two captures, or a live run and a capture, tensor by tensor",
    )
    p.add_argument(
        "judged",
        type=Path,
        metavar="A",
        help="a capture, or any safetensors file of tensors by the same names",
    )
    p.add_argument("reference", type=Path, nargs="?", metavar="B", help="what A should be")
    p.add_argument(
        "--against",
        metavar="X",
        help="instead of B, what is run live, and should be as A is: "
        "`here`, the pipeline, from the prompt on; `diffusers`, its transformer with the same weights, in each "
        "recorded pass; MODULE:FUNCTION, as for --call of replay, or one that gives the path of a capture; or the "
        "same as B, a file",
    )
    p.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="as for capture (repeatable)"
    )
    p.add_argument(
        "--budget",
        type=amount,
        metavar="X",
        help="relative L2 that is allowed (default: what was measured and "
        "stored in the reference, else by dtype: 1e-4 in float32, 2e-2 in bfloat16)",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")
    add_how(p.add_argument_group("how to run, with --against here or diffusers"))


def compare(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.parity import compare
    from flux.parity.capture_file import Capture
    from flux.parity.compare_live import allowed
    from flux.parity.tolerances import stored, within

    if (args.reference is None) == (args.against is None):
        raise UserError("compare takes A and either B or --against X: give one of the two")
    idle = [flag for flag in (*AGAIN, "image", "mask") if getattr(args, flag)]
    if idle and args.against not in ("here", "diffusers"):
        raise UserError(
            f"--{idle[0].replace('_', '-')} is for --against here or diffusers, where something is run: leave it out"
        )
    if args.against and not args.against.endswith(".safetensors"):
        return live(args)
    args.reference = args.reference or Path(args.against)
    a, b = Capture(args.judged), Capture(args.reference)
    precision = a.recipe.get("dtype")
    rows = compare.compare(a, b, allowed(b, precision, args.budget), args.only)
    print(compare.table(rows))
    if precision in stored(b):
        print(within(rows, b, precision))
    for path, lost in zip((args.judged, args.reference), compare.unmatched(a, b)):
        if lost:
            say(
                f"note: {len(lost):,} tensors are in {path} alone: {', '.join(lost[:3])}{', ...' * (len(lost) > 3)}"
            )
    return judge(rows, args)


def live(args: argparse.Namespace) -> int:
    """What is live is judged, and A is the reference."""
    from flux.parity import compare, replay
    from flux.parity import compare_live as against
    from flux.parity.capture_file import Capture

    args.capture = args.judged
    if args.against == "here":
        capture, pipe, request = again(args)
        budget = against.allowed(capture, str(pipe.dtype).removeprefix("torch."), args.budget)
        rows = replay.against(capture, pipe, request, args.only, budget)
    elif args.against == "diffusers":
        capture = Capture(args.judged)
        pipe = pipeline_of(capture, args)
        budget = against.allowed(capture, str(pipe.dtype).removeprefix("torch."), args.budget)
        rows = against.diffusers(capture, pipe, args.only, budget)
    else:
        sys.path.append("")  # a function may be in a file beside one
        rows = against.adaptor(
            Capture(args.judged), against.named(args.against), args.only, args.budget
        )
    print(compare.table(rows))
    return judge(rows, args)


def judge(rows, args: argparse.Namespace) -> int:
    from flux.image_io.output import write_exclusive
    from flux.parity import compare

    if args.json:
        say(
            f"rows: {write_exclusive(args.json, lambda file: file.write(compare.to_json(rows).encode()))}"
        )
    return int(compare.first_over(rows) is not None)


# ---------------------------------------------------------------- kit


def add_kit(commands) -> None:
    p = command(
        commands, kit, "kit", "write a folder that a port in any language can be tested against"
    )
    add_request(p)
    group = p.add_argument_group("the kit")
    group.add_argument(
        "--random",
        choices=("flux.1", "flux.2"),
        help="of a tiny model of this family with random weights, "
        "which needs no files, in place of --model",
    )
    group.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="that is not there yet"
    )
    group.add_argument(
        "--only",
        action="append",
        default=[],
        metavar="PATTERN",
        help="as for capture; the block that the example reads is always there (repeatable)",
    )
    group.add_argument(
        "--without-weights",
        action="store_true",
        help="of a model that is at hand, or too large to copy",
    )
    group.add_argument(
        "--limit", type=amount, default=1.0, metavar="GB", help="refuse to write more (default: 1)"
    )


def kit(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.parity.random_model import random_model

    if not args.random:
        return build_kit(args)
    if args.model or args.weights or args.transformer or args.autoencoder:
        raise UserError(
            "--random makes a model of its own: leave out --model, --weights, --transformer and --autoencoder"
        )
    with random_model(args.random) as (args.model, args.weights):
        return build_kit(args)


def build_kit(args: argparse.Namespace) -> int:
    from flux.parity import golden_kit as kit

    if not (args.prompts or args.prompt or args.prompt_file or args.image):
        args.prompts = [kit.PROMPT]
    args.dtype = args.dtype or "float32"
    pipe, request = prepare(args)
    request = kit.small(pipe.spec, request)
    kit.build(
        pipe, request, args.output, args.only, not args.without_weights, args.limit * 1e9, say
    )
    print(args.output)
    return 0


# ---------------------------------------------------------------- replay, bisect, budgets

AGAIN = (
    "device",
    "dtype",
    "numerics",
    "weights",
    "transformer",
    "autoencoder",
    "lora",
    "lora_ignore_unmatched",
)  # of sample.py's flags


def add_replay(commands) -> None:
    p = command(
        commands,
        replay,
        "replay",
        "run modules on the inputs that a capture recorded, so that errors do not add up",
    )
    add_again(p)
    add_judgement(p)
    p.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="as for capture (repeatable)"
    )
    p.add_argument(
        "--free",
        action="store_true",
        help="the whole loop, from the recorded noise and features on: they add up",
    )
    p.add_argument(
        "--inside",
        metavar="NAME",
        help="one module, step.001/double_blocks.3, or network, step.001, and all in it",
    )
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows there")


def add_bisect(commands) -> None:
    p = command(
        commands,
        bisect,
        "bisect",
        "find the first step and module that departs from a capture, in few runs",
    )
    add_again(p)
    add_judgement(p)


def add_budgets(commands) -> None:
    p = command(
        commands,
        budgets,
        "budgets",
        "measure how far rounding moves each tensor of a capture, and keep that in it",
    )
    add_again(p)
    p.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="as for capture (repeatable)"
    )
    p.add_argument(
        "--precision",
        action="append",
        choices=("bfloat16", "float16", "float8"),
        metavar="P",
        help="bfloat16, "
        "float16 or float8 (repeatable; default: all); twice the first is what `compare` then allows",
    )


def add_again(p: argparse.ArgumentParser) -> None:
    p.add_argument("capture", type=Path, metavar="CAPTURE")
    add_how(p)


def add_how(p: argparse._ActionsContainer) -> None:
    """How the run of a capture is made again: the model and what was asked for are in it."""
    for group in sample.parser()._action_groups:
        pictures = group.title.startswith("images")
        for action in group._group_actions:
            if action.dest in AGAIN or (pictures and action.dest not in NOT_OURS):
                p._add_action(action)
    add_aliases(p)
    p.set_defaults(numerics=None, save_control=None)


def add_judgement(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--call",
        metavar="MODULE:FUNCTION",
        help="a function to judge in place of the networks here: it is "
        "given the name of a module and a list of tensors, and gives a list of tensors",
    )
    p.add_argument(
        "--budget",
        type=amount,
        metavar="X",
        help="relative L2 that is allowed (default: what was measured for "
        "this dtype, else by dtype: 1e-5 in float32)",
    )


def again(args: argparse.Namespace):
    """The capture, the pipeline that it is of, and the request to it."""
    from flux.parity import replay
    from flux.parity.capture_file import Capture
    from flux.weights.locate import get_spec

    capture = Capture(args.capture)
    pictures = sample.gather_images(args, get_spec(replay.recipe_of(capture)["model"]))
    request = replay.request_of(capture, pictures)
    return capture, pipeline_of(capture, args), request


def pipeline_of(capture, args: argparse.Namespace):
    import torch

    from flux.parity import replay

    dtype = getattr(torch, args.dtype) if args.dtype else None
    files = args.transformer, args.autoencoder, args.lora, args.lora_ignore_unmatched
    return replay.load(capture, args.weights, args.device, dtype, args.numerics, *files)


def called(args: argparse.Namespace):
    from flux.parity.modules import guarded, named

    sys.path.append("")  # a function may be in a file beside one
    return guarded(named(args.call)) if args.call else None


def replay(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.image_io.output import write_exclusive
    from flux.parity import compare, replay
    from flux.parity import tolerances as budgets
    from flux.parity.modules import Modules

    if bool(args.free) + bool(args.inside) + bool(args.call) > 1:
        raise UserError("--free, --inside and --call exclude each other: give one of them")
    call = called(args)
    capture, pipe, request = again(args)
    dtype = str(pipe.dtype).removeprefix("torch.")
    measured = dtype in budgets.stored(capture)
    budget = (
        budgets.budgets(capture, dtype, not args.free)
        if measured and args.budget is None
        else args.budget
    )
    if args.free:
        rows = replay.free(capture, pipe, request, args.only, budget)
    elif args.inside:
        rows = replay.inside(capture, Modules(pipe), args.inside, args.only, budget)
    else:
        rows = replay.forced(capture, call or Modules(pipe), args.only, budget)
    print(compare.table(rows))
    if measured:
        say(budgets.within(rows, capture, dtype, not args.free))
    if args.json:
        say(
            f"rows: {write_exclusive(args.json, lambda file: file.write(compare.to_json(rows).encode()))}"
        )
    return int(compare.first_over(rows) is not None)


def bisect(args: argparse.Namespace) -> int:
    from flux.parity.bisect import bisect

    call = called(args)
    found = bisect(*again(args), call, args.budget)
    print(found or "no step departs")
    return int(found is not None)


def budgets(args: argparse.Namespace) -> int:
    from flux.parity import tolerances as budgets

    capture, pipe, request = again(args)
    precisions = args.precision or budgets.PRECISIONS
    measured = {
        name: budgets.measure(capture, pipe, request, name, args.only) for name in precisions
    }
    budgets.store(capture.path, measured, precisions[0])
    print(budgets.table(measured))
    say(
        f"kept in {capture.path}: `compare` allows {budgets.ALLOWED} times what {precisions[0]} does in a run"
    )
    return 0


# ---------------------------------------------------------------- report


def add_report(commands) -> None:
    p = command(commands, report, "report", "compare two captures, and write a web page to look at")
    p.add_argument("judged", type=Path, metavar="A", help="as for compare")
    p.add_argument("reference", type=Path, metavar="B", help="what A should be")
    p.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="as for capture (repeatable)"
    )
    p.add_argument("--budget", type=amount, metavar="X", help="as for compare")
    p.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="an .html file that needs nothing else",
    )
    p.add_argument(
        "--png", type=Path, metavar="FOLDER", help="also write its plots and pictures there"
    )


def report(args: argparse.Namespace) -> int:
    from flux.parity import compare, report
    from flux.parity.capture_file import Capture

    report.check_output(args.output, args.png)
    a, b = Capture(args.judged), Capture(args.reference)
    rows = compare.compare(a, b, args.budget, args.only)
    for path in report.write(a, b, rows, args.output, args.png):
        print(path)
    say(compare.verdict(rows))
    return int(compare.first_over(rows) is not None)


# ---------------------------------------------------------------- doctor


def add_doctor(commands) -> None:
    p = command(
        commands,
        doctor,
        "doctor",
        "try the known mistakes on the first tensor over budget, and name the one it is",
    )
    p.add_argument("judged", type=Path, metavar="PORT", help="as for compare")
    p.add_argument(
        "reference", type=Path, metavar="REFERENCE", help="a capture with every tensor in full"
    )
    p.add_argument(
        "--only", action="append", default=[], metavar="PATTERN", help="as for capture (repeatable)"
    )
    p.add_argument("--budget", type=amount, metavar="X", help="as for compare")
    for action in sample.parser()._actions:
        if action.dest in AGAIN:
            p._add_action(action)
    add_aliases(p)
    p.set_defaults(numerics=None)


def doctor(args: argparse.Namespace) -> int:
    from flux.parity import diagnose as doctor
    from flux.parity import replay
    from flux.parity.capture_file import Capture
    from flux.parity.compare import compare, verdict

    port, reference = Capture(args.judged), Capture(args.reference)
    replay.recipe_of(reference)
    rows = compare(port, reference, args.budget, args.only)
    if not any(row.over for row in rows):
        print(verdict(rows))
        return 0
    print(doctor.told(doctor.diagnose(rows, port, reference, pipeline_of(reference, args))))
    return 1


# ---------------------------------------------------------------- table


def add_table(commands) -> None:
    p = command(
        commands,
        table,
        "table",
        "measure each network and pipeline against diffusers and transformers, tiny and random",
    )
    p.add_argument(
        "--write",
        action="store_true",
        help="put the table into README.md as well, in the place of the one there",
    )


def table(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.parity import table

    root = Path(__file__).resolve().parents[1]
    sys.path.append(str(root / "tests"))  # where the references are built
    try:
        from support.parity_rows import measure, ran_on

        text = table.markdown(list(measure()), ran_on())
    except ImportError as error:
        lacking = f"table needs diffusers, transformers and what the tests do, and {error.name or error} is missing or too old"
        raise UserError(
            f'{lacking}: run `pip install -e ".[test]"` in a clone of the repository'
        ) from None
    print(text)
    if args.write:
        table.write(root / "README.md", text)
    return 0


# ---------------------------------------------------------------- running


def main() -> int:
    args = parser().parse_args()
    sample.show_warnings_once(FLAGS)
    from flux.errors import NonFiniteError, UserError

    try:
        return args.run(args)
    except UserError as error:
        return fail(with_flags(str(error), FLAGS))
    except NonFiniteError as error:
        return fail(with_flags(str(error), FLAGS), 1)
    except ModuleNotFoundError as error:
        return fail(
            f"the package {error.name!r} is missing: run `pip install -e .` in the repository"
        )
    except BrokenPipeError:  # `| head` has seen enough
        close_stdout()
        return 1
    except OSError as error:
        return fail(f"{error.filename or 'the output'}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail("stopped, and nothing is kept", 130)
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, RuntimeError) and not any(
            x in str(error) for x in ("out of memory", "can't allocate memory")
        ):
            raise
        return fail("out of memory: make the picture smaller, or choose a smaller model")


def fail(text: str, code: int = 2) -> int:
    say(f"error: {text}")
    return code


if __name__ == "__main__":
    sys.exit(main())
