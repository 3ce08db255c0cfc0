"""Files are compared with the hash that is known of them. The right ones are by hashlib and git."""

import hashlib
import os
import subprocess
import warnings
from pathlib import Path

import pytest
from support.weight_files import refusal

import flux
from flux.configs import EMBEDDED
from flux.weights import checksums
from flux.weights.checksums import Published, check_hashes, has_hash, stated_hash

CONTENT = b"the weights"
SHA256 = hashlib.sha256(CONTENT).hexdigest()


def told(files: list[Path]) -> str:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        check_hashes(files)
    return "; ".join(str(warning.message) for warning in caught)


def cached(folder: Path, content: bytes, digest: str = SHA256) -> Path:
    """Write a file as the Hugging Face cache holds it."""
    (folder / "blobs").mkdir(parents=True)
    (folder / "blobs" / digest).write_bytes(content)
    path = folder / "snapshots/abc/x.safetensors"
    path.parent.mkdir(parents=True)
    path.symlink_to(os.path.relpath(folder / "blobs" / digest, path.parent))
    return path


def downloaded(folder: Path, name: str, content: bytes, digest: str = SHA256) -> Path:
    """Write a file as `hf download --local-dir` leaves it, with its metadata."""
    from huggingface_hub._local_folder import get_local_download_paths, write_download_metadata

    path = get_local_download_paths(folder, name).file_path
    path.write_bytes(content)
    write_download_metadata(folder, name, "c" * 40, digest)
    return path


def test_file_of_the_cache(tmp_path):
    path = cached(tmp_path / "a", CONTENT)
    assert stated_hash(path) == SHA256
    assert told([path]) == "checked the weights; as published: x.safetensors"
    wrong = cached(tmp_path / "b", CONTENT + b".")
    message = refusal(check_hashes, [wrong])
    assert message.startswith(f"{wrong} has not the hash that Hugging Face states; delete ")


@pytest.mark.parametrize("name", ["x.safetensors", "transformer/x.safetensors"])
def test_file_of_a_local_download(tmp_path, name):
    path = downloaded(tmp_path, name, CONTENT)
    assert stated_hash(path) == SHA256 and "as published: x.safetensors" in told([path])
    assert "has not the hash" in refusal(check_hashes, [downloaded(tmp_path, name, b"other")])


def test_small_file_has_the_hash_of_git(tmp_path):
    (tmp_path / "x").write_bytes(CONTENT)
    done = subprocess.run(["git", "hash-object", tmp_path / "x"], capture_output=True, text=True)
    path = downloaded(tmp_path, "x.json", CONTENT, done.stdout.strip())
    assert has_hash(path, stated_hash(path)) and not has_hash(path, "0" * 40)


def test_metadata_without_a_hash_or_of_another_file_state_none(tmp_path):
    (path := tmp_path / "x.safetensors").write_bytes(CONTENT)
    assert stated_hash(path) is None
    note = tmp_path / checksums.DOWNLOADS / "x.safetensors.metadata"
    note.parent.mkdir(parents=True)
    for text in ("", "a\nb\nc", f"{SHA256}", "\xff" * 300):
        note.write_text(text)
        assert stated_hash(path) is None


def test_file_with_a_published_name(tmp_path, monkeypatch):
    monkeypatch.setattr(checksums, "PUBLISHED", {"x.safetensors": Published(SHA256, None)})
    (path := tmp_path / "x.safetensors").write_bytes(CONTENT)
    (other := tmp_path / "mine.safetensors").write_bytes(CONTENT)
    assert told([path, other]) == (
        "checked the weights; as published: x.safetensors; of unknown hash: mine.safetensors"
    )
    path.write_bytes(b"a fine-tune")
    assert "has the name of a published file, and not its SHA-256" in told([path])
    assert SHA256 in told([path])


def test_vanished_file_is_a_sentence(tmp_path):
    path = cached(tmp_path, CONTENT)
    path.resolve().unlink()
    assert "cannot be read" in refusal(check_hashes, [path])


def test_command_tells_which_files_were_checked(monkeypatch):
    name = "flux-2-tiny.safetensors"
    digest = hashlib.sha256((EMBEDDED / "flux.2-tiny" / name).read_bytes()).hexdigest()
    monkeypatch.setattr(checksums, "PUBLISHED", {name: Published(digest, None)})
    with pytest.warns(UserWarning, match=f"as published: {name}") as caught:
        flux.load(check_finite=True)
    texts = [str(warning.message) for warning in caught]
    assert "checked the weights; of unknown hash: model.safetensors" in texts
