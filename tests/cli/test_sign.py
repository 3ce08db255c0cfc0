"""--sign, scripts/certificate.py, verify.py --trust: what is signed, and every kind of damage."""

import hashlib
import io
import json
import sys
from datetime import UTC, datetime, timedelta

import numpy as np
import pytest
from PIL import Image
from support.load_script import script
from support.sample_run import image_of

from flux.errors import UserError
from flux.image_io import output
from flux.safety.provenance import ingredients_of, recorded_ingredients
from flux.safety.signing import Signer
from flux.safety.verification import check_signature, verify

every_format = pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp"])
METADATA = dict(model="flux.2-tiny", prompt='a "cat"\x1b]]>', software="flux 0.1.0, torch 2.13")
certificate = script("certificate")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, files in (
        ("own", certificate.make("My studio")),
        ("other", certificate.make("Another")),
        ("expired", certificate.make("Late", days=-1)),
    ):
        (folder / name).mkdir()
        for file, data in files.items():
            (folder / name / file).write_bytes(data)
    return folder


@pytest.fixture(scope="module")
def signer(folder):
    return Signer(folder / "own/key.pem", folder / "own/chain.pem")


def signed(signer, path, metadata=METADATA, ingredients=None, **options):
    """Save noise with metadata, signed. The inputs are those that the metadata name."""
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    inputs = recorded_ingredients(metadata) if ingredients is None else ingredients

    def seal(data):
        return signer.sign(data, metadata, inputs, **options)

    return output.save(Image.fromarray(noise), path, metadata, seal=seal)


def generation(manifest: dict) -> dict:
    """Return what the manifest says of how the image was made."""
    (found,) = [a["data"] for a in manifest["assertions"] if a["label"] == "org.flux.generation"]
    return found


def actions(manifest: dict) -> list[dict]:
    (found,) = [a["data"] for a in manifest["assertions"] if a["label"].startswith("c2pa.actions")]
    return found["actions"]


def signature(path, roots=None):
    (found,) = [finding for finding in verify(path, roots) if finding.kind == "signature"]
    return found


@every_format
def test_signed_image_is_trusted_by_its_root_alone(signer, folder, tmp_path, suffix):
    path = signed(signer, tmp_path / f"a{suffix}")
    own, other = ((folder / name / "root.pem").read_bytes() for name in ("own", "other"))
    assert signature(path, own)[1:3] == (True, "trusted, by My studio")
    assert signature(path)[1:3] == (True, "valid, by My studio, unknown to us")
    assert not signature(path, other).holds
    assert output.read_metadata(path) == METADATA
    text = json.dumps(signature(path).value)
    assert "trainedAlgorithmicMedia" in text and "org.flux.generation" in text
    assert "cat" not in text  # the prompt is there as a hash alone


