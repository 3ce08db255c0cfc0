"""scripts/sample.py: what is right makes a picture, and what is wrong is told in one line that says what to do.

Run in this process but for the few tests that need one of their own, on the embedded model; nothing depends on what it
paints. Exit codes: 0 for a picture, 2 for a mistake in what was asked, 1 for a failure on the way, 130 for Ctrl-C.
"""

import io
import os
import re
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support import load_script as scripted

from flux import pipeline
from flux.configs import EMBEDDED, MODELS
from flux.image_io import output as images
from flux.parity.reference import FLUX1_TINY, randomise
from flux.transformer import Flux
from flux.weights import locate as models

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "sample.py"
REAL = [name for name, spec in MODELS.items() if not spec.embedded]
PROMPT = "a small red circle above a large blue ring on a white background"
QUICK = ("--width", "64", "--height", "64", "--steps", "1")
SPEC = MODELS["flux.2-tiny"]
TOY = EMBEDDED / SPEC.name / SPEC.transformer_file


class Run(NamedTuple):
    code: int
    out: str
    err: str
    folder: Path  # the working folder, which was empty

    @property
    def pictures(self) -> list[Path]:
        return [self.folder / line for line in self.out.splitlines()]

    @property
    def files(self) -> list[str]:
        return sorted(
            path.relative_to(self.folder).as_posix()
            for path in self.folder.rglob("*")
            if path.is_file()
        )

    def says(self, *words: str, code: int = 2) -> None:
        """It ended with this code and one line, `error: ...`, in which all these words are; and made no picture."""
        assert self.code == code, self.err
        last = self.err.rstrip("\n").splitlines()[-1]
        assert (
            last.startswith("error: ")
            and self.err.count("error: ") == 1
            and "Traceback" not in self.err
        ), self.err
        assert [word for word in words if word not in last] == [], last
        assert self.out == "" and not [name for name in self.files if "outputs" in name]


@pytest.fixture(scope="module")
def script():
    return scripted.script("sample")


@pytest.fixture
def nothing_here(tmp_path, monkeypatch):
    """An empty cache and no network, for huggingface_hub, which has read its settings when it was imported."""
    import huggingface_hub.constants

    monkeypatch.delenv("FLUX_WEIGHTS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cli(script, nothing_here, tmp_path, monkeypatch, capsys) -> Callable[..., Run]:
    """The command with these arguments, on the CPU, in an empty folder."""
    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    def call(*arguments) -> Run:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        with warnings.catch_warnings():  # which puts back showwarning, too
            warnings.simplefilter("default")
            try:
                code = script.main()
            except SystemExit as stop:  # argparse
                code = stop.code
            finally:
                torch.set_flush_denormal(False)
        return Run(code, *capsys.readouterr(), folder)

    return call


def subprocess_environment(home: Path) -> dict[str, str]:
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("FLUX_WEIGHTS", "HF_HUB_CACHE", "PYTHONPATH")
    }
    return env | dict(
        HF_HUB_OFFLINE="1", HF_HOME=str(home), CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1"
    )


def pixels(path: Path) -> bytes:
    with Image.open(path) as image:
        return image.tobytes()


# ---------------------------------------------------------------------------------------------------------- pictures


def test_a_picture_as_a_user_asks_for_it(tmp_path):
    """In its own process: the path alone on standard output, what it did on the other; and where it came from, inside."""
    here = tmp_path / "here"
    here.mkdir()
    command = [sys.executable, SCRIPT, PROMPT, *QUICK, "--seed", "7"]
    done = subprocess.run(
        command, cwd=here, env=subprocess_environment(tmp_path), capture_output=True, text=True
    )
    run = Run(done.returncode, done.stdout, done.stderr, here)
    assert (
        run.code == 0
        and run.files == ["outputs/flux.png"]
        and run.pictures == [here / "outputs/flux.png"]
    ), run.err
    assert (
        "flux.2-tiny, an embedded toy: 64x64, 1 steps, guidance 1.5, on cpu in float32" in run.err
    )
    assert f"seed 7: {PROMPT}" in run.err
    with Image.open(run.pictures[0]) as image:
        assert image.size == (64, 64) and image.mode == "RGB"
    said = images.read_metadata(run.pictures[0])
    expected = dict(
        model="flux.2-tiny",
        prompt=PROMPT,
        negative_prompt=None,
        width=64,
        height=64,
        steps=1,
        guidance=1.5,
        cfg_scale=None,
        seed=7,
        numerics="exact",
        dtype="float32",
        device="cpu",
        transformer=None,
    )
    assert expected.items() <= said.items()
    assert (
        "toy" in said["note"]
        and "not what FLUX can do" in said["note"]
        and said["licence"] == "Apache-2.0"
    )
    assert said["software"].startswith("flux ") and f"torch {torch.__version__}" in said["software"]


