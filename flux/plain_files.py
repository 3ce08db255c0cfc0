"""Files that a user names: plain files only, of a bounded size, and their JSON.

Reading a pipe may wait for its writer, and a device such as /dev/zero never ends.
"""

import json
import re
from pathlib import Path
from typing import Any

from flux.errors import UserError

PIECE = 2**20  # bytes
MAX_JSON = 4_000_000  # bytes; parsed, a hostile text can be thirty times as large


def require_plain_file(path: Path, kind: str = "a file") -> Path:
    """Return `path`, unopened. UserError unless a plain file, or a link to one, is there.

    `kind`: what the user should name, for the message.
    """
    path = Path(path)
    try:
        if path.is_file():
            return path
        path.stat()  # `is_file` hides why there is none
    except (FileNotFoundError, NotADirectoryError):
        raise UserError(f"{path}: does not exist. Name {kind}.") from None
    except (OSError, ValueError) as error:  # ValueError: NUL in the name
        raise UserError(f"{path}: cannot be read ({_reason(error)}). Name {kind}.") from None
    problem = "a folder" if path.is_dir() else "a pipe or a device"
    raise UserError(f"{path}: is {problem}, not a plain file. Name {kind}.")


def read_plain_file(path: Path, limit: int, kind: str = "a file") -> bytes:
    """Return a plain file's bytes. UserError for other files, and for more than `limit` bytes."""
    path, content = require_plain_file(path, kind), bytearray()
    try:
        with path.open("rb") as file:
            # in pieces: read(n) sets n bytes aside first
            while len(content) <= limit and (piece := file.read(PIECE)):
                content += piece
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({_reason(error)}). Name {kind}.") from None
    if len(content) > limit:
        raise UserError(f"{path}: is larger than {limit:,} bytes. Name {kind}.")
    return bytes(content)


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


def parse_json(text: str | bytes, limit: int = MAX_JSON) -> Any:
    """Parse UTF-8 JSON. ValueError if damaged, too long or deep, or with a name twice.

    NaN, infinity and one half of a surrogate pair are damage: JSON and UTF-8 have none of them.
    """
    if len(text) > limit:
        raise ValueError(f"has more than {limit:,} bytes")
    try:
        text = text if isinstance(text, str) else text.decode()
        value = _decoder.decode(text)
        if re.search(r"\\u[dD][89a-fA-F]", text):
            json.dumps(value, ensure_ascii=False).encode()
        return value
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("has one half of a surrogate pair") from None


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for name, value in pairs:
        if name in members:
            raise ValueError(f"has the name {name!r:.120} twice")
        members[name] = value
    return members


def _refuse(constant: str) -> None:
    raise ValueError(f"has {constant}, which is no number of JSON")


_decoder = json.JSONDecoder(object_pairs_hook=_unique, parse_constant=_refuse)
