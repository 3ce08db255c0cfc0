"""pipe.filters and pipe.provenance: what a call in Python refuses, marks and signs."""

import errno
import hashlib
import json

import numpy as np
import pytest
from PIL import Image
from support.load_script import script

import flux
from flux.errors import RefusedError, UserError
from flux.image_io.output import read_metadata
from flux.safety.filters import Filters, load_filters
from flux.safety.provenance import Provenance
from flux.safety.verdict import Verdict
from flux.safety.verification import verify

GOOD, BAD = "a red circle", "a forbidden star"
SMALL = dict(width=64, height=64, steps=1)
OTHER = Image.new("RGB", (64, 64))
SUFFIXES = (".png", ".jpg", ".webp")


class Stub:
    """Refuses prompts with the word "forbidden", and the images of `refused`, by their pixels."""

    def __init__(self):
        self.refused, self.judged = [], []

    def judge_text(self, text):
        self.judged.append(text)
        return Verdict("judge", 0.9 if "forbidden" in text else 0.1, 0.5)

    def judge(self, image):
        self.judged.append(image)
        return Verdict("judge", 0.8 if image in self.refused else 0.1, 0.5)


@pytest.fixture
def pipe():
    pipe = flux.load(device="cpu")
    pipe.filters = Filters(judge=Stub())
    return pipe


@pytest.fixture(scope="module")
def keys(tmp_path_factory):
    folder = tmp_path_factory.mktemp("keys")
    for name, data in script("certificate").make("My studio").items():
        (folder / name).write_bytes(data)
    return folder


def forbid_loading(pipe, monkeypatch) -> None:
    for network in (*pipe.text.networks, pipe.transformer, pipe.autoencoder, pipe.image_encoder):
        monkeypatch.setattr(network, "_prepare", lambda *_: pytest.fail("a network was loaded"))


@pytest.mark.parametrize(
    "call",
    [
        lambda pipe, bad: pipe([GOOD, BAD], **SMALL),
        lambda pipe, bad: pipe(GOOD, negative_prompt=BAD, guidance=2, **SMALL),
        lambda pipe, bad: pipe(GOOD, images=bad),
        lambda pipe, bad: pipe(GOOD, images=np.asarray(bad)),
        lambda pipe, bad: pipe([GOOD] * 2, images=[flux.ImageInputs((x,)) for x in (OTHER, bad)]),
        lambda pipe, bad: pipe.condition(flux.ImageInputs((OTHER, bad))),
        lambda pipe, bad: pipe.to_latents(bad),
        lambda pipe, bad: pipe.encode(BAD),
        lambda pipe, bad: pipe.encode_ahead([GOOD, BAD]),
    ],
)  # fmt: skip
def test_refused_before_a_network_loads(pipe, monkeypatch, call):
    bad = Image.new("RGB", (64, 64), "green")
    pipe.filters.judge.refused.append(bad)
    forbid_loading(pipe, monkeypatch)
    with pytest.raises(RefusedError, match=r"refused by judge 0\.[89]00") as refusal:
        call(pipe, bad)
    assert refusal.value.verdicts[0].refused and refusal.value.images == []


def test_preview_is_judged_before_it_is_shown(pipe, monkeypatch):
    """A refusal ends the call: what would be refused at the end is never seen on the way."""
    shown, preview = [], flux.Preview(pipe)

    def show(step, t, latents):
        shown.extend(preview())
        monkeypatch.setattr(
            pipe.filters.judge, "judge", lambda image: Verdict("judge", step / 2, 0.5)
        )

    with pytest.raises(RefusedError, match=r"^preview: number 1 is refused by judge 0\.500"):
        pipe(GOOD, width=64, height=64, steps=3, callback=show)
    assert len(shown) == 1


def test_masks_and_files_are_judged(pipe, tmp_path, monkeypatch):
    mask = Image.new("L", (64, 64), 255)
    pipe.filters.judge.refused.append(mask)
    forbid_loading(pipe, monkeypatch)
    Image.new("RGB", (64, 64), "blue").save(tmp_path / "a.png")
    with pytest.raises(RefusedError, match="images: the mask is refused"):
        pipe(GOOD, images=flux.ImageInputs((tmp_path / "a.png",), mask=mask))
    with Image.open(tmp_path / "a.png") as image:
        pipe.filters.judge.refused.append(image.copy())
    with pytest.raises(RefusedError, match="images: number 1 is refused"):
        pipe(GOOD, images=str(tmp_path / "a.png"))


@pytest.mark.slow
def test_other_images_of_a_call_are_kept(pipe):
    plain = flux.load(device="cpu")(GOOD, num_images=3, seed=4, **SMALL)
    pipe.filters.judge.refused.append(plain[1])
    with pytest.raises(RefusedError, match="prompts: image 2 is refused by judge 0.800") as refusal:
        pipe(GOOD, num_images=3, seed=4, **SMALL)
    first, second, third = refusal.value.images
    assert second is None and (first, third) == (plain[0], plain[2])
    assert [said.refused for (said,) in refusal.value.verdicts] == [False, True, False]
    latents = pipe.sample(pipe.encode(GOOD), [5], 64, 64, 1)
    pipe.filters.judge.refused = []
    pipe.filters.judge.refused = pipe.decode(latents)
    with pytest.raises(RefusedError, match="latents: number 1 is refused"):
        pipe.decode(latents)
    pipe.filters.judge.refused = []
    assert pipe(GOOD, num_images=3, seed=4, **SMALL) == plain


