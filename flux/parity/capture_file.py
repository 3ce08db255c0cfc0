"""The file of a capture: a plain .safetensors, whose metadata holds one JSON text under the key "flux.parity".

    {"schema": 1, "recipe": {...}, "tensors": {name: {ordinal, kind, dtype, shape, sha256, statistics, same, budget}}}

`dtype` and `shape` are the tensor's own, and `sha256` is of its bytes, whatever is kept of it:

    full        all of it, under its name; or `same` names an earlier tensor with the very same bytes, and nothing is stored
    slice       the first 16 along every axis
    probe       4096 values, at the places that `positions` draws from the name, and `<name>/tokens`, the L2 of each token
    statistics  nothing but what the metadata hold: min, max, mean, std, l2, nan, inf and a histogram of 32 bins
"""

import errno
import hashlib
import json
import math
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Literal
from uuid import uuid4

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from flux.errors import UserError
from flux.weights.files import MAX_HEADER, read_header

Kind = Literal["full", "slice", "probe", "statistics"]
KEY, SCHEMA = "flux.parity", 1
PROBE, SLICE, BINS = 4096, 16, 32
DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
}


@dataclass(frozen=True)
class Record:
    """What the metadata say of one tensor."""

    ordinal: int  # in the order of execution
    kind: Kind
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    sha256: str = ""  # "" in a file that is no capture
    statistics: dict | None = None
    same: str | None = None  # the name under which the same bytes are stored
    budget: float | None = None  # relative L2 that is allowed, if it was measured


# ---------------------------------------------------------------- what is kept of a tensor


def kind_of(tensor: Tensor, asked: Kind) -> Kind:
    """Small tensors are kept whole."""
    return "full" if asked != "statistics" and tensor.numel() <= PROBE else asked


def reduce(name: str, tensor: Tensor, kind: Kind) -> Tensor:
    """What is stored of a tensor under its name; nothing, for statistics."""
    if kind == "full":
        return tensor
    if kind == "slice":
        return tensor[tuple(slice(SLICE) for _ in tensor.shape)]
    if kind == "probe":
        return tensor.flatten()[torch.from_numpy(positions(name, tensor.numel())).to(tensor.device)]
    return tensor.new_empty(0)


def positions(name: str, numel: int) -> np.ndarray:
    """PROBE flat positions, (4096,) int64: hash the name (FNV-1a), count on from there, and mix each number (splitmix64).

    Public-domain functions of 64-bit integers alone, so that any language can draw the same.
    """
    seed = 0xCBF29CE484222325
    for byte in name.encode():
        seed = (seed ^ byte) * 0x100000001B3 % 2**64
    z = np.uint64(seed) + np.arange(1, PROBE + 1, dtype=np.uint64) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return ((z ^ (z >> np.uint64(31))) % np.uint64(numel)).astype(np.int64)


def token_norms(tensor: Tensor) -> Tensor:
    """L2 of each token, float32: tokens lie along the last axis but one, and batches along the first.

    (B, N, D) and, with heads, (B, H, N, d) -> (B, N); (N, D) -> (N,); of a picture (B, C, H, W), its rows (B, H).
    """
    if tensor.ndim < 2:
        return tensor.float().norm()[None]
    others = [axis for axis in range(1, tensor.ndim) if axis != tensor.ndim - 2]
    return torch.linalg.vector_norm(tensor.float(), dim=others or None)


def statistics(tensor: Tensor) -> dict:
    """Of the finite values, in float64."""
    x = tensor.flatten().double()
    finite = x[x.isfinite()]
    out = {"nan": int(x.isnan().sum()), "inf": int(x.isinf().sum())}
    if not len(finite):
        return out
    low, high = finite.min().item(), finite.max().item()
    moments = dict(
        min=low, max=high, mean=finite.mean().item(), std=finite.std(correction=0).item()
    )
    histogram = torch.histc(finite, BINS, low, high).long().tolist()
    return out | moments | {"l2": finite.norm().item(), "histogram": histogram}


