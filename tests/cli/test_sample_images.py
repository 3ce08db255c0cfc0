"""scripts/sample.py with images and LoRAs: every mode from the command line to the file.

On the embedded model, or on tiny random ones in the files of the released repositories. That the
pipeline does with images what diffusers does is shown in test_conditioning.py. Here: the command
line makes, byte for byte, what `flux.ImageInputs` with literal options makes. Nothing depends on
what the embedded model paints.
"""

import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.chat_server import chat_reply
from support.drawn_images import A, B, M
from support.model_zoo import BASE, FILL, KLEIN, KONTEXT, KV, REDUX
from support.sample_run import PROMPT as TOY_PROMPT
from support.sample_run import QUICK, TOY, image_of, pixels, sha256
from torch import Tensor

from flux.image_io.output import read_metadata
from flux.image_io.request import ImageInputs
from flux.pipeline import Pipeline

PROMPT = "an oil painting of a naïve café"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.usefixtures("small_kontext_sizes"),
    pytest.mark.filterwarnings("ignore:.* was distilled for"),  # of the calls in Python
    pytest.mark.filterwarnings("ignore:.* was not trained with"),
    pytest.mark.filterwarnings("ignore:the image has colors"),
]


@pytest.fixture
def here(cli) -> Path:
    """The working folder, with an image a.png, another, b.png, and a.png's mask, m.png."""
    for name, image in dict(a=A, b=B, m=M).items():
        image.save(f"{name}.png")
    return Path.cwd()


def levels(a: Image.Image, b: Image.Image) -> int:
    """Return the largest difference of two images, of 255."""
    return int(np.abs(np.asarray(a, int) - np.asarray(b, int)).max())


def by_python(pipe: Pipeline, *arguments, **options) -> bytes:
    """Return the one image, made with denormal numbers flushed, as the script does."""
    torch.set_flush_denormal(True)
    try:
        (image,) = pipe(*arguments, **options)
    finally:
        torch.set_flush_denormal(False)
    return image.tobytes()


# ------------------------------------------------------------------------------ every mode


class Mode(NamedTuple):
    model: str
    flags: str
    size: tuple[int, int]  # of the output
    options: dict = {}  # of flux.ImageInputs
    request: dict = {}  # of the pipeline

    @property
    def images(self) -> ImageInputs:
        images = tuple({"a.png": A, "b.png": B}[file] for file in self.files)
        return ImageInputs(images, M if "--mask " in self.flags else None, **self.options)

    @property
    def files(self) -> list[str]:
        words = self.flags.split()
        return [file for flag, file in zip(words, words[1:]) if flag == "--image"]


