"""The file of a capture: a plain .safetensors with a JSON text under "flux.parity".

    {"schema": 2, "recipe": {...}, "rounding": {precision: {name: [local, accumulated]}},
     "tensors": {name: {ordinal, kind, dtype, shape, sha256, statistics, same}}}

`dtype`, `shape` and `sha256` are those of the recorded tensor, whatever is stored of it:

    full        all values, under its name, or under the name in `same`, which has equal bytes
    slice       the first 16 along every axis
    probe       4096 values, at the places that `positions` draws from the name, and
                `<name>/tokens`, the L2 norm of each token
    statistics  nothing but the metadata: min, max, mean, std, l2, nan, inf, histogram of 32 bins

`capture_metadata` checks every field. READ tells other programs, in the header, how to find equal
tensors under each of their names.
"""

import errno
import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from flux.atomic_files import exclusive_lock, make_folder, remove_leftovers, write_atomically
from flux.errors import UserError
from flux.parity.capture_metadata import (
    BINS,
    DTYPES,
    PROBE,
    SCHEMA,
    SLICE,
    Kind,
    Metadata,
    Record,
    check,
    parse,
    parse_document,
    to_entry,
)
from flux.weights.files import MAX_HEADER, read_header
from flux.weights.mapping import file_states, map_tensors, require_unchanged

KEY = "flux.parity"
# in the header, for programs that read the file with safetensors alone
READ = (
    "tensors = json.loads(file.metadata()['flux.parity'])['tensors']; "
    "x = file.get_tensor(tensors[name].get('same', name))"
)
# How tensors of other dtypes are recorded and compared: exactly, in a dtype that torch computes in.
READ_AS = {"U16": "I64", "U32": "I64", "U64": "I64", "C64": "F32", "F8_E8M0": "F32"}


# ---------------------------------------------------------------- what is stored of a tensor


def kind_of(tensor: Tensor, requested: Kind) -> Kind:
    """Return "full" for small tensors, else the requested kind."""
    return "full" if requested != "statistics" and tensor.numel() <= PROBE else requested


def reduce(name: str, tensor: Tensor, kind: Kind) -> Tensor:
    """Return the values that are stored under the tensor's name; none for statistics."""
    if kind == "full":
        return tensor
    if kind == "slice":
        return tensor[tuple(slice(SLICE) for _ in tensor.shape)]
    if kind == "probe":
        return tensor.flatten()[torch.from_numpy(positions(name, tensor.numel())).to(tensor.device)]
    return tensor.new_empty(0)


def positions(name: str, numel: int) -> np.ndarray:
    """Return PROBE flat positions, (4096,) int64, drawn from the name.

    Numbers are counted from the name's hash (FNV-1a), and each is mixed (splitmix64): both are
    public-domain functions of 64-bit integers, so any language can draw the same.
    """
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    z = np.uint64(seed) + np.arange(1, PROBE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(numel)).astype(np.int64)


def token_norms(tensor: Tensor) -> Tensor:
    """Return the L2 norm of each token, float32. Tokens are on the last axis but one.

    (B, N, D) and (B, H, N, d) -> (B, N); (N, D) -> (N,); an image (B, C, H, W) -> its rows (B, H).
    """
    if tensor.ndim < 2:
        return tensor.float().norm()[None]
    others = [axis for axis in range(1, tensor.ndim) if axis != tensor.ndim - 2]
    return torch.linalg.vector_norm(tensor.float(), dim=others or None)


def comparable(tensor: Tensor) -> Tensor:
    """Return the same values in a dtype of `DTYPES`; a complex number is a pair of real ones."""
    if tensor.is_complex():
        return torch.view_as_real(tensor)
    if tensor.dtype in (torch.uint16, torch.uint32, torch.uint64):
        return tensor.to(torch.int64)
    return tensor.float() if tensor.dtype == torch.float8_e8m0fnu else tensor


def statistics(tensor: Tensor) -> dict:
    """Return statistics of the finite values, in float64."""
    x = tensor.flatten().double()
    finite = x[x.isfinite()]
    out = {"nan": int(x.isnan().sum()), "inf": int(x.isinf().sum())}
    if not len(finite):
        return out
    low, high = finite.min().item(), finite.max().item()
    moments = dict(
        min=low,
        max=high,
        mean=finite.mean().item(),
        std=finite.std(correction=0).item(),
        l2=finite.norm().item(),
    )
    out |= {key: value for key, value in moments.items() if math.isfinite(value)}  # no overflow
    return out | {"histogram": torch.histc(finite, BINS, low, high).long().tolist()}


def stored_as(tensor: Tensor, kind: Kind) -> int:
    """Return the number of bytes stored for a tensor, which may be on the meta device."""
    if kind == "probe":
        return PROBE * tensor.itemsize + 4 * token_norms(tensor).numel()
    if kind == "statistics":
        return 0
    return tensor.itemsize * math.prod(
        min(n, SLICE) if kind == "slice" else n for n in tensor.shape
    )


