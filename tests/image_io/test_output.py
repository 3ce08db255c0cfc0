"""flux.image_io.output: rounding, names and metadata of image files; no fault leaves half a file.

The truth: the 256 levels themselves, Pillow's readers, diffusers' image processor, live, and the
file system.
"""

import json
import math
import os
import random
import re
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from flux.errors import NonFiniteError, UserError
from flux.image_io import output as images

ROOT = Path(__file__).resolve().parents[2]
SUFFIXES = [".png", ".jpg", ".jpeg", ".webp"]
every_format = pytest.mark.parametrize("suffix", SUFFIXES)


def gray_image(value: int = 0) -> Image.Image:
    return Image.new("RGB", (16, 16), (value, value, value))


# ------------------------------------------------------------------------------ pixels


def test_every_level_is_the_nearest():
    levels = torch.arange(256)
    for offset in (-0.49, 0, 0.49):
        pixels = ((levels + offset) / 127.5 - 1).expand(1, 3, 1, 256)
        (made,) = images.to_images(pixels)
        assert np.array_equal(np.asarray(made), levels.view(1, 256, 1).expand(1, 256, 3))


def test_pixels_are_left_as_they_were():
    pixels = torch.linspace(-2, 2, 48).reshape(1, 3, 4, 4)
    for order in (torch.contiguous_format, torch.channels_last):
        given_ = pixels.contiguous(memory_format=order)
        images.to_images(given_)
        assert torch.equal(given_, pixels)


def test_literal_levels():
    """0 is level 127.5 and goes, as halves in torch do, to the even 128; the rest is clamped."""
    values = torch.tensor([-7, -1, -0.999, 0, 0.001, 0.5, 0.999, 1, 3])
    (made,) = images.to_images(values.expand(1, 3, 1, 9))
    assert np.asarray(made)[0, :, 0].tolist() == [0, 0, 0, 128, 128, 191, 255, 255, 255]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_images_keep_their_order_and_axes(dtype):
    pixels = torch.full((2, 3, 4, 6), -1.0, dtype=dtype)
    pixels[1, 2, 3, 5] = 1  # second picture, blue, last row, last column
    first, second = images.to_images(pixels)
    assert first.size == second.size == (6, 4) and first.mode == "RGB"
    assert not np.asarray(first).any()
    assert np.argwhere(np.asarray(second) == 255).tolist() == [[3, 5, 2]]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_pixels_that_are_not_finite_are_no_image(value):
    pixels = torch.zeros(1, 3, 4, 4)
    pixels[0, 1, 2, 3] = value
    with pytest.raises(NonFiniteError, match="float32"):
        images.to_images(pixels)


@settings(max_examples=20, deadline=None)
@given(width=st.integers(1, 40), height=st.integers(1, 40), seed=st.integers(0, 2**32))
@example(width=256, height=256, seed=0)
def test_pixels_are_diffusers_and_give_back_the_image(width, height, seed):
    """To the bit: VaeImageProcessor's 2 (v / 255) - 1 is our v / 127.5 - 1 for all 256 levels."""
    noise = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    noise[0, :256, 0] = np.arange(min(width, 256))
    pixels = images.to_pixels(Image.fromarray(noise))
    assert torch.equal(
        pixels, VaeImageProcessor(do_resize=False).preprocess(Image.fromarray(noise))
    )
    (made,) = images.to_images(pixels)
    assert np.array_equal(made, noise)


def test_pixels_are_the_callers_own():
    given_ = gray_image(255)
    images.to_pixels(given_).zero_()
    assert given_.getpixel((0, 0)) == (255, 255, 255)


def test_masks_are_soft():
    values = np.arange(256, dtype=np.uint8)[None].repeat(2, 0)
    soft = images.to_mask(Image.fromarray(values))
    assert soft.shape == (1, 1, 2, 256) and soft.dtype == torch.float32
    assert torch.equal(soft[0, 0], torch.arange(256).div(255).expand(2, 256))
    options = dict(
        do_resize=False, do_normalize=False, do_convert_grayscale=True, do_binarize=False
    )
    assert torch.equal(soft, VaeImageProcessor(**options).preprocess(Image.fromarray(values)))


# ------------------------------------------------------------------------------ names


