"""Find weight files, and read from their headers what tensors they hold, before anything is loaded.

`read_header` checks every claim of a safetensors header against the others and the file's size.
`find_file` looks in the folder `weights`, in the Hugging Face cache, and then downloads.
Nothing is ever unpickled.
"""

import errno
import os
import re
import socket
import sys
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from math import prod
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple
from urllib.parse import urlsplit
from urllib.request import getproxies

from flux import progress
from flux.errors import UserError
from flux.plain_files import MAX_JSON, PIECE, parse_json, read_plain_file, require_plain_file
from flux.weights.checksums import has_hash, stated_hash

# ---------------------------------------------------------------- headers

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
MAX_TENSORS = 200_000  # the released models have some 2,000, captures many more
MAX_DIMENSIONS = 16  # torch takes 64 at most, and many of its kernels fewer
FLOATS = ("F64", "F32", "F16", "BF16")
# fmt: off
BITS = {  # of one number, by dtype
    "F64": 64, "I64": 64, "U64": 64, "C64": 64,
    "F32": 32, "I32": 32, "U32": 32,
    "F16": 16, "BF16": 16, "I16": 16, "U16": 16,
    "BOOL": 8, "I8": 8, "U8": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8,
    "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4,
}
# fmt: on
NOT_SAFETENSORS = (  # the first bytes of another kind of file, and what that file is
    (
        rb"\s*<",
        "a web page, which sites send in place of a file that needs a login or an accepted licence",
    ),
    (
        rb"version https://git-lfs",
        "a git-lfs pointer; fetch the file that it stands for with `git lfs pull`",
    ),
    (
        rb"PK\x03\x04|\x80[\x02-\x05]",
        "a zip or a pickle (.pt, .ckpt), which could run code; get it as safetensors",
    ),
    (
        rb"GGUF",
        "a GGUF file, which works for transformers and text encoders only; get it as safetensors",
    ),
    (rb"\s*\{", "a JSON text, not weights"),
    (
        rb"Invalid username|Entry not found|Access to |Repository not found",
        "an error message of Hugging Face, saved in place of the file",
    ),
    (rb"\x1f\x8b", "a gzip file; unpack it"),
    (
        rb"\x00\x05\x16[\x00\x07]",
        "a companion that macOS writes, without weights; name the file without ._ in its name",
    ),
)


class TensorInfo(NamedTuple):
    """One tensor of a file. `dtype` is safetensors' ("BF16", "F8_E4M3") or GGUF's name ("Q4_K")."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    name: str  # in the file
    begin: int = 0  # of the tensor's bytes in the file
    rows: tuple["Rows", ...] = ()  # if not empty, the tensor is joined of these


class Rows(NamedTuple):
    """Some rows of a tensor in a file."""

    info: TensorInfo
    start: int
    stop: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Return a safetensors file's tensors by name, and its metadata, without loading weights.

    The file holds the header's length (8 bytes, little-endian), the header in JSON, and the bytes
    of the tensors: https://github.com/huggingface/safetensors#format.
    UserError if the file is anything else, if its header contradicts itself or the file's size, or
    for more than `MAX_HEADER` bytes, `MAX_TENSORS` tensors or `MAX_DIMENSIONS` dimensions.
    """
    path = require_plain_file(path, "a safetensors file")
    text, data_size = _header_text(path)
    try:
        infos, spans, metadata = _parse_header(text, path)
    except ValueError as error:
        raise UserError(
            f"{path} has a damaged header: {error!s:.300}; download it again."
        ) from error

    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            problem = "overlaps another" if begin < position else "leaves a hole before it"
            raise UserError(
                f"{path} has a damaged header: tensor {name!r:.120} {problem}; download it again."
            )
        position = end
    start = 8 + len(text)
    if position != data_size:
        problem = "is truncated" if position > data_size else "goes on after its end"
        sizes = f"{start + position:,} bytes expected, {start + data_size:,} found"
        raise UserError(f"{path} {problem}: {sizes}; download it again.")
    infos = {name: info._replace(begin=start + spans[name][0]) for name, info in infos.items()}
    return infos, metadata


