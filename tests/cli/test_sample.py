"""scripts/sample.py on the embedded model: what it writes, and how it fails on the way.

Run in this process but for the few tests that need one of their own. Nothing depends on what the
model paints. Exit codes: 0 for an image, 2 for a mistake of the user, 1 for a failure, 130 for
Ctrl-C. What is refused before a model runs: test_sample_flags.py.
"""

import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from support.sample_run import PROMPT, QUICK, SCRIPT, SPEC, TOY, Run, pixels, subprocess_environment

from flux import loading
from flux.configs import EMBEDDED, MODELS
from flux.image_io.output import read_metadata
from flux.parity.reference import FLUX1_TINY, randomise
from flux.pipeline import Pipeline
from flux.text_encoder import FLUX2TextEncoder
from flux.transformer import Flux
from flux.weights import locate

pytestmark = pytest.mark.slow


def run_script(arguments, home: Path, **options) -> subprocess.CompletedProcess:
    """Run the script in a process of its own."""
    command = [sys.executable, SCRIPT, *arguments]
    environment = subprocess_environment(home) | options.pop("env", {})
    return subprocess.run(command, env=environment, capture_output=True, **options)


# ------------------------------------------------------------------------------ images


def test_process_prints_the_path_and_writes_image_and_metadata(tmp_path):
    (here := tmp_path / "here").mkdir()
    done = run_script([PROMPT, *QUICK, "--seed", "7"], tmp_path, cwd=here, text=True)
    run = Run(done.returncode, done.stdout, done.stderr, here)
    assert run.code == 0 and run.files == ["outputs/flux.png"], run.err
    (path,) = run.images
    summary = "flux.2-tiny, an embedded toy: 64x64, 1 steps, guidance 1.5, on cpu in float32"
    assert path == here / "outputs/flux.png" and summary in run.err
    assert f"seed 7: {PROMPT}" in run.err
    with Image.open(path) as image:
        assert image.size == (64, 64) and image.mode == "RGB"
    metadata = read_metadata(path)
    expected = dict(model="flux.2-tiny", prompt=PROMPT, negative_prompt=None, width=64, height=64)
    expected |= dict(steps=1, guidance=1.5, true_cfg_scale=None, seed=7, numerics="exact")
    expected |= dict(dtype="float32", decode_dtype=None, device="cpu", transformer=None)
    expected |= dict(licence="Apache-2.0")
    assert expected.items() <= metadata.items()
    assert "toy" in metadata["note"] and "not what FLUX can do" in metadata["note"]
    assert metadata["software"].startswith("flux ") and torch.__version__ in metadata["software"]


def test_metadata_are_left_out_on_request(cli):
    run = cli("a violet heptagon", *QUICK, "--no-metadata", "--save-latents", "--output", "a.png")
    assert run.code == 0, run.err
    for name in ("a.png", "a.safetensors"):
        content = (run.folder / name).read_bytes()
        assert not any(part in content for part in (b"violet", b"Steps", b"steps", b"seed"))
    assert b"digitalsourcetype/trainedAlgorithmicMedia" in (run.folder / "a.png").read_bytes()
    again = cli("--from-image", "a.png")
    assert again.code == 2 and "they were left out" in again.err
    carried = cli("a violet heptagon", *QUICK, "--seed", 7, "--output", "b.png")
    with Image.open(*carried.images) as image:
        assert image.info["parameters"].startswith("a violet heptagon\nSteps: 1, Sampler: Euler, ")


def test_quiet_run_prints_the_path_alone(cli):
    run = cli("a red dragon", *QUICK, "--quiet")
    assert run.code == 0 and run.err == "" and run.out == "outputs/flux.png\n"
    cli(PROMPT, "--quiet", "--width", 100).fails_with("--width: must be a multiple of 16")


def test_syntax_of_other_programs_is_noted_once(cli):
    run = cli(
        "(a red:1.3) star", "a <lora:x:1> (blue:1.2) ring", *QUICK, "--negative-prompt", "(x:1)"
    )
    assert run.code == 0 and len(run.images) == 2
    assert run.err.count("weights such as (word:1.3) have no meaning here") == 1
    assert run.err.count("<lora:...> loads no LoRA; --lora does") == 1


def test_defaults_come_from_the_model(cli):
    run = cli(PROMPT)
    metadata = read_metadata(*run.images)
    size_and_steps = metadata["width"], metadata["height"], metadata["steps"]
    assert run.code == 0 and size_and_steps == (SPEC.size, SPEC.size, SPEC.steps)
    seed = metadata["seed"]  # random, and printed
    assert 0 <= seed < 2**32 and f"seed {seed}: " in run.err


