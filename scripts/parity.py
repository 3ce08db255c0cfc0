"""Record any tensor of a run, compare two runs, and find the first tensor that differs.

python scripts/parity.py capture "a red circle" --output a.safetensors
python scripts/parity.py capture "a red circle" --model flux.2-klein-4b --output b.safetensors \\
    --filter "double_blocks.3.*" --at-steps 1,4 --store probe
python scripts/parity.py compare port.safetensors a.safetensors
python scripts/parity.py compare a.safetensors --against diffusers
python scripts/parity.py compare a.safetensors --against bfl --bfl-path ../flux2
python scripts/parity.py diagnose port.safetensors a.safetensors
python scripts/parity.py report port.safetensors a.safetensors --output report.html
python scripts/parity.py golden-kit --output kit
python scripts/parity.py golden-kit --random flux.3 --output kit
python scripts/parity.py replay a.safetensors --dtype bfloat16
python scripts/parity.py bisect a.safetensors --transformer mine.safetensors
python scripts/parity.py calibrate a.safetensors
python scripts/parity.py table

Exit codes: 0 within tolerance; 1 over tolerance, nothing compared, or stopped at NaN; 2 wrong
arguments or files; 3 within tolerance, but some tensors of the reference were not compared, or in
part; 130 Ctrl-C.
"""

import argparse
import math
import sys
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parent)]

import sample
from modules.command_line import Parser, add_hidden_alias, exit_code, say, show

DESCRIPTION, EPILOG = __doc__.split("\n", 1)[0], "examples:" + __doc__.split("\n", 1)[1]
# flags of sample.py that parity.py does not take: about several images, and about their files
EXCLUDED = {
    "help",
    "quiet",
    "num_images",
    "seed",
    "from_image",
    "upsample",
    "upsample_model",
    "box",
    "boxes",
    "save_control",
    "output",
    "save_latents",
    "list_models",
    "filter",
    "filter_weights",
    "review",
    "latents",
    "solver",
    "sigmas",
    "shift",
}
# flags of sample.py that say how to run; the model and the request come from the capture
HOW_TO_RUN = (
    "device",
    "dtype",
    "numerics",
    "weights",
    "transformer",
    "autoencoder",
    "lora",
    "lora_ignore_unmatched",
)
# the library's arguments and their flags
FLAGS = sample.flags_of(sample.parser()) | {
    "only": "--filter",
    "exclude": "--exclude",
    "at_steps": "--at-steps",
    "store": "--store",
    "limit": "--limit",
    "tolerance": "--tolerance",
    "against": "--against",
    "bfl_path": "--bfl-path",
    "module_fn": "--module-fn",
    "json": "--json",
    "inside": "--inside",
    "precision": "--precision",
    "include_weights=False": "--without-weights",
}


