"""scripts/convert.py: its output, its exit codes, and its help without torch."""

import subprocess
import sys

import pytest
from support.load_script import SCRIPTS, script

from flux.configs import EMBEDDED
from flux.weights.convert import FORMATS, LAYOUTS

convert = script("convert")
TINY = EMBEDDED / "flux.1-tiny" / "flux1-tiny.safetensors"


def test_error_of_the_new_file_is_printed(tmp_path, capsys):
    out = tmp_path / "out.safetensors"
    assert convert.main([str(TINY), str(out), "--to", "int8"]) == 0
    size, count, error = capsys.readouterr().out.splitlines()
    assert size == f"{out}: {out.stat().st_size / 1e9:.3f} GB, layout bfl"
    assert count == "32 matrices in int8_tensorwise"
    assert error.startswith(f"error against {TINY}, relative L2: 0.00")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--to", "fp8", "--layout", "diffusers"], "error: --layout: fp8 is published in"),
        (["--to", "fp8"], "exists already. Delete it, or choose another name."),
    ],
)
def test_mistake_is_one_sentence_and_exit_code_2(tmp_path, capsys, flags, message):
    out = tmp_path / "out.safetensors"
    out.write_bytes(b"kept")
    assert convert.main([str(TINY), str(out), *flags]) == 2
    assert message in capsys.readouterr().err and out.read_bytes() == b"kept"


def test_flags_offer_what_the_library_has():
    actions = convert.parser()._option_string_actions
    assert actions["--to"].choices == FORMATS
    assert actions["--layout"].choices == LAYOUTS


def test_help_does_not_import_torch():
    code = (
        "import sys, runpy; sys.argv = ['convert.py', '--help']\n"
        "try: runpy.run_path(sys.path.pop(), run_name='__main__')\n"
        "except SystemExit as end: sys.exit(end.code or int('torch' in sys.modules))"
    )
    command = [
        sys.executable,
        "-c",
        f"import sys; sys.path.append({str(SCRIPTS / 'convert.py')!r})\n{code}",
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0 and "--layout" in done.stdout
