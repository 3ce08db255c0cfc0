"""What holds for every script: help at once, nothing written unasked, failures in one sentence."""

import ast
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPTS = Path(__file__).resolve().parents[2] / "scripts"
EXAMPLES = sorted(set(SCRIPTS.glob("examples/*.py")) - {SCRIPTS / "examples/example.py"})
FILES = EXAMPLES + [
    path
    for path in sorted(SCRIPTS.rglob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]
NAMES = [path.relative_to(SCRIPTS).as_posix() for path in FILES]
every_script = pytest.mark.parametrize("script", FILES, ids=NAMES)
# Python starts in 20 ms; torch takes a second and more
WITHOUT = """
import runpy, sys
class Missing:
    def find_spec(self, name, *rest):
        if name.partition(".")[0] in {barred}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Missing())
sys.argv = {argv}
sys.path[0] = {folder!r}
runpy.run_path(sys.argv[0], run_name="__main__")
"""


def run_without(barred: tuple[str, ...], script: Path, *arguments: object, cwd: Path):
    argv = [str(script), *map(str, arguments)]
    code = WITHOUT.format(barred=set(barred), argv=argv, folder=str(script.parent))
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=cwd, env=environment
    )


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    stats = {path: path.stat() for path in folder.rglob("*") if path.is_file()}
    return {str(path): (stat.st_size, stat.st_mtime_ns) for path, stat in stats.items()}


def test_scripts_are_found():
    assert {"sample.py", "train.py", "dev/golden.py", "toy/score.py"} <= set(NAMES)


def test_modules_lie_in_folders_of_modules():
    """`example.py` is the one module beside scripts: an example should read as one file of two."""
    beside = [
        path for folder in ("", "dev", "toy") for path in SCRIPTS.joinpath(folder).glob("*.py")
    ]
    assert set(beside) <= set(FILES)
    modules = sorted(SCRIPTS.glob("modules/*.py"))
    assert modules and not set(modules) & set(FILES)


@every_script
def test_help_needs_no_torch_and_writes_nothing(script, tmp_path):
    """Torch is what takes long: without it, help is there in a fraction of a second."""
    goldens = [SCRIPTS.parent / "tests" / name for name in ("golden", "golden_bfl", "manifests")]
    before = [tree(folder) for folder in goldens]
    done = run_without(
        ("torch", "transformers", "diffusers", "numpy"), script, "--help", cwd=tmp_path
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert done.stdout.startswith("usage: ") and "--help" in done.stdout
    assert list(tmp_path.iterdir()) == []
    assert [tree(folder) for folder in goldens] == before


@every_script
@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="needs a device that is always full")
def test_full_disk_under_the_help_is_one_sentence(script, tmp_path):
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [sys.executable, script, "--help"], stdout=full, stderr=subprocess.PIPE, text=True
        )
    if script.name == "run_bfl.py":  # has no module of the project, whose name BFL's code has
        return
    message = "error: standard output: No space left on device\n"
    assert (done.returncode, done.stderr) == (1, message)


TOY = SCRIPTS.parent / "flux/toy/tiny/flux.2-tiny/flux-2-tiny.safetensors"
WRITERS = {  # other scripts' full disks are in their own tests
    "convert.py": (TOY, "written.safetensors", "--to", "int8"),
    "examples/attention_map.py": ("--steps", 1, "--output", "written"),
    "toy/draw.py": ("written", "--images", 2),
}


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no limit on the size of files")
@pytest.mark.parametrize("name", WRITERS)
def test_full_disk_under_a_file_is_one_sentence(name, tmp_path):
    """A limit on the size of files raises the same kind of error as a full disk."""
    import resource

    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *map(str, WRITERS[name])],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=os.environ | {"PYTHONDONTWRITEBYTECODE": "1"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000)),
    )
    assert done.returncode == 1
    assert re.fullmatch(r"error: written\S*: File too large\n", done.stderr), done.stderr
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@every_script
def test_wrong_flag_is_refused(script, tmp_path):
    done = run_without(("torch",), script, "--no-such-flag", cwd=tmp_path)
    assert done.returncode == 2 and done.stdout == "", done.stdout
    assert "Traceback" not in done.stderr and "error: " in done.stderr.splitlines()[-1]
    if script.name != "run_bfl.py":  # has no module of the project, whose name BFL's code has
        assert re.fullmatch("error: .*\n", done.stderr), done.stderr
    assert list(tmp_path.iterdir()) == []