def _header_text(path: Path) -> tuple[bytes, int]:
    """Return the JSON text of the header, and the number of bytes after it."""
    try:
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(length) if length <= min(MAX_HEADER, size) else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if size == 0:
        raise UserError(f"{path} is empty; download it again.")
    # Only a file without "{" here is another kind of file: the 8 bytes of a true length may look
    # like the start of any format. A length of 640 looks like a pickle.
    if start[8:9] != b"{":
        kind = "unknown, or damaged; get it again"
        for pattern, description in NOT_SAFETENSORS:
            if re.match(pattern, start):
                kind = description
                break
        raise UserError(f"{path} is not a safetensors file: it is {kind}.")
    if length > MAX_HEADER:
        raise UserError(
            f"{path} is not a safetensors file: its header would be {length:,} bytes long."
        )
    if length > size - 8:
        sizes = f"at least {8 + length:,} bytes expected, {size:,} found"
        raise UserError(f"{path} is truncated: {sizes}; download it again.")
    return text, size - 8 - length


# The parts of a header's JSON. It is parsed entry by entry, because parsing 100 MB of empty lists
# at once would take gigabytes. The repetitions are possessive ("*+"): they never backtrack.
SPACE = rb"[ \t\r\n]*+"
OPENING = re.compile(SPACE + rb"\{" + SPACE + rb"(\})?+")
NAME = re.compile(SPACE + rb'("(?:[^"\\]|\\.){,10000}+")' + SPACE + b":" + SPACE, re.DOTALL)
TENSOR = re.compile(rb"\{[^{}\\]{,1000}+\}")  # no writer escapes the names of the fields
PLAIN_TEXT = re.compile(rb'"[^"\\\x00-\x1f]*+"')
TEXT = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"', re.DOTALL)
NEXT = re.compile(SPACE + rb"(?:,|(\}))")
END = re.compile(SPACE + rb"\Z")


def _parse_header(
    text: bytes, path: Path
) -> tuple[dict[str, TensorInfo], dict[str, tuple[int, int]], dict[str, str]]:
    """Return the tensors, where the bytes of each begin and end, and the metadata.

    ValueError if the header is damaged.
    """

    def member(name: str, position: int) -> tuple[Any, int]:
        if name == "__metadata__":
            if text.startswith(b"null", position):
                return {}, position + 4
            return _parse_object(text, position, metadata_value)
        if found := TENSOR.match(text, position):
            return _parse_tensor(path, name, found[0]), found.end()
        raise _not_understood(name, text[position : position + 80])

    def metadata_value(name: str, position: int) -> tuple[str, int]:
        view = memoryview(text)  # a text may have 100 MB: no copy of its bytes is made
        if found := PLAIN_TEXT.match(text, position):
            return str(view[position + 1 : found.end() - 1], "utf-8"), found.end()
        if found := TEXT.match(text, position):
            return _unescaped(view[position + 1 : found.end() - 1]), found.end()
        raise ValueError(f"metadata that is not text, {name!r:.120}")

    if text.count(b'"data_offsets"') > MAX_TENSORS:  # at once, before any is parsed
        raise ValueError(f"more than {MAX_TENSORS:,} tensors")
    members, end = _parse_object(text, 0, member)
    _match(END, text, end)
    metadata = members.pop("__metadata__", {})
    infos = {name: info for name, (info, _) in members.items()}
    spans = {name: span for name, (_, span) in members.items()}
    return infos, spans, metadata


def _parse_object(
    text: bytes, position: int, parse_value: Callable[[str, int], tuple[Any, int]]
) -> tuple[dict[str, Any], int]:
    """Return the members of the JSON object at `position`, and where the object ends."""
    members: dict[str, Any] = {}
    opening = _match(OPENING, text, position)
    position, closed = opening.end(), opening[1]
    while not closed:
        found = _match(NAME, text, position)
        name = parse_json(found[1])
        if name in members:
            raise ValueError(f"{name!r:.120} stands in it twice")
        if len(members) > MAX_TENSORS:
            raise ValueError(f"more than {MAX_TENSORS:,} names")
        members[name], position = parse_value(name, found.end())
        separator = _match(NEXT, text, position)
        position, closed = separator.end(), separator[1]
    return members, position


def _unescaped(text: memoryview) -> str:
    """Parse what stands between the quotes of a JSON text, piece by piece to save memory."""
    pieces, start = [], 0
    while start < len(text):
        end = start + PIECE
        if end < len(text):  # cut before an escape, if one is near, else between two characters
            near = bytes(text[end - 12 : end])
            escapes = [end - 12 + i for i in reversed(range(12)) if near[i] == ord("\\")]
            ends = [*escapes, *range(end, end - 4, -1)]
        else:
            ends = [len(text)]
        for end in ends:
            with suppress(ValueError):  # half an escape, character or surrogate pair
                pieces.append(parse_json(b'"%b"' % bytes(text[start:end])))
                break
        else:
            raise ValueError("a text that is not JSON")
        start = end
    return "".join(pieces)


