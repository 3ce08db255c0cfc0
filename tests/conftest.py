"""Fixtures of several test modules. Puts the folders of tests/ on sys.path."""

import sys
from pathlib import Path

import pytest
import torch

TESTS = Path(__file__).parent
sys.path[:0] = [str(folder) for folder in (TESTS, *TESTS.glob("*/")) if folder.is_dir()]


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def parity(monkeypatch, capsys, tmp_path):
    """Run scripts/parity.py in this process, in an empty folder: arguments -> (exit code, stdout, stderr)."""
    from support.load_script import script

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    module = script("parity")

    def run(*arguments) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["parity.py", *map(str, arguments)])
        try:
            code = module.main()
        except SystemExit as error:  # argparse's
            code = error.code
        return code, *capsys.readouterr()

    return run


@pytest.fixture
def server(monkeypatch):
    """A chat server without a proxy or a key in the environment."""
    from support.chat_server import chat_server

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server() as state:
        yield state
