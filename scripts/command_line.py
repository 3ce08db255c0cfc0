"""What the scripts share: flags for argument names, aliases of renamed flags, messages, exit codes.

The library speaks of its own arguments. An error starts with the argument's name and a colon. Any
other argument stands in backticks: "width: must be a multiple of 16 (got 100). Or leave `height`
out." A script passes such a message through `with_flags` before it prints the message.
"""

import argparse
import os
import re
import sys
import warnings
from collections.abc import Callable, Mapping

CONTROL = re.compile("[\0-\x08\x0b-\x1f\x7f-\x9f]")  # what would steer a terminal
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


def with_flags(message: str, flags: Mapping[str, str]) -> str:
    """Replace the library's argument names in `message` by a script's flags.

    `flags` maps an argument ("width") or an argument with its value ("composite=False") to a flag.
    An argument that is not in `flags` keeps its name.
    """

    def flag(match: re.Match) -> str:
        name, value = match["name"], match["value"]
        if value is None:
            return flags.get(name, match[0])
        if f"{name}={value}" in flags:
            return flags[f"{name}={value}"]
        bare = value.strip("\"'")
        return f"{flags[name]} {bare}" if name in flags else match[0]

    message = re.sub(r"`(?P<name>\w+)(?:=(?P<value>[^`]+))?`", flag, message)
    return re.sub(r"^(?P<name>\w+)(?:=(?P<value>[^\s:]+))?(?=:)", flag, message)


def add_hidden_alias(parser: argparse._ActionsContainer, old: str, new: str) -> None:
    """Let `parser` accept the old name of the flag `new`, without a line in its help."""
    action = parser._option_string_actions[new]
    parser._option_string_actions[old] = action


def say(text: str) -> None:
    """Print to standard error, if there is one, without control characters.

    Parts of a message may come from files of unknown origin.
    """
    if sys.stderr is not None:
        print(CONTROL.sub("", text), file=sys.stderr, flush=True)


def fail(text: str, code: int = 1) -> int:
    """Print an error in one line and return the exit code."""
    say(f"error: {text}")
    return code


def show_warnings_once(flags: Mapping[str, str]) -> None:
    """Print warnings as notes, each once: a check that runs twice warns twice."""
    shown: set[str] = set()

    def note(message, *_, **__) -> None:
        text = with_flags(str(message), flags)
        if text not in shown:
            shown.add(text)
            say(f"note: {text}")

    warnings.showwarning = note


def close_stdout() -> None:
    """Point standard output to nowhere, so that Python's own last flush does not fail."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def exit_code(
    command: Callable[[], int], flags: Mapping[str, str], output: object, stopped: str
) -> int:
    """Run a command; print a failure in one line, and return the exit code.

    2: a mistake of the user; 1: a failure; 130: Ctrl-C. A bug of ours keeps its traceback.
    `output` is the file to name if the system does not say which one failed.
    """
    from flux.errors import NonFiniteError, UserError

    try:
        return command()
    except UserError as error:
        return fail(with_flags(str(error), flags), 2)
    except NonFiniteError as error:
        return fail(with_flags(str(error), flags))
    except ModuleNotFoundError as error:
        install = "Run `pip install -e .` in the repository."
        return fail(f"the package {error.name!r} is missing. {install}")
    except BrokenPipeError:  # the reader of `script | head` has seen enough
        close_stdout()
        return 1
    except OSError as error:  # the disk is full, for example
        return fail(f"{error.filename or output}: {error.strerror or error}")
    except KeyboardInterrupt:
        return fail(stopped, 130)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if isinstance(error, RuntimeError) and not any(part in text for part in OUT_OF_MEMORY):
            raise
        return fail(
            "out of memory. Make the image smaller, or use a smaller model (weights.md lists what "
            "each model needs)."
        )
