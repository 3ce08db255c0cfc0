"""scripts/sample.py before a model runs: flags, older flag names, prompts, errors of one line.

What the library refuses is tested at the library. Here: an error reaches the user in one line, in
the words of the command line, with exit code 2, before anything is loaded or written.
"""

import io
import json
import os
import re
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
from modules import command_line
from modules.command_line import with_flags
from PIL import Image
from support.sample_run import PROMPT, QUICK

from flux.configs import MODELS
from flux.errors import UserError
from flux.image_io import output


@pytest.fixture
def flags(sample_script):
    return sample_script.flags_of(sample_script.parser())


# ------------------------------------------------------------------------------ flags


def test_older_flag_names_set_the_same_arguments(sample_script):
    parse = sample_script.parser().parse_args
    values = {"--remake": "a.png", "--expand": "1,2,3,4", "--cfg-scale": "2", "--tile": "512"}
    values |= {"--vram": "8", "--name": "dev", "--image-path": "a.png"}
    values |= {"--num-images-per-prompt": "2"}
    values |= {old: "7" for old in sample_script.ALIASES if re.search("steps|scale", old)}
    for old, new in sample_script.ALIASES.items():
        value = [values[old]] if old in values else []
        assert parse([old, *value]) == parse([new, *value]) != parse([])
        assert parse([old.replace("-", "_").replace("__", "--", 1), *value]) == parse([new, *value])
    for old, new in (("stages", "model"), ("stream", "block")):
        assert parse(["--offload", old]).offload == parse(["--offload", new]).offload == new
    assert parse(["--negative_prompt=a_b", "--", "--num_images"]) == parse(
        ["--negative-prompt=a_b", "--", "--num_images"]
    )


def test_unknown_flag_is_one_line_that_names_the_likeliest(sample_script, capsys):
    """Of other programs, misspelled, cut off, and like nothing."""
    known = sample_script.parser()._option_string_actions
    assert not known.keys() & sample_script.OTHERS
    for fix in sample_script.OTHERS.values():
        assert [name for name in re.findall(r"--[a-z0-9-]+", fix) if name not in known] == []
    given = sample_script.OTHERS | {"--list-modles": "--list-models", "--neg": "--negative-prompt"}
    for flag, fix in (given | {"--img_cond_path": "--image", "--xyzzy": None}).items():
        with pytest.raises(SystemExit) as stop:
            sample_script.parser().parse_args(["a cat", flag, "1"])
        (line,) = capsys.readouterr().err.splitlines()
        meant = f" Did you mean {fix}?" if fix else ""
        told = f"error: {flag}: there is no such flag.{meant} `"
        assert stop.value.code == 2 and line.startswith(told), line


def test_help_lists_new_flag_names_only(sample_script):
    text = sample_script.parser().format_help()
    assert all(new in text for new in sample_script.ALIASES.values())
    assert not [old for old in sample_script.ALIASES if f"{old} " in text or f"{old}]" in text]


@pytest.mark.parametrize(
    "message, expected",
    [
        ("width: wrong. Leave `height` out.", "--width: wrong. Leave --height out."),
        ("mask_threshold: wrong", "--mask-threshold: wrong"),
        ("images: two", "--image: two"),
        ("name: unknown", "--model: unknown"),
        ("image_weights: two", "--image-weight: two"),
        ("composite=False: no effect", "--no-composite: no effect"),
        ("x with `kv_cache=True`, `kv_cache=False`", "x with --kv-cache, --no-kv-cache"),
        ("no. Use `guidance=3`.", "no. Use --guidance 3."),
        ('or pass `offload="block"`', "or pass --offload block"),
        ("Decode in `dtype=torch.float32`.", "Decode in --dtype float32."),
        ("a.png: is `new`, see `pip install -e '.[control]'`", None),
    ],
)
def test_message_names_flags(flags, message, expected):
    assert with_flags(message, flags) == (expected or message)