@pytest.mark.slow
def test_images_are_judged_unmarked_then_marked_and_signed(pipe, keys, tmp_path):
    """In all formats; the record, the mark, the manifest and its weights hold together."""
    reference = tmp_path / "reference.png"
    Image.new("RGB", (64, 64), "blue").save(reference)
    pipe.provenance = Provenance("tile", keys / "key.pem", keys / "chain.pem")
    given = flux.ImageInputs((reference, Image.new("RGB", (64, 64))))
    (image,) = pipe(GOOD, 256, 256, 1, images=given)
    seen = pipe.filters.judge.judged[-1]
    (plain,) = flux.load(device="cpu")(GOOD, 256, 256, 1, images=given)
    assert seen == plain != image and image.metadata["watermark"] == "tile"
    root = (keys / "root.pem").read_bytes()
    for suffix in SUFFIXES:
        image.save(tmp_path / f"a{suffix}")
        found = {finding.kind: finding for finding in verify(tmp_path / f"a{suffix}", root)}
        assert [*found] == ["record", "source type", "watermark", "signature"]
        assert all(finding.holds for finding in found.values()), found
        manifest = found["signature"].value
        assert found["watermark"].value["tile"] in json.dumps(manifest)
        text = json.dumps(manifest)
        assert GOOD not in text and hashlib.sha256(GOOD.encode()).hexdigest() in text
        for path in pipe.files["transformer"]:
            assert hashlib.sha256(path.read_bytes()).hexdigest() in text
        titles = [part["title"] for part in manifest["ingredients"]]
        assert titles == ["reference.png", "input 2, in memory"]
    with open(tmp_path / "b.png", "wb") as file:
        image.save(file, "PNG")
    assert verify(tmp_path / "b.png", root)[-1].holds
    pipe.provenance = Provenance(None, keys / "key.pem", keys / "chain.pem", sign_prompt=True)
    pipe(GOOD, **SMALL)[0].save(tmp_path / "c.png")
    assert GOOD in json.dumps(verify(tmp_path / "c.png", root)[-1].value)


def test_what_cannot_be_signed_is_not_saved(pipe, keys, tmp_path, monkeypatch):
    pipe.provenance = Provenance(sign=keys / "key.pem", certificate=keys / "chain.pem")
    (image,) = pipe(GOOD, **SMALL)
    with pytest.raises(UserError, match="sign: images of BMP are not signed"):
        image.save(tmp_path / "a.bmp", "BMP")
    with pytest.raises(UserError, match="sign: images of .*a.gif are not"):
        image.save(tmp_path / "a.gif")
    assert not list(tmp_path.iterdir())
    image.save(tmp_path / "a.png")
    before = (tmp_path / "a.png").read_bytes()

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(OSError, match="No space left"):
        image.save(tmp_path / "a.png")
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    assert (tmp_path / "a.png").read_bytes() == before


def test_values_of_a_wrong_type_are_told():
    with pytest.raises(UserError, match="^weights: must be the path of a file"):
        load_filters("nsfw", 5)
    for wrong in (dict(sign=5, certificate="a"), dict(sign="a", certificate=[])):
        name = "sign" if wrong["sign"] == 5 else "certificate"
        with pytest.raises(UserError, match=f"^{name}: must be the path of a file"):
            Provenance(**wrong)


def test_wrong_marks_are_refused_before_any_work(pipe, keys, monkeypatch):
    forbid_loading(pipe, monkeypatch)
    pipe.provenance = Provenance("tile")
    with pytest.raises(UserError, match="watermark: an image of 64x64 is too small"):
        pipe(GOOD, **SMALL)
    for wrong, words in (
        (dict(watermark="stamp"), "watermark: 'stamp' is unknown"),
        (dict(sign=keys / "key.pem"), "sign: needs `certificate`"),
        (dict(sign_prompt=True), "sign_prompt: has no effect without `sign`"),
        (dict(sign=keys / "root.pem", certificate=keys / "chain.pem"), "is no private key"),
    ):
        with pytest.raises(UserError, match=words):
            Provenance(**wrong)


@pytest.mark.slow
def test_watermark_of_a_call_is_repeated_by_its_record(pipe, tmp_path):
    pipe.filters, pipe.provenance = None, Provenance("tile")
    (image,) = pipe(GOOD, 256, 256, 1, seed=3)
    image.save(tmp_path / "a.png")
    assert read_metadata(tmp_path / "a.png")["watermark"] == "tile"
    assert all(finding.holds for finding in verify(tmp_path / "a.png"))
    again = flux.load(device="cpu")
    again.provenance = Provenance("tile")
    assert again(GOOD, 256, 256, 1, seed=3)[0] == image
