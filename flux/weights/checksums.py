"""SHA-256 of weight files: where a file's hash is known from, and whether the file has it.

A hash is known from the Hugging Face cache, from what `hf download --local-dir` leaves beside a
file, or from the table of published hashes, by the file's name.
"""

import hashlib
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

from flux.errors import UserError
from flux.plain_files import read_plain_file

DIGEST = re.compile("[0-9a-f]{40}|[0-9a-f]{64}")  # git's of small files; SHA-256 of large ones
DOWNLOADS = ".cache/huggingface/download"  # in a folder that files were downloaded to
MAX_METADATA = 10_000  # bytes


class Published(NamedTuple):
    """Checksum and size of a released file."""

    sha256: str  # from the documentation in Black Forest Labs' repository `flux`
    size: int | None  # bytes, from Hugging Face's file lists, second-hand; None: not known


# The documentation repeats FLUX.1-dev's checksum for FLUX.1-Krea-dev, whose weights differ. This
# must be a slip, so Krea is not listed.
PUBLISHED = {
    "flux1-schnell.safetensors": Published(
        "9403429e0052277ac2a87ad800adece5481eecefd9ed334e1f348723621d2a0a", 23_782_506_688
    ),
    "flux1-dev.safetensors": Published(
        "4610115bb0c89560703c892c59ac2742fa821e60ef5871b33493ba544683abd7", 23_802_932_552
    ),
    "flux1-fill-dev.safetensors": Published(
        "03e289f530df51d014f48e675a9ffa2141bc003259bf5f25d75b957e920a41ca", 23_804_922_408
    ),
    "flux1-canny-dev.safetensors": Published(
        "996876670169591cb412b937fbd46ea14cbed6933aef17c48a2dcd9685c98cdb", 23_803_351_736
    ),
    "flux1-depth-dev.safetensors": Published(
        "41360d1662f44ca45bc1b665fe6387e91802f53911001630d970a4f8be8dac21", None
    ),
    "flux1-canny-dev-lora.safetensors": Published(
        "8eaa21b9c43d5e7242844deb64b8cf22ae9010f813f955ca8c05f240b8a98f7e", 1_244_443_944
    ),
    "flux1-depth-dev-lora.safetensors": Published(
        "1938b38ea0fdd98080fa3e48beb2bedfbc7ad102d8b65e6614de704a46d8b907", 1_244_440_512
    ),
    "flux1-redux-dev.safetensors": Published(
        "a1b3bdcb4bdc58ce04874b9ca776d61fc3e914bb6beab41efb63e4e2694dca45", 129_063_232
    ),
    "flux1-kontext-dev.safetensors": Published(
        "843a26dc765d3105dba081c30bce7b14c65b0988f9e8d14e9fbc8856a6deebd5", 23_802_947_360
    ),
}


def stated_hash(path: Path) -> str | None:
    """Return the hash that Hugging Face states of a file that came from there; else None."""
    blob = path.resolve()
    if blob.parent.name == "blobs" and DIGEST.fullmatch(blob.name):
        return blob.name
    for folder in list(path.absolute().parents)[:4]:
        name = path.absolute().relative_to(folder).as_posix()
        note = folder / DOWNLOADS / f"{name}.metadata"
        if not note.is_file():
            continue
        lines = read_plain_file(note, MAX_METADATA).decode(errors="replace").split()
        if len(lines) > 1 and DIGEST.fullmatch(lines[1]):  # commit, hash, time
            return lines[1]
    return None


def has_hash(path: Path, digest: str) -> bool:
    """Return whether a file has this SHA-256 or, of 40 digits, this hash of git."""
    try:
        git = hashlib.sha1(b"blob %d\0" % path.stat().st_size, usedforsecurity=False)
        with path.open("rb") as file:
            found = hashlib.file_digest(file, "sha256" if len(digest) == 64 else lambda: git)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    return found.hexdigest() == digest


def check_hashes(files: Iterable[Path]) -> None:
    """Compare files with their known hashes; a warning says which were compared.

    UserError if a file has not the hash that Hugging Face states. A file that merely has the name
    of a published one may be another: a warning says that its hash is not the published one.
    """
    equal, unknown = [], []
    for path in files:
        stated, published = stated_hash(path), PUBLISHED.get(path.name)
        if stated and not has_hash(path, stated):
            raise UserError(
                f"{path} has not the hash that Hugging Face states; delete {path.resolve()} and "
                "download it again."
            )
        if published and not stated and not has_hash(path, published.sha256):
            warnings.warn(
                f"{path} has the name of a published file, and not its SHA-256: it is another "
                f"file, or damaged (published: {published.sha256})",
                stacklevel=3,
            )
        elif stated or published:
            equal.append(path.name)
        else:
            unknown.append(path.name)
    told = [f"as published: {', '.join(equal)}"] if equal else []
    told += [f"of unknown hash: {', '.join(unknown)}"] if unknown else []
    if told:
        warnings.warn(f"checked the weights; {'; '.join(told)}", stacklevel=3)
