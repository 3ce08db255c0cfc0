"""flux.image_io.input: a file is read for what it shows, or refused; sizes and masks of images.

The truth: drawn values in every mode that Pillow writes (and OpenCV, where Pillow does not),
diffusers' image processors, live, and literals.
"""

import io
import math
import os
import random
import struct
import warnings
import zlib

import numpy as np
import pytest
import torch
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.flux.pipeline_flux_kontext import PREFERRED_KONTEXT_RESOLUTIONS
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageCms

from flux.errors import UserError
from flux.image_io import input as inputs
from flux.image_io.output import to_pixels

FEW = settings(
    max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
QUIET = pytest.mark.filterwarnings("error")
both = pytest.mark.parametrize("read", [inputs.read_image, inputs.read_mask])
RED, GREY = (200, 30, 10), (90, 90, 90)


def noise(*shape: int, seed: int = 0, high: int = 256, dtype=np.uint8) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, high, shape, dtype)


def noise_image(width: int, height: int, seed: int = 0) -> Image.Image:
    return Image.fromarray(noise(height, width, 3, seed=seed))


def flat(width: int, height: int, mode: str = "RGB") -> Image.Image:
    return Image.new(mode, (width, height), 77 if mode == "L" else RED)


def levels(image: Image.Image) -> list:
    """Of the first row."""
    return np.asarray(image)[0].tolist()


# ------------------------------------------------------------------------------ modes


@QUIET
@pytest.mark.parametrize(
    "suffix", ["png", "bmp", "tiff", "webp", "ppm", "tga", "gif", "jp2", "qoi"]
)
def test_lossless_formats_come_back_exactly(tmp_path, suffix):
    given_ = noise_image(24, 16)
    if suffix == "gif":
        given_ = given_.quantize(256).convert("RGB")
    given_.save(
        path := tmp_path / f"a.{suffix}", **({"lossless": True} if suffix == "webp" else {})
    )
    made = inputs.read_image(path)
    assert made.mode == "RGB" and np.array_equal(made, given_)


@QUIET
@pytest.mark.parametrize("suffix", ["jpg", "avif"])
def test_lossy_formats_are_read(tmp_path, suffix):
    flat(24, 16).save(path := tmp_path / f"a.{suffix}", quality=95)
    assert np.abs(np.asarray(inputs.read_image(path), int) - RED).max() <= 3


@QUIET
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_grey_is_scaled(tmp_path, suffix):
    """Level v of 65535 is v / 257 of 255, rounded. Pillow's own conversion clips at 255."""
    values = [0, 128, 129, 257, 385, 386, 32767, 32896, 65406, 65407, 65535]
    nearest = [0, 0, 1, 1, 1, 2, 127, 128, 254, 255, 255]
    Image.fromarray(np.array([values], np.uint16)).save(path := tmp_path / f"a.{suffix}")
    assert levels(inputs.read_mask(path)) == nearest
    assert levels(inputs.read_image(path)) == [[v] * 3 for v in nearest]


@QUIET
def test_16_bit_grey_in_other_modes(tmp_path):
    """A PGM of 16 bits is mode "I" in Pillow, a big-endian TIFF is "I;16B"."""
    values = np.array([[0, 257, 25700, 65535]], np.uint16)
    (tmp_path / "a.pgm").write_bytes(b"P5 4 1 65535\n" + values.astype(">u2").tobytes())
    Image.frombytes("I;16B", (4, 1), values.astype(">u2").tobytes()).save(tmp_path / "b.tiff")
    Image.fromarray(values.astype(np.int32)).save(tmp_path / "c.tiff")
    modes = []
    for name in ("a.pgm", "b.tiff", "c.tiff"):
        with Image.open(tmp_path / name) as image:
            modes.append(image.mode)
        assert levels(inputs.read_mask(tmp_path / name)) == [0, 1, 100, 255]
    assert modes == ["I", "I;16B", "I"]


@pytest.mark.parametrize("value", [65536, -1])
def test_32_bit_grey_of_unknown_range_is_refused(tmp_path, value):
    Image.fromarray(np.array([[0, value]], np.int32)).save(path := tmp_path / "a.tiff")
    with pytest.raises(
        UserError, match=r"a.tiff: has values from .* \(expected 0 to 65535\). Scale"
    ):
        inputs.read_image(path)