MINIMAL = {  # arguments with which a script would begin to work
    "certificate.py": ("signing",),
    "command.py": ("train", "images", "run"),
    "convert.py": ("in.safetensors", "out.safetensors", "--to", "int8"),
    "parity.py": ("capture", "a cat", "--output", "a.safetensors"),
    "sample.py": ("a cat",),
    "train.py": ("images", "run"),
    "verify.py": ("a.png",),
    "dev/golden.py": ("--output", "golden"),
    "dev/golden_bfl.py": ("kit.safetensors", "--output", "golden"),
    "dev/golden_bfl_code.py": ("a", "b", "c", "--output", "golden"),
    "dev/manifest.py": ("--markdown",),
    "dev/run_bfl.py": ("clone", "in.safetensors", "out.safetensors"),
    "toy/draw.py": ("drawn",),
    "toy/train.py": ("run",),
}


@every_script
def test_missing_torch_is_one_sentence(script, tmp_path):
    name = script.relative_to(SCRIPTS).as_posix()
    done = run_without(("torch",), script, *MINIMAL.get(name, ()), cwd=tmp_path)
    if name == "toy/draw.py":  # needs no torch
        return
    lines = done.stderr.splitlines()
    if "arguments are required" in lines[0] and name not in MINIMAL:
        pytest.skip("needs arguments: add them to MINIMAL")
    assert done.returncode in (1, 2) and len(lines) == 1, done.stderr
    assert re.match(r"error: the package 'torch' is missing\. Run `pip install -e \.`", lines[0])
    assert list(tmp_path.iterdir()) == []


@every_script
def test_script_has_a_docstring_and_a_parser(script):
    source = script.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source))
    assert "Parser(" in source or "import parser" in source or "= parse(__doc__" in source


@pytest.mark.slow
@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT for other processes")
@pytest.mark.parametrize("name", ["dev/golden.py", "toy/score.py", "bench.py", "command.py"])
def test_ctrl_c_while_packages_load_is_one_sentence(name, tmp_path):
    """The signal comes from torch's first import, so that no time decides."""
    (tmp_path / "torch.py").write_text("import os, signal\nos.kill(os.getpid(), signal.SIGINT)\n")
    environment = os.environ | {"PYTHONPATH": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, SCRIPTS / name, *MINIMAL.get(name, ())],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
        # a shell lets its background jobs, and what they start, ignore the signal
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert done.returncode in (130, 128 + signal.SIGINT)
    assert len(done.stderr.splitlines()) == 1 and "stopped" in done.stderr, done.stderr


def test_goldens_are_not_overwritten_unasked(tmp_path):
    """Each of the three writers refuses before it computes anything."""
    from support.load_script import script

    (tmp_path / "clip.safetensors").write_bytes(b"precious")
    golden = script("dev/golden")
    with pytest.raises(golden.UserError, match=r"clip\.safetensors exists\. .* --overwrite"):
        golden.check_files(tmp_path, overwrite=False, other_versions=False)
    stored = SCRIPTS.parent / "tests/golden"
    versions = dict(golden.VERSIONS)
    try:
        golden.VERSIONS["torch"] = "0.1"
        with pytest.raises(golden.UserError, match="Install the same versions"):
            golden.check_files(stored, overwrite=True, other_versions=False)
        golden.check_files(stored, overwrite=True, other_versions=True)
    finally:
        golden.VERSIONS.update(versions)
