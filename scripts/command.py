"""Run one of the scripts: `flux-ref sample "a red circle"` is `python scripts/sample.py`.

`flux-ref`, `python -m flux` and this file are the same. In an installed package, this folder is
named `flux_ref`.
"""

import importlib.util
import sys
from pathlib import Path
from typing import NoReturn

FOLDER = Path(__file__).resolve().parent
sys.path[:0] = [str(FOLDER.parent), str(FOLDER)]

COMMANDS = {  # name of a script -> what the script does
    "sample": "generate images with any model, from text or from images",
    "app": "generate and edit images in a page in the browser",
    "batch": "make an image for each line of a manifest, with any number of workers",
    "train": "train a model, or a LoRA of a model, on a folder of images",
    "convert": "write a transformer file in another format or layout",
    "parity": "record runs, compare them, find the first tensor that differs",
    "bench": "measure time, memory and error on this machine",
    "verify": "say what images carry about their origin, and whether it holds",
    "certificate": "make a key and certificates of your own for `sample --sign`",
}


def main(name: str = "flux-ref") -> int:
    """Run the command that the arguments of the process name; return its exit code.

    `name`: what was typed before the command, for messages.
    """
    try:
        given = sys.argv[1] if len(sys.argv) > 1 else ""
        if given not in COMMANDS or not (FOLDER / f"{given}.py").is_file():
            refuse(name, given)
        sys.argv[:2] = [f"{name} {given}"]
        run_as_main(FOLDER / f"{given}.py")
    except KeyboardInterrupt:  # before the script has begun
        from modules.command_line import fail

        return fail("stopped; nothing was written", 130)
    return 0


def run_as_main(script: Path) -> None:
    """Run a script as Python would; its compiled code is kept between runs."""
    spec = importlib.util.spec_from_file_location("__main__", script)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    module.__spec__ = None  # as for a script: new processes of a pool find the file by its path
    sys.modules["__main__"] = module
    spec.loader.exec_module(module)


def refuse(name: str, given: str) -> NoReturn:
    """End the process: with help or the version, or with an error for anything else."""
    import argparse
    from difflib import get_close_matches

    from modules.command_line import Parser

    import flux

    found = {one: text for one, text in COMMANDS.items() if (FOLDER / f"{one}.py").is_file()}
    parser = Parser(
        prog=name,
        usage=f"{name} COMMAND ...",
        description="FLUX.1, FLUX.2 and FLUX 3 in plain PyTorch.",
        epilog="\n".join(
            [
                "commands:",
                *(f"  {one:13}{text}" for one, text in found.items()),
                f"\n`{name} COMMAND --help` lists the flags of a command.",
            ]
        ),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"flux-ref {flux.__version__}")
    if given in ("-h", "--help", "--version"):
        parser.parse_args(sys.argv[1:2])  # ends the process
    if given.startswith("-"):
        parser.error(f"a command comes first, such as `{name} sample {given}`")
    if not given:
        parser.error(f"a command is missing: {', '.join(found)}")
    near = get_close_matches(given.removesuffix(".py"), found, n=1, cutoff=0.6)
    hint = f"Did you mean {near[0]}?" if near else f"Or a prompt? Then `{name} sample` comes first."
    parser.error(f"there is no command {given!r:.80}. {hint}")


if __name__ == "__main__":
    sys.exit(main("python scripts/command.py"))