def parser() -> argparse.ArgumentParser:
    p = Parser(
        description=DESCRIPTION,
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = p.add_subparsers(dest="command", required=True, metavar="COMMAND")
    add_capture(commands)
    add_compare(commands)
    add_diagnose(commands)
    add_report(commands)
    add_replay(commands)
    add_bisect(commands)
    add_calibrate(commands)
    add_golden_kit(commands)
    add_table(commands)
    return p


def add_command(
    commands, run: Callable, name: str, text: str, old: str = ""
) -> argparse.ArgumentParser:
    """Add a subcommand. run(args) returns the exit code. `old` is a hidden name."""
    p = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
    p.set_defaults(run=run)
    if old:
        commands._name_parser_map[old] = p
    return p


def add_flags_of_sample(p: argparse._ActionsContainer, accept: Callable[[str, str], bool]) -> None:
    """Add sample.py's flags for which accept(name, title of their group) is true."""
    theirs = sample.parser()
    for group in theirs._action_groups:
        wanted = [a for a in group._group_actions if accept(a.dest, group.title)]
        titled = isinstance(p, argparse.ArgumentParser) and wanted
        ours = p.add_argument_group(group.title) if titled else p
        for action in wanted:
            ours._add_action(action)
            for option, other in theirs._option_string_actions.items():
                if other is action:  # hidden aliases too
                    p._option_string_actions.setdefault(option, action)


def add_filter(p: argparse._ActionsContainer, text: str = "as for capture (repeatable)") -> None:
    p.add_argument(
        "--filter", action="append", default=[], dest="only", metavar="PATTERN", help=text
    )
    add_hidden_alias(p, "--only", "--filter")
    p.add_argument(
        "--exclude",
        action="append",
        default=[],
        dest="only",
        type=lambda pattern: f"!{pattern}",
        metavar="PATTERN",
        help="leave out tensors that match, as for --filter (repeatable)",
    )


def add_tolerance(p: argparse._ActionsContainer, text: str = "as for compare") -> None:
    p.add_argument("--tolerance", type=non_negative, metavar="X", help=text)
    add_hidden_alias(p, "--budget", "--tolerance")


def add_precision(p: argparse._ActionsContainer) -> None:
    p.add_argument(
        "--precision",
        choices=("float32", "float16", "bfloat16", "float8"),
        help="the one in which the judged tensors were computed (default: as A says, else the "
        "dtype of most of its tensors)",
    )


def add_json(p: argparse._ActionsContainer) -> None:
    p.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")


def non_negative(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0 <= number < math.inf:
        raise argparse.ArgumentTypeError(f"must be a number from 0 on (got {text!r})")
    return number


def integers(text: str) -> tuple[int, ...]:
    try:
        return tuple(map(int, text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be integers with commas (got {text!r})") from None


# ---------------------------------------------------------------- capture


def add_capture(commands) -> None:
    p = add_command(commands, capture, "capture", "run a model and record its tensors in one file")
    add_request(p)
    group = p.add_argument_group("what to record")
    add_filter(
        group,
        "record only tensors whose name, a part of it, or a module around it matches: "
        "'double_blocks.3.*', '*.img_attn', step.001, out (repeatable)",
    )
    group.add_argument(
        "--at-steps", type=integers, default=(), metavar="N,N..", help="only these steps"
    )
    add_hidden_alias(group, "--steps-of", "--at-steps")
    group.add_argument(
        "--store",
        choices=("full", "probe", "statistics", "slice"),
        default="full",
        help="what to store of each tensor: all of it, 4096 values and the norm of each token, "
        "statistics, or a corner (default: full)",
    )
    add_hidden_alias(group, "--keep", "--store")
    group.add_argument(
        "--limit",
        type=non_negative,
        default=10.0,
        metavar="GB",
        help="largest size of the file (default: 10)",
    )
    p.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="a new .safetensors file"
    )


def add_request(p: argparse.ArgumentParser) -> None:
    """Add the flags of sample.py that describe one image."""
    add_flags_of_sample(p, lambda name, title: name not in EXCLUDED)
    p.add_argument("--seed", type=int, default=0, help="default: 0")
    p.set_defaults(save_control=None)


def capture(args: argparse.Namespace) -> int:
    from flux.parity.capture import Selection, capture

    pipe, request = prepare(args)
    selection = Selection(tuple(args.only), args.at_steps, args.store, args.limit * 1e9)
    recorded = capture(pipe, request, args.output, selection, say)
    show(args.output)
    return int("stopped" in recorded.recipe)


def prepare(args: argparse.Namespace):
    """Return the pipeline and the request that the flags describe."""
    from flux.errors import UserError
    from flux.parity.capture import Request
    from flux.weights.locate import get_spec

    prompts = list(sample.gather_prompts(args))
    if len(prompts) > 1:
        raise UserError(f"prompts: one capture has one prompt (got {len(prompts)})")
    spec = get_spec(args.model, args.transformer)
    images = sample.gather_images(args, spec)
    pipe = sample.load(args, fast=False)  # the plain networks are the reference
    size = args.width, args.height, args.steps, args.guidance
    return pipe, Request(
        prompts[0], *size, args.seed, args.negative_prompt, args.true_cfg_scale, images
    )


# ---------------------------------------------------------------- compare


def add_compare(commands) -> None:
    p = add_command(
        commands, compare, "compare", "compare a capture with another one, or with a live run"
    )
    p.add_argument(
        "judged",
        type=Path,
        metavar="A",
        help="a capture, or any .safetensors file of tensors with the same names",
    )
    p.add_argument("reference", type=Path, nargs="?", metavar="B", help="the reference")
    p.add_argument(
        "--against",
        metavar="X",
        help="instead of B, compare a live run with A, which is then the reference: `here` (the "
        "pipeline, from the prompt on), `diffusers` (its transformer with the same weights, in "
        "each recorded pass), `bfl` (BFL's networks of --bfl-path, in the same way), or "
        "MODULE:FUNCTION (see --module-fn of replay; the function may also return the path of a "
        "capture), whose module is imported and run, also from the current folder: name only code "
        "that you trust. A file is used as B",
    )
    p.add_argument(
        "--bfl-path",
        type=Path,
        metavar="FOLDER",
        help="with --against bfl: a checkout of black-forest-labs/flux or flux2, whose code is run "
        "in a process of its own",
    )
    add_filter(p)
    add_tolerance(
        p,
        "largest relative L2 error (default: what calibrate stored for the precision of A, else "
        "by dtype: 1e-4 in float32, 2e-2 in bfloat16)",
    )
    add_precision(p)
    add_json(p)
    add_how_to_run(p.add_argument_group("how to run, with --against here, diffusers or bfl"), p)


def compare(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.parity import compare
    from flux.parity.tolerances import format_ratio, stored_rounding

    if (args.reference is None) == (args.against is None):
        raise UserError("compare takes A and either B or --against X. Pass one of the two")
    unused = [flag for flag in (*HOW_TO_RUN, "image", "mask") if getattr(args, flag, None)]
    if unused and args.against not in ("here", "diffusers", "bfl"):
        raise UserError(
            f"--{unused[0].replace('_', '-')}: applies only with --against here, diffusers or bfl. "
            "Leave it out"
        )
    if (args.against == "bfl") != (args.bfl_path is not None):
        raise UserError("--bfl-path: belongs to --against bfl, which needs it. Pass both")
    is_live = bool(args.against) and not args.against.endswith(".safetensors")
    if args.precision and is_live:
        raise UserError("--precision: applies to a file. That of a live run is known: leave it out")
    check_json(args.json)
    if is_live:
        return compare_live(args)
    a, b = read_pair(args.judged, args.reference or Path(args.against))
    precision = args.precision or compare.precision_of(a)
    rows = compare.compare(a, b, args.tolerance, args.only, precision)
    missing = compare.missing(rows, b.names, args.only)
    show_lines(compare.table(rows, compare.coverage(rows, b, a), missing))
    if precision in stored_rounding(b):
        show(format_ratio(rows, b, precision))
    say_cautions(rows, a, b, precision)
    return finish(rows, args, missing)


def say_cautions(rows, a, b, precision: str | None) -> None:
    """Say what a verdict rests on besides the values."""
    from flux.parity.compare import about_copies, about_tolerances

    for caution in (about_copies(rows, a, b), about_tolerances(rows, a, b, precision)):
        if caution:
            say(f"note: {caution}")


def read_pair(judged: Path, reference: Path):
    """Return two captures. UserError if both are one file."""
    from flux.parity.capture_file import Capture
    from flux.parity.compare import check_two_files

    a, b = Capture(judged), Capture(reference)
    check_two_files(a, b)
    return a, b


def show_lines(text: str) -> None:
    """Print a text of ours, in which names from files are escaped already."""
    show(*text.split("\n"))


def compare_live(args: argparse.Namespace) -> int:
    """Compare a live run with the capture A."""
    from flux.parity import compare, compare_live, replay
    from flux.parity.capture_file import Capture

    if args.against == "here":
        capture, pipe, request = load_run(args.judged, args)
        rows = replay.run_and_compare(capture, pipe, request, args.only, args.tolerance)
        expected = capture.names
    elif args.against == "diffusers":
        capture = open_capture(args.judged, args)
        pipe = load_pipeline(capture, args)
        rows = compare_live.diffusers(capture, pipe, args.only, args.tolerance)
        expected = compare_live.in_every_pass(capture, pipe)
    elif args.against == "bfl":
        from flux.parity.bfl import bfl, computed_by_bfl

        capture = open_capture(args.judged, args)
        pipe = load_pipeline(capture, args)
        rows = bfl(capture, pipe, args.bfl_path, tuple(args.only), args.tolerance)
        expected = computed_by_bfl(capture, pipe)
        if dtype_name(pipe) != "float32" and capture.recipe["numerics"] != "bfl":
            say("note: BFL's code rounds as a capture with --numerics bfl does")
    else:
        sys.path.append("")  # the function may be in a file of the current folder
        function = compare_live.named(args.against)
        capture = Capture(args.judged)
        rows, expected = compare_live.adaptor(capture, function, args.only, args.tolerance)
    named = args.against in ("here", "diffusers", "bfl")
    why = "were not computed" if named else "have nothing of the function"
    text = compare.coverage(rows, capture, only=args.only, missing=why)
    missing = compare.missing(rows, expected, args.only)
    show_lines(compare.table(rows, text, missing))
    return finish(rows, args, missing)


def dtype_name(pipe) -> str:
    return str(pipe.dtype).removeprefix("torch.")


def check_json(path: Path | None) -> None:
    """Make the folder of --json. UserError if no file can be written there."""
    from flux.atomic_files import make_folder
    from flux.errors import UserError

    try:
        if path:
            make_folder(path.parent)
            with tempfile.NamedTemporaryFile(dir=path.parent):
                pass
    except OSError as error:
        raise UserError(
            f"json: {path} cannot be written ({error.strerror}). Choose another folder."
        ) from None


def finish(rows, args: argparse.Namespace, missing: Sequence[str] = ()) -> int:
    """Write the rows where --json says. Return the exit code."""
    from flux.errors import UserError
    from flux.image_io.output import write_exclusive
    from flux.parity import compare

    if args.json:
        content = compare.to_json(rows).encode()
        try:
            say(f"rows: {write_exclusive(args.json, lambda file: file.write(content))}")
        except OSError as error:
            raise UserError(
                f"json: {args.json} cannot be written ({error.strerror}). Make room."
            ) from None
    return compare.exit_code(rows, missing)


# ---------------------------------------------------------------- diagnose


def add_diagnose(commands) -> None:
    p = add_command(
        commands,
        diagnose,
        "diagnose",
        "name the known bug that explains the first tensor over its tolerance",
        old="doctor",
    )
    p.add_argument("judged", type=Path, metavar="PORT", help="as A of compare")
    p.add_argument(
        "reference", type=Path, metavar="REFERENCE", help="a capture with every tensor in full"
    )
    add_filter(p)
    add_tolerance(p)
    add_precision(p)
    add_flags_of_sample(p, lambda name, title: name in HOW_TO_RUN)
    p.set_defaults(numerics=None)


def diagnose(args: argparse.Namespace) -> int:
    from flux.parity import compare, replay
    from flux.parity.diagnose import diagnose, format_diagnosis

    port, reference = read_pair(args.judged, args.reference)
    replay.recipe_of(reference)
    open_capture(args.reference, args)
    rows = compare.compare(port, reference, args.tolerance, args.only, args.precision)
    if compare.first_over(rows) is None:
        missing = compare.missing(rows, reference.names, args.only)
        show(compare.verdict(rows, missing), compare.coverage(rows, reference, port))
        say_cautions(rows, port, reference, args.precision)
        return compare.exit_code(rows, missing)
    pipe = load_pipeline(reference, args)
    show_lines(format_diagnosis(diagnose(rows, port, reference, pipe)))
    return 1


# ---------------------------------------------------------------- report


def add_report(commands) -> None:
    p = add_command(commands, report, "report", "compare two captures, and write a web page")
    p.add_argument("judged", type=Path, metavar="A", help="as for compare")
    p.add_argument("reference", type=Path, metavar="B", help="the reference")
    add_filter(p)
    add_tolerance(p)
    add_precision(p)
    p.add_argument(
        "--output",
        type=Path,
        required=True,
        metavar="FILE",
        help="a new .html file that needs no other file",
    )
    p.add_argument(
        "--png", type=Path, metavar="FOLDER", help="also write its plots and images to FOLDER"
    )


def report(args: argparse.Namespace) -> int:
    from flux.parity import compare, report

    report.check_output(args.output, args.png)
    a, b = read_pair(args.judged, args.reference)
    rows = compare.compare(a, b, args.tolerance, args.only, args.precision)
    missing = compare.missing(rows, b.names, args.only)
    show(*report.write(a, b, rows, args.output, args.png, missing))
    say(compare.verdict(rows, missing), compare.coverage(rows, b, a))
    return compare.exit_code(rows, missing)


# ---------------------------------------------------------------- replay, bisect, calibrate


def add_replay(commands) -> None:
    p = add_command(
        commands,
        replay,
        "replay",
        "run each module on the inputs that a capture recorded: errors do not accumulate",
    )
    add_capture_to_run(p)
    add_module_fn(p)
    add_filter(p)
    p.add_argument(
        "--end-to-end",
        action="store_true",
        help="run the whole loop from the recorded noise and text features: errors accumulate",
    )
    add_hidden_alias(p, "--free", "--end-to-end")
    p.add_argument(
        "--inside",
        metavar="NAME",
        help="run one module (step.001/double_blocks.3) or network (step.001), and compare every "
        "tensor inside it",
    )
    add_json(p)


def add_bisect(commands) -> None:
    p = add_command(
        commands,
        bisect,
        "bisect",
        "find the first step and module that differ from a capture, in few runs",
    )
    add_capture_to_run(p)
    add_module_fn(p)


def add_calibrate(commands) -> None:
    p = add_command(
        commands,
        calibrate,
        "calibrate",
        "measure how far rounding moves each tensor, and store tolerances in the capture",
        old="budgets",
    )
    add_capture_to_run(p)
    add_filter(p)
    p.add_argument(
        "--precision",
        action="append",
        choices=("bfloat16", "float16", "float8"),
        metavar="P",
        help="bfloat16, float16 or float8 (repeatable; default: all). compare allows a run in one "
        "of them twice the error of that precision",
    )


def add_capture_to_run(p: argparse.ArgumentParser) -> None:
    p.add_argument("capture", type=Path, metavar="CAPTURE")
    add_how_to_run(p, p)


def add_how_to_run(p: argparse._ActionsContainer, parser: argparse.ArgumentParser) -> None:
    """Add the flags that repeat a capture's run. The model and the request are in the capture."""

    def accept(name: str, title: str) -> bool:
        return name in HOW_TO_RUN or (title.startswith("images") and name not in EXCLUDED)

    add_flags_of_sample(p, accept)
    parser.set_defaults(numerics=None, save_control=None)


def add_module_fn(p: argparse.ArgumentParser) -> None:
    p.add_argument(
        "--module-fn",
        metavar="MODULE:FUNCTION",
        help="a function to compare instead of the networks here: it takes the name of a module "
        "and a list of tensors, and returns a list of tensors. Its module is imported and run, "
        "also from the current folder: name only code that you trust",
    )
    add_hidden_alias(p, "--call", "--module-fn")
    add_tolerance(
        p,
        "largest relative L2 error (default: what calibrate stored for this dtype, else by dtype: "
        "1e-5 in float32)",
    )


def load_run(path: Path, args: argparse.Namespace):
    """Return the capture, its pipeline and its request."""
    from flux.parity import replay
    from flux.weights.locate import get_spec

    capture = open_capture(path, args)
    images = sample.gather_images(args, get_spec(replay.recipe_of(capture)["model"]))
    request = replay.request_of(capture, images)
    return capture, load_pipeline(capture, args), request


def open_capture(path: Path, args: argparse.Namespace):
    """Read a capture. The random model of a kit is there again until the command ends."""
    from flux.errors import UserError
    from flux.parity.capture_file import Capture
    from flux.parity.random_model import model_of_kit

    capture = Capture(path)
    folder = args.resources.enter_context(model_of_kit(capture.recipe, path.parent))
    if folder is not None:
        if args.weights:
            raise UserError("--weights: the kit of a random model has its own. Leave it out")
        args.weights = folder
    return capture


def load_pipeline(capture, args: argparse.Namespace):
    import torch

    from flux.parity import replay

    dtype = getattr(torch, args.dtype) if args.dtype else None
    files = args.transformer, args.autoencoder, args.lora, args.lora_ignore_unmatched
    return replay.load_pipeline(capture, args.weights, args.device, dtype, args.numerics, *files)


def load_module_fn(args: argparse.Namespace):
    from flux.parity.modules import guarded, named

    sys.path.append("")  # the function may be in a file of the current folder
    return guarded(named(args.module_fn)) if args.module_fn else None


def replay(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.parity import compare, replay, tolerances
    from flux.parity.modules import Modules

    if bool(args.end_to_end) + bool(args.inside) + bool(args.module_fn) > 1:
        raise UserError("--end-to-end, --inside and --module-fn exclude each other. Pass one")
    check_json(args.json)
    module_fn = load_module_fn(args)
    capture, pipe, request = load_run(args.capture, args)
    precision, tolerance = dtype_name(pipe), args.tolerance
    if args.end_to_end:
        rows, expected = replay.replay_loop(capture, pipe, request, args.only, tolerance), []
    elif args.inside:
        inside = capture, Modules(pipe), args.inside
        rows, expected = replay.replay_inside(*inside, args.only, tolerance), []
    else:
        call = module_fn or Modules(pipe)
        rows = replay.replay_modules(capture, call, args.only, tolerance)
        expected = replay.outputs_of_modules(capture)
    why = "were not computed, or not from recorded inputs"
    missing = compare.missing(rows, expected, args.only)
    text = compare.coverage(rows, capture, only=args.only, missing=why)
    show_lines(compare.table(rows, text, missing))
    if precision in tolerances.stored_rounding(capture):
        say(tolerances.format_ratio(rows, capture, precision, local=not args.end_to_end))
    return finish(rows, args, missing)


def bisect(args: argparse.Namespace) -> int:
    from flux.parity.bisect import bisect

    module_fn = load_module_fn(args)
    found = bisect(*load_run(args.capture, args), module_fn, args.tolerance)
    show_lines(str(found or "no step differs: each run of steps ends within tolerance"))
    return int(found is not None)


def calibrate(args: argparse.Namespace) -> int:
    from flux.parity import tolerances

    capture, pipe, request = load_run(args.capture, args)
    precisions = args.precision or tolerances.PRECISIONS
    measured = {
        precision: tolerances.measure_rounding(capture, pipe, request, precision, args.only)
        for precision in precisions
    }
    tolerances.store_rounding(capture.path, measured)
    show_lines(tolerances.format_table(measured))
    say(
        f"stored in {capture.path}: compare allows a run in one of these precisions "
        f"{tolerances.FACTOR} times the error of that precision"
    )
    return 0


# ---------------------------------------------------------------- golden-kit


def add_golden_kit(commands) -> None:
    p = add_command(
        commands,
        golden_kit,
        "golden-kit",
        "write a folder to test a port in any language against",
        old="kit",
    )
    add_request(p)
    group = p.add_argument_group("the kit")
    group.add_argument(
        "--random",
        choices=("flux.1", "flux.2", "flux.3", "flux.3-base"),
        help="use a tiny model of this family with random weights, which needs no files",
    )
    group.add_argument(
        "--output", type=Path, required=True, metavar="FOLDER", help="a new or empty folder"
    )
    add_filter(group, "as for capture; the block of the example is always included (repeatable)")
    group.add_argument(
        "--without-weights",
        action="store_true",
        help="leave the weights out, of a model that you have or that is too large to copy",
    )
    group.add_argument(
        "--limit",
        type=non_negative,
        default=1.0,
        metavar="GB",
        help="largest size of the kit (default: 1)",
    )


def golden_kit(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.parity.random_model import random_model

    if not args.random:
        return build_kit(args)
    if args.model or args.weights or args.transformer or args.autoencoder:
        raise UserError(
            "--random: has a model of its own. Leave out --model, --weights, --transformer and "
            "--autoencoder"
        )
    with random_model(args.random) as (args.model, args.weights):
        return build_kit(args)


def build_kit(args: argparse.Namespace) -> int:
    from flux.parity import golden_kit

    if not (args.prompts or args.prompt or args.prompt_file or args.image):
        args.prompts = [golden_kit.PROMPT]
    args.dtype = args.dtype or "float32"
    pipe, request = prepare(args)
    golden_kit.build(
        pipe,
        golden_kit.small_request(pipe.spec, request),
        args.output,
        args.only,
        not args.without_weights,
        args.limit * 1e9,
        say,
    )
    show(args.output)
    return 0


# ---------------------------------------------------------------- table


def add_table(commands) -> None:
    p = add_command(
        commands,
        table,
        "table",
        "measure each network and pipeline, tiny and random, against diffusers and transformers",
    )
    p.add_argument(
        "--write", action="store_true", help="also replace the tables in flux/parity/README.md"
    )


def table(args: argparse.Namespace) -> int:
    from flux.errors import UserError
    from flux.parity import table

    root = Path(__file__).resolve().parents[1]
    sys.path.append(str(root / "tests"))  # the rows are measured by what the tests use
    try:
        from support.parity_rows import measure, ran_on

        text = table.markdown(list(measure()), ran_on())
    except ImportError as error:
        raise UserError(
            f"table needs diffusers, transformers and the tests' packages: {error.name or error} "
            "is missing or too old. Run `pip install -e '.[test]'` in a clone of the repository"
        ) from None
    show_lines(text)
    if args.write:
        table.write(root / "flux/parity/README.md", text)
    return 0


# ---------------------------------------------------------------- main


def main() -> int:
    args = parser().parse_args()
    stopped = "stopped; nothing was written"
    with ExitStack() as args.resources:
        output = getattr(args, "output", "the output")
        return exit_code(lambda: args.run(args), FLAGS, output, stopped)


if __name__ == "__main__":
    sys.exit(main())