@every_format
def test_nothing_is_overwritten(tmp_path, suffix):
    path = tmp_path / f"a{suffix}"
    path.write_text("mine")
    (tmp_path / f"a-2{suffix}").mkdir()
    made = [images.save(gray_image(), path, {"k": k}) for k in range(3)]
    assert [p.name for p in made] == [f"a-{n}{suffix}" for n in (3, 4, 5)]
    assert path.read_text() == "mine" and [images.read_metadata(p)["k"] for p in made] == [0, 1, 2]
    assert len(list(tmp_path.iterdir())) == 5


def test_a_name_that_is_taken_at_the_last_moment_is_not_overwritten(tmp_path, monkeypatch):
    path, look = tmp_path / "a.png", images.next_free_path

    def rival(path: Path, suffixes=()) -> Path:
        target = look(path)
        if target == path:
            target.write_text("mine")
        return target

    monkeypatch.setattr(images, "next_free_path", rival)
    assert images.save(gray_image(), path, {}) == tmp_path / "a-2.png"
    assert path.read_text() == "mine" and len(list(tmp_path.iterdir())) == 2


def test_a_link_that_leads_nowhere_is_a_name_that_is_taken(tmp_path):
    (tmp_path / "a.png").symlink_to(tmp_path / "none" / "b.png")
    assert images.save(gray_image(), tmp_path / "a.png", {}) == tmp_path / "a-2.png"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a-2.png", "a.png"]


def test_parameters_behind_the_image_are_read_too(tmp_path):
    """Where other programs put them."""
    data = images.save(gray_image(), tmp_path / "a.png", {"prompt": "a cat"}).read_bytes()
    start = data.index(b"iTXt") - 4
    end = start + 12 + int.from_bytes(data[start : start + 4])
    last = data.index(b"IEND") - 4
    (tmp_path / "b.png").write_bytes(data[:start] + data[end:last] + data[start:end] + data[last:])
    assert images.read_metadata(tmp_path / "b.png") == {"prompt": "a cat"}


def test_many_writers_at_once(tmp_path):
    """Every one gets a name of its own, whole, with the rights that any new file gets."""
    made, start = {}, threading.Barrier(8)

    def write(value: int) -> None:
        start.wait()
        made[value] = images.save(gray_image(value), tmp_path / "a.png", {"value": value})

    threads = [threading.Thread(target=write, args=(k,)) for k in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made.values())) == len(list(tmp_path.iterdir())) == 8
    (ordinary := tmp_path / "ordinary").touch()
    for value, path in made.items():
        assert images.read_metadata(path) == {"value": value}
        assert Image.open(path).getpixel((3, 3)) == (value, value, value)
        assert path.stat().st_mode == ordinary.stat().st_mode


def test_a_file_system_without_hard_links(tmp_path, monkeypatch):
    def refuse(*names):
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for name in ("a.png", "a-2.png"):
        assert images.save(gray_image(), tmp_path / "a.png", {}) == tmp_path / name
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
def test_what_a_killed_process_left_is_removed_at_the_next_start(tmp_path):
    """And what a living process writes is waited for."""
    path = tmp_path / "a.png"
    program = (
        "import sys, time\nfrom pathlib import Path\nfrom flux.image_io.output import *\n"
        "def write(file):\n"
        "    file.write(b'half')\n    file.flush()\n    print('half', flush=True)\n"
        "    time.sleep(60)\n"
        "write_exclusive(Path(sys.argv[1]), write)"
    )
    command = [sys.executable, "-c", program, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) as process:
        assert process.stdout.readline() == b"half\n"
        checked = threading.Thread(target=images.check_output, args=(path,))
        checked.start()
        checked.join(0.2)
        assert checked.is_alive() and list(tmp_path.rglob("a.png"))  # unfinished
        process.kill()
    checked.join()
    assert not list(tmp_path.iterdir())
    assert images.save(gray_image(), path, {}) == path
    (tmp_path / ".a-3.safetensors.unfinished").mkdir()  # of the latents of an earlier image
    images.check_output(path)
    assert list(tmp_path.iterdir()) == [path]


@every_format
@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), KeyboardInterrupt()])
def test_a_failing_write_leaves_nothing(tmp_path, monkeypatch, suffix, error):
    def fail(self, file, **options):
        file.write(b"half")
        raise error

    monkeypatch.setattr(Image.Image, "save", fail)
    with pytest.raises(type(error)):
        images.save(gray_image(), tmp_path / f"a{suffix}", {})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------------------ metadata

