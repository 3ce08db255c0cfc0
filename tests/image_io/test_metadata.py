"""flux.image_io.metadata: an image is made again from what it carries, also from older names.

What an image carries may have been written by somebody else: anything wrong is refused.
"""

import re
from argparse import Namespace
from pathlib import Path

import pytest
from PIL import Image
from support.sample_run import sha256

from flux.errors import UserError
from flux.image_io.metadata import (
    IMAGE_OPTIONS,
    OLD_NAMES,
    OLD_OPTION_NAMES,
    PARTS,
    REQUIRED,
    describe_files,
    restore_args,
)

SCALARS = dict(model="flux.1-dev", prompt="a cat", negative_prompt="grey", width=96, height=80)
SCALARS |= dict(steps=2, guidance=[6, 4], seed=5, numerics="bfl", dtype="bfloat16", quantize="fp8")
SCALARS |= dict(transformer=None, autoencoder=None, compile=True)
NEW = SCALARS | dict(true_cfg_scale=3.5, fp8_matmul=True, vae_tile=512, decode_dtype="float32")
NEW |= dict(text_encoder=None, text_encoder_2=None, tokenizer=None)
NEW |= dict(solver="heun", sigmas=[1, 0.5, 0.0], shift=3.0)
OLD = SCALARS | dict(cfg_scale=3.5, native_fp8=True, tile=512)
OPTIONS = dict(strength=0.5, outpaint=[1, 2, 3, 4], mask_threshold=0.6, composite=False)
OPTIONS |= dict(image_weights=[0.7, 0.4], match_image_size=2, keep_input_size=True)
OPTIONS |= dict(reference_limit=512, kv_cache=False, preprocess_control=True)
OLD_OPTIONS = dict(strength=0.5, expand=[1, 2, 3, 4], mask_threshold=0.6, composite=False)
OLD_OPTIONS |= dict(
    weights=[0.7, 0.4], match=2, keep_size=True, limit=512, cached=False, photo=True
)


@pytest.fixture
def parser(sample_script):
    return sample_script.parser()


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    """A working folder with an image, a mask and a LoRA."""
    monkeypatch.chdir(tmp_path)
    Image.new("RGB", (8, 8)).save("a.png")
    Image.new("L", (8, 8)).save("m.png")
    Path("one.safetensors").write_bytes(b"lora")
    return tmp_path


def file(name: str, **more) -> dict:
    return dict(file=name, sha256=sha256(name)) | more


def restored(parser, metadata: dict, *typed: str) -> Namespace:
    args = parser.parse_args(["--from-image", "x.png", *typed])
    restore_args(args, metadata, parser.get_default)
    return args


def refusal(parser, metadata: dict, *typed: str) -> str:
    with pytest.raises(UserError) as caught:
        restored(parser, metadata, *typed)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def with_files(metadata: dict, options: dict, **lora) -> dict:
    files = dict(images=[file("a.png")], mask=file("m.png"))
    return metadata | files | dict(loras=[file("one.safetensors", scale=0.5, **lora)]) | options


# ------------------------------------------------------------------------------ values


def test_every_value_is_restored(parser, here):
    metadata = with_files(NEW, dict(image_options=OPTIONS), ignore_unmatched=True)
    args = restored(parser, metadata)
    assert args.prompts == ["a cat"]
    restored_names = REQUIRED.keys() - {"prompt", *PARTS}
    assert {name: getattr(args, name) for name in restored_names} == {
        name: NEW[name] for name in restored_names
    }
    assert {name: getattr(args, name) for name in IMAGE_OPTIONS} == OPTIONS
    assert (args.image, args.mask) == ([Path("a.png")], Path("m.png"))
    assert args.lora == [(Path("one.safetensors"), 0.5)] and args.lora_ignore_unmatched