def test_each_image_is_the_one_of_its_own_seed_and_none_is_overwritten(cli):
    both = cli(PROMPT, *QUICK, "--seed", 5, "--num-images", 2)
    alone = cli(PROMPT, *QUICK, "--seed", 6)
    assert both.code == alone.code == 0
    paths = both.images + alone.images
    assert [path.name for path in paths] == ["flux.png", "flux-2.png", "flux-3.png"]
    first, second, again = map(pixels, paths)
    assert first != second == again
    assert [read_metadata(path)["seed"] for path in both.images] == [5, 6]


def test_features_of_many_prompts_are_never_all_in_memory(cli, monkeypatch):
    """The bound is that of the cache: here three prompts and the negative one."""
    prompts = [f"a red circle {number}" for number in range(8)]
    Path("prompts.txt").write_text("\n".join(prompts))
    flags = ("--guidance", 2, "--negative-prompt", "black", "--seed", 1, "--num-images", 2)
    whole = cli("--prompt-file", "prompts.txt", *QUICK, *flags, "--output", "whole.png")
    assert "memory: " not in whole.err
    encoded, alive, most = [], [], [0]
    encode_one = FLUX2TextEncoder.encode_one

    def record(self, prompt):
        features = encode_one(self, prompt)
        encoded.append(prompt)
        alive.append(weakref.ref(features.tokens))
        most[0] = max(most[0], sum(tokens() is not None for tokens in alive))
        return features

    monkeypatch.setattr(FLUX2TextEncoder, "encode_one", record)
    size = loading.load(device="cpu").feature_bytes
    monkeypatch.setattr("flux.text_encoder.MAX_CACHE", 4 * size + 7)
    run = cli("--prompt-file", "prompts.txt", *QUICK, *flags, "--output", "few.png")
    line = f"memory: the features of 3 prompts at a time, {3 * size / 1e9:.2g} GB"
    assert run.code == 0 and line in run.err
    assert encoded == [*prompts[:3], "black", *prompts[3:]]  # each once
    assert most[0] == 5  # the bound, and the one that takes another's place
    assert list(map(pixels, run.images)) == list(map(pixels, whole.images))
    assert [read_metadata(path)["seed"] for path in run.images] == [*range(1, 17)]


def test_number_of_images_needs_no_memory(cli, monkeypatch, sample_script):
    made = []

    def generate_files(args, pipe, batch, *_):
        made.extend(metadata["seed"] for metadata in batch)
        if len(made) == 3:
            raise KeyboardInterrupt

    monkeypatch.setattr(sample_script, "generate_files", generate_files)
    run = cli(PROMPT, *QUICK, "--num-images", 10**9, "--seed", 7)
    assert run.code == 130 and made == [7, 8, 9]


def test_prompts_come_from_all_sources_in_order(cli):
    Path("prompts.txt").write_text("\ufeffa red ring\n\n  a blue star \r\n", encoding="utf-8")
    sources = ("a green cross", "--prompt", "a pink circle", "--prompt-file", "prompts.txt")
    run = cli(*sources, *QUICK, "--seed", 1)
    prompts = ["a green cross", "a pink circle", "a red ring", "a blue star"]
    assert run.code == 0 and [read_metadata(path)["prompt"] for path in run.images] == prompts


def test_image_is_made_again_from_its_metadata(cli):
    """With all options different from the defaults; a typed flag wins, even with its default."""
    flags = "--width 80 --height 64 --steps 2 --guidance 3.5 --negative-prompt black"
    flags += " --dtype bfloat16 --decode-dtype float32 --numerics bfl --output a.webp"
    first = cli('a näive ]]> "red" ring', *flags.split())
    (path,) = first.images
    (again,) = cli("--from-image", path, "--output", "a.webp").images
    assert first.code == 0 and again.name == "a-2.webp"
    assert pixels(path) == pixels(again) and read_metadata(path) == read_metadata(again)
    assert read_metadata(path)["threads"] == torch.get_num_threads()
    typed = ("--seed", 4, "--numerics", "exact", "--negative-prompt", "exact")
    (other,) = cli("--from-image", path, *typed, "--output", "a.webp").images
    changed = {"seed": 4, "numerics": "exact", "negative_prompt": "exact"}
    assert read_metadata(other) == read_metadata(path) | changed and pixels(other) != pixels(path)