NASTY = [
    "]]>",
    "]]]]>>",
    "\"\\'",
    "a\nb\r\n\tc",
    "<b>&amp;</b>",
    "naïve 日本語 🎨👩‍🚀",
    "\0\x1b\x7f",
    "-->",
    "",
]


def xmp_properties(xmp: bytes) -> list[ElementTree.Element]:
    """Return the properties in an XMP packet, by ISO 16684-1."""
    packet, rdf = ElementTree.fromstring(xmp), "{http://www.w3.org/1999/02/22-rdf-syntax-ns#}"
    assert packet.tag == "{adobe:ns:meta/}xmpmeta"
    (graph,) = packet
    (description,) = graph
    assert (graph.tag, description.tag) == (f"{rdf}RDF", f"{rdf}Description")
    assert description.attrib == {f"{rdf}about": ""}
    return list(description)


RECIPE = dict(model="flux.2-klein-base-4b", prompt='a cat,\non a mat: "naïve"', steps=50, seed=7)
RECIPE |= dict(negative_prompt="blurred, grey", width=96, height=80, guidance=4.0, mask=None)
RECIPE |= dict(true_cfg_scale=None, numerics="exact", dtype="float32", decode_dtype=None)
RECIPE |= dict(transformer=None, autoencoder=None, quantize=None, fp8_matmul=False, compile=False)
RECIPE |= dict(vae_tile=None, image_options=None, software="flux 0.1.0, torch 2.9")
SOURCE = "{http://iptc.org/std/Iptc4xmpExt/2008-02-29/}DigitalSourceType"
TERMS = "http://cv.iptc.org/newscodes/digitalsourcetype/"


def shown_text(path: Path) -> str | None:
    """Return the text that web UIs show, as they read it: PNG's `parameters`, or UserComment."""
    with Image.open(path) as image:
        image.load()
        if path.suffix == ".png":
            return image.info.get("parameters")
        comment = image.getexif().get_ifd(0x8769).get(0x9286)
        exif = image.info.get("exif", b"")
    if comment is None:
        return None
    assert b"MM\0*" in exif and b"\x92\x86\0\7" in exif  # big-endian; the type is undefined (7)
    assert comment[:8] == b"UNICODE\0"
    return comment[8:].decode("utf-16-be")


def read_settings(text: str) -> tuple[str, str, dict[str, str]]:
    """Parse the text as web UIs do: prompt, negative prompt, and the last line's settings."""
    *lines, last = text.split("\n")
    setting = r'\s*(\w[\w /-]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)'
    found = {k: json.loads(v) if v[:1] == '"' else v for k, v in re.findall(setting, last)}
    assert len(found) >= 3  # else the line belongs to the prompt
    prompt, _, negative = "\n".join(lines).partition("\nNegative prompt: ")
    return prompt, negative, found


@every_format
def test_other_programs_find_prompt_and_settings(tmp_path, suffix):
    """The text of the web UIs, whose names civitai and viewers know; Forge's for guidance."""
    made = {"Steps": "50", "Sampler": "Euler", "CFG scale": "4.0", "Seed": "7", "Size": "96x80"}
    made |= {"Model": "flux.2-klein-base-4b", "Version": "flux 0.1.0"}
    path = images.save(gray_image(), tmp_path / f"a{suffix}", RECIPE)
    assert read_settings(shown_text(path)) == (RECIPE["prompt"], RECIPE["negative_prompt"], made)
    assert images.read_metadata(path) == RECIPE
    dev = dict(model="flux.1-dev", transformer="a, b.gguf", guidance=[4, 1.5], prompt="日本語")
    dev |= dict(true_cfg_scale=2.5, negative_prompt=None, image_options=dict(strength=0.75))
    made |= {"CFG scale": "2.5", "Distilled CFG Scale": "4:1.5", "Model": "a, b.gguf"}
    made |= {"Denoising strength": "0.75"}
    path = images.save(gray_image(), tmp_path / f"a{suffix}", RECIPE | dev)
    assert read_settings(shown_text(path)) == ("日本語", "", made)


