"""Damage files, each kind of file in its own structure, by a seeded random number generator.

A mutator takes a `random.Random` and the bytes of a sound file, and returns what it did and the
damaged bytes. `MUTATORS` has one list for each kind of file.
"""

import json
import re
import struct
import zlib
from collections.abc import Callable
from random import Random
from typing import Any, NamedTuple

Mutator = Callable[[Random, bytes], tuple[str, bytes]]


def mutate(random: Random, data: bytes, mutators: list[Mutator]) -> tuple[str, bytes]:
    """Apply one mutator or, more rarely, two or three. Return what they did, and the bytes."""
    done = []
    for _ in range(random.choice((1, 1, 1, 2, 3))):
        try:
            text, data = random.choice(mutators)(random, data)
        # an earlier one broke the structure
        except (ValueError, LookupError, TypeError, RecursionError, struct.error):
            text, data = flip_bits(random, data)
        done.append(text)
    return ", ".join(done), data


# ---------------------------------------------------------------- bytes


def flip_bits(random: Random, data: bytes) -> tuple[str, bytes]:
    changed, places = bytearray(data or b"\0"), []
    for _ in range(random.choice((1, 1, 2, 8))):
        places.append(random.randrange(len(changed)))
        changed[places[-1]] ^= 1 << random.randrange(8)
    return f"flip bits of bytes {places}", bytes(changed)


def truncate(random: Random, data: bytes) -> tuple[str, bytes]:
    end = random.choice((0, 1, 7, 8, len(data) - 1, random.randrange(len(data) + 1)))
    return f"end after {end} bytes", data[:end]


def extend(random: Random, data: bytes) -> tuple[str, bytes]:
    more = random.choice((b"\0", b"\n", b"}", random.randbytes(9), data[:64]))
    return f"append {more[:9]!r}", data + more


def swap_chunks(random: Random, data: bytes) -> tuple[str, bytes]:
    a, b, c = sorted(random.randrange(len(data) + 1) for _ in range(3))
    return f"swap {a}:{b} and {b}:{c}", data[:a] + data[b:c] + data[a:b] + data[c:]


def overwrite(random: Random, data: bytes) -> tuple[str, bytes]:
    new = random.choice(
        (b"\xff\xfe", b"\0" * 16, b"\xed\xa0\x80", b"\xff" * 8, b"\r\n", b'"', b"[")
    )
    place = random.randrange(len(data) + 1)
    return f"write {new!r} at {place}", data[:place] + new + data[place + len(new) :]


def insert(random: Random, data: bytes) -> tuple[str, bytes]:
    new = random.choice((b"\0", b"\x1b]0;x\x07", b"\xc3", b"\xe2\x80\xa8", b"\n", b",", b"9" * 40))
    place = random.randrange(len(data) + 1)
    return f"insert {new!r} at {place}", data[:place] + new + data[place:]


BYTES: list[Mutator] = [flip_bits, truncate, extend, swap_chunks, overwrite, insert]


def change_integer(random: Random, data: bytes) -> tuple[str, bytes]:
    """Write an extreme little-endian integer over 4 or 8 of the first 400 bytes."""
    size = random.choice((4, 8))
    place = random.randrange(max(1, min(400, len(data) - size)))
    number = random.choice((0, 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63 - 1, 2**64 - 1))
    new = (number % 2 ** (8 * size)).to_bytes(size, "little")
    return f"write {number} at {place}", data[:place] + new + data[place + size :]


# ---------------------------------------------------------------- JSON


class Raw(str):
    """A JSON text that is written as it is."""


class Pairs(list):
    """A JSON object as [name, value] pairs, so that a name may be there twice."""


def parse_json(text: str | bytes) -> Any:
    return json.loads(text, object_pairs_hook=lambda pairs: Pairs([list(pair) for pair in pairs]))


def to_json(value: Any) -> str:
    if isinstance(value, Raw):
        return str(value)
    if isinstance(value, Pairs):
        return "{" + ",".join(f"{to_json(name)}:{to_json(x)}" for name, x in value) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(to_json, value)) + "]"
    return json.dumps(value)


