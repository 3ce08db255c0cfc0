"""Prompt upsampling for FLUX.2 [dev]: a language model writes the prompt out in full.

`upsample_locally` runs the Mistral checkpoint that also encodes FLUX.2 [dev]'s prompts.
`upsample_remotely` calls a server of OpenAI's chat completions. Both see the reference images,
which are RGB. The procedure is Black Forest Labs' (black-forest-labs/flux2,
src/flux2/text_encoder.py); the two instructions are our own.
"""

import base64
import gc
import io
import ipaddress
import json
import os
import re
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from threading import Thread
from urllib.parse import quote, urlsplit
from urllib.request import HTTPErrorProcessor, ProxyHandler, Request, build_opener

import torch
from PIL import Image

from flux.errors import UserError
from flux.tokenizers import MistralTokenizer

TEMPERATURE = 0.15
NEW_TOKENS = 512
MAX_TOKENS = 2048  # of the prompt with its template
MAX_PIXELS = 768**2  # of an image
MAX_RESPONSE = 2**22  # bytes
SECRET_LENGTH = 8  # characters of a key that protects something
CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")  # characters that are removed
EXPAND = (
    "You write prompts for an image generator. Rewrite the user's prompt as one paragraph that "
    "shows a single picture in concrete, visible detail: subject, surroundings, materials, "
    "colours, light, composition, style. Keep all that the user fixed, such as subjects, numbers, "
    "places, colours and style, and copy text in quotation marks character by character. Answer "
    "with the prompt alone."
)
EDIT = (
    "You write instructions for an image editor. The user shows one picture or several, and asks "
    "for a change. Answer with one concise instruction that says what changes, how that looks "
    "afterwards, and what stays as it is; name things by what can be seen. Copy text in quotation "
    "marks character by character. Answer with the instruction alone."
)

# ------------------------------------------------------------------ on this machine


