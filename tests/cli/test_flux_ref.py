"""`flux-ref`, `python -m flux`: the scripts under one command, also from an installed package."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest
from support.load_script import script

from flux.errors import install_command

ROOT = Path(__file__).resolve().parents[2]
SCRIPTS = ROOT / "scripts"
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
MAIN = PYPROJECT["project"]["scripts"]["flux-ref"]
SCRIPT_NAMES = sorted(path.stem for path in SCRIPTS.glob("*.py") if path.stem != "command")


def run(*arguments: object, cwd: Path, path: tuple[Path, ...] = (ROOT,)) -> tuple[int, str, str]:
    """Run Python with these folders first in its search path."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(map(str, path)),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    command = [sys.executable, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=environment)
    return done.returncode, done.stdout, done.stderr


def typed(*arguments: str) -> str:
    """Return the code of the console script, with these arguments."""
    module, function = MAIN.split(":")
    given = f"import sys; sys.argv[1:] = {list(arguments)!r}"
    return f"{given}; from {module} import {function}; sys.exit({function}())"


@pytest.fixture
def installed(tmp_path) -> Path:
    """A folder like site-packages, with links to the packages."""
    folder = tmp_path / "site"
    folder.mkdir()
    (folder / "flux").symlink_to(ROOT / "flux")
    (folder / "flux_ref").symlink_to(SCRIPTS)
    return folder


def test_every_script_is_a_command():
    assert sorted({*script("command").COMMANDS} & set(SCRIPT_NAMES)) == SCRIPT_NAMES


def test_commands_are_listed_without_torch(tmp_path):
    (tmp_path / "torch.py").write_text("raise RuntimeError('imported')")
    code, out, err = run("-m", "flux", "--help", cwd=tmp_path)
    assert code == 0 and err == "" and out.startswith("usage: python -m flux COMMAND ...")
    assert all(re.search(rf"^  {name} ", out, re.MULTILINE) for name in SCRIPT_NAMES)
    assert run("-m", "flux", "--version", cwd=tmp_path)[1] == "flux-ref 0.1.0\n"


@pytest.mark.parametrize("name", SCRIPT_NAMES)
def test_help_names_the_typed_command(name, tmp_path):
    """Nobody who installed the package has a file scripts/sample.py to run."""
    code, out, err = run("-m", "flux", name, "--help", cwd=tmp_path)
    assert code == 0 and err == "" and out.startswith(f"usage: python -m flux {name} ")
    assert not re.search(r"scripts/|\w\.py\b", out), out
    if "examples" in out:
        assert f"python -m flux {name} " in out.partition("examples")[2]


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ("", "a command is missing: sample, "),
        ("sampel", "Did you mean sample?"),
        ("train.py", "Did you mean train?"),
        ("a red circle", "Or a prompt? Then `flux-ref sample` comes first."),
        ("--list-models", "a command comes first, such as `flux-ref sample --list-models`"),
    ],
)
def test_unknown_command_is_refused(given, words, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["/usr/bin/flux-ref", *([given] if given else [])])
    with pytest.raises(SystemExit) as stop:
        script("command").main()
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == "" and words in err


def test_errors_and_exit_codes_are_those_of_the_script(tmp_path):
    """The error names the command where that of the script names the file."""
    ours = run("-m", "flux", "sample", "--qqqq", "a cat", cwd=tmp_path)
    theirs = run(SCRIPTS / "sample.py", "--qqqq", "a cat", cwd=tmp_path)
    assert ours[:2] == theirs[:2] == (2, "")
    assert "`sample.py --help`" in theirs[2]
    assert ours[2] == theirs[2].replace("sample.py", "python -m flux sample")


def test_message_names_the_typed_command(monkeypatch):
    from modules.command_line import as_typed, with_flags

    message = "name: unknown. `sample.py --list-models` prints them; my/sample.py is a file."
    monkeypatch.setattr(sys, "argv", ["/clone/scripts/sample.py"])
    assert with_flags(message, {"name": "--model"}) == message.replace("name", "--model")
    monkeypatch.setattr(sys, "argv", ["flux-ref sample"])
    assert "`flux-ref sample --list-models`" in with_flags(message, {})
    assert "my/sample.py is" in with_flags(message, {})
    text = "torchrun --nproc-per-node 8 scripts/train.py images run"
    assert as_typed(text) == "torchrun --nproc-per-node 8 -m flux train images run"


# ------------------------------------------------------------------------------ installed