def test_text_for_other_programs_that_a_jpeg_cannot_hold_is_left_out(tmp_path):
    """UTF-16 takes twice the bytes of the metadata."""
    long = RECIPE | {"prompt": "a" * 40_000}
    path = images.save(gray_image(), tmp_path / "a.jpg", long)
    assert shown_text(path) is None and images.read_metadata(path) == long
    kept = []
    for length in range(32_560, 32_660, 2):  # about the limit, at which Pillow would refuse
        recipe = RECIPE | {"prompt": "a" * length}
        path = images.save(gray_image(), tmp_path / "b.jpg", recipe)
        assert images.read_metadata(path) == recipe
        kept.append(shown_text(path) is not None)
    assert kept == sorted(kept, reverse=True) and kept[0] and not kept[-1]
    assert shown_text(images.save(gray_image(), tmp_path / "a.webp", long)).startswith("a" * 40_000)


@every_format
@pytest.mark.parametrize("record", [True, False])
def test_generated_media_are_marked_as_iptc_asks(tmp_path, suffix, record):
    """https://cv.iptc.org/newscodes/digitalsourcetype: composite where input pixels remain."""
    options = dict(composite=True, outpaint=None)
    for changed, term in (
        (dict(), "trainedAlgorithmicMedia"),
        (dict(image_options=options), "trainedAlgorithmicMedia"),
        (dict(image_options=options, mask=dict(file="m")), "compositeWithTrainedAlgorithmicMedia"),
        (
            dict(image_options=options | dict(outpaint=[1, 2, 3, 4])),
            "compositeWithTrainedAlgorithmicMedia",
        ),
        (
            dict(image_options=options | dict(composite=False), mask=dict(file="m")),
            "trainedAlgorithmicMedia",
        ),
    ):
        recipe = RECIPE | changed
        path = images.save(gray_image(), tmp_path / f"a{suffix}", recipe, record=record)
        with Image.open(path) as image:
            found = {element.tag: element.text for element in xmp_properties(image.info["xmp"])}
        assert found[SOURCE] == TERMS + term
    path = images.save(gray_image(), tmp_path / f"a{suffix}", {}, record=record)
    assert b"digitalsourcetype" not in path.read_bytes()  # no model made a control image


@every_format
def test_metadata_that_are_left_out_leave_only_the_mark(tmp_path, suffix):
    secret = RECIPE | {"prompt": "SECRETPROMPT", "negative_prompt": "SECRETNEGATIVE"}
    path = images.save(gray_image(), tmp_path / f"a{suffix}", secret, record=False)
    content = path.read_bytes()
    for part in (b"SECRET", b"S\0E\0C\0R\0E\0T", b"klein", b"Steps", b"seed", b"torch"):
        assert part not in content
    assert content.count(b"trainedAlgorithmicMedia") == 1 and shown_text(path) is None
    with Image.open(path) as image:
        assert set(image.info) <= {"xmp", "XML:com.adobe.xmp", "jfif", "jfif_version"} | {
            *("jfif_unit", "jfif_density", "loop", "background", "timestamp", "duration")
        }
    with pytest.raises(UserError, match="removed them, or they were left out"):
        images.read_metadata(path)


@pytest.mark.parametrize("suffix", [".jpg", ".webp"])
@pytest.mark.parametrize("text", [*NASTY, "<x/>&lt;]]]]><![CDATA[>", "\u202e\x9b\ufffe\uffff"])
def test_xmp_is_well_formed_and_ascii(tmp_path, suffix, text):
    with Image.open(images.save(gray_image(), tmp_path / f"a{suffix}", {text: text})) as image:
        xmp = image.info["xmp"]
    (record,) = xmp_properties(xmp)
    assert record.tag == "{urn:flux:}metadata" and not list(record)
    assert json.loads(record.text, parse_constant=pytest.fail) == {text: text}
    assert re.fullmatch(rb"[ -~]*", xmp)


@every_format
@pytest.mark.parametrize("number", [math.nan, math.inf])
def test_number_that_json_cannot_spell_is_refused(tmp_path, suffix, number):
    with pytest.raises(ValueError, match="JSON"):
        images.save(gray_image(), tmp_path / f"a{suffix}", {"guidance": [number]})
    assert not list(tmp_path.iterdir())


@every_format
def test_metadata_of_input_images_are_not_copied(tmp_path, suffix):
    """A comment or a profile of a foreign image would be of another image."""
    image = gray_image()
    secret = b"<script>\x1b[2J"
    image.info |= {"comment": secret, "icc_profile": secret, "exif": secret, "xmp": secret}
    image.info |= {"Description": secret.decode()}
    assert secret not in images.save(image, tmp_path / f"a{suffix}", {}).read_bytes()


