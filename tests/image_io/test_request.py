"""flux.image_io.request: which model takes which option, the check of a request, and sizes.

The sizes are Black Forest Labs' (black-forest-labs/flux and flux2, src/*/sampling.py and util.py),
or follow by hand from their rules. No network runs.
"""

import math
import re
import sys
import warnings

import numpy as np
import pytest
import torch
from diffusers import FluxImg2ImgPipeline
from einops import rearrange
from PIL import Image
from support.drawn_images import photo
from support.model_zoo import (
    CONTROL,
    FILL,
    FLUX2,
    FLUX3,
    KLEIN,
    KONTEXT,
    KV,
    REDUX,
    RELEASED,
    START,
)
from torch import Tensor

from flux import conditioning, sampling
from flux.errors import UserError
from flux.image_io import request
from flux.image_io.request import ImageInputs

CANNY, CANNY_LORA, DEV = "flux.1-canny-dev", "flux.1-canny-dev-lora", "flux.1-dev"
WIDTH, HEIGHT, SEEDS = 96, 80, (5, 6)
HALF = Image.fromarray(np.uint8([0, 255]).repeat(WIDTH // 2)[None].repeat(HEIGHT, 0))
pytestmark = [
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with"),
    pytest.mark.filterwarnings("ignore:the image has colors"),
]


def refusal(call, *arguments, **options) -> str:
    """Return the one line of a UserError."""
    with pytest.raises(UserError) as caught:
        call(*arguments, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def blank(*sizes: tuple[int, int]) -> tuple[Image.Image, ...]:
    return tuple(Image.new("RGB", size) for size in sizes)


# ------------------------------------------------------------------------------ the check

SUPPORTED_BY = {  # option -> the models that support it, as the README has it
    "mask": START | FLUX2 | FLUX3 | {KONTEXT, FILL},
    "strength": START | FLUX2 | FLUX3 | {KONTEXT},
    "outpaint": {FILL},
    "mask_threshold": {FILL},
    "preprocess_control": CONTROL,
    "image_weights": {REDUX},
    "match_image_size": FLUX2 | FLUX3 | {KONTEXT},
    "keep_input_size": {KONTEXT},
    "reference_limit": FLUX2 | FLUX3,
    "kv_cache": FLUX2,
}
VALUES = dict(mask=HALF, strength=0.5, outpaint=(1, 2, 3, 4), mask_threshold=0.5)
VALUES |= dict(preprocess_control=True, image_weights=(1.0,), match_image_size=1)
VALUES |= dict(keep_input_size=True, reference_limit=512, kv_cache=False)
PHOTO = photo(WIDTH, HEIGHT)
GRAY_RGB = PHOTO.convert("L").convert("RGB")


def check(name: str, *images: Image.Image, **options) -> None:
    request.check_images(RELEASED[name], ImageInputs(images, **options))


def test_every_option_has_a_row_here():
    assert SUPPORTED_BY.keys() == VALUES.keys() == set(request.OPTIONS)
    assert request.non_default_options(ImageInputs((PHOTO,), **VALUES)) == list(request.OPTIONS)


@pytest.mark.parametrize("option", SUPPORTED_BY)
def test_unsupported_option_lists_supported_models(option):
    for name in RELEASED.keys() - SUPPORTED_BY[option]:
        message = refusal(check, name, PHOTO, **{option: VALUES[option]})
        if option == "kv_cache" and name in FLUX3:
            reason = "No FLUX 3 was trained with it: keys of references change with the time. "
            assert reason in message
            message = message.replace(reason, "")
        start, _, able = message.removesuffix("). Leave it out.").partition(" (only by ")
        assert start == f"{option}: not supported by {name}"
        assert set(able.split(", ")) == SUPPORTED_BY[option]
    message = refusal(check, "flux.2-tiny", **{option: VALUES[option]})
    assert message == f"{option}: needs an image. Pass one in `images`."


def test_number_of_images_is_checked():
    several = {name for name, spec in RELEASED.items() if spec.image_mode in ("reference", "redux")}
    assert several == FLUX2 | FLUX3 | {KONTEXT, REDUX}
    for name in RELEASED:
        most = 10 if name in several else 1
        mask = dict(mask=HALF) if name == FILL else {}
        check(name, *[GRAY_RGB] * most, **mask)
        for count in (0, most + 1):
            takes = "takes 1 to 10 images" if most == 10 else "takes one image"
            message = refusal(check, name, *[GRAY_RGB] * count)
            assert message.startswith(f"images: {name} {takes} (got {count}).")
            assert (KONTEXT in message) == (most == 1 or name == KONTEXT)


def test_models_that_require_an_image_say_so():
    for name in RELEASED:
        if name in {FILL, REDUX} | CONTROL:
            message = refusal(request.check_images, RELEASED[name], None)
            assert message == f"images: {name} needs an image. Pass one."
        else:
            request.check_images(RELEASED[name], None)


# fmt: off
WRONG = [
    (FILL, {}, "mask: flux.1-fill-dev needs to know where to fill. Pass a mask"),
    (KLEIN, dict(composite=False), "composite=False: has no effect without `mask` or `outpaint`"),
    (KLEIN, dict(strength=0), "strength: must be above 0 and at most 1 (got 0)."),
    (KLEIN, dict(strength=1.01), "strength: must be above 0 and at most 1 (got 1.01)."),
    (KLEIN, dict(strength=math.nan), "strength: must be above 0 and at most 1 (got nan)."),
    (FILL, dict(mask=HALF, mask_threshold=0), "mask_threshold: must be above 0 and at most 1"),
    (FILL, dict(mask=HALF, mask_threshold=1.5), "mask_threshold: must be above 0 and at most 1"),
    (FILL, dict(mask=HALF, mask_threshold=math.nan), "mask_threshold: must be above 0"),
    (FILL, dict(outpaint=(0, 0, 0, 0)), "outpaint: margins of 0, 0, 0, 0"),
    (FILL, dict(outpaint=(-16, 0, 0, 0)), "outpaint: margins of -16, 0, 0, 0"),
    (FILL, dict(outpaint=(9999, 0, 0, 9999)), "Use smaller margins."),
    (REDUX, dict(image_weights=(1.0, 1.0)), "image_weights: 2 values for 1 images. Pass one"),
    (REDUX, dict(image_weights=(math.nan,)), "image_weights: must be finite numbers."),
    (REDUX, dict(image_weights=(math.inf,)), "image_weights: must be finite numbers."),
    (KLEIN, dict(reference_limit=63), "reference_limit: must be at least 64 (got 63)"),
    (KLEIN, dict(reference_limit=-5), "reference_limit: must be at least 64 (got -5)"),
    (KLEIN, dict(match_image_size=0), "match_image_size: must be the number of an image, from"),
    (KONTEXT, dict(match_image_size=3), "match_image_size: must be the number of an image"),
    (KLEIN, dict(mask=Image.new("L", (70, 90), 255)), "mask: the mask of 70x90 for an image"),
    (FILL, dict(mask=Image.new("L", (WIDTH, HEIGHT))), "mask: is all black"),
]
# fmt: on


@pytest.mark.parametrize("name, options, message", WRONG)
def test_wrong_value_is_refused(name, options, message):
    assert message in refusal(check, name, PHOTO, **options)


def test_too_small_and_too_long_images_are_refused_by_number():
    for name in ("flux.2-tiny", CANNY, KONTEXT, KLEIN, REDUX):
        before = () if name == CANNY else (PHOTO,)
        number = f"images: image {len(before) + 1} is "
        for size, words in (
            ((63, 90), "63x90: both sides must be at least 64 pixels"),
            ((1, 1), "1x1: both sides must be at least 64 pixels"),
            ((64, 513), "64x513: one side may be at most 8 times the other"),
            ((513, 64), "513x64: one side may be at most 8 times the other"),
        ):
            assert number + words in refusal(check, name, *before, *blank(size))


def test_control_photo_needs_opencv(monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    message = refusal(check, CANNY, PHOTO, preprocess_control=True)
    assert "OpenCV, which is not installed. Run `pip install -e '.[control]'`" in message


def test_warnings_about_control_images_and_the_cache():
    with pytest.warns(UserWarning, match="has colors, .* white edges on black: .*photo, add `prep"):
        check(CANNY, PHOTO)
    with pytest.warns(UserWarning, match="not trained with `kv_cache=True`: .*an approximation"):
        check(KLEIN, PHOTO, kv_cache=True)
    with pytest.warns(UserWarning, match="not trained with `kv_cache=False`"):
        check(KV, PHOTO, kv_cache=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check(CANNY, GRAY_RGB)
        check(KV, PHOTO, kv_cache=True)
        check(KLEIN, PHOTO, kv_cache=False)


def test_pipeline_checks_its_images(zoo):
    """The pipeline runs this check too."""
    message = refusal(zoo.pipe(DEV), "a cat", images=ImageInputs((PHOTO,), strength=2))
    assert message == "strength: must be above 0 and at most 1 (got 2)."


# ------------------------------------------------------------------------------ strength


def skipped_by_diffusers(steps: int, strength: float) -> int:
    class Scheduled:
        class scheduler:
            timesteps, order, set_begin_index = torch.arange(steps), 1, lambda index: None

    return steps - FluxImg2ImgPipeline.get_timesteps(Scheduled, steps, strength, "cpu")[1]


def skipped_by_bfl(steps: int, strength: float) -> int:
    """As in src/flux/cli of black-forest-labs/flux: t_idx = int((1 - image2image_strength) * n)."""
    return int((1 - strength) * steps)


@pytest.mark.parametrize(
    "rounding, skipped", [("rounded", skipped_by_diffusers), ("bfl", skipped_by_bfl)]
)
def test_warning_names_the_largest_strength_that_keeps_some_of_the_image(rounding, skipped):
    for steps in (2, 3, 4, 5, 7, 28, 50):
        with pytest.warns(UserWarning, match=f"runs all {steps} steps from noise") as told:
            assert request.start_strength(0.9999, steps, rounding) == 0.9999
        largest = float(re.search("use (.*) or less$", str(told[0].message))[1])
        assert skipped(steps, largest) == 1 and skipped(steps, largest + 0.001) == 0
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            assert request.start_strength(largest, steps, rounding) == largest
            assert request.start_strength(1, steps, rounding) == 1  # asked for
            default = request.start_strength(None, steps, rounding)
        assert default == min(0.8, largest) and skipped(steps, default) > 0


def test_one_step_keeps_nothing_of_the_image():
    for strength in (None, 0.0001, 0.8):
        with pytest.warns(UserWarning, match="runs 1 step from noise .* use 2 steps or more$"):
            request.start_strength(strength, 1)


def test_default_strength_of_schnell_starts_at_three_quarters_of_the_noise(zoo):
    """Four even steps, 1, 0.75, ...: x = 0.25 image + 0.75 noise at the first that is run."""
    pipe, (green, violet) = zoo.pipe("flux.1-schnell"), blank((64, 64), (64, 64))
    green.paste((10, 200, 30), (0, 0, 64, 64))
    violet.paste((200, 10, 200), (0, 0, 64, 64))
    noise = sampling.noise([5], 64, 4, 4, spatial=True)
    images = []
    for image in (green, violet):
        conditions = pipe.condition(ImageInputs((image,)), 64, 64)
        x, _ = conditioning.initial_latents(noise, 0.75, conditions, pipe.device, contiguous=True)
        expected = 0.25 * conditions.init + 0.75 * noise
        assert torch.allclose(rearrange(x, "b (h w) c -> b c h w", h=4), expected, atol=1e-6)
        times: list[float] = []
        pipe.sample(
            pipe.encode("a star"),
            [5],
            conditions=conditions,
            callback=lambda step, t, x, times=times: times.append(t),
        )
        assert times == [0.5, 0.25, 0.0]
        (made,) = pipe("a star", seed=5, images=conditions)
        images.append(made.tobytes())
    assert images[0] != images[1]


# ------------------------------------------------------------------------------ sizes


LARGE, MIDDLE, SMALL = (3000, 2000), (1000, 700), (500, 300)
INSIDE = dict(mask=HALF.resize(MIDDLE))


@pytest.mark.parametrize(
    "name, sizes, options, expected",
    [
        (
            "flux.2-dev",
            [LARGE],
            {},
            [(2464, 1648)],
        ),  # 2024² pixels: 2478x1652, cropped to multiples of 16
        ("flux.2-dev", [LARGE, SMALL], {}, [(1248, 832), (496, 288)]),  # 1024² each: 1254x836
        ("flux.2-dev", [LARGE], dict(reference_limit=1024), [(1248, 832)]),  # as diffusers has it
        (KLEIN, [LARGE, LARGE], dict(reference_limit=512), [(624, 416)] * 2),  # 627x418
        (KLEIN, [LARGE, LARGE], dict(reference_limit=2024), [(2464, 1648)] * 2),
        (KLEIN, [(2024, 2024)], {}, [(2016, 2016)]),
        (KLEIN, [(2048, 2048), SMALL], {}, [(1024, 1024), (496, 288)]),
        (KONTEXT, [MIDDLE], {}, [(1248, 832)]),  # 1.43, between 1184x880 = 1.35 and 1248x832 = 1.5
        (
            KONTEXT,
            [(600, 1000), (64, 64), (1600, 200)],
            {},
            [(800, 1328), (1024, 1024), (1568, 672)],
        ),
        (KONTEXT, [MIDDLE, (64, 79)], dict(keep_input_size=True), [(992, 688), (64, 64)]),
    ],
)
def test_sizes_in_which_references_are_taken(name, sizes, options, expected):
    fitted = request.resize_references(RELEASED[name], ImageInputs(blank(*sizes), **options))
    assert [picture.size for picture in fitted] == expected


def test_references_of_kontext_are_stretched_and_those_of_flux2_cropped():
    picture = photo(90, 70)
    (stretched,) = request.resize_references(
        RELEASED[KONTEXT], ImageInputs((picture,), keep_input_size=True)
    )
    assert np.array_equal(stretched, picture.resize((80, 64), Image.Resampling.LANCZOS))
    (cropped,) = request.resize_references(RELEASED[KLEIN], ImageInputs((picture,)))
    assert np.array_equal(cropped, np.asarray(picture)[3:67, 5:85])


@pytest.mark.parametrize(
    "name, options, shapes",
    [
        (
            KLEIN,
            {},
            [(80, 96), (832, 1248)],
        ),  # of the two, one is left to be capped, but two are seen
        (KLEIN, dict(reference_limit=512), [(80, 96), (416, 624)]),
        (KONTEXT, {}, [(80, 96), (832, 1248)]),
    ],
)
def test_sizes_of_what_is_seen_beside_a_start(name, options, shapes):
    """An init image is a reference at the size of the output; the others are as always."""
    spec, seen = RELEASED[name], []

    def encode(pixels: Tensor) -> Tensor:
        seen.append(tuple(pixels.shape[2:]))
        return torch.zeros(1, 4, pixels.shape[2] // 16, pixels.shape[3] // 16)

    pictures = ImageInputs((*blank((96, 80)), *blank(LARGE)), strength=0.5, **options)
    given = conditioning.condition(spec, pictures, 96, 80, encode, embed=None)
    assert seen == shapes and given.init.shape == (1, 4, 5, 6)
    assert given.references.shape == (1, sum(h * w // 256 for h, w in shapes), 4)


@pytest.mark.parametrize(
    "name, sizes, options, asked, expected",
    [
        (DEV, None, {}, (None, None), (1024, 1024)),  # without a picture
        ("flux.2-tiny", None, {}, (64, None), (64, 256)),
        (REDUX, [LARGE], {}, (None, None), (1024, 1024)),  # which looks at pictures from afar
        (REDUX, [LARGE], {}, (None, 512), (1024, 512)),
        (
            DEV,
            [MIDDLE],
            {},
            (None, None),
            (1008, 704),
        ),  # its own, rounded up, to be cropped in the end
        (DEV, [MIDDLE], INSIDE, (None, None), (1008, 704)),
        (DEV, [MIDDLE], {}, (512, None), (512, 352)),  # 704·512/1008 = 357.6
        (DEV, [MIDDLE], {}, (None, 512), (736, 512)),  # 1008·512/704 = 733.1
        (DEV, [MIDDLE], {}, (512, 512), (512, 512)),
        (DEV, [(2048, 1024)], {}, (None, None), (2048, 1024)),  # twice 1024² at most
        (FILL, [MIDDLE], INSIDE, (None, None), (1008, 704)),
        (FILL, [MIDDLE], dict(outpaint=(10, 20, 30, 40)), (None, None), (1040, 768)),  # 1040x760
        (CANNY, [(1001, 700)], {}, (None, None), (1008, 704)),  # stretched to the nearest
        (CANNY, [(999, 695)], {}, (None, None), (992, 688)),
        (CANNY_LORA, [(999, 695)], {}, (None, 688), (992, 688)),
        (KONTEXT, [MIDDLE], {}, (None, None), (1248, 832)),
        (KONTEXT, [LARGE, MIDDLE], {}, (624, None), (624, 416)),
        (KONTEXT, [MIDDLE], dict(keep_input_size=True), (None, None), (992, 688)),
        (KONTEXT, [MIDDLE], dict(strength=0.5), (None, None), (1008, 704)),
        (
            KONTEXT,
            [SMALL, LARGE],
            dict(match_image_size=2),
            (None, None),
            (2992, 2000),
        ),  # its own size, rounded down
        (
            "flux.2-dev",
            [LARGE],
            {},
            (None, None),
            (1248, 832),
        ),  # 1024² pixels, though one reference is seen at 2024²
        ("flux.2-dev", [LARGE], dict(reference_limit=2024), (None, None), (1248, 832)),
        ("flux.2-dev", [LARGE], dict(reference_limit=512), (None, None), (624, 416)),
        (KLEIN, [SMALL, LARGE], {}, (None, None), (496, 288)),  # the first's
        (KLEIN, [SMALL, LARGE], dict(match_image_size=2), (None, None), (2992, 2000)),
        (
            KLEIN,
            [SMALL, LARGE],
            dict(match_image_size=2),
            (None, 512),
            (768, 512),
        ),  # 2992·512/2000 = 766.0
        (KLEIN, [LARGE], {}, (512, None), (512, 336)),  # 832·512/1248 = 341.3
        (KLEIN, [MIDDLE, LARGE], INSIDE, (None, None), (1008, 704)),
    ],
)
def test_size_that_images_ask_for(name, sizes, options, asked, expected):
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pictures = None if sizes is None else ImageInputs(blank(*sizes), **options)
        assert request.output_size(RELEASED[name], pictures, *asked) == expected


@pytest.mark.parametrize(
    "name, size, options, own, expected",
    [
        (
            DEV,
            LARGE,
            {},
            (3008, 2000),
            (1760, 1168),
        ),  # times sqrt(2·1024²/(3008·2000)): 1776.0 by 1180.8
        (DEV, (2049, 1024), {}, (2064, 1024), (2048, 1008)),  # 2056.0 by 1020.0
        (FILL, LARGE, dict(outpaint=(8, 0, 0, 0)), (3008, 2000), (1760, 1168)),
        (CANNY, LARGE, {}, (3008, 2000), (1760, 1168)),
        (KLEIN, LARGE, dict(strength=0.5), (3008, 2000), (1760, 1168)),
        (
            "flux.2-tiny",
            (640, 480),
            dict(strength=0.5),
            (640, 480),
            (416, 304),
        ),  # of 2·256² pixels: 418.0 by 313.5
    ],
)
def test_images_larger_than_a_model_knows_are_noted(name, size, options, own, expected):
    spec, pictures = RELEASED[name], ImageInputs(blank(size), **options)
    words = f"{own[0]}x{own[1]} is large for {name}: the output is {expected[0]}x{expected[1]}"
    with pytest.warns(UserWarning, match=words):
        assert request.output_size(spec, pictures, None, None) == expected
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # whoever gives a size knows it
        assert request.output_size(spec, pictures, *own) == own
        assert request.output_size(spec, pictures, expected[0], None)[0] == expected[0]