@every_format
def test_damage_is_invalid(signer, folder, tmp_path, suffix):
    path = signed(signer, tmp_path / f"a{suffix}")
    data, root = path.read_bytes(), (folder / "own/root.pem").read_bytes()
    of_manifest = data.index(b"trainedAlgorithmicMedia", data.index(b"c2pa"))
    for place in (of_manifest, data.index(b'\\"cat\\"'), len(data) // 2):  # metadata, pixels
        changed = bytearray(data)
        changed[place] ^= 1
        path.write_bytes(changed)
        assert not all(finding.holds for finding in verify(path, root)), place
    path.write_bytes(data + b"\0")
    assert signature(path, root).text.startswith("invalid: assertion.dataHash.mismatch")
    path.write_bytes(data[:-20])
    assert not all(finding.holds for finding in verify(path, root))
    with Image.open(io.BytesIO(data)) as image:
        image.convert("RGB").save(tmp_path / f"b{suffix}")
    assert not [f for f in verify(tmp_path / f"b{suffix}") if f.kind == "signature"]


@every_format
def test_manifest_does_not_vanish_with_a_bit_of_its_place(signer, tmp_path, suffix):
    """A reader that finds no manifest would take the image for one that nobody signed."""
    path = signed(signer, tmp_path / f"a{suffix}")
    data, form = path.read_bytes(), output.FORMATS[suffix]
    head = data.index(b"jumb")
    for place in range(head - 30, head + 60):
        changed = bytearray(data)
        changed[place] ^= 1 << place % 8
        assert check_signature(bytes(changed), form, None), place


def test_inputs_and_watermark_are_in_the_manifest(signer, tmp_path):
    hashed = dict(file="/private/folder/photo.png", sha256="0" * 64)
    metadata = METADATA | dict(images=[hashed], mask=None, watermark="tile")
    text = json.dumps(signature(signed(signer, tmp_path / "a.png", metadata)).value)
    assert "photo.png" in text and "inputTo" in text and "/private" not in text
    assert "c2pa.soft-binding" in text and "c2pa.watermarked.bound" in text
    bfl = signature(signed(signer, tmp_path / "b.png", METADATA | dict(watermark="bfl")))
    assert [action["action"] for action in actions(bfl.value)][1:] == ["c2pa.watermarked.unbound"]


def test_manifest_that_is_bound_to_a_mark_holds_with_that_mark_alone(signer, tmp_path):
    """The record is left out, so that only the manifest claims the mark."""
    metadata = METADATA | dict(watermark="tile")
    blank = io.BytesIO()
    Image.new("RGB", (256, 256), "gray").save(blank, "PNG")
    (tmp_path / "a.png").write_bytes(signer.sign(blank.getvalue(), metadata))
    (mark, signature) = verify(tmp_path / "a.png")
    assert signature.holds and not mark.holds
    assert mark.text.startswith("the manifest is bound to tile ")


def test_hashes_of_prompt_and_weights_and_the_prompt_only_if_asked(signer, tmp_path):
    weights = tmp_path / "weights.safetensors"
    weights.write_bytes(b"some weights")
    metadata = METADATA | dict(negative_prompt="a dog")
    plain = signature(signed(signer, tmp_path / "a.png", metadata, weights=[weights])).value
    said = generation(plain)
    prompt = hashlib.sha256(metadata["prompt"].encode()).hexdigest()
    assert said["prompt_sha256"] == prompt
    assert said["weights_sha256"] == {weights.name: hashlib.sha256(b"some weights").hexdigest()}
    assert abs(datetime.fromisoformat(said["time"]) - datetime.now(UTC)) < timedelta(minutes=2)
    assert len(said["id"]) == 36 and "dog" not in json.dumps(plain)
    weights.write_bytes(b"other weights")
    asked = generation(
        signature(
            signed(signer, tmp_path / "b.png", metadata, weights=[weights], with_prompt=True)
        ).value
    )
    assert (asked["prompt"], asked["negative_prompt"]) == (metadata["prompt"], "a dog")
    assert asked["id"] != said["id"] and asked["weights_sha256"] != said["weights_sha256"]


def test_signed_references_keep_their_manifests(signer, folder, tmp_path):
    """A good one, one whose pixels were changed, one without a manifest, and one in memory."""
    good = signed(signer, tmp_path / "good.jpg", METADATA | dict(model="of the reference"))
    changed = bytearray(good.read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "changed.jpg").write_bytes(changed)
    Image.new("RGB", (32, 32)).save(tmp_path / "plain.png")
    inputs = ingredients_of(
        [*(tmp_path / f"{n}" for n in ("good.jpg", "changed.jpg", "plain.png"))]
    )
    path = signed(signer, tmp_path / "a.png", ingredients=[*inputs, *ingredients_of([good, None])])
    found = signature(path, (folder / "own/root.pem").read_bytes())
    assert found.text.startswith("trusted") and b"of the reference" in path.read_bytes()
    given = {part["title"]: part for part in found.value["ingredients"]}
    assert given["good.jpg"]["active_manifest"] and "active_manifest" not in given["plain.png"]
    assert "assertion.dataHash.mismatch" in json.dumps(given["changed.jpg"]["validation_results"])
    assert "in memory" in "".join(given) and len(found.value["ingredients"]) == 5
    said = generation(found.value)["inputs_sha256"]
    assert said[0] == hashlib.sha256(good.read_bytes()).hexdigest() and said[4] is None
    assert given["plain.png"]["description"] == f"SHA-256 {said[2]}"
    assert len(actions(found.value)[0]["parameters"]["ingredients"]) == 5


def test_reference_that_changed_or_is_damaged_is_named_alone(signer, tmp_path):
    good = signed(signer, tmp_path / "good.png")
    (old,) = ingredients_of([good])
    cut = tmp_path / "cut.png"
    cut.write_bytes(good.read_bytes()[:-40])
    Image.new("RGB", (32, 32)).save(good)
    found = signature(signed(signer, tmp_path / "a.png", ingredients=[old, *ingredients_of([cut])]))
    assert found.holds
    assert all("active_manifest" not in part for part in found.value["ingredients"])


@pytest.mark.parametrize(
    "metadata, edited",
    [
        (dict(model="flux.2-klein-4b"), False),
        (dict(model="flux.1-kontext-dev"), False),
        (dict(model="flux.1-dev"), True),
        (dict(model="flux.2-dev", image_options=dict(strength=0.5)), True),
        (dict(model="flux.1-fill-dev", image_options=dict(composite=False)), True),
        (dict(model="flux.1-redux-dev"), False),
        (dict(model="flux.1-canny-dev"), False),
    ],
)
def test_image_is_edited_where_the_first_input_is_its_start(signer, tmp_path, metadata, edited):
    """C2PA 2.1: an edited image opens its parent; an image made of references is created."""
    hashed = dict(file="photo.png", sha256="0" * 64)
    path = signed(signer, tmp_path / "a.png", METADATA | metadata | dict(images=[hashed]))
    manifest = signature(path).value
    names = [action["action"] for action in actions(manifest)]
    assert names == (["c2pa.opened", "c2pa.edited"] if edited else ["c2pa.created"])
    assert manifest["ingredients"][0]["relationship"] == ("parentOf" if edited else "inputTo")


@pytest.mark.parametrize(
    "foreign",
    [dict(images=[None, 3, {"file": 1}]), dict(images="a"), dict(mask=[]), dict(software="")],
)
def test_foreign_metadata_are_signed_without_what_they_lack(signer, tmp_path, foreign):
    """As of a file of latents that somebody else wrote."""
    assert signature(signed(signer, tmp_path / "a.png", METADATA | foreign)).holds


def test_composite_says_that_an_image_was_opened_and_edited(signer, folder, tmp_path):
    photo = dict(file="photo.png", sha256="0" * 64)
    metadata = METADATA | dict(images=[photo], mask=photo | dict(file="mask.png"))
    metadata["image_options"] = dict(composite=True, outpaint=None)
    root = (folder / "own/root.pem").read_bytes()
    found = signature(signed(signer, tmp_path / "a.png", metadata), root)
    assert found.holds
    text = json.dumps(found.value)
    assert all(word in text for word in ("c2pa.opened", "c2pa.edited", "parentOf", "inputTo"))
    assert "compositeWithTrainedAlgorithmicMedia" in text and "c2pa.created" not in text


@pytest.mark.slow
def test_run_signs_what_it_marked_or_writes_nothing(cli, folder, monkeypatch, capsys):
    run = ("a red circle", "--width", 256, "--height", 256, "--steps", 1, "--output", "a.png")
    keys = ("--sign", folder / "own/key.pem", "--certificate", folder / "own/chain.pem")
    path = image_of(cli(*run, *keys, "--watermark", "tile"))
    found = {finding.kind: finding for finding in verify(path)}
    assert list(found) == ["record", "source type", "watermark", "signature"]
    assert all(finding.holds for finding in found.values())
    assert found["watermark"].value["tile"] in json.dumps(found["signature"].value)
    module = script("verify")
    monkeypatch.setattr(
        sys, "argv", ["verify.py", "a.png", "--trust", str(folder / "own/root.pem")]
    )
    assert module.main() == 0 and "signature: holds: trusted" in capsys.readouterr().out
    before = cli(*run, "--sign", folder / "own/key.pem")
    before.fails_with("--sign: needs --certificate")
    late = ("--sign", folder / "expired/key.pem", "--certificate", folder / "expired/chain.pem")
    cli(*run, *late).fails_with("--certificate: cannot sign")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Signer, "sign", full)
    monkeypatch.setattr(Signer, "__init__", lambda *_: None)
    cli(*run, *keys).fails_with("No space left on device", code=1)