CANNY, DEPTH = "flux.1-canny-dev", "flux.1-depth-dev"
ONE, OTHER, BOTH = "--image a.png", "--image b.png", "--image a.png --image b.png"
INSIDE = "--image a.png --mask m.png"
# fmt: off
MODES = {
    "fill": Mode(FILL, INSIDE, (90, 70)),
    "fill, hard": Mode(FILL, f"{INSIDE} --mask-threshold 0.6", (90, 70), dict(mask_threshold=0.6)),
    "fill, raw": Mode(FILL, f"{INSIDE} --no-composite", (90, 70), dict(composite=False)),
    "fill, wider": Mode(
        FILL, f"{ONE} --outpaint 10,0,6,20", (106, 90), dict(outpaint=(10, 0, 6, 20))
    ),
    "fill, inside and higher": Mode(
        FILL, f"{INSIDE} --outpaint 0,3,0,0", (90, 73), dict(outpaint=(0, 3, 0, 0))
    ),
    "fill, resized": Mode(FILL, f"{INSIDE} --width 64", (64, 64), {}, dict(width=64)),
    "canny, width": Mode(CANNY, f"{OTHER} --width 80", (80, 144), {}, dict(width=80)),
    "canny, photo": Mode(
        CANNY, f"{ONE} --preprocess-control", (96, 64), dict(preprocess_control=True)
    ),
    "canny lora": Mode("flux.1-canny-dev-lora", ONE, (96, 64)),
    "depth": Mode(DEPTH, OTHER, (64, 112)),
    "depth lora": Mode(
        "flux.1-depth-dev-lora", f"{OTHER} --width 80 --height 64",
        (80, 64), {}, dict(width=80, height=64)
    ),
    "redux, no prompt": Mode(REDUX, BOTH, (96, 96), {}, dict(prompts="")),
    "redux, weights": Mode(
        REDUX, f"{BOTH} --image-weight 0.7 --image-weight 0.4",
        (96, 96), dict(image_weights=(0.7, 0.4))
    ),
    "kontext": Mode(KONTEXT, ONE, (96, 80)),
    "kontext, own size": Mode(
        KONTEXT, f"{ONE} --keep-input-size", (80, 64), dict(keep_input_size=True)
    ),
    "kontext, two, the second's size": Mode(
        KONTEXT, f"{BOTH} --match-image-size 2", (64, 96), dict(match_image_size=2)
    ),
    "kontext, inside": Mode(KONTEXT, INSIDE, (90, 70)),
    "reference": Mode("flux.2-dev", f"{ONE} --guidance 3:2", (80, 64), {}, dict(guidance=[3, 2])),
    "references": Mode(KLEIN, BOTH, (80, 64)),
    "references, the second's size": Mode(
        KLEIN, f"{BOTH} --match-image-size 2", (64, 96), dict(match_image_size=2)
    ),
    "references, small": Mode(
        KLEIN, f"{ONE} --reference-limit 75", (80, 64), dict(reference_limit=75)
    ),
    "references, once": Mode(KLEIN, f"{ONE} --kv-cache", (80, 64), dict(kv_cache=True)),
    "references, kv": Mode(KV, BOTH, (80, 64)),
    "references, kv, not once": Mode(KV, f"{ONE} --no-kv-cache", (80, 64), dict(kv_cache=False)),
    "references, cfg": Mode(
        BASE, f"{ONE} --guidance 3 --negative-prompt grey",
        (80, 64), {}, dict(guidance=3, negative_prompt="grey")
    ),
    "reference, image to image": Mode(KLEIN, f"{ONE} --strength 0.5", (90, 70), dict(strength=0.5)),
    "reference, inside": Mode(KLEIN, f"{INSIDE} --image b.png", (90, 70)),
    "references, toy": Mode("flux.2-tiny", BOTH, (80, 64)),
    "image to image, dev": Mode(
        "flux.1-dev", f"{ONE} --strength 0.5", (90, 70), dict(strength=0.5)
    ),
    "image to image, schnell": Mode(
        "flux.1-schnell", f"{OTHER} --height 96", (64, 96), {}, dict(height=96)
    ),
    "reference, inside, toy": Mode(
        "flux.2-tiny", f"{INSIDE} --strength 1 --guidance 2",
        (90, 70), dict(strength=1.0), dict(guidance=2)
    ),
    "inside, dev": Mode("flux.1-dev", INSIDE, (90, 70)),
}
# fmt: on
DEFAULTS = dict(
    strength=None,
    outpaint=None,
    mask_threshold=None,
    composite=True,
    image_weights=None,
    match_image_size=None,
    keep_input_size=False,
    reference_limit=None,
    kv_cache=None,
    preprocess_control=False,
)


@pytest.mark.parametrize("name", MODES)
def test_image_equals_pythons_and_states_its_request(cli, here, zoo, name):
    mode = MODES[name]
    request = dict(prompts=PROMPT, steps=2, seed=5, images=mode.images) | mode.request
    prompt = [request["prompts"]] if request["prompts"] else []
    flags = (*zoo(mode.model), *mode.flags.split(), "--steps", 2, "--seed", 5)
    path = image_of(run := cli(*prompt, *flags))
    assert run.files == ["a.png", "b.png", "m.png", "outputs/flux.png"] and "error" not in run.err
    with Image.open(path) as image:
        assert image.size == mode.size and image.mode == "RGB"
    assert pixels(path) == by_python(zoo.pipe(mode.model), **request)

    def file(name: str) -> dict:
        return dict(file=name, sha256=sha256(name))

    metadata = read_metadata(path)
    assert metadata["images"] == [file(name) for name in mode.files] and metadata["loras"] == []
    assert metadata["mask"] == (file("m.png") if mode.images.mask else None)
    assert metadata["image_options"] == json.loads(json.dumps(DEFAULTS | mode.options))
    expected = dict(model=mode.model, prompt=request["prompts"], seed=5, steps=2)
    assert expected.items() <= metadata.items()


AGAIN = {
    "fill, inside and higher": "--mask-threshold 0.6 --no-composite",
    "canny, photo": "",
    "redux, weights": "",
    "kontext, own size": "",
    "references, once": "--reference-limit 75 --match-image-size 1",
    "reference, inside, toy": "",
}