def test_metadata_with_older_names_restore_the_same(parser, here):
    """As version 0.1.0 wrote them before the flags were renamed."""
    new = with_files(
        NEW | dict(decode_dtype=None), dict(image_options=OPTIONS), ignore_unmatched=True
    )
    old = with_files(OLD, dict(pictures=OLD_OPTIONS), partial=True)
    new |= dict(solver=None, sigmas=None, shift=None)  # which older versions did not have
    assert restored(parser, old) == restored(parser, new)
    assert OLD_NAMES.keys() <= old.keys() and OLD_OPTION_NAMES.keys() <= OLD_OPTIONS.keys()
    assert set(OLD_NAMES.values()) <= new.keys()
    assert set(OLD_OPTION_NAMES.values()) <= IMAGE_OPTIONS.keys()


def test_typed_values_win(parser, here):
    metadata = with_files(NEW, dict(image_options=OPTIONS))
    typed = "--numerics exact --negative-prompt x --seed 0 --dtype float32 --strength 0.9"
    args = restored(parser, metadata, *typed.split())
    assert (args.numerics, args.negative_prompt, args.seed) == ("exact", "x", 0)
    assert (args.dtype, args.strength) == ("float32", 0.9) and args.guidance == [6, 4]
    lora = restored(parser, metadata, "--lora", "one.safetensors:0.9").lora
    assert lora == [(Path("one.safetensors"), 0.9)]


def test_image_without_images_and_prompt_needs_neither(parser):
    args = restored(parser, NEW | dict(images=[], mask=None, loras=[], image_options=None))
    assert args.image == [] and args.mask is None and args.lora == []
    empty = restored(parser, NEW | dict(prompt="", images=[], mask=None, loras=[]))
    assert empty.prompts == [""]  # which is refused with all empty prompts


def test_prompt_beside_from_image_is_refused(parser):
    for typed in (["a cat"], ["--prompt", "a cat"], ["--prompt-file", "a.txt"]):
        assert "from_image: the image brings its own prompt" in refusal(parser, NEW, *typed)


def test_missing_and_wrong_values_are_named(parser):
    files = dict(images=[], mask=None, loras=[])
    for change, names in (
        ({"width": "wide"}, "width"),
        ({"seed": None, "prompt": ["a"]}, "prompt, seed"),
        ({"steps": True}, "steps"),
        ({"compile": 1}, "compile"),
        ({"guidance": 10**400}, "guidance"),
        ({"guidance": ["a"]}, "guidance"),
        ({"width": float("inf")}, "width"),
    ):
        expected = f"x.png: metadata are missing or wrong: {names}."
        assert refusal(parser, NEW | files | change) == expected
    later = ("decode_dtype", "text_encoder", "text_encoder_2", "tokenizer")  # than version 0.1.0
    later += ("solver", "sigmas", "shift")
    names = ", ".join(name for name in REQUIRED if name not in ("prompt", *later))
    assert refusal(parser, {"prompt": "a"}) == f"x.png: metadata are missing or wrong: {names}."


def test_unknown_dtype_and_other_weights_are_asked_for(parser):
    files = dict(images=[], mask=None, loras=[])
    for name in ("dtype", "decode_dtype"):
        message = refusal(parser, NEW | files | {name: "__class__"})
        assert "'__class__'" in message and f"Pass another `{name}`" in message
        restored(
            parser, NEW | files | {name: "__class__"}, f"--{name.replace('_', '-')}", "float32"
        )
    for part in PARTS:
        message = refusal(parser, NEW | files | {part: "other.safetensors"})
        assert "other.safetensors" in message and f"Pass it as `{part}`" in message


# ------------------------------------------------------------------------------ files


def test_wrong_descriptions_of_files_are_refused(parser, here):
    good = dict(images=[], mask=None, loras=[])
    for name, key, values in (
        ("images", "images", (False, "a.png", [file("a.png", sha256=None)], [{"file": "a.png"}])),
        ("mask", "mask", (0, [file("m.png")])),
        ("loras", "loras", ({}, [file("one.safetensors", scale="1")])),
    ):
        for value in values:
            message = refusal(parser, NEW | good | {key: value})
            assert message == f"x.png: the metadata do not say which files `{name}` had."
        missing = {k: v for k, v in (NEW | good).items() if k != key}
        assert "do not say which files" in refusal(parser, missing)