ODD: tuple[Any, ...] = (  # values that a field should not have
    *map(Raw, ("NaN", "-Infinity", "1e999", "9" * 400, "9" * 5000, '"\\ud800"', "-0.0", "2.0")),
    *map(Raw, ("[" * 900 + "]" * 900, "[" * 200_000, '{"a":' * 500 + "0" + "}" * 500, "tru")),
    *(None, True, False, 0, 1, -1, 0.5, 5000, 2**31, 2**63, 2**64, -(2**63) - 1),
    *("", "x", "\0", "\x1b[31m", "a\nb", "../../x", "/dev/zero", "é" * 300, "1", "float32"),
    *([], [[]], [1, 2], ["x"], Pairs(), Pairs([["x", 1]])),
)


class Place(NamedTuple):
    """One value inside of a JSON document: an item of a list, or the second item of a pair."""

    parent: list  # a list or Pairs
    number: int

    @property
    def named(self) -> bool:
        return isinstance(self.parent, Pairs)

    @property
    def value(self) -> Any:
        return self.parent[self.number][1] if self.named else self.parent[self.number]

    @value.setter
    def value(self, new: Any) -> None:
        if self.named:
            self.parent[self.number][1] = new
        else:
            self.parent[self.number] = new

    def __str__(self) -> str:
        return f"{self.parent[self.number][0]!r:.60}" if self.named else f"item {self.number}"


def places(value: Any) -> list[Place]:
    """Return the places of all values below `value`."""
    found: list[Place] = []
    if isinstance(value, list):
        for number in range(len(value)):
            place = Place(value, number)
            found += [place, *places(place.value)]
    return found


def put_odd(random: Random, place: Place, other: Place) -> str:
    new = random.choice(ODD)
    text = f"put {to_json(new)[:40]} at {place}"
    place.value = new
    return text


def drop(random: Random, place: Place, other: Place) -> str:
    text = f"drop {place}"
    del place.parent[place.number]
    return text


def double(random: Random, place: Place, other: Place) -> str:
    new = list(place.parent[place.number]) if place.named else place.value
    if place.named and random.random() < 0.5:
        new[1] = random.choice(ODD)
    text = f"double {place}"
    place.parent.insert(random.randrange(len(place.parent) + 1), new)
    return text


def rename(random: Random, place: Place, other: Place) -> str:
    """Give a value another name: an odd one, or that of a neighbour."""
    if not place.named:
        return put_odd(random, place, other)
    pair = place.parent[place.number]
    old = str(pair[0])
    names = [old.upper(), old[:-1], f"{old}.1", *("", "x", "\n", "\x1b[2J", "é", "__metadata__")]
    names += [re.sub(r"\d+", "9" * 5000, old), old.replace(".", "." * 3000)]
    names += [neighbour[0] for neighbour in place.parent[:50]]
    pair[0] = random.choice([*names, Raw('"\\udc00"')])
    return f"rename {old!r:.60} to {pair[0]!r:.40}"


def copy_over(random: Random, place: Place, other: Place) -> str:
    """Copy a number or text from elsewhere; a list or table becomes null."""
    value = None if isinstance(other.value, list) else other.value
    place.value = value
    return f"copy {value!r:.40} to {place}"


def exchange(random: Random, place: Place, other: Place) -> str:
    """Exchange two values, unless one may hold the other."""
    if isinstance(place.value, list) or isinstance(other.value, list):
        return copy_over(random, place, other)
    place.value, other.value = other.value, place.value
    return f"exchange {place} and {other}"


def nest(random: Random, place: Place, other: Place) -> str:
    place.value = [place.value]
    return f"put {place} into a list"


CHANGES = (put_odd, put_odd, drop, double, rename, copy_over, exchange, nest)


def change_value(random: Random, document: Any) -> tuple[str, Any]:
    """Change one place of a parsed document; return what was done, and the document."""
    found = places(document)
    if not found or random.random() < 0.03:
        new = random.choice(ODD)
        return f"replace all by {to_json(new)[:40]}", new
    change, place, other = random.choice(CHANGES), random.choice(found), random.choice(found)
    return change(random, place, other), document