def stored_as(tensor: Tensor, kind: Kind) -> int:
    """Bytes that are stored of a tensor, which may be without values."""
    if kind == "probe":
        return PROBE * tensor.itemsize + 4 * token_norms(tensor).numel()
    if kind == "statistics":
        return 0
    return tensor.itemsize * math.prod(
        min(n, SLICE) if kind == "slice" else n for n in tensor.shape
    )


def raw(tensor: Tensor) -> memoryview:
    """Its bytes, row by row, as safetensors stores them."""
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data


# ---------------------------------------------------------------- writing


class Writer:
    """Streams a capture to disk; `with` gives a whole file at the end, or, where that fails, none.

    The header is only known at the end: `reserve` bytes are left for it, padded with spaces. A run that stops half-way on
    purpose may still be kept: `recipe` can be added to until the end. UserError if the file exists, if it would pass
    `limit` bytes, or if the disk is full.
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
        self._part = self.path.parent / f".{uuid4().hex}.part"
        self._file = self._part.open("xb")
        self._file.seek(self.start)

    def add(self, name: str, tensor: Tensor, kind: Kind = "full") -> None:
        """Record a tensor as it is now. A name that comes again, where a module is called twice, gets ~2."""
        self._times[name] += 1
        name += f"~{self._times[name]}" * (self._times[name] > 1)
        x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        x = x.detach().cpu()
        bytes_of = DTYPES[x.dtype], tuple(x.shape), hashlib.sha256(raw(x)).hexdigest()
        first = self._first.setdefault(bytes_of, name)
        known = self.records[first].statistics if first != name else statistics(x)
        same = (
            first
            if first != name and self.records[first].kind == kind_of(x, kind) == "full"
            else None
        )
        record = self.records[name] = Record(
            len(self.records), kind_of(x, kind), *bytes_of, known, same
        )
        if record.kind != "statistics" and record.same is None:
            self._put(name, reduce(name, x, record.kind))
        if record.kind == "probe":
            self._put(f"{name}/tokens", token_norms(x))

    def _put(self, name: str, tensor: Tensor) -> None:
        data = raw(tensor)
        if self.size + len(data) > self.limit:
            fault = (
                f"{self.path} would be larger than its limit of {readable(self.limit)} at {name}"
            )
            raise UserError(
                f"{fault}: choose tensors with --only, keep less with --keep probe, or raise --limit"
            )
        if len(data) % 8 == 0:
            self._append(name, tensor, data)
        else:  # later, so that all others begin at multiples of 8
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

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):  # what could not be written before cannot be now
                self._file.close()
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        for name, tensor in sorted(self._odd, key=lambda item: -item[1].itemsize):
            self._append(name, tensor, raw(tensor))
        tensors = {
            name: {k: v for k, v in asdict(r).items() if v is not None}
            for name, r in self.records.items()
        }
        try:
            self._file.close()
            seal(
                self._part,
                self.start,
                self.entries,
                {"schema": SCHEMA, "recipe": self.recipe, "tensors": tensors},
            )
            os.replace(self._part, self.path)
        except OSError as error:
            raise cannot_write(self.path, error) from error


def seal(path: Path, start: int, entries: dict, document: dict) -> None:
    """Give a file, whose data begin at `start`, its header; where that finds too little room, the data move up."""
    text = json.dumps(
        {"__metadata__": {KEY: json.dumps(document, separators=(",", ":"))}, **entries}
    ).encode()
    if len(text) > MAX_HEADER:
        raise UserError(
            f"{len(document['tensors']):,} tensors are more than one file can name: choose with --only"
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
    """Refuse, before any work is done, a file that is there or could not be written."""
    if path.suffix != ".safetensors":
        raise UserError(f"--output {path}: a capture is a .safetensors file; give it that suffix")
    if path.exists():
        raise UserError(
            f"--output {path}: the file exists, and captures are never overwritten; delete it, or choose another"
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise cannot_write(path, error) from None


def cannot_write(path: Path, error: OSError) -> UserError:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    fault = (
        "the disk is full: make room, or keep less with --only or --keep"
        if full
        else error.strerror
    )
    return UserError(f"{path} cannot be written: {fault}")


def readable(size: float) -> str:
    unit, name = next(
        (unit, name)
        for unit, name in ((1e9, "GB"), (1e6, "MB"), (1e3, "KB"), (0, "bytes"))
        if size >= unit
    )
    return f"{size / (unit or 1):.3g} {name}"


# ---------------------------------------------------------------- reading


class Capture:
    """A capture that was written; tensors stay mapped until they are asked for.

    `recipe`, `names` in the order of execution, `records` by name. A plain safetensors file is a capture too, without a
    recipe, of tensors in the order of the file: so a port in any language can write one. UserError for anything else.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            infos, metadata = read_header(self.path)
        except UserError as error:
            raise UserError(str(error).replace("download it", "capture it")) from None
        plain = {
            name: Record(ordinal, "full", info.dtype, info.shape)
            for ordinal, (name, info) in enumerate(infos.items())
        }
        self.recipe, self.records = (
            self._read(metadata[KEY], infos) if KEY in metadata else ({}, plain)
        )
        self.names = sorted(self.records, key=lambda name: self.records[name].ordinal)
        self._file = safe_open(self.path, framework="pt")

    def _read(self, text: str, stored: Mapping) -> tuple[dict, dict[str, Record]]:
        try:
            document = json.loads(text)
            if document["schema"] != SCHEMA:
                raise UserError(
                    f"{self.path} is a capture of schema {document['schema']!s:.20}, and this reads {SCHEMA}."
                )
            records = {
                name: Record(**entry | {"shape": tuple(entry["shape"])})
                for name, entry in document["tensors"].items()
            }
            for name, record in records.items():
                if record.kind != "statistics" and (record.same or name) not in stored:
                    raise KeyError(name)
            return document["recipe"], records
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.path} is a damaged capture ({error!s:.80}); capture it again."
            ) from None

    @cached_property
    def tensors(self) -> "Tensors":
        """name -> what is kept of the tensor."""
        return Tensors(self)

    def kind(self, name: str) -> Kind:
        return self.records[name].kind

    def tokens(self, name: str) -> Tensor:
        """The L2 of each token of a tensor of which a probe is kept."""
        return self._file.get_tensor(f"{name}/tokens")


