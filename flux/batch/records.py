"""What is done: one append-only file of records a worker, and the proof that all lines are done.

OUT/batch.json            the manifest's SHA-256 and the settings, which a folder keeps
OUT/records/WORKER.jsonl  {"line", "file", "sha256", "seed", "seconds"}, with the "scores" of
                              filters; or {"line", "error"}; or {"line", "refused"}, by a filter
OUT/images.jsonl          all records in the order of the lines, written by `merge`
"""

import hashlib
import json
import os
import socket
import uuid
from array import array
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

from flux.atomic_files import write_atomically
from flux.batch.manifest import BLOCK, Manifest
from flux.errors import UserError
from flux.plain_files import parse_json, read_plain_file, require_plain_file

OPEN, DONE, WRONG, REFUSED = 0, 1, 2, 3  # states of a line
MAX_RECORD = 100_000  # bytes
SHOWN = 10  # lines that are left, to name


class Records:
    """The records of all workers in a folder; a worker appends to its own file.

    A last line without an end was being written when its worker was killed: that line is not done.
    """

    def __init__(self, out: Path, manifest: Manifest, settings: dict, begun: bool = False):
        """`begun`: the folder keeps its settings, whatever they are; only the manifest counts."""
        self.out, self.folder = out, out / "records"
        self.folder.mkdir(parents=True, exist_ok=True)
        keep_settings(out / "batch.json", manifest, None if begun else settings)
        self.states = bytearray(len(manifest))
        self.read_to: dict[Path, int] = {}  # bytes of each file that are read
        worker = f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self.own = self.folder / f"{worker}.jsonl"
        self.update()
        self.states = self.states.replace(bytes([WRONG]), bytes([OPEN]))  # to be tried again

    def update(self) -> None:
        """Read what all workers have added."""
        for path in sorted(self.folder.glob("*.jsonl")):
            for _, record in self._new(path):
                self._set(record)

    def _set(self, record: dict) -> None:
        if "error" not in record:
            self.states[record["line"]] = REFUSED if "refused" in record else DONE
        elif self.states[record["line"]] == OPEN:
            self.states[record["line"]] = WRONG

    def _new(self, path: Path) -> Iterator[tuple[int, dict]]:
        """Yield the new records of a file, with their positions."""
        position = self.read_to.get(path, 0)
        with require_plain_file(path).open("rb") as file:
            file.seek(position)
            while (raw := file.readline(MAX_RECORD)).endswith(b"\n"):
                if record := parse_record(raw, len(self.states)):
                    yield position, record
                position += len(raw)
                self.read_to[path] = position

    def append(self, record: dict) -> None:
        """Add a record of this worker, on the disk when this returns."""
        line = json.dumps(record).encode() + b"\n"
        descriptor = os.open(self.own, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o666)
        try:
            if os.write(descriptor, line) != len(line):
                raise OSError(28, "No space left on device", str(self.own))
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        self._set(record)

    def is_open(self, block: int) -> bool:
        """Return whether a line of the block is not done."""
        return OPEN in self.states[block * BLOCK : (block + 1) * BLOCK]

    def count(self, state: int) -> int:
        return self.states.count(state)

    def summary(self) -> "Summary":
        """Return what the records say; only `merge` looks at the images."""
        first: list[int] = []
        line = self.states.find(OPEN)
        while line >= 0 and len(first) < SHOWN:
            first.append(line)
            line = self.states.find(OPEN, line + 1)
        done, wrong, refused, left = map(self.count, (DONE, WRONG, REFUSED, OPEN))
        return Summary(done, wrong, refused, left, first)


def keep_settings(path: Path, manifest: Manifest, settings: dict | None) -> None:
    """Write the manifest's hash and the settings once. UserError if the folder has others.

    settings=None: any settings are right.
    """
    kept: dict[str, Any] = {"manifest_sha256": manifest.sha256, "lines": len(manifest)}
    kept |= {} if settings is None else {"settings": settings}
    # another worker may write the same file just now, or have been killed while it did
    with suppress(UserError), write_atomically(path, overwrite=False, wait=True) as unfinished:
        unfinished.write_text(json.dumps(kept, indent=1) + "\n")
    check_settings(path, manifest, settings)


