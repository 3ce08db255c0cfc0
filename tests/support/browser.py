"""A headless Chromium, driven over the W3C WebDriver protocol of its chromedriver.

https://www.w3.org/TR/webdriver2/ has the commands.
"""

import base64
import json
import shutil
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's key of an element's id
SELECT_ALL, DELETE = "\ue009a\ue000", "\ue017"  # the protocol's codes of Ctrl+A and Delete
SWITCHES = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --hide-scrollbars "
    "--disable-background-networking --disable-component-update --disable-sync "
    "--enable-unsafe-swiftshader --disable-dev-shm-usage"
).split()


def missing() -> str | None:
    """Return what a test with a browser lacks on this machine; None if nothing."""
    programs = [name for name in ("chromium", "chromedriver") if shutil.which(name) is None]
    if programs:
        return f"needs {' and '.join(programs)} (Debian: chromium, chromium-driver)"
    return None


class Browser:
    """One window, which reaches this machine alone; a context manager. `folder`: of its profile."""

    def __init__(self, folder: Path, port: int, width: int = 1280, height: int = 900):
        self.root = f"http://127.0.0.1:{port}"
        self.driver = subprocess.Popen(
            ["chromedriver", f"--port={port}"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        rules = "--host-resolver-rules=MAP * ~NOTFOUND , EXCLUDE 127.0.0.1"
        window = f"--window-size={width},{height}"
        profile = f"--user-data-dir={folder}"
        options = {"args": [*SWITCHES, rules, window, profile], "binary": shutil.which("chromium")}
        capabilities = {"alwaysMatch": {"goog:chromeOptions": options}}
        try:
            wait_for(lambda: self._call("GET", "/status").get("ready"))
            made = self._call("POST", "/session", {"capabilities": capabilities})
        except BaseException:
            self.driver.terminate()
            raise
        self.session = f"/session/{made['sessionId']}"

    def _call(self, method: str, path: str, body: dict | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.root + path, data, method=method)
        try:
            with urllib.request.urlopen(request, timeout=180) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            value = json.load(error)["value"]
            raise RuntimeError(f"{value['error']}: {value['message']}") from None

    def __enter__(self) -> "Browser":
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("DELETE", self.session)
        finally:
            self.driver.terminate()
            self.driver.wait()

    def post(self, path: str, **body: Any) -> Any:
        return self._call("POST", self.session + path, body)

    def open(self, url: str) -> None:
        self.post("/url", url=url)

    def script(self, text: str, *arguments: Any) -> Any:
        """Run JavaScript, the body of a function, and return its value."""
        return self.post("/execute/sync", script=text, args=list(arguments))

    def find(self, css: str) -> str:
        """Wait for an element, and return its id."""
        return wait_for(lambda: self._find(css), css)

    def _find(self, css: str) -> str | None:
        found = self.post("/elements", using="css selector", value=css)
        return found[0][ELEMENT] if found else None

    def click(self, css: str) -> None:
        self.script("arguments[0].scrollIntoView({block: 'center'})", {ELEMENT: self.find(css)})
        self.post(f"/element/{self.find(css)}/click")

    def type(self, css: str, text: str) -> None:
        """Type text, or the paths of files to upload, into an element in place of its text."""
        element = self.find(css)
        kind = self.script("return arguments[0].type", {ELEMENT: element})
        if kind != "file":  # the protocol's `clear` tells the page nothing
            text = SELECT_ALL + (text or DELETE)
        self.post(f"/element/{element}/value", text=text)

    def drag(self, css: str, start: tuple[float, float], end: tuple[float, float]) -> None:
        """Press the mouse inside of an element, move it and release it; shares of its sides."""
        corner = (
            "const r = arguments[0].getBoundingClientRect(); return [r.x, r.y, r.width, r.height]"
        )
        x, y, width, height = self.script(corner, {ELEMENT: self.find(css)})
        places = [
            dict(type="pointerMove", x=round(x + a * width), y=round(y + b * height), duration=200)
            for a, b in (start, ((start[0] + end[0]) / 2, (start[1] + end[1]) / 2), end)
        ]
        press = [dict(type="pointerDown", button=0)]
        moves = [places[0], *press, *places[1:], dict(type="pointerUp", button=0)]
        self.post("/actions", actions=[dict(type="pointer", id="mouse", actions=moves)])

    def text(self, css: str) -> str:
        return self.script("return document.querySelector(arguments[0])?.innerText ?? ''", css)

    def resize(self, width: int, height: int) -> None:
        """Set the size of the page in CSS pixels, also narrower than a window can be."""
        size = dict(width=width, height=height, deviceScaleFactor=1, mobile=False)
        command = "Emulation.setDeviceMetricsOverride"
        self.post("/goog/cdp/execute", cmd=command, params=size)

    def screenshot(self, path: Path) -> None:
        """Write the whole page as a PNG, below the window's edge too."""
        width = self.script("return innerWidth")
        height = self.script("return document.documentElement.scrollHeight")
        clip = dict(x=0, y=0, width=width, height=height, scale=1)
        params = dict(captureBeyondViewport=True, clip=clip)
        shot = self.post("/goog/cdp/execute", cmd="Page.captureScreenshot", params=params)
        path.write_bytes(base64.b64decode(shot["data"]))


def wait_for(found: Callable[[], Any], what: str = "", seconds: float = 120) -> Any:
    """Call `found` until it returns something true, and return that."""
    end, error = time.monotonic() + seconds, None
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except (OSError, RuntimeError) as caught:
            error = caught
        time.sleep(0.1)
    raise AssertionError(f"waited {seconds:.0f} s in vain for {what or found}: {error}")