def test_name_in_a_foreign_certificate_cannot_steer_a_terminal(tmp_path, monkeypatch, capsys):
    for name, data in certificate.make("a\x1b[2J\u202eb\n").items():
        (tmp_path / name).write_bytes(data)
    signed(Signer(tmp_path / "key.pem", tmp_path / "chain.pem"), tmp_path / "a.png")
    monkeypatch.setattr(sys, "argv", ["verify.py", str(tmp_path / "a.png")])
    script("verify").main()
    out = capsys.readouterr().out
    assert "signature: holds: valid, by a" in out and "\x1b" not in out and "\u202e" not in out
    assert len(out.splitlines()) == 3


@pytest.mark.parametrize(
    "wrong", [b"", b"text", b"key", b"\xff\0", b"-----BEGIN CERTIFICATE-----\n"]
)
def test_roots_that_are_none_are_blamed_and_not_the_image(
    folder, signer, tmp_path, monkeypatch, capsys, wrong
):
    path, roots = signed(signer, tmp_path / "a.png"), tmp_path / "roots.pem"
    roots.write_bytes((folder / "own/key.pem").read_bytes() if wrong == b"key" else wrong)
    monkeypatch.setattr(sys, "argv", ["verify.py", str(path), "--trust", str(roots)])
    assert script("verify").main() == 2
    out, err = capsys.readouterr()
    told = f"error: --trust: {roots} has no certificates in PEM. Name a root.pem.\n"
    assert (out, err) == ("", told)


