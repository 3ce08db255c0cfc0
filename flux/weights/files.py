"""Files of weights: find them, and read what their headers say of the tensors, before anything is loaded.

Each claim of a header is checked against the others and against the size of the file. Nothing is ever unpickled.
"""

import errno
import json
import os
import re
from collections.abc import Sequence
from math import prod
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from flux.errors import UserError

# ---------------------------------------------------------------------------------------------------------- headers

MAX_HEADER = 100_000_000  # bytes; the limit of the safetensors library
FLOATS = ("F64", "F32", "F16", "BF16")
BITS = dict(
    F64=64,
    I64=64,
    U64=64,
    C64=64,
    F32=32,
    I32=32,
    U32=32,
    F16=16,
    BF16=16,
    I16=16,
    U16=16,
    BOOL=8,
    I8=8,
    U8=8,
)
BITS |= dict(
    F8_E4M3=8, F8_E5M2=8, F8_E8M0=8, F8_E4M3FNUZ=8, F8_E5M2FNUZ=8, F6_E2M3=6, F6_E3M2=6, F4=4
)
NOT_SAFETENSORS = (  # how a file begins that is something else, and what that is
    (
        rb"\s*<",
        "a web page, as sites send it in place of a file that needs a login or an accepted licence",
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
        "a GGUF file, in which only transformers and text encoders are read; get it as safetensors",
    ),
    (rb"\s*\{", "a JSON text, not weights"),
    (
        rb"Invalid username|Entry not found|Access to |Repository not found",
        "what Hugging Face answers where it sends no file",
    ),
    (rb"\x1f\x8b", "a gzip file; unpack it"),
)


