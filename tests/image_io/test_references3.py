"""flux.image_io.references3 against diffusers' image processor of FLUX 3, and a table of sizes."""

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn_images import photo
from support.weight_files import refusal

import flux
from flux.configs import MODELS
from flux.image_io import request
from flux.image_io.output import to_pixels
from flux.image_io.references3 import ONE, canvas_of, prepare_references

SPEC = MODELS["flux.3-image-klein"]
# What diffusers does with images of these sizes: one alone (fitted, canvas), and one of several.
SIZES = {
    (512, 512): ((512, 512), (512, 512), (512, 512)),
    (1000, 750): ((1000, 750), (1008, 752), (992, 736)),
    (1023, 769): ((1023, 769), (1024, 784), (1008, 768)),
    (1200, 900): ((1200, 900), (1200, 912), (1168, 880)),
    (1920, 1080): ((1920, 1080), (1920, 1088), (1360, 768)),
    (2050, 2046): ((2040, 2036), (2048, 2048), (1024, 1008)),
    (3000, 2000): ((2496, 1664), (2496, 1664), (1248, 832)),
    (4032, 3024): ((2341, 1756), (2352, 1760), (1168, 880)),
    (8000, 500): ((4096, 256), (4096, 256), (4096, 256)),
    (17, 1000): ((17, 1000), (64, 1008), (16, 992)),
    (64, 40): ((64, 40), (64, 64), (64, 32)),
}


@pytest.mark.parametrize(("size", "expected"), SIZES.items(), ids=map(str, SIZES))
def test_sizes(size, expected):
    fitted, canvas, cropped = expected
    assert canvas_of(size, ONE) == (fitted, canvas)
    if max(size) <= 2100:  # the others take long to resize
        image = Image.new("RGB", size)
        (alone,) = prepare_references((image,))
        left, top = (canvas[0] - fitted[0]) // 2, (canvas[1] - fitted[1]) // 2
        assert alone.image.size == canvas
        assert alone.box == (left, top, left + fitted[0], top + fitted[1])
        assert [x.image.size for x in prepare_references((image, image))] == [cropped, cropped]


@pytest.mark.parametrize(
    "size", [(70, 45), (17, 200), (16, 90), (300, 64), (1023, 769), (2050, 300)]
)
def test_pixels_equal_diffusers(size):
    from diffusers.modular_pipelines.flux3.image_processor import Flux3ImageProcessor

    processor, image = Flux3ImageProcessor(), photo(*size, seed=1)
    theirs, box = processor.preprocess(image, resize_mode="fill")
    (alone,) = prepare_references((image,))
    assert torch.equal(to_pixels(alone.image), theirs) and alone.box == box["reference_crop"]
    theirs, _ = processor.preprocess(image, resize_mode="crop")
    assert torch.equal(to_pixels(prepare_references((image, image))[0].image), theirs)


def test_output_has_the_size_of_the_first_reference_and_is_cropped_back():
    one, two = photo(70, 45), photo(300, 200)
    size = request.output_size
    alone, several = flux.ImageInputs((one,)), flux.ImageInputs((two, one))
    assert size(SPEC, alone, None, None) == (80, 64)
    assert request.crop_box(SPEC, alone) == (5, 9, 75, 54)
    assert size(SPEC, several, None, None) == (288, 192)
    assert request.crop_box(SPEC, several) is None
    assert size(SPEC, alone, 128, None) == (128, 64)
    assert size(SPEC, alone, None, 256) == (80, 256)
    assert size(SPEC, several, 512, 256) == (512, 256)
    small = flux.ImageInputs((photo(33, 40), two))
    assert size(SPEC, small, None, None) == (64, 64)
    assert size(SPEC, None, None, None) == (1024, 1024)
    matched = flux.ImageInputs((one, two), match_image_size=2)
    assert size(SPEC, matched, None, None) == (288, 192)
    limited = flux.ImageInputs((two,), reference_limit=128)
    assert size(SPEC, limited, None, None) == (160, 96)
    assert request.crop_box(SPEC, limited) is not None


def test_too_small_and_too_many_references_are_refused():
    thin, one = Image.new("RGB", (10, 300)), photo(70, 45)
    said = refusal(request.check_images, SPEC, flux.ImageInputs((one, thin)))
    assert said.startswith("images: image 2 is 10x300: too small for a reference")
    assert "image 1 is 10x300" in refusal(request.check_images, SPEC, flux.ImageInputs((thin,)))
    long = Image.new("RGB", (20, 200_000))
    request.check_images(SPEC, flux.ImageInputs((long,)))
    assert "image 1 is 20x200000" in refusal(
        request.check_images, SPEC, flux.ImageInputs((long, one))
    )
    said = refusal(request.check_images, SPEC, flux.ImageInputs((one,) * 11))
    assert said == f"images: {SPEC.name} takes 1 to 10 images (got 11)."
    request.check_images(SPEC, flux.ImageInputs((one,) * 10))


def test_options_of_other_families_are_refused():
    one = photo(70, 45)
    for option in (dict(kv_cache=True), dict(keep_input_size=True), dict(outpaint=(0, 0, 16, 0))):
        said = refusal(request.check_images, SPEC, flux.ImageInputs((one,), **option))
        assert said.startswith(f"{next(iter(option))}: not supported by {SPEC.name}")
    assert np.asarray(one).any()
