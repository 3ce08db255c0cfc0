"""scripts/sample.py with pictures and LoRAs: every mode from the command line to the file, and every mistake in one line.

In this process, on the embedded model or on tiny random ones that lie in the files of the released repositories. That the
pipeline does with pictures what diffusers does is shown in test_conditioning.py; here, that the command line asks the pipeline
for the right thing: what it makes equals, byte for byte, what `flux.ImageInputs` with literal options makes. Nothing depends on
what the embedded model paints.
"""

import hashlib
import json
import shutil
import struct
import sys
import zlib
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
import test_sample
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from support.chat_server import chat_reply
from support.lora_files import control_lora
from support.tiny_repositories import write_tokenizers
from test_conditioning import TINY_REDUX, TINY_SIGLIP, photo
from test_sample import TOY, Run, pixels
from torch import Tensor

import flux
from flux.configs import MODELS, FLUX1Text, FLUX2Text
from flux.errors import UserError
from flux.image_io import input as inputs
from flux.image_io import output as images
from flux.image_io.request import ImageInputs
from flux.parity.reference import (
    FLUX1_TINY,
    KLEIN_TINY,
    TINY_AE1,
    TINY_AE2,
    TINY_CLIP,
    TINY_MISTRAL,
    TINY_QWEN,
    TINY_T5,
    networks,
    randomise,
    write_weights,
)
from flux.pipeline import Pipeline
from flux.siglip import Redux, SigLIP

cli, script, nothing_here = (test_sample.cli, test_sample.script, test_sample.nothing_here)

PROMPT = "an oil painting of a naïve café"
A, B = photo(90, 70, seed=1), photo(70, 110, seed=2)  # sides that are no multiples of 16
A.paste((250, 240, 20), (20, 15, 60, 50))  # which has edges
FILL, REDUX, KONTEXT, KLEIN = (
    "flux.1-fill-dev",
    "flux.1-redux-dev",
    "flux.1-kontext-dev",
    "flux.2-klein-4b",
)
CONTROL = {"flux.1-canny-dev", "flux.1-depth-dev", "flux.1-canny-dev-lora", "flux.1-depth-dev-lora"}
FLUX2 = {name for name in MODELS if name.startswith("flux.2")}
KONTEXT_SIZES = [(64, 144), (80, 96), (96, 80), (144, 64)]  # of pictures that a test can make