def check_settings(path: Path, manifest: Manifest, settings: dict | None) -> None:
    """Raise UserError if a folder's batch.json is of another manifest, or of other settings."""
    content = read_plain_file(path, MAX_RECORD)
    try:
        earlier = parse_json(content)
        differs = ["manifest"] if earlier["manifest_sha256"] != manifest.sha256 else []
        before, now = earlier["settings"], settings if settings is not None else earlier["settings"]
        differs += sorted(n for n in before.keys() | now.keys() if before.get(n) != now.get(n))
    except (ValueError, TypeError, KeyError, AttributeError):
        raise UserError(f"{path}: is damaged. Choose another folder.") from None
    if differs:
        raise UserError(
            f"out: {path.parent} was begun with another {', '.join(differs)}. "
            "Choose another folder, or the same manifest and options."
        )


def parse_record(raw: bytes, lines: int) -> dict | None:
    """Return a record, or None if the line is damaged."""
    try:
        record = parse_json(raw, MAX_RECORD)
        number = record["line"]
        kinds = [name for name in ("file", "error", "refused") if name in record]
        whole = len(kinds) == 1 and isinstance(record[kinds[0]], str)
        is_sound = type(number) is int and 0 <= number < lines and whole
    except (ValueError, TypeError, KeyError, AttributeError):
        return None
    return record if is_sound else None


class Summary(NamedTuple):
    done: int
    wrong: int
    refused: int
    left: int  # lines without a record, or without their file
    first_left: list[int]  # the first of them


def merge(records: Records) -> Summary:
    """Write OUT/images.jsonl, one record a line of the manifest, in its order.

    Every image is read and compared with its hash: one that is missing or has other bytes counts as
    left. Two workers on one line leave two records, of the same bytes unless they signed: the
    record that fits the image counts.
    """
    places = array("q", [-1]) * (2 * len(records.states))  # file and position of each record
    earlier: dict[int, list[tuple[int, int]]] = {}  # places of other records of a line
    paths = sorted(records.folder.glob("*.jsonl"))
    for number, path in enumerate(paths):
        records.read_to[path] = 0
        for position, record in records._new(path):
            line = record["line"]
            if places[2 * line] < 0 or "error" not in record:
                if places[2 * line] >= 0:
                    earlier.setdefault(line, []).append((places[2 * line], places[2 * line + 1]))
                places[2 * line : 2 * line + 2] = array("q", [number, position])
    done, wrong, refused, left, first_left = 0, 0, 0, 0, []
    files = [path.open("rb") for path in paths]
    try:
        with write_atomically(records.out / "images.jsonl") as unfinished:
            with unfinished.open("wb") as merged:
                for line in range(len(records.states)):
                    last = places[2 * line], places[2 * line + 1]
                    record, raw = find_record(records, files, [last, *earlier.get(line, ())])
                    if "error" in record:
                        wrong += 1
                    elif "refused" in record:
                        refused += 1
                    elif record:
                        done += 1
                    else:
                        left += 1
                        first_left += [line] * (left <= SHOWN)
                        continue
                    merged.write(raw)
    finally:
        for file in files:
            file.close()
    return Summary(done, wrong, refused, left, first_left)


def find_record(
    records: Records, files: Sequence[BinaryIO], places: list[tuple[int, int]]
) -> tuple[dict, bytes]:
    """Return the record of a line, and its bytes: the last one, unless its image has other bytes.

    An empty record if no record fits the image, or if there is none. `places`: files and positions.
    """
    for attempt, (number, position) in enumerate(places):
        if number < 0:
            break
        files[number].seek(position)
        raw = files[number].readline(MAX_RECORD)
        record = parse_record(raw, len(records.states)) or {}
        if is_intact(records.out, record) if "file" in record else record and attempt == 0:
            return record, raw
    return {}, b""


def is_intact(out: Path, record: dict[str, Any]) -> bool:
    """Return whether the image of a record is there, with the bytes that were written."""
    try:
        with (out / record["file"]).open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest() == record.get("sha256")
    except OSError:
        return False