@pytest.mark.parametrize("name", AGAIN)
def test_image_is_made_again_from_its_metadata(cli, here, zoo, name):
    """All image options between them."""
    mode = MODES[name]
    flags = f"{mode.flags} {AGAIN[name]} --steps 2 --seed 5"
    path = image_of(cli(PROMPT, *zoo(mode.model), *flags.split()))
    again = image_of(cli("--from-image", path, *zoo(mode.model)[2:4]))
    assert again != path and pixels(again) == pixels(path)
    assert read_metadata(again) == read_metadata(path)


MASKED = [
    name for name in MODES if "--mask" in MODES[name].flags or "outpaint" in MODES[name].flags
]


@pytest.mark.parametrize("name", MASKED)
def test_composite_keeps_the_bytes_where_the_mask_is_black(zoo, name):
    """At sizes that are not multiples of 16, and on a larger canvas."""
    mode = MODES[name]
    left, top, right, bottom = mode.options.get("outpaint", (0, 0, 0, 0))
    black = np.asarray(M) == 0 if mode.images.mask else np.ones((70, 90), bool)
    request = dict(prompts=PROMPT, steps=1, images=mode.images) | mode.request
    pixels_made = np.frombuffer(by_python(zoo.pipe(mode.model), **request), np.uint8)
    image = pixels_made.reshape(mode.size[1], mode.size[0], 3)
    own = np.asarray(A)
    if mode.request.get("width"):  # then the original is the resized input
        own, black = (np.asarray(x.resize((64, 64), Image.Resampling.LANCZOS)) for x in (A, M))
        black = black == 0
    kept = image[top : image.shape[0] - bottom, left : image.shape[1] - right]
    changed = (kept != own).any(axis=2)
    assert black.sum() > 1000 and changed[black].any() == (not mode.images.composite)
    assert changed.sum() > 300 or "wider" in name


@pytest.mark.parametrize(
    "model, plain, option",
    [
        (FILL, dict(mask=M), dict(mask_threshold=0.6)),
        (FILL, dict(mask=M), dict(composite=False)),
        (CANNY, {}, dict(preprocess_control=True)),
        (REDUX, dict(images=(A, B)), dict(image_weights=(0.7, 0.4))),
        (REDUX, {}, dict(images=(A, B))),
        (KONTEXT, {}, dict(keep_input_size=True)),
        (KONTEXT, {}, dict(images=(A, B))),
        (KONTEXT, dict(images=(A, B)), dict(images=(B, A))),
        (KLEIN, {}, dict(images=(A, B))),
        (KLEIN, dict(images=(A, B)), dict(images=(B, A))),
        (KLEIN, {}, dict(reference_limit=64)),
        (KLEIN, {}, dict(kv_cache=True)),
        (KLEIN, {}, dict(strength=1.0)),
        (KLEIN, dict(strength=1.0), dict(mask=M)),
        (KV, {}, dict(kv_cache=False)),
        ("flux.2-tiny", {}, dict(strength=0.5)),
        ("flux.2-tiny", {}, dict(mask=M)),
    ],
)
def test_every_option_changes_the_image(zoo, model, plain, option):
    """Else the equalities above would hold for options without an effect."""
    request = dict(prompts=PROMPT, width=96, height=80, steps=2)
    with_option = plain | option
    first, second = (ImageInputs(**dict(images=(A,)) | x) for x in (plain, with_option))
    pipe = zoo.pipe(model)
    assert by_python(pipe, **request, images=first) != by_python(pipe, **request, images=second)


def test_default_options_are_those_of_the_model(zoo):
    """klein 9B KV computes references once, others at every step; strength 0.75; Redux averages."""
    request = dict(prompts=PROMPT, width=64, height=64, steps=4)
    for model, plain, option in (
        (KV, {}, dict(kv_cache=True)),
        (KLEIN, {}, dict(kv_cache=False)),
        ("flux.1-dev", {}, dict(strength=0.75)),  # 0.8 would run all four steps
        (REDUX, dict(images=(A, B)), dict(image_weights=(0.5, 0.5))),
        (KLEIN, {}, dict(reference_limit=2024)),
    ):
        with_option, pipe = plain | option, zoo.pipe(model)
        first, second = (ImageInputs(**dict(images=(A,)) | x) for x in (plain, with_option))
        assert by_python(pipe, **request, images=first) == by_python(pipe, **request, images=second)