@every_format
@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(
    text=st.text(st.characters(codec="utf-8"), max_size=60),
    number=st.one_of(
        st.none(),
        st.integers(0, 2**63),
        st.floats(allow_nan=False, allow_infinity=False, allow_subnormal=False),
    ),
)
@example(text=" ".join(NASTY), number=2**63 - 1)
def test_metadata_comes_back(tmp_path, suffix, text, number):
    given_ = {"prompt": text, "number": number, text: [text]}
    path = images.save(gray_image(), tmp_path / f"a{suffix}", given_)
    try:
        assert images.read_metadata(path) == given_
        with Image.open(path) as made:
            assert made.format == images.FORMATS[suffix] and made.size == (16, 16)
            made.load()
    finally:
        path.unlink()


def test_png_is_lossless_and_jpeg_keeps_its_colours(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (16, 16, 3), np.uint8)
    path = images.save(Image.fromarray(noise), tmp_path / "a.png", {})
    assert np.array_equal(np.asarray(Image.open(path)), noise)
    path = images.save(Image.fromarray(noise), tmp_path / "a.jpg", {})
    with Image.open(path) as made:
        assert [component[1:3] for component in made.layer] == [
            (1, 1)
        ] * 3  # colours at full resolution


def test_png_is_smaller_than_by_default():
    """And faster, see scripts/bench.py: what PNG's filters leave is noise without repetitions."""
    y, x = np.mgrid[:256, :256]
    waves = np.stack([np.sin(x / 40 + y / 90), np.cos(x / 25), np.sin(y / 60)], -1)
    noise = np.random.default_rng(0).normal(0, 2, waves.shape)
    photo = Image.fromarray((127.5 + 90 * waves + noise).clip(0, 255).astype(np.uint8))
    sizes = []
    with tempfile.TemporaryDirectory() as folder:
        photo.save(usual := Path(folder, "usual.png"))
        ours = images.save(photo, Path(folder, "a.png"), {})
        sizes = [path.stat().st_size for path in (ours, usual)]
        assert np.array_equal(Image.open(ours), photo)
    assert sizes[0] <= sizes[1]


@every_format
def test_image_without_metadata_is_refused(tmp_path, suffix):
    gray_image().save(path := tmp_path / f"a{suffix}")
    with pytest.raises(UserError, match="is not an image with flux metadata"):
        images.read_metadata(path)


@pytest.mark.parametrize("text", ["", "[1]", "5", "null", "{", "[" * 100_000])
def test_parameters_of_another_kind_are_refused(tmp_path, monkeypatch, text):
    monkeypatch.setattr(images.json, "dumps", lambda *_, **__: text)
    path = images.save(gray_image(), tmp_path / "a.png", {})
    with pytest.raises(UserError, match="is not an image with flux metadata"):
        images.read_metadata(path)


def test_what_is_no_image_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\n, or so it says")
    (tmp_path / "a.txt").write_text("a cat")
    os.mkfifo(tmp_path / "pipe")
    for name, problem in (
        ("a.png", "is not an image of a supported format"),
        ("a.txt", "is not an image of a supported format"),
        ("none.png", "does not exist"),
        (".", "is a folder"),
        ("pipe", "is a pipe or a device"),
    ):
        with pytest.raises(UserError, match=problem):
            images.read_metadata(tmp_path / name)


def test_image_that_is_too_large_to_open_is_refused(tmp_path, monkeypatch):
    path = images.save(gray_image(), tmp_path / "a.png", {})
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 16)
    with pytest.raises(UserError, match="has more than 0 megapixels"):
        images.read_metadata(path)


@pytest.mark.parametrize(
    "suffix, found, place, changed, problem",
    [
        # the first block of pixels is said to have 1 byte: a SyntaxError of Pillow
        (".png", b"IDAT", -4, b"\0\0\0\1", "broken PNG file"),
        (".avif", b"av01", 0, b"\0\0\0\0", "Failed to decode image"),  # a RuntimeError
    ],
)
def test_every_kind_of_error_of_pillow_is_one_sentence(
    tmp_path, suffix, found, place, changed, problem
):
    gray_image().save(path := tmp_path / f"a{suffix}")
    content = bytearray(path.read_bytes())
    start = content.index(found) + place
    content[start : start + len(changed)] = changed
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"a{suffix}: is damaged \\({problem}"):
        images.read_metadata(path)