@QUIET
def test_floats_from_0_to_1_are_scaled(tmp_path):
    Image.fromarray(np.array([[0, 0.2, 0.5, 0.999, 1]], np.float32)).save(
        path := tmp_path / "a.tiff"
    )
    assert levels(inputs.read_mask(path)) == [0, 51, 128, 255, 255]  # 127.5 goes to the even level


@pytest.mark.parametrize("value", [1.01, -0.01, 255, math.nan, math.inf])
def test_floats_of_another_range_are_refused(tmp_path, value):
    Image.fromarray(np.array([[0.5, value]], np.float32)).save(path := tmp_path / "a.tiff")
    with pytest.raises(UserError, match=r"a.tiff: has values from .* \(expected 0 to 1\). Scale"):
        inputs.read_mask(path)


@QUIET
@pytest.mark.parametrize("suffix", ["png", "tiff"])
def test_16_bit_rgb_is_read(tmp_path, suffix):
    """To within a level: Pillow drops the lower byte."""
    cv2 = pytest.importorskip("cv2")
    values = noise(8, 8, 3, high=65536, dtype=np.uint16)
    cv2.imwrite(str(path := tmp_path / f"a.{suffix}"), values[..., ::-1])
    assert np.abs(np.asarray(inputs.read_image(path), int) - values / 257).max() <= 1


@QUIET
def test_modes_without_transparency(tmp_path):
    grey = Image.fromarray(noise(4, 8))
    cases = {"L": grey, "1": grey.convert("1"), "P": noise_image(8, 4).quantize(16)}
    cases |= {
        "LA": grey.convert("LA"),
        "RGBA": noise_image(8, 4).convert("RGBA"),
    }  # with a channel, but opaque
    for mode, given_ in cases.items():
        given_.save(path := tmp_path / f"{mode}.png")
        with Image.open(path) as image:
            assert image.mode == mode
        made = inputs.read_image(path)
        assert made.mode == "RGB" and np.array_equal(made, given_.convert("RGB"))
    for mode in ("L", "1", "LA"):
        made = inputs.read_mask(tmp_path / f"{mode}.png")
        assert made.mode == "L" and np.array_equal(made, cases[mode].convert("L"))


def test_a_colour_profile_that_is_not_applied_is_noted(tmp_path):
    """But not sRGB, which is what a picture without one is taken for; nor what is no profile."""
    lab, srgb = (
        ImageCms.ImageCmsProfile(ImageCms.createProfile(kind)).tobytes() for kind in ("LAB", "sRGB")
    )
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", icc_profile=lab)
    with pytest.warns(UserWarning, match="a.png: the color profile '.*Lab.*' is not applied"):
        assert inputs.read_image(tmp_path / "a.png").getpixel((0, 0)) == (255, 0, 0)
    for data in (srgb, b"no profile"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "a.png", icc_profile=data)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            inputs.read_image(tmp_path / "a.png")


def test_cmyk_is_read_with_a_warning(tmp_path):
    Image.new("CMYK", (8, 8), (0, 255, 255, 0)).save(path := tmp_path / "a.tiff")
    with pytest.warns(
        UserWarning, match="a.tiff: converted from CMYK to RGB without a color profile"
    ):
        assert levels(inputs.read_image(path))[0] == [255, 0, 0]


def test_lab_is_refused(tmp_path):
    Image.new("LAB", (8, 8)).save(path := tmp_path / "a.tiff")
    with pytest.raises(
        UserError, match="a.tiff: the LAB color space is not supported. Save it as RGB"
    ):
        inputs.read_image(path)


# ------------------------------------------------------------------------------ transparency