def test_defaults_are_the_rows(cli):
    run = cli(PROMPT)
    said = images.read_metadata(*run.pictures)
    assert run.code == 0 and (said["width"], said["height"], said["steps"]) == (
        SPEC.size,
        SPEC.size,
        SPEC.steps,
    )
    assert (
        0 <= said["seed"] < 2**32 and f"seed {said['seed']}: " in run.err
    )  # drawn at random, and told


def test_each_picture_is_the_one_of_its_own_seed_and_none_is_overwritten(cli):
    both = cli(PROMPT, *QUICK, "--seed", 5, "--num-images", 2)
    alone = cli(PROMPT, *QUICK, "--seed", 6)
    assert both.code == alone.code == 0
    assert [path.name for path in both.pictures + alone.pictures] == [
        "flux.png",
        "flux-2.png",
        "flux-3.png",
    ]
    first, second, again = map(pixels, both.pictures + alone.pictures)
    assert first != second == again
    assert [images.read_metadata(path)["seed"] for path in both.pictures] == [5, 6]


def test_prompts_come_from_everywhere_in_order(cli, monkeypatch):
    Path("prompts.txt").write_text("\ufeffa red ring\n\n  a blue star \r\n", encoding="utf-8")
    run = cli(
        "a green cross",
        "--prompt",
        "a pink circle",
        "--prompt-file",
        "prompts.txt",
        *QUICK,
        "--seed",
        1,
    )
    prompts = ["a green cross", "a pink circle", "a red ring", "a blue star"]
    assert (
        run.code == 0 and [images.read_metadata(path)["prompt"] for path in run.pictures] == prompts
    )
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a näive ring".encode())))
    (path,) = cli("--prompt-file", "-", *QUICK).pictures
    assert images.read_metadata(path)["prompt"] == "a näive ring"


@pytest.mark.parametrize("suffix", ["png", "jpg", "webp"])
def test_remake_makes_the_same_picture(cli, suffix):
    """From what the picture carries, with all of it different from the defaults; what is typed beside it wins."""
    output = f"a.{suffix}"
    asked = (
        "--width",
        80,
        "--height",
        64,
        "--steps",
        2,
        "--guidance",
        3.5,
        "--negative-prompt",
        "black",
        "--dtype",
        "bfloat16",
        "--numerics",
        "bfl",
        "--output",
        output,
    )
    (path,) = (first := cli('a näive ]]> "red" ring', *asked)).pictures
    (again,) = (second := cli("--remake", path, "--output", output)).pictures
    assert first.code == second.code == 0 and again.name == f"a-2.{suffix}"
    assert pixels(path) == pixels(again) and images.read_metadata(path) == images.read_metadata(
        again
    )
    (other,) = cli("--remake", path, "--seed", 4, "--output", output).pictures
    assert images.read_metadata(other) == images.read_metadata(path) | {"seed": 4} and pixels(
        other
    ) != pixels(path)


def test_latents_are_kept_beside_the_picture_and_overwrite_nothing(cli):
    Path("a.safetensors").write_text("mine")
    run = cli(PROMPT, *QUICK, "--seed", 3, "--output", "a.png", "--save-latents")
    assert run.code == 0 and run.files == [
        "a-2.png",
        "a-2.safetensors",
        "a.safetensors",
    ]  # one name for both
    assert Path("a.safetensors").read_text() == "mine" and "a-2.safetensors" in run.err
    with safe_open("a-2.safetensors", "pt") as file:
        latents, said = file.get_tensor("latents"), file.metadata()["flux"]
    (image,) = pipeline.load(device="cpu").decode(latents)
    assert latents.shape == (1, SPEC.transformer.in_channels, 4, 4) and PROMPT in said
    assert image.tobytes() == pixels(Path("a-2.png"))


