"""--sign, scripts/certificate.py, verify.py --trust: what is signed, and every kind of damage.

Skipped without c2pa-python, of the extra `sign`.
"""

import io
import json
import sys

import numpy as np
import pytest
from PIL import Image
from support.load_script import script
from support.sample_run import image_of

pytest.importorskip("c2pa")

from flux.errors import UserError
from flux.image_io import output
from flux.safety.signing import Signer
from flux.safety.verification import verify

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


def signed(signer, path, metadata=METADATA):
    noise = np.random.default_rng(0).integers(0, 256, (96, 96, 3), np.uint8)
    seal = lambda data: signer.sign(data, metadata)  # noqa: E731
    return output.save(Image.fromarray(noise), path, metadata, seal=seal)


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
    for place in (data.index(b"trainedAlgorithmicMedia", data.index(b"c2pa")), len(data) // 2):
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


def test_inputs_and_watermark_are_in_the_manifest(signer, tmp_path):
    hashed = dict(file="/private/folder/photo.png", sha256="0" * 64)
    metadata = METADATA | dict(images=[hashed], mask=None, watermark="tile")
    text = json.dumps(signature(signed(signer, tmp_path / "a.png", metadata)).value)
    assert "photo.png" in text and "inputTo" in text and "/private" not in text
    assert "c2pa.soft-binding" in text and "c2pa.watermarked.bound" in text


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


def test_script_makes_a_key_once(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["certificate.py", str(tmp_path / "signing")])
    assert certificate.main() == 0 and "on no trust list" in capsys.readouterr().err
    assert (tmp_path / "signing/key.pem").stat().st_mode & 0o077 == 0
    Signer(tmp_path / "signing/key.pem", tmp_path / "signing/chain.pem")
    assert certificate.main() == 2 and "exists already" in capsys.readouterr().err
