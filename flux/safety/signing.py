"""Signed provenance: C2PA manifests, written and read by c2pa-python, without a network.

A manifest says how an image was made, and binds that to every byte of the file. It has no time
stamp of a server. Source of the rules: C2PA Technical Specification 2.1, sections 9 and 18.
"""

import hashlib
import io
import json
import uuid
from collections.abc import Sequence
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image

from flux.configs import MODELS
from flux.errors import UserError, install_command
from flux.image_io.metadata import source_type
from flux.image_io.output import to_json
from flux.plain_files import read_plain_file
from flux.safety import marking

MAX_PEM = 2**20  # bytes
MAX_INPUT = 2**30  # bytes of an input image
MAX_TITLE = 200  # characters
# types of the boxes (JUMBF, ISO/IEC 19566-5) that each manifest has: one bit breaks one of them
BOXES = [kind + bytes.fromhex("00110010800000aa00389b71") for kind in (b"c2pa", b"c2ma", b"c2cs")]
TILE = "org.flux.tile.1"  # the algorithm of `flux.safety.watermark`, as soft binding
MIME = {"PNG": "image/png", "JPEG": "image/jpeg", "WEBP": "image/webp"}
OFFLINE = {
    "version": 1,
    "builder": {"thumbnail": {"enabled": False}},
    "verify": {"remote_manifest_fetch": False, "ocsp_fetch": False},
}


def _c2pa() -> Any:
    try:
        import c2pa
    except ImportError:
        raise UserError(
            f"sign: needs the package c2pa-python. Run `{install_command('sign')}`."
        ) from None
    return c2pa


class Ingredient(NamedTuple):
    """An input of an image. `path`: where its own manifest may be read."""

    title: str
    sha256: str | None = None  # None: it was in memory
    path: Path | None = None


class Signer:
    """A private key with its certificates. UserError unless they fit, and may sign today."""

    def __init__(self, key: Path, chain: Path):
        c2pa = _c2pa()
        secret = read_plain_file(key, MAX_PEM, "a private key in PEM")
        certificates = read_plain_file(
            chain, MAX_PEM, "the certificates in PEM, the signer's first"
        )
        self.info = c2pa.C2paSignerInfo(_algorithm(key, secret), certificates, secret, None)
        blank = io.BytesIO()
        Image.new("RGB", (16, 16)).save(blank, "PNG")
        trial = self.sign(blank.getvalue(), {"model": "none"})  # also refuses what cannot be read
        state, problems, _ = read(trial, "image/png")
        if state == "Invalid":
            raise UserError(f"certificate: {chain} makes invalid signatures ({problems[0]:.80}).")

    def sign(
        self,
        data: bytes,
        metadata: dict,
        ingredients: Sequence[Ingredient] = (),
        weights: Sequence[Path] = (),
        with_prompt: bool = False,
    ) -> bytes:
        """Return the bytes of a PNG, JPEG or WebP with a signed manifest of its metadata.

        ingredients: the inputs; the manifests of those that are signed go along. weights: files
        whose hashes are stated. with_prompt: state the prompt, and not only its hash.
        """
        c2pa = _c2pa()
        with Image.open(io.BytesIO(data)) as image:
            mime = MIME[image.format or ""]
        content = manifest(metadata, ingredients, weights, with_prompt)
        signed = {}
        for part, ingredient in zip(list(content["ingredients"]), ingredients, strict=True):
            if own := _own_manifest(ingredient):
                content["ingredients"].remove(part)
                signed[json.dumps(part)] = own
        out = io.BytesIO()
        try:
            with (
                c2pa.Signer.from_info(self.info) as signer,
                c2pa.Builder(content, c2pa.Context.from_dict(OFFLINE)) as builder,
            ):
                for text, (kind, content_of_input) in signed.items():
                    builder.add_ingredient(text, kind, io.BytesIO(content_of_input))
                builder.sign(signer, mime, io.BytesIO(data), out)
        except c2pa.C2paError as error:
            reason = " ".join(str(error).split())
            raise UserError(
                f"certificate: cannot sign ({reason:.160}). The key must be that of the first "
                "certificate, which must not be expired, and be made for signing."
            ) from None
        return out.getvalue()


def _own_manifest(ingredient: Ingredient) -> tuple[str, bytes] | None:
    """Return type and bytes of an input that has a manifest, which is kept with what is wrong.

    None for an input without a manifest, or with one that cannot be parsed, and for a file that is
    not the one of its hash any more.
    """
    if ingredient.path is None:
        return None
    data = read_plain_file(ingredient.path, MAX_INPUT, "an input image")
    if not has_manifest(data) or hashlib.sha256(data).hexdigest() != ingredient.sha256:
        return None
    try:
        with Image.open(io.BytesIO(data)) as image:
            mime = MIME.get(image.format or "")
    except OSError:  # latents, for example
        return None
    return (mime, data) if mime and read(data, mime)[2] else None


def _algorithm(path: Path, secret: bytes) -> Any:
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec, ed25519

    names = _c2pa().C2paSigningAlg
    try:
        key = serialization.load_pem_private_key(secret, None)
    except Exception:  # of many kinds: a password, another format, an unknown algorithm
        raise UserError(
            f"sign: {path} is no private key in PEM without a password. `certificate.py` makes one."
        ) from None
    if isinstance(key, ed25519.Ed25519PrivateKey):
        return names.ED25519
    curves = {"secp256r1": names.ES256, "secp384r1": names.ES384}
    if isinstance(key, ec.EllipticCurvePrivateKey) and key.curve.name in curves:
        return curves[key.curve.name]
    raise UserError(f"sign: {path} is no key of P-256, P-384 or Ed25519, which C2PA takes.")