def mutate_json(random: Random, data: bytes) -> tuple[str, bytes]:
    text, document = change_value(random, parse_json(data))
    return text, to_json(document).encode()


JSON: list[Mutator] = [mutate_json] * 8 + BYTES


def mutate_table(random: Random, data: bytes) -> tuple[str, bytes]:
    """Change the JSON list that ends a text."""
    start = data.index(b"[{")
    text, table = mutate_json(random, data[start:])
    return text, data[:start] + table


TABLE: list[Mutator] = [mutate_table] * 8 + BYTES  # a caption with a table of boxes


def mutate_json_line(random: Random, data: bytes) -> tuple[str, bytes]:
    """Change the JSON document of one line."""
    lines = data.split(b"\n")
    number = random.randrange(len(lines))
    text, lines[number] = mutate_json(random, lines[number])
    return f"line {number + 1}: {text}", b"\n".join(lines)


def mutate_lines(random: Random, data: bytes) -> tuple[str, bytes]:
    """Drop, double, swap or damage lines."""
    lines = data.splitlines(keepends=True)
    a, b = random.randrange(len(lines)), random.randrange(len(lines))
    action = random.choice(("drop", "double", "swap", "cut", "fields"))
    if action == "drop":
        del lines[a]
    elif action == "double":
        lines.insert(b, lines[a])
    elif action == "swap":
        lines[a], lines[b] = lines[b], lines[a]
    elif action == "cut":
        lines[a] = lines[a][: random.randrange(len(lines[a]) + 1)]
    else:
        fields = lines[a].split(b",")
        odd = (b"nan", b"-inf", b"", b"1e999", b"x", b'"', b"-1", b"9" * 5000, b"\xff", b"\xd9\xa3")
        fields[random.randrange(len(fields))] = random.choice(odd)
        lines[a] = b",".join(fields)
    return f"{action} line {a + 1}", b"".join(lines)


LINES: list[Mutator] = [mutate_lines] * 4 + BYTES
JSON_LINES: list[Mutator] = [mutate_json_line] * 8 + LINES


# ---------------------------------------------------------------- safetensors

DTYPES = ("F64", "F32", "F16", "BF16", "I64", "I32", "U32", "U16", "U8", "BOOL", "C64", "F8_E4M3")
DTYPES += ("F8_E5M2", "F8_E8M0", "F8_E4M3FNUZ", "F6_E2M3", "F4", "X", "f32")


def split_safetensors(data: bytes) -> tuple[Pairs, bytes]:
    """Return the parsed header and the bytes of the tensors."""
    (length,) = struct.unpack("<Q", data[:8])
    header = parse_json(data[8 : 8 + length])
    if not isinstance(header, Pairs):
        raise ValueError("no object")
    return header, data[8 + length :]


def join_safetensors(header: Any, data: bytes) -> bytes:
    text = to_json(header).encode("utf-8", "surrogatepass")
    return struct.pack("<Q", len(text)) + text + data


def tensor_entries(header: Pairs) -> list[list]:
    """Return the [name, {dtype, shape, data_offsets}] pairs of the tensors."""
    return [pair for pair in header if pair[0] != "__metadata__" and len(pair[1]) == 3]


def field(entry: Pairs, name: str) -> list:
    (pair,) = (pair for pair in entry if pair[0] == name)  # ValueError if an earlier damage hit it
    return pair


def mutate_header(random: Random, data: bytes) -> tuple[str, bytes]:
    header, tensors = split_safetensors(data)
    text, header = change_value(random, header)
    return f"header: {text}", join_safetensors(header, tensors)