def mask(width: int, height: int) -> Image.Image:
    """Black but for a block of white and a soft edge."""
    values = np.zeros((height, width), np.uint8)
    values[height // 4 : -height // 4, width // 3 :] = 255
    values[-height // 4 :, : width // 2] = np.linspace(0, 255, width // 2)
    return Image.fromarray(values)


M = mask(*A.size)

pytestmark = [  # of the calls in Python; the command line says them on its own
    pytest.mark.filterwarnings("ignore:.* was distilled for"),
    pytest.mark.filterwarnings("ignore:.* was not trained with --(no-)?kv-cache"),
    pytest.mark.filterwarnings("ignore:the picture has colours"),
]


class Zoo:
    """Repositories of tiny random models, each written when it is first asked for."""

    def __init__(self, folder: Path, patch: pytest.MonkeyPatch):
        self.folder, self.patch, self.pipes = folder, patch, {}

    def __call__(self, name: str) -> tuple:
        """The flags that choose a model."""
        if name == "flux.2-tiny":
            return ()
        if name not in self.pipes:
            self.write(name)
            self.pipes[name] = flux.load(
                name, weights=self.folder, device="cpu", dtype=torch.float32
            )
        return "--model", name, "--weights", self.folder, "--dtype", "float32"

    def pipe(self, name: str) -> Pipeline:
        self(name)
        if name not in self.pipes:
            self.pipes[name] = flux.load(name, device="cpu")
        return self.pipes[name]

    def write(self, name: str) -> None:
        row, flux1 = MODELS[name], name.startswith("flux.1")
        home = self.folder / row.repository.split("/")[1]
        if not home.exists():
            write_tokenizers(home, "flux.1-dev" if flux1 else name)
        last = len(json.loads((home / "tokenizer/vocab.json").read_text())) - 1 if flux1 else 0
        language_model = TINY_MISTRAL if name == "flux.2-dev" else TINY_QWEN
        tiny = FLUX1_TINY if flux1 else replace(KLEIN_TINY, context_dim=TINY_QWEN.features)
        released = row.transformer
        spec = replace(
            row,
            transformer=replace(
                tiny,
                in_channels=tiny.in_channels * released.in_channels // released.out_channels,
                guidance=released.guidance,
            ),
            text=FLUX1Text(TINY_T5, replace(TINY_CLIP, eos_id=last))
            if flux1
            else FLUX2Text(language_model),
            text_length=24 if flux1 else 256,
            autoencoder=TINY_AE1 if flux1 else TINY_AE2,
            size=96,
        )
        self.patch.setitem(MODELS, name, spec)
        parts = networks(spec)
        if not (home / spec.transformer_file).exists():  # FLUX.1-dev is of several rows
            write_weights(home, spec, parts)
        if spec.addon:
            self.write_adapter(spec, parts["transformer"])

    def write_adapter(self, spec, transformer) -> None:
        home = self.folder / spec.addon.repository.split("/")[1]
        (home / "image_encoder").mkdir(parents=True)
        files = {part: home / file for part, file in spec.addon.files}
        if "lora" in files:
            control_lora(files["lora"], transformer)
        else:
            save_file(randomise(SigLIP(TINY_SIGLIP)).state_dict(), files["siglip"])
            save_file(randomise(Redux(TINY_REDUX)).state_dict(), files["redux"])


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        patch.setattr("flux.pipeline.SigLIPConfig", lambda: TINY_SIGLIP)
        patch.setattr("flux.pipeline.ReduxConfig", lambda: TINY_REDUX)
        patch.setattr(inputs, "KONTEXT_SIZES", KONTEXT_SIZES)
        yield Zoo(tmp_path_factory.mktemp("zoo"), patch)


@pytest.fixture
def here(cli) -> Path:
    """The working folder, with a picture a.png, another, b.png, and a.png's mask, m.png."""
    for name, image in dict(a=A, b=B, m=M).items():
        image.save(f"{name}.png")
    return Path.cwd()


def by_python(pipe: Pipeline, *arguments, **options) -> bytes:
    """The one picture, made with denormal numbers flushed, as the script does."""
    torch.set_flush_denormal(True)
    try:
        (image,) = pipe(*arguments, **options)
    finally:
        torch.set_flush_denormal(False)
    return image.tobytes()


def sha256(path: str | Path) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()


def made(run: Run) -> Path:
    """The one picture that a run made."""
    assert run.code == 0, run.err
    (path,) = run.pictures
    return path


def refused(cli, *arguments) -> str:
    """The one line that is said, with exit code 2, and nothing written."""
    before = {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()}
    run = cli(*arguments)
    assert run.code == 2 and run.out == "", run
    assert run.err.startswith("error: ") and run.err.count("\n") == 1 and run.err.endswith("\n"), (
        run.err
    )
    assert {path: path.read_bytes() for path in Path.cwd().rglob("*") if path.is_file()} == before
    return run.err


def saying(cli, words: tuple[str, ...], *arguments) -> None:
    line = refused(cli, *arguments)
    assert [word for word in words if word not in line] == [], line


# ---------------------------------------------------------------------------------------------------------- every mode


class Mode(NamedTuple):
    model: str
    flags: str
    size: tuple[int, int]  # of what is made
    options: dict = {}  # of flux.ImageInputs
    asked: dict = {}  # of the pipeline

    @property
    def pictures(self) -> ImageInputs:
        given = tuple({"a.png": A, "b.png": B}[file] for file in self.files)
        return ImageInputs(given, M if "--mask " in self.flags else None, **self.options)

    @property
    def files(self) -> list[str]:
        words = self.flags.split()
        return [file for flag, file in zip(words, words[1:]) if flag == "--image"]


BASE = "flux.2-klein-base-4b"
KV = "flux.2-klein-9b-kv"
ONE, OTHER, BOTH, INSIDE = (
    "--image a.png",
    "--image b.png",
    "--image a.png --image b.png",
    "--image a.png --mask m.png",
)
MODES = {
    "fill": Mode(FILL, INSIDE, (90, 70)),
    "fill, hard": Mode(FILL, f"{INSIDE} --mask-threshold 0.6", (90, 70), dict(mask_threshold=0.6)),
    "fill, raw": Mode(FILL, f"{INSIDE} --no-composite", (90, 70), dict(composite=False)),
    "fill, wider": Mode(
        FILL, f"{ONE} --expand 10,0,6,20", (106, 90), dict(outpaint=(10, 0, 6, 20))
    ),
    "fill, inside and higher": Mode(
        FILL, f"{INSIDE} --expand 0,3,0,0", (90, 73), dict(outpaint=(0, 3, 0, 0))
    ),
    "fill, resized": Mode(FILL, f"{INSIDE} --width 64", (64, 64), {}, dict(width=64)),
    "canny": Mode("flux.1-canny-dev", ONE, (96, 64)),
    "canny, width": Mode("flux.1-canny-dev", f"{OTHER} --width 80", (80, 144), {}, dict(width=80)),
    "canny, photo": Mode(
        "flux.1-canny-dev", f"{ONE} --photo", (96, 64), dict(preprocess_control=True)
    ),
    "canny lora": Mode("flux.1-canny-dev-lora", ONE, (96, 64)),
    "depth": Mode("flux.1-depth-dev", OTHER, (64, 112)),
    "depth lora": Mode(
        "flux.1-depth-dev-lora",
        f"{OTHER} --width 80 --height 64",
        (80, 64),
        {},
        dict(width=80, height=64),
    ),
    "redux": Mode(REDUX, ONE, (96, 96)),
    "redux, no prompt": Mode(REDUX, BOTH, (96, 96), {}, dict(prompts="")),
    "redux, weights": Mode(
        REDUX,
        f"{BOTH} --image-weight 0.7 --image-weight 0.4",
        (96, 96),
        dict(image_weights=(0.7, 0.4)),
    ),
    "kontext": Mode(KONTEXT, ONE, (96, 80)),
    "kontext, own size": Mode(
        KONTEXT, f"{ONE} --keep-input-size", (80, 64), dict(keep_input_size=True)
    ),
    "kontext, two": Mode(KONTEXT, BOTH, (96, 80)),
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
        BASE,
        f"{ONE} --guidance 3 --negative-prompt grey",
        (80, 64),
        {},
        dict(guidance=3, negative_prompt="grey"),
    ),
    "reference, begun from": Mode(KLEIN, f"{ONE} --strength 0.5", (90, 70), dict(strength=0.5)),
    "reference, inside": Mode(KLEIN, f"{INSIDE} --image b.png", (90, 70)),
    "references, toy": Mode("flux.2-tiny", BOTH, (80, 64)),
    "start, dev": Mode("flux.1-dev", f"{ONE} --strength 0.5", (90, 70), dict(strength=0.5)),
    "start, schnell": Mode("flux.1-schnell", f"{OTHER} --height 96", (64, 96), {}, dict(height=96)),
    "reference, inside, toy": Mode(
        "flux.2-tiny",
        f"{INSIDE} --strength 1 --guidance 2",
        (90, 70),
        dict(strength=1.0),
        dict(guidance=2),
    ),
    "inside, dev": Mode("flux.1-dev", INSIDE, (90, 70)),
}
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
def test_picture_is_what_was_asked_for_says_so_and_can_be_made_again(cli, here, zoo, name):
    mode = MODES[name]
    asked = dict(prompts=PROMPT, steps=2, seed=5, pictures=mode.pictures) | mode.asked
    prompt = [asked["prompts"]] if asked["prompts"] else []
    path = made(
        run := cli(*zoo(mode.model), *prompt, *mode.flags.split(), "--steps", 2, "--seed", 5)
    )
    assert run.files == ["a.png", "b.png", "m.png", "outputs/flux.png"] and "error" not in run.err
    with Image.open(path) as image:
        assert image.size == mode.size and image.mode == "RGB"
    assert pixels(path) == by_python(zoo.pipe(mode.model), **asked)

    said, file = images.read_metadata(path), lambda name: dict(file=name, sha256=sha256(name))
    assert said["images"] == [file(name) for name in mode.files] and said["loras"] == []
    assert said["mask"] == (file("m.png") if mode.pictures.mask else None)
    assert said["pictures"] == json.loads(json.dumps(DEFAULTS | mode.options))
    assert (said["model"], said["prompt"], said["seed"], said["steps"]) == (
        mode.model,
        asked["prompts"],
        5,
        2,
    )

    again = made(cli("--remake", path, *zoo(mode.model)[2:4]))
    assert again != path and pixels(again) == pixels(path) and images.read_metadata(again) == said


@pytest.mark.parametrize(
    "name",
    [name for name in MODES if "--mask" in MODES[name].flags or "--expand" in MODES[name].flags],
)
def test_what_the_mask_leaves_alone_keeps_its_bytes(zoo, name):
    """At sizes that are no multiples of 16, and where there is more canvas than picture."""
    mode = MODES[name]
    left, top, right, bottom = mode.options.get("expand", (0, 0, 0, 0))
    black = np.asarray(M) == 0 if mode.pictures.mask else np.ones((70, 90), bool)
    image = np.frombuffer(
        by_python(
            zoo.pipe(mode.model),
            **dict(prompts=PROMPT, steps=1, pictures=mode.pictures) | mode.asked,
        ),
        np.uint8,
    ).reshape(mode.size[1], mode.size[0], 3)
    own = np.asarray(A)
    if mode.asked.get("width"):  # then it is that of the resized input
        own, black = (np.asarray(x.resize((64, 64), Image.Resampling.LANCZOS)) for x in (A, M))
        black = black == 0
    kept = image[top : image.shape[0] - bottom, left : image.shape[1] - right]
    changed = (kept != own).any(axis=2)
    assert black.sum() > 1000 and changed[black].any() == (not mode.pictures.composite)
    assert changed.sum() > 300 or "wider" in name


@pytest.mark.parametrize(
    "model, plain, option",
    [
        (FILL, dict(mask=M), dict(mask_threshold=0.6)),
        (FILL, dict(mask=M), dict(composite=False)),
        ("flux.1-canny-dev", {}, dict(preprocess_control=True)),
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
def test_every_option_changes_the_picture(zoo, model, plain, option):
    """Else the equalities above would hold of options that do nothing."""
    asked = dict(prompts=PROMPT, width=96, height=80, steps=2)
    first, second = (
        ImageInputs(**dict(images=(A,)) | options) for options in (plain, plain | option)
    )
    assert by_python(zoo.pipe(model), **asked, pictures=first) != by_python(
        zoo.pipe(model), **asked, pictures=second
    )


def test_defaults_that_models_bring(zoo):
    """klein 9B KV computes references once, others at every step; strength is 0.8; Redux's pictures share 1."""
    asked = dict(prompts=PROMPT, width=64, height=64, steps=4)
    for model, plain, option in (
        (KV, {}, dict(kv_cache=True)),
        (KLEIN, {}, dict(kv_cache=False)),
        ("flux.1-dev", {}, dict(strength=0.8)),
        (REDUX, dict(images=(A, B)), dict(image_weights=(0.5, 0.5))),
        (KLEIN, {}, dict(reference_limit=2024)),
    ):
        first, second = (
            ImageInputs(**dict(images=(A,)) | options) for options in (plain, plain | option)
        )
        assert by_python(zoo.pipe(model), **asked, pictures=first) == by_python(
            zoo.pipe(model), **asked, pictures=second
        )


def test_control_picture_is_saved_and_is_the_edges_of_the_photo(cli, here, zoo):
    """Resized first, to what is made; and the same picture comes of it, given as it is."""
    cv2 = pytest.importorskip("cv2")
    flags = (PROMPT, *zoo("flux.1-canny-dev"), "--steps", 1, "--seed", 5)
    path = made(run := cli(*flags, "--image", "a.png", "--photo", "--save-control", "edges.png"))
    edges = cv2.Canny(np.asarray(A.resize((96, 64), Image.Resampling.LANCZOS)), 50, 200)
    with Image.open("edges.png") as image:
        assert edges.any() and np.array_equal(image, np.stack([edges] * 3, 2))
    assert "control: edges.png\n" in run.err
    ready = made(cli(*flags, "--image", "edges.png", "--save-control", "edges.png"))
    assert pixels(ready) == pixels(path) and pixels(here / "edges-2.png") == pixels(
        here / "edges.png"
    )


def test_photo_without_opencv_is_told(cli, here, zoo, monkeypatch):
    monkeypatch.setitem(sys.modules, "cv2", None)
    said = refused(
        cli,
        PROMPT,
        *zoo("flux.1-canny-dev"),
        "--image",
        "a.png",
        "--photo",
        "--save-control",
        "edges.png",
    )
    assert (
        "OpenCV, which is not installed: run `pip install -e '.[control]'`, or give a ready control picture"
        in said
    )


def test_each_of_several_pictures_is_the_one_of_its_own_seed(cli, here, zoo):
    flags = (*zoo(KLEIN), *BOTH.split(), "--steps", 2)
    run = cli(PROMPT, "a cat", *flags, "--seed", 5, "--num-images", 2)
    assert run.code == 0 and [images.read_metadata(path)["seed"] for path in run.pictures] == [
        5,
        6,
        7,
        8,
    ]
    alone = made(cli("a cat", *flags, "--seed", 8))
    assert len({pixels(path) for path in run.pictures}) == 4 and pixels(alone) == pixels(
        run.pictures[3]
    )


def test_pictures_for_each_prompt_are_those_of_single_calls(zoo):
    """One reference for the first prompt and two for the second, of which one is begun from; two pictures of each."""
    pipe, prompts = zoo.pipe(KLEIN), [PROMPT, "a cat"]
    asked = dict(width=96, height=80, steps=2, num_images=2)
    each = [ImageInputs((B,)), ImageInputs((A, B), M, strength=0.9)]
    together = pipe(prompts, seed=5, pictures=each, **asked)
    alone = [pipe(p, seed=s, pictures=own, **asked) for p, s, own in zip(prompts, (5, 7), each)]
    assert [x.tobytes() for x in together] == [x.tobytes() for x in sum(alone, [])]
    assert len({x.tobytes() for x in together}) == 4
    swapped = pipe(prompts, seed=5, pictures=each[::-1], **asked)
    assert all(x.tobytes() != y.tobytes() for x, y in zip(together, swapped))
    one = pipe(prompts[0], seed=6, pictures=each[0], **asked | dict(num_images=1))
    assert (
        np.abs(np.asarray(one[0], int) - np.asarray(together[1], int)).max() <= 1
    )  # of a batch of two, in float32
    alike = [
        ImageInputs((A,)),
        ImageInputs((A.transpose(Image.Transpose.ROTATE_180),)),
    ]  # these are one batch
    together = pipe(prompts, seed=5, pictures=alike, **asked)
    for prompt, seed, own, pair in zip(prompts, (5, 7), alike, (together[:2], together[2:])):
        for x, y in zip(pipe(prompt, seed=seed, pictures=own, **asked), pair, strict=True):
            assert np.abs(np.asarray(x, int) - np.asarray(y, int)).max() <= 1
    for wrong in (each[:1], each * 2, []):
        with pytest.raises(
            UserError, match=f"2 prompts, and pictures for {len(wrong)}: give ImageInputs for each"
        ):
            pipe(prompts, pictures=wrong)


# ---------------------------------------------------------------------------------------------------------- guidance


def test_guidance_that_changes_over_the_steps(cli, here, zoo):
    """START:END is the straight line, and --cfg-scale takes the same."""
    dev = (*zoo("flux.1-dev"), "--image", "a.png", "--strength", 1)
    for flags, flag in ((dev, "--guidance"), (dev, "--cfg-scale"), ((), "--guidance")):
        make = lambda value: made(
            cli(
                PROMPT,
                *flags,
                "--width",
                64,
                "--height",
                64,
                "--steps",
                3,
                "--seed",
                5,
                flag,
                value,
            )
        )
        line, listed, first, last = map(make, ("6:2", "6,4,2", "6", "2"))
        assert pixels(line) == pixels(listed) and len(set(map(pixels, (line, first, last)))) == 3
        key = flag[2:].replace("-", "_")
        assert [images.read_metadata(path)[key] for path in (line, listed, first)] == [
            [6, 2],
            [6, 4, 2],
            6,
        ]
        again = made(cli("--remake", listed, *flags[2:4]))
        assert pixels(again) == pixels(listed)


@pytest.mark.parametrize(
    "model, flag, value, words",
    [
        (
            "flux.1-dev",
            "--guidance",
            "4,3,2,1",
            ("--guidance has 4 values for 3 steps", "START:END"),
        ),
        ("flux.1-dev", "--guidance", "4:nan", ("--guidance nan", "from 0 to 100", "3.5")),
        ("flux.1-dev", "--guidance", "101:4", ("--guidance 101", "from 0 to 100")),
        ("flux.2-klein-base-4b", "--guidance", "4:-1", ("--guidance -1", "from 0 to 100")),
        (
            "flux.2-klein-4b",
            "--guidance",
            "4:1",
            ("flux.2-klein-4b takes no --guidance (here 4:1)", "distilled"),
        ),
        ("flux.1-dev", "--cfg-scale", "1,2,3,4", ("--cfg-scale has 4 values for 3 steps",)),
    ],
)
def test_wrong_guidance_is_told(cli, model, flag, value, words):
    run = cli(PROMPT, "--model", model, "--steps", 3, flag, value)
    run.says(*words)
    assert not run.files


# ---------------------------------------------------------------------------------------------------------- LoRAs

LAYER = "single_blocks.1.linear2"


def lora(
    path: str, layer: str = LAYER, seed: int = 0, rank: int = 4, **others: Tensor
) -> dict[str, Tensor]:
    """A file for the toy in ComfyUI's names; the tensors that it holds."""
    rows, columns = load_file(TOY)[f"{layer}.weight"].shape
    generator, prefix = torch.Generator().manual_seed(seed), f"diffusion_model.{layer}"
    tensors = {
        f"{prefix}.lora_A.weight": torch.randn(rank, columns, generator=generator),
        f"{prefix}.lora_B.weight": torch.randn(rows, rank, generator=generator) / columns**0.5,
    } | others
    save_file(tensors, path)
    return tensors


def merged(path: str, *changes: tuple[dict[str, Tensor], float]) -> None:
    """The toy's transformer with W + scale · BA in float64, as a file of its own."""
    state = load_file(TOY)
    total = state[f"{LAYER}.weight"].double()
    for tensors, scale in changes:
        a, b = (tensors[f"diffusion_model.{LAYER}.lora_{x}.weight"].double() for x in "AB")
        total = total + scale * b @ a
    save_file(state | {f"{LAYER}.weight": total.float()}, path)


def levels(a: Path, b: Path) -> int:
    with Image.open(a) as x, Image.open(b) as y:
        return int(np.abs(np.asarray(x, int) - np.asarray(y, int)).max())


def test_loras_are_the_weights_that_they_make(cli):
    """Two of them, with scales, against a file of the sum; and no scale is 1."""
    one, two = lora("one.safetensors"), lora("t:wo.safetensors", seed=1)
    quick = (PROMPT, *test_sample.QUICK, "--seed", 5)
    plain = made(cli(*quick))
    for flags, changes in (
        (
            ("--lora", "one.safetensors:0.6", "--lora", "t:wo.safetensors:-0.3"),
            ((one, 0.6), (two, -0.3)),
        ),
        (("--lora", "t:wo.safetensors"), ((two, 1.0),)),
    ):
        merged("sum.safetensors", *changes)
        adapted, whole = (
            made(cli(*quick, *flags)),
            made(cli(*quick, "--transformer", "sum.safetensors")),
        )
        assert levels(adapted, whole) <= 1  # the sums are rounded in different orders
        assert levels(adapted, plain) > 3
    said = images.read_metadata(adapted)["loras"]
    assert said == [
        dict(file="t:wo.safetensors", sha256=sha256("t:wo.safetensors"), scale=1.0, partial=False)
    ]
    assert pixels(made(cli(*quick, "--lora", "one.safetensors:0"))) == pixels(plain)
    words = ("--lora one.safetensors is given twice", "the sum of the scales")
    saying(cli, words, *quick, "--lora", "one.safetensors:0.6", "--lora", "./one.safetensors:0.3")


def test_partial_lora_leaves_out_what_has_no_place(cli):
    lora("whole.safetensors")
    lora("more.safetensors", **{"lora_te1_text_projection.alpha": torch.tensor(1.0)})
    quick = (PROMPT, *test_sample.QUICK, "--seed", 5)
    saying(
        cli,
        ("more.safetensors", "1 tensors, of 3", "no place", "'lora_te1_text_projection.alpha'"),
        *quick,
        "--lora",
        "more.safetensors",
    )
    path = made(cli(*quick, "--lora", "more.safetensors", "--lora-partial"))
    assert pixels(path) == pixels(made(cli(*quick, "--lora", "whole.safetensors")))
    assert images.read_metadata(path)["loras"][0]["partial"] is True
    assert pixels(made(cli("--remake", path))) == pixels(path)


def test_control_lora_is_the_full_model_that_it_makes(cli, here, zoo):
    """W + 0.85 · BA, the biases with it, new norms, and a wider img_in, in float64 and in a file: the row of the full model."""
    flags = (PROMPT, *ONE.split(), "--steps", 2, "--seed", 5, "--guidance", 30)
    adapted = made(cli(*zoo("flux.1-canny-dev-lora"), *flags))
    zoo("flux.1-canny-dev")
    state = {
        n: x.double() for n, x in load_file(zoo.folder / "FLUX.1-dev/flux1-dev.safetensors").items()
    }
    tensors = load_file(zoo.folder / "FLUX.1-Canny-dev-lora/flux1-canny-dev-lora.safetensors")
    wide = torch.zeros(len(state["img_in.weight"]), 128, dtype=torch.float64)
    wide[:, :64] = state["img_in.weight"]
    state["img_in.weight"] = wide
    for key, tensor in tensors.items():
        if key.endswith(".scale"):
            state[key] = tensor.double()
        elif key.endswith(".lora_B.weight"):
            name = key.removesuffix(".lora_B.weight")
            state[f"{name}.weight"] += (
                0.85 * tensor.double() @ tensors[f"{name}.lora_A.weight"].double()
            )
            state[f"{name}.bias"] += 0.85 * tensors[f"{name}.lora_B.bias"].double()
    home = shutil.copytree(zoo.folder / "FLUX.1-Canny-dev", "full/FLUX.1-Canny-dev")
    save_file(
        {name: tensor.float() for name, tensor in state.items()},
        Path(home) / "flux1-canny-dev.safetensors",
    )
    whole = made(cli(*zoo("flux.1-canny-dev"), *flags, "--weights", "full"))
    assert (
        levels(adapted, whole) <= 1
        and levels(adapted, made(cli(*zoo("flux.1-canny-dev"), *flags))) > 3
    )


A_KEY, B_KEY = (f"diffusion_model.{LAYER}.lora_{x}.weight" for x in "AB")


@pytest.mark.parametrize(
    "change, words",
    [
        (
            lambda t: t | {B_KEY: torch.ones(128, 5)},
            (A_KEY, B_KEY, "(128, 5)", "cannot be multiplied"),
        ),
        (lambda t: t | {A_KEY: torch.ones(4, 96)}, (A_KEY, "(4, 96)", "does not fit Flux", LAYER)),
        (lambda t: t | {A_KEY: t[A_KEY] * float("nan")}, ("NaN or infinity", A_KEY)),
        (lambda t: t | {B_KEY: t[B_KEY] / 0}, ("NaN or infinity", B_KEY)),
        (lambda t: {A_KEY: t[A_KEY]}, (A_KEY, "without its up")),
        (
            lambda t: t | {"diffusion_model.cat.lora_A.weight": torch.ones(2, 2)},
            ("1 tensors, of 3", "diffusion_model.cat.lora_A"),
        ),
        (
            lambda t: {
                key.replace("single_blocks.1", "single_blocks.37"): x for key, x in t.items()
            },
            ("2 tensors, of 2", "37"),
        ),
        (
            lambda t: {
                key.replace("single_blocks.1.linear2", "double_blocks.0.img_mod.lin"): x
                for key, x in t.items()
            },
            ("2 tensors, of 2", "no place in Flux", "double_blocks.0.img_mod.lin"),
        ),  # which FLUX.1 alone has
        (
            lambda t: t | {f"diffusion_model.{LAYER}.lora_B.bias": torch.ones(128)},
            ("lora_B.bias", "takes no bias"),
        ),
        (lambda t: load_file(TOY), ("is not a LoRA", "--transformer")),
        (lambda t: {"cat": torch.ones(2)}, ("is not a LoRA",)),
    ],
)
def test_wrong_lora_is_told(cli, change, words):
    save_file(
        {name: tensor.contiguous() for name, tensor in change(lora("bad.safetensors")).items()},
        "bad.safetensors",
    )
    saying(
        cli,
        ("bad.safetensors", *words),
        PROMPT,
        *test_sample.QUICK,
        "--lora",
        "bad.safetensors:0.5",
    )


@pytest.mark.parametrize(
    "content, words",
    [
        (None, ("does not exist",)),
        (b"", ("is empty",)),
        (b"PK\x03\x04" + b"\0" * 80, ("not a safetensors file", "pickle")),
        (b"<!DOCTYPE html>", ("not a safetensors file", "a web page")),
    ],
    ids=["missing", "empty", "pickle", "web page"],
)
def test_file_that_is_no_lora_is_told_before_the_weights_are_looked_for(cli, content, words):
    if content is not None:
        Path("bad.safetensors").write_bytes(content)
    for model in ("flux.2-tiny", "flux.1-krea-dev"):
        saying(
            cli, ("bad.safetensors", *words), PROMPT, "--model", model, "--lora", "bad.safetensors"
        )


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_scale_that_is_no_number_is_told_before_the_weights_are_looked_for(cli, scale):
    lora("a.safetensors")
    words = ("--lora a.safetensors", scale, "finite")
    saying(cli, words, PROMPT, "--model", "flux.1-krea-dev", "--lora", f"a.safetensors:{scale}")


# ---------------------------------------------------------------------------------------------------------- upsampling


def test_prompt_is_written_out_by_a_server_that_sees_the_pictures(cli, here, zoo, server):
    server.reply = 200, {}, chat_reply(" a cat,\nin fur\x1b \n")
    flags = (*zoo(KLEIN), *BOTH.split(), "--steps", 2, "--seed", 5)
    path = made(
        run := cli("a cat", *flags, "--upsample", server.url, "--upsample-model", "some/model")
    )
    ((address, _, body),) = server.asked
    content = body["messages"][1]["content"]
    assert address == "/v1/chat/completions" and body["model"] == "some/model"
    assert [part["type"] for part in content] == ["image_url", "image_url", "text"] and content[-1][
        "text"
    ] == "a cat"
    said = images.read_metadata(path)
    assert "prompt: a cat,\nin fur\n" in run.err
    assert (said["prompt"], said["upsampled_from"]) == ("a cat,\nin fur", "a cat")
    assert pixels(path) == pixels(made(cli("a cat,\nin fur", *flags)))
    assert (
        pixels(made(cli("--remake", path, "--weights", zoo.folder))) == pixels(path)
        and len(server.asked) == 1
    )


def test_every_prompt_is_written_out_once(cli, server):
    server.reply = 200, {}, chat_reply("a red ring")
    flags = (
        *test_sample.QUICK,
        "--upsample",
        server.url + "/v1",
        "--upsample-model",
        "m",
        "--num-images",
        2,
    )
    run = cli("a ring", "a star", *flags)
    assert run.code == 0 and [body["messages"][1]["content"] for _, _, body in server.asked] == [
        "a ring",
        "a star",
    ]
    assert [images.read_metadata(path)["upsampled_from"] for path in run.pictures] == [
        "a ring"
    ] * 2 + ["a star"] * 2


def test_a_prompt_that_was_written_out_too_long_for_a_jpeg_is_told_before_the_work(
    cli, server, monkeypatch
):
    """It fits, and what is kept beside it does not."""
    monkeypatch.setattr(Pipeline, "encode", lambda *_: pytest.fail("a prompt was encoded"))
    server.reply = 200, {}, chat_reply("a" * 65_000)
    flags = (
        *test_sample.QUICK,
        "--upsample",
        server.url,
        "--upsample-model",
        "m",
        "--output",
        "a.jpg",
    )
    run = cli(PROMPT, *flags)
    run.says("--output a.jpg", "no room for so long a prompt", ".png")
    assert not run.files and len(server.asked) == 1


def test_what_goes_wrong_with_upsampling_is_told(cli, server):
    saying(
        cli,
        ("--upsample local", "flux.2-dev", "not with flux.2-tiny", "URL"),
        PROMPT,
        "--upsample",
        "local",
    )
    saying(cli, ("--upsample URL", "--upsample-model NAME"), PROMPT, "--upsample", server.url)
    saying(cli, ("--upsample URL", "--upsample-model NAME"), PROMPT, "--upsample-model", "m")
    server.reply = 500, {}, b'{"error": "no room"}'
    run = cli(PROMPT, *test_sample.QUICK, "--upsample", server.url, "--upsample-model", "m")
    run.says(f"{server.url}/v1/chat/completions answered 500: no room")
    assert not run.files and len(server.asked) == 1


# ---------------------------------------------------------------------------------------------------------- making again


@pytest.fixture
def remade(cli, here) -> Path:
    """A picture made from a picture, a mask and two LoRAs."""
    lora("one.safetensors")
    lora("two.safetensors", seed=1)
    flags = (
        "--lora",
        "one.safetensors:0.5",
        "--lora",
        "two.safetensors",
        "--steps",
        2,
        "--seed",
        5,
    )
    return made(cli(PROMPT, *INSIDE.split(), *flags))


def test_picture_of_pictures_and_loras_is_made_again(cli, remade):
    """Equal where the files are where they were, or are given anew; what is typed beside --remake wins."""
    again = made(cli("--remake", remade))
    assert pixels(again) == pixels(remade) and images.read_metadata(again) == images.read_metadata(
        remade
    )
    for name in ("a.png", "m.png", "one.safetensors"):
        Path(name).rename(f"moved-{name}")
    for flag, name in (("--image", "a.png"), ("--mask", "m.png"), ("--lora", "one.safetensors")):
        saying(
            cli,
            (f"{name}, which {remade} was made with, is not there: give it with {flag}",),
            "--remake",
            remade,
            *("--image", "moved-a.png") * (flag != "--image"),
            *("--mask", "moved-m.png") * (flag == "--lora"),
        )
    moved = (
        "--image",
        "moved-a.png",
        "--mask",
        "moved-m.png",
        "--lora",
        "moved-one.safetensors:0.5",
    )
    assert pixels(made(cli("--remake", remade, *moved, "--lora", "two.safetensors"))) == pixels(
        remade
    )
    other = made(
        cli("--remake", remade, *moved, "--lora", "two.safetensors:0.9", "--strength", 0.5)
    )
    said = images.read_metadata(other)
    assert (
        pixels(other) != pixels(remade)
        and said["loras"][1]["scale"] == 0.9
        and said["pictures"]["strength"] == 0.5
    )


@pytest.mark.parametrize(
    "name, flag", [("a.png", "--image"), ("m.png", "--mask"), ("two.safetensors", "--lora")]
)
def test_picture_is_not_made_again_from_a_file_that_has_changed(cli, remade, name, flag):
    with open(name, "ab") as file:
        file.write(b"\0")
    saying(
        cli,
        (f"{name} is not the file that {remade} was made with: give that with {flag}",),
        "--remake",
        remade,
    )


def test_picture_is_not_made_again_from_more_files_than_it_had(cli, remade):
    def words(flag, had, given):
        return (f"{remade} was made with {flag} given {had} times, not {given}",)

    for flag, name, had in (("--image", "a.png", 1), ("--lora", "one.safetensors", 2)):
        saying(cli, words(flag, had, 3), "--remake", remade, *(flag, name) * 3)
    plain = made(cli(PROMPT, *test_sample.QUICK))
    for flag, name in (("--image", "a.png"), ("--mask", "m.png"), ("--lora", "one.safetensors")):
        saying(
            cli,
            (f"{plain} was made with {flag} given 0 times, not 1",),
            "--remake",
            plain,
            flag,
            name,
        )


FILE = dict(file="a.png", sha256="0")


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(images="a.png"), ("does not say which files --image had",)),
        (dict(images=[FILE | dict(sha256=None)]), ("does not say which files --image had",)),
        (dict(images=[FILE]), ("a.png is not the file", "--image")),
        (dict(mask=[FILE]), ("does not say which files --mask had",)),
        (
            dict(loras=[dict(file="one.safetensors", sha256="0", scale="1")]),
            ("does not say which files --lora had",),
        ),
        (dict(pictures=None), ("lacks what was done with its pictures",)),
        (dict(pictures=[]), ("lacks what was done with its pictures",)),
        (
            dict(pictures={"strength": "1"}),
            ("lacks what was done with its pictures", "strength", "cached"),
        ),
        (
            dict(pictures=DEFAULTS | dict(outpaint=[1, 2, 3])),
            ("lacks what was done with its pictures", "expand"),
        ),
        (
            dict(pictures=DEFAULTS | dict(outpaint=[1, 2.5, 3, 4])),
            ("lacks what was done with its pictures", "expand"),
        ),
        (
            dict(pictures=DEFAULTS | dict(image_weights=["a"])),
            ("lacks what was done with its pictures", "weights"),
        ),
        (dict(pictures=DEFAULTS | dict(strength=float("nan"))), ("--strength nan",)),
        (dict(guidance=["a"]), ("lacks parameters", "guidance")),
        (dict(guidance=[]), ("--guidance has 0 values for 2 steps",)),
    ],
)
def test_picture_with_wrong_parameters_is_told(cli, remade, change, words):
    """What a picture carries was, perhaps, written by somebody else."""
    bad = images.save(
        Image.new("RGB", (4, 4)), Path("bad.png"), images.read_metadata(remade) | change
    )
    saying(cli, words, "--remake", bad)