def test_list_of_models(cli):
    run = cli("--list-models")
    lines = {line.split()[0]: line for line in run.out.splitlines()[1:]}
    assert run.code == 0 and lines.keys() == MODELS.keys() and not run.files
    assert {name for name, line in lines.items() if " yes " in line} == {
        "flux.1-tiny",
        "flux.2-tiny",
    }
    assert (
        " 11.9 B " in lines["flux.1-dev"]
        and " 3.88 B " in lines["flux.2-klein-4b"]
        and " 32.2 B " in lines["flux.2-dev"]
    )
    assert all(spec.licence.name in lines[name] for name, spec in MODELS.items())


def test_what_the_toy_does_not_know_is_noted_once(cli):
    run = cli("a red dragon above a dragon", *QUICK)
    assert run.code == 0 and run.err.count("note: ") == 1
    assert "'dragon'" in run.err and "--model" in run.err and "circle" in run.err


def test_prompt_beyond_the_limit_is_cut_and_the_loss_noted_once(cli):
    prompt = "a red circle " + " ".join(f"and ring number {k}" for k in range(40))
    run = cli(prompt, *QUICK)
    note = rf"note: the prompt is longer than {SPEC.text_length} tokens; this end was cut off: '(.*?)(?:\.\.\.)?'"
    (lost,) = re.findall(note, run.err)
    assert run.code == 0 and lost.strip() in prompt and len(lost) > 50
    assert images.read_metadata(*run.pictures)["prompt"] == prompt


# ---------------------------------------------------------------------------------------------------------- requests


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("--width", 100), ("--width 100", "multiples of 16", "96 or 112")),
        (("--height", 127), ("--height 127", "multiples of 16", "112 or 128")),
        (("--width", 0), ("--width 0", "from 64 to 8192", "64")),
        (("--height", -16), ("--height -16", "from 64 to 8192", "64")),
        (("--width", 48), ("--width 48", "from 64 to 8192", "64")),
        (("--width", 10**9), ("--width 1000000000", "from 64 to 8192", "8192")),
        (("--width", 8192, "--height", 8192), ("--width 8192", "--height 8192", "megapixels")),
        (("--steps", 0), ("--steps 0", "from 1 to 1000")),
        (("--steps", -1), ("--steps -1", "from 1 to 1000")),
        (("--steps", 1001), ("--steps 1001", "from 1 to 1000")),
        (("--seed", -1), ("--seed -1", "from 0 to 2^63 - 1")),
        (("--seed", 2**64), (f"--seed {2**64}", "from 0 to 2^63 - 1")),
        (("--seed", 2**63 - 1, "--num-images", 2), ("--seed", "from 0 to 2^63 - 1")),
        (("--num-images", 0), ("--num-images of at least 1",)),
        (("--num-images", -3), ("--num-images of at least 1",)),
        (
            ("--model", "flux.1-schnell", "--guidance", 2),
            ("--guidance", "(here 2)", "leave it out"),
        ),
        (("--guidance", "nan"), ("--guidance nan", "from 0 to 100")),
        (("--model", "flux.1-dev", "--cfg-scale", -1), ("--cfg-scale -1", "from 0 to 100")),
        (("--model", "flux.1-dev", "--cfg-scale", "inf"), ("--cfg-scale inf", "from 0 to 100")),
        (
            ("--model", "flux.1-dev", "--negative-prompt", "black"),
            ("--negative-prompt", "--cfg-scale 3"),
        ),
        (("--negative-prompt", "black", "--guidance", 1), ("--negative-prompt", "--guidance 3")),
        (("--device", "cuda:99"), ("--device cuda:99", "no such device", "cpu")),
        (("--device", "abacus"), ("--device abacus", "no such device", "cpu")),
        (
            ("--output", "a.bmp"),
            ("--output a.bmp", ".bmp is not a picture format", ".png, .jpg, .jpeg, .webp"),
        ),
        (("--output", "folder"), ("--output folder", "no suffix")),
        (("--output", "a" * 300 + ".png"), ("--output", "cannot be written", "choose another")),
        (
            ("--output", Path(__file__) / "a.png"),
            ("--output", "cannot be written", "choose another"),
        ),
        (("--transformer", "none.safetensors"), ("none.safetensors", "does not exist")),
        (
            ("--model", "flux-dev"),
            ("--model flux-dev", "did you mean", "flux.1-dev", "flux.2-klein-4b"),
        ),
        (("--model", "zzz"), ("--model zzz", "The choices are", *MODELS)),
        (("--remake", "a.png"), ("--remake brings its own prompt",)),
        (
            ("--model", "flux.2-klein-4b", "--guidance", 3),
            ("flux.2-klein-4b takes no --guidance", "distilled", "base"),
        ),
        (("--model", "flux.2-klein-base-4b", "--cfg-scale", 3), ("--cfg-scale 3", "--guidance")),
        (("--guidance", "4,1", "--steps", 8), ("--guidance has 2 values for 8 steps",)),
        (
            ("--model", "flux.1-dev", "--cfg-scale", "3,2,1", "--steps", 4),
            ("--cfg-scale has 3 values for 4 steps",),
        ),
        (
            ("--model", "flux.1-dev", "--weights", "none"),
            ("none, given by --weights, is not a folder",),
        ),
        (
            ("--model", "flux.1-dev", "--weights", "~nobody/flux"),
            ("~nobody/flux, given by --weights, is not a folder",),
        ),
        (("--list-models", "--weights", "none"), ("none, given by --weights, is not a folder",)),
        (("--model", "flux.1-dev", "--vram", -1), ("--vram -1: give the gigabytes",)),
        (("--model", "flux.1-dev", "--vram", "nan"), ("--vram nan: give the gigabytes",)),
    ],
)
def test_wrong_request_is_told(cli, arguments, words):
    if "a.png" in arguments:
        images.save(Image.new("RGB", (4, 4)), Path("a.png"), {})
    cli(PROMPT, *arguments).says(*words)