class Tensors(Mapping[str, Tensor]):
    """What a capture keeps, read when it is asked for."""

    def __init__(self, capture: Capture):
        self.capture = capture
        self.names = [name for name in capture.names if capture.kind(name) != "statistics"]

    def __getitem__(self, name: str) -> Tensor:
        return self.capture._file.get_tensor(self.capture.records[name].same or name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def set_budgets(path: str | Path, budgets: Mapping[str, float]) -> None:
    """Store the relative L2 that each tensor is allowed in a capture."""
    if unknown := [name for name in budgets if name not in Capture(path).records]:
        raise UserError(f"{path} has no tensor {unknown[0]} to set a budget for")

    def write(document: dict) -> None:
        for name, budget in budgets.items():
            document["tensors"][name]["budget"] = budget

    amend(Path(path), write)


def amend(path: Path, change: Callable[[dict], None]) -> None:
    """Change what the header of a capture says of its tensors; the file is replaced as a whole, or stays."""
    part = path.parent / f".{uuid4().hex}.part"
    try:
        shutil.copyfile(path, part)
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        if KEY not in metadata:
            raise UserError(
                f"{path} is a plain file, without a place for budgets: capture it with parity.py"
            )
        document = json.loads(metadata[KEY])
        change(document)
        seal(part, 8 + length, entries, document)
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
