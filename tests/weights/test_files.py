"""Files are found in order; damaged and missing files are refused in one sentence each.

The truth is what `safetensors` itself writes and, for the hub, huggingface_hub's own client with
a transport that answers like the hub, without a network.
"""

import errno
import hashlib
import json
import os
import signal
import socket
import struct
import subprocess
import time
import tracemalloc
from pathlib import Path
from random import Random

import httpx2
import huggingface_hub
import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import save_file
from support.weight_files import entry, raw, refusal, saved

from flux import progress
from flux.weights import files
from flux.weights.checksums import has_hash, stated_hash
from flux.weights.files import find_file, find_files, is_local, read_header, shard_files

# ---------------------------------------------------------------- headers


def test_header_equals_the_written_tensors(tmp_path):
    tensors = {
        "a": torch.zeros(2, 3, dtype=torch.bfloat16),
        "b": torch.tensor(1),
        "none": torch.zeros(0, 5),
        "eight": torch.zeros(3, dtype=torch.float8_e4m3fn),
    }
    save_file(tensors, tmp_path / "x.safetensors", metadata={"format": "pt"})
    infos, metadata = read_header(tmp_path / "x.safetensors")
    assert metadata == {"format": "pt"}
    assert {name: info[:2] for name, info in infos.items()} == {
        "a": ("BF16", (2, 3)),
        "b": ("I64", ()),
        "none": ("F32", (0, 5)),
        "eight": ("F8_E4M3", (3,)),
    }
    assert {info.file for info in infos.values()} == {tmp_path / "x.safetensors"}


@pytest.mark.parametrize(
    "length", [640, 768, 60 * 256]
)  # the first bytes of a pickle twice, and of a web page
def test_header_length_that_looks_like_another_format_is_read(tmp_path, length):
    header = (
        json.dumps({"a": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}})
        .encode()
        .ljust(length)
    )
    assert read_header(raw(tmp_path / "x.safetensors", header, b"\0"))[0]["a"].shape == (1,)


@pytest.mark.parametrize(
    "content, expected",
    [
        (b"", "is empty"),
        (b"abc", "not a safetensors file"),
        (b"\0" * 100, "not a safetensors file"),
        (b"<!DOCTYPE html><html><head><title>Access restricted", "web page"),
        (b"\n  <html>", "web page"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:4610\nsize 23802932552\n",
            "git lfs pull",
        ),
        (b"PK\x03\x04" + b"\0" * 60, "pickle"),
        (b"\x80\x02}q\0(X\x06\0\0\0", "pickle"),
        (b"GGUF\x03\0\0\0" + b"\0" * 60, "GGUF"),
        (b'{"weight_map": {"a": "b"}}', "JSON"),
        (b"Invalid username or password.", "an error message of Hugging Face"),
        (b"\x1f\x8b\x08\0\0\0\0\0", "a gzip file"),
        (struct.pack("<Q", 1 << 40) + b"{}", "header would be"),
        (struct.pack("<Q", 5000) + b'{"a":', "truncated"),
    ],
)
def test_other_kinds_of_files_are_recognised_and_refused(tmp_path, content, expected):
    (tmp_path / "x.safetensors").write_bytes(content)
    message = refusal(read_header, tmp_path / "x.safetensors")
    assert expected in message and str(tmp_path / "x.safetensors") in message


def test_missing_file_folder_and_pipe_are_refused(tmp_path):
    assert "does not exist" in refusal(read_header, tmp_path / "x.safetensors")
    assert "is a folder" in refusal(read_header, tmp_path)
    assert "cannot be read" in refusal(read_header, tmp_path / ("x" * 300))
    os.mkfifo(tmp_path / "pipe")
    assert "is a pipe or a device" in refusal(read_header, tmp_path / "pipe")


