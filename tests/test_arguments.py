"""Values that Python programs pass: each works as the plain Python value, or is named in an error.

The truth: the image of the plain values, by the embedded toy.
"""

import io
import re
import warnings
from decimal import Decimal
from fractions import Fraction
from inspect import signature
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from support.drawn_images import photo

import flux
from flux import arguments
from flux.argument_names import ATTRIBUTES, OURS
from flux.errors import UserError
from flux.image_io.request import ImageInputs, convert_values
from flux.pipeline import Pipeline

PROMPT = "a red star"
PHOTO = photo(96, 64)
LEVELS = np.asarray(PHOTO)
MASK = np.zeros((64, 96), np.uint8)
MASK[:, :48] = 255


# ------------------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    "value",
    [
        *(kind(7) for kind in (np.int8, np.uint8, np.int32, np.int64, np.uint64)),
        *(torch.tensor(7, dtype=dtype) for dtype in (torch.int64, torch.uint8)),
        *(np.array(7), np.array([7]), np.array([[7]], object), np.array(["7"])),
        *(torch.tensor([7]), torch.tensor([[7]]), "7", " 7 ", np.str_("7")),
    ],
    ids=repr,
)
def test_integers_of_any_library_are_plain(value):
    assert type(arguments.to_integer("seed", value)) is int
    assert arguments.to_integer("seed", value) == 7


@pytest.mark.parametrize(
    "value",
    [
        *(None, 7.0, "7.0", "seven", "", True, np.True_, [7], (7, 8), {}, b"7", 7j, Path("7")),
        *(np.float64(7), np.array([7, 8]), torch.tensor(7.0), torch.tensor([7, 8]), object()),
        *(torch.empty((), dtype=torch.int64, device="meta"), "9" * 5000),
        *(np.array(True), np.array([True]), torch.tensor(True), torch.tensor([True])),
        *(np.array([7.0]), torch.tensor([7.0]), np.array([7], "m8[ns]"), np.array([None])),
    ],
    ids=lambda value: f"{value!r:.20}",
)
def test_what_is_no_integer_is_named(value):
    with pytest.raises(UserError, match=r"^seed: must be a whole number \(got .{1,80}\)\.$"):
        arguments.to_integer("seed", value)


def test_numbers_of_any_library_are_floats():
    for value in (0.5, np.float64(0.5), np.float32(0.5), np.array(0.5), torch.tensor(0.5)):
        assert arguments.to_number("scale", value) == 0.5
    for value in (np.array([0.5]), np.array([[0.5]]), torch.tensor([[0.5]])):
        assert arguments.to_number("scale", value) == 0.5
    for value in ("0.5", "5e-1", Decimal("0.5"), Fraction(1, 2), torch.tensor([0.5])):
        assert type(arguments.to_number("scale", value)) is float
        assert arguments.to_number("scale", value) == 0.5
    for value in (None, "half", True, [0.5, 1], np.zeros(2), 1j, b"1", "", 10**400, {}):
        with pytest.raises(UserError, match=r"^scale: must be a number \(got "):
            arguments.to_number("scale", value)
    for value in (np.array(True), np.array([True]), torch.tensor(True), torch.tensor([True])):
        with pytest.raises(UserError, match=r"^scale: must be a number \(got "):
            arguments.to_number("scale", value)


def test_lists_of_any_library_are_lists():
    for values in ([3, 2], (3, 2), np.array([3.0, 2.0]), torch.tensor([3, 2]), ["3", "2"]):
        assert arguments.to_numbers("guidance", values) == [3.0, 2.0]
    for value in (3, "3", np.float32(3), torch.tensor(3.0)):
        assert arguments.to_numbers("guidance", value) == [3.0]
    assert arguments.to_numbers("guidance", "35") == [35.0]
    assert arguments.to_texts("prompts", np.array(["a", "b"])) == ["a", "b"]
    assert arguments.to_texts("prompts", (x for x in "ab")) == ["a", "b"]
    for value in (None, 3, b"ab", ["a", 3], [["a"]], Path("a")):
        with pytest.raises(UserError, match="^prompts: must be a text, or a list of texts"):
            arguments.to_texts("prompts", value)


# ------------------------------------------------------------------------------ images


