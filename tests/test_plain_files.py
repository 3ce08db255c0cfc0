"""Only plain files of a bounded size are read; pipes, devices and folders are told in one line."""

import os
import tracemalloc
from pathlib import Path

import pytest
from support.weight_files import refusal

from flux.plain_files import read_plain_file, require_plain_file


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
