"""scripts/app.py: how it starts, and its page in a headless Chromium, on the toy.

The page's own functions are tested without a browser in test_studio.py.
"""

import http.client
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from urllib.parse import quote

import numpy as np
import pytest
from PIL import Image
from support import browser as browsers
from support.browser import Browser, wait_for
from support.load_script import script
from support.sample_run import PROMPT, subprocess_environment

from flux.image_io.output import read_metadata

SCRIPT = Path(__file__).resolve().parents[2] / "scripts" / "app.py"
HOSTILE = f"{PROMPT} <img src=x onerror=\"document.title='broken'\"> </script>"
LACKS = browsers.missing()
if importlib.util.find_spec("gradio") is None:
    LACKS = "needs Gradio (pip install -e '.[app]')"
with_browser = pytest.mark.skipif(LACKS is not None, reason=str(LACKS))


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# ------------------------------------------------------------------------------ the start


@pytest.fixture
def app(monkeypatch, capsys, tmp_path):
    """Run scripts/app.py in this process: arguments -> (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", sys.path.copy())
    monkeypatch.setattr(os, "environ", os.environ.copy())
    module = script("app")

    def run(*arguments):
        monkeypatch.setattr(sys, "argv", ["app.py", *map(str, arguments)])
        try:
            code = module.main()
        except SystemExit as error:
            code = error.code
        return code, *capsys.readouterr()

    return run


def test_without_gradio_one_sentence_names_the_extra(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    code, out, err = app("--port", free_port())
    assert code == 2 and out == ""
    assert err == "error: the package 'gradio' is missing. Run `pip install -e '.[app]'`.\n"


def test_wrong_flags_are_refused_before_gradio_is_imported(app, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        code, _, err = app("--port", port)
        assert code == 2 and err.startswith(f"error: --port: {port} is taken")
    code, _, err = app("--port", 99999)
    assert code == 2 and err.startswith("error: --port: 99999 is taken or not allowed")
    for flag in ("--seed=3", "a cat"):
        code, _, err = app("--port", free_port(), flag)
        assert code == 2 and err.endswith("is chosen in the page. Leave it out.\n")
    code, _, err = app("--port", free_port(), "--lora-folder", "nowhere")
    assert code == 2 and err == "error: --lora-folder: nowhere is not a folder.\n"


# ------------------------------------------------------------------------------ the page


class Server:
    def __init__(self, folder: Path):
        self.folder, self.port = folder, free_port()
        flags = ["--port", str(self.port), "--output", "images", "--device", "cpu"]
        environment = subprocess_environment(folder / "home") | {"TMPDIR": str(folder)}
        self.log = folder / "log.txt"
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [sys.executable, str(SCRIPT), *flags],
                cwd=folder,
                env=environment,
                stdout=log,
                stderr=log,
                # a job in the background ignores SIGINT, and so would its server
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )
        self.url = f"http://127.0.0.1:{self.port}"
        wait_for(lambda: self.url in self.log.read_text(), f"the server ({self.log})", 300)

    @property
    def images(self) -> list[Path]:
        paths = (self.folder / "images").glob("flux*.png")
        return sorted(paths, key=lambda path: path.stat().st_mtime_ns)

    def stop(self) -> int:
        self.process.send_signal(signal.SIGINT)
        return self.process.wait(timeout=120)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    started = Server(tmp_path_factory.mktemp("app"))
    yield started
    if started.process.poll() is None:
        started.process.kill()


@pytest.fixture(scope="module")
def page(server, tmp_path_factory):
    with Browser(tmp_path_factory.mktemp("profile"), free_port()) as browser:
        browser.open(server.url)
        browser.find("#generate")
        browser.resize(1280, 900)
        yield browser


def fill(page: Browser, **values) -> None:
    for name, value in values.items():
        page.type(f"#{name} textarea, #{name} input", str(value))


def ended(page: Browser, state: str = "done") -> str:
    """Wait for the end of a job; return its message."""
    found = "return document.querySelector('#status [data-state]')?.dataset.state"
    running = wait_for(lambda: page.script(found) in ("done", "ended"), "the end of a job", 300)
    assert running and page.script(found) == state, page.text("#status")
    return page.text("#status p")


def generate(page: Browser, state: str = "done") -> str:
    page.script("document.querySelector('#status [data-state]')?.remove()")
    page.click("#generate")
    return ended(page, state)


@pytest.mark.slow
@with_browser
def test_text_becomes_an_image_with_a_record_and_nothing_leaves_the_machine(server, page):
    fill(page, prompt=HOSTILE, width=64, height=64, steps=2, seed=5)
    assert generate(page) == "done: flux.png"
    (image,) = server.images
    record = read_metadata(image)
    assert (record["prompt"], record["seed"], record["width"]) == (HOSTILE, 5, 64)
    wait_for(lambda: page.script("return document.querySelector('#gallery img')?.naturalWidth"))
    for element in ("#result img", "#gallery img"):  # what a browser saves has the record
        source = page.script("return document.querySelector(arguments[0]).src", element)
        assert urllib.request.urlopen(source).read() == image.read_bytes()
    page.click("#gallery img")
    wait_for(
        lambda: (
            HOSTILE
            in page.script("return document.querySelector('#record textarea').value")
            .encode()
            .decode("unicode_escape")
        )
    )
    assert page.script("return document.title") == "flux: flux.2-tiny"
    assert page.script("return document.querySelector('img[src=x]')") is None
    names = page.script("return performance.getEntriesByType('resource').map(e => e.name)")
    assert names and all(name.startswith((server.url, "data:", "blob:")) for name in names)


@pytest.mark.slow
@with_browser
def test_image_is_made_again_and_its_settings_fill_the_form(server, page):
    """After the test before, whose image is chosen."""
    fill(page, prompt="something else", seed=9)
    page.click("#load")
    wait_for(
        lambda: page.script("return document.querySelector('#prompt textarea').value") == HOSTILE
    )
    page.script("document.querySelector('#status [data-state]')?.remove()")
    page.click("#again")
    assert ended(page) == "done: flux-2.png"
    first, again = server.images
    assert first.read_bytes() == again.read_bytes()


@pytest.mark.slow
@with_browser
def test_painted_mask_changes_its_part_alone(server, page, tmp_path):
    path = tmp_path / "white.png"
    Image.new("RGB", (128, 128), "white").save(path)
    page.click("#input-images button")
    page.type("#editor input[type=file]", str(path))
    wait_for(lambda: page.script("return document.querySelectorAll('#editor canvas').length"))
    page.click("#editor button[aria-label='Brush'], #editor button[aria-label='Draw']")
    page.drag("#editor canvas", (0.42, 0.5), (0.5, 0.5))
    fill(page, prompt=PROMPT, seed=1, steps=2, strength=1, width="", height="")
    count = len(server.images)
    generate(page)
    image = server.images[count]
    record = read_metadata(image)
    mask = Image.open(server.folder / record["mask"]["file"])
    white = np.asarray(mask) > 127
    assert mask.size == (128, 128) and 0.001 < white.mean() < 0.5
    pixels = np.asarray(Image.open(image))
    assert (pixels[~white] == 255).all()


@pytest.mark.slow
@with_browser
def test_wrong_values_and_cancel_are_told_in_one_sentence(server, page):
    page.open(server.url)
    page.find("#generate")
    fill(page, prompt=PROMPT, width=100)
    assert re.match(r"Width: must be a multiple of 16", generate(page, "ended"))
    fill(page, width=512, height=512, steps=200)
    page.script("document.querySelector('#status [data-state]')?.remove()")
    page.click("#generate")
    wait_for(lambda: page.text("#status p").endswith("%"), "a step", 300)
    page.click("#cancel")
    assert ended(page, "ended") == "stopped; finished images are kept"


@pytest.mark.slow
@with_browser
def test_closed_page_leaves_the_model_to_others(server, page):
    """Its 50 images of 200 steps would take longer than the next job waits."""
    fill(page, prompt=PROMPT, width=512, height=512, steps=200, images=50)
    page.script("document.querySelector('#status [data-state]')?.remove()")
    page.click("#generate")
    wait_for(lambda: page.text("#status p").endswith("%"), "a step", 300)
    page.open("about:blank")
    page.open(server.url)
    page.find("#generate")
    fill(page, prompt=PROMPT, width=64, height=64, steps=1)
    assert generate(page).startswith("done: flux")


@pytest.mark.slow
@with_browser
def test_files_elsewhere_and_other_hosts_are_refused(server):
    for path in ("/etc/passwd", str(SCRIPT), str(server.log), "../log.txt", ".."):
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(f"{server.url}/gradio_api/file={quote(path)}")
        assert refused.value.code in (403, 404)
    connection = http.client.HTTPConnection("127.0.0.1", server.port)
    connection.request("GET", "/config", headers={"Host": "evil.example"})
    assert connection.getresponse().status == 400
    names = json.load(urllib.request.urlopen(f"{server.url}/gradio_api/info"))
    assert not names["named_endpoints"] and not names["unnamed_endpoints"]


@pytest.mark.slow
@with_browser
def test_page_fits_a_phone_and_a_desk(page):
    for width in (1280, 390):
        page.resize(width, 900)
        assert page.script("return document.documentElement.scrollWidth") <= width


@pytest.mark.slow
@with_browser
def test_ctrl_c_ends_the_server_and_removes_the_uploads(server, page):
    """The last test: page and server are of the whole module."""
    before = len(server.log.read_text())  # Gradio logs an upload that a page leaves
    assert server.stop() == 130
    assert not list(server.folder.glob("flux-app-*"))
    assert "Traceback" not in server.log.read_text()[before:]