def same(images: ImageInputs) -> bool:
    converted = convert_values(images)
    (image,) = converted.images
    return image.mode == "RGB" and np.array_equal(np.asarray(image), LEVELS)


def test_images_in_any_form_are_the_same_image(tmp_path):
    file = tmp_path / "photo.png"
    PHOTO.save(file)
    forms = (PHOTO, LEVELS, torch.from_numpy(LEVELS.copy()), file, str(file), Image.open(file))
    for form in (*forms, LEVELS[::-1][::-1], np.asfortranarray(LEVELS)):
        assert same(ImageInputs(form)) and same(ImageInputs((form,))) and same(ImageInputs([form]))
    assert same(LEVELS[None]) and same(file)  # a batch of one; an image without ImageInputs
    two = convert_values(ImageInputs((file, LEVELS)))
    assert len(two.images) == 2
    with pytest.warns(UserWarning, match="^images: transparent parts were put on white"):
        clear = convert_values(np.zeros((64, 64, 4), np.uint8)).images[0]
    assert clear.getpixel((5, 5)) == (255, 255, 255)


def test_masks_in_any_form_are_the_same_mask(tmp_path):
    file = tmp_path / "mask.png"
    Image.fromarray(MASK).save(file)
    for mask in (MASK, MASK > 0, MASK.astype(np.uint16) * 257, torch.from_numpy(MASK), file):
        converted = convert_values(ImageInputs(PHOTO, mask)).mask
        assert converted.mode == "L" and np.array_equal(np.asarray(converted), MASK)


@pytest.mark.parametrize(
    "image",
    [
        *(None, 3, b"x", {}, io.BytesIO(), object(), [None], (), [[1, 2]]),
        *(np.zeros((64, 64, 3)), np.zeros((3, 64, 64), np.uint8), np.zeros((0, 4, 3), np.uint8)),
        *(np.zeros(5, np.uint8), torch.zeros(3, 64, 64), np.array(3)),
    ],
    ids=lambda image: type(image).__name__,
)
def test_what_is_no_image_is_named(image):
    """An empty tuple is an error of the count, which `check_images` finds."""
    if isinstance(image, tuple):
        assert convert_values(ImageInputs(image)).images == ()
        return
    with pytest.raises(UserError, match="^images: must be an image of Pillow, the path of a"):
        convert_values(ImageInputs(image))


def test_opened_files_are_upright_as_their_paths_are(tmp_path):
    """What Image.open returns has its camera's orientation; what is made of it may be turned."""
    file = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees to the right
    PHOTO.save(file, exif=exif, quality=95)
    stored = Image.open(file).convert("RGB")
    upright = np.rot90(np.asarray(stored), -1)
    for form in (file, Image.open(file)):
        (image,) = convert_values(ImageInputs(form)).images
        assert np.array_equal(np.asarray(image), upright)
    (image,) = convert_values(ImageInputs(stored.rotate(-90, expand=True))).images
    assert np.array_equal(np.asarray(image), upright)


def test_file_objects_are_refused_with_what_to_do(tmp_path):
    """Who closes them, and where reading starts, is their owner's to say."""
    PHOTO.save(tmp_path / "a.png")
    for file in (io.BytesIO((tmp_path / "a.png").read_bytes()), (tmp_path / "a.png").open("rb")):
        with file, pytest.raises(UserError, match=r"^images: .* Open it with PIL.Image.open\.$"):
            convert_values(ImageInputs(file))
        assert file.closed


def test_images_of_pillow_that_cannot_be_read_are_named(tmp_path):
    PHOTO.save(tmp_path / "a.png")
    data = (tmp_path / "a.png").read_bytes()
    with pytest.raises(UserError, match="^images: is damaged"):
        convert_values(Image.open(io.BytesIO(data[:-5000])))
    closed = Image.open(tmp_path / "a.png")
    closed.close()
    with pytest.raises(UserError, match="^images: is damaged"):
        convert_values(closed)
    with pytest.raises(UserError, match="^cat.jpg: does not exist"):
        convert_values("cat.jpg")