@pytest.mark.parametrize(
    "header, expected",
    [
        (b"{not json}", "damaged header"),
        (b'{"a": \xff}', "damaged header"),
        (b'{"a": ' + b"[" * 100_000, "damaged header"),
        ({"__metadata__": {"a": 1}, "a": entry()}, "metadata that is not text"),
        ({"__metadata__": [1], "a": entry()}, "damaged header"),
        ({"a": entry("F31")}, "'a'"),
        ({"a": entry(["F32"])}, "'a'"),
        ({"a": entry(shape=[-2])}, "'a'"),
        ({"a": entry(shape=[2.0])}, "'a'"),
        ({"a": entry(shape=[True, 2])}, "'a'"),
        ({"a": entry(shape=2)}, "'a'"),
        ({"a": {"dtype": "F32", "shape": [2]}}, "'a'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}}, "'a'"),
        ({"a": []}, "'a'"),
        ({"a": entry(shape=[3])}, "8 bytes for tensor 'a', F32 of shape [3]"),
        ({"a": entry("BF16")}, "8 bytes for tensor 'a', BF16 of shape [2]"),
        ({"a": entry(shape=[(1 << 63) - 1, 2])}, "8 bytes for tensor 'a'"),
        ({"a": entry(shape=[1 << 63])}, "'a' is not understood"),
        ({"a": entry(begin=1 << 63, end=(1 << 63) + 8)}, "'a' is not understood"),
        ({"a": entry(shape=[10**900])}, "'a' is not understood"),
        (b'{"a": {"dtype": "F32", "shape": [' + b"9" * 4300 + b"]}}", "'a' is not understood"),
        ({"a": entry(shape=[2] + [1] * 69)}, "'a' is not understood"),
        ({"a": entry() | {"more": {}}}, "'a' is not understood"),
        (b'{"a": {"dtype": "F32", "dtype": "F32"}}', "'a' is not understood"),
        (f'{{"a": {json.dumps(entry())}, "a": {json.dumps(entry())}}}'.encode(), "'a' stands in"),
        (f'{{"a": {json.dumps(entry())}, "\\u0061": 1}}'.encode(), "'a' stands in it twice"),
        (b'{"__metadata__": {"a": "1", "a": "2"}}', "'a' stands in it twice"),
        (b'{"__metadata__": {}, "__metadata__": {}}', "'__metadata__' stands in it twice"),
        (f'{{"a": {json.dumps(entry())},}}'.encode(), "not understood from byte"),
        (f'{{"a": {json.dumps(entry())}}}}}'.encode(), "not understood from byte"),
        (f'{{"a": {json.dumps(entry())}'.encode(), "not understood from byte"),
        (b'{"' + b"x" * 20_000 + b'": 1}', "not understood from byte 1"),
        ({"a": entry(), "b": entry(begin=4, end=12)}, "'b' overlaps"),
        ({"a": entry(), "b": entry(begin=12, end=20)}, "'b' leaves a hole"),
        ({"a": entry(begin=8, end=16)}, "'a' leaves a hole"),
        ({"a": entry(), "b": entry(begin=8, end=16)}, "is truncated"),
        ({}, "goes on after its end"),
    ],
)
def test_header_that_contradicts_itself_is_refused(tmp_path, header, expected):
    message = refusal(read_header, raw(tmp_path / "x.safetensors", header, b"\0" * 8))
    assert expected in message and str(tmp_path / "x.safetensors") in message


@pytest.mark.parametrize("spaces", ["", " \n\t\r"])
def test_spaces_escapes_and_empty_metadata_are_read(tmp_path, spaces):
    """And in any order of fields, as JSON may be."""
    fields = '"data_offsets":[0,8],"shape":[2],"dtype":"F32"'
    text = f'{{"__metadata__":null,"caf\\u00e9 \\"":{{{fields}}}}}'
    for sign in "{}[]:,":
        text = text.replace(sign, f"{sign}{spaces}")
    infos, metadata = read_header(raw(tmp_path / "x.safetensors", text.encode(), b"\0" * 8))
    assert {name: info[:2] for name, info in infos.items()} == {'café "': ("F32", (2,))}
    assert metadata == {}


def test_long_escaped_metadata_are_read_piece_by_piece(tmp_path, monkeypatch):
    """No piece ends within an escape, a surrogate pair or a character of several bytes."""
    monkeypatch.setattr("flux.weights.files.PIECE", 16)
    parts = (r"\n", r"\\", r"\"", r"\/", r"\u20ac", r"\ud83d\ude00", "é", "😀", "a", "0123456789")
    random = Random(1)
    for _ in range(300):
        text = '"' + "".join(random.choices(parts, k=30)) + '"'
        header = b'{"__metadata__":{"a":%b}}' % text.encode()
        assert read_header(raw(tmp_path / "x.safetensors", header))[1] == {"a": json.loads(text)}
    for damage in (r"\ud83d", r"\x", r"\u12", "\n"):
        header = b'{"__metadata__":{"a":"%b"}}' % (20 * r"\n" + damage + 20 * "z").encode()
        assert "damaged header" in refusal(read_header, raw(tmp_path / "x.safetensors", header))


HOSTILE = {  # a piece of a header, repeated to 4 MB; json.loads makes up to 100 MB of each
    "empty lists": (b'{"a":[', b"[],"),
    "empty lists in a shape": (b'{"a":{"dtype":"F32","shape":[', b"[],"),
    "nested lists": (b'{"a":', b"["),
    "nested tables": (b"{", b'"a":{'),
    "names": (b"{", b'"a":0,'),
    "escaped fields": (b"{", b'"%07d":{"\\\\u0064type":"F32","shape":[0],"data_offsets":[0,0]},'),
    "tensors": (b"{", b'"%07d":{"dtype":"F32","shape":[0],"data_offsets":[0,0]},'),
    "metadata": (b'{"__metadata__":{', b'"%07d":"",'),
    "metadata without an end": (b'{"__metadata__":{"a":"', b'\\"'),
    "a name without an end": (b'{"', b'\\"'),
    "spaces": (b'{"a"', b" "),
    "digits": (b'{"a":{"dtype":"F32","shape":[', b"9"),
    "large numbers": (b'{"a":{"dtype":"F32","shape":[', b"9" * 4000 + b","),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_header_takes_little_memory(tmp_path, monkeypatch, kind):
    monkeypatch.setattr(files, "MAX_TENSORS", 1_000)
    start, piece = HOSTILE[kind]
    count = 4_000_000 // len(piece)
    body = b"".join(piece % i for i in range(count)) if b"%" in piece else piece * count
    path = raw(tmp_path / "x.safetensors", start + body)
    del body
    signal.alarm(60)  # the slowest takes a second
    tracemalloc.start()
    assert "damaged header" in refusal(read_header, path)
    assert tracemalloc.get_traced_memory()[1] < 9_000_000
    tracemalloc.stop()
    signal.alarm(0)


@pytest.mark.parametrize("piece, times", [("x", 2.2), ("\\n", 2.8)])
def test_long_metadata_are_not_copied(tmp_path, piece, times):
    """The file's bytes and the text are kept; if escaped, also the text before it is decoded."""
    header = b'{"__metadata__":{"a":"%s"}}' % (2_000_000 * piece.encode())
    path = raw(tmp_path / "x.safetensors", header)
    tracemalloc.start()
    _, metadata = read_header(path)
    assert tracemalloc.get_traced_memory()[1] < times * path.stat().st_size
    tracemalloc.stop()
    assert metadata == {"a": 2_000_000 * piece.replace("\\n", "\n")}


def test_truncated_and_overlong_files_are_refused_with_both_sizes(tmp_path):
    path = saved(tmp_path / "x.safetensors", {"a": torch.ones(2, 3), "b": torch.tensor(7)})
    content = path.read_bytes()
    path.write_bytes(content[:-5])
    assert f"truncated: {len(content):,} bytes expected, {len(content) - 5:,} found" in refusal(
        read_header, path
    )
    path.write_bytes(content + b"\0")
    assert f"{len(content):,} bytes expected, {len(content) + 1:,} found" in refusal(
        read_header, path
    )


# ---------------------------------------------------------------- shards


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{}",
        '{"weight_map": []}',
        '{"weight_map": {}}',
        '{"weight_map": {"a": ["b"]}}',
        "[" * 100_000,
    ],
)
def test_index_without_names_is_refused(tmp_path, content):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(content)
    assert f"{index} is not an index" in refusal(shard_files, index)