@pytest.mark.parametrize(
    "flag, value", [("--width", "wide"), ("--seed", "1.5"), ("--dtype", "float16"), ("--wid", "64")]
)
def test_wrong_flag_is_told_by_argparse(cli, flag, value):
    run = cli(PROMPT, flag, value)
    assert run.code == 2 and flag in run.err and "Traceback" not in run.err and not run.files


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ("there is no prompt", "--prompt-file", "--remake")),
        (("",), ("a prompt is empty",)),
        ((" \n ",), ("a prompt is empty",)),
        ((PROMPT, "--prompt", ""), ("a prompt is empty",)),
        (("a \0 cat",), ("the prompt 'a \\x00 cat'", "no UTF-8 text")),
        (
            ("a \udcff cat",),
            ("the prompt", "no UTF-8 text"),
        ),  # how Python hands over a byte that is not UTF-8
        (
            ("a cat", "--cfg-scale", "2", "--negative-prompt", "\udcff"),
            ("the prompt", "no UTF-8 text"),
        ),
        (
            ("x" * 70_000, "--output", "a.jpg"),
            ("--output a.jpg", "no room for so long a prompt", ".png"),
        ),
    ],
)
def test_wrong_prompt_is_told(cli, arguments, words):
    cli(*arguments, *QUICK).says(*words)


@pytest.mark.parametrize(
    "content, words",
    [
        (b"", ("holds no prompt", "one a line")),
        (b" \n\t\r\n", ("holds no prompt", "one a line")),
        (b"\xef\xbb\xbf", ("holds no prompt", "one a line")),
        (bytes(range(256)), ("is not UTF-8 text", "save it as UTF-8")),
        ("a cat".encode("utf-16"), ("is not UTF-8 text", "save it as UTF-8")),
        ("a cat".encode("utf-16-le"), ("is not UTF-8 text", "save it as UTF-8")),
        ("naïve".encode("latin-1"), ("is not UTF-8 text", "save it as UTF-8")),
        (None, ("cannot be read", "No such file")),
    ],
)
def test_wrong_prompt_file_is_told(cli, content, words):
    if content is not None:
        Path("prompts.txt").write_bytes(content)
    cli("--prompt-file", "prompts.txt", *QUICK).says("--prompt-file prompts.txt", *words)


def test_prompt_file_that_is_a_folder_is_told(cli):
    cli("--prompt-file", ".", *QUICK).says("--prompt-file .", "cannot be read")


