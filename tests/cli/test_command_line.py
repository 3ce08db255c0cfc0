"""What all scripts print: foreign text escaped; one sentence for a full standard output."""

import ast
import json
import os
import subprocess
import sys

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from support.chat_server import chat_reply
from support.load_script import SCRIPTS, script
from support.sample_run import QUICK, SCRIPT, subprocess_environment

from flux.image_io import output

HOSTILE = "\x1b]0;pwned\x07 \u202egnp\u202c\nerror: the disk is full\r\u200b\x9b2J"
SHOWN = r"\x1b]0;pwned\x07 \u202egnp\u202c\nerror: the disk is full\r\u200b\x9b2J"
HOSTILE_FLAG = "--pwned\x1b[2J\n\u202e"


def escaped(text: str) -> bool:
    """Return whether `text` quotes HOSTILE, and has nothing of it that steers a terminal."""
    assert not {"\x1b", "\x07", "\u202e", "\u202c", "\r", "\u200b", "\x9b"} & set(text), text
    assert not any(line.startswith("error: the disk is full") for line in text.splitlines())
    assert "Traceback" not in text
    return "pwned" in text


# examples show the library's functions, and print numbers of their own alone
PRINTING = [path for path in sorted(SCRIPTS.rglob("*.py")) if "examples" not in path.parts]


@pytest.mark.parametrize("path", PRINTING, ids=lambda path: str(path.relative_to(SCRIPTS)))
def test_scripts_print_through_show_and_say(path):
    """Another way to the terminal would not escape file names, prompts and tensor names."""
    barred = ("print", "pprint", "tqdm.write", "bar.write", "traceback.print_exc")
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            assert name not in barred, node.lineno
            assert not name.endswith((".stdout.write", ".stderr.write")), node.lineno
            # a process that runs BFL's `flux` cannot import the project's
            of_bfl = path.name == "run_bfl.py"
            assert of_bfl or name != "argparse.ArgumentParser", node.lineno
        if isinstance(node, ast.Assign):  # a library's warnings
            shown = "warnings.showwarning" in map(ast.unparse, node.targets)
            assert not shown or path.name in ("command_line.py", "train.py"), node.lineno


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


@pytest.mark.parametrize(
    "name, arguments",
    [
        ("sample", [HOSTILE_FLAG]),
        ("sample", ["--seed", HOSTILE]),
        ("sample", ["x", "--model", HOSTILE]),
        ("sample", ["x", "--model", "flux.1-dev", "--weights", HOSTILE]),
        ("sample", ["x", "--transformer", HOSTILE]),
        ("sample", ["x", "--lora", HOSTILE]),
        ("sample", ["x", "--image", HOSTILE]),
        ("sample", ["x", "--output", HOSTILE]),
        ("sample", ["--prompt-file", HOSTILE]),
        ("sample", ["--from-image", HOSTILE]),
        ("sample", ["x", "--upsample", HOSTILE, "--upsample-model", "m"]),
        ("bench", [HOSTILE_FLAG]),
        ("bench", ["--model", HOSTILE]),
        ("bench", ["--device", HOSTILE]),
        ("bench", ["--json", HOSTILE]),
        slow("toy/score", [HOSTILE_FLAG]),
        slow("toy/score", ["--model", HOSTILE]),
        ("toy/draw", ["folder", HOSTILE_FLAG]),
        ("toy/draw", [HOSTILE]),
        slow("toy/train", ["run", HOSTILE_FLAG]),
        slow("toy/train", [HOSTILE, "--device", HOSTILE, "--autoencoder", HOSTILE]),
        ("parity", ["compare", HOSTILE_FLAG, "a"]),
        ("parity", ["compare", HOSTILE, HOSTILE]),
        ("parity", ["capture", HOSTILE, "--model", HOSTILE, "--output", "a.safetensors"]),
        ("parity", ["report", HOSTILE, HOSTILE, "--output", HOSTILE]),
        ("train", [HOSTILE, HOSTILE]),
        ("train", [".", "run", HOSTILE_FLAG]),
        ("dev/manifest", [HOSTILE_FLAG]),
        ("dev/manifest", ["--check", HOSTILE]),
        ("dev/manifest", [HOSTILE]),
        ("dev/fullsize", [HOSTILE_FLAG]),
        ("dev/fullsize", ["--model", HOSTILE]),
    ],
)
def test_hostile_arguments_are_shown_escaped(
    name, arguments, no_weights_here, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "excepthook", sys.excepthook)
    if name == "toy/draw":
        (tmp_path / HOSTILE).write_text("not a folder")
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        code = script(name).main()
    except SystemExit as error:
        code = error.code
    out, err = capsys.readouterr()
    assert code in (1, 2) and out == ""
    assert escaped(err) and "error: " in err


@pytest.mark.slow
def test_prompts_file_names_and_answers_are_shown_escaped(cli, server, tmp_path):
    run = cli("a red circle " + HOSTILE, *QUICK, "--output", f"{HOSTILE}.png", "--save-latents")
    assert run.code == 0 and escaped(run.err) and escaped(run.out)
    assert run.out == SHOWN + ".png\n" and f": a red circle {SHOWN}\n" in run.err
    assert (run.folder / f"{HOSTILE}.png").exists()
    server.reply = 401, {}, json.dumps({"error": {"message": HOSTILE}}).encode()
    refused = cli("x", "--upsample", server.url, "--upsample-model", "m")
    assert refused.code == 2 and escaped(refused.err)
    server.reply = 200, {}, chat_reply("a circle " + HOSTILE)
    expanded = cli("x", *QUICK, "--upsample", server.url, "--upsample-model", "m")
    assert expanded.code == 0 and escaped(expanded.err)


