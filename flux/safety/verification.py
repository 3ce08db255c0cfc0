"""What an image file carries about its origin, and whether what it carries holds.

Nothing is fetched from a network. What nobody signed proves nothing: anyone can write a record.
"""

import math
import os
from pathlib import Path
from typing import Any, NamedTuple
from xml.etree import ElementTree

from PIL import Image

from flux.errors import UserError
from flux.image_io.input import open_image, round_to_16
from flux.image_io.metadata import REQUIRED, source_type, with_current_names, wrong_values
from flux.image_io.output import record_text
from flux.plain_files import parse_json
from flux.safety import marking, signing

IPTC = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}"
RDF = "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"


class Finding(NamedTuple):
    """One thing that an image carries."""

    kind: str  # "pixels", "record", "source type", "watermark" or "signature"
    holds: bool
    text: str
    value: Any = None  # what was read, as values of JSON


def verify(path: Path, roots: bytes | None = None) -> list[Finding]:
    """Return what an image file carries; an empty list if it carries nothing.

    `roots`: certificates in PEM, one of which a signature must lead to.

    Pixels are a finding if they are damaged. UserError unless `path` is a plain file.
    """
    path = Path(path)
    try:
        image = _load(path)
    except UserError as error:
        if not path.is_file():
            raise
        problem = str(error).removeprefix(f"{path}: ")
        return [Finding("pixels", False, problem)]
    text = record_text(image)
    findings = [] if text is None else [check_record(text, image.size)]
    record = findings[0].value if findings and findings[0].holds else None
    terms = source_types(image.info.get("xmp") or b"")
    if terms is not None:
        findings.append(check_source_types(terms, record))
    signature = check_signature(path.read_bytes(), image.format, roots)
    bound = bound_mark(signature[0].value if signature else None)
    return findings + check_watermarks(marking.find(image), record, bound) + signature


def _load(path: Path) -> Image.Image:
    """Return the image with all of its pixels. UserError for any damage that the format shows."""
    with open_image(path) as image:
        if image.format == "PNG":
            image.verify()  # the checksums of all chunks, which loading does not look at
    with open_image(path) as image:
        image.load()
        return image


def check_record(text: str, size: tuple[int, int]) -> Finding:
    """Check the JSON of an image of `size` (width, height) pixels: whole, typed, of this size.

    An image made of a padded one is up to 15 pixels smaller than its record says.
    """
    try:
        record = parse_json(text)
        if not isinstance(record, dict):
            raise ValueError("is no object")
    except (TypeError, ValueError) as error:
        return Finding("record", False, f"is damaged ({error!s:.80})")
    wrong = wrong_values(with_current_names(record), REQUIRED)
    if not isinstance(record.get("image_options"), dict | None):
        wrong.append("image_options")
    if wrong:
        return Finding("record", False, f"lacks, or has wrong: {', '.join(wrong)}", record)
    said = record["width"], record["height"]
    cropped = record.get("cropped") is True and size[0] <= said[0] and size[1] <= said[1]
    if round_to_16(size, math.ceil) != said and not cropped:
        told = f"is of {said[0]}x{said[1]} pixels, but the image has {size[0]}x{size[1]}"
        return Finding("record", False, told, record)
    return Finding("record", True, f"{record['model']}, seed {record['seed']}, unsigned", record)


def source_types(xmp: bytes | str) -> list[str] | None:
    """Return the values of IPTC's DigitalSourceType in an XMP packet, however RDF spells them.

    An empty list: the packet is not XML, or declares entities, which may grow without bound.
    None: there is no such property.
    """
    xmp = xmp.encode() if isinstance(xmp, str) else xmp
    name = f"{IPTC}DigitalSourceType"
    if b"DigitalSourceType" not in xmp:
        return None
    try:
        if b"<!DOCTYPE" in xmp:
            raise ElementTree.ParseError
        root = ElementTree.fromstring(xmp.strip(b"\0 \r\n\t"))
    except (ElementTree.ParseError, ValueError, RecursionError):
        return []
    found = []
    for element in root.iter():
        if name in element.attrib:
            found.append(element.attrib[name])
        if element.tag == name:
            found.append(element.attrib.get(f"{RDF}resource") or (element.text or "").strip())
    return found or None


def check_source_types(values: list[str], record: dict | None) -> Finding:
    """Check that there is one value, and that the value is the one of the record."""
    kind = "source type"
    if len(set(values)) != 1:
        told = f"has {len(set(values))} different values" if values else "is in damaged XMP"
        return Finding(kind, False, told, values)
    term = values[0].rpartition("/")[2]
    expected = source_type(record) if record else None
    if expected and values[0] != expected:
        told = f"is {term}, but the record means {expected.rpartition('/')[2]}"
        return Finding(kind, False, told, values[0])
    return Finding(kind, True, f"{term}, unsigned", values[0])


def check_watermarks(
    found: dict[str, str], record: dict | None, bound: str | None = None
) -> list[Finding]:
    """Check the marks that were found in the pixels against those that are claimed.

    record: may claim a mark. bound: the payload that the manifest is bound to.
    """
    kind, claimed = "watermark", record.get("watermark") if record else None
    if claimed and str(claimed) not in found:
        told = f"the record says {claimed!s:.40}, but the pixels carry no such mark"
        return [Finding(kind, False, told, found)]
    if bound is not None and found.get("tile") != bound:
        told = f"the manifest is bound to tile {bound:.40}, which the pixels do not carry"
        return [Finding(kind, False, told, found)]
    if record and "tile" in found and found["tile"] != f"{marking.payload_of(record):012x}":
        return [Finding(kind, False, f"tile {found['tile']} is that of another record", found)]
    text = ", ".join(f"{name} {value}" for name, value in found.items())
    return [Finding(kind, True, text, found)] if found else []


def bound_mark(manifest: Any) -> str | None:
    """Return the payload of the tile that a manifest is bound to; None if it is bound to none."""
    try:
        for assertion in manifest["assertions"]:
            if assertion["label"].startswith("c2pa.soft-binding"):
                data = assertion["data"]
                if data["alg"] == signing.TILE:
                    return str(data["blocks"][0]["value"])
    except (TypeError, LookupError, AttributeError):  # of another program
        pass
    return None


def check_signature(data: bytes, form: str | None, roots: bytes | None) -> list[Finding]:
    """Check the C2PA manifest of a file. What cannot be checked does not hold."""
    kind = "signature"
    if not signing.has_manifest(data):
        return []
    if form not in signing.MIME:
        return [Finding(kind, False, f"is not checked in files of {form}")]
    try:
        state, problems, manifest = signing.read(data, signing.MIME[form], roots)
    except UserError as error:
        return [Finding(kind, False, f"cannot be checked: {error}")]
    if not state:
        return [Finding(kind, False, "is damaged: a manifest is there, but cannot be found")]
    issuer = (manifest.get("signature_info") or {}).get("common_name")
    told = f"{state.lower()}, by {issuer}"
    if state == "Invalid":
        told = f"invalid: {', '.join(problems)}"
    elif state == "Valid":
        told += ", whom none of the trusted roots vouches for" if roots else ", unknown to us"
    return [
        Finding(kind, state == "Trusted" or (state == "Valid" and roots is None), told, manifest)
    ]


def as_json(path: Path, findings: list[Finding]) -> dict:
    """Return the findings of one file as values of JSON."""
    carried = {
        finding.kind: {"holds": finding.holds, "text": finding.text, "value": finding.value}
        for finding in findings
    }
    name = os.fsencode(path).decode(errors="replace")
    return {"file": name, "holds": all(f.holds for f in findings), "carries": carried}