def test_note_names_another_environment_of_the_image(cli, monkeypatch):
    """The number of threads decides in which order numbers are added."""
    made = cli(PROMPT, *QUICK, "--output", "a.png")
    assert "was made with" not in cli("--from-image", *made.images).err
    threads = torch.get_num_threads()
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads + 1)
    run = cli("--from-image", *made.images)
    expected = f"a.png was made with threads {threads}, now {threads + 1}: some pixels may differ"
    assert run.code == 0 and expected in run.err
    assert read_metadata(*run.images)["threads"] == threads + 1


def test_latents_are_written_next_to_the_image_and_overwrite_nothing(cli):
    Path("a.safetensors").write_text("mine")
    run = cli(PROMPT, *QUICK, "--seed", 3, "--output", "a.png", "--save-latents")
    files = ["a-2.png", "a-2.safetensors", "a.safetensors"]  # one name for both
    assert run.code == 0 and run.files == files
    assert Path("a.safetensors").read_text() == "mine" and "a-2.safetensors" in run.err
    with safe_open("a-2.safetensors", "pt") as file:
        latents, metadata = file.get_tensor("latents"), file.metadata()["flux"]
    (image,) = loading.load(device="cpu").decode(latents)
    assert latents.shape == (1, SPEC.transformer.in_channels, 4, 4) and PROMPT in metadata
    assert image.tobytes() == pixels(Path("a-2.png"))


def test_words_unknown_to_the_toy_are_noted_once(cli):
    run = cli("a red dragon above a dragon", *QUICK)
    assert run.code == 0 and run.err.count("note: ") == 1
    assert "'dragon'" in run.err and "--model" in run.err and "circle" in run.err


def test_prompt_beyond_the_limit_is_truncated_and_noted_once(cli):
    prompt = "a red circle " + " ".join(f"and ring number {k}" for k in range(40))
    run = cli(prompt, *QUICK)
    (lost,) = re.findall(r"note: the prompt is longer.*?'(.*?)(?:\.\.\.)?'", run.err)
    assert run.code == 0 and lost.strip() in prompt and len(lost) > 50
    assert read_metadata(*run.images)["prompt"] == prompt


def test_warning_that_two_checks_raise_is_noted_once(cli, monkeypatch):
    """The script checks the steps before it loads the model, and the pipeline checks them again."""
    monkeypatch.setitem(MODELS, SPEC.name, replace(SPEC, distilled="it was distilled"))
    run = cli(PROMPT, *QUICK)
    assert run.code == 0 and run.err.count("note: ") == 1
    assert f"note: flux.2-tiny was distilled for {SPEC.steps} steps, not 1\n" in run.err


def test_image_is_made_with_standard_streams_closed(tmp_path):
    script = shlex.join(map(str, [sys.executable, SCRIPT, PROMPT, *QUICK, "--output", "a.png"]))
    options = dict(shell=True, cwd=tmp_path, env=subprocess_environment(tmp_path), timeout=120)
    subprocess.run(f"{script} <&- 2>&- | true", capture_output=True, **options)
    assert [path.name for path in tmp_path.glob("*.png")] == ["a.png"]


def test_closed_pipe_is_no_error_of_list_models(tmp_path):
    command = f"{shlex.quote(sys.executable)} {SCRIPT} --list-models | true"
    options = dict(shell=True, env=subprocess_environment(tmp_path), timeout=120)
    run = subprocess.run(command, capture_output=True, text=True, **options)
    assert run.stderr == ""


def test_file_name_that_is_not_text_is_printed(tmp_path):
    """In a locale that refuses it."""
    name = os.fsencode(tmp_path) + b"/\xff.png"
    strict = {"PYTHONIOENCODING": "ascii:strict"}
    run = run_script([PROMPT, *QUICK, "--output", name], tmp_path, env=strict)
    assert run.returncode == 0 and b"Traceback" not in run.stderr and os.path.exists(name)


# ------------------------------------------------------------------------------ weights