def upsample_locally(
    prompt: str,
    folder: Path,
    images: Sequence[Image.Image] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """Return the prompt, or with images the edit instruction, as Mistral writes it.

    `folder`: a FLUX.2-dev repository with `tokenizer/tokenizer.json` and all of `text_encoder/`.
    The model (48 GB in bfloat16) is released afterwards. UserError without transformers or the
    files, for more than 2048 tokens, and for an empty answer.
    """
    folder, device = Path(folder), torch.device(device)
    model = _load_mistral(folder / "text_encoder", device, dtype)
    image_tokens, image_inputs = _image_inputs(images, model) if images else ("", {})
    chat = MistralTokenizer(folder / "tokenizer")
    chat.prefix = f"<s>[SYSTEM_PROMPT]{EDIT if images else EXPAND}[/SYSTEM_PROMPT]"
    if images:
        chat.prefix += f"[INST]{image_tokens}[/INST]"
    chat.prefix += "[INST]"
    tokens = chat([prompt], MAX_TOKENS + 1)
    ids = tokens.ids[tokens.mask][None].to(device)  # (1, L) without padding
    if ids.shape[1] > MAX_TOKENS:
        raise UserError(
            f"prompt: is too long to upsample. With its template, it may have {MAX_TOKENS} tokens."
        )
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        out = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            pad_token_id=chat.pad_id,
            do_sample=True,
            temperature=TEMPERATURE,
            max_new_tokens=NEW_TOKENS,
            **image_inputs,
        )
    del model
    gc.collect()
    torch.cuda.empty_cache()
    text = _printable(chat.tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    if not text:
        raise UserError(
            f"{folder}: the model answered without text. Try another prompt or seed, or do not "
            "upsample."
        )
    return text


def _load_mistral(folder: Path, device: torch.device, dtype: torch.dtype):
    """Load transformers' Mistral Small 3 with its vision parts."""
    try:
        from transformers import (
            Mistral3ForConditionalGeneration,
            PixtralImageProcessorPil,  # noqa: F401  (for _image_inputs)
        )
    except ImportError:
        raise UserError(
            "upsampling needs transformers: run `pip install -U transformers accelerate`"
        ) from None
    advice = "Take all of text_encoder/ from the FLUX.2-dev repository, or upsample by a server."
    try:
        model, report = Mistral3ForConditionalGeneration.from_pretrained(
            folder,
            dtype=dtype,
            device_map=device,
            use_safetensors=True,
            local_files_only=True,
            output_loading_info=True,
        )
    except Exception as error:  # missing or damaged files, no accelerate, too little memory
        reason = " ".join(str(error).split())
        raise UserError(f"{folder}: cannot be loaded ({reason:.200}). {advice}") from None
    missing = report["missing_keys"]
    if missing:  # transformers would leave these random
        raise UserError(
            f"{folder}: {len(missing)} tensors are missing, such as {min(missing)}. {advice}"
        )
    return model


def _image_inputs(images: Sequence[Image.Image], model) -> tuple[str, dict]:
    """Place the images in one row on white; return the tokens for it, and the model's inputs."""
    from transformers import PixtralImageProcessorPil  # PixtralProcessor would need torchvision

    width, height = sum(image.width for image in images), max(image.height for image in images)
    row = Image.new("RGB", (width, height), "white")
    left = 0
    for image in images:
        row.paste(image, (left, (height - image.height) // 2))
        left += image.width
    vision = model.config.vision_config
    patch = vision.patch_size * model.config.spatial_merge_size  # pixels on a side of a token
    processor = PixtralImageProcessorPil(patch_size=patch, size={"longest_edge": vision.image_size})
    inputs = processor(_shrink(row), return_tensors="pt")
    lines, columns = (inputs["image_sizes"][0] // patch).tolist()
    line = "[IMG]" * columns
    return "[IMG_BREAK]".join([line] * lines) + "[IMG_END]", dict(
        inputs.to(model.device, model.dtype)
    )


# ------------------------------------------------------------------ on a server


def upsample_remotely(
    prompt: str,
    url: str,
    model: str,
    key: str | None = None,
    images: Sequence[Image.Image] = (),
    timeout: float = 120,
    total_timeout: float = 600,
) -> str:
    """Return the prompt as the server at `url` writes it.

    `url`: such as https://api.openai.com or http://localhost:8080/v1; `/v1` is added if the path
    has no version, and `/chat/completions` always. `key`: $OPENAI_API_KEY if None; over http it is
    sent to this machine only, and never through a proxy. It is in one header and nowhere else.
    `timeout`: seconds without a byte; `total_timeout`: until the whole answer. UserError for every
    failure.
    """
    key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
    address = _address(url, key)
    content: str | list[dict] = prompt
    if images:
        content = [{"type": "image_url", "image_url": {"url": _data_url(i)}} for i in images]
        content.append({"type": "text", "text": prompt})
    request = {
        "model": model,
        "messages": [
            {"role": "system", "content": EDIT if images else EXPAND},
            {"role": "user", "content": content},
        ],
        "temperature": TEMPERATURE,
        "max_tokens": NEW_TOKENS,
    }
    response = _post(address, key, request, timeout, total_timeout)
    try:
        text = json.loads(response)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError):
        problem = "answered something that is not JSON: is this a chat model's address?"
        raise _error(address, problem, key) from None
    except (LookupError, TypeError):
        problem = f"answered without choices: {_server_message(response)}"
        raise _error(address, problem, key) from None
    text = _printable(text) if isinstance(text, str) else ""
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


def _post(address: str, key: str, body: dict, timeout: float, total_timeout: float) -> bytes:
    """Return the body of the answer.

    A thread waits for the server: the timeout of a socket begins again with each byte, and so does
    not bound the time of an answer.
    """
    results: list[bytes | BaseException] = []

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


def _post_and_wait(address: str, key: str, body: dict, timeout: float) -> bytes:
    # Some servers refuse urllib's own User-Agent.
    headers = {"Content-Type": "application/json", "User-Agent": "flux"}
    if key:
        headers["Authorization"] = f"Bearer {key}"
    try:
        request = Request(address, json.dumps(body).encode(), headers)
        no_proxy = [ProxyHandler({})] if _is_local(urlsplit(address).hostname) else []
        with build_opener(KeepResponse, *no_proxy).open(request, timeout=timeout) as response:
            status, redirect = response.status, response.headers.get("Location")
            content = response.read(MAX_RESPONSE)
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        problem = f"cannot be reached ({reason})"
        if isinstance(reason, TimeoutError):
            problem = f"sent nothing for {timeout:g} seconds"
        raise _error(address, problem, key) from None
    if redirect:
        raise _error(address, f"redirects to {redirect}: use that address", key)
    if status != 200:
        raise _error(address, f"answered {status}: {_server_message(content)}", key)
    return content


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


def _shrink(image: Image.Image) -> Image.Image:
    """Resize to at most MAX_PIXELS."""
    scale = (MAX_PIXELS / (image.width * image.height)) ** 0.5
    if scale >= 1:
        return image
    size = max(1, int(image.width * scale)), max(1, int(image.height * scale))
    return image.resize(size, Image.Resampling.LANCZOS)


def _data_url(image: Image.Image) -> str:
    file = io.BytesIO()
    _shrink(image).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _printable(text: str) -> str:
    """Remove control characters, which a terminal would obey, and outer spaces."""
    return CONTROL.sub("", text).strip()
