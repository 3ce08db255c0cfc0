"""A second, strict reader of safetensors files and JSON, which shares no code with flux.

Source of the rules: https://github.com/huggingface/safetensors#format.
"""

import json
import math
from pathlib import Path
from typing import Any, NamedTuple

BITS = {"F64": 64, "I64": 64, "U64": 64, "C64": 64, "F32": 32, "I32": 32, "U32": 32}
BITS |= dict.fromkeys(("F16", "BF16", "I16", "U16"), 16)
BITS |= dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8)
BITS |= {"F8_E4M3FNUZ": 8, "F8_E5M2FNUZ": 8, "F6_E2M3": 6, "F6_E3M2": 6, "F4": 4}


class Unsound(Exception):
    """The file breaks a rule of its format."""


class Entry(NamedTuple):
    dtype: str
    shape: tuple[int, ...]
    data: bytes


def require(condition: object, rule: str) -> None:
    if not condition:
        raise Unsound(rule)


def strict_json(text: bytes) -> Any:
    """Parse JSON; Unsound for a name that is there twice, for NaN, for bytes that are no text."""

    def table(pairs: list[tuple[str, Any]]) -> dict:
        require(len(dict(pairs)) == len(pairs), "a name is there twice")
        return dict(pairs)

    def constant(name: str) -> None:
        raise Unsound(f"{name} is not JSON")

    try:
        return json.loads(text.decode(), object_pairs_hook=table, parse_constant=constant)
    except (ValueError, RecursionError) as error:
        raise Unsound(f"not JSON: {error}") from None


def read_safetensors(path: Path) -> tuple[dict[str, Entry], dict[str, str]]:
    """Return the tensors by name, and the metadata. Unsound if the file breaks a rule."""
    content = path.read_bytes()
    require(len(content) >= 8, "the header's length is missing")
    length = int.from_bytes(content[:8], "little")
    require(length <= min(len(content) - 8, 100_000_000), "the header ends after the file")
    text, data = content[8 : 8 + length], content[8 + length :]
    require(text[:1] == b"{", "the header does not begin with {")
    header = strict_json(text)
    metadata = header.pop("__metadata__", None) or {}
    require(isinstance(metadata, dict), "metadata are no table")
    require(all(isinstance(value, str) for value in metadata.values()), "metadata are no text")
    tensors, spans = {}, []
    for name, entry in header.items():
        require(isinstance(entry, dict), "an entry is no table")
        require(set(entry) == {"dtype", "shape", "data_offsets"}, "an entry has other fields")
        dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
        require(isinstance(dtype, str) and dtype in BITS, "unknown dtype")
        require(isinstance(shape, list) and isinstance(offsets, list), "no list")
        require(len(offsets) == 2, "offsets are not two")
        for number in shape + offsets:
            require(type(number) is int and 0 <= number < 2**63, "no size")
        begin, end = offsets
        require(8 * (end - begin) == math.prod(shape) * BITS[dtype], "size and shape differ")
        spans.append((begin, end))
        tensors[name] = Entry(dtype, tuple(shape), data[begin:end])
    position = 0
    for begin, end in sorted(spans):
        require(begin == position, "a hole or an overlap")
        position = end
    require(position == len(data), "bytes after the last tensor")
    return tensors, metadata