def _match(pattern: re.Pattern[bytes], text: bytes, position: int) -> re.Match[bytes]:
    if found := pattern.match(text, position):
        return found
    raise ValueError(f"it is not understood from byte {position:,} on")


def _parse_tensor(path: Path, name: str, text: bytes) -> tuple[TensorInfo, tuple[int, int]]:
    """Return a tensor's description, and where its bytes begin and end after the header."""
    try:
        entry = parse_json(text)
        bits, shape, (begin, end) = BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and 0 <= number < 2**63 for number in (*shape, begin, end)):
            raise ValueError
        if len(shape) > MAX_DIMENSIONS:
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        raise _not_understood(name, text) from error
    if (end - begin) * 8 != prod(shape) * bits:
        raise ValueError(
            f"{end - begin:,} bytes for tensor {name!r:.120}, {entry['dtype']} of shape "
            f"{shape!s:.120}"
        )
    return TensorInfo(sys.intern(entry["dtype"]), tuple(shape), path, name), (begin, end)


def _not_understood(name: str, text: bytes) -> ValueError:
    shown = text.decode(errors="replace")
    return ValueError(
        f"the entry for tensor {name!r:.120} is not understood, or newer than this loader: "
        f"{shown!r:.120}"
    )


def preview(names: Sequence[str], shown: int = 3) -> str:
    """Return the first of many names, for a message: "a, b, c and 7 more"."""
    more = f" and {len(names) - shown} more" if len(names) > shown else ""
    return ", ".join(names[:shown]) + more


# ---------------------------------------------------------------- shards


def shard_files(path: Path) -> list[Path]:
    """Return the file itself, or all shards that a model is split into.

    `path`: a file, a `*.safetensors.index.json`, any one of its shards, or a folder with one model.
    A GGUF file that was split by llama.cpp has shards of the same names.
    """
    path = Path(path)
    if os.path.isdir(path):
        path = _file_in_folder(path)
    if is_index(path):
        names = _shard_names(path)
    elif match := SHARD.fullmatch(path.name):
        stem, _, count, suffix = match.groups()
        if int(count) > MAX_SHARDS:
            raise UserError(f"{path} is one of {int(count):,} files by its name. Rename the file.")
        names = [f"{stem}-{i:05}-of-{count}.{suffix}" for i in range(1, int(count) + 1)]
    else:
        return [path]
    shards = [path.parent / name for name in names]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        belongs = "names" if is_index(path) else "is one of"
        raise UserError(
            f"{path} {belongs} {len(shards)} files that must lie next to it, and lacks "
            f"{preview(missing)}."
        )
    return shards


SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|gguf)")
MAX_SHARDS = 1000


def _file_in_folder(folder: Path) -> Path:
    """Return the index, or else the only weight file, of a folder or of `transformer` in it."""
    for place in (folder, folder / "transformer"):
        # without the companions of other systems: ._x.safetensors of macOS, folders of a NAS
        names = sorted(file.name for file in place.glob("[!.@]*") if not file.is_dir())
        files = [name for name in names if name.endswith((".safetensors", ".sft", ".gguf"))]
        starts = [n for n in files if not (shard := SHARD.fullmatch(n)) or shard[2] == "00001"]
        found = [name for name in names if name.endswith(".safetensors.index.json")] or starts
        if len(found) > 1:
            raise UserError(
                f"{place} is a folder with {len(found)} models ({preview(found)}). Name one file."
            )
        if found:
            return place / found[0]
    raise UserError(f"{folder} is a folder without a safetensors or GGUF file. Name a file.")


def is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def _shard_names(index: Path) -> list[str]:
    try:
        text = read_plain_file(index, MAX_JSON, "an index of safetensors files")
        names = sorted(set(parse_json(text)["weight_map"].values()))
    except UserError:
        raise
    except (ValueError, LookupError, TypeError, AttributeError):
        names = []
    if not names:
        raise UserError(
            f"{index} is not an index of safetensors files: it has no `weight_map` of file names."
        )
    for name in names:  # anyone can write an index: a name must not lead out of its folder
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{,200}\.safetensors", name):
            raise UserError(
                f"{index} names {name!r:.120}, which is not the plain name of a safetensors file."
            )
    return names