def mutate_entry(random: Random, data: bytes) -> tuple[str, bytes]:
    """Change a tensor's name, dtype, shape or place to another plausible one."""
    header, tensors = split_safetensors(data)
    entries = tensor_entries(header)
    ours, other = random.choice(entries), random.choice(entries)
    name, entry = ours
    dtype, shape, offsets = (field(entry, x) for x in ("dtype", "shape", "data_offsets"))
    action = random.choice(("dtype", "shape", "offsets", "name", "swap", "drop", "double", "dims"))
    if action == "dtype":
        dtype[1] = random.choice(DTYPES)
    elif action == "shape":
        numbers = shape[1]
        shape[1] = random.choice(
            (numbers[::-1], [1, *numbers], [*numbers, 1], numbers[1:], [0, *numbers], [*numbers, 2])
        )
    elif action == "dims":
        shape[1] = [1] * random.choice((63, 64, 65, 70, 1000)) + shape[1]
    elif action == "offsets":
        step = random.choice((-8, -1, 1, 8, 2**40))
        which = random.choice(((0,), (1,), (0, 1)))
        offsets[1] = [x + step * (i in which) for i, x in enumerate(offsets[1])]
    elif action == "name":
        ours[0] = random.choice((other[0], name + ".x", name.replace("0", "1"), name[1:]))
    elif action == "swap":  # the other tensor's values under this name
        ours[0], other[0] = other[0], ours[0]
    else:  # and its bytes, so that the rest is sound
        begin, end = offsets[1]
        part, size = tensors[begin:end], end - begin
        if action == "drop":
            header.remove(ours)
            tensors = tensors[:begin] + tensors[end:]
            for _, rest in tensor_entries(header):
                pair = field(rest, "data_offsets")
                pair[1] = [x - size if x >= end else x for x in pair[1]]
        else:
            places = Pairs([["dtype", dtype[1]], ["shape", shape[1]]])
            places.append(["data_offsets", [len(tensors), len(tensors) + size]])
            name += random.choice((".x", "", ".1", "2"))
            header.append([name, places])
            tensors += part
    return f"{action} of {ours[0]!r:.80}", join_safetensors(header, tensors)