def raw(tensor: Tensor) -> memoryview:
    """Return the bytes of a tensor in row-major order, as safetensors stores them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


# ---------------------------------------------------------------- writing


class Writer:
    """Stream a capture to disk. The file appears when the `with` block ends without an error.

    The header is known at the end only: `reserve` bytes are left for it, padded with spaces.
    `recipe` can be changed until the end. UserError if the file exists, if another process writes
    it, if it would be larger than `limit` bytes, or if the disk is full.
    """

    def __init__(
        self, path: str | Path, recipe: dict, limit: float = math.inf, reserve: int = 2**16
    ):
        self.path, self.recipe, self.limit = Path(path), recipe, limit
        self.records: dict[str, Record] = {}
        self.entries: dict[str, dict] = {}  # the header of the file
        self.size, self.start = 0, 8 + -(-reserve // 8) * 8
        self._first: dict[tuple, str] = {}  # bytes -> the name under which they are stored
        self._odd: list[tuple[str, Tensor]] = []
        self._times: Counter[str] = Counter()
        check_new(self.path)

    @contextmanager
    def _opened(self) -> Iterator["Writer"]:
        with write_atomically(self.path, overwrite=False) as unfinished:
            with unfinished.open("xb") as self._file:
                self._file.seek(self.start)
                yield self
                for name, tensor in sorted(self._odd, key=lambda item: -item[1].itemsize):
                    self._append(name, tensor, raw(tensor))
            tensors = {name: to_entry(record) for name, record in self.records.items()}
            document = {"schema": SCHEMA, "recipe": self.recipe, "tensors": tensors}
            seal(unfinished, self.start, self.entries, document)

    def __enter__(self) -> "Writer":
        self._context = self._opened()
        try:
            return self._context.__enter__()
        except OSError as error:
            raise cannot_write(self.path, error) from error

    def __exit__(self, kind, error, trace) -> None:
        try:
            self._context.__exit__(kind, error, trace)
        except OSError as failure:  # of this file; an error of the block passes through
            raise cannot_write(self.path, failure) from failure

    def add(self, name: str, tensor: Tensor, kind: Kind = "full") -> None:
        """Record the present values of a tensor. The second call with a name records `name~2`."""
        self._times[name] += 1
        if self._times[name] > 1:
            name += f"~{self._times[name]}"
        x = comparable(tensor.detach()).cpu()
        kind = kind_of(x, kind)
        content = DTYPES[x.dtype], tuple(x.shape), hashlib.sha256(raw(x)).hexdigest()
        first = self._first.setdefault(content, name)
        same, summary = None, None
        if first == name:
            summary = statistics(x)
        else:
            summary = self.records[first].statistics
            if self.records[first].kind == kind == "full":
                same = first
        record = Record(len(self.records), kind, *content, summary, same)
        self.records[name] = record
        if record.kind != "statistics" and record.same is None:
            self._put(name, reduce(name, x, record.kind))
        if record.kind == "probe":
            self._put(f"{name}/tokens", token_norms(x))

    def _put(self, name: str, tensor: Tensor) -> None:
        data = raw(tensor)
        if self.size + len(data) > self.limit:
            raise UserError(
                f"{self.path}: would be larger than its limit of {readable(self.limit)} at {name}. "
                'Select tensors with `only`, pass `keep="probe"`, or raise `limit`.'
            )
        if len(data) % 8 == 0:
            self._append(name, tensor, data)
        else:  # at the end, so that all others begin at multiples of 8
            self._odd.append((name, tensor.clone()))

    def _append(self, name: str, tensor: Tensor, data: memoryview) -> None:
        try:
            self._file.write(data)
        except OSError as error:
            raise cannot_write(self.path, error) from error
        offsets = [self.size, self.size + len(data)]
        self.entries[name] = {
            "dtype": DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        self.size += len(data)


def seal(path: Path, start: int, entries: dict, document: dict) -> None:
    """Write the header of a file whose data begin at `start`; move the data if it is too long."""
    metadata = {"read": READ, KEY: json.dumps(document, separators=(",", ":"))}
    text = json.dumps({"__metadata__": metadata, **entries}).encode()
    if len(text) > MAX_HEADER:
        raise UserError(
            f"only: one file cannot name {len(document['tensors']):,} tensors. Select fewer."
        )
    length = max(start - 8, -(-len(text) // 8) * 8)
    header = length.to_bytes(8, "little") + text.ljust(length)
    if len(header) == start:
        with path.open("r+b") as file:
            file.write(header)
        return
    moved = path.with_suffix(".moved")
    try:
        with path.open("rb") as old, moved.open("xb") as new:
            old.seek(start)
            new.write(header)
            shutil.copyfileobj(old, new)
        os.replace(moved, path)
    finally:
        moved.unlink(missing_ok=True)


def check_new(path: Path) -> None:
    """Raise UserError for a file that exists or cannot be written.

    What killed processes left unfinished in its folder is removed.
    """
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a capture must be a .safetensors file. Change the suffix.")
    remove_leftovers(path.parent)
    if os.path.lexists(path):
        raise UserError(
            f"{path}: the file exists, and captures are never overwritten. "
            "Delete it, or choose another name."
        )
    try:
        make_folder(path.parent)
        with exclusive_lock(path):  # no other process writes it, and the folder is writable
            pass
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return UserError(
            f"{path}: cannot be written, the disk is full. "
            "Make room, or record less with `only` or `keep`."
        )
    return UserError(f"{path}: cannot be written ({error.strerror}).")


def readable(size: float) -> str:
    """Return a number of bytes with three digits and a unit."""
    for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB")):
        if size >= unit:
            return f"{size / unit:.3g} {name}"
    return f"{size:.3g} bytes"


# ---------------------------------------------------------------- reading


class Capture:
    """A file of named tensors, which stay mapped until they are read.

    `recipe`, `names` in the order of execution, `records` by name, measured `rounding`. A plain
    safetensors file, which any language can write, is read as a capture without a recipe.
    UserError for any other file, and where the file contradicts itself.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            self._stored, metadata = read_header(self.path)
        except UserError as error:
            text = str(error).replace("download it", "capture it")
            raise UserError(text.replace("Download it", "Capture it")) from None
        for info in self._stored.values():
            if info.dtype not in (*DTYPES.values(), *READ_AS):
                raise UserError(
                    f"{self.path}: tensor {info.name!r:.120} has the dtype {info.dtype}, which "
                    "cannot be compared. Save the tensor as F32."
                )
        if KEY in metadata:
            read = parse(metadata[KEY], self._stored, self.path)
        else:
            read = Metadata({}, dict(self._records_of_plain_file()), {})
        self.recipe, self.records, self.rounding = read
        self.names = sorted(self.records, key=lambda name: self.records[name].ordinal)
        self._verified: set[str] = set()
        self._states = file_states([self.path])
        self._mapped = dict(map_tensors(self._stored))

    def _records_of_plain_file(self) -> Iterator[tuple[str, Record]]:
        for ordinal, (name, info) in enumerate(self._stored.items()):
            shape = (*info.shape, 2) if info.dtype == "C64" else info.shape
            yield name, Record(ordinal, "full", READ_AS.get(info.dtype, info.dtype), shape)

    @cached_property
    def tensors(self) -> "Tensors":
        """Return a mapping from names to the stored values."""
        return Tensors(self)

    def kind(self, name: str) -> Kind:
        return self.records[name].kind

    def tokens(self, name: str) -> Tensor:
        """Return the L2 norm of each token of a tensor that is stored as a probe."""
        return self._read(f"{self.records[name].same or name}/tokens")

    def values(self, name: str) -> Tensor:
        """Return what is stored of a tensor.

        UserError if all of it is stored, and has not the SHA-256 that the metadata state.
        """
        record = self.records[name]
        tensor = self._read(record.same or name)
        if record.kind == "full" and record.sha256 and name not in self._verified:
            if hashlib.sha256(raw(tensor)).hexdigest() != record.sha256:
                raise UserError(
                    f"{self.path}: tensor {name!r:.120} has not the sha256 that the metadata "
                    "state: its values were changed. Capture it again."
                )
            self._verified.add(name)
        return tensor

    def _read(self, stored: str) -> Tensor:
        require_unchanged(self._states, mapped=True)
        tensor = self._mapped[stored]
        if self._stored[stored].dtype not in READ_AS:
            return tensor
        read = comparable(tensor)
        if tensor.dtype == torch.uint64 and (read < 0).any():
            raise UserError(
                f"{self.path}: tensor {stored!r:.120} of dtype U64 has numbers from 2^63 on, which "
                "cannot be compared. Save it as I64."
            )
        return read