def transparent(mode: str) -> tuple[Image.Image, dict]:
    """Return pixels: opaque red (or gray), the same half transparent, one of hidden color."""
    rgba = Image.fromarray(np.array([[[*RED, 255], [*RED, 51], [0, 0, 255, 0]]], np.uint8))
    if mode == "P":
        image = Image.fromarray(np.array([[0, 1, 2]], np.uint8)).convert("P")
        image.putpalette([*RED, *RED, 0, 0, 255])
        return image, dict(transparency=bytes([255, 51, 0]))
    if mode == "RGB":
        return Image.fromarray(np.array([[RED, RED, (0, 0, 255)]], np.uint8)), dict(
            transparency=(0, 0, 255)
        )
    if mode == "LA":
        return Image.fromarray(np.array([[[90, 255], [90, 51], [0, 0]]], np.uint8)), {}
    return rgba, {}


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_what_is_transparent_is_white(tmp_path, mode):
    image, options = transparent(mode)
    image.save(path := tmp_path / "a.png", **options)
    with Image.open(path) as saved:
        assert saved.mode == mode
    with pytest.warns(UserWarning, match="a.png: transparent parts were put on white"):
        first, second, third = levels(inputs.read_image(path))
    colour = GREY if mode == "LA" else RED
    half = colour if mode == "RGB" else tuple(round(0.2 * c + 0.8 * 255) for c in colour)
    assert (tuple(first), third) == (colour, [255, 255, 255])
    assert np.abs(np.array(second) - half).max() <= 1


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "RGB"])
def test_a_transparent_mask_is_refused(tmp_path, mode):
    image, options = transparent(mode)
    image.save(path := tmp_path / "a.png", **options)
    with pytest.raises(
        UserError, match="a.png: a mask must be opaque .*. Save it without transparency"
    ):
        inputs.read_mask(path)


@QUIET
def test_a_mask_in_colours_is_refused(tmp_path):
    Image.fromarray(np.array([[RED, GREY]], np.uint8)).save(path := tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: a mask must be gray .*. Paint it black and white"):
        inputs.read_mask(path)
    black_and_white = Image.fromarray(
        np.where(noise(32, 32, 1) > 127, 255, 0).repeat(3, 2).astype(np.uint8)
    )
    black_and_white.save(path := tmp_path / "a.jpg", quality=75)
    assert inputs.read_mask(path).mode == "L"
    black_and_white.save(path := tmp_path / "b.png")
    assert np.array_equal(inputs.read_mask(path), np.asarray(black_and_white)[..., 0])


# ------------------------------------------------------------------------------ files


@QUIET
@both
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation_is_undone(tmp_path, read, orientation):
    """The TIFF 6.0 specification, Orientation: where first row and column lie in the file."""
    upright = noise(3, 5)
    stored = {
        1: upright,
        2: upright[:, ::-1],
        3: upright[::-1, ::-1],
        4: upright[::-1],
        5: upright.T,
        6: upright.T[::-1],
        7: upright.T[::-1, ::-1],
        8: upright.T[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(np.ascontiguousarray(stored)).save(path := tmp_path / "a.png", exif=exif)
    assert np.array_equal(np.asarray(read(path).convert("L")), upright)
    assert inputs.upright_size(path) == (5, 3)


@both
def test_missing_file_folder_and_pipe_are_refused(tmp_path, read):
    (tmp_path / "file").write_text("a cat")
    os.mkfifo(tmp_path / "pipe")  # which, opened, would wait for ever
    with pytest.raises(UserError, match="none.png: does not exist. Name an image file"):
        read(tmp_path / "none.png")
    with pytest.raises(UserError, match=": is a folder, not a plain file. Name an image file"):
        read(str(tmp_path))
    with pytest.raises(
        UserError, match="pipe: is a pipe or a device, not a plain file. Name an image file"
    ):
        read(tmp_path / "pipe")
    with pytest.raises(UserError, match="does not exist"):
        read(tmp_path / "file" / "a.png")
    with pytest.raises(UserError, match="cannot be read .*too long.*Name an image file"):
        read(tmp_path / ("a" * 300))


@both
def test_file_without_rights_is_refused(tmp_path, read, monkeypatch):
    flat(8, 8).save(path := tmp_path / "a.png")

    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    with pytest.raises(
        UserError,
        match=r"a.png: cannot be read \(Permission denied\). Check its name and permissions",
    ):
        read(path)


@both
@pytest.mark.parametrize(
    "content",
    [
        b"a cat",
        b"<svg xmlns='http://www.w3.org/2000/svg'/>",
        b"\0\0\0\x18ftypheic\0\0\0\0mif1heic",
        b"%PDF-1.7",
    ],
)
def test_what_is_no_image_is_refused(tmp_path, read, content):
    (path := tmp_path / "a.png").write_bytes(content)
    with pytest.raises(
        UserError,
        match="a.png: is not an image of a supported format, or is damaged. Save it as PNG",
    ):
        read(path)


@both
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "tif"])
def test_empty_file_is_said_to_be_empty(tmp_path, read, suffix):
    (path := tmp_path / f"a.{suffix}").touch()
    with pytest.raises(UserError, match=rf"a.{suffix}: is empty \(0 bytes\). Get it again"):
        read(path)


LARGE = b"x" * 2_000_000  # twice what Pillow reads by itself


def png_with(*chunks: tuple[bytes, bytes]) -> bytes:
    """Return an image that is red, as PNG with chunks (by the PNG specification) before IDAT."""
    flat(24, 16).save(file := io.BytesIO(), "PNG")
    head, tail = file.getvalue()[:33], file.getvalue()[33:]  # signature and IHDR
    for kind, data in chunks:
        checksum = zlib.crc32(kind + data)
        head += struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)
    return head + tail