@pytest.mark.parametrize("suffix", [".png", ".jpg", ".webp", ".avif", ".tiff", ".gif"])
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(seed=st.integers(0, 2**32))
@pytest.mark.filterwarnings("ignore")
def test_metadata_of_a_damaged_image_are_read_or_refused(tmp_path, suffix, seed):
    path, fate = tmp_path / f"a{suffix}", random.Random(seed)
    if suffix in SUFFIXES and fate.random() < 0.5:
        path = images.save(gray_image(), path, {"prompt": "a"})
    else:
        gray_image().save(path)
    content = bytearray(path.read_bytes())
    for _ in range(fate.randint(1, 4)):
        content[fate.randrange(len(content))] = fate.randrange(256)
    path.write_bytes(content[: fate.choice([None, fate.randrange(len(content))])])
    try:
        assert type(images.read_metadata(path)) is dict
    except UserError as error:
        assert str(path) in str(error) and "\n" not in str(error)
    finally:
        path.unlink()


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize("name", ["a.bmp", "a.gif", "a", ".png", "a.png.tar", "a.safetensors"])
def test_unknown_suffix_is_refused_before_the_work(tmp_path, name):
    with pytest.raises(UserError, match=r"output: .*\(expected .png, .jpg, .jpeg, .webp\)"):
        images.check_output(tmp_path / name)


def test_suffix_may_be_in_capitals_and_the_folder_new(tmp_path):
    path = tmp_path / "new" / "folder" / "a.PNG"
    images.check_output(path)
    assert path.parent.is_dir() and not list(path.parent.iterdir())
    assert images.save(gray_image(), path, {}) == path and Image.open(path).format == "PNG"


def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for path in (
        tmp_path / "file" / "a.png",
        tmp_path / "file" / "below" / "a.png",
        tmp_path / ("a" * 300 + ".png"),
    ):
        with pytest.raises(UserError, match="output: .*cannot be written.*Use another"):
            images.check_output(path)
    assert [p.name for p in tmp_path.iterdir()] == ["file"]


def test_prompt_that_a_jpeg_cannot_hold_is_refused_before_the_work(tmp_path):
    for length, refused in ((5_000, False), (70_000, True)):
        text = "a" * length
        for suffix in SUFFIXES:
            path = tmp_path / f"{length}{suffix}"
            if refused and suffix in (".jpg", ".jpeg"):
                with pytest.raises(
                    UserError, match="output: the prompt is too long for the metadata of a JPEG"
                ):
                    images.check_output(path, ["short", text])
            else:
                images.check_output(path, ["short", text])
                assert images.read_metadata(images.save(gray_image(), path, {"prompt": text})) == {
                    "prompt": text
                }


@pytest.mark.parametrize("suffix", [".png", ".webp"])
def test_metadata_that_could_not_be_read_again_are_refused_before_the_work(tmp_path, suffix):
    """What is just accepted is read again; the next byte is refused."""
    path, metadata = tmp_path / f"a{suffix}", {"prompt": "", "seed": 7}
    metadata["prompt"] = "a" * (4_000_000 - len(images._xmp(metadata)))
    images.check_metadata_fits(path, metadata)
    assert images.read_metadata(images.save(gray_image(), path, metadata)) == metadata
    metadata["prompt"] += "a"
    with pytest.raises(UserError, match=r"^output: the prompt is too long .*4,000,001 bytes, at"):
        images.check_metadata_fits(path, metadata)


def test_the_room_of_a_jpeg_is_known_to_the_byte(tmp_path):
    path, metadata = tmp_path / "a.jpg", {"prompt": "", "seed": 7}
    metadata["prompt"] = "a" * (
        65_533 - len(b"http://ns.adobe.com/xap/1.0/\0") - len(images._xmp(metadata))
    )
    images.check_metadata_fits(path, metadata)
    assert images.read_metadata(images.save(gray_image(), path, metadata)) == metadata
    metadata["prompt"] += "a"
    with pytest.raises(UserError, match="too long .*a.jpg.*Use a shorter prompt, or .png or .webp"):
        images.check_metadata_fits(path, metadata)
    with pytest.raises(ValueError, match="too long"):  # Pillow's, when the picture is there
        images.save(gray_image(), path, metadata)
    for other in (tmp_path / "a.png", tmp_path / "a.webp"):
        images.check_metadata_fits(other, metadata)
        assert images.read_metadata(images.save(gray_image(), other, metadata)) == metadata