# ---------------------------------------------------------------------------------------------------------- files of pictures


def rotated(rgb: Image.Image) -> dict:
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned clockwise, to be upright
    return dict(image=rgb.transpose(Image.Transpose.ROTATE_90), exif=exif)


GREY = Image.fromarray(np.asarray(A)[..., 1])
DEEP = Image.fromarray(np.asarray(GREY).astype(np.uint16) * 257)  # 16 bits
HOLES = np.dstack([np.asarray(A), np.where(np.asarray(M) == 255, 0, 255).astype(np.uint8)])
ON_WHITE = np.where(np.asarray(M)[..., None] == 255, 255, np.asarray(A)).astype(np.uint8)
KINDS = {  # file, what is saved in it, the RGB picture that it is, what is noted
    "JPEG 2000": ("x.jp2", dict(image=A), A, ""),
    "grey": ("x.png", dict(image=GREY), GREY.convert("RGB"), ""),
    "16-bit grey": ("x.png", dict(image=DEEP), GREY.convert("RGB"), ""),
    "16-bit grey TIFF": ("x.tif", dict(image=DEEP), GREY.convert("RGB"), ""),
    "one bit": ("x.png", dict(image=M.convert("1")), M.convert("1").convert("RGB"), ""),
    "palette": ("x.png", dict(image=A.quantize(64)), A.quantize(64).convert("RGB"), ""),
    "alpha": (
        "x.png",
        dict(image=Image.fromarray(HOLES)),
        Image.fromarray(ON_WHITE),
        "transparent parts, which were put on",
    ),
    "CMYK": (
        "x.tif",
        dict(image=A.convert("CMYK")),
        A,
        "is CMYK and was made RGB without its colour profile",
    ),
    "EXIF-rotated": ("x.png", rotated(A), A, ""),
}


