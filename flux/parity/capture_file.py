"""The file of a capture: a plain .safetensors with a JSON text under "flux.parity".

    {"schema": 2, "recipe": {...}, "tensors": {name: {ordinal, kind, dtype, shape, sha256,
                                                      statistics, same, budget}}}

`dtype`, `shape` and `sha256` are those of the recorded tensor, whatever is stored of it:

    full        all values, under its name, or under the name in `same`, which has equal bytes
    slice       the first 16 along every axis
    probe       4096 values, at the places that `positions` draws from the name, and
                `<name>/tokens`, the L2 norm of each token
    statistics  nothing but the metadata: min, max, mean, std, l2, nan, inf, histogram of 32 bins

`budget` is the tolerance of the tensor, if it was measured. Schema 1 (until version 0.1) recorded
1 + scale in place of a modulation's scale: see `_upgrade`.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
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
KEY, SCHEMA = "flux.parity", 2
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
    """The metadata of one tensor."""

    ordinal: int  # in the order of execution
    kind: Kind
    dtype: str  # as safetensors spells it
    shape: tuple[int, ...]
    sha256: str = ""  # "" in a plain file
    statistics: dict | None = None
    same: str | None = None  # the name under which the same bytes are stored
    tolerance: float | None = None  # relative L2, if it was measured; "budget" in the file


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


def statistics(tensor: Tensor) -> dict:
    """Return statistics of the finite values, in float64."""
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
    `recipe` can be changed until the end. UserError if the file exists, if it would be larger than
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
        """Record the present values of a tensor. The second call with a name records `name~2`."""
        self._times[name] += 1
        if self._times[name] > 1:
            name += f"~{self._times[name]}"
        x = torch.view_as_real(tensor) if tensor.is_complex() else tensor
        x = x.detach().cpu()
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

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, kind, error, trace) -> None:
        try:
            if kind is None:
                self._finish()
        finally:
            with suppress(OSError):  # the error of the write is already raised
                self._file.close()
            self._part.unlink(missing_ok=True)

    def _finish(self) -> None:
        for name, tensor in sorted(self._odd, key=lambda item: -item[1].itemsize):
            self._append(name, tensor, raw(tensor))
        tensors = {name: to_entry(record) for name, record in self.records.items()}
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


def to_entry(record: Record) -> dict:
    """Return a record as the file has it."""
    entry = {key: value for key, value in asdict(record).items() if value is not None}
    if "tolerance" in entry:
        entry["budget"] = entry.pop("tolerance")
    return entry


def seal(path: Path, start: int, entries: dict, document: dict) -> None:
    """Write the header of a file whose data begin at `start`; move the data if it is too long."""
    text = json.dumps(
        {"__metadata__": {KEY: json.dumps(document, separators=(",", ":"))}, **entries}
    ).encode()
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
    """Raise UserError for a file that exists or cannot be written."""
    if path.suffix != ".safetensors":
        raise UserError(f"{path}: a capture must be a .safetensors file. Change the suffix.")
    if path.exists():
        raise UserError(
            f"{path}: the file exists, and captures are never overwritten. "
            "Delete it, or choose another name."
        )
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
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

    `recipe`, `names` in the order of execution, `records` by name. A plain safetensors file, which
    any language can write, is read as a capture without a recipe. UserError for any other file.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        try:
            infos, metadata = read_header(self.path)
        except UserError as error:
            text = str(error).replace("download it", "capture it")
            raise UserError(text.replace("Download it", "Capture it")) from None
        if KEY in metadata:
            self.recipe, self.records = self._read(metadata[KEY], infos)
        else:
            self.recipe, self.records = {}, {}
            for ordinal, (name, info) in enumerate(infos.items()):
                self.records[name] = Record(ordinal, "full", info.dtype, info.shape)
        self.names = sorted(self.records, key=lambda name: self.records[name].ordinal)
        self._file = safe_open(self.path, framework="pt")

    def _read(self, text: str, stored: Mapping) -> tuple[dict, dict[str, Record]]:
        try:
            document = json.loads(text)
            if document["schema"] not in (1, SCHEMA):
                raise UserError(
                    f"{self.path}: has an unknown schema (got {document['schema']!s:.20}, "
                    f"expected {SCHEMA}). Capture it again, or update flux."
                )
            records = {}
            for name, entry in document["tensors"].items():
                fields = dict(entry, shape=tuple(entry["shape"]))
                fields["tolerance"] = fields.pop("budget", None)
                records[name] = record = Record(**fields)
                if record.kind != "statistics" and (record.same or name) not in stored:
                    raise KeyError(name)
            recipe = document["recipe"]
            if document["schema"] == 1:
                records = _upgrade(records, self.path)
                recipe = {RENAMED_IN_2.get(key, key): value for key, value in recipe.items()}
            return recipe, records
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(
                f"{self.path}: is a damaged capture ({error!s:.80}). Capture it again."
            ) from None

    @cached_property
    def tensors(self) -> "Tensors":
        """Return a mapping from names to the stored values."""
        return Tensors(self)

    def kind(self, name: str) -> Kind:
        return self.records[name].kind

    def tokens(self, name: str) -> Tensor:
        """Return the L2 norm of each token of a tensor that is stored as a probe."""
        return self._file.get_tensor(f"{self.records[name].same or name}/tokens")


class Tensors(Mapping[str, Tensor]):
    """The stored values of a capture, by name, read from the file on access."""

    def __init__(self, capture: Capture):
        self.capture = capture
        self.names = [name for name in capture.names if capture.kind(name) != "statistics"]

    def __getitem__(self, name: str) -> Tensor:
        return self.capture._file.get_tensor(self.capture.records[name].same or name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


RENAMED_IN_2 = {
    "picture": "image",
    "conditions/start": "conditions/init",
    "pictures": "images",  # of the recipe
    "cfg_scale": "true_cfg_scale",
}
CHANGED_IN_2 = re.compile(
    r".*(?:(?:img_mod|txt_mod|modulation|modulation_img|modulation_txt)/(?:in|out)\b.*"
    r"|(?:double|single)_blocks\.\d+/in\b.*|references/.*"
    r"|self_attn\.[qk]_norm/(?:in|out)|upsample\.conv/in)"
)


def _upgrade(records: dict[str, Record], path: Path) -> dict[str, Record]:
    """Rename two tensors, and drop those of another meaning, with a warning.

    Schema 1 recorded silu(vec) as a modulation's input and 1 + scale as its output, norms of the
    language model's q and k with heads last, and a decoder's input before it is enlarged.
    """
    kept = {}
    for name, record in records.items():
        if not CHANGED_IN_2.fullmatch(name):
            stored = record.same or name
            kept[RENAMED_IN_2.get(name, name)] = replace(record, same=stored)
    if skipped := len(records) - len(kept):
        warnings.warn(
            f"{path}: was captured by an older version. {skipped:,} tensors (modulations, inputs "
            "of blocks, cached references and others) are recorded differently now, and skipped.",
            stacklevel=2,
        )
    return kept


def set_tolerances(path: str | Path, tolerances: Mapping[str, float]) -> None:
    """Store the tolerance (relative L2) of tensors in a capture."""
    known = Capture(path).records
    for name in tolerances:
        if name not in known:
            raise UserError(f"{path}: has no tensor {name} to set a tolerance for.")

    def write(document: dict) -> None:
        for name, tolerance in tolerances.items():
            document["tensors"][name]["budget"] = tolerance

    amend(Path(path), write)


def amend(path: Path, change: Callable[[dict], None]) -> None:
    """Change the metadata of a capture; the file is replaced at once, or stays as it is."""
    part = path.parent / f".{uuid4().hex}.part"
    try:
        shutil.copyfile(path, part)
        with part.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            entries = json.loads(file.read(length))
        metadata = entries.pop("__metadata__", {})
        if KEY not in metadata:
            raise UserError(
                f"{path}: is a plain file and cannot store tolerances. Capture it with parity.py."
            )
        document = json.loads(metadata[KEY])
        change(document)
        seal(part, 8 + length, entries, document)
        os.replace(part, path)
    except OSError as error:
        raise cannot_write(path, error) from error
    finally:
        part.unlink(missing_ok=True)