def test_saved_control_image_shows_the_edges_of_the_resized_photo(cli, here, zoo):
    """The saved image gives the same output as the photo."""
    cv2 = pytest.importorskip("cv2")
    flags = (PROMPT, *zoo(CANNY), "--steps", 1, "--seed", 5)
    photo = ("--image", "a.png", "--preprocess-control", "--save-control", "edges.png")
    path = image_of(run := cli(*flags, *photo))
    edges = cv2.Canny(np.asarray(A.resize((96, 64), Image.Resampling.LANCZOS)), 50, 200)
    with Image.open("edges.png") as image:
        assert edges.any() and np.array_equal(image, np.stack([edges] * 3, 2))
    assert "control: edges.png\n" in run.err
    ready = image_of(cli(*flags, "--image", "edges.png", "--save-control", "edges.png"))
    assert pixels(ready) == pixels(path)
    assert pixels(here / "edges-2.png") == pixels(here / "edges.png")


def test_each_of_several_images_is_the_one_of_its_own_seed(cli, here, zoo):
    flags = (*zoo(KLEIN), *BOTH.split(), "--steps", 2)
    run = cli(PROMPT, "a cat", *flags, "--seed", 5, "--num-images", 2)
    assert run.code == 0
    assert [read_metadata(path)["seed"] for path in run.images] == [5, 6, 7, 8]
    alone = image_of(cli("a cat", *flags, "--seed", 8))
    assert len({pixels(path) for path in run.images}) == 4
    assert pixels(alone) == pixels(run.images[3])


def test_image_inputs_of_each_prompt_give_the_images_of_single_calls(zoo):
    """The first prompt has one reference; the second has an init image and a reference."""
    pipe, prompts = zoo.pipe(KLEIN), [PROMPT, "a cat"]
    request = dict(width=96, height=80, steps=2, num_images=2)
    each = [ImageInputs((B,)), ImageInputs((A, B), M, strength=0.9)]
    together = pipe(prompts, seed=5, images=each, **request)
    alone = [pipe(p, seed=s, images=own, **request) for p, s, own in zip(prompts, (5, 7), each)]
    assert [x.tobytes() for x in together] == [x.tobytes() for x in sum(alone, [])]
    assert len({x.tobytes() for x in together}) == 4
    swapped = pipe(prompts, seed=5, images=each[::-1], **request)
    assert all(x.tobytes() != y.tobytes() for x, y in zip(together, swapped))
    one = pipe(prompts[0], seed=6, images=each[0], **request | dict(num_images=1))
    assert levels(one[0], together[1]) <= 1  # of a batch of two, in float32
    turned = A.transpose(Image.Transpose.ROTATE_180)
    alike = [ImageInputs((A,)), ImageInputs((turned,))]  # these are one batch
    together = pipe(prompts, seed=5, images=alike, **request)
    for prompt, seed, own, pair in zip(prompts, (5, 7), alike, (together[:2], together[2:])):
        for x, y in zip(pipe(prompt, seed=seed, images=own, **request), pair, strict=True):
            assert levels(x, y) <= 1


def test_approximation_is_noted_once(cli, here, zoo):
    run = cli(PROMPT, *zoo(KLEIN), "--image", "a.png", "--kv-cache", "--steps", 1)
    note = f"note: {KLEIN} was not trained with --kv-cache: the result is an approximation\n"
    assert run.code == 0 and run.err.count("approximation") == 1 and note in run.err
    run = cli(PROMPT, *zoo(KV), "--image", "a.png", "--kv-cache", "--steps", 1)
    assert run.code == 0 and "approximation" not in run.err


# ------------------------------------------------------------------------------ guidance


@pytest.mark.parametrize("model, flag", [("flux.1-dev", "--true-cfg-scale"), ("", "--guidance")])
def test_guidance_that_changes_over_the_steps(cli, zoo, model, flag):
    """START:END is the straight line of listed values."""
    flags = (*(zoo(model) if model else ()), *"--width 64 --height 64 --steps 3 --seed 5".split())
    values = ("6:2", "6,4,2", "6", "2")
    line, listed, first, last = (image_of(cli(PROMPT, *flags, flag, value)) for value in values)
    assert pixels(line) == pixels(listed) and len(set(map(pixels, (line, first, last)))) == 3
    name = flag[2:].replace("-", "_")
    recorded = [read_metadata(path)[name] for path in (line, listed, first)]
    assert recorded == [[6, 2], [6, 4, 2], 6]
    again = image_of(cli("--from-image", listed, *flags[2:4] * bool(model)))
    assert pixels(again) == pixels(listed)