@pytest.mark.slow
def test_metadata_of_a_foreign_image_is_shown_escaped(cli):
    made = cli("a red circle", *QUICK, "--output", "a.png")
    metadata = output.read_metadata(made.folder / "a.png")
    image = Image.open(made.folder / "a.png")
    output.save(image, made.folder / "b.png", metadata | {"prompt": HOSTILE})
    again = cli("--from-image", "b.png", "--output", "c.png")
    assert again.code == 0 and escaped(again.err)
    for number, name in enumerate(("transformer", "dtype", "model", "quantize", "numerics")):
        path = output.save(image, made.folder / f"{number}.png", metadata | {name: HOSTILE})
        refused = cli("--from-image", path.name, "--output", "d.png")
        assert refused.code == 2 and escaped(refused.err)


def test_tensor_names_are_shown_escaped(cli, tmp_path, monkeypatch, capsys):
    save_file({HOSTILE: torch.zeros(1)}, tmp_path / "a.safetensors")
    for flag in ("--transformer", "--autoencoder", "--lora"):
        refused = cli("x", flag, tmp_path / "a.safetensors")
        assert refused.code == 2
        escaped(refused.err)
    monkeypatch.setattr(sys, "argv", ["manifest.py", str(tmp_path / "a.safetensors")])
    assert script("dev/manifest").main() == 0
    assert escaped(capsys.readouterr().out)


@pytest.mark.slow
def test_undecodable_file_name_is_shown_escaped(cli):
    run = cli("a red circle", *QUICK, "--output", os.fsdecode(b"\xff\x1b.png"))
    assert run.code == 0 and run.out == "\\udcff\\x1b.png\n"


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, arguments, flag",
    [
        ("bench", ["--rounds", "4611686018427387904"], "--rounds"),
        ("toy/score", ["--prompts", "1000000000000"], "--prompts"),
        ("toy/score", ["--edits", "9223372036854775808"], "--edits"),
        ("toy/draw", ["folder", "--images", "1000000000000"], "--images"),
        ("dev/fullsize", ["--lora-rank", "4611686018427387904"], "--lora-rank"),
    ],
)
def test_absurd_numbers_are_refused(name, arguments, flag, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
    try:
        code = script(name).main()
    except SystemExit as error:
        code = error.code
    assert code == 2 and f"error: {flag}: must be from 1 to" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ standard files


def run_script(arguments, tmp_path, shell: str) -> subprocess.CompletedProcess:
    """Run sample.py in a shell with redirections."""
    command = f'"$0" "$@" {shell}'
    return subprocess.run(
        ["sh", "-c", command, sys.executable, str(SCRIPT), *arguments],
        cwd=tmp_path,
        env=subprocess_environment(tmp_path),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


@pytest.mark.slow
@pytest.mark.parametrize(
    "arguments, shell, code, error",
    [
        (["--list-models"], ">/dev/full", 1, "standard output: No space left on device"),
        (["--help"], ">/dev/full", 1, "standard output: No space left on device"),
        (["--list-models"], ">&-", 0, ""),
        (["--prompt-file", "-"], "<&-", 2, "--prompt-file: - needs a standard input. Name a file."),
        (["--nonsense"], "2>/dev/full", 2, ""),
        (["--model", "nonsense", "x"], "2>/dev/full", 2, ""),
        (["--model", "nonsense", "x"], "2>&-", 2, ""),
    ],
)
def test_full_and_closed_standard_files(tmp_path, arguments, shell, code, error):
    done = run_script(arguments, tmp_path, shell)
    assert done.returncode == code
    assert done.stderr == (f"error: {error}\n" if error else "")


@pytest.mark.parametrize("command", [("golden-kit",), ("capture", "a red circle")])
def test_name_that_is_too_long_is_a_wrong_argument(command, parity):
    output = "a" * 300 + (".safetensors" if command[0] == "capture" else "")
    code, out, err = parity(*command, "--width", 64, "--height", 64, "--output", output)
    assert (code, out) == (2, "") and "File name too long" in err.splitlines()[-1]


@pytest.mark.slow
def test_image_is_kept_if_standard_output_is_full(tmp_path):
    done = run_script(["x", *QUICK, "--output", "a.png"], tmp_path, ">/dev/full")
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1] == "error: standard output: No space left on device"
    assert output.read_metadata(tmp_path / "a.png")["prompt"] == "x"
    assert os.listdir(tmp_path) == ["a.png"]


NEW = ("--output", "new/deep/a.safetensors")


@pytest.mark.parametrize(
    "command",
    [
        ("capture", "a red circle", "--width", 65, *NEW),
        ("capture", "a red circle", "--model", "nonsense", *NEW),
        ("capture", "a red circle", "--only", "nothing", *NEW),
        ("capture", "a red circle", "--max-vram", 1e-6, *NEW),
        ("golden-kit", "--seed", -1, "--output", "new/deep/kit"),
        ("report", "a.safetensors", "b.safetensors", "--output", "new/a.html", "--png", "new/png"),
        ("compare", "a.safetensors", "b.safetensors", "--json", "new/deep/a.json"),
    ],
    ids=lambda command: " ".join(map(str, command[:4])),
)
def test_refused_run_of_parity_leaves_no_folder(command, parity, tmp_path):
    code, out, err = parity(*command)
    assert code == 2 and out == "" and "error: " in err.splitlines()[-1], err
    assert list(tmp_path.iterdir()) == []


def test_refused_run_of_sample_leaves_no_folder_of_its_own(cli):
    (cli("x", "--width", 65).folder / "kept").mkdir()
    for folder in ("new/deep", "kept/deep"):
        run = cli("x", "--filter", "nsfw", "--output", f"{folder}/a.png")
        run.fails_with("--filter-weights: ")
    assert [path.name for path in run.folder.rglob("*")] == ["kept"]
