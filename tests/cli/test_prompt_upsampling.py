"""prompt_upsampling: inputs and text equal diffusers' with a tiny Mistral; requests to a server.

The server is tests/support/chat_server.py.
"""

import base64
import gc
import io
import json
import re
import shutil
import socket
import sys
import threading
import time
import traceback
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from urllib.parse import quote

import numpy as np
import pytest
import torch
import transformers
from diffusers import Flux2Pipeline
from diffusers.pipelines.flux2 import pipeline_flux2
from diffusers.pipelines.flux2.image_processor import Flux2ImageProcessor
from modules import prompt_upsampling
from modules.prompt_upsampling import EDIT, EXPAND, upsample_locally, upsample_remotely
from PIL import Image
from safetensors.torch import load_file, save_file
from support.chat_server import chat_reply, chat_server
from support.tokenizer_files import MISTRAL_TEMPLATE, make_mistral

from flux.errors import UserError
from flux.parity.reference import randomise

PROMPT = "a cat [IMG]holding a sign that says 'hello  world'"
KEY = "sk-secret/0123"
NOISE = np.random.default_rng(0).integers(0, 256, (640, 700, 3), dtype=np.uint8)
IMAGES = [
    Image.fromarray(NOISE),
    Image.fromarray(NOISE[:333, :301]),
]  # beside each other, more than 768² pixels


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A FLUX.2-dev repository with a tiny model: a token is 8x8 pixels, images have at most 64."""
    home = tmp_path_factory.mktemp("FLUX.2-dev")
    (home / "tokenizer").mkdir()
    make_mistral(home / "tokenizer")
    tokenizer = json.loads((home / "tokenizer/tokenizer.json").read_text())
    tokenizer["decoder"] = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": False,
        "use_regex": False,
    }
    (home / "tokenizer/tokenizer.json").write_text(json.dumps(tokenizer))
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, head_dim=8
    )
    text = transformers.MistralConfig(
        **sizes, vocab_size=400, num_key_value_heads=2, sliding_window=None
    )
    eyes = transformers.PixtralVisionConfig(**sizes, patch_size=4, image_size=64)
    config = transformers.Mistral3Config(text_config=text, vision_config=eyes)
    randomise(transformers.Mistral3ForConditionalGeneration(config)).save_pretrained(
        home / "text_encoder"
    )
    return home


class Processor:
    """transformers' PixtralProcessor from its parts, since PixtralProcessor needs torchvision."""

    def __init__(self, folder):
        names = {
            "bos_token": "<s>",
            "eos_token": "</s>",
            "pad_token": "<pad>",
            "unk_token": "<unk>",
        }
        file = str(folder / "tokenizer/tokenizer.json")
        self.tokenizer = transformers.PreTrainedTokenizerFast(
            tokenizer_file=file, padding_side="left", **names
        )
        self.tokenizer.chat_template = MISTRAL_TEMPLATE

    def apply_chat_template(
        self, conversations, tokenize, return_dict, add_generation_prompt, **options
    ):
        text, seen = self.tokenizer.apply_chat_template(conversations[0], tokenize=False), {}
        blocks = [block for message in conversations[0] for block in message["content"]]
        if pictures := [block["image"] for block in blocks if block["type"] == "image"]:
            processor = transformers.PixtralImageProcessorPil(
                patch_size=8, size={"longest_edge": 64}
            )
            seen = processor(pictures, return_tensors="pt")
            h, w = (seen["image_sizes"][0] // 8).tolist()
            text = text.replace("[IMG]", "[IMG_BREAK]".join(["[IMG]" * w] * h) + "[IMG_END]")
        return {
            **self.tokenizer(
                text, add_special_tokens=False, return_token_type_ids=False, **options
            ),
            **seen,
        }


def theirs(folder, pictures, seed):
    """Return the text of diffusers' pipeline with our instructions."""
    model = transformers.Mistral3ForConditionalGeneration.from_pretrained(
        folder / "text_encoder", dtype=torch.float32
    )
    pipe = SimpleNamespace(
        text_encoder=model,
        tokenizer=Processor(folder),
        image_processor=Flux2ImageProcessor(),
        upsampling_max_image_size=pipeline_flux2.UPSAMPLING_MAX_IMAGE_SIZE,
    )
    torch.manual_seed(seed)
    return Flux2Pipeline.upsample_prompt(pipe, PROMPT, [pictures] if pictures else None)[0]


def printable(text):
    return "".join(
        c for c in text if c in "\t\n\v\f\r" or not (c < " " or "\x7f" <= c <= "\x9f")
    ).strip()


@pytest.fixture
def generate_inputs(monkeypatch):
    """The inputs of each call of transformers' generate, which makes at most 100 tokens here."""
    calls, generate = [], transformers.Mistral3ForConditionalGeneration.generate

    def record(model, **inputs):
        calls.append(inputs | {"input_ids": inputs["input_ids"][inputs["attention_mask"].bool()]})
        return generate(model, **inputs | {"max_new_tokens": 100})

    monkeypatch.setattr(transformers.Mistral3ForConditionalGeneration, "generate", record)
    return calls


@pytest.mark.parametrize(
    "count, seed",
    [
        pytest.param(0, 4, marks=pytest.mark.slow),
        pytest.param(1, 3, marks=pytest.mark.slow),
        (2, 3),
    ],
)
def test_local_inputs_and_text_equal_diffusers(folder, generate_inputs, monkeypatch, count, seed):
    """diffusers pads ids to 2048: in float32 that changes no token."""
    monkeypatch.setattr(pipeline_flux2, "SYSTEM_MESSAGE_UPSAMPLING_T2I", EXPAND)
    monkeypatch.setattr(pipeline_flux2, "SYSTEM_MESSAGE_UPSAMPLING_I2I", EDIT)
    expected = printable(theirs(folder, IMAGES[:count], seed))
    torch.manual_seed(99)
    state = torch.get_rng_state()
    ours = upsample_locally(PROMPT, folder, IMAGES[:count], seed, dtype=torch.float32)
    assert ours == expected
    assert torch.equal(torch.get_rng_state(), state)  # the caller's
    first, second = generate_inputs
    assert first["max_new_tokens"] == 512
    for name in {*first, *second} - {"attention_mask", "use_cache", "pad_token_id"}:
        assert np.array_equal(first[name], second[name]), name
    other = upsample_locally(PROMPT, folder, IMAGES[:count], seed + 9, dtype=torch.float32)
    assert other != expected


def test_answer_that_ends_by_itself_equals_diffusers(folder, monkeypatch):
    """The end-of-text token is not part of the prompt."""
    monkeypatch.setattr(pipeline_flux2, "SYSTEM_MESSAGE_UPSAMPLING_T2I", EXPAND)
    ours = upsample_locally(PROMPT, folder, (), 3, dtype=torch.float32)
    assert ours == printable(theirs(folder, (), 3))


def test_model_is_released(folder, monkeypatch):
    monkeypatch.setattr(prompt_upsampling, "NEW_TOKENS", 8)
    upsample_locally(PROMPT, folder)
    models = [
        x for x in gc.get_objects() if type(x) is transformers.Mistral3ForConditionalGeneration
    ]
    assert not models


def test_local_upsampling_refuses_wrong_input(folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match="too long to upsample.* 2048 tokens"):
        upsample_locally("a cat " * 1100, folder)
    with pytest.raises(UserError, match=r"text_encoder: cannot be loaded \(.*Take all"):
        upsample_locally(PROMPT, tmp_path)
    broken = shutil.copytree(folder, tmp_path / "broken")
    weights = load_file(broken / "text_encoder/model.safetensors")
    name, _ = weights.popitem()
    save_file(weights, broken / "text_encoder/model.safetensors", {"format": "pt"})
    with pytest.raises(
        UserError, match=f"text_encoder: 1 tensors are missing, such as .*{re.escape(name)}"
    ):
        upsample_locally(PROMPT, broken)
    (broken / "text_encoder/model.safetensors").write_bytes(b"cut off")
    with pytest.raises(UserError, match="text_encoder: cannot be loaded"):
        upsample_locally(PROMPT, broken)
    (broken / "text_encoder/model.safetensors").unlink()
    torch.save(
        load_file(folder / "text_encoder/model.safetensors"),
        broken / "text_encoder/pytorch_model.bin",
    )  # a pickle
    with pytest.raises(UserError, match="text_encoder: cannot be loaded"):
        upsample_locally(PROMPT, broken)

    def silent(model, input_ids, **_):
        return torch.cat([input_ids, torch.tensor([[2]])], dim=1)

    monkeypatch.setattr(transformers.Mistral3ForConditionalGeneration, "generate", silent)
    with pytest.raises(UserError, match="answered without text"):
        upsample_locally(PROMPT, folder)
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(UserError, match="pip install -U transformers"):
        upsample_locally(PROMPT, folder)


# ------------------------------------------------------------------ servers


@pytest.mark.parametrize(
    "path, expected",
    [
        ("", "/v1"),
        ("/", "/v1"),
        ("/v1", "/v1"),
        ("/v1/", "/v1"),
        ("/api", "/api/v1"),
        ("/v1beta/openai/", "/v1beta/openai"),
    ],
)
def test_remote_request(server, monkeypatch, path, expected):
    server.reply = 200, {}, chat_reply(" a fluffy\ncat \x1b[31m\U0001f431\ud83d\n")
    assert (
        upsample_remotely(PROMPT, server.url + path, "some/model") == "a fluffy\ncat [31m\U0001f431"
    )
    monkeypatch.setenv("OPENAI_API_KEY", KEY + "\n")
    upsample_remotely(PROMPT, server.url + path, "some/model", images=IMAGES[1:])
    upsample_remotely(PROMPT, server.url + path, "some/model", key="other")
    upsample_remotely(PROMPT, server.url + path, "some/model", key="")
    assert [address for address, _, _ in server.requests] == [expected + "/chat/completions"] * 4
    assert [headers["Authorization"] for _, headers, _ in server.requests] == [
        None,
        f"Bearer {KEY}",
        "Bearer other",
        None,
    ]
    recipe = {"model": "some/model", "temperature": 0.15, "max_tokens": 512}
    system, user = (
        {"role": role, "content": text} for role, text in (("system", EXPAND), ("user", PROMPT))
    )
    assert server.requests[0][2] == server.requests[2][2] == recipe | {"messages": [system, user]}
    image_part, text = server.requests[1][2]["messages"][1].pop("content")
    assert server.requests[1][2] == recipe | {
        "messages": [{"role": "system", "content": EDIT}, {"role": "user"}]
    }
    assert text == {"type": "text", "text": PROMPT} and image_part.keys() == {
        "type",
        "image_url",
    } == {image_part["type"], "type"}
    start, _, data = image_part["image_url"].pop("url").partition(",")
    assert start == "data:image/png;base64" and not image_part["image_url"]
    assert np.array_equal(Image.open(io.BytesIO(base64.b64decode(data))), IMAGES[1])


def test_large_images_are_shrunk(server):
    server.reply = 200, {}, chat_reply("x")
    upsample_remotely(
        PROMPT,
        server.url,
        "m",
        images=[Image.new("RGB", (1600, 900)), Image.new("RGB", (768, 768))],
    )
    urls = [
        part["image_url"]["url"] for part in server.requests[0][2]["messages"][1]["content"][:2]
    ]
    sizes = [Image.open(io.BytesIO(base64.b64decode(url.partition(",")[2]))).size for url in urls]
    assert sizes == [(1024, 576), (768, 768)]  # 1024·576 = 768²


@pytest.mark.parametrize(
    "reply, fault",
    [
        (
            (401, {}, json.dumps({"error": {"message": f"wrong key {KEY}"}}).encode()),
            r"answered 401: wrong key \*\*\*",
        ),
        (
            (401, {}, json.dumps({"error": "x" * 395 + KEY + "y" * 999}).encode()),
            r"answered 401: x+",
        ),
        ((500, {}, f"<html>\x1b\n{KEY}\xff".encode("latin-1")), r"answered 500: <html> \*\*\*"),
        ((302, {"Location": f"/elsewhere?{KEY}"}, b""), r"redirects to /elsewhere\?\*\*\*"),
        ((307, {"Location": "ftp://a/b"}, b""), r"redirects to ftp://a/b"),
        ((200, {}, b"<html>"), "answered something that is not JSON"),
        ((200, {}, b"\xff"), "answered something that is not JSON"),
        ((200, {}, b"[" * 100_000), "answered something that is not JSON"),
        ((200, {}, b"[]"), "answered without choices"),
        ((200, {}, b'{"choices": []}'), "answered without choices"),
        (
            (200, {}, b'{"error": {"message": "no credits"}}'),
            "answered without choices: no credits",
        ),
        ((200, {}, chat_reply(None)), "answered without text"),
        ((200, {}, chat_reply(" \x1b\n")), "answered without text"),
        (b"", "cannot be reached"),
        (b"220 mail.example\r\n", "cannot be reached"),
    ],
)
def test_server_errors_are_reported_without_the_key(server, reply, fault):
    server.reply = reply
    with pytest.raises(UserError) as error:
        upsample_remotely(PROMPT, server.url, "m", KEY)
    assert re.fullmatch(
        re.escape(server.url + "/v1/chat/completions ") + fault + ".*", str(error.value)
    )
    assert KEY[:4] not in str(error.value) and error.value.__suppress_context__ | (
        error.value.__context__ is None
    )
    assert len(server.requests) == 1 and len(str(error.value)) < 500


def test_slow_and_missing_servers_are_reported(server):
    server.delay = 0.6
    with pytest.raises(
        UserError, match=f"{server.url}/v1/chat/completions sent nothing for 0.2 seconds"
    ):
        upsample_remotely(PROMPT, server.url, "m", KEY, timeout=0.2)
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
        with pytest.raises(
            UserError, match=f"{url}/v1/chat/completions cannot be reached .*refused"
        ):
            upsample_remotely(PROMPT, url, "m", KEY)


@contextmanager
def dripping(start: bytes, drop: bytes):
    """A server that sends `start`, and then `drop` every 20 ms until nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            with suppress(OSError):
                connection, _ = listener.accept()
                with connection:
                    connection.sendall(start)
                    while True:
                        connection.sendall(drop)
                        time.sleep(0.02)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    "start, drop",
    [
        (b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b"x"),
        (b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n", b"1\r\nx\r\n"),
        (b"HTTP/1.1 200 OK\r\nX-Long: ", b"x"),
        (b"", b"H"),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    ],
    ids=["body", "chunks", "header", "status", "continue"],
)
def test_answer_without_end_is_given_up(monkeypatch, start, drop):
    monkeypatch.setenv("no_proxy", "*")
    with dripping(start, drop) as url:
        began = time.monotonic()
        with pytest.raises(UserError, match="did not finish its answer in 0.3 seconds$"):
            upsample_remotely(PROMPT, url, "m", KEY, timeout=10, total_timeout=0.3)
        assert 0.3 <= time.monotonic() - began < 5


@pytest.mark.parametrize("variable", ["http_proxy", "HTTP_PROXY", "all_proxy"])
def test_no_proxy_sees_what_is_for_this_machine(server, monkeypatch, variable):
    monkeypatch.delenv("no_proxy")
    monkeypatch.delenv("NO_PROXY", raising=False)
    server.reply = 200, {}, chat_reply("a fluffy cat")
    with chat_server() as proxy:
        proxy.reply = 200, {}, chat_reply("by the proxy")
        monkeypatch.setenv(variable, proxy.url)
        port = server.url.rpartition(":")[2]
        for host in ("localhost", "127.0.0.1", "LOCALHOST"):
            url = f"http://{host}:{port}"
            assert upsample_remotely(PROMPT, url, "m", KEY, IMAGES[1:]) == "a fluffy cat"
        for host in ("[::1]", "127.7.7.7", "[::ffff:127.7.7.7]"):
            with suppress(UserError):  # nobody listens there
                upsample_remotely(PROMPT, f"http://{host}:{port}", "m", KEY)
        assert not proxy.requests and len(server.requests) == 3
        if "http" in variable:  # the variable has an effect on other hosts
            assert upsample_remotely(PROMPT, "http://elsewhere.invalid", "m", "") == "by the proxy"
            assert proxy.requests[0][1]["Authorization"] is None


def test_key_in_an_answer_is_not_shown_or_kept(server):
    server.reply = 200, {}, chat_reply(f"a cat with {KEY}")
    assert upsample_remotely(PROMPT, server.url, "m", KEY) == "a cat with ***"
    server.reply = 200, {}, chat_reply("an empty box")
    assert upsample_remotely(PROMPT, server.url, "m", "empty") == "an empty box"
    for reply in (
        (400, {}, json.dumps({"detail": f"bad {KEY}"}).replace("/", "\\/").encode()),
        (302, {"Location": "/login?key=" + quote(KEY, safe="")}, b""),
    ):
        server.reply = reply
        with pytest.raises(UserError) as error:
            upsample_remotely(PROMPT, server.url, "m", KEY)
        assert "secret" not in str(error.value) and "***" in str(error.value)
    frames = traceback.walk_tb(error.value.__traceback__)
    assert len(list(frames)) > 1  # the traceback is there; its text has no key
    assert KEY not in "".join(traceback.format_exception(error.value))


@pytest.mark.parametrize(
    "url, key, shown",
    [
        ("ftp://host", "", "ftp://host"),
        ("file:///etc/passwd", "", "file:///etc/passwd"),
        ("", "", ""),
        ("host:80", "", "host:80"),
        ("http://[", "", "http://["),
        ("http://host:port", "", "http://host:port"),
        ("https://", "", "https://"),
        ("https://me:secret@host/v1", "", "https://host/v1"),
        ("https://host?key=secret", "", "https://host"),
        ("https://host/#secret", "", "https://host/"),
        ("http://host/v1", "secret", "http://host/v1"),
        ("http://127.0.0.1.host", "secret", "http://127.0.0.1.host"),
        ("https://host", "secret\nHost: x", "https://host"),
        ("https://host", "sécret", "https://host"),
        ("http://local/secret", "secret", "http://local/***"),
    ],
)
def test_unsafe_addresses_and_keys_are_refused(server, url, key, shown):
    with pytest.raises(UserError, match=f"^{re.escape(shown)} ") as error:
        upsample_remotely(PROMPT, url, "m", key)
    assert "secret" not in str(error.value) and "sécret" not in str(error.value)