@pytest.mark.parametrize(
    "change, words",
    [
        ({"width": "wide"}, ("lacks parameters", "width")),
        ({"seed": None, "prompt": ["a"]}, ("lacks parameters", "prompt", "seed")),
        ({"transformer": "other.safetensors"}, ("other.safetensors", "--transformer")),
        ({"dtype": "__class__"}, ("__class__", "--dtype")),
        ({"numerics": "mine"}, ("mine", "exact, bfl, diffusers")),
        ({"model": "flux.9"}, ("flux.9", "no such model")),
        ({"width": 100}, ("--width 100", "multiples of 16")),
        ({"prompt": ""}, ("a prompt is empty",)),
        ({"steps": True}, ("lacks parameters", "steps")),
        ({"guidance": 10**400}, ("lacks parameters", "guidance")),
        ({"images": False}, ("does not say which files --image had",)),
        ({"loras": {}}, ("does not say which files --lora had",)),
        ({"mask": 0}, ("does not say which files --mask had",)),
        ({"transformer": "\x1b[31mred"}, ("[31mred", "--transformer")),
    ],
)
def test_picture_with_wrong_parameters_is_told(cli, change, words):
    """What a picture carries was, perhaps, written by somebody else."""
    (path,) = cli(PROMPT, *QUICK, "--output", "a.png").pictures
    bad = images.save(
        Image.new("RGB", (4, 4)), Path("bad.png"), images.read_metadata(path) | change
    )
    cli("--remake", bad).says(*words)


def test_a_picture_that_says_nothing_of_files_is_told(cli):
    (path,) = cli(PROMPT, *QUICK, "--output", "a.png").pictures
    for part, flag in (("images", "--image"), ("mask", "--mask"), ("loras", "--lora")):
        metadata = images.read_metadata(path)
        del metadata[part]
        bad = images.save(Image.new("RGB", (4, 4)), Path("bad.png"), metadata)
        cli("--remake", bad).says(f"does not say which files {flag} had")


def test_what_is_typed_beside_remake_wins_even_if_it_is_usual(cli):
    asked = ("--numerics", "bfl", "--guidance", 3, "--negative-prompt", "blue", "--output", "a.png")
    (path,) = cli(PROMPT, *QUICK, *asked).pictures
    typed = ("--numerics", "exact", "--negative-prompt", "exact")
    (again,) = cli("--remake", path, *typed, "--output", "b.png").pictures
    kept = images.read_metadata(again)
    assert (kept["numerics"], kept["negative_prompt"], kept["guidance"]) == ("exact", "exact", 3)


def test_only_new_lines_part_prompts(cli):
    Path("prompts.txt").write_bytes("a red\x0bstar\u2028\x0c\r\na blue ring\ra star\n".encode())
    assert len(cli("--prompt-file", "prompts.txt", *QUICK).pictures) == 3


@pytest.mark.parametrize("closed", ["2>&-", "| true", "<&-"])
def test_a_picture_is_made_whoever_listens(tmp_path, closed):
    command = (
        shlex.join(map(str, [sys.executable, SCRIPT, PROMPT, *QUICK, "--output", "a.png"]))
        + " "
        + closed
    )
    subprocess.run(
        command,
        shell=True,
        cwd=tmp_path,
        env=subprocess_environment(tmp_path),
        capture_output=True,
        timeout=120,
    )
    assert [path.name for path in tmp_path.glob("*.png")] == ["a.png"]