def test_values_are_parsed_as_a_number_a_line_or_one_per_step(sample_script):
    assert sample_script.values("4") == 4.0
    assert sample_script.values("4:1") == [4.0, 1.0]
    assert sample_script.values("4,3.5,1") == (4.0, 3.5, 1.0)
    assert sample_script.margins("1,2,3,4") == (1, 2, 3, 4)
    assert sample_script.lora("a:b.safetensors:-0.5") == (Path("a:b.safetensors"), -0.5)
    assert sample_script.lora("a:b.safetensors") == (Path("a:b.safetensors"), 1.0)


@pytest.mark.parametrize(
    "flags",
    [
        *("--width wide", "--seed 1.5", "--dtype float16", "--decode-dtype int8", "--wid 64"),
        *("--outpaint 1,2,3", "--outpaint 1.5,0,0,0", "--strength half", "--reference-limit x"),
        *("--guidance 1:2:3", "--guidance 4:x", "--match-image-size 1.5", "--image-weight a"),
        "--offload disk",
    ],
)
def test_argparse_refuses_what_it_cannot_parse(cli, flags):
    run = cli(PROMPT, *flags.split())
    assert run.code == 2 and flags.split()[0] in run.err.splitlines()[-1]
    assert "Traceback" not in run.err and not run.files


# ------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    "arguments, words",
    [
        ("--width 100", ("--width: must be a multiple of 16", "(got 100)")),
        ("--num-images 0", ("--num-images: there is nothing",)),
        ("--seed -1", ("--seed: must be",)),
        ("--guidance 1 --negative-prompt x", ("--negative-prompt: ", "Use --guidance 3")),
        ("--model flux.1-dev --negative-prompt x", ("--negative-prompt: ", "--true-cfg-scale 3")),
        (
            "--model flux.1-dev --true-cfg-scale 3,2,1 --steps 4",
            ("--true-cfg-scale: has 3 values",),
        ),
        ("--guidance 4,1 --steps 8", ("--guidance: has 2 values for 8 steps",)),
        ("--model flux.3-dev", ("--model", "flux.3-dev", "Did you mean", "flux.2-dev")),
        ("--model flux.1-dev --weights none", ("none", "--weights", "is not a folder")),
        ("--device abacus", ("--device", "abacus", "cpu")),
        ("--device cpu:7", ("--device: cpu:7 is not available. Choose from cpu.",)),
        ("--max-vram -1", ("--max-vram: must be",)),
        ("--strength 0.5", ("--strength: needs an image. Pass one in --image.",)),
        ("--no-kv-cache", ("--kv-cache: needs an image",)),
        ("--model flux.1-redux-dev", ("--image: flux.1-redux-dev needs an image",)),
        ("--image a.png --no-composite", ("--no-composite: has no effect", "--mask")),
        ("--image a.png --image-weight 1", ("--image-weight: not supported by flux.2-tiny",)),
        ("--image a.png --save-control c.png", ("--save-control: flux.2-tiny takes no control",)),
        ("--model flux.1-canny-dev --image a.png --save-control c.x", ("--save-control: c.x",)),
        ("--save-control c.png", ("--save-control: flux.2-tiny takes no control image",)),
        ("--output a.bmp", ("--output: a.bmp",)),
        ("--from-image a.png", ("--from-image: the image brings its own prompt",)),
        ("--lora none.safetensors", ("none.safetensors", "does not exist")),
        ("--upsample local", ("--upsample: local needs", "flux.2-tiny", "URL")),
        ("--upsample http://127.0.0.1", ("--upsample: a URL needs --upsample-model",)),
        ("--upsample-model m", ("--upsample: a URL needs --upsample-model",)),
        ("--list-models --weights none", ("none", "--weights", "is not a folder")),
    ],
)
def test_refusal_is_one_line_in_flags_and_writes_nothing(cli, arguments, words):
    output.save(Image.new("RGB", (64, 64)), Path("a.png"), {})
    run = cli(PROMPT, *arguments.split())
    run.fails_with(*words)
    assert run.err.count("\n") == 1, run.err