@pytest.mark.parametrize("kind", KINDS)
def test_pictures_are_read_for_what_they_show(cli, zoo, kind):
    name, saved, shown, note = KINDS[kind]
    saved = dict(saved)
    saved.pop("image").save(name, **saved)
    run = cli(PROMPT, "--image", name, "--steps", 2, "--strength", 0.5, "--seed", 5)
    asked = dict(prompts=PROMPT, steps=2, seed=5, pictures=ImageInputs((shown,), strength=0.5))
    assert pixels(made(run)) == by_python(zoo.pipe("flux.2-tiny"), **asked)
    assert run.err.count("note: x.") == bool(note) and note in run.err


def test_masks_are_read_for_what_they_show(cli, here):
    flags = (PROMPT, "--image", "a.png", "--steps", 1, "--seed", 5)
    expected = made(cli(*flags, "--mask", "m.png"))
    Image.fromarray(np.asarray(M).astype(np.uint16) * 257).save("16.png")
    M.convert("RGB").save("rgb.png")
    M.convert("P").save("palette.png")
    rotated(M)["image"].save("turned.png", exif=rotated(M)["exif"])
    for name in ("16.png", "rgb.png", "palette.png", "turned.png"):
        assert pixels(made(cli(*flags, "--mask", name))) == pixels(expected), name