def manifest(
    metadata: dict,
    ingredients: Sequence[Ingredient] = (),
    weights: Sequence[Path] = (),
    with_prompt: bool = False,
) -> dict:
    """Return the manifest of an image: hashes of its prompt, record, inputs and weights."""
    source = source_type({"model": "none"} | metadata) or ""
    software = str(metadata.get("software")).partition(",")[0].split() or ["flux"]
    agent = {"name": software[0], "version": software[-1]}
    labels = [f"input{number}" for number in range(len(ingredients))]
    parts = [
        {"title": one.title[:MAX_TITLE], "relationship": "inputTo", "label": label}
        | ({"description": f"SHA-256 {one.sha256}"} if one.sha256 else {})
        for one, label in zip(ingredients, labels)
    ]
    made: dict[str, Any] = {"action": "c2pa.created", "digitalSourceType": source}
    made["softwareAgent"] = agent
    actions = [made]
    if parts and is_edited(metadata):
        parts[0]["relationship"] = "parentOf"
        made["action"] = "c2pa.edited"
        actions.insert(0, {"action": "c2pa.opened", "parameters": {"ingredientIds": labels[:1]}})
        labels = labels[1:]
    if labels:
        made["parameters"] = {"ingredientIds": labels}
    prompt = {name: metadata.get(name) for name in ("prompt", "negative_prompt")}
    generation = {
        "id": str(uuid.uuid4()),
        "time": datetime.now(UTC).isoformat(timespec="seconds"),
        "model": metadata.get("model"),
        "software": metadata.get("software"),
        "prompt_sha256": _sha256(str(metadata.get("prompt", ""))),
        "record_sha256": _sha256(to_json(metadata)),
        "inputs_sha256": [one.sha256 for one in ingredients],
        "weights_sha256": {path.name: file_hash(path) for path in weights},
    } | (prompt if with_prompt else {})
    assertions = [{"label": "org.flux.generation", "data": generation}]
    if metadata.get("watermark") == "tile":
        actions.append({"action": "c2pa.watermarked.bound", "softwareAgent": agent})
        value = f"{marking.payload_of(metadata):012x}"
        binding = {"alg": TILE, "blocks": [{"scope": {}, "value": value}]}
        assertions.append({"label": "c2pa.soft-binding", "data": binding})
    elif metadata.get("watermark"):  # always the same bits, which name no manifest
        actions.append({"action": "c2pa.watermarked.unbound", "softwareAgent": agent})
    assertions.insert(0, {"label": "c2pa.actions.v2", "data": {"actions": actions}})
    return {
        "claim_generator_info": [agent],
        "title": "image",
        "ingredients": parts,
        "assertions": assertions,
    }


def is_edited(metadata: dict) -> bool:
    """Return whether the first input is what the image was made from: filled, or a start.

    Else the inputs are references, of which a new image was made.
    """
    options, spec = metadata.get("image_options"), MODELS.get(str(metadata.get("model")))
    options = options if isinstance(options, dict) else {}
    changes = (metadata.get("mask"), metadata.get("latents"), options.get("outpaint"))
    if any(changes) or options.get("strength") is not None:
        return True
    return spec is not None and spec.image_mode in ("start", "fill")


def file_hash(path: Path) -> str:
    """Return the SHA-256 of a file, which is read once while its size and time stay the same."""
    state = path.stat()
    return _file_hash(path, state.st_size, state.st_mtime_ns)


@lru_cache(maxsize=256)
def _file_hash(path: Path, size: int, changed: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def check_roots(roots: bytes, name: object) -> None:
    """Raise UserError unless there are certificates in PEM: of the file `name`, not of an image."""
    try:
        from cryptography.x509 import load_pem_x509_certificates
    except ImportError:  # then no signature can be checked either
        return
    try:
        load_pem_x509_certificates(roots)
    except ValueError:
        raise UserError(f"trust: {name} has no certificates in PEM. Name a root.pem.") from None


def has_manifest(data: bytes) -> bool:
    """Return whether a file has a manifest, or what is left of one."""
    return any(box in data for box in BOXES)


def read(data: bytes, mime: str, roots: bytes | None = None) -> tuple[str, Sequence[str], dict]:
    """Return the state of a manifest, what is wrong, and the manifest; "" if there is none.

    State: "Trusted" by one of the certificates `roots` in PEM, "Valid" or "Invalid".
    """
    c2pa = _c2pa()
    trust = {} if roots is None else {"trust": {"user_anchors": roots.decode("ascii", "replace")}}
    try:
        context = c2pa.Context.from_dict(OFFLINE | trust)
        with c2pa.Reader(mime, io.BytesIO(data), context=context) as reader:
            store, state = json.loads(reader.json()), reader.get_validation_state()
    except c2pa.C2paError as error:
        if "ManifestNotFound" in type(error).__name__ + str(error):
            return "", [], {}
        return "Invalid", [" ".join(str(error).split())[:120]], {}
    problems = [status["code"] for status in store.get("validation_status", [])]
    return state, problems, store["manifests"].get(store.get("active_manifest"), {})
