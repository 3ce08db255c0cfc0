"""What was found out of a file: lines to show, and what all kinds of files have in common."""

import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from flux.errors import UserError
from flux.weights.files import shard_files
from flux.weights.load import read_headers

MAX_LISTED = 100  # files of a folder, and values of metadata
MAX_VALUE = 200  # characters of a value


@dataclass
class Inspection:
    """What was found out, in the order in which to show it."""

    lines: list[tuple[str, str]] = field(default_factory=list)  # (what it is about, text)
    refusal: str = ""

    def add(self, about: str, text: object) -> None:
        self.lines.append((about, str(text)))


Describe = Callable[[Path, Inspection], None]


@contextmanager
def notes_and_refusals(found: Inspection) -> Iterator[None]:
    """Add the warnings of the block as notes, and a UserError as what would be refused."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            yield
        except UserError as error:
            found.add("refused", error)
    for warning in dict.fromkeys(str(warning.message) for warning in caught):
        found.add("note", warning)


def inspect_plain(path: Path, found: Inspection) -> None:
    """Describe the tensors and the metadata."""
    files = shard_files(path)
    infos, metadata = read_headers(files)
    dtypes = Counter(info.dtype for info in infos.values())
    listed = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.most_common())
    container = "GGUF" if any(name.startswith("general.") for name in metadata) else "safetensors"
    shards = f" in {len(files)} files" if len(files) > 1 else ""
    found.add("format", f"{container}{shards}, {len(infos)} tensors ({listed})")
    for name, value in list(metadata.items())[:MAX_LISTED]:
        found.add("metadata", f"{name!s:.{MAX_VALUE}} = {short(value)}")


def short(value: object) -> str:
    text = " ".join(str(value).split())
    return text if len(text) <= MAX_VALUE else f"{text[:MAX_VALUE]}... ({len(text):,} characters)"