def test_images_without_a_prompt_are_refused_except_by_redux(cli):
    Image.new("RGB", (64, 64)).save("a.png")
    run = cli("--image", "a.png")
    run.fails_with("--prompt: flux.2-tiny needs one")
    run = cli("--image", "a.png", "--model", "flux.1-redux-dev")
    run.fails_with("black-forest-labs/FLUX.1-", ".safetensors")  # goes on to look for the weights


# ------------------------------------------------------------------------------ prompts


@pytest.mark.parametrize(
    "arguments, words",
    [
        ((), ("--prompt: is missing", "--prompt-file", "--from-image")),
        (("",), ("--prompt: is empty",)),
        ((" \n ",), ("--prompt: is empty",)),
        ((PROMPT, "--prompt", ""), ("--prompt: is empty",)),
        (("a \0 cat",), ("--prompt: 'a \\x00 cat'", "not UTF-8 text")),
        (("a \udcff cat",), ("--prompt:", "not UTF-8 text")),  # a byte that is not UTF-8
        (("a cat", "--negative-prompt", "\udcff"), ("--prompt:", "not UTF-8 text")),
        (("x" * 70_000, "--output", "a.jpg"), ("--output: the prompt is too long", ".png")),
        (("--prompt-file", "none"), ("--prompt-file: none cannot be read", "No such file")),
        (("--prompt-file", "."), ("--prompt-file: . cannot be read",)),
    ],
)
def test_wrong_prompt_is_refused(cli, arguments, words):
    cli(*arguments, *QUICK).fails_with(*words)


def test_prompt_file_without_utf8_prompts_is_refused(cli):
    empty = "--prompt-file: prompts.txt has no prompt. Write one a line."
    other = "--prompt-file: prompts.txt is not UTF-8 text. Save it as UTF-8, one prompt a line."
    contents = {b"": empty, b" \n\t\r\n": empty, b"\xef\xbb\xbf": empty}
    contents |= {bytes(range(256)): other, "naïve".encode("latin-1"): other}
    contents |= {"a cat".encode(encoding): other for encoding in ("utf-16", "utf-16-le")}
    for content, words in contents.items():
        Path("prompts.txt").write_bytes(content)
        cli("--prompt-file", "prompts.txt", *QUICK).fails_with(words)


def test_prompts_are_split_at_newlines_only(sample_script, tmp_path, monkeypatch):
    path = tmp_path / "prompts.txt"
    path.write_bytes("\ufeffa red\x0bstar\u2028\x0c\r\n  a blue ring\ra star \n\n".encode())
    prompts = sample_script.Prompts(["typed"], sample_script.read_prompts(path))
    assert list(prompts) == ["typed", "a red\x0bstar", "a blue ring", "a star"] == list(prompts)
    assert len(prompts) == 4
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("a näive ring".encode())))
    assert sample_script.read_prompts(Path("-")) == "a näive ring".encode()


