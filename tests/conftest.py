"""Fixtures of several test modules."""

import os
import sys
import warnings

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # the workers share the cores: one thread each
    os.environ["OMP_NUM_THREADS"] = "1"

import torch


def pytest_addoption(parser) -> None:
    group = parser.getgroup("fuzz", "damaged inputs (tests/fuzz)")
    group.addoption("--fuzz-seed", type=int, default=0, help="draws the damage (default: 0)")
    group.addoption(
        "--fuzz-cases",
        type=case_numbers,
        metavar="COUNT|FIRST:STOP",
        help="cases of each kind of input in the fast run (default: 40 to 300, by their speed)",
    )


def case_numbers(text: str) -> range:
    """Parse "100" or "17:18"."""
    return range(*map(int, text.split(":")))


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def parity(monkeypatch, capsys, tmp_path):
    """Run scripts/parity.py in an empty folder: arguments -> (exit code, stdout, stderr)."""
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


@pytest.fixture(scope="module")
def sample_script():
    """scripts/sample.py as a module."""
    from support.load_script import script

    return script("sample")


@pytest.fixture
def no_weights_here(tmp_path, monkeypatch):
    """An empty cache and no network for huggingface_hub, which read its settings when imported."""
    import huggingface_hub.constants

    monkeypatch.delenv("FLUX_WEIGHTS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def cli(sample_script, no_weights_here, tmp_path, monkeypatch, capsys):
    """Run scripts/sample.py in this process, on the CPU, in an empty folder: arguments -> Run."""
    from support.sample_run import SCRIPT, Run, files_in

    folder = tmp_path / "here"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)

    def call(*arguments) -> Run:
        monkeypatch.setattr(sys, "argv", [str(SCRIPT), *map(str, arguments)])
        before = tuple(files_in(folder))
        with warnings.catch_warnings():  # restores showwarning, too
            warnings.simplefilter("default")
            try:
                code = sample_script.main()
            except SystemExit as stop:  # argparse
                code = stop.code
            finally:
                torch.set_flush_denormal(False)
        return Run(code, *capsys.readouterr(), folder, before)

    return call


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    """Tiny random models under the released names."""
    from support.model_zoo import TINY_REDUX, TINY_SIGLIP, Zoo

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("FLUX_WEIGHTS", raising=False)
        patch.setattr("flux.loading.SigLIPConfig", lambda: TINY_SIGLIP)
        patch.setattr("flux.loading.ReduxConfig", lambda: TINY_REDUX)
        yield Zoo(tmp_path_factory.mktemp("zoo"), patch)


@pytest.fixture(scope="module")
def small_kontext_sizes():
    """Let Kontext prefer sizes that a test can generate."""
    from support.model_zoo import SMALL_KONTEXT_SIZES

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flux.image_io.input.KONTEXT_SIZES", SMALL_KONTEXT_SIZES)
        yield


@pytest.fixture
def server(monkeypatch):
    """A chat server without a proxy or a key in the environment."""
    from support.chat_server import chat_server

    monkeypatch.setenv("no_proxy", "*")
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)
    with chat_server() as state:
        yield state
