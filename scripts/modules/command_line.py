"""What the scripts share: flags for argument names, aliases of renamed flags, messages, exit codes.

The library speaks of its own arguments. An error starts with the argument's name and a colon. Any
other argument stands in backticks: "width: must be a multiple of 16 (got 100). Or leave `height`
out." A script passes such a message through `with_flags` before it prints the message.
"""

import argparse
import errno
import os
import re
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from difflib import get_close_matches
from typing import NoReturn, TextIO

import flux

if "MODELS" not in getattr(flux, "__all__", ()):  # BFL's package, or the other one of the index
    sys.exit(
        f"error: `import flux` finds another package (in {[*flux.__path__][0]}). Run `pip "
        "uninstall flux`, then install flux-ref again."
    )

from flux.errors import install_command
from flux.runtime.terminal import printable

quiet = False  # set by `set_quiet`
# Where `say` goes, if not to standard error: to a page in a browser.
HEARD: ContextVar[Callable[[str], object] | None] = ContextVar("HEARD", default=None)
OUT_OF_MEMORY = ("out of memory", "can't allocate memory")


class Speaker:
    """Whether this process prints, and says why it fails: always, if it works alone."""

    quiet = False

    def claim_failure(self, lost: bool = False) -> str | None:
        """Return what stands before the error of this process; None: another one has said why.

        lost: this process failed because another one has gone.
        """
        return ""

    def failure_said(self) -> None:
        """The error has been printed."""

    def is_lost(self, error: Exception) -> bool:
        """Return whether an error says that another process has gone."""
        return False


speaker = Speaker()


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
    message = re.sub(r"^(?P<name>\w+)(?:=(?P<value>[^\s:]+))?(?=:)", flag, message)
    return re.sub(r"`[^`]*`", lambda quoted: as_typed(quoted[0]), message)


def as_typed(text: str) -> str:
    """Replace "python scripts/sample.py" and "sample.py" by the command that was typed.

    That is "flux-ref sample" or "python -m flux sample", if the script was run by it.
    """
    typed = re.fullmatch(r"(flux-ref|python -m flux) \w+", sys.argv[0])
    if not typed:
        return text
    text = re.sub(r"(torchrun [-\w ]*)scripts/(\w+)\.py", r"\1-m flux \2", text)
    names = "sample|app|batch|train|convert|parity|bench|verify|certificate"
    return re.sub(rf"(?:python )?(?:scripts/)?\b({names})\.py\b", rf"{typed[1]} \1", text)


def add_hidden_alias(parser: argparse._ActionsContainer, old: str, new: str) -> None:
    """Let `parser` accept the old name of the flag `new`, without a line in its help."""
    action = parser._option_string_actions[new]
    parser._option_string_actions[old] = action


def plain_words(message: str) -> str:
    """Return an error of argparse as the library would say it, with the flag first."""
    message = re.sub(r"^argument (?=-|[A-Z])(?:-\w/)?", "", message)
    message = re.sub(r"invalid int value: (.*)", r"must be a whole number (got \1).", message)
    message = re.sub(r"invalid float value: (.*)", r"must be a number (got \1).", message)
    message = re.sub(
        r"invalid choice: (.*) \(choose from (.*)\)",
        lambda m: f"is unknown (got {m[1]}, expected one of {m[2].replace(chr(39), '')}).",
        message,
    )
    return message.replace("expected one argument", "needs a value")


class Once(argparse.Action):
    """A flag that is refused if it is given twice, where one would look for both."""

    def __call__(self, parser, namespace, values, option_string=None) -> None:
        if getattr(namespace, self.dest) is not None:
            parser.error(f"argument {option_string}: is given twice. Join both into one file.")
        setattr(namespace, self.dest, values)


class Parser(argparse.ArgumentParser):
    """An argument parser that tells what is wrong in one line, and reports a full standard output.

    A flag may be typed with underscores. For an unknown flag, the likeliest known one is named.
    """

    others: Mapping[str, str] = {}  # flags of other programs -> what to use here

    def parse_args(self, args=None, namespace=None):  # type: ignore[override]
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            self.error(self._explain(unknown, found))
        return found

    def parse_known_args(self, args=None, namespace=None):  # type: ignore[override]
        given = list(sys.argv[1:] if args is None else args)
        end = given.index("--") if "--" in given else len(given)
        given[:end] = map(self._with_dashes, given[:end])
        return super().parse_known_args(given, namespace)

    def _with_dashes(self, argument: str) -> str:
        name, equals, value = argument.partition("=")
        dashed = name.replace("_", "-")
        return f"{dashed}{equals}{value}" if dashed in self._option_string_actions else argument

    def _explain(self, unknown: Sequence[str], found: argparse.Namespace) -> str:
        """Return what is wrong with arguments that this parser does not know."""
        flags = [given.partition("=")[0] for given in unknown if given.startswith("-")]
        if not flags:
            return f"{unknown[0]!r:.80} is one argument too many"
        name = flags[0].replace("_", "-")
        bare = {flag.lstrip("-"): flag for flag in self._flags(found)}
        near = get_close_matches(name.lstrip("-"), bare, n=1, cutoff=0.75)
        longer = [flag for flag in bare.values() if len(name) > 3 and flag.startswith(name)]
        fix = self.others.get(name, (longer + [bare[one] for one in near] + [""])[0])
        return f"{flags[0]}: there is no such flag" + (f". Did you mean {fix}?" if fix else "")

    def _flags(self, found: argparse.Namespace) -> Iterator[str]:
        """Yield the flags of this parser and of the chosen command, without hidden aliases."""
        for action in self._actions:
            yield from action.option_strings
            if isinstance(action, argparse._SubParsersAction):
                yield from action.choices[getattr(found, action.dest)]._flags(found)

    def error(self, message: str) -> NoReturn:
        message = plain_words(message)
        if not message.endswith("."):
            message += f"{'' if message[-1] == '?' else '.'} `{self.prog} --help` lists the flags."
        sys.exit(fail(message, 2))

    def format_help(self) -> str:
        return as_typed(super().format_help())

    def _print_message(self, message: str, file: TextIO | None = None) -> None:
        file = sys.stderr if file is None else file
        if speaker.quiet:
            return
        try:
            if message and file is not None:
                file.write(message)
                file.flush()
        except OSError as error:  # argparse would ignore a full disk
            _discard(file)
            sys.exit(fail(f"standard output: {error.strerror}") if file is sys.stdout else 2)


