"""Prompt upsampling for FLUX.2 dev: a language model writes the prompt out in full, and sees the reference pictures.

`upsample_locally` asks the Mistral checkpoint that reads FLUX.2 dev's prompts; `upsample_remotely` asks any server that
speaks OpenAI's chat completions. The recipe is Black Forest Labs' (black-forest-labs/flux2, src/flux2/text_encoder.py); the
two instructions are ours and not theirs. ImageInputs are RGB. Control characters are taken out of the answers.
"""

import base64
import gc
import io
import json
import os
import re
from collections.abc import Sequence
from http.client import HTTPException
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import HTTPErrorProcessor, Request, build_opener

import torch
from PIL import Image

from flux.errors import UserError
from flux.tokenizers import MistralTokenizer

TEMPERATURE, NEW_TOKENS, MAX_TOKENS, MAX_PIXELS = 0.15, 512, 2048, 768**2
CONTROL = re.compile("[\0-\x08\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
EXPAND = (
    "You write prompts for an image generator. Rewrite the user's prompt as one paragraph that shows a single picture in "
    "concrete, visible detail: subject, surroundings, materials, colours, light, composition, style. Keep all that the user "
    "fixed, such as subjects, numbers, places, colours and style, and copy text in quotation marks character by character. "
    "Answer with the prompt alone."
)
EDIT = (
    "You write instructions for an image editor. The user shows one picture or several, and asks for a change. Answer with "
    "one concise instruction that says what changes, how that looks afterwards, and what stays as it is; name things by what "
    "can be seen. Copy text in quotation marks character by character. Answer with the instruction alone."
)

# ---------------------------------------------------------------------------------------------------------- here


def upsample_locally(
    prompt: str,
    folder: Path,
    pictures: Sequence[Image.Image] = (),
    seed: int = 0,
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.bfloat16,
) -> str:
    """The prompt, or with pictures the edit, as Mistral writes it; the model (48 GB in bfloat16) is let go afterwards.

    `folder`: a FLUX.2-dev repository with `tokenizer/tokenizer.json` and all of `text_encoder/`. UserError without
    transformers, without these files, for more than 2048 tokens, and for an empty answer.
    """
    folder, device = Path(folder), torch.device(device)
    model = _load(folder / "text_encoder", device, dtype)
    grid, seen = _see(pictures, model) if pictures else ("", {})
    chat = MistralTokenizer(folder / "tokenizer")
    picture = f"[INST]{grid}[/INST]" if grid else ""
    chat.prefix = f"<s>[SYSTEM_PROMPT]{EDIT if pictures else EXPAND}[/SYSTEM_PROMPT]{picture}[INST]"
    tokens = chat([prompt], MAX_TOKENS + 1)
    ids = tokens.ids[tokens.mask][None].to(device)  # (1, L), unpadded
    if ids.shape[1] > MAX_TOKENS:
        raise UserError(
            f"the prompt is too long to upsample: with what goes around it, it may have {MAX_TOKENS} tokens"
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
            **seen,
        )
    del model
    gc.collect()
    torch.cuda.empty_cache()
    text = _printable(chat.tokenizer.decode(out[0, ids.shape[1] :].tolist()))
    if not text:
        raise UserError(
            f"the model in {folder} answered without text: try another prompt or seed, or do without upsampling"
        )
    return text


def _load(encoder: Path, device: torch.device, dtype: torch.dtype):
    """transformers' Mistral Small 3, whole."""
    try:
        from transformers import Mistral3ForConditionalGeneration, PixtralImageProcessorPil  # noqa: F401 (which _see needs)
    except ImportError:
        raise UserError(
            "prompts are upsampled by transformers: run `pip install -U transformers accelerate`"
        ) from None
    advice = (
        "take all of text_encoder/ from the FLUX.2-dev repository, or upsample through a server"
    )
    options = dict(
        dtype=dtype,
        device_map=device,
        use_safetensors=True,
        local_files_only=True,
        output_loading_info=True,
    )
    try:
        model, report = Mistral3ForConditionalGeneration.from_pretrained(encoder, **options)
    except Exception as error:  # missing or damaged files, no accelerate, too little memory
        reason = " ".join(str(error).split())
        raise UserError(f"{encoder} cannot be loaded ({reason:.200}): {advice}") from None
    if report["missing_keys"]:  # transformers would leave these random
        lacks = f"{len(report['missing_keys'])} tensors, {min(report['missing_keys'])} among them"
        raise UserError(f"{encoder} lacks {lacks}: {advice}")
    return model


def _see(pictures: Sequence[Image.Image], model) -> tuple[str, dict]:
    """ImageInputs, in one row on white -> the tokens that stand for it, and what the model sees of it."""
    from transformers import PixtralImageProcessorPil  # PixtralProcessor would need torchvision

    row = Image.new(
        "RGB", (sum(p.width for p in pictures), max(p.height for p in pictures)), "white"
    )
    left = 0
    for picture in pictures:
        row.paste(picture, (left, (row.height - picture.height) // 2))
        left += picture.width
    eyes = model.config.vision_config
    cell = eyes.patch_size * model.config.spatial_merge_size  # the side of a token, in pixels
    seen = PixtralImageProcessorPil(patch_size=cell, size={"longest_edge": eyes.image_size})(
        _capped(row), return_tensors="pt"
    )
    lines, columns = (seen["image_sizes"][0] // cell).tolist()
    grid = ("[IMG]" * columns + "[IMG_BREAK]") * lines
    return grid.removesuffix("[IMG_BREAK]") + "[IMG_END]", dict(seen.to(model.device, model.dtype))


# ---------------------------------------------------------------------------------------------------------- elsewhere


def upsample_remotely(
    prompt: str,
    url: str,
    model: str,
    key: str | None = None,
    pictures: Sequence[Image.Image] = (),
    timeout: float = 120,
) -> str:
    """The same from the server at `url`, such as https://api.openai.com or http://localhost:8080/v1.

    `/v1` is added where no version stands in the path, and `/chat/completions` always. `key`: else $OPENAI_API_KEY, if set;
    over http it goes to this machine only. `timeout`: seconds without a sign of life. UserError for every failure.
    """
    key = (os.environ.get("OPENAI_API_KEY", "") if key is None else key).strip()
    address = _address(url, key)
    content = [
        {"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures
    ]
    messages = [
        {"role": "system", "content": EDIT if pictures else EXPAND},
        {
            "role": "user",
            "content": [*content, {"type": "text", "text": prompt}] if pictures else prompt,
        },
    ]
    body = {
        "model": model,
        "messages": messages,
        "temperature": TEMPERATURE,
        "max_tokens": NEW_TOKENS,
    }
    answer = _post(address, key, body, timeout)
    try:
        text = json.loads(answer)["choices"][0]["message"]["content"]
    except (ValueError, RecursionError):
        raise _refusal(
            address, "answered something that is not JSON: is this a chat model's address?", key
        ) from None
    except (LookupError, TypeError):
        raise _refusal(address, f"answered without choices: {_complaint(answer)}", key) from None
    if isinstance(text, str) and (text := _printable(text)):
        return text
    raise _refusal(
        address, "answered without text: try another prompt or model, or do without upsampling", key
    )


class AsItIs(HTTPErrorProcessor):
    """Raises for no status and follows no redirect, which would take the key elsewhere."""

    def http_response(self, request, response):
        return response

    https_response = http_response


def _post(address: str, key: str, body: dict, timeout: float) -> bytes:
    headers = {
        "Content-Type": "application/json",
        "User-Agent": "flux",
    }  # some servers refuse urllib's own name
    headers |= {"Authorization": f"Bearer {key}"} if key else {}
    try:
        request = Request(address, json.dumps(body).encode(), headers)
        with build_opener(AsItIs).open(request, timeout=timeout) as response:
            status, moved, answer = (
                response.status,
                response.headers.get("Location"),
                response.read(2**22),
            )
    except (OSError, HTTPException, ValueError) as error:
        reason = getattr(error, "reason", error)
        late = f"gave no sign of life for {timeout:g} seconds"
        raise _refusal(
            address,
            late if isinstance(reason, TimeoutError) else f"cannot be reached ({reason})",
            key,
        ) from None
    if moved:
        raise _refusal(address, f"sends on to {moved}: give the address that is meant", key)
    if status != 200:
        raise _refusal(address, f"answered {status}: {_complaint(answer)}", key)
    return answer


def _address(url: str, key: str) -> str:
    """Where to post to, or the reason why not."""
    try:
        parts = urlsplit(url)
        host, _ = parts.hostname, parts.port  # either may raise
    except ValueError:
        host = None
    shown = re.sub("//[^/]*@", "//", re.split("[?#]", url)[0])  # without what may be secret
    if (
        not host
        or parts.scheme not in ("http", "https")
        or "@" in parts.netloc
        or parts.query
        or parts.fragment
    ):
        raise _refusal(
            f"{shown} is not",
            "the plain address of a server: https://, its name, and a path, if it has one",
            key,
        )
    if not re.fullmatch("[!-~]*", key):
        raise _refusal(
            shown,
            "cannot be sent this key, which has spaces or other odd characters: check $OPENAI_API_KEY",
            key,
        )
    if key and parts.scheme == "http" and host not in ("localhost", "127.0.0.1", "::1"):
        raise _refusal(
            shown, "would be sent the key unencrypted: use https, or unset $OPENAI_API_KEY", key
        )
    path = parts.path.rstrip("/")
    return f"{parts.scheme}://{parts.netloc}{path if re.search('/v[0-9]', path) else path + '/v1'}/chat/completions"


def _complaint(answer: bytes) -> str:
    """What a server says of a failure: OpenAI's error.message, or else all that it sent."""
    text = answer.decode(errors="replace")
    try:
        error = json.loads(text)["error"]
        return str(error["message"] if isinstance(error, dict) else error)
    except (ValueError, LookupError, TypeError, RecursionError):
        return text


def _refusal(address: str, fault: str, key: str) -> UserError:
    """One line, and not a long one, without the key, which servers may repeat in what they complain of."""
    fault = " ".join(CONTROL.sub("", fault).split())
    address, fault = (text.replace(key, "***") if key else text for text in (address, fault))
    return UserError(f"{address} {fault:.400}")


# ---------------------------------------------------------------------------------------------------------- both


def _capped(picture: Image.Image) -> Image.Image:
    """At most 768² pixels."""
    scale = (MAX_PIXELS / (picture.width * picture.height)) ** 0.5
    size = (max(1, int(side * scale)) for side in picture.size)
    return picture if scale >= 1 else picture.resize(tuple(size), Image.Resampling.LANCZOS)


def _data_url(picture: Image.Image) -> str:
    file = io.BytesIO()
    _capped(picture).save(file, "PNG")
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode()


def _printable(text: str) -> str:
    """Without control characters, which a terminal would obey, and without space around it."""
    return CONTROL.sub("", text).strip()
