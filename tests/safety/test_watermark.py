"""flux.safety.watermark and .bfl_watermark: what attacks leave, false alarms, the library's levels.

Images are drawings of the toy's world and smooth random ones; the attacks are Pillow's.
"""

import binascii
import hashlib
import io

import numpy as np
import pytest
from PIL import Image

from flux import toy
from flux.errors import UserError
from flux.safety import bfl_watermark, marking, watermark
from flux.toy.scenes import arrange, scenes


def smooth(width: int, height: int, seed: int) -> Image.Image:
    """Return random levels every 16 pixels, and between them by bilinear interpolation."""
    shape = (height // 16 + 2, width // 16 + 2, 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape).astype(np.float32)
    y, x = np.arange(height) / 16, np.arange(width) / 16
    i, j = y.astype(int), x.astype(int)
    a, b = (y - i)[:, None, None], (x - j)[None, :, None]
    above = (1 - b) * noise[i][:, j] + b * noise[i][:, j + 1]
    below = (1 - b) * noise[i + 1][:, j] + b * noise[i + 1][:, j + 1]
    return Image.fromarray(np.rint((1 - a) * above + a * below).astype(np.uint8))


def drawings(count: int, size: int) -> list[Image.Image]:
    rng, some = np.random.default_rng(0), scenes(0, None)
    layouts = [arrange(next(some), rng) for _ in range(count)]
    return [Image.fromarray(toy.draw(layout, size, size)) for layout in layouts]


def saved(image: Image.Image, kind: str, quality: int) -> Image.Image:
    file = io.BytesIO()
    image.save(file, kind, quality=quality)
    return Image.open(file).convert("RGB")


def cropped(image: Image.Image, share: float) -> Image.Image:
    """Cut off so much of the area, from all sides."""
    w, h = image.size
    x, y = (int(side * (1 - (1 - share) ** 0.5) / 2) for side in (w, h))
    return image.crop((x, y, w - x, h - y))


ATTACKS = {
    "none": lambda image: image,
    "jpeg 50": lambda image: saved(image, "JPEG", 50),
    "webp 80": lambda image: saved(image, "WEBP", 80),
    "half size": lambda image: image.resize((image.width // 2, image.height // 2), 1),
    "crop of 50 %": lambda image: cropped(image, 0.5),
    "darker": lambda image: image.point(lambda level: int(0.8 * level)),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_payload_survives(attack):
    for number, image in enumerate([*drawings(2, 512), smooth(512, 480, 0)]):
        payload = 0x123456789ABC + number
        found = watermark.detect(ATTACKS[attack](watermark.embed(image, payload)))
        assert found is not None and found.payload == payload


def test_mark_is_faint_and_the_same_every_time():
    image = drawings(1, 512)[0]
    marked = watermark.embed(image, 7)
    error = np.asarray(marked, float) - np.asarray(image, float)
    assert 10 * np.log10(255**2 / np.square(error).mean()) > 35  # seen: 38
    assert np.array_equal(marked, watermark.embed(image, 7)) and marked != image


def test_unmarked_images_carry_nothing():
    """Nor do those that are turned round, and those without any texture."""
    images = [*drawings(6, 256), smooth(256, 256, 0), smooth(320, 256, 1)]
    assert all(not marking.find(image) for image in images)
    turned = watermark.embed(images[0], 1).rotate(180)
    assert watermark.detect(turned) is None
    assert watermark.detect(Image.new("RGB", (512, 512))) is None
    assert watermark.detect(Image.new("RGB", (20, 500))) is None


def test_check_bits_are_crc_16():
    bits = watermark.to_bits(0x313233343536)  # "123456"
    crc = int("".join(map(str, bits[48:])), 2)
    assert crc == binascii.crc_hqx(b"123456", 0xFFFF) and len(bits) == 64
    assert watermark.from_bits(bits) == 0x313233343536
    for place in range(64):
        bits[place] ^= 1
        assert watermark.from_bits(bits) is None
        bits[place] ^= 1


def test_tile_stays_the_same_in_all_versions():
    """Images that are out there must stay readable: the tile of the first version."""
    tile = watermark.layout()
    chips = np.concatenate([part.numpy().astype("<i8") for part in tile])
    assert sorted(chips[1024:]) == list(range(1024)) and abs(tile.signs.sum()) < 100
    assert hashlib.sha256(chips.tobytes()).hexdigest()[:16] == "b305fc0f3ad653b7"


@pytest.mark.parametrize("size", [(255, 1024), (1024, 255), (64, 64)])
def test_small_images_are_refused(size):
    with pytest.raises(UserError, match=f"watermark: an image of {size[0]}x{size[1]} is too small"):
        watermark.embed(Image.new("RGB", size), 0)
    marking.check_size("tile", 256, 256)
    with pytest.raises(UserError, match="watermark: .* too small for BFL's mark"):
        marking.check_size("bfl", 256, 255)


# ------------------------------------------------------------------------------ BFL's mark

LEVELS = {  # size -> SHA-256 of the levels of invisible-watermark 0.2.0 (opencv 4, pywavelets 1.9)
    (512, 512): "d08794069d1eef3990624ac6e4ce487f93a9e7b3eacf7235bcc9a74d27f3f046",
    (260, 272): "17f6243ee6272a53b17cc0ff5fe9bfecb2c643a6e97e8273483b15754950dc20",
    (467, 301): "e620cab3bea2100b01d7d39afad23ff65bd43dbe407738e67e06a1e19edb73ef",
}


@pytest.mark.parametrize("seed, size", enumerate(LEVELS))
def test_bfl_mark_equals_the_library(seed, size):
    marked = bfl_watermark.embed(smooth(*size, seed))
    assert hashlib.sha256(marked.tobytes()).hexdigest() == LEVELS[size]
    assert bfl_watermark.count_equal_bits(marked) >= bfl_watermark.LIKELY
    assert bfl_watermark.count_equal_bits(smooth(*size, seed)) < 36


@pytest.mark.parametrize("size", [(512, 512), (331, 402), (1360, 768)])
def test_bfl_mark_equals_the_library_live(size):
    library = pytest.importorskip("imwatermark")
    bits = [int(digit) for digit in bin(0b001010101111111010000111100111001111010100101110)[2:]]
    encoder = library.WatermarkEncoder()
    encoder.set_watermark("bits", bits)
    image = smooth(*size, 9)
    bgr = np.asarray(image, np.float32)[..., ::-1].copy()
    theirs = np.rint(encoder.encode(bgr, "dwtDct")[..., ::-1].clip(0, 255))
    ours = bfl_watermark.embed(image)
    assert np.array_equal(ours, theirs)
    bgr = np.asarray(ours, np.float32)[..., ::-1].copy()
    decoded = library.WatermarkDecoder("bits", len(bits)).decode(bgr, "dwtDct")
    assert (np.array(decoded) == bits).sum() == bfl_watermark.count_equal_bits(ours)


def test_payload_names_what_decides_an_image():
    metadata = dict(model="flux.2-tiny", prompt="a", seed=1, steps=4, device="cpu", threads=2)
    payload = marking.payload_of(metadata)
    assert payload == marking.payload_of(metadata | dict(device="cuda", threads=9, images=[]))
    assert 0 <= payload < 2**48
    for other in (dict(prompt="b"), dict(seed=2), dict(steps=5)):
        assert marking.payload_of(metadata | other) != payload