# ------------------------------------------------------------------------------ LoRAs

LAYER = "single_blocks.1.linear2"


def lora(path: str, layer: str = LAYER, seed: int = 0, rank: int = 4, **others: Tensor) -> dict:
    """Write a file for the toy in ComfyUI's names; return its tensors."""
    rows, columns = load_file(TOY)[f"{layer}.weight"].shape
    generator, prefix = torch.Generator().manual_seed(seed), f"diffusion_model.{layer}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(rows, rank, generator=generator) / columns**0.5,
    } | others
    save_file(tensors, path)
    return tensors


def merged(path: str, *changes: tuple[dict[str, Tensor], float]) -> None:
    """Write the toy's transformer with W + scale · BA, computed in float64."""
    state = load_file(TOY)
    total = state[f"{LAYER}.weight"].double()
    for tensors, scale in changes:
        a, b = (tensors[f"diffusion_model.{LAYER}.lora_{x}.weight"].double() for x in "AB")
        total = total + scale * b @ a
    save_file(state | {f"{LAYER}.weight": total.float()}, path)


def level_difference(a: Path, b: Path) -> int:
    with Image.open(a) as x, Image.open(b) as y:
        return levels(x, y)


def test_loras_equal_the_weights_that_they_make(cli):
    """Two of them, with scales, against a file of the sum; and no scale is 1."""
    one, two = lora("one.safetensors"), lora("t:wo.safetensors", seed=1)
    quick = (TOY_PROMPT, *QUICK, "--seed", 5)
    plain = image_of(cli(*quick))
    both = "--lora one.safetensors:0.6 --lora t:wo.safetensors:-0.3"
    cases = ((both, ((one, 0.6), (two, -0.3))), ("--lora t:wo.safetensors", ((two, 1.0),)))
    for flags, changes in cases:
        merged("sum.safetensors", *changes)
        adapted = image_of(cli(*quick, *flags.split()))
        full = image_of(cli(*quick, "--transformer", "sum.safetensors"))
        assert level_difference(adapted, full) <= 1  # the sums are rounded in different orders
        assert level_difference(adapted, plain) > 3
    (recorded,) = read_metadata(adapted)["loras"]
    hashed = dict(file="t:wo.safetensors", sha256=sha256("t:wo.safetensors"))
    assert recorded == hashed | dict(scale=1.0, ignore_unmatched=False, config_sha256=None)
    assert pixels(image_of(cli(*quick, "--lora", "one.safetensors:0"))) == pixels(plain)
    twice = ("--lora", "one.safetensors:0.6", "--lora", "./one.safetensors:0.3")
    cli(*quick, *twice).fails_with("--lora: one.safetensors is given twice", "the sum")


def test_unmatched_tensors_of_a_lora_are_ignored_on_request(cli):
    lora("whole.safetensors")
    lora("more.safetensors", **{"lora_te1_text_nothing.alpha": torch.tensor(1.0)})
    quick = (TOY_PROMPT, *QUICK, "--seed", 5)
    run = cli(*quick, "--lora", "more.safetensors")
    run.fails_with("more.safetensors", "lora_te1_text_nothing.alpha")
    path = image_of(cli(*quick, "--lora", "more.safetensors", "--lora-ignore-unmatched"))
    assert pixels(path) == pixels(image_of(cli(*quick, "--lora", "whole.safetensors")))
    assert read_metadata(path)["loras"][0]["ignore_unmatched"] is True
    assert pixels(image_of(cli("--from-image", path))) == pixels(path)