def test_missing_changed_and_additional_files_are_refused(parser, here):
    metadata = with_files(NEW, dict(image_options=OPTIONS))
    names = {"images": "a.png", "mask": "m.png", "loras": "one.safetensors"}
    flags = {"images": "--image", "mask": "--mask", "loras": "--lora"}
    for argument, name in names.items():
        content = Path(name).read_bytes()
        Path(name).write_bytes(content + b"\0")
        message = refusal(parser, metadata)
        assert f"{name}: is not the file that x.png was made with" in message
        assert f"Pass that in `{argument}`" in message
        Path(name).rename("moved")
        message = refusal(parser, metadata)
        assert (
            message
            == f"{name}: does not exist, but x.png was made with it. Pass it in `{argument}`."
        )
        Path("moved").write_bytes(content)
        restored(parser, metadata, flags[argument], "moved")
        Path("moved").rename(name)
        plain = NEW | dict(images=[], mask=None, loras=[])
        message = refusal(parser, plain, flags[argument], name)
        assert message == f"x.png: was made with 0 files for `{argument}` (got 1)."
    message = refusal(parser, metadata, "--image", "a.png", "--image", "a.png")
    assert message == "x.png: was made with 1 files for `images` (got 2)."


def test_wrong_image_options_are_named(parser, here):
    for options, names in (
        (None, ", ".join(IMAGE_OPTIONS)),
        ([], ", ".join(IMAGE_OPTIONS)),
        (OPTIONS | {"strength": "1", "kv_cache": 1}, "strength, kv_cache"),
        (OPTIONS | {"outpaint": [1, 2, 3]}, "outpaint"),
        (OPTIONS | {"outpaint": [1, 2.5, 3, 4]}, "outpaint"),
        (OPTIONS | {"image_weights": ["a"]}, "image_weights"),
    ):
        message = refusal(parser, with_files(NEW, dict(image_options=options)))
        assert message == f"x.png: image options are missing or wrong: {names}."


def test_files_are_described_as_they_are_restored(parser, here):
    typed = "--image a.png --mask m.png --lora one.safetensors:0.5 --lora-ignore-unmatched"
    described = describe_files(parser.parse_args(typed.split()))
    assert described == dict(
        images=[file("a.png")],
        mask=file("m.png"),
        loras=[file("one.safetensors", scale=0.5, ignore_unmatched=True, config_sha256=None)],
    )
    args = restored(parser, NEW | dict(image_options=OPTIONS) | described)
    assert describe_files(args) == described
    assert re.fullmatch("[0-9a-f]{64}", described["mask"]["sha256"])


def test_configuration_of_a_lora_must_be_the_same(parser, here):
    """It decides the strength, and may change while the file of the factors stays."""
    adapter = Path("style/adapter_model.safetensors")
    adapter.parent.mkdir()
    adapter.write_bytes(b"lora")
    plain = describe_files(parser.parse_args(["--lora", f"{adapter}:0.5"]))
    config = adapter.with_name("adapter_config.json")
    config.write_text('{"lora_alpha": 8}')
    described = describe_files(parser.parse_args(["--lora", f"{adapter}:0.5"]))
    assert described["loras"][0]["config_sha256"] == sha256(config)
    before, made = NEW | plain, NEW | described
    assert restored(parser, made).lora == [(adapter, 0.5)]
    message = refusal(parser, before)
    assert message.startswith(f"{config}: is not the configuration that x.png was made with.")
    config.write_text('{"lora_alpha": 16}')
    assert f"{config}: is not the configuration" in refusal(parser, made)
    config.unlink()
    assert f"{adapter}: lacks the adapter_config.json" in refusal(parser, made)
    older = before | {"loras": [file(str(adapter), scale=0.5)]}  # which had no such hash
    assert restored(parser, older).lora == restored(parser, before).lora
    for wrong in (3, ["x"], {}):
        lora = file(str(adapter), scale=0.5, config_sha256=wrong)
        assert "do not say which files `loras` had" in refusal(parser, before | {"loras": [lora]})