def test_missing_package_is_told(folder, tmp_path, signer, monkeypatch):
    path = signed(signer, tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, "c2pa", None)
    with pytest.raises(UserError, match=r"sign: needs the package c2pa-python"):
        Signer(folder / "own/key.pem", folder / "own/chain.pem")
    found = signature(path)
    assert not found.holds and "cannot be checked" in found.text


@pytest.mark.parametrize(
    "key, chain, words",
    [
        ("own/key.pem", "other/chain.pem", "certificate: cannot sign"),
        ("expired/key.pem", "expired/chain.pem", "certificate: cannot sign"),
        ("own/root.pem", "own/chain.pem", "sign: .* is no private key"),
        ("own/key.pem", "own/key.pem", "certificate: cannot sign"),
        ("own/none.pem", "own/chain.pem", "none.pem: does not exist"),
    ],
)
def test_keys_that_cannot_sign_are_refused_before_any_work(folder, key, chain, words):
    with pytest.raises(UserError, match=words):
        Signer(folder / key, folder / chain)


@pytest.mark.parametrize("name", ["模" * 19, "é" * 29, 59 * "a", "<b>\"'&"])
def test_name_may_have_any_characters_that_fit(name, tmp_path, monkeypatch, capsys):
    run = ["certificate.py", str(tmp_path / "signing"), "--name"]
    monkeypatch.setattr(sys, "argv", [*run, name + 30 * "é"])
    assert certificate.main() == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: --name: must have 1 to 59 printable characters")
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(sys, "argv", [*run, name])
    assert certificate.main() == 0
    signer = Signer(tmp_path / "signing/key.pem", tmp_path / "signing/chain.pem")
    root = (tmp_path / "signing/root.pem").read_bytes()
    assert signature(signed(signer, tmp_path / "a.png"), root).text == f"trusted, by {name}"


def test_script_makes_a_key_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["certificate.py", str(tmp_path / "signing")])
    assert certificate.main() == 0 and "on no trust list" in capsys.readouterr().err
    assert (tmp_path / "signing/key.pem").stat().st_mode & 0o077 == 0
    Signer(tmp_path / "signing/key.pem", tmp_path / "signing/chain.pem")
    assert certificate.main() == 2 and "exists already" in capsys.readouterr().err