# ---------------------------------------------------------------- finding


def find_file(
    repository: str,
    filename: str,
    weights: Path | None = None,
    licence: str = "",
    gated: bool = False,
) -> Path:
    """Return a file of a Hugging Face repository, found locally or downloaded.

    The order is: the folder `weights`, or else $FLUX_WEIGHTS; the Hugging Face cache; a download.
    In the folder the file is `filename`, `<name>/filename` or `<owner>/<name>/filename`.
    With a folder, nothing is downloaded. A download must have the hash that Hugging Face states.
    UserError, with `licence` and what `gated` means, if the
    file cannot be had.
    """
    if path := local_file(repository, filename, weights):
        return path
    page = f"https://huggingface.co/{repository}"
    if folder := weights_folder(weights):
        places = [folder / home / filename for home in ("", repository.split("/")[-1], repository)]
        terms = f" under {licence}" if licence else ""
        raise UserError(
            f"{filename} of {repository} is neither at {' or '.join(map(str, places))} nor in the "
            f"Hugging Face cache; get it from {page}{terms}, or leave `weights` and $FLUX_WEIGHTS "
            "out to download it."
        )
    import huggingface_hub  # imported here: a local file must not wait a second for the import

    started = time.time()
    begun = partial(_downloaded_gigabytes, repository, started)
    try:
        _find_host()
        with progress.polled(f"downloading {filename} of {repository}", begun, "GB"):
            path = Path(huggingface_hub.hf_hub_download(repository, filename))
    # Any error, of the hub, httpx, hf_xet or the system, means that the file did not come.
    except Exception as error:
        reason = _download_problem(error, page, licence or "its licence", gated)
        raise UserError(
            f"{filename} of {repository} was not downloaded: {reason}; or put the file into a "
            "folder and pass that folder as `weights`."
        ) from error
    caches = [folder.parent for folder in path.parents if folder.name == "snapshots"]
    if caches and not path.resolve().is_relative_to(caches[-1].resolve()):
        place = path.resolve()
        path.unlink()  # the link alone: the server may have named a file that was there before
        raise UserError(
            f"{filename} of {repository} was not downloaded: the server named {place} to keep the "
            f"file at, outside of {caches[-1]}; check $HF_ENDPOINT and $HF_HOME."
        )
    stated = stated_hash(path)
    if stated and not has_hash(path, stated):
        path.resolve().unlink()
        path.unlink()
        raise UserError(
            f"{filename} of {repository} was not downloaded: what came has not the hash that "
            "Hugging Face states, and was deleted; run again."
        )
    return path