def test_a_table_that_nobody_reads_to_its_end_is_no_error(tmp_path):
    command = f"{shlex.quote(sys.executable)} {SCRIPT} --list-models | true"
    run = subprocess.run(
        command,
        shell=True,
        env=subprocess_environment(tmp_path),
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert run.stderr == ""


def test_a_name_that_is_no_text_is_printed(tmp_path):
    """In a locale that refuses it."""
    name = os.fsencode(tmp_path) + b"/\xff.png"
    env = subprocess_environment(tmp_path) | {"PYTHONIOENCODING": "ascii:strict"}
    run = subprocess.run(
        [sys.executable, SCRIPT, PROMPT, *map(str, QUICK), "--output", name],
        env=env,
        capture_output=True,
    )
    assert run.returncode == 0 and b"Traceback" not in run.stderr and os.path.exists(name)


def test_picture_without_parameters_is_told(cli):
    Image.new("RGB", (4, 4)).save("a.png")
    Path("b.png").write_text("a cat")
    images.save(Image.new("RGB", (4, 4)), Path("c.png"), {"prompt": PROMPT})
    cli("--remake", "a.png").says("a.png", "carries flux parameters")
    cli("--remake", "b.png").says("b.png", "is not a picture")
    cli("--remake", "c.png").says("c.png lacks parameters", "seed", "model")
    cli("--remake", "none.png").says("none.png does not exist")


# ---------------------------------------------------------------------------------------------------------- weights


@pytest.mark.parametrize("name", REAL)
def test_real_model_without_its_weights_is_told_and_never_the_toy(cli, tmp_path, name):
    spec = MODELS[name]
    (empty := tmp_path / "empty").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    picture = (
        ("--image", tmp_path / "a.png") if spec.image_mode in ("fill", "control", "redux") else ()
    )
    request = (
        PROMPT,
        "--model",
        name,
        *picture,
        *(("--expand", "16,0,0,0") if spec.image_mode == "fill" else ()),
    )
    known = (
        spec.repository,
        ".safetensors",
        f"https://huggingface.co/{spec.repository}",
        spec.licence.name,
        "--weights",
    )
    cli(*request, "--weights", empty).says(*known, str(empty))
    cli(*request).says(
        spec.repository, ".safetensors", "HF_HUB_OFFLINE is set", "unset", "--weights"
    )


def test_real_model_without_its_weights_in_its_own_process(tmp_path):
    """With huggingface_hub's settings where they come from, the environment; and a folder that is named there."""
    command, env = (
        [sys.executable, SCRIPT, PROMPT, "--model", "FLUX.1-dev"],
        subprocess_environment(tmp_path / "home"),
    )
    (here := tmp_path / "here").mkdir()
    done = subprocess.run(command, cwd=here, env=env, capture_output=True, text=True)
    Run(done.returncode, done.stdout, done.stderr, here).says(
        "black-forest-labs/FLUX.1-dev", "HF_HUB_OFFLINE is set"
    )


def test_note_of_an_unusual_request_comes_once(cli, monkeypatch):
    """Though the steps are looked at twice: before the model is loaded, and where it samples."""
    monkeypatch.setitem(MODELS, SPEC.name, replace(SPEC, distilled="it was distilled"))
    run = cli(PROMPT, *QUICK)
    assert run.code == 0 and run.err.count("note: ") == 1
    assert f"note: flux.2-tiny was distilled for {SPEC.steps} steps, not 1\n" in run.err


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """A file of the embedded transformer in which this was changed."""

    def write(path: Path) -> None:
        state = load_file(TOY)
        change(state)
        save_file(state, path)

    return write


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], object]:
    return lambda path: path.write_bytes(change(TOY.read_bytes()))


