"""A manifest: one request a line, as JSON. The image of a line is a function of that line alone."""

import hashlib
import json
import re
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, NamedTuple

from flux import arguments
from flux.errors import UserError
from flux.plain_files import parse_json, require_plain_file

BLOCK = 64  # lines, which one worker claims at a time
MAX_LINE = 1_000_000  # bytes


@dataclass(frozen=True)
class Request:
    """What a line asks for. None stands for the default of the command or the model."""

    prompt: str
    seed: int
    negative_prompt: str | None = None
    width: int | None = None
    height: int | None = None
    steps: int | None = None
    guidance: float | None = None
    images: tuple[Path, ...] = ()  # relative to the folder of the manifest
    id: str | None = None  # part of the file's name


class Line(NamedTuple):
    number: int  # counted from 0
    request: Request | None
    error: str  # why there is no request


class Manifest:
    """A file of requests. Its lines stay on disk; the starts of its blocks are in memory.

    UserError if the file cannot be read, is empty, or has a line of more than MAX_LINE bytes.
    """

    def __init__(self, path: Path):
        self.path = require_plain_file(path, "a file with one JSON object a line")
        self.starts, self.count, digest = array("Q"), 0, hashlib.sha256()
        with self.path.open("rb") as file:
            position = 0
            while raw := file.readline(MAX_LINE + 1):
                if len(raw) > MAX_LINE:
                    problem = f"line {self.count + 1} has more than {MAX_LINE:,} bytes"
                    raise UserError(f"manifest: {problem} in {path}. Shorten the line.")
                if self.count % BLOCK == 0:
                    self.starts.append(position)
                digest.update(raw)
                position, self.count = position + len(raw), self.count + 1
        if not self.count:
            raise UserError(f"manifest: {path} is empty (expected one JSON object a line).")
        self.sha256 = digest.hexdigest()

    def __len__(self) -> int:
        """Return the number of lines."""
        return self.count

    def block(self, number: int) -> Iterator[Line]:
        """Yield the lines of a block."""
        first = number * BLOCK
        with self.path.open("rb") as file:
            file.seek(self.starts[number])
            for line in range(first, min(first + BLOCK, self.count)):
                raw = file.readline(MAX_LINE + 1)
                try:
                    yield Line(line, self._request(raw), "")
                except (UserError, ValueError) as error:
                    yield Line(line, None, str(error))

    def _request(self, raw: bytes) -> Request:
        """Parse a line. UserError or ValueError says what is wrong."""
        try:
            values = parse_json(raw.rstrip(b"\r\n"), MAX_LINE)
        except ValueError as error:
            raise UserError(f"is not JSON ({error})") from None
        if not isinstance(values, dict):
            raise UserError("is not a JSON object")
        known = [field.name for field in fields(Request)]
        if unknown := values.keys() - set(known):
            raise UserError(f"{min(unknown)}: is unknown (expected {', '.join(known)})")
        if "prompt" not in values:
            raise UserError("prompt: is missing")
        seed = values.get("seed")
        return Request(
            prompt=arguments.to_text("prompt", values["prompt"]),
            seed=seed_of(values) if seed is None else arguments.to_integer("seed", seed),
            negative_prompt=_optional(arguments.to_text, values, "negative_prompt"),
            width=_optional(arguments.to_integer, values, "width"),
            height=_optional(arguments.to_integer, values, "height"),
            steps=_optional(arguments.to_integer, values, "steps"),
            guidance=_optional(arguments.to_number, values, "guidance"),
            images=tuple(
                self.path.parent / name
                for name in arguments.to_texts("images", values.get("images") or [])
            ),
            id=_optional(to_id, values, "id"),
        )


def _optional(convert: Any, values: dict, name: str) -> Any:
    return arguments.optional(convert, name, values.get(name))


def to_id(name: str, value: Any) -> str:
    """Return an id. UserError unless it can be part of a file's name everywhere."""
    text = arguments.to_text(name, value)
    if not re.fullmatch(r"[A-Za-z0-9_-][A-Za-z0-9._-]{0,99}", text):
        raise UserError(f"{name}: must have 1 to 100 of A-Z a-z 0-9 . _ - (got {text!r:.40}).")
    return text


def seed_of(values: dict) -> int:
    """Return the seed of a request without one: the first 32 bits of the SHA-256 of its values."""
    text = json.dumps(values, sort_keys=True, ensure_ascii=True)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:4], "big")


def file_name(line: int, request: Request) -> str:
    """Return the name of a line's image, relative to the output folder: 1,000 lines a folder."""
    id_ = f"-{request.id}" if request.id else ""
    return f"{line // 1000:06}/{line:09}{id_}.png"