class TensorInfo(NamedTuple):
    """What a header says of one tensor; `dtype` as safetensors spells it: "BF16", "F32", "F8_E4M3"; or as GGUF does: "Q4_K"."""

    dtype: str
    shape: tuple[int, ...]
    file: Path
    name: str  # in the file


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Name -> info, and the metadata, of a safetensors file, which is not loaded; UserError if it is anything else.

    The format (https://github.com/huggingface/safetensors#format): the header's length in 8 little-endian bytes, the
    header in JSON, the tensors' bytes. Each claim of the header is checked against the others and the file's size.
    """
    path = Path(path)
    text, data_size = _header_text(path)
    try:
        header = json.loads(text.decode())
        metadata = header.pop("__metadata__", None) or {}
        if not all(isinstance(value, str) for value in metadata.values()):
            raise ValueError("metadata that is not text")
    except (ValueError, AttributeError, TypeError, RecursionError) as error:
        raise UserError(
            f"{path} has a damaged header ({error!s:.80}); download it again."
        ) from error

    spans = {name: _span(path, name, entry) for name, entry in header.items()}
    position = 0
    for name, (begin, end) in sorted(spans.items(), key=lambda item: item[1]):
        if begin != position:
            fault = "overlaps another" if begin < position else "leaves a hole before it"
            raise UserError(
                f"{path} has a damaged header: tensor {name!r:.120} {fault}; download it again."
            )
        position = end
    if position != data_size:
        start, fault = (
            8 + len(text),
            "is truncated" if position > data_size else "goes on after its end",
        )
        sizes = f"{start + position:,} bytes expected, {start + data_size:,} found"
        raise UserError(f"{path} {fault}: {sizes}; download it again.")
    infos = {
        name: TensorInfo(entry["dtype"], tuple(entry["shape"]), path, name)
        for name, entry in header.items()
    }
    return infos, metadata


def _header_text(path: Path) -> tuple[bytes, int]:
    """The JSON text of the header, and the number of bytes that follow it."""
    try:
        if not path.exists():
            raise UserError(f"{path} does not exist.")
        if not path.is_file():
            raise UserError(
                f"{path} is a {'folder' if path.is_dir() else 'special file'}, not a safetensors file."
            )
        with path.open("rb") as file:
            size = path.stat().st_size
            start = file.read(64)
            length = int.from_bytes(start[:8], "little")
            file.seek(8)
            text = file.read(length) if length <= MAX_HEADER else b""
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error
    if size == 0:
        raise UserError(f"{path} is empty; download it again.")
    if (
        start[8:9] != b"{"
    ):  # asked first, because a true length may look like anything: 640 bytes like a pickle
        what = next(
            (what for pattern, what in NOT_SAFETENSORS if re.match(pattern, start)),
            "unknown, or damaged; get it again",
        )
        raise UserError(f"{path} is not a safetensors file: it is {what}.")
    if length > MAX_HEADER:
        raise UserError(
            f"{path} is not a safetensors file: its header would be {length:,} bytes long."
        )
    if length > size - 8:
        sizes = f"at least {8 + length:,} bytes expected, {size:,} found"
        raise UserError(f"{path} is truncated: {sizes}; download it again.")
    return text, size - 8 - length


def _span(path: Path, name: str, entry: dict) -> tuple[int, int]:
    """Where a tensor's bytes begin and end, from the end of the header."""
    try:
        bits, shape, (begin, end) = BITS[entry["dtype"]], entry["shape"], entry["data_offsets"]
        if not all(type(number) is int and number >= 0 for number in (*shape, begin, end)):
            raise ValueError
    except (KeyError, TypeError, ValueError) as error:
        what = f"what it says of tensor {name!r:.120} is not understood: {entry!s:.120}"
        raise UserError(f"{path} is damaged, or newer than this loader: {what}.") from error
    if (end - begin) * 8 != prod(shape) * bits:
        what = f"{end - begin:,} bytes for tensor {name!r:.120}, {entry['dtype']} of shape {shape!s:.120}"
        raise UserError(f"{path} has a damaged header, with {what}; download it again.")
    return begin, end


def shard_files(path: Path) -> list[Path]:
    """The file itself, or the shards that a `*.safetensors.index.json` names: all present, all beside it."""
    path = Path(path)
    if not is_index(path):
        return [path]
    shards = [path.parent / name for name in _shard_names(path)]
    if missing := [shard.name for shard in shards if not shard.is_file()]:
        raise UserError(
            f"{path} names {len(shards)} files that must lie beside it, and lacks {preview(missing)}."
        )
    return shards


def is_index(path: Path) -> bool:
    return path.name.endswith(".index.json")


def _shard_names(index: Path) -> list[str]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except OSError as error:
        raise UserError(f"{index} cannot be read: {error.strerror}.") from error
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        names = []
    if not names:
        raise UserError(
            f"{index} is not an index of safetensors files: it has no `weight_map` of file names."
        )
    for name in names:  # an index comes from elsewhere: it may not reach out of its folder
        if not isinstance(name, str) or not re.fullmatch(r"\w[\w.-]{,200}\.safetensors", name):
            raise UserError(
                f"{index} names {name!r:.120}, which is not the plain name of a safetensors file."
            )
    return names


def preview(names: Sequence[str], shown: int = 3) -> str:
    """The first of many, for a message."""
    return ", ".join(names[:shown]) + (
        f" and {len(names) - shown} more" if len(names) > shown else ""
    )


# ---------------------------------------------------------------------------------------------------------- finding


def find_file(
    repository: str,
    filename: str,
    weights: Path | None = None,
    licence: str = "",
    gated: bool = False,
) -> Path:
    """A file of a Hugging Face repository: in the folder `weights` or $FLUX_WEIGHTS, in the local cache, or downloaded.

    In the folder it lies as `filename`, `<name>/filename` or `<owner>/<name>/filename`; where a folder is given,
    nothing is downloaded. `licence` and `gated` are for the UserError that tells why the file cannot be had.
    """
    if path := _in_folder(repository, filename, weights) or _in_cache(repository, filename):
        return path
    get = f"get it from https://huggingface.co/{repository}" + (
        f" under {licence}" if licence else ""
    )
    if folder := weights_folder(weights):
        places = " or ".join(
            str(folder / home / filename) for home in ("", repository.split("/")[-1], repository)
        )
        raise UserError(
            f"{filename} of {repository} is neither at {places} nor in the Hugging Face cache; {get}, or "
            "leave --weights and $FLUX_WEIGHTS out to have it downloaded."
        )
    import huggingface_hub  # not above: what is found without it needs no second of waiting for it

    try:
        return Path(huggingface_hub.hf_hub_download(repository, filename))
    except (
        Exception
    ) as error:  # its own, httpx's, hf_xet's or the system's: whichever, the file did not come
        fault = _download_fault(
            error, f"https://huggingface.co/{repository}", licence or "its licence", gated
        )
        instead = "or put it into a folder and give that with --weights"
        raise UserError(
            f"{filename} of {repository} was not downloaded: {fault}; {instead}."
        ) from error


def find_files(
    repository: str,
    filename: str,
    weights: Path | None = None,
    licence: str = "",
    gated: bool = False,
) -> list[Path]:
    """As `find_file`, for a file that may be a `*.safetensors.index.json`: the shards that it names, all from one place."""
    path = find_file(repository, filename, weights, licence, gated)
    if is_index(path):
        for name in _shard_names(path):
            find_file(
                repository, str(PurePosixPath(filename).with_name(name)), weights, licence, gated
            )
    return shard_files(path)


def is_local(repository: str, filename: str, weights: Path | None = None) -> bool:
    """Whether `find_files` would find everything without a download."""
    path = _in_folder(repository, filename, weights) or _in_cache(repository, filename)
    if path is None or not is_index(path):
        return path is not None
    return all((path.parent / name).is_file() for name in _shard_names(path))


def weights_folder(weights: Path | None) -> Path | None:
    """The folder that is given, if one is; UserError if there is none such."""
    given = weights or os.environ.get("FLUX_WEIGHTS")
    if not given:
        return None
    source = f"{given}, given by {'--weights' if weights else '$FLUX_WEIGHTS'},"
    try:
        folder = Path(given).expanduser()
        if not folder.is_dir():
            raise UserError(f"{source} is not a folder.")
        return folder
    except RuntimeError as error:  # of a ~ that is nobody's
        raise UserError(f"{source} is not a folder: {error}") from error
    except OSError as error:
        raise UserError(f"{source} cannot be read: {error.strerror}.") from error


def _in_folder(repository: str, filename: str, weights: Path | None) -> Path | None:
    folder = weights_folder(weights)
    if folder is None:
        return None
    # As on the hub, capitals do not matter. A repository's own folder comes first: a flat one may hold another's file.
    names = (repository.lower(), repository.lower().split("/")[-1])
    try:
        below = (*folder.glob("*/*"), *folder.glob("*"))
        homes = [home for home in below if home.relative_to(folder).as_posix().lower() in names]
        return next(
            (home / filename for home in (*homes, folder) if (home / filename).is_file()), None
        )
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}.") from error


