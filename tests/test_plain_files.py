"""Only plain files of a bounded size are read; pipes, devices and folders are told in one line."""

import os
import tracemalloc
from pathlib import Path

import pytest
from support.weight_files import refusal

from flux.plain_files import parse_json, read_plain_file, require_plain_file


@pytest.fixture(params=["itself", "link"])
def special(request, tmp_path):
    """A function that returns a path, or a link to that path."""

    def named(path: Path) -> Path:
        if request.param == "itself":
            return path
        link = tmp_path / f"link-{path.name}"
        link.symlink_to(path)
        return link

    return named


def test_pipe_device_and_folder_are_refused_and_not_opened(tmp_path, special):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "folder").mkdir()
    for path, problem in (
        (tmp_path / "pipe", "is a pipe or a device"),
        (Path("/dev/zero"), "is a pipe or a device"),
        (tmp_path / "folder", "is a folder"),
    ):
        named = special(path)
        for call in (lambda p: require_plain_file(p, "a mask"), lambda p: read_plain_file(p, 9)):
            message = refusal(call, named)
            assert message.startswith(f"{named}: {problem}, not a plain file. Name ")


@pytest.mark.parametrize(
    "name, problem",
    [("none", "does not exist"), ("x" * 300, "cannot be read ("), ("a\0b", "cannot be read (")],
)
def test_missing_and_impossible_names_are_refused(tmp_path, name, problem):
    message = refusal(require_plain_file, tmp_path / name, "a mask")
    assert f": {problem}" in message and message.endswith(". Name a mask.")


def test_plain_file_is_read_up_to_its_limit(tmp_path, special):
    (tmp_path / "file").write_bytes(b"123456789")
    path = special(tmp_path / "file")
    assert require_plain_file(path) == path
    assert read_plain_file(path, limit=9) == b"123456789"
    assert "is larger than 8 bytes" in refusal(read_plain_file, path, limit=8)


def test_memory_is_that_of_the_file_not_of_the_limit(tmp_path):
    (tmp_path / "file").write_bytes(b"x" * 3_000_000)
    tracemalloc.start()
    try:
        assert len(read_plain_file(tmp_path / "file", limit=2**30)) == 3_000_000
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()


def test_links_in_a_circle_are_refused(tmp_path):
    (tmp_path / "a").symlink_to(tmp_path / "b")
    (tmp_path / "b").symlink_to(tmp_path / "a")
    assert "cannot be read (" in refusal(require_plain_file, tmp_path / "a")


@pytest.mark.parametrize(
    "text, problem",
    [
        ('{"a": 1, "a": 1}', "has the name 'a' twice"),
        ('{"a": [NaN]}', "has NaN, which is no number"),
        ("-Infinity", "has -Infinity, which is no number"),
        ("[" * 100_000, "is nested too deeply"),
        ('"\\ud83d"', "has one half of a surrogate pair"),
        ('{"\\uDE00": 1}', "has one half of a surrogate pair"),
        ("1" * 5000, "4300 digits"),
        (b'"\xff"', "utf-8"),
        ("[1, 2, 3]", "has more than 8 bytes"),
        ("", "Expecting value"),
    ],
)
def test_json_that_other_readers_refuse_is_refused(text, problem):
    with pytest.raises(ValueError, match=problem):
        parse_json(text, limit=8 if text == "[1, 2, 3]" else 10**6)


def test_json_is_read():
    assert parse_json(r'{"a": [1, 2.5, null, "\ud83d\ude00 \\ud83d"]}') == {
        "a": [1, 2.5, None, "\U0001f600 \\ud83d"]
    }