def test_options_of_images_are_plain():
    given = dict(strength="0.5", mask_threshold=np.float32(0.5), image_weights=np.array([1.0]))
    given |= dict(outpaint=np.array([1, 2, 3, 4]), match_image_size=np.int64(1))
    given |= dict(composite=np.False_, kv_cache=np.True_, reference_limit="512")
    plain = dict(strength=0.5, mask_threshold=0.5, image_weights=(1.0,), outpaint=(1, 2, 3, 4))
    plain |= dict(match_image_size=1, composite=False, kv_cache=True, reference_limit=512)
    converted = convert_values(ImageInputs(PHOTO, **given))
    assert converted == convert_values(ImageInputs(converted.images, **plain))
    assert all(type(getattr(converted, name)) is type(plain[name]) for name in plain)
    for name, value in (
        *(
            ("strength", "strong"),
            ("outpaint", (1, 2, 3)),
            ("outpaint", 4),
            ("outpaint", "1,2,3,4"),
        ),
        *(
            ("image_weights", ["x"]),
            ("match_image_size", True),
            ("composite", "no"),
            ("kv_cache", 1),
        ),
        *(("reference_limit", 512.0), ("mask_threshold", PHOTO), ("preprocess_control", None)),
    ):
        with pytest.raises(UserError, match=f"^{name}: must be "):
            convert_values(ImageInputs(PHOTO, **{name: value}))


# ------------------------------------------------------------------------------ the pipeline


@pytest.fixture(scope="module")
def pipe():
    return flux.load("flux.2-tiny")


@pytest.mark.filterwarnings("ignore:the image of .* is stretched")
def test_values_of_other_libraries_give_the_same_image(pipe):
    plain = dict(width=64, height=64, steps=2, guidance=[3.0, 2.0], seed=3, num_images=1)
    (expected,) = pipe(PROMPT, **plain, images=ImageInputs((PHOTO,), strength=0.5))
    for changed in (
        dict(width=np.int64(64), height=torch.tensor(64), steps=np.int32(2), seed=np.int64(3)),
        dict(guidance=np.array([3.0, 2.0]), seed=torch.tensor(3), num_images="1"),
        dict(guidance=["3", "2"], width="64", height="64", steps="2", seed="3"),
    ):
        images = ImageInputs(LEVELS, strength=np.float64(0.5))
        (image,) = pipe(PROMPT, **plain | changed, images=images)
        assert image.tobytes() == expected.tobytes()
    (bare,) = pipe(PROMPT, **plain, images=PHOTO)
    (wrapped,) = pipe(PROMPT, **plain, images=ImageInputs((PHOTO,)))
    assert bare.tobytes() == wrapped.tobytes() != expected.tobytes()


@pytest.mark.parametrize(
    "name, value",
    [
        *(
            ("prompts", None),
            ("prompts", ["a", 3]),
            ("prompts", 3),
            ("seed", 1.5),
            ("seed", [1, 2]),
        ),
        *(("seed", -1), ("seed", "2**64"), ("width", "wide"), ("height", None or 64.0)),
        *(("steps", np.array([1, 2])), ("steps", [4]), ("num_images", 1.5), ("num_images", None)),
        *(("guidance", "strong"), ("guidance", [3, None]), ("guidance", []), ("guidance", {})),
        *(("negative_prompt", ["x", "y"]), ("negative_prompt", 3), ("callback", "print")),
        *(("true_cfg_scale", "x"), ("images", [PHOTO]), ("images", 3), ("images", ())),
    ],
)
def test_wrong_value_is_named(pipe, name, value):
    request = dict(prompts=PROMPT, width=64, height=64, steps=1, guidance=3.0) | {name: value}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with pytest.raises(UserError, match=f"^{name}: "):
            pipe(**request)


def test_values_of_load(pipe):
    """Numbers are those of any library; what is wrong is named before a file is looked for."""
    loaded = flux.load(max_vram="8", vae_tile=np.int64(512), fast=np.True_, device=pipe.device)
    assert (loaded.options.max_vram, loaded.options.vae_tile) == (8.0, 512)
    paths = ("weights", "transformer", "autoencoder", "text_encoder", "text_encoder_2", "tokenizer")
    for name, value in (
        *((path, 3) for path in paths),
        *(("name", 3), ("name", ["flux.2-tiny"]), ("device", 3.5), ("numerics", None)),
        *(("max_vram", "many"), ("max_vram", True), ("vae_tile", 512.0), ("quantize", ["int8"])),
        *(("compile", 2), ("fast", "no"), ("check_finite", "yes"), ("transformer", b"x")),
    ):
        with pytest.raises(UserError, match=f"^{name}: must be "):
            flux.load(**{name: value})