def _in_cache(repository: str, filename: str) -> Path | None:
    from huggingface_hub import try_to_load_from_cache

    path = try_to_load_from_cache(
        repository, filename
    )  # a str; or else None, or a mark that there is no such file
    return Path(path) if isinstance(path, str) else None


def _download_fault(error: BaseException, page: str, licence: str, gated: bool) -> str:
    """Why a download failed, and what to do."""
    from huggingface_hub import errors

    status = getattr(getattr(error, "response", None), "status_code", None)
    cause = error.__cause__
    log_in = "create a READ token at https://huggingface.co/settings/tokens and run `hf auth login` or set HF_TOKEN"
    match error:
        case errors.LocalEntryNotFoundError() if isinstance(cause, errors.HfHubHTTPError):
            return _download_fault(
                cause, page, licence, gated
            )  # the hub wraps 403, 429 and 5xx in this one
        case errors.LocalEntryNotFoundError() if isinstance(cause, errors.OfflineModeIsEnabled):
            return "HF_HUB_OFFLINE is set and the Hugging Face cache lacks it; unset HF_HUB_OFFLINE"
        case errors.LocalEntryNotFoundError():
            return f"huggingface.co cannot be reached ({cause!s:.120}); check the network and run again"
        case errors.HfHubHTTPError() if status == 401 and (
            gated or isinstance(error, errors.GatedRepoError)
        ):
            return f"it is gated and no valid Hugging Face token was sent; accept {licence} at {page}, {log_in}"
        case errors.HfHubHTTPError() if status == 403 and (
            gated or isinstance(error, errors.GatedRepoError)
        ):
            allow = "and allow the token to read gated repositories"
            return f"it is gated and your token's account has no access; accept {licence} at {page} with it, {allow}"
        case errors.RepositoryNotFoundError():
            return f"there is no public repository {page}; check its name or, if it is private, {log_in}"
        case errors.RemoteEntryNotFoundError():
            return f"{page} has no such file; check its name"
        case OSError() if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return "the disk is full; make room, or set HF_HOME to a folder on another disk, and run again (it resumes)"
    reason = (
        f"HTTP {status}"
        if status
        else f"{type(error).__name__}, {' '.join(str(error).split()):.120}"
    )
    return f"{reason}; run again (it resumes)"