def _downloaded_gigabytes(repository: str, started: float) -> float:
    """Return the size of the unfinished file that the hub has written to since `started`."""
    from huggingface_hub import constants

    home = Path(constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
    sizes = [0]
    with suppress(OSError):  # a file may be renamed meanwhile
        stats = [path.stat() for path in home.glob("blobs/*.incomplete")]
        sizes += [stat.st_size for stat in stats if stat.st_mtime >= started - 60]
    return max(sizes) / 1e9


def find_files(
    repository: str,
    filename: str,
    weights: Path | None = None,
    licence: str = "",
    gated: bool = False,
) -> list[Path]:
    """Return the file as `find_file` does, or all shards of a `*.safetensors.index.json`."""
    path = find_file(repository, filename, weights, licence, gated)
    if is_index(path):
        for name in _shard_names(path):
            shard = str(PurePosixPath(filename).with_name(name))
            find_file(repository, shard, weights, licence, gated)
    return shard_files(path)


def local_file(repository: str, filename: str, weights: Path | None = None) -> Path | None:
    """Return a file of the folder `weights` or of the Hugging Face cache, or None."""
    return _in_folder(repository, filename, weights) or _in_cache(repository, filename)


def missing_files(repository: str, filename: str, weights: Path | None = None) -> list[str]:
    """Return which files are not there: the file itself, or shards of an index that is there."""
    path = local_file(repository, filename, weights)
    if path is None:
        return [filename]
    shards = _shard_names(path) if is_index(path) else []
    return [
        str(PurePosixPath(filename).with_name(name))
        for name in shards
        if not (path.parent / name).is_file()
    ]


def is_local(repository: str, filename: str, weights: Path | None = None) -> bool:
    """Return whether `find_files` would find everything without a download."""
    return not missing_files(repository, filename, weights)


def weights_folder(weights: Path | None) -> Path | None:
    """Return the folder `weights`, or else $FLUX_WEIGHTS; None if neither is set."""
    value = weights or os.environ.get("FLUX_WEIGHTS")
    if not value:
        return None
    source = "weights" if weights else "$FLUX_WEIGHTS"
    try:
        folder = Path(value).expanduser()
        if not folder.is_dir():
            raise UserError(f"{source}: {value} is not a folder.")
        return folder
    except RuntimeError as error:  # "~name" of an unknown user
        raise UserError(f"{source}: {value} is not a folder: {error}") from error
    except OSError as error:
        raise UserError(f"{source}: {value} cannot be read: {error.strerror}.") from error


def _in_folder(repository: str, filename: str, weights: Path | None) -> Path | None:
    folder = weights_folder(weights)
    if folder is None:
        return None
    # Capitals do not matter, as on the hub. The repository's folder comes first, because a
    # file at the top may belong to another repository.
    names = (repository.lower(), repository.lower().split("/")[-1])
    try:
        below = (*folder.glob("*/*"), *folder.glob("*"))
        homes = [home for home in below if home.relative_to(folder).as_posix().lower() in names]
        for home in (*homes, folder):
            if (home / filename).is_file():
                return home / filename
        return None
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _in_cache(repository: str, filename: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(repository, filename)
    return Path(path) if isinstance(path, str) else None  # else None, or a mark "no such file"


def _find_host() -> None:
    """Raise an error at once if no network knows the hub: its client would try for 25 seconds."""
    from huggingface_hub import constants

    if not (constants.HF_HUB_OFFLINE or getproxies()):  # a proxy finds the host itself
        socket.getaddrinfo(urlsplit(constants.ENDPOINT).hostname, 443)


def _download_problem(error: BaseException, page: str, licence: str, gated: bool) -> str:
    """Return why a download failed, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    cause = error.__cause__
    is_gated = gated or isinstance(error, errors.GatedRepoError)
    log_in = (
        "create a READ token at https://huggingface.co/settings/tokens and run `hf auth login` "
        "or set HF_TOKEN"
    )
    match error:
        case errors.LocalEntryNotFoundError() if isinstance(cause, errors.HfHubHTTPError):
            # the hub wraps 403, 429 and 5xx in this error
            return _download_problem(cause, page, licence, gated)
        case errors.LocalEntryNotFoundError() if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set and the Hugging Face cache lacks it; unset HF_HUB_OFFLINE"
        case errors.LocalEntryNotFoundError() | socket.gaierror():
            return (
                f"huggingface.co cannot be reached ({cause or error!s:.120}); check the network "
                "and run again"
            )
        case errors.HfHubHTTPError() if status == 401 and is_gated:
            return (
                "it is gated and no valid Hugging Face token was sent; "
                f"accept {licence} at {page}, {log_in}"
            )
        case errors.HfHubHTTPError() if status == 403 and is_gated:
            return (
                f"it is gated and your token's account has no access; accept {licence} at {page} "
                "with that account, and allow the token to read gated repositories"
            )
        case errors.HfHubHTTPError() if status == 401 and (token := _token_source()):
            return (
                f"HTTP 401, the Hugging Face token {token} is refused, or there is no such "
                f"repository; remove the token or {log_in}"
            )
        case errors.RepositoryNotFoundError():
            return (
                f"there is no public repository {page}; check its name or, if it is private, "
                f"{log_in}"
            )
        case errors.RemoteEntryNotFoundError():
            return f"{page} has no such file; check its name"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return (
                "the disk is full; free some space, or set HF_HOME to a folder on another disk, "
                "and run again (the download starts over)"
            )
    reason = f"{type(error).__name__}, {' '.join(str(error).split()):.120}"
    # huggingface_hub goes on with a download inside one process only.
    return f"{f'HTTP {status}' if status else reason}; run again (the download starts over)"


def _token_source() -> str:
    """Return where huggingface_hub found its token; "" without one."""
    from huggingface_hub import get_token

    names = [name for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN") if os.environ.get(name)]
    return f"in {names[0]}" if names else "of `hf auth login`" if get_token() else ""