def test_mask_of_twice_the_size_and_an_all_white_one_are_noted(cli, here):
    M.resize((180, 140)).save("large.png")
    Image.new("L", A.size, 255).save("white.png")
    run = cli(PROMPT, "--image", "a.png", "--steps", 1, "--mask", "large.png")
    assert (
        run.code == 0
        and run.err.count("note: the mask is 180x140 and the picture 90x70: the mask was resized\n")
        == 1
    )
    run = cli(PROMPT, "--image", "a.png", "--steps", 1, "--mask", "white.png")
    assert (
        run.code == 0
        and run.err.count("note: the mask is white all over: nothing of the picture is kept\n") == 1
    )


def bomb(width: int, height: int) -> bytes:
    """A PNG of few bytes that claims to be large."""

    def chunk(kind, data):
        return (
            struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))
        )

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n"
        + chunk(b"IHDR", header)
        + chunk(b"IDAT", zlib.compress(bytes(99)))
        + chunk(b"IEND", b"")
    )


def animated(path: Path) -> None:
    A.save(path, format="GIF", save_all=True, append_images=[A.rotate(90)])


UNREADABLE = {
    "missing": (lambda path: None, "does not exist", "name a picture file"),
    "folder": (Path.mkdir, "is a folder"),
    "text": (lambda path: path.write_text("a cat"), "is not a picture"),
    "empty": (lambda path: path.write_bytes(b""), "is not a picture"),
    "vector": (
        lambda path: path.write_text("<svg xmlns='http://www.w3.org/2000/svg'/>"),
        "is not a picture",
    ),
    "truncated": (lambda path: path.write_bytes(Path("m.png").read_bytes()[:-80]), "is damaged"),
    "bomb": (
        lambda path: path.write_bytes(bomb(60_000, 60_000)),
        "has more than",
        "megapixels",
        "scale it down",
    ),
    "large": (
        lambda path: path.write_bytes(bomb(10_000, 10_000)),
        "has more than",
        "megapixels",
        "scale it down",
    ),
    "animated": (animated, "holds 2 pictures", "PNG"),
    "LAB": (
        lambda path: Image.new("LAB", (90, 70)).save(path, "TIFF"),
        "LAB colour space",
        "save it as RGB",
    ),
    "32 bits": (
        lambda path: Image.new("I", (90, 70), 70_000).save(path, "TIFF"),
        "values from 70000",
        "8-bit or 16-bit PNG",
    ),
}