def test_control_lora_equals_the_full_model_that_it_makes(cli, here, zoo):
    """W + 0.85 · BA, biases, new norms and a wider img_in, in float64, in the full model's file."""
    flags = (PROMPT, *ONE.split(), "--steps", 2, "--seed", 5, "--guidance", 30)
    adapted = image_of(cli(*zoo("flux.1-canny-dev-lora"), *flags))
    zoo(CANNY)
    base = load_file(zoo.folder / "FLUX.1-dev/flux1-dev.safetensors")
    state = {name: tensor.double() for name, tensor in base.items()}
    tensors = load_file(zoo.folder / "FLUX.1-Canny-dev-lora/flux1-canny-dev-lora.safetensors")
    wide = torch.zeros(len(state["img_in.weight"]), 128, dtype=torch.float64)
    wide[:, :64] = state["img_in.weight"]
    state["img_in.weight"] = wide
    for key, tensor in tensors.items():
        if key.endswith(".scale"):
            state[key] = tensor.double()
        elif key.endswith(".lora_B.weight"):
            name = key.removesuffix(".lora_B.weight")
            down = tensors[f"{name}.lora_A.weight"].double()
            state[f"{name}.weight"] += 0.85 * tensor.double() @ down
            state[f"{name}.bias"] += 0.85 * tensors[f"{name}.lora_B.bias"].double()
    home = Path(shutil.copytree(zoo.folder / "FLUX.1-Canny-dev", "full/FLUX.1-Canny-dev"))
    full_state = {name: tensor.float() for name, tensor in state.items()}
    save_file(full_state, home / "flux1-canny-dev.safetensors")
    full = image_of(cli(*zoo(CANNY), *flags, "--weights", "full"))
    other = image_of(cli(*zoo(CANNY), *flags))
    assert level_difference(adapted, full) <= 1 and level_difference(adapted, other) > 3


def test_wrong_lora_is_refused_before_the_weights_are_looked_for(cli):
    lora("a.safetensors")
    Path("bad.safetensors").write_bytes(b"<!DOCTYPE html>")
    flags = (PROMPT, "--model", "flux.1-krea-dev", "--lora")
    cli(*flags, "bad.safetensors").fails_with("bad.safetensors", "a web page")
    for scale in ("nan", "inf", "-inf"):
        run = cli(*flags, f"a.safetensors:{scale}")
        run.fails_with("--lora: ", "a.safetensors", scale, "finite")


def test_lora_that_does_not_fit_is_refused(cli):
    lora("a.safetensors", **{"diffusion_model.cat.lora_A.weight": torch.ones(2, 2)})
    run = cli(PROMPT, *QUICK, "--lora", "a.safetensors:0.5")
    run.fails_with("a.safetensors", "diffusion_model.cat.lora_A")
    save_file(load_file(TOY), "toy.safetensors")
    cli(PROMPT, *QUICK, "--lora", "toy.safetensors").fails_with("not a LoRA", "--transformer")


# ------------------------------------------------------------------------------ upsampling


def test_prompt_is_expanded_by_a_server_that_sees_the_images(cli, here, zoo, server):
    server.reply = 200, {}, chat_reply(" a cat,\nin fur\x1b \n")
    flags = (*zoo(KLEIN), *BOTH.split(), "--steps", 2, "--seed", 5)
    by_server = ("--upsample", server.url, "--upsample-model", "some/model")
    path = image_of(run := cli("a cat", *flags, *by_server))
    ((address, _, body),) = server.requests
    content = body["messages"][1]["content"]
    assert address == "/v1/chat/completions" and body["model"] == "some/model"
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"]
    assert content[-1]["text"] == "a cat"
    metadata = read_metadata(path)
    assert "prompt: a cat,\\nin fur\n" in run.err
    assert (metadata["prompt"], metadata["upsampled_from"]) == ("a cat,\nin fur", "a cat")
    assert pixels(path) == pixels(image_of(cli("a cat,\nin fur", *flags)))
    again = image_of(cli("--from-image", path, "--weights", zoo.folder))
    assert pixels(again) == pixels(path) and len(server.requests) == 1


def test_every_prompt_is_expanded_once(cli, server):
    server.reply = 200, {}, chat_reply("a red ring")
    by_server = ("--upsample", server.url + "/v1", "--upsample-model", "m", "--num-images", 2)
    run = cli("a ring", "a star", *QUICK, *by_server)
    sent = [body["messages"][1]["content"] for _, _, body in server.requests]
    assert run.code == 0 and sent == ["a ring", "a star"]
    recorded = [read_metadata(path)["upsampled_from"] for path in run.images]
    assert recorded == ["a ring", "a ring", "a star", "a star"]