def test_wrong_values_of_the_stages_are_named(pipe):
    features = pipe.encode(PROMPT)
    for name, call in {
        "latents": lambda: pipe.decode(torch.zeros(1, 64, 16)),
        "latents: must": lambda: pipe.decode(np.zeros((1, 128, 4, 4))),
        "features": lambda: pipe.sample(PROMPT, [0]),
        "features: must be text features": lambda: pipe.sample(
            features._replace(tokens=features.tokens.numpy()), [0]
        ),
        "prompts: must be": lambda: pipe.encode_ahead(3),
        "latents: must be a tensor of shape": lambda: pipe.decode(
            torch.zeros(0, pipe.spec.autoencoder.latent_channels, 4, 4)
        ),
        "steps": lambda: pipe.plan_memory(64, 64, "two"),
        "features: are another": lambda: pipe.sample(
            features._replace(tokens=features.tokens[..., 1:]), [0]
        ),
        "negative": lambda: pipe.sample(features, [0], negative="ugly"),
        "seeds": lambda: pipe.sample(features, [2**64]),
        "seeds: must be a whole": lambda: pipe.sample(features, ["a"]),
        "conditions": lambda: pipe.sample(features, [0], conditions=PHOTO),
        "path": lambda: pipe.load_lora(3),
        "scale": lambda: pipe.load_lora("x.safetensors", "strong"),
        "prompts": lambda: pipe.encode(3),
    }.items():
        with pytest.raises(UserError, match=f"^{re.escape(name)}"):
            call()
    one, two = pipe.sample(features, 3, 64, 64, 1), pipe.sample(features, np.array([3]), 64, 64, 1)
    assert torch.equal(one, two)


# ------------------------------------------------------------------ names of diffusers


def test_names_of_diffusers_are_answered_by_ours():
    """A call as diffusers' own documentation has it names each argument in turn."""
    pipe = flux.load(device="cpu")
    given = {"prompt": "a cat", "num_inference_steps": 4, "generator": torch.Generator()}
    for name, ours in (
        ("prompt", "prompts"),
        ("num_inference_steps", "steps"),
        ("generator", "seed"),
    ):
        with pytest.raises(UserError, match=f"^{name}: .*`{ours}`"):
            pipe(**{name: given[name]})
    with pytest.raises(UserError, match=r"^torch_dtype: .*`dtype`"):
        flux.load("flux.2-tiny", torch_dtype=torch.float32)
    with pytest.raises(UserError, match=r"^stepz: .*prompts, width, height, steps"):
        pipe("a cat", stepz=4)
    for name, ours in (
        ("to", "device"),
        ("load_lora_weights", "load_lora"),
        ("vae", "autoencoder"),
    ):
        with pytest.raises(AttributeError, match=rf"has no '{name}'\. .*`{ours}`"):
            getattr(pipe, name)
    assert not hasattr(pipe, "nothing")


@pytest.mark.slow
def test_every_argument_of_diffusers_is_answered():
    """Of each pipeline of FLUX that diffusers has."""
    import diffusers

    names = [name for name in dir(diffusers) if re.fullmatch("Flux.*(?<!Modular)Pipeline", name)]
    assert len(names) > 10
    for name in names:
        for argument in list(signature(getattr(diffusers, name).__call__).parameters)[1:]:
            assert argument in signature(Pipeline.__call__).parameters or argument in OURS, name


def test_answers_name_what_there_is():
    """Each name in backticks is an argument here, or a method of the pipeline."""
    arguments = {name for f in (flux.load, Pipeline.__call__) for name in signature(f).parameters}
    for other, fix in (OURS | ATTRIBUTES).items():
        assert other not in signature(Pipeline.__call__).parameters
        for name in re.findall(r"`(\w+)", fix):
            assert name in arguments or hasattr(Pipeline, name), (other, name)