def test_environment_names_the_folder_of_the_weights(tmp_path):
    """huggingface_hub reads its settings from the environment of a process."""
    (here := tmp_path / "here").mkdir()
    arguments = [PROMPT, "--model", "FLUX.1-dev"]
    done = run_script(arguments, tmp_path / "home", cwd=here, text=True)
    run = Run(done.returncode, done.stdout, done.stderr, here)
    run.fails_with("black-forest-labs/FLUX.1-dev", "HF_HUB_OFFLINE is set")


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Write the embedded transformer with a change."""

    def write(path: Path) -> None:
        state = load_file(TOY)
        change(state)
        save_file(state, path)

    return write


def copy(name: str) -> Callable[[Path], object]:
    return lambda path: shutil.copy(EMBEDDED / SPEC.name / name, path)


LAST = "final_layer.linear.weight"
NORM = "single_blocks.1.norm.query_norm.scale"
DAMAGE = {  # one of each class; all faults of a file: tests/weights
    "truncated": (lambda path: path.write_bytes(TOY.read_bytes()[:-100]), "is truncated"),
    "web page": (lambda path: path.write_text("<!DOCTYPE html>\n<html>"), "a web page"),
    "missing": (tensors(lambda s: s.pop(NORM)), "1 missing", f"'{NORM}'"),
    "other family": (
        lambda path: save_file(randomise(Flux(FLUX1_TINY)).state_dict(), path),
        "transformer",
        "--model",
    ),
    "autoencoder": (copy("ae.safetensors"), "looks like an autoencoder"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damaged_weights_are_refused(cli, damage):
    write, *words = DAMAGE[damage]
    write(path := Path("bad.safetensors"))
    cli(PROMPT, *QUICK, "--model", "flux.2-tiny", "--transformer", path).fails_with(
        "bad.safetensors", *words
    )


def test_copy_of_the_weights_makes_the_same_image_and_is_named_in_it(cli):
    tensors(lambda s: None)(Path("copy.safetensors"))
    (ours,) = cli(PROMPT, *QUICK, "--seed", 2).images
    (copy,) = cli(
        PROMPT, *QUICK, "--seed", 2, "--transformer", "copy.safetensors", "--check-finite"
    ).images
    assert pixels(ours) == pixels(copy) and read_metadata(copy)["transformer"] == "copy.safetensors"
    (again,) = cli("--from-image", copy, "--transformer", "copy.safetensors").images
    assert pixels(again) == pixels(ours)


def test_nan_in_the_transformer_is_an_error_and_makes_no_image(cli):
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
    cli(*asked, "--check-finite").fails_with("nan.safetensors", "NaN or infinity", f"'{LAST}'")
    cli(*asked).fails_with("not finite after step 1 of 3", code=1)


def test_nan_in_the_autoencoder_is_an_error_and_makes_no_image(cli, tmp_path, monkeypatch):
    home = shutil.copytree(EMBEDDED / SPEC.name, tmp_path / SPEC.name)
    state = load_file(home / "ae.safetensors")
    state["decoder.conv_out.bias"].fill_(float("nan"))
    save_file(state, home / "ae.safetensors")
    monkeypatch.setattr(locate, "EMBEDDED", tmp_path)
    cli(PROMPT, *QUICK, "--check-finite").fails_with("ae.safetensors", "'decoder.conv_out.bias'")
    cli(PROMPT, *QUICK).fails_with("not finite after decoding", code=1)


# ------------------------------------------------------------------------------ failures


@pytest.mark.parametrize(
    "error, words",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB.\n"),
            ("out of memory", "Make the image smaller"),
        ),
        (
            RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: 99 bytes"),
            ("out of memory",),
        ),
        (MemoryError(), ("out of memory", "Make the image smaller")),
        (
            ModuleNotFoundError("No module named 'x'", name="x"),
            ("the package 'x' is missing", "pip install"),
        ),
    ],
)
def test_failure_on_the_way_is_one_line(cli, monkeypatch, error, words):
    def fail(*_, **__):
        raise error

    monkeypatch.setattr(Pipeline, "sample", fail)
    cli(PROMPT, *QUICK).fails_with(*words, code=1)


def test_bug_keeps_its_traceback(cli, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(Pipeline, "sample", fail)
    with pytest.raises(RuntimeError, match="shapes"):
        cli(PROMPT, *QUICK)


def test_full_disk_is_an_error_and_leaves_nothing(cli, monkeypatch):
    def fail(self, file, **options):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Image.Image, "save", fail)
    cli(PROMPT, *QUICK).fails_with("outputs/flux.png", "No space left on device", code=1)


@pytest.mark.skipif(os.name == "nt", reason="sends a POSIX signal")
def test_ctrl_c_stops_with_one_line(tmp_path):
    """While the model samples: exit code 130, one line, and no part of a file."""
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
    assert run.code == 130 and run.err.endswith("error: stopped; finished images are kept\n"), (
        run.err
    )
    assert "Traceback" not in run.err and [here / name for name in run.files] == run.images