@pytest.mark.parametrize(
    "name",
    [
        "../x.safetensors",
        "/x.safetensors",
        "a/x.safetensors",
        "..",
        "",
        "a\\x.safetensors",
        "C:x.safetensors",
        ".x.safetensors",
        "x.safetensors\n",
        "x.pt",
        1,
    ],
)
def test_index_that_leaves_its_folder_is_refused(tmp_path, name):
    index = tmp_path / "x.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": name}}))
    message = refusal(shard_files, index)
    assert f"{index} names {name!r}, which is not the plain name" in message


def test_missing_pipe_and_endless_index_are_refused(tmp_path):
    index = tmp_path / "x.safetensors.index.json"
    assert "does not exist" in refusal(shard_files, index)
    os.mkfifo(index)
    assert "is a pipe or a device" in refusal(shard_files, index)
    index.unlink()
    index.symlink_to("/dev/zero")
    assert "is a pipe or a device" in refusal(shard_files, index)
    index.unlink()
    index.write_bytes(b" " * 5_000_000)
    assert "is larger than 4,000,000 bytes" in refusal(shard_files, index)


# ---------------------------------------------------------------- finding

REPOSITORY, FILE, INDEX = (
    "Black-Forest/FLUX.9-dev",
    "flux9.safetensors",
    "text_encoder/model.safetensors.index.json",
)
ASK = dict(licence="the FLUX Dev licence", gated=True)