@pytest.mark.parametrize(
    "chunk",
    [
        (b"eXIf", b"garbage"),
        (b"eXIf", b"MM\0*"),
        (b"zTXt", b"Raw profile type exif\0\0" + zlib.compress(b"\nexif\n    9\nzzzz")),
    ],
    ids=["no TIFF", "cut", "no hex"],
)
def test_damaged_exif_leaves_the_image_as_it_is_stored(tmp_path, chunk):
    """Browsers show such files, too. A file that was opened by Image.open is no exception."""
    (path := tmp_path / "a.png").write_bytes(png_with(chunk))
    for image, name in ((path, "a.png"), (Image.open(path), "images")):
        with pytest.warns(UserWarning, match=f"{name}: the EXIF data are damaged"):
            assert levels(inputs.as_image(image)) == levels(flat(24, 16))
    assert inputs.upright_size(path) == (24, 16)


@pytest.mark.parametrize("kind, data", [(b"iCCP", b""), (b"zTXt", b"parameters\0\7x")])
def test_chunks_that_stop_pillow_are_one_sentence(tmp_path, kind, data):
    (path := tmp_path / "a.png").write_bytes(png_with((kind, data)))
    with pytest.raises(UserError, match="a.png: is not an image .*, or is damaged. Save it"):
        inputs.read_image(path)


SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


@QUIET
@pytest.mark.parametrize(
    "chunk",
    [
        (b"iCCP", b"sRGB\0\0" + zlib.compress(SRGB + LARGE)),
        (b"zTXt", b"history\0\0" + zlib.compress(LARGE)),
        (b"tEXt", b"workflow\0" + LARGE),
        (b"iTXt", b"workflow\0\1\0\0\0" + zlib.compress(LARGE)),
        (b"iTXt", b"workflow\0\0\0\0\0" + LARGE),
        (b"eXIf", b"II*\0\x08\0\0\0\0\0" + LARGE),
    ],
    ids=lambda chunk: chunk[0].decode(),
)
def test_png_with_a_large_profile_or_text_is_read(tmp_path, chunk):
    (path := tmp_path / "a.png").write_bytes(png_with(chunk))
    assert np.array_equal(inputs.read_image(path), flat(24, 16))


def test_png_with_a_text_that_is_a_bomb_is_refused_with_its_reason(tmp_path):
    bomb = zlib.compress(bytes(2**26 + 1), 9)
    for kind, data in ((b"zTXt", b"a\0\0"), (b"iCCP", b"a\0\0"), (b"iTXt", b"a\0\1\0\0\0")):
        (path := tmp_path / "a.png").write_bytes(png_with((kind, data + bomb)))
        with pytest.raises(UserError, match="a.png: has texts or a color profile of more than 67"):
            inputs.read_image(path)


def test_images_that_are_programs_are_not_run(tmp_path):
    """Pillow would have Ghostscript draw this."""
    flat(8, 8).save(path := tmp_path / "a.eps")
    with pytest.raises(UserError, match="is not an image of a supported format"):
        inputs.read_image(path)


@both
@pytest.mark.parametrize("suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff"])
def test_truncated_file_is_refused(tmp_path, read, suffix):
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(noise(64, 64)).save(path)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises(UserError, match=f"a.{suffix}: is (damaged|not an image)"):
        read(path)