@pytest.mark.parametrize("flag", ["--image", "--mask"])
@pytest.mark.parametrize("kind", UNREADABLE)
def test_what_is_no_picture_is_told(cli, here, kind, flag):
    write, *words = UNREADABLE[kind]
    write(path := Path("bad.png"))
    saying(cli, ("bad.png", *words), PROMPT, flag, path, *("--image", "a.png") * (flag == "--mask"))


def test_picture_without_rights_is_told(cli, here, monkeypatch):
    def refuse(*_, **__):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Image, "open", refuse)
    saying(
        cli, ("a.png cannot be read (Permission denied)", "its rights"), PROMPT, "--image", "a.png"
    )


@pytest.mark.parametrize(
    "image, words",
    [
        (
            Image.new("RGBA", A.size, (0, 0, 0, 9)),
            ("bad.png has transparent parts, which a mask may not",),
        ),
        (A, ("bad.png has colours, which a mask may not",)),
        (
            Image.new("L", (70, 90), 255),
            ("the mask is 70x90 and the picture 90x70", "another shape"),
        ),
        (
            Image.new("L", A.size, 0),
            ("the mask is black all over", "paint white what is to change"),
        ),
    ],
)
@pytest.mark.parametrize(
    "model, size", [("flux.2-tiny", ()), (FILL, ()), (KLEIN, ("--width", 64, "--height", 64))]
)
def test_wrong_mask_is_told_before_the_weights_are_looked_for(cli, here, image, words, model, size):
    image.save("bad.png")
    saying(cli, words, PROMPT, "--model", model, "--image", "a.png", "--mask", "bad.png", *size)