def copy(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.copy(EMBEDDED / SPEC.name / name, path)


LAST = "final_layer.linear.weight"
NORM = "single_blocks.1.norm.query_norm.scale"
POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 123\n"
LYING = struct.pack("<Q", 9) + b"{" + b"x" * 8
DAMAGE = {
    "truncated": (content(lambda b: b[:-100]), "is truncated", "download it again"),
    "overlong": (content(lambda b: b + b"\0"), "goes on after its end", "download it again"),
    "header that is not JSON": (content(lambda b: LYING), "damaged header", "download it again"),
    "header beyond the file": (
        content(lambda b: struct.pack("<Q", len(b)) + b[8:]),
        "is truncated",
        "download it again",
    ),
    "empty": (content(lambda b: b""), "is empty", "download it again"),
    "pickle": (
        lambda path: torch.save({"a": torch.zeros(2)}, path),
        "not a safetensors file",
        "pickle",
        "as safetensors",
    ),
    "web page": (
        content(lambda b: b"<!DOCTYPE html>\n<html>log in</html>"),
        "not a safetensors file",
        "a web page",
        "login",
    ),
    "pointer": (
        content(lambda b: POINTER),
        "not a safetensors file",
        "git-lfs pointer",
        "git lfs pull",
    ),
    "folder": (Path.mkdir, "is a folder"),
    "missing": (tensors(lambda s: s.pop(NORM)), "1 missing", f"'{NORM}'"),
    "unknown": (tensors(lambda s: s.update(new=torch.zeros(2))), "1 unknown", "'new'"),
    "misshapen": (
        tensors(lambda s: s.update({NORM: torch.zeros(7)})),
        "1 misshapen",
        f"'{NORM}' is (7,)",
    ),
    "integers": (
        tensors(lambda s: s.update({NORM: s[NORM].int()})),
        "1 of a wrong type",
        f"'{NORM}' is I32",
    ),
    "other family": (
        lambda path: save_file(randomise(Flux(FLUX1_TINY)).state_dict(), path),
        "--transformer",
        "--model",
    ),
    "autoencoder": (copy("ae.safetensors"), "looks like an autoencoder"),
    "text encoder": (copy("text_encoder/model.safetensors"), "looks like a language model"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_told(cli, damage):
    write, *words = DAMAGE[damage]
    write(path := Path("bad.safetensors"))
    cli(PROMPT, *QUICK, "--model", "flux.2-tiny", "--transformer", path).says(
        "bad.safetensors", *words
    )


def test_sound_copy_of_the_weights_makes_the_same_picture_and_is_named_in_it(cli):
    tensors(lambda s: None)(Path("copy.safetensors"))
    (ours,) = cli(PROMPT, *QUICK, "--seed", 2).pictures
    (copy,) = cli(
        PROMPT, *QUICK, "--seed", 2, "--transformer", "copy.safetensors", "--check-weights"
    ).pictures
    assert (
        pixels(ours) == pixels(copy)
        and images.read_metadata(copy)["transformer"] == "copy.safetensors"
    )
    (again,) = cli("--remake", copy, "--transformer", "copy.safetensors").pictures
    assert pixels(again) == pixels(ours)


def test_nan_in_the_weights_is_told_and_makes_no_picture(cli):
    tensors(lambda s: s[LAST].view(-1)[5:6].fill_(float("nan")))(Path("nan.safetensors"))
    asked = (
        PROMPT,
        "--width",
        64,
        "--height",
        64,
        "--steps",
        3,
        "--model",
        "flux.2-tiny",
        "--transformer",
        "nan.safetensors",
    )
    cli(*asked, "--check-weights").says("nan.safetensors", "NaN or infinity", f"'{LAST}'")
    cli(*asked).says("not finite after step 1 of 3", "--check-weights", code=1)


def test_nan_in_the_autoencoder_is_told_and_makes_no_picture(cli, tmp_path, monkeypatch):
    home = shutil.copytree(EMBEDDED / SPEC.name, tmp_path / SPEC.name)
    state = load_file(home / "ae.safetensors")
    state["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(state, home / "ae.safetensors")
    monkeypatch.setattr(models, "EMBEDDED", tmp_path)
    cli(PROMPT, *QUICK, "--check-weights").says("ae.safetensors", "'decoder.conv_out.bias'")
    cli(PROMPT, *QUICK).says("the decoded pixels are not finite", code=1)


# ---------------------------------------------------------------------------------------------------------- failures


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\n"),
            ("out of memory", "make the picture smaller"),
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
            ("out of memory",),
        ),
        (MemoryError(), ("out of memory", "make the picture smaller")),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            ("the package 'x' is missing", "pip install"),
        ),
    ],
)
def test_failure_on_the_way_is_told(cli, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(pipeline.Pipeline, "sample", fail)
    cli(PROMPT, *QUICK).says(*words, code=1)


def test_fault_of_ours_keeps_its_traceback(cli, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(pipeline.Pipeline, "sample", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        cli(PROMPT, *QUICK)


def test_full_disk_is_told_and_leaves_nothing(cli, monkeypatch):
    def fail(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    cli(PROMPT, *QUICK).says("outputs/flux.png", "No space left on device", code=1)


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_stops_it_quietly(tmp_path):
    """While it samples: exit code 130, one line, and no part of a file."""
    (here := tmp_path / "here").mkdir()
    endless = [
        sys.executable,
        SCRIPT,
        "a red ring",
        *QUICK[:4],
        "--steps",
        "1000",
        "--num-images",
        "1000",
    ]
    process = subprocess.Popen(
        endless,
        cwd=here,
        env=subprocess_environment(tmp_path),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(
            signal.SIGINT, signal.default_int_handler
        ),  # it may be ignored where tests run
    )
    try:
        header = process.stderr.readline()
        assert "an embedded toy" in header, header
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=60)
    finally:
        process.kill()
    run = Run(process.returncode, out, header + err, here)
    assert run.code == 130 and run.err.endswith(
        "error: stopped; the pictures that were finished are kept\n"
    ), run.err
    assert "Traceback" not in run.err and [here / name for name in run.files] == run.pictures