@pytest.fixture(autouse=True)
def empty_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names: pytest.fail(f"downloads {names}")
    )
    monkeypatch.delenv("FLUX_WEIGHTS", raising=False)
    monkeypatch.delenv("HF_TOKEN", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_TOKEN_PATH", str(tmp_path / "token"))


def touch(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def cached(root: Path, filename: str, text: str = "") -> Path:
    """Write a file as huggingface_hub stores it."""
    home = root / "cache" / f"models--{REPOSITORY.replace('/', '--')}"
    touch(home / "refs" / "main", "c" * 40)
    return touch(home / "snapshots" / ("c" * 40) / filename, text)


def test_folder_comes_before_cache_and_its_own_repository_first(tmp_path, monkeypatch):
    folder = tmp_path / "weights"
    in_cache = cached(tmp_path, FILE)
    assert find_file(REPOSITORY, FILE) == in_cache
    folder.mkdir()
    assert find_file(REPOSITORY, FILE, folder) == in_cache
    for place in ("", "flux.9-DEV", "black-forest/Flux.9-dev"):
        path = touch(folder / place / FILE)
        assert find_file(REPOSITORY, FILE, folder) == path
        assert is_local(REPOSITORY, FILE, folder)
    monkeypatch.setenv("FLUX_WEIGHTS", str(folder))
    assert find_file(REPOSITORY, FILE) == path
    assert (
        find_file(REPOSITORY, FILE, touch(tmp_path / "other" / FILE).parent)
        == tmp_path / "other" / FILE
    )


def test_file_missing_in_a_folder_is_not_downloaded(tmp_path, monkeypatch):
    message = refusal(find_file, REPOSITORY, FILE, tmp_path, **ASK)
    for place in (tmp_path / FILE, tmp_path / "FLUX.9-dev" / FILE, tmp_path / REPOSITORY / FILE):
        assert str(place) in message
    assert f"https://huggingface.co/{REPOSITORY} under the FLUX Dev licence" in message
    assert not is_local(REPOSITORY, FILE, tmp_path) and not is_local(REPOSITORY, FILE)
    assert "weights: " in refusal(find_file, REPOSITORY, FILE, tmp_path / "none")
    monkeypatch.setenv("FLUX_WEIGHTS", str(touch(tmp_path / FILE)))
    assert "$FLUX_WEIGHTS: " in refusal(find_file, REPOSITORY, FILE)


def test_unreadable_folder_is_refused(tmp_path, monkeypatch):
    def glob(self, pattern):
        raise PermissionError(13, "Permission denied", str(self / "locked"))

    monkeypatch.setattr(type(tmp_path), "glob", glob)
    assert f"{tmp_path / 'locked'} cannot be read: Permission denied" in refusal(
        find_file, REPOSITORY, FILE, tmp_path
    )


def test_index_is_local_if_its_shards_are(tmp_path):
    index = json.dumps({"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}})
    for save, weights in (
        (lambda name, text="": cached(tmp_path, name, text), None),
        (lambda name, text="": touch(tmp_path / "weights" / name, text), tmp_path / "weights"),
    ):
        path = save(INDEX, index)
        save("text_encoder/x-1.safetensors")
        assert not is_local(REPOSITORY, INDEX, weights)
        if weights:
            assert "lacks x-2.safetensors" in refusal(find_files, REPOSITORY, INDEX, weights)
        last = save("text_encoder/x-2.safetensors")
        assert is_local(REPOSITORY, INDEX, weights)
        assert find_files(REPOSITORY, INDEX, weights) == [path.parent / "x-1.safetensors", last]
        assert find_files(REPOSITORY, "text_encoder/x-2.safetensors", weights) == [last]


@pytest.fixture(autouse=True)
def host_is_known(monkeypatch):
    """Where the tests run, there may be no network."""
    monkeypatch.setattr("socket.getaddrinfo", lambda *_: [])


@pytest.fixture
def hub(monkeypatch):
    """The real hf_hub_download, with a hub that gives a chosen answer."""
    from huggingface_hub.file_download import hf_hub_download

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", hf_hub_download)

    def answer(respond):
        def factory():
            return httpx2.Client(transport=httpx2.MockTransport(respond), follow_redirects=True)

        huggingface_hub.set_client_factory(factory)

    yield answer
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)


def answering(status: int, code: str | None = None, message: str | None = None):
    headers = {
        name: text for name, text in (("X-Error-Code", code), ("X-Error-Message", message)) if text
    }
    return lambda request: httpx2.Response(status, headers=headers, request=request)


@pytest.mark.parametrize(
    "respond, gated, sentence",
    [
        (
            answering(401, "GatedRepo"),
            True,
            "no valid Hugging Face token was sent; accept the FLUX Dev licence at",
        ),
        (answering(401, "GatedRepo"), False, "no valid Hugging Face token was sent"),
        (
            answering(401, None, "Invalid credentials in Authorization header"),
            True,
            "no valid Hugging Face token was sent",
        ),
        (answering(403, "GatedRepo"), True, "your token's account has no access"),
        (answering(403), True, "your token's account has no access"),
        (answering(404, "RepoNotFound"), False, "there is no public repository"),
        (answering(401), False, "there is no public repository"),
        (answering(404, "EntryNotFound"), True, "has no such file"),
        (answering(403), False, "HTTP 403"),
        (answering(418), False, "HTTP 418"),
        (answering(200), False, "cannot be reached"),
    ],
)
def test_refusals_of_the_hub_say_what_to_do(hub, respond, gated, sentence):
    hub(respond)
    message = refusal(find_file, REPOSITORY, FILE, licence="the FLUX Dev licence", gated=gated)
    assert (
        sentence in message and REPOSITORY in message and FILE in message and "`weights`" in message
    )
    if "token" in sentence:
        assert f"https://huggingface.co/{REPOSITORY}" in message
    if "no valid" in sentence:
        assert "READ token" in message and "hf auth login" in message and "HF_TOKEN" in message


def test_unknown_host_is_reported_at_once(monkeypatch):
    """The hub's client is not asked: it would print ten lines in 25 seconds."""

    def unknown(*_):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda *names: pytest.fail(f"downloads {names}")
    )
    monkeypatch.setattr("socket.getaddrinfo", unknown)
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    message = refusal(find_file, REPOSITORY, FILE)
    assert "huggingface.co cannot be reached ([Errno -2] Name or service not known);" in message


def test_missing_network_and_offline_mode_are_reported(hub, monkeypatch):
    monkeypatch.setattr(
        "time.sleep", lambda seconds: None
    )  # huggingface_hub tries again for 20 seconds

    def respond(request):
        raise httpx2.ConnectError("Name or service not known", request=request)

    hub(respond)
    assert "cannot be reached (Name or service not known)" in refusal(find_file, REPOSITORY, FILE)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    huggingface_hub.set_client_factory(huggingface_hub.utils._http.default_client_factory)
    assert "HF_HUB_OFFLINE" in refusal(find_file, REPOSITORY, FILE)


@pytest.mark.parametrize(
    "error, sentence",
    [
        (OSError(errno.ENOSPC, "No space left on device"), "the disk is full"),
        (
            httpx2.ReadTimeout("timed out"),
            "ReadTimeout, timed out; run again (the download starts over)",
        ),
        (
            RuntimeError("Data processing error:\n  lost"),
            "RuntimeError, Data processing error: lost",
        ),
    ],
)
def test_interrupted_download_is_reported(monkeypatch, error, sentence):
    def fail(*names):
        raise error

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", fail)
    message = refusal(find_file, REPOSITORY, FILE)
    assert sentence in message and REPOSITORY in message and FILE in message


def test_refused_token_is_told_with_its_place(hub, monkeypatch):
    hub(answering(401, None, "Invalid credentials in Authorization header"))
    monkeypatch.setenv("HF_TOKEN", "hf_stale")
    message = refusal(find_file, REPOSITORY, FILE)
    assert "HTTP 401, the Hugging Face token in HF_TOKEN is refused" in message
    assert "hf_stale" not in message
    hub(answering(401))  # of a repository that is not there, or is private
    assert "the Hugging Face token in HF_TOKEN is refused, or there is no such" in refusal(
        find_file, REPOSITORY, FILE
    )
    monkeypatch.delenv("HF_TOKEN")
    assert "there is no public repository" in refusal(find_file, REPOSITORY, FILE)


@pytest.mark.parametrize("kind", ["sha256", "git"])
def test_download_with_another_hash_is_deleted(hub, kind):
    """Large files have their SHA-256 as ETag, others what `git hash-object` prints."""
    right = b"the right bytes"
    etag = hashlib.sha256(right).hexdigest()
    if kind == "git":
        etag = hashlib.sha1(b"blob 15\0" + right).hexdigest()

    def serve(content):
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": "c" * 40}
        hub(lambda request: httpx2.Response(200, headers=headers, content=content, request=request))

    serve(b"the wrong bytes")
    message = refusal(find_file, REPOSITORY, FILE)
    assert "was not downloaded: what came has not the hash" in message and FILE in message
    assert not is_local(REPOSITORY, FILE)
    serve(right)
    path = find_file(REPOSITORY, FILE)
    assert path.read_bytes() == right and has_hash(path, stated_hash(path))
    path.resolve().write_bytes(b"the rotten byte")
    assert find_file(REPOSITORY, FILE) == path and not has_hash(path, stated_hash(path))


@pytest.mark.parametrize("is_there", [False, True], ids=["new", "there before"])
@pytest.mark.parametrize("hostile", ["{}", "../../../../../../../../../../../../{}"])
def test_download_stays_in_the_cache(hub, hostile, is_there, tmp_path):
    """huggingface_hub names a blob by the server's ETag, which may lead anywhere."""
    private = tmp_path / "blobs" / (40 * "a")
    private.parent.mkdir()
    if is_there:
        private.write_bytes(b"mine")
    headers = {"ETag": f'"{hostile.format(private)}"', "X-Repo-Commit": "c" * 40}
    hub(lambda request: httpx2.Response(200, headers=headers, content=b"theirs", request=request))
    message = refusal(find_file, REPOSITORY, FILE)
    assert f"was not downloaded: the server named {private} to keep the file at" in message
    assert not is_local(REPOSITORY, FILE)
    assert not is_there or private.read_bytes() == b"mine"


def test_git_names_a_blob_by_its_hash(tmp_path):
    (tmp_path / "blobs").mkdir()
    (tmp_path / "x").write_bytes(b"hello\n")
    done = subprocess.run(
        ["git", "hash-object", tmp_path / "x"], capture_output=True, text=True, check=True
    )
    (tmp_path / "x").rename(tmp_path / "blobs" / done.stdout.strip())
    (tmp_path / "link").symlink_to(tmp_path / "blobs" / done.stdout.strip())
    assert has_hash(tmp_path / "link", stated_hash(tmp_path / "link"))


def test_ctrl_c_is_not_swallowed(monkeypatch):
    def interrupt(*names):
        raise KeyboardInterrupt

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", interrupt)
    with pytest.raises(KeyboardInterrupt):
        find_file(REPOSITORY, FILE)


def test_download_gets_index_and_shards_once(hub, tmp_path):
    contents = {
        INDEX: json.dumps(
            {"weight_map": {"a": "x-1.safetensors", "b": "x-2.safetensors"}}
        ).encode(),
        "text_encoder/x-1.safetensors": b"one",
        "text_encoder/x-2.safetensors": b"two",
    }
    asked = []

    def respond(request):
        name = request.url.path.removeprefix(f"/{REPOSITORY}/resolve/").split("/", 1)[1]
        asked.append((request.method, name))
        headers = {"ETag": f'"{name}"'.replace("/", "-"), "X-Repo-Commit": "c" * 40}
        return httpx2.Response(200, headers=headers, content=contents[name], request=request)

    hub(respond)
    assert [path.read_bytes() for path in find_files(REPOSITORY, INDEX)] == [b"one", b"two"]
    assert {name for _, name in asked} == contents.keys()
    asked.clear()
    assert len(find_files(REPOSITORY, INDEX)) == 2 and is_local(REPOSITORY, INDEX) and not asked


def test_download_tells_how_much_has_come(tmp_path, monkeypatch):
    """The size is that of the unfinished file; one that an earlier run left does not count."""
    monkeypatch.delenv("FLUX_WEIGHTS", raising=False)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    blobs = tmp_path / f"models--{REPOSITORY.replace('/', '--')}/blobs"
    blobs.mkdir(parents=True)
    (left := blobs / "old.incomplete").write_bytes(bytes(9_000_000))
    os.utime(left, (1, 1))
    told: list[tuple] = []

    def download(repository: str, name: str) -> str:
        (blobs / "new.incomplete").write_bytes(bytes(2_000_000))
        deadline = time.monotonic() + 20
        while not told and time.monotonic() < deadline:
            time.sleep(0.001)
        (tmp_path / name).write_bytes(b"")
        return str(tmp_path / name)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    monkeypatch.setattr(progress, "POLL", 0.01)
    with progress.listen(lambda *what: told.append(what)):
        find_file(REPOSITORY, "ae.safetensors")
    assert told[0] == (f"downloading ae.safetensors of {REPOSITORY}", 0.002, 0, "GB")