def test_every_package_is_installed():
    """setuptools cannot look for packages where one lies under another name."""
    packages = {".".join(path.parent.relative_to(ROOT).parts) for path in ROOT.glob("flux/**/*.py")}
    listed = PYPROJECT["tool"]["setuptools"]["packages"]
    commands = {"flux_ref", "flux_ref.modules", "flux_ref.benchmarks"}
    assert set(listed) == packages | commands and len(set(listed)) == len(listed)
    folders = {path.parent.name for path in SCRIPTS.glob("*/__init__.py")}
    assert folders == {"modules", "benchmarks"}


def test_package_that_is_installed_finds_its_commands(installed, tmp_path):
    code, out, _ = run("-c", typed(), cwd=tmp_path, path=(installed,))
    assert code == 2 and out == ""
    code, out, err = run("-m", "flux", "sample", "--help", cwd=tmp_path, path=(installed,))
    assert code == 0 and out.startswith("usage: python -m flux sample ") and err == ""


FOREIGN = '"""Another package."""\n__version__ = "1.4.0"\n'


def test_another_flux_earlier_in_the_path_is_not_imported(installed, tmp_path):
    other = tmp_path / "other/flux"
    other.mkdir(parents=True)
    (other / "__init__.py").write_text(FOREIGN)
    path = (other.parent, installed)
    assert run("-c", "import flux; flux.load", cwd=tmp_path, path=path)[0] == 1
    for command in (("-c", typed("sample", "--help")), (SCRIPTS / "sample.py", "--help")):
        code, out, err = run(*command, cwd=tmp_path, path=path)
        assert code == 0 and "--list-models" in out and err == ""  # has imported ours


@pytest.mark.parametrize("left", [FOREIGN, None], ids=["overwritten", "removed"])
def test_another_flux_in_the_same_folder_is_one_sentence(left, tmp_path):
    """pip writes both into one folder, and removes what both have with the first."""
    site = tmp_path / "site"
    ignored = shutil.ignore_patterns("tiny", "__pycache__", "toy", "examples", "results")
    shutil.copytree(ROOT / "flux", site / "flux", ignore=ignored)
    shutil.copytree(SCRIPTS, site / "flux_ref", ignore=ignored)
    (site / "flux/__init__.py").unlink()
    if left:
        (site / "flux/__init__.py").write_text(left)
    code, out, err = run("-c", typed("sample", "a cat"), cwd=tmp_path, path=(site,))
    assert (code, out) == (1, "") and len(err.splitlines()) == 1
    assert f"(in {site / 'flux'})" in err and "Run `pip uninstall flux`, then install" in err


def test_extras_are_named_as_they_are_installed(monkeypatch, tmp_path):
    assert install_command() == "pip install -e ."
    assert install_command("sign") == "pip install -e '.[sign]'"
    monkeypatch.setattr("flux.errors.__file__", str(tmp_path / "flux/errors.py"))
    assert install_command() == "pip install flux-ref"
    assert install_command("sign") == "pip install 'flux-ref[sign]'"


@pytest.mark.slow
def test_wheel_has_all_that_the_command_needs(tmp_path):
    """Built, unpacked, and run with the toy."""
    source = tmp_path / "source"
    for name in ("flux", "scripts"):
        ignored = shutil.ignore_patterns("__pycache__")
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    options = ("--no-deps", "--no-build-isolation", "--quiet", "--wheel-dir", tmp_path)
    code, _, err = run("-m", "pip", "wheel", *options, source, cwd=tmp_path, path=())
    assert code == 0, err
    (wheel,) = tmp_path.glob("flux_ref-*.whl")
    ZipFile(wheel).extractall(site := tmp_path / "site")
    names = {path.relative_to(site).as_posix() for path in site.rglob("*") if path.is_file()}
    assert {f"flux_ref/{name}.py" for name in SCRIPT_NAMES} <= names
    assert "flux_ref/benchmarks/counts.json" in names
    assert not {name for name in names if name.startswith(("scripts", "tests"))}
    (entry,) = site.glob("*.dist-info/entry_points.txt")
    assert entry.read_text().split("\n")[:2] == ["[console_scripts]", f"flux-ref = {MAIN}"]
    quick = ("--steps", "1", "--width", "64", "--height", "64", "--output", "a.png")
    code, out, err = run("-c", typed("sample", "a red circle", *quick), cwd=tmp_path, path=(site,))
    assert code == 0 and out == "a.png\n" and "embedded toy" in err, err