@pytest.mark.parametrize(
    "size, words",
    [
        ((63, 90), ("63x90", "at least 64 pixels")),
        ((1, 1), ("1x1", "at least 64 pixels")),
        ((64, 513), ("64x513", "at most 8 times the other", "crop it")),
        ((513, 64), ("513x64", "at most 8 times the other", "crop it")),
    ],
)
@pytest.mark.parametrize("model", ["flux.2-tiny", "flux.1-canny-dev", KONTEXT, KLEIN, REDUX])
def test_picture_that_is_too_small_or_too_long_is_told(cli, here, size, words, model):
    Image.new("RGB", size).save("bad.png")
    several = ("--image", "a.png") * (model in (KONTEXT, KLEIN, REDUX, "flux.2-tiny"))
    number = "--image 2 is" if several else "--image 1 is"
    saying(cli, (number, *words), PROMPT, "--model", model, *several, "--image", "bad.png")


# ---------------------------------------------------------------------------------------------------------- what models can do

START = {"flux.1-schnell", "flux.1-dev", "flux.1-krea-dev", "flux.1-tiny"}
ABLE = {  # which models take a flag, as the README has it
    "--mask m.png": START | FLUX2 | {KONTEXT, FILL},
    "--strength 0.5": START | FLUX2 | {KONTEXT},
    "--expand 1,2,3,4": {FILL},
    "--mask-threshold 0.5": {FILL},
    "--photo": CONTROL,
    "--image-weight 1": {REDUX},
    "--match-image-size 1": FLUX2 | {KONTEXT},
    "--keep-input-size": {KONTEXT},
    "--reference-limit 512": FLUX2,
    "--kv-cache": FLUX2,
    "--no-kv-cache": FLUX2,
}