def test_expanded_prompt_too_long_for_a_jpeg_is_refused_before_the_work(cli, server, monkeypatch):
    monkeypatch.setattr(Pipeline, "encode", lambda *_: pytest.fail("a prompt was encoded"))
    server.reply = 200, {}, chat_reply("a" * 65_000)
    by_server = ("--upsample", server.url, "--upsample-model", "m", "--output", "a.jpg")
    run = cli(PROMPT, *QUICK, *by_server)
    run.fails_with("--output: the prompt is too long", "a.jpg", ".png")
    assert not run.files and len(server.requests) == 1


def test_error_of_the_server_is_one_line(cli, server):
    server.reply = 500, {}, b'{"error": "no room"}'
    run = cli(PROMPT, *QUICK, "--upsample", server.url, "--upsample-model", "m")
    run.fails_with(f"{server.url}/v1/chat/completions", "500", "no room")
    assert not run.files and len(server.requests) == 1


# ------------------------------------------------------------------------------ making again


def test_image_with_images_and_loras_is_made_again(cli, here):
    """From the same files, also under new names; a typed flag wins over the metadata."""
    lora("one.safetensors")
    lora("two.safetensors", seed=1)
    loras = ("--lora", "one.safetensors:0.5", "--lora", "two.safetensors")
    path = image_of(cli(PROMPT, *INSIDE.split(), *loras, "--steps", 2, "--seed", 5))
    for name in ("a.png", "m.png", "one.safetensors"):
        Path(name).rename(f"moved-{name}")
    run = cli("--from-image", path)
    run.fails_with("a.png: does not exist", "Pass it in --image")
    moved = "--image moved-a.png --mask moved-m.png --lora moved-one.safetensors:0.5".split()
    again = image_of(cli("--from-image", path, *moved, "--lora", "two.safetensors"))
    assert pixels(again) == pixels(path)
    typed = ("--lora", "two.safetensors:0.9", "--strength", 0.5)
    other = image_of(cli("--from-image", path, *moved, *typed))
    metadata = read_metadata(other)
    assert pixels(other) != pixels(path) and metadata["loras"][1]["scale"] == 0.9
    assert metadata["image_options"]["strength"] == 0.5


# ------------------------------------------------------------------------------ image files


@pytest.mark.parametrize("kind", ["gray, 16 bits", "transparent"])
def test_files_are_read_for_what_they_show(cli, zoo, kind):
    """All kinds: tests/image_io/test_input.py. Here: the script uses that reader, shows notes."""
    gray = np.asarray(A)[..., 1]
    white = np.asarray(M)[..., None] == 255
    holes = np.dstack([np.asarray(A), np.where(white, 0, 255).astype(np.uint8)])
    saved, shown, note = {
        "gray, 16 bits": (gray.astype(np.uint16) * 257, np.stack([gray] * 3, 2), ""),
        "transparent": (holes, np.where(white, 255, np.asarray(A)), "note: x.png: transparent"),
    }[kind]
    Image.fromarray(saved).save("x.png")
    run = cli(PROMPT, *"--image x.png --steps 2 --strength 0.5 --seed 5".split())
    images = ImageInputs((Image.fromarray(shown.astype(np.uint8)),), strength=0.5)
    request = dict(prompts=PROMPT, steps=2, seed=5, images=images)
    assert pixels(image_of(run)) == by_python(zoo.pipe("flux.2-tiny"), **request)
    assert run.err.count("note: x.png") == bool(note) and note in run.err


def test_mask_of_twice_the_size_and_all_white_are_noted(cli, here):
    M.resize((180, 140)).save("large.png")
    Image.new("L", A.size, 255).save("white.png")
    for name, note in (
        ("large.png", "note: the mask of 180x140 for an image of 90x70 was resized\n"),
        ("white.png", "note: the mask is all white: nothing of the image is kept\n"),
    ):
        run = cli(PROMPT, "--image", "a.png", "--steps", 1, "--mask", name)
        assert run.code == 0 and run.err.count(note) == 1


@pytest.mark.parametrize("flag", ["--image", "--mask"])
def test_unreadable_file_is_refused(cli, here, flag):
    Path("bad.png").write_text("a cat")
    image = ("--image", "a.png") if flag == "--mask" else ()
    cli(PROMPT, *image, flag, "bad.png").fails_with("bad.png: is not an image")


def test_wrong_mask_is_refused_before_the_weights_are_looked_for(cli, here):
    Image.new("L", A.size, 0).save("black.png")
    for model in ("flux.2-tiny", FILL, KLEIN):
        run = cli(PROMPT, "--model", model, *ONE.split(), "--mask", "black.png")
        run.fails_with("--mask: is all black")