@pytest.mark.parametrize(
    "suffix", ["png", "jpg", "webp", "gif", "bmp", "tiff", "jp2", "avif", "tga", "qoi", "ppm"]
)
@FEW
@given(seed=st.integers(0, 2**32))
@pytest.mark.filterwarnings("ignore")
def test_damaged_file_is_read_or_refused(tmp_path, suffix, seed):
    path, fate = tmp_path / f"a.{suffix}", random.Random(seed)
    exif = Image.Exif()
    exif[0x0112] = 6
    options = {"exif": exif} if suffix in ("png", "jpg", "webp", "tiff", "avif") else {}
    Image.fromarray(noise(12, 8, 3)).save(path, **options)
    content = bytearray(path.read_bytes())
    for _ in range(fate.randint(1, 4)):
        content[fate.randrange(min(len(content), 200))] = fate.randrange(256)
    path.write_bytes(content[: fate.choice([None, fate.randrange(len(content))])])
    try:
        assert inputs.read_image(path).mode == "RGB"
    except UserError as error:
        assert "a." + suffix in str(error) and "\n" not in str(error)


@both
@QUIET
@pytest.mark.parametrize(
    "over", [1, 2]
)  # at once too many pixels Pillow only warns, at twice as many it refuses
def test_decompression_bomb_is_refused(tmp_path, monkeypatch, read, over):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10_000)
    Image.new("1", (101 * over, 100)).save(path := tmp_path / "a.png")
    with pytest.raises(UserError, match="a.png: has more than 0 megapixels. Scale it down"):
        read(path)
    Image.new("1", (100, 100)).save(path)
    assert read(path).size == (100, 100)


@both
@pytest.mark.parametrize("suffix", ["gif", "png", "webp", "tiff"])
def test_several_frames_are_refused(tmp_path, read, suffix):
    flat(8, 8).save(
        path := tmp_path / f"a.{suffix}", save_all=True, append_images=[flat(8, 8, "L")]
    )
    with pytest.raises(UserError, match=f"a.{suffix}: holds 2 images. Save one of them as PNG"):
        read(path)


@QUIET
def test_photo_with_a_preview_is_read(tmp_path):
    """Many phones and cameras write two pictures in a JPEG; the first is the photo."""
    flat(8, 8).save(
        path := tmp_path / "a.jpg",
        "MPO",
        save_all=True,
        append_images=[flat(4, 4, "L")],
        quality=95,
    )
    with Image.open(path) as image:
        assert (image.format, image.n_frames) == ("MPO", 2)
    made = inputs.read_image(path)
    assert made.size == (8, 8) and np.abs(np.asarray(made, int) - RED).max() <= 3


# ------------------------------------------------------------------------------ sizes


@pytest.mark.parametrize("size", [(64, 64), (64, 512), (512, 64), (4000, 500)])
def test_references_that_may_be(size):
    """The bounds of black-forest-labs/flux2, sampling.py: at least 64 pixels, at most 8:1."""
    inputs.check_reference(flat(*size))
    Flux2ImageProcessor.check_image_input(flat(*size))


@pytest.mark.parametrize("size", [(63, 64), (64, 63), (1, 1), (64, 513), (513, 64), (4001, 500)])
def test_references_that_may_not_be(size):
    with pytest.raises(
        UserError, match=f"a.png is {size[0]}x{size[1]}: .*. (Use a larger one|Crop it)"
    ):
        inputs.check_reference(flat(*size), "a.png")
    with pytest.raises(ValueError):
        Flux2ImageProcessor.check_image_input(flat(*size))