class Tensors(Mapping[str, Tensor]):
    """The stored values of a capture, by name, read from the file on access."""

    def __init__(self, capture: Capture):
        self.capture = capture
        self.names = [name for name in capture.names if capture.kind(name) != "statistics"]

    def __getitem__(self, name: str) -> Tensor:
        return self.capture.values(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


# ---------------------------------------------------------------- changing


def amend(path: Path, change: Callable[[dict], None]) -> None:
    """Change the metadata of a capture; the file is replaced at once, or stays as it is.

    Waits for other processes that change the same capture: no change is lost.
    """
    try:
        with write_atomically(path, wait=True) as unfinished:
            stored, metadata = read_header(path)
            if KEY not in metadata:
                raise UserError(
                    f"{path}: is a plain file and cannot store tolerances. Run `parity.py capture`."
                )
            document = parse_document(metadata[KEY], path)
            check(document, stored, path)
            if document["schema"] != SCHEMA:
                raise UserError(
                    f"{path}: was captured by an older version and cannot store tolerances. "
                    "Capture it again."
                )
            change(document)
            check(document, stored, path)
            shutil.copyfile(path, unfinished)
            with unfinished.open("rb") as file:
                length = int.from_bytes(file.read(8), "little")
                entries = json.loads(file.read(length))
            del entries["__metadata__"]
            seal(unfinished, 8 + length, entries, document)
    except OSError as error:
        raise cannot_write(path, error) from error
