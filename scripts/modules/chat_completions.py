"""Ask a server of OpenAI's chat completions for a text."""

import base64
import io
import ipaddress
import json
import os
import re
from collections.abc import Mapping, Sequence
from http.client import HTTPException
from threading import Thread
from typing import Any
from urllib.parse import quote, urlsplit
from urllib.request import HTTPErrorProcessor, ProxyHandler, Request, build_opener

from PIL import Image

from flux.errors import UserError

MAX_RESPONSE = 2**22  # bytes
SECRET_LENGTH = 8  # characters of a key that protects something
CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # characters that are removed
THOUGHT = re.compile(r"<think>.*?</think>", re.DOTALL)
UNKNOWN_SETTING = (400, 422)  # what servers answer to a setting that they do not know


def complete(
    messages: Sequence[Mapping[str, Any]],
    url: str,
    model: str,
    settings: Mapping[str, Any],
    key: str | None = None,
    extensions: Mapping[str, Any] | None = None,
    whole: bool = False,
    timeout: float = 120,
    total_timeout: float = 600,
) -> str:
    """Return the text that the server at `url` answers, without control characters and thoughts.

    `url`: such as https://api.openai.com or http://localhost:8080/v1; `/v1` is added if the path
    has no version, and `/chat/completions` always. `key`: $OPENAI_API_KEY if None; over http it is
    sent to this machine only, and never through a proxy. It is in one header and nowhere else.
    `extensions`: settings that OpenAI's protocol lacks; a server that refuses them is asked again
    without them. `whole`: raise UserError for an answer that the limit of tokens cut off.
    `timeout`: seconds without a byte; `total_timeout`: until the whole answer. UserError for every
    failure.
    """
    key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
    address, more = _address(url, key), dict(extensions or {})
    request = {"model": model, "messages": list(messages), **settings}
    status, response = _post(address, key, request | more, timeout, total_timeout)
    if more and status in UNKNOWN_SETTING:
        status, response = _post(address, key, request, timeout, total_timeout)
    if status != 200:
        raise _error(address, f"answered {status}: {_server_message(response)}", key)
    if len(response) > MAX_RESPONSE:
        raise _error(address, f"answered more than {MAX_RESPONSE:,} bytes", key)
    try:
        choice = json.loads(response)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, RecursionError):
        problem = "answered something that is not JSON: is this a chat model's address?"
        raise _error(address, problem, key) from None
    except (LookupError, TypeError):
        problem = f"answered without choices: {_server_message(response)}"
        raise _error(address, problem, key) from None
    if whole and choice.get("finish_reason") == "length":
        problem = "answered too much: its text was cut off. Ask for less, or try another model"
        raise _error(address, problem, key)
    text = printable(THOUGHT.sub("", text)) if isinstance(text, str) else ""
    if len(key) >= SECRET_LENGTH:  # shorter ones, as local servers take, are parts of words
        text = _without_key(text, key)
    if not text:
        problem = "answered without text: try another prompt or model, or do not upsample"
        raise _error(address, problem, key)
    return text


class KeepResponse(HTTPErrorProcessor):
    """Raise for no status, and follow no redirect, which would take the key elsewhere."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def _post(
    address: str, key: str, body: dict, timeout: float, total_timeout: float
) -> tuple[int, bytes]:
    """Return the status and the body of the answer.

    A thread waits for the server: the timeout of a socket begins again with each byte, and so does
    not bound the time of an answer.
    """
    results: list[tuple[int, bytes] | BaseException] = []

    def post() -> None:
        try:
            results.append(_post_and_wait(address, key, body, timeout))
        except BaseException as error:
            results.append(error)

    thread = Thread(target=post, daemon=True)  # the process may end while a server still sends
    thread.start()
    thread.join(total_timeout)
    if not results:
        raise _error(address, f"did not finish its answer in {total_timeout:g} seconds", key)
    if isinstance(results[0], BaseException):
        raise results[0]
    return results[0]


def _post_and_wait(address: str, key: str, body: dict, timeout: float) -> tuple[int, bytes]:
    # Some servers refuse urllib's own User-Agent.
    headers = {"Content-Type": "application/json", "User-Agent": "flux"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = Request(address, json.dumps(body).encode(), headers)
        no_proxy = [ProxyHandler({})] if _is_local(urlsplit(address).hostname) else []
        with build_opener(KeepResponse, *no_proxy).open(request, timeout=timeout) as response:
            status, redirect = response.status, response.headers.get("Location")
            content = response.read(MAX_RESPONSE + 1)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        problem = f"cannot be reached ({reason})"
        if isinstance(reason, TimeoutError):
            problem = f"sent nothing for {timeout:g} seconds"
        raise _error(address, problem, key) from None
    if redirect:
        raise _error(address, f"redirects to {redirect}: use that address", key)
    return status, content


def _address(url: str, key: str) -> str:
    """Return where to post to. UserError if the url is not plain or the key cannot be sent."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # either may raise
    except ValueError:
        host = None
    shown = re.sub("//[^/]*@", "//", re.split("[?#]", url)[0])  # without what may be secret
    plain = host and parts.scheme in ("http", "https")
    if not plain or "@" in parts.netloc or parts.query or parts.fragment:
        problem = "is not the plain address of a server: https://, its name, and maybe a path"
        raise _error(shown, problem, key)
    if not re.fullmatch("[!-~]*", key):
        problem = "cannot be sent a key with spaces or special characters: check $OPENAI_API_KEY"
        raise _error(shown, problem, key)
    if key and parts.scheme == "http" and not _is_local(host):
        problem = "would be sent the key unencrypted: use https, or unset $OPENAI_API_KEY"
        raise _error(shown, problem, key)
    path = parts.path.rstrip("/")
    if not re.search("/v[0-9]", path):
        path += "/v1"
    return f"{parts.scheme}://{parts.netloc}{path}/chat/completions"


def _is_local(host: str | None) -> bool:
    """Return whether a host is this machine: nothing for such a server may go to a proxy."""
    if host == "localhost":
        return True
    try:
        address = ipaddress.ip_address(host or "")
    except ValueError:  # a name
        return False
    return (getattr(address, "ipv4_mapped", None) or address).is_loopback


def _server_message(response: bytes) -> str:
    """Return OpenAI's error.message of a failure, or else the whole response."""
    text = response.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return text


def _error(address: str, problem: str, key: str) -> UserError:
    """Return one short line without the key, which servers may repeat."""
    problem = " ".join(CONTROL.sub("", problem).split())
    if key:
        address, problem = _without_key(address, key), _without_key(problem, key)
    return UserError(f"{address} {problem:.400}")


def _without_key(text: str, key: str) -> str:
    """Replace the key, also as URLs and JSON spell it."""
    for secret in (key, quote(key, safe=""), quote(key), key.replace("/", "\\/")):
        text = text.replace(secret, "***")
    return text


# ------------------------------------------------------------------ images and text


def data_url(image: Image.Image, format: str = "PNG", **options: Any) -> str:
    """Return an image as the text that a message of a user holds."""
    file = io.BytesIO()
    image.save(file, format, **options)
    data = base64.b64encode(file.getvalue()).decode()
    return f"data:image/{format.lower()};base64,{data}"


def printable(text: str) -> str:
    """Remove control characters, which a terminal would obey, and outer spaces."""
    return CONTROL.sub("", text).strip()
