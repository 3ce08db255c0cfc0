"""scripts/verify.py: what images of a real run carry, and every way in which it may not hold.

The damage is done with Pillow and by hand, not with the code that finds it.
"""

import io
import json
import sys
import zlib

import pytest
from PIL import Image, PngImagePlugin
from support.load_script import script

import flux

SUFFIXES = [".png", ".jpg", ".webp"]
every_format = pytest.mark.parametrize("suffix", SUFFIXES)
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"
NAMESPACE = "http://iptc.org/std/Iptc4xmpExt/2008-02-29/"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """One image of the toy, saved in every format: {suffix: bytes}."""
    folder = tmp_path_factory.mktemp("made")
    (image,) = flux.load(device="cpu")("a red circle", 96, 64, 1, seed=7)
    for suffix in SUFFIXES:
        image.save(folder / f"a{suffix}")
    return {suffix: (folder / f"a{suffix}").read_bytes() for suffix in SUFFIXES}


@pytest.fixture
def verify(monkeypatch, capsys, tmp_path):
    """Run scripts/verify.py in an empty folder: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    module = script("verify")

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["verify.py", *map(str, arguments)])
        return module.main(), *capsys.readouterr()

    return run


@every_format
def test_image_of_a_run_holds(verify, made, tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_bytes(made[suffix])
    code, out, err = verify(path.name)
    assert (code, err) == (0, "")
    assert out == (
        f"{path.name}: record: holds: flux.2-tiny, seed 7, unsigned\n"
        f"{path.name}: source type: holds: trainedAlgorithmicMedia, unsigned\n"
    )
    code, out, _ = verify("--json", path.name)
    (file,) = json.loads(out)
    assert code == 0 and file["holds"] and file["file"] == path.name
    assert file["carries"]["record"]["value"]["prompt"] == "a red circle"
    assert file["carries"]["source type"]["value"] == f"{TERMS}trainedAlgorithmicMedia"


@every_format
def test_image_that_another_program_saved_carries_nothing(verify, made, tmp_path, suffix):
    with Image.open(io.BytesIO(made[suffix])) as image:
        plain = Image.new("RGB", image.size)
        plain.paste(image)
        plain.save(f"b{suffix}")
    (tmp_path / f"a{suffix}").write_bytes(made[suffix])
    assert verify(f"b{suffix}")[:2] == (3, f"b{suffix}: carries nothing\n")
    assert verify(f"b{suffix}", f"a{suffix}")[0] == 3
    (file,) = json.loads(verify("--json", f"b{suffix}")[1])
    assert file == {"file": f"b{suffix}", "holds": True, "carries": {}}


@every_format
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_truncated_image_does_not_hold(verify, made, tmp_path, suffix, share):
    cut = made[suffix][: int(len(made[suffix]) * share)]
    (tmp_path / f"a{suffix}").write_bytes(cut)
    code, out, _ = verify(f"a{suffix}")
    assert code == 1 and "DOES NOT HOLD" in out


def test_every_flipped_bit_of_a_png_is_noticed(verify, made, tmp_path):
    """By a checksum of its chunk: the file as a whole is as it was written, or it is not."""
    data = made[".png"]
    for place in range(8, len(data), 97):
        changed = bytearray(data)
        changed[place] ^= 1
        (tmp_path / "a.png").write_bytes(changed)
        assert verify("a.png")[0] in (1, 3), place


@every_format
def test_record_of_another_size_does_not_hold(verify, made, tmp_path, suffix):
    """As after a crop that kept the metadata."""
    with Image.open(io.BytesIO(made[suffix])) as image:
        image.load()
        kept = {}
        if suffix == ".png":
            kept["pnginfo"] = PngImagePlugin.PngInfo()
            kept["pnginfo"].add_itxt("flux", image.info["flux"])
        else:
            kept["xmp"] = image.info["xmp"]
        image.crop((0, 0, 48, 64)).save(tmp_path / f"a{suffix}", **kept)
        image.crop((0, 0, 90, 64)).save(tmp_path / f"b{suffix}", **kept)  # as of a padded input
    code, out, _ = verify(f"a{suffix}")
    assert code == 1
    assert "record: DOES NOT HOLD: is of 96x64 pixels, but the image has 48x64" in out
    assert verify(f"b{suffix}")[0] == 0


def with_texts(path, record: str | None, xmp: str | None) -> None:
    """Write a PNG of 96x64 pixels with these texts."""
    info = PngImagePlugin.PngInfo()
    for key, text in (("flux", record), ("XML:com.adobe.xmp", xmp)):
        if text is not None:
            info.add_itxt(key, text)
    Image.new("RGB", (96, 64)).save(path, pnginfo=info)


def rdf(inside: str, attributes: str = "") -> str:
    return (
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF '
        'xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#" '
        f'xmlns:i="{NAMESPACE}"><rdf:Description {attributes}>{inside}</rdf:Description>'
        "</rdf:RDF></x:xmpmeta>"
    )


@pytest.mark.parametrize(
    "xmp",
    [
        rdf(f"<i:DigitalSourceType>{TERMS}digitalCapture</i:DigitalSourceType>"),
        rdf(f'<i:DigitalSourceType rdf:resource="{TERMS}digitalCapture"/>'),
        rdf("", f'i:DigitalSourceType="{TERMS}digitalCapture"'),
    ],
)
def test_every_spelling_of_the_source_type_is_read(verify, tmp_path, made, xmp):
    with_texts("a.png", None, xmp)
    assert verify("a.png")[:2] == (0, "a.png: source type: holds: digitalCapture, unsigned\n")
    with Image.open(io.BytesIO(made[".png"])) as image:
        record = image.info["flux"]
    with_texts("a.png", record, xmp)
    code, out, _ = verify("a.png")
    assert code == 1
    assert "DOES NOT HOLD: is digitalCapture, but the record means trainedAlgorithmicMedia" in out


BOMB = '<!DOCTYPE a [<!ENTITY b "DigitalSourceType">]>' + rdf("&b;")


@pytest.mark.parametrize(
    "record, xmp, told",
    [
        ("{", None, "record: DOES NOT HOLD: is damaged"),
        ("[1]", None, "record: DOES NOT HOLD: is damaged (is no object)"),
        ("[" * 100_000, None, "record: DOES NOT HOLD: is damaged (is nested too deeply)"),
        ('{"seed": NaN}', None, "record: DOES NOT HOLD: is damaged"),
        ('{"model": "\\u001b[2J", "width": "96"}', None, "lacks, or has wrong: prompt"),
        (None, rdf("<i:DigitalSourceType>"), "source type: DOES NOT HOLD: is in damaged XMP"),
        (None, BOMB, "source type: DOES NOT HOLD: is in damaged XMP"),
        (None, rdf("<i:DigitalSourceType>a</i:DigitalSourceType>" * 2, 'i:DigitalSourceType="b"'),
         "source type: DOES NOT HOLD: has 2 different values"),
    ],
)  # fmt: skip
def test_damaged_claims_do_not_hold(verify, record, xmp, told):
    with_texts("a.png", record, xmp)
    code, out, err = verify("a.png")
    assert (code, err) == (1, "") and told in out


@pytest.mark.parametrize("claim", [["tile"], {"tile": 1}, "bfl", 7])
def test_mark_that_is_not_there_does_not_hold(verify, made, claim):
    with Image.open(io.BytesIO(made[".png"])) as image:
        record = json.loads(image.info["flux"]) | {"watermark": claim}
    with_texts("a.png", json.dumps(record), None)
    code, out, err = verify("a.png")
    assert (code, err) == (1, "") and "but the pixels carry no such mark" in out


def test_foreign_text_cannot_steer_a_terminal_or_end_the_json(verify, made):
    with Image.open(io.BytesIO(made[".png"])) as image:
        record = json.loads(image.info["flux"])
    record["model"] = 'a\x1b[2J\n"}]<script>'
    with_texts("a.png", json.dumps(record), rdf("", 'i:DigitalSourceType="a/\u202eb"'))
    code, out, _ = verify("a.png")
    assert code == 1 and out.count("\n") == 2 and "\x1b" not in out and "\u202e" not in out
    (file,) = json.loads(verify("--json", "a.png")[1])
    assert file["carries"]["record"]["value"]["model"] == record["model"]


def test_wrong_files_are_told_in_one_line(verify, tmp_path):
    assert verify("none.png")[2].count("\n") == 1
    assert verify("none.png")[0] == 2 == verify(tmp_path)[0]
    (tmp_path / "a.png").write_bytes(zlib.compress(b"no image"))
    code, out, err = verify("a.png")
    assert (code, err) == (1, "") and out.startswith("a.png: pixels: DOES NOT HOLD: is ")
