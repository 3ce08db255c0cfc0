"""The metadata of a capture: a JSON text, whose every field is checked on reading.

    {"schema": 2, "recipe": {...}, "rounding": {precision: {name: [local, accumulated]}},
     "tensors": {name: {ordinal, kind, dtype, shape, sha256, statistics, same}}}

Anyone can write such a file, and other programs do. What passes these checks can be used without
further ones: numbers are finite, and shapes, kinds and dtypes agree with the stored tensors.
"""

import math
import re
import warnings
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from reprlib import Repr
from typing import Any, Literal, NamedTuple

import torch

from flux.errors import UserError
from flux.plain_files import parse_json
from flux.weights.files import MAX_DIMENSIONS, MAX_HEADER, TensorInfo

Kind = Literal["full", "slice", "probe", "statistics"]
KINDS: tuple[Kind, ...] = ("full", "slice", "probe", "statistics")
SCHEMA = 2
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
SHA256 = re.compile("([0-9a-f]{64})?")
MAX_DEPTH = 16  # of a recipe
MAX_VALUES = 8_000_000  # a tensor has some 50; parsed, 100 MB of empty lists would take 2 GB


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


class Rounding(NamedTuple):
    """Relative L2 to float32; None where it was not measured, or the result was not finite."""

    local: float | None
    accumulated: float | None


class Metadata(NamedTuple):
    recipe: dict
    records: dict[str, Record]
    rounding: dict[str, dict[str, Rounding]]  # precision -> name


# ---------------------------------------------------------------- what a field may hold


class Field(NamedTuple):
    expected: str
    accepts: Callable[[Any], bool]


def is_number(x: Any) -> bool:
    return math.isfinite(x) if type(x) is float else type(x) is int and abs(x) < 2**63


def is_count(x: Any) -> bool:
    return type(x) is int and 0 <= x < 2**63


def is_text(x: Any) -> bool:
    return isinstance(x, str)