def mutate_values(random: Random, data: bytes) -> tuple[str, bytes]:
    """Overwrite numbers of a tensor: NaN, infinity, the largest, zeros, random bytes."""
    header, tensors = split_safetensors(data)
    name, entry = random.choice(tensor_entries(header))
    begin, end = field(entry, "data_offsets")[1]
    patterns = (b"\xff\xff\xff\x7f", b"\0\0\x80\x7f", b"\x80\xff\x80\xff", b"\xff" * 4, b"\0" * 4)
    pattern = random.choice((*patterns, random.randbytes(4), b"\xff\xff\x7f\x7f"))
    size = end - begin
    length = random.choice((1, 4, 4, 8, size))
    new = (pattern * (size // 4 + 1))[: min(length, size)]
    place = begin + random.randrange(max(1, size - len(new) + 1)) // 4 * 4
    tensors = tensors[:place] + new + tensors[place + len(new) :]
    return f"{new[:4]!r} in {name!r:.80}", join_safetensors(header, tensors[: len(data)])


def mutate_metadata(random: Random, data: bytes) -> tuple[str, bytes]:
    """Change the metadata, or the JSON document inside of one of their values."""
    header, tensors = split_safetensors(data)
    if not any(pair[0] == "__metadata__" for pair in header):
        header.insert(0, ["__metadata__", Pairs([["format", "pt"]])])
    metadata = field(header, "__metadata__")
    pair = random.choice(metadata[1])
    try:
        document = parse_json(pair[1])
    except ValueError:
        document = None
    if isinstance(document, list) and random.random() < 0.9:
        text, document = change_value(random, document)
        pair[1] = to_json(document)
    else:
        text, metadata[1] = change_value(random, metadata[1])
    return f"metadata: {text}", join_safetensors(header, tensors)


def mutate_length(random: Random, data: bytes) -> tuple[str, bytes]:
    """Lie about the length of the header, or give the header another start."""
    (length,) = struct.unpack("<Q", data[:8])
    numbers = (0, 1, length - 1, length + 1, len(data), 10**8, 10**8 + 1, 2**63, 2**64 - 1)
    number = random.choice(numbers)
    return f"header of {number} bytes", struct.pack("<Q", number) + data[8:]


def pad_header(random: Random, data: bytes) -> tuple[str, bytes]:
    """Put white space or other bytes around the header."""
    (length,) = struct.unpack("<Q", data[:8])
    before, after = random.choice(
        ((b"", b" " * 9), (b"\n", b""), (b"\xef\xbb\xbf", b""), (b"", b"\0"), (b"", b"{}"))
    )
    text = before + data[8 : 8 + length] + after
    return f"pad the header: {before!r} {after!r}", (
        struct.pack("<Q", len(text)) + text + data[8 + length :]
    )


def flip_header(random: Random, data: bytes) -> tuple[str, bytes]:
    """Flip bits of the header, most of whose flips random places in the file would miss."""
    (length,) = struct.unpack("<Q", data[:8])
    text, head = random.choice(BYTES)(random, data[8 : 8 + length])
    return f"header: {text}", struct.pack("<Q", len(head)) + head + data[8 + length :]


SAFETENSORS: list[Mutator] = [
    *[mutate_header] * 3,
    *[mutate_entry] * 6,
    *[mutate_values] * 3,
    *[mutate_metadata] * 3,
    *[flip_header] * 2,
    mutate_length,
    pad_header,
    *BYTES,
]
DOCUMENTS: list[Mutator] = [*[mutate_metadata] * 12, *SAFETENSORS]  # files whose metadata counts
GGUF: list[Mutator] = [*[change_integer] * 6, *BYTES]


# ---------------------------------------------------------------- images


def png_chunks(data: bytes) -> list[tuple[bytes, bytes]]:
    """Return the (type, content) of each chunk of a PNG file."""
    chunks, place = [], 8
    while place < len(data):
        (size,) = struct.unpack(">I", data[place : place + 4])
        chunks.append((data[place + 4 : place + 8], data[place + 8 : place + 8 + size]))
        place += 12 + size
    return chunks


def join_png(chunks: list[tuple[bytes, bytes]]) -> bytes:
    out = b"\x89PNG\r\n\x1a\n"
    for kind, content in chunks:
        checksum = zlib.crc32(kind + content)
        out += struct.pack(">I", len(content)) + kind + content + struct.pack(">I", checksum)
    return out


def mutate_png(random: Random, data: bytes) -> tuple[str, bytes]:
    """Change a chunk, with a right checksum, so that the decoder sees the change."""
    chunks = png_chunks(data)
    number = random.randrange(len(chunks))
    kind, content = chunks[number]
    action = random.choice(("content", "drop", "double", "swap", "type", "size"))
    if action == "content" and content:
        text, content = random.choice(BYTES)(random, content)
        chunks[number] = kind, content
    elif action == "drop":
        del chunks[number]
    elif action == "double":
        chunks.insert(number, chunks[number])
    elif action == "swap":
        other = random.randrange(len(chunks))
        chunks[number], chunks[other] = chunks[other], chunks[number]
    elif action == "type":
        kinds = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf", b"acTL", b"PLTE", b"tRNS", b"IEND")
        chunks[number] = random.choice(kinds), content
    else:
        size = struct.pack(">II", *random.choices((0, 1, 2**31 - 1, 2**32 - 1, 65535, 13), k=2))
        chunks[0] = chunks[0][0], size + chunks[0][1][8:]
    return f"{action} of chunk {kind!r}", join_png(chunks)


def mutate_record(random: Random, data: bytes) -> tuple[str, bytes]:
    """Change the JSON record of a PNG image that flux wrote."""
    chunks = png_chunks(data)
    number = [kind for kind, _ in chunks].index(b"iTXt")
    kind, content = chunks[number]
    head, text = content[:9], content[9:]  # "flux", 0, uncompressed, no language, no translation
    done, document = change_value(random, parse_json(text))
    chunks[number] = kind, head + to_json(document).encode()
    return f"record: {done}", join_png(chunks)


PNG: list[Mutator] = [*[mutate_png] * 6, *BYTES]
IMAGE: list[Mutator] = [*BYTES, change_integer]
RECORD: list[Mutator] = [*[mutate_record] * 12, *PNG]