def test_pipe_of_prompts_is_read_only_if_it_is_open(sample_script, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(UserError, match="pipe is a pipe, which may never end. Pass it as -."):
        sample_script.read_prompts(tmp_path / "pipe")
    reading, writing = os.pipe()
    os.write(writing, b"a cat\n")
    os.close(writing)
    assert sample_script.read_prompts(Path(f"/dev/fd/{reading}")).split() == [b"a", b"cat"]
    os.close(reading)


def test_endless_prompt_file_is_refused(cli):
    cli("--prompt-file", "/dev/zero", *QUICK).fails_with("--prompt-file: /dev/zero has more than")


def test_million_prompts_take_the_memory_of_their_bytes(sample_script, tmp_path):
    (tmp_path / "prompts.txt").write_bytes(b"a cat\n" * 10**6)
    tracemalloc.start()
    prompts = sample_script.Prompts([], sample_script.read_prompts(tmp_path / "prompts.txt"))
    assert len(prompts) == 10**6
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < 1.5 * 6 * 10**6 + sample_script.MAX_PROMPT_FILE  # read() asks for the limit


@pytest.mark.parametrize(
    "count, words",
    [
        (0, "--num-images: there is nothing to generate"),
        (-5, "--num-images: there is nothing to generate"),
        (10**9 + 1, "--num-images: all prompts together have too many images"),
        (10**12, "--num-images: all prompts together have too many images"),
        (2**63, "--num-images: all prompts together have too many images"),
    ],
)
def test_absurd_number_of_images_is_refused(cli, count, words):
    cli("a cat", *QUICK, "--num-images", count).fails_with(words)


# ------------------------------------------------------------------------------ models


@pytest.mark.parametrize("columns", [80, 120, None], ids=["80", "120", "no terminal"])
def test_list_of_models_has_a_line_for_every_model(cli, columns, monkeypatch):
    monkeypatch.delenv("COLUMNS", raising=False)
    if columns:
        monkeypatch.setenv("COLUMNS", str(columns))
    run = cli("--list-models")
    assert run.code == 0 and not run.files
    assert max(map(len, run.out.splitlines())) <= (columns or 120)
    joined = re.sub(r"^(\S{20,})\n +", r"\1 ", run.out, flags=re.MULTILINE)  # long names
    lines = {line.split()[0]: line for line in joined.splitlines()[1 : len(MODELS) + 1]}
    assert lines.keys() == MODELS.keys()
    modes = "start|reference|control|fill|redux"
    here = {name for name, line in lines.items() if re.search(rf" -  ({modes}) ", line)}
    assert here == {"flux.1-tiny", "flux.2-tiny"}
    assert lines["flux.2-klein-base-4b"].split()[1:6] == "50 4 (x2) 1024 14.1".split()
    assert lines["flux.1-dev"].split()[1:7] == "50 3.5 1024 33.7 33.9 start".split()
    assert lines["flux.3-image-klein-base-comfy-int8-convrot"].split()[1] == "50"
    for name, spec in MODELS.items():  # files of which not all is known are marked
        assert lines[name].endswith(" *") == bool(spec.unconfirmed)
        assert spec.licence.name in lines[name] or columns == 80


def test_list_of_one_model_names_each_missing_file(cli, tmp_path):
    """A shard that is missing beside its index is named alone."""
    home = tmp_path / "weights/FLUX.1-dev"
    for name in ("ae.safetensors", "tokenizer/vocab.json", "text_encoder_2/a-2.safetensors"):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        (home / name).write_bytes(bytes(3_000_000))
    shards = {"x": "a-1.safetensors", "y": "a-2.safetensors"}
    index = home / "text_encoder_2/model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": shards}))
    run = cli("--list-models", "FLUX.1-dev", "--weights", tmp_path / "weights")
    lines = [" ".join(line.split()) for line in run.out.splitlines()]
    assert run.code == 0 and lines[0] == "flux.1-dev"
    assert {
        "sampling 50 steps, guidance 3.5, 1024x1024",
        "transformer 11.9 B parameters, bfloat16",
        "memory 33.7 GB of weights, 23.8 GB at a time",
        "missing 23.8 GB flux1-dev.safetensors",
        "here 0.003 GB ae.safetensors",
        "missing 9.5 GB text_encoder_2/a-1.safetensors",
        "missing 0.25 GB text_encoder/model.safetensors",
        "here 0.003 GB tokenizer/vocab.json",
        "missing tokenizer/merges.txt",
        "missing tokenizer_2/spiece.model",
    } <= set(lines)
    missing = ("flux1-dev.safetensors", "text_encoder_2/a-1.safetensors", "tokenizer/merges.txt")
    cli(PROMPT, "--model", "flux.1-dev", "--weights", tmp_path / "weights").fails_with(
        "--weights: ", "lack 5 files of flux.1-dev: ", *missing
    )
    assert "a-2.safetensors" not in run.out and max(map(len, run.out.splitlines())) <= 80