def is_list(x: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(x, list) and all(map(accepts, x))


def is_dict(x: Any, accepts: Callable[[Any], bool]) -> bool:
    return isinstance(x, dict) and all(map(accepts, x.values()))


def is_shape(x: Any) -> bool:
    """Return whether the sizes are possible; a tensor without elements has small axes."""
    if not is_list(x, is_count) or len(x) > MAX_DIMENSIONS:
        return False
    return math.prod(max(n, 1) for n in x) < (2**31 if 0 in x else 2**63)


def is_file(x: Any) -> bool:
    if not isinstance(x, dict):
        return False
    texts = is_text(x.get("file")) and is_text(x.get("sha256", ""))
    return texts and is_count(x.get("size", 0)) and is_number(x.get("scale", 1))


def is_plain(x: Any, depth: int = MAX_DEPTH) -> bool:
    """Return whether a JSON value of any kind is shallow, and its numbers are in range."""
    if isinstance(x, dict):
        x = list(x.values())
    if isinstance(x, list):
        return depth > 0 and all(is_plain(item, depth - 1) for item in x)
    return x is None or isinstance(x, str | bool) or is_number(x)


def is_pair(x: Any) -> bool:
    return isinstance(x, list) and len(x) == 2 and all(y is None or is_distance(y) for y in x)


def is_distance(x: Any) -> bool:
    return is_number(x) and x >= 0


def optional(field: Field) -> Field:
    return Field(f"{field.expected}, or null", lambda x: x is None or field.accepts(x))


TEXT = Field("text", is_text)
COUNT = Field("a whole number from 0 on", is_count)
POSITIVE = Field("a whole number from 1 on", lambda x: is_count(x) and x > 0)
NUMBER = Field("a finite number", is_number)
DISTANCE = Field("a finite number from 0 on", is_distance)
NUMBERS = Field("a list of finite numbers", lambda x: bool(x) and is_list(x, is_number))
FILES = Field("a list of files, each with its name in `file`", lambda x: is_list(x, is_file))
PAIR = Field("two distances, each null or a finite number from 0 on", is_pair)
OBJECT = Field("an object", lambda x: isinstance(x, dict))
ANYTHING = Field(f"finite numbers, and no more than {MAX_DEPTH} levels", is_plain)

TENSOR = {
    "ordinal": COUNT,
    "kind": Field(f"one of {', '.join(KINDS)}", lambda x: x in KINDS),
    "dtype": Field(f"one of {', '.join(DTYPES.values())}", lambda x: x in DTYPES.values()),
    "shape": Field(f"a list of at most {MAX_DIMENSIONS} sizes", is_shape),
    "sha256": Field("64 hexadecimal digits", lambda x: is_text(x) and bool(SHA256.fullmatch(x))),
    "statistics": optional(OBJECT),
    "same": optional(TEXT),
    "budget": optional(DISTANCE),  # one for all precisions, in older files: "rounding" has each
}
STATISTICS = {
    "nan": COUNT,
    "inf": COUNT,
    "min": NUMBER,
    "max": NUMBER,
    "mean": NUMBER,
    "std": DISTANCE,
    "l2": DISTANCE,
    "histogram": Field(
        f"a list of {BINS} counts", lambda x: is_list(x, is_count) and len(x) == BINS
    ),
}
RUN_DTYPES = ("float64", "float32", "float16", "bfloat16")
RECIPE = {
    "model": TEXT,
    "mode": TEXT,
    "prompt": TEXT,
    "negative_prompt": optional(TEXT),
    "width": POSITIVE,
    "height": POSITIVE,
    "steps": POSITIVE,
    "guidance": optional(NUMBERS),
    "true_cfg_scale": optional(
        Field("a number or a list of numbers", lambda x: is_number(x) or NUMBERS.accepts(x))
    ),
    "seed": COUNT,
    "images": optional(OBJECT),
    "dtype": Field(f"one of {', '.join(RUN_DTYPES)}", lambda x: is_text(x) and x in RUN_DTYPES),
    "numerics": TEXT,
    "device": TEXT,
    "threads": POSITIVE,
    "attention": Field("a list of texts", lambda x: is_list(x, is_text)),
    "versions": Field("an object of texts", lambda x: is_dict(x, is_text)),
    "files": Field(
        f"an object; each value is {FILES.expected}", lambda x: is_dict(x, FILES.accepts)
    ),
    "loras": FILES,
    "schedule": NUMBERS,
    "stopped": TEXT,
}


# ---------------------------------------------------------------- reading


def parse(text: str, stored: Mapping[str, TensorInfo], path: Path) -> Metadata:
    """Read the JSON text of the capture `path`, which stores the tensors `stored`.

    UserError that names the first field that is wrong.
    """
    return check(parse_document(text, path), stored, path)


def parse_document(text: str, path: Path) -> Any:
    """Read the JSON text strictly, before any field is checked."""
    if sum(map(text.count, "[{,")) > MAX_VALUES:
        raise _damaged(path, f"its metadata hold more than {MAX_VALUES:,} values")
    try:
        return parse_json(text, MAX_HEADER)
    except ValueError as error:
        raise _damaged(path, f"its metadata are not a JSON text ({error!s:.160})") from None


def check(document: Any, stored: Mapping[str, TensorInfo], path: Path) -> Metadata:
    """Check every field of the document, and return what the fields mean in schema 2."""
    _require(path, "its metadata", document, OBJECT)
    schema, recipe = document.get("schema"), document.get("recipe")
    if type(schema) is not int or schema not in (1, SCHEMA):
        raise UserError(
            f"{path}: has an unknown schema (got {_shown(schema)}, expected {SCHEMA}). "
            "Capture it again, or update flux."
        )
    _require(path, "recipe", recipe, OBJECT)
    if schema == 1:
        recipe = _renamed(recipe, path)
    for key, value in recipe.items():
        for field in (ANYTHING, RECIPE.get(key, ANYTHING)):
            _require(path, f"{_shown(key)} of recipe", value, field)
    tensors = document.get("tensors")
    _require(path, "tensors", tensors, OBJECT)
    records = {name: _record(name, entry, path) for name, entry in tensors.items()}
    _check_stored(records, stored, path)
    if schema == 1:
        records = _upgrade(records, path)
    return Metadata(recipe, records, _rounding(document.get("rounding", {}), path))


def _record(name: str, entry: Any, path: Path) -> Record:
    where = f"tensor {_shown(name)}"
    _require(path, where, entry, OBJECT)
    _check_fields(path, where, entry, TENSOR, ("ordinal", "kind", "dtype", "shape"))
    fields = dict(entry, shape=tuple(entry["shape"]))
    fields.pop("budget", None)
    record = Record(**fields)
    size = math.prod(record.shape)
    if record.statistics is not None:
        found = record.statistics
        _check_fields(path, f"statistics of {where}", found, STATISTICS, ("nan", "inf"))
        if found["nan"] + found["inf"] > size:
            raise _damaged(path, f"{where} has statistics of more values than the tensor has")
    elif record.kind != "full":
        raise _damaged(path, f"{where} has no statistics")
    if record.kind == "probe" and not size:
        raise _damaged(path, f"{where} is a probe of no values")
    return record


def _check_fields(
    path: Path, where: str, entry: dict, fields: Mapping[str, Field], required: tuple[str, ...]
) -> None:
    for key, value in entry.items():
        if key not in fields:
            raise _damaged(path, f"{where} has an unknown field {_shown(key)}")
        _require(path, f"{key} of {where}", value, fields[key])
    for key in required:
        if key not in entry:
            raise _damaged(path, f"{where} has no {key}")


def _rounding(stored: Any, path: Path) -> dict[str, dict[str, Rounding]]:
    _require(path, "rounding", stored, OBJECT)
    for precision, tensors in stored.items():
        where = f"{_shown(precision)} of rounding"
        _require(path, where, tensors, OBJECT)
        for name, pair in tensors.items():
            _require(path, f"{_shown(name)} in {where}", pair, PAIR)
    return {
        precision: {name: Rounding(*pair) for name, pair in tensors.items()}
        for precision, tensors in stored.items()
    }


def _check_stored(
    records: Mapping[str, Record], stored: Mapping[str, TensorInfo], path: Path
) -> None:
    """Compare the records with the tensors in the file."""
    described = set()
    for name, record in records.items():
        for key, dtype, shape in _stored_parts(name, record):
            described.add(key)
            if key not in stored:
                raise _damaged(path, f"tensor {_shown(key)} is not in the file")
            found = stored[key]
            if (found.dtype, found.shape) != (dtype, shape):
                raise _damaged(
                    path,
                    f"tensor {_shown(key)} is {found.dtype} of shape {found.shape} in the file, "
                    f"and {dtype} of shape {shape} in the metadata",
                )
    if unknown := stored.keys() - described:
        raise _damaged(path, f"the metadata say nothing about tensor {_shown(min(unknown))}")


def _stored_parts(name: str, record: Record) -> list[tuple[str, str, tuple[int, ...]]]:
    """Return the name, dtype and shape of each stored tensor that belongs to a record."""
    name, shape = record.same or name, record.shape
    if record.kind == "statistics":
        return []
    if record.kind == "full":
        return [(name, record.dtype, shape)]
    if record.kind == "slice":
        return [(name, record.dtype, tuple(min(n, SLICE) for n in shape))]
    if len(shape) < 2:
        norms: tuple[int, ...] = (1,)
    else:
        norms = (shape[0],) if len(shape) == 2 else (shape[0], shape[-2])
    return [(name, record.dtype, (PROBE,)), (f"{name}/tokens", "F32", norms)]


def _require(path: Path, where: str, value: Any, field: Field) -> None:
    if not field.accepts(value):
        raise _damaged(path, f"{where} must be {field.expected} (got {_shown(value)})")


def _damaged(path: Path, problem: str) -> UserError:
    return UserError(f"{path}: is a damaged capture: {problem}. Capture it again.")


def _shown(value: Any) -> str:
    """Return the beginning of a value, which may be huge."""
    return f"{REPR.repr(value):.160}"


REPR = Repr()
REPR.maxstring = REPR.maxother = 80


# ---------------------------------------------------------------- schema 1

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
    kept = {
        name: replace(record, same=record.same or name)
        for name, record in records.items()
        if not CHANGED_IN_2.fullmatch(name)
    }
    if skipped := len(records) - len(kept):
        warnings.warn(
            f"{path}: was captured by an older version. {skipped:,} tensors (modulations, inputs "
            "of blocks, cached references and others) are recorded differently now, and skipped.",
            stacklevel=2,
        )
    return _renamed(kept, path)


def _renamed(values: dict, path: Path) -> dict:
    renamed = {RENAMED_IN_2.get(name, name): value for name, value in values.items()}
    if len(renamed) < len(values):
        raise _damaged(path, "a name of the present version stands beside its older name")
    return renamed


# ---------------------------------------------------------------- writing


def to_entry(record: Record) -> dict:
    """Return a record as the file has it."""
    return {key: value for key, value in asdict(record).items() if value is not None}