@settings(max_examples=25, deadline=None)
@given(width=st.integers(64, 300), height=st.integers(64, 300), limit=st.integers(80**2, 200**2))
@example(width=200, height=200, limit=200**2)  # at the limit: untouched
@example(width=201, height=199, limit=200**2)
@example(width=512, height=64, limit=80**2)
def test_fitting_a_reference_is_diffusers(width, height, limit):
    """Flux2Pipeline: scale to the area, floor to multiples of 16, crop. Equal to the bit."""
    given_ = noise_image(width, height)
    theirs = Flux2ImageProcessor._resize_if_exceeds_area(given_, limit)
    size = dict(width=theirs.width // 16 * 16, height=theirs.height // 16 * 16)
    expected = Flux2ImageProcessor(vae_scale_factor=16).preprocess(
        theirs, **size, resize_mode="crop"
    )
    assert torch.equal(to_pixels(inputs.fit_reference(given_, limit)), expected)


@pytest.mark.parametrize(
    "size, limit, fitted",
    [
        ((1024, 1024), 1024**2, (1024, 1024)),
        ((1000, 750), 1024**2, (992, 736)),
        ((4000, 3000), 1024**2, (1168, 880)),  # 1182.4 x 886.8, before it is cropped
        ((4000, 3000), 2024**2, (2336, 1744)),  # 2337.1 x 1752.8
        ((2024, 2024), 2024**2, (2016, 2016)),
        ((8000, 1000), 1024**2, (2896, 352)),  # 2896.3 x 362.04
    ],
)
def test_literal_sizes_of_references(size, limit, fitted):
    """By hand from black-forest-labs/flux2, sampling.py: sqrt(limit / area), floor, floor to 16."""
    assert inputs.fit_reference(flat(*size), limit).size == fitted


def test_the_crop_is_about_the_centre():
    values = np.zeros((70, 69, 3), np.uint8)
    values[3:67, 2:66] = 255  # (70 - 64) // 2 above, (69 - 64) // 2 to the left
    made = np.asarray(inputs.fit_reference(Image.fromarray(values), 1024**2))
    assert made.shape == (64, 64, 3) and (made == 255).all()


def test_kontext_sizes_are_diffusers():
    assert inputs.KONTEXT_SIZES == PREFERRED_KONTEXT_RESOLUTIONS


@settings(max_examples=300, deadline=None)
@given(width=st.integers(1, 9000), height=st.integers(1, 9000))
def test_preferred_size_is_diffusers(width, height):
    """The choice of FluxKontextPipeline.__call__, over its list."""
    _, *theirs = min((abs(width / height - w / h), w, h) for w, h in PREFERRED_KONTEXT_RESOLUTIONS)
    assert inputs.preferred_size(width, height) == tuple(theirs)


def test_literal_preferred_sizes():
    """16:9 = 1.778 lies between 1392:752 = 1.851 and 1328:800 = 1.66; 3:2 equals 1248:832."""
    sizes = {(512, 512): (1024, 1024), (1920, 1080): (1392, 752), (1500, 1000): (1248, 832)}
    sizes |= {(1080, 1920): (752, 1392), (9000, 10): (1568, 672), (10, 9000): (672, 1568)}
    assert {size: inputs.preferred_size(*size) for size in sizes} == sizes


def test_of_two_as_near_the_narrower(monkeypatch):
    monkeypatch.setattr(inputs, "KONTEXT_SIZES", [(300, 200), (100, 200), (50, 100)])
    assert inputs.preferred_size(100, 100) == (50, 100)  # 0.5 and 1.5 are both half from 1


@FEW
@given(width=st.integers(1, 40), height=st.integers(1, 40), mode=st.sampled_from(["RGB", "L"]))
def test_padding_repeats_the_edge_and_is_undone(width, height, mode):
    given_ = noise_image(width, height).convert(mode)
    made = inputs.pad_to_16(given_)
    assert made.mode == mode
    assert made.size == (math.ceil(width / 16) * 16, math.ceil(height / 16) * 16)
    before, after = np.asarray(given_), np.asarray(made)
    assert np.array_equal(after[:height, :width], before)
    rows, columns = (
        np.arange(after.shape[0]).clip(max=height - 1),
        np.arange(after.shape[1]).clip(max=width - 1),
    )
    assert np.array_equal(after, before[rows][:, columns])


# ------------------------------------------------------------------------------ masks


def test_expanding():
    given_ = noise_image(5, 3)
    canvas, mask = inputs.outpaint_canvas(given_, left=1, top=2, right=3, bottom=4)
    assert (canvas.mode, canvas.size, mask.mode, mask.size) == ("RGB", (9, 9), "L", (9, 9))
    assert np.array_equal(np.asarray(canvas)[2:5, 1:6], given_)
    new = np.ones((9, 9), bool)
    new[2:5, 1:6] = False
    assert np.array_equal(mask, np.where(new, 255, 0))
    rows, columns = (
        np.clip(np.arange(-2, 7), 0, 2),
        np.clip(np.arange(-1, 8), 0, 4),
    )  # beyond an edge, what is on it
    assert np.array_equal(canvas, np.asarray(given_)[rows][:, columns])
    assert inputs.outpaint_canvas(given_, 0, 0, 1, 0)[0].size == (6, 3)


@pytest.mark.parametrize("margins", [(0, 0, 0, 0), (-1, 0, 5, 0), (16, 0, 0, -16)])
def test_expanding_by_nothing_or_less_is_refused(margins):
    with pytest.raises(
        UserError,
        match=f"outpaint: margins of {', '.join(map(str, margins))} .*must be numbers of pixels",
    ):
        inputs.outpaint_canvas(flat(8, 8), *margins)


def test_expanding_too_far_is_refused():
    """Before the canvas of 3 TB is made. A pipeline makes at most 16.8 megapixels."""
    with pytest.raises(
        UserError,
        match=r"1000064x1000064, 1000128 megapixels \(at most 16.8\). Use smaller margins",
    ):
        inputs.outpaint_canvas(flat(64, 64), 10**6, 10**6, 0, 0)
    assert inputs.outpaint_canvas(flat(4096, 16), 0, 4080, 0, 0)[0].size == (4096, 4096)
    with pytest.raises(UserError, match="megapixels"):
        inputs.outpaint_canvas(flat(4096, 16), 0, 4081, 0, 0)


@QUIET
def test_mask_of_the_same_size_is_untouched():
    mask = Image.fromarray(noise(48, 64))
    assert inputs.match_mask_size(flat(64, 48), mask) is mask


@pytest.mark.parametrize("size", [(32, 24), (128, 96), (100, 75), (21, 16), (64, 49), (4, 3)])
def test_mask_of_the_same_shape_is_resized(size):
    """The black and the white half stay so, and nothing overshoots: gray is at the border only."""
    mask = Image.new("L", size)
    mask.paste(255, (size[0] // 2, 0, *size))
    with pytest.warns(
        UserWarning, match=f"the mask of {size[0]}x{size[1]} for an image of 64x48 was resized"
    ):
        made = np.asarray(inputs.match_mask_size(flat(64, 48), mask), int)
    assert made.shape == (48, 64)
    assert (
        (made[:, :16] == 0).all()
        and (made[:, 48:] == 255).all()
        and (np.diff(made, axis=1) >= 0).all()
    )


@pytest.mark.parametrize("size", [(48, 64), (64, 64), (128, 100), (64, 46), (32, 26)])
def test_mask_of_another_shape_is_refused(size):
    with pytest.raises(
        UserError,
        match=f"mask: the mask of {size[0]}x{size[1]} for an image of 64x48 has another shape",
    ):
        inputs.match_mask_size(flat(64, 48), flat(*size, "L"))


@settings(max_examples=200, deadline=None)
@given(
    width=st.integers(16, 500),
    height=st.integers(16, 500),
    scale=st.floats(0.1, 8),
    by=st.sampled_from([int, round, math.ceil]),
)
@pytest.mark.filterwarnings("ignore:the mask")
def test_any_rounding_of_a_scaled_mask_is_of_the_same_shape(width, height, scale, by):
    size = max(1, by(width * scale)), max(1, by(height * scale))
    assert inputs.match_mask_size(flat(width, height), flat(*size, "L")).size == (width, height)


@pytest.mark.parametrize("size", [(64, 48), (32, 24)])
@pytest.mark.filterwarnings("ignore:.*resized")
def test_a_mask_that_marks_nothing_is_refused(size):
    with pytest.raises(
        UserError, match="mask: is all black, so that nothing would change. Paint white"
    ):
        inputs.match_mask_size(flat(64, 48), Image.new("L", size))


@pytest.mark.filterwarnings("ignore:.*resized")
def test_a_mark_that_is_lost_in_resizing_is_refused():
    mask = Image.new("L", (6400, 4800))
    mask.putpixel((3, 3), 255)
    with pytest.raises(UserError, match="all black"):
        inputs.match_mask_size(flat(64, 48), mask)


def test_a_mask_that_marks_everything_is_noted():
    with pytest.warns(UserWarning, match="all white: nothing of the image is kept"):
        inputs.match_mask_size(flat(64, 48), Image.new("L", (64, 48), 255))


@FEW
@given(seed=st.integers(0, 2**32), feather=st.integers(0, 5))
def test_what_is_not_masked_keeps_its_bytes(seed, feather):
    """And, deep in the mask, the result its own. Masks: rectangles, specks and all grays."""
    fate = np.random.default_rng(seed)
    values = np.where(fate.random((40, 50)) < 0.02, fate.integers(0, 256, (40, 50)), 0).astype(
        np.uint8
    )
    for _ in range(3):
        (y, x), (h, w) = fate.integers(0, 40, 2), fate.integers(1, 30, 2)
        values[y : y + h, x : x + w] = fate.choice([0, 255])
    original, result = noise_image(50, 40, seed=1), noise_image(50, 40, seed=2)
    made = np.asarray(inputs.composite(result, original, Image.fromarray(values), feather))
    before, after = np.asarray(original), np.asarray(result)
    assert np.array_equal(made[values == 0], before[values == 0])
    padded = np.pad(values, feather, constant_values=255)  # beyond the picture there is no seam
    span = 2 * feather + 1
    deep = np.lib.stride_tricks.sliding_window_view(padded, (span, span)).min(axis=(2, 3)) == 255
    assert np.array_equal(made[deep], after[deep])
    low, high = np.minimum(before, after), np.maximum(before, after)
    assert ((low <= made) & (made <= high)).all()


def test_the_seam_lies_inside_the_mask():
    """Black to white, masked from the sixth pixel on: steps of a fifth from the border on."""
    mask = Image.fromarray(np.array([[0] * 5 + [255] * 8] * 3, np.uint8))
    made = inputs.composite(Image.new("RGB", (13, 3), "white"), Image.new("RGB", (13, 3)), mask)
    assert levels(made) == [[v] * 3 for v in [0] * 5 + [51, 102, 153, 204] + [255] * 4]


@pytest.mark.parametrize(
    "width, weights",
    [(1, [1]), (2, [1, 1]), (3, [1 / 2, 1, 1 / 2]), (5, [1 / 3, 2 / 3, 1, 2 / 3, 1 / 3])],
)
def test_the_middle_of_a_narrow_mask_is_the_results(width, weights):
    mask = Image.fromarray(np.array([[0] * 6 + [255] * width + [0] * 6] * 3, np.uint8))
    made = inputs.composite(Image.new("RGB", mask.size, "white"), Image.new("RGB", mask.size), mask)
    assert levels(made) == [[round(255 * w)] * 3 for w in [0] * 6 + weights + [0] * 6]


def test_outpainting_leaves_no_seam_of_another_colour():
    wide, mask = inputs.outpaint_canvas(Image.new("RGB", (20, 20), "white"), 16, 0, 0, 16)
    made = inputs.composite(Image.new("RGB", wide.size, "white"), wide, mask)
    assert made.getextrema() == ((255, 255),) * 3


@pytest.mark.parametrize(
    "threshold, first_white", [(0.5, 128), (0.25, 64), (1.0, 255), (51 / 255, 51)]
)
def test_hardened_masks(threshold, first_white):
    mask = Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16))
    hard = np.asarray(inputs.binarize_mask(mask, threshold))
    assert np.array_equal(hard.flatten(), np.where(np.arange(256) >= first_white, 255, 0))
    if threshold == 0.5:
        options = dict(
            do_resize=False, do_normalize=False, do_convert_grayscale=True, do_binarize=True
        )
        assert np.array_equal(hard / 255, VaeImageProcessor(**options).preprocess(mask)[0, 0])


def test_masks_with_nothing_left_are_refused():
    with pytest.raises(
        UserError, match="mask: is too dark.*its lightest gray is 100 of 255.*Paint white what"
    ):
        inputs.binarize_mask(Image.new("L", (8, 8), 100), 0.5)


def test_soft_masks_blend():
    original, result = noise_image(256, 2, seed=1), noise_image(256, 2, seed=2)
    mask = Image.fromarray(np.arange(256, dtype=np.uint8)[None].repeat(2, 0))
    weight = np.arange(256)[None, :, None] / 255
    exact = np.asarray(original) * (1 - weight) + np.asarray(result) * weight  # in float64
    made = np.asarray(inputs.composite(result, original, mask, feather=0))
    assert np.abs(made - exact).max() <= 0.5001  # to the nearest level, but for halves
    even = Image.new("L", (256, 2), 51)
    exact = np.asarray(original) * 0.8 + np.asarray(result) * 0.2
    assert (
        np.abs(np.asarray(inputs.composite(result, original, even)) - exact).max() <= 0.5001
    )  # no seam in an even grey


# ------------------------------------------------------------------------------ in memory


def test_images_in_memory_are_named_in_general():
    with pytest.warns(UserWarning, match="images: transparent parts"):
        assert levels(inputs.as_image(transparent("RGBA")[0]))[2] == [255, 255, 255]
    with pytest.raises(UserError, match="mask: a mask must be opaque"):
        inputs.as_mask(transparent("RGBA")[0])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inputs.as_mask(Image.open(io.BytesIO(_png(flat(4, 4, "L"))))).getpixel((0, 0)) == 77


def _png(image: Image.Image) -> bytes:
    image.save(file := io.BytesIO(), "PNG")
    return file.getvalue()