def test_second_mask_is_refused(cli):
    """The last one would win in silence, and one might expect both."""
    run = cli(PROMPT, "--image", "a.png", "--mask", "a.png", "--mask", "b.png")
    assert run.code == 2 and run.out == "" and not run.files
    assert "error: --mask: is given twice. Join both into one file." in run.err


def test_list_of_models_takes_a_part_of_a_name_and_other_names(cli):
    named = {
        "flux.2-klein-4b": ["flux.2-klein-4b"],
        "black-forest-labs/FLUX.1-dev": ["flux.1-dev"],
        "flux-dev-krea": ["flux.1-krea-dev"],  # BFL's command line
        "tiny": ["flux.1-tiny", "flux.2-tiny"],
        "klein-fp8r": ["flux.3-image-klein-fp8r"],
    }
    for text, expected in named.items():
        lines = cli("--list-models", text).out.splitlines()
        assert [line for line in lines if line[0] != " "] == expected
    unconfirmed = MODELS["flux.3-image-klein-fp8r"].unconfirmed
    assert unconfirmed in " ".join(" ".join(lines).split())
    wrong = cli("--list-models", "flux-dve")
    wrong.fails_with("--list-models: there is no such model", "flux.1-dev")


def test_real_model_without_weights_is_refused_and_not_replaced_by_the_toy(cli, tmp_path):
    (empty := tmp_path / "empty").mkdir()
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    for name, spec in MODELS.items():
        if spec.embedded:
            continue
        request = [PROMPT, "--model", name]
        if spec.image_mode in ("fill", "control", "redux"):
            request += ["--image", tmp_path / "a.png"]
        if spec.image_mode == "fill":
            request += ["--outpaint", "16,0,0,0"]
        url = f"https://huggingface.co/{spec.repository}"
        known = (spec.repository, ".safetensors", url, spec.licence.name, "--weights", str(empty))
        cli(*request, "--weights", empty).fails_with(*known)
        offline = (spec.repository, ".safetensors", "HF_HUB_OFFLINE is set", "--weights")
        cli(*request).fails_with(*offline)


# ------------------------------------------------------------------------------ several processes


def test_processes_that_fit_no_division_are_refused(cli):
    cli(PROMPT, "--parallel", "context=2").fails_with("--parallel: context=2 needs 2", "(got 1)")
    cli(PROMPT, "--parallel", "tokens=2").fails_with("--parallel: ", "context=4,cfg=2", "tokens=2")


def test_images_of_a_batch_have_seeds_that_count_up(sample_script):
    """And prompts as long: FLUX 3 samples others apart."""
    pipe = SimpleNamespace(text=SimpleNamespace(padded_length=lambda prompts: len(prompts[0])))
    jobs = [{"seed": seed, "prompt": "cat"} for seed in (7, 8, 9, 12, 13)]  # a prompt was refused
    jobs += [{"seed": seed, "prompt": "a cat"} for seed in (14, 15)]
    for size, expected in (
        (2, [[7, 8], [9], [12, 13], [14, 15]]),
        (4, [[7, 8, 9], [12, 13], [14, 15]]),
        (1, [[7], [8], [9], [12], [13], [14], [15]]),
    ):
        made = list(sample_script.batches(iter(jobs), size, pipe))
        assert [[metadata["seed"] for metadata in batch] for batch in made] == expected


def test_several_processes_do_not_share_standard_input(cli, monkeypatch):
    monkeypatch.setattr(command_line, "speaker", command_line.speaker)
    for name, value in {"RANK": "0", "WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    cli("--prompt-file", "-").fails_with("--prompt-file: - is read by one process alone")