@pytest.mark.parametrize("flags", ABLE)
def test_what_a_model_cannot_do_is_told_and_which_can(cli, here, flags):
    flag = flags.split()[0].replace("--no-", "--")
    for model in MODELS.keys() - ABLE[flags]:
        line = refused(cli, PROMPT, "--model", model, "--image", "a.png", *flags.split())
        start, _, able = line.removesuffix(", or leave it out\n").partition("; choose from ")
        assert (
            start == f"error: {flag} means nothing to {model}"
            and set(able.split(", ")) == ABLE[flags]
        )


def test_control_picture_is_saved_by_models_that_have_one(cli, here):
    for model in MODELS.keys() - CONTROL:
        flags = (
            "--model",
            model,
            "--image",
            "a.png",
            *("--mask", "m.png") * (model == FILL),
            "--save-control",
            "c.png",
        )
        saying(cli, (f"--save-control means nothing to {model}", "leave it out"), PROMPT, *flags)


@pytest.mark.parametrize("flags", [*ABLE, "--no-composite", "--save-control c.png"])
def test_what_needs_a_picture_is_told(cli, here, flags):
    flag = flags.split()[0].replace("--no-kv", "--kv")
    saying(
        cli, (f"error: {flag} needs a picture: give it with --image FILE",), PROMPT, *flags.split()
    )


@pytest.mark.parametrize("model", [FILL, REDUX, *sorted(CONTROL)])
def test_model_that_needs_a_picture_is_told(cli, model):
    saying(cli, (f"{model} needs a picture: give it with --image FILE",), PROMPT, "--model", model)


@pytest.mark.parametrize(
    "model, most, takes",
    [
        ("flux.1-dev", 1, "takes one --image"),
        (FILL, 1, "takes one --image"),
        ("flux.1-canny-dev", 1, "takes one --image"),
        (REDUX, 10, "takes 1 to 10 times --image"),
        (KONTEXT, 10, "takes 1 to 10 times --image"),
        (KLEIN, 10, "takes 1 to 10 times --image"),
    ],
)
def test_too_many_pictures_are_told(cli, here, model, most, takes):
    flags = ("--model", model, *("--image", "a.png") * (most + 1))
    saying(cli, (f"{model} {takes}, not {most + 1}",), PROMPT, *flags)


@pytest.mark.parametrize(
    "model, flags, words",
    [
        (FILL, "", (f"{FILL} fills in: say where, with --mask FILE", "--expand")),
        ("flux.2-tiny", "--strength 0", ("--strength 0", "above 0, and at most 1")),
        ("flux.2-tiny", "--strength 1.01", ("--strength 1.01", "above 0, and at most 1")),
        (KLEIN, "--strength -1", ("--strength -1", "above 0, and at most 1")),
        (KLEIN, "--strength nan", ("--strength nan", "above 0, and at most 1")),
        (FILL, "--mask m.png --mask-threshold 0", ("--mask-threshold 0", "above 0 and at most 1")),
        (
            FILL,
            "--mask m.png --mask-threshold 1.5",
            ("--mask-threshold 1.5", "above 0 and at most 1"),
        ),
        (
            FILL,
            "--mask m.png --mask-threshold nan",
            ("--mask-threshold nan", "above 0 and at most 1"),
        ),
        (FILL, "--expand 0,0,0,0", ("margins of 0, 0, 0, 0", "one at least is not 0")),
        (FILL, "--outpaint=-16,0,0,0", ("margins of -16, 0, 0, 0", "numbers of pixels from 0")),
        (
            FILL,
            "--expand 9999,0,0,9999",
            ("margins of 9999, 0, 0, 9999", "megapixels", "give smaller ones"),
        ),
        (FILL, "--expand 0,0,0,0 --width 64 --height 64", ("margins of 0, 0, 0, 0",)),
        (
            REDUX,
            "--image-weight 1 --image-weight 1",
            ("--image-weight is given 2 times, for 1 pictures",),
        ),
        (
            REDUX,
            "--image b.png --image-weight 1",
            ("--image-weight is given 1 times, for 2 pictures",),
        ),
        (REDUX, "--image-weight nan", ("--image-weight must be a finite number",)),
        (REDUX, "--image-weight inf", ("--image-weight must be a finite number",)),
        (KLEIN, "--reference-limit 63", ("--reference-limit 63", "at least 64x64")),
        (KLEIN, "--reference-limit -5", ("--reference-limit -5", "at least 64x64")),
        (KLEIN, "--match-image-size 0", ("--match-image-size 0", "1 pictures, counted from 1")),
        (
            KONTEXT,
            "--image b.png --match-image-size 3",
            ("--match-image-size 3", "2 pictures, counted from 1"),
        ),
        ("flux.1-canny-dev", "--save-control c.bmp", ("c.bmp", ".bmp is not a picture format")),
        ("flux.2-tiny", "--width 100", ("--width 100", "multiples of 16")),
    ],
)
def test_wrong_value_is_told(cli, here, model, flags, words):
    saying(cli, words, PROMPT, "--model", model, "--image", "a.png", *flags.split())


@pytest.mark.parametrize(
    "flags",
    [
        "--expand 1,2,3",
        "--expand a,b,c,d",
        "--expand 1.5,0,0,0",
        "--strength half",
        "--reference-limit x",
        "--guidance 1:2:3",
        "--guidance 4:x",
        "--match-image-size 1.5",
        "--image-weight a",
    ],
)
def test_what_cannot_be_parsed_is_told_by_argparse(cli, here, flags):
    run = cli(PROMPT, "--image", "a.png", *flags.split())
    assert run.code == 2 and run.err.splitlines()[-1].startswith(
        "sample.py: error: argument " + flags.split()[0]
    )
    assert "Traceback" not in run.err and run.files == ["a.png", "b.png", "m.png"]


def test_pictures_alone_are_no_prompt(cli, here):
    for model in (name for name in MODELS if name != REDUX):
        flags = ("--image", "a.png", *("--mask", "m.png") * (model == FILL))
        saying(cli, (f"there is no prompt, and {model} needs one",), "--model", model, *flags)


def test_approximation_is_noted_once(cli, here, zoo):
    run = cli(PROMPT, *zoo(KLEIN), "--image", "a.png", "--kv-cache", "--steps", 1)
    assert run.code == 0 and run.err.count("approximation") == 1
    assert (
        f"note: {KLEIN} was not trained with --kv-cache: what it makes is an approximation\n"
        in run.err
    )
    run = cli(PROMPT, *zoo(KV), "--image", "a.png", "--kv-cache", "--steps", 1)
    assert run.code == 0 and "approximation" not in run.err