def show(*lines: object) -> None:
    """Print lines to standard output, if there is one. All printing of the scripts goes this way.

    What is foreign in a line is shown escaped, newlines too: each argument is one line. Raise
    OSError that names standard output if the lines cannot be written.
    """
    if speaker.quiet:
        return
    try:
        _write(sys.stdout, lines)
    except OSError as error:
        _discard(sys.stdout)  # else Python's own last flush would fail too
        error.filename = "standard output"
        raise


def add_quiet(group: argparse._ActionsContainer) -> None:
    group.add_argument(
        "--quiet", action="store_true", help="print nothing but results and errors: no progress"
    )


def set_quiet(value: bool) -> None:
    """Let `say` print nothing, for --quiet; errors are still printed."""
    global quiet
    quiet = value


def say(*lines: object) -> None:
    """Print lines to standard error, if there is one, as `show` does; unless --quiet."""
    if not (quiet or speaker.quiet):
        _tell(lines)


def _tell(lines: tuple[object, ...]) -> None:
    if (hear := HEARD.get()) is not None:
        for line in lines:
            hear(printable(line))
        return
    try:
        _write(sys.stderr, lines)
    except OSError:  # nobody can be told
        _discard(sys.stderr)


def _write(file: TextIO | None, lines: tuple[object, ...]) -> None:
    if file is None:
        return
    text = "".join(f"{printable(line)}\n" for line in lines)
    encoding = file.encoding or "utf-8"
    file.write(text.encode(encoding, "backslashreplace").decode(encoding))
    file.flush()


def _discard(file: TextIO) -> None:
    """Let all further output to `file` disappear."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), file.fileno())


def fail(text: str, code: int = 1, lost: bool = False) -> int:
    """Print an error in one line and return the exit code. `lost`: see `Speaker`."""
    whose = speaker.claim_failure(lost)
    if whose is not None:
        _tell((f"error: {whose}{text}",))
        speaker.failure_said()
    return code


@contextmanager
def imports(name: str, parser: Callable[[], argparse.ArgumentParser]) -> Iterator[None]:
    """Import the slow packages of a script in this block, after a look at the arguments.

    `name`: the script's `__name__`. If the script is run, `--help` and wrong arguments end it
    before the imports; a missing package and Ctrl-C end it with one sentence.
    """
    if name != "__main__":
        yield
        return
    parser().parse_args()
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(fail(missing_package(error)))
    except KeyboardInterrupt:
        sys.exit(fail("stopped; nothing was written", 130))


def missing_package(error: ModuleNotFoundError) -> str:
    return f"the package {error.name!r} is missing. Run `{install_command()}`."


def show_warnings_once(flags: Mapping[str, str]) -> None:
    """Print warnings as notes, each once: a check that runs twice warns twice."""
    shown: set[str] = set()

    def note(message, *_, **__) -> None:
        text = with_flags(str(message), flags)
        if text not in shown:
            shown.add(text)
            say(f"note: {text}")

    warnings.showwarning = note


def show_traceback(*error) -> None:
    """Print the traceback of a bug: the error may quote foreign text."""
    if speaker.claim_failure() is not None:
        _tell(tuple("".join(traceback.format_exception(*error)).rstrip("\n").split("\n")))
        speaker.failure_said()


def exit_code(
    command: Callable[[], int], flags: Mapping[str, str], output: object, stopped: str
) -> int:
    """Run a command; print a failure in one line, and return the exit code.

    2: a mistake of the user; 1: a failure; 130: Ctrl-C. A bug of ours keeps its traceback.
    Warnings become notes.
    `output` is the file to name if the system does not say which one failed.
    """
    from modules.progress_lines import ProgressLines

    from flux.atomic_files import remove_empty_folders
    from flux.errors import NonFiniteError, UserError
    from flux.progress import listen

    show_warnings_once(flags)
    sys.excepthook = show_traceback
    try:
        with listen(ProgressLines(say)):
            return command()
    except UserError as error:
        return fail(with_flags(str(error), flags), 2)
    except NonFiniteError as error:
        return fail(with_flags(str(error), flags))
    except ModuleNotFoundError as error:
        return fail(missing_package(error))
    except BrokenPipeError:  # the reader of `script | head` has seen enough
        return 1
    except OSError as error:  # the disk is full, for example
        code = 2 if error.errno == errno.ENAMETOOLONG else 1
        return fail(f"{error.filename or output}: {error.strerror or error}", code)
    except KeyboardInterrupt:
        return fail(stopped, 130)
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        if speaker.is_lost(error):
            return fail("another process has ended; torchrun says which, and how.", lost=True)
        if isinstance(error, RuntimeError) and not any(part in text for part in OUT_OF_MEMORY):
            raise
        return fail(
            "out of memory. Make the image smaller, or use a smaller model (weights.md lists what "
            "each model needs)."
        )
    finally:
        remove_empty_folders()
