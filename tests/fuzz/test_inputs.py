"""Damaged files: flux accepts what is sound and runs it, or says in one line what is wrong.

Each case is drawn from a seed, the kind's name and a number, so that a failure can be repeated:
`pytest -n0 tests/fuzz -k images --fuzz-seed 0 --fuzz-cases 17:18`.
"""

import re
import resource
import signal
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random

import pytest
import torch
from fuzz import inputs3  # noqa: F401  it registers kinds of its own
from fuzz.inputs import CASES, KINDS, Input
from fuzz.mutators import mutate
from fuzz.strict import Unsound

from flux.errors import NonFiniteError, UserError
from flux.runtime.terminal import printable

SECONDS = 20  # on a busy machine; each case takes some milliseconds
MEMORY = 500e6  # bytes more than before
IN_MEMORY = "/dev/shm" if Path("/dev/shm").is_dir() else None  # deleting on a disk takes longest
every_kind = pytest.mark.parametrize("kind", KINDS)


class TooSlow(BaseException):
    """Not an Exception, so that no reader takes it for a damaged file."""


@contextmanager
def limits() -> Iterator[None]:
    """Stop the block after SECONDS; let it allocate no more than MEMORY."""

    def stop(*_) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    before = signal.signal(signal.SIGALRM, stop)
    used = int(Path("/proc/self/status").read_text().partition("VmData:")[2].split()[0]) * 1024
    soft, hard = resource.getrlimit(resource.RLIMIT_DATA)
    resource.setrlimit(resource.RLIMIT_DATA, (int(used + MEMORY), hard))
    signal.alarm(SECONDS)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)
        resource.setrlimit(resource.RLIMIT_DATA, (soft, hard))


def use(case: Input, content: bytes) -> str:
    """Use an input with this content of its damaged file; return what is wrong about that."""
    with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
        path = written(case, Path(folder), content)
        try:
            with limits(), warnings.catch_warnings(action="ignore"), torch.no_grad():
                case.use(path)
        except UserError as error:
            return wrong_message(str(error), folder)
        except NonFiniteError:
            return ""
        except KeyboardInterrupt:
            raise
        except BaseException as error:  # TooSlow, or a panic in Rust
            return f"{type(error).__name__}: {error!s:.200}"
        try:
            case.check(path)
        except Unsound as error:
            return f"accepted, but {error}"
    return ""


def written(case: Input, folder: Path, content: bytes) -> Path:
    """Write the files of an input; return the path of the damaged one."""
    for name, data in (case.files | {case.damaged: content}).items():
        (folder / name).write_bytes(data)
    return folder / case.damaged


def wrong_message(text: str, folder: str) -> str:
    """Return what is wrong with an error's text, which names a file or an argument.

    Scripts print it through `printable`: whatever a file brings in stays in one line.
    """
    if len(printable(text)) > 2000:
        return f"no short text: {text!r:.200}"
    if folder not in text and not re.match(r"`?\w+`?: ", text):
        return f"names no file: {text}"
    return ""


def problems(kind: str, seed: int, numbers: range) -> list[str]:
    """Return what goes wrong in the cases of these numbers."""
    found = []
    inputs = KINDS[kind]()
    for number in numbers:
        random, case = Random(f"{seed} {kind} {number}"), inputs[number % len(inputs)]
        done, content = mutate(random, case.files[case.damaged], case.mutators)
        if problem := use(case, content):
            found.append(f"{kind} {number} of seed {seed}: {done}: {problem}")
    return found


@every_kind
def test_undamaged_files_are_used(kind):
    for case in KINDS[kind]():
        with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
            path = written(case, Path(folder), case.files[case.damaged])
            with warnings.catch_warnings(action="ignore"), torch.no_grad():
                case.use(path)
            case.check(path)


DEEP = (b"[" * 200_000, b'{"a":' * 100_000, b"[" * 100_000 + b"]" * 100_000)
WITH_JSON = ("index_files", "tokenizer_files", "adapter_configs", "training_folders", "box_files")


@pytest.mark.parametrize("kind", WITH_JSON)
def test_deep_json_is_refused_in_one_line(kind):
    """Python's parser raises RecursionError, which no reader lets out."""
    cases = [case for case in KINDS[kind]() if case.damaged.endswith((".json", ".jsonl"))]
    assert cases
    for case in cases:
        for text in DEEP:
            with tempfile.TemporaryDirectory(dir=IN_MEMORY) as folder:
                path = written(case, Path(folder), text)
                with pytest.raises(UserError) as refused, limits():
                    case.use(path)
                assert wrong_message(str(refused.value), folder) == ""


@every_kind
def test_damaged_files_are_sound_or_refused_in_one_line(kind, request):
    seed, numbers = request.config.getoption("fuzz_seed"), request.config.getoption("fuzz_cases")
    assert problems(kind, seed, numbers or range(CASES[kind])) == []


@pytest.mark.slow
@every_kind
def test_more_damaged_files_are_sound_or_refused_in_one_line(kind, request):
    seed, fast = request.config.getoption("fuzz_seed"), CASES[kind]
    assert problems(kind, seed, range(fast, 3 * fast)) == []
