"""Files are complete or absent: kills, errors, and several processes at once."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from flux import atomic_files
from flux.atomic_files import (
    exclusive_lock,
    move_without_overwriting,
    remove_leftovers,
    unfinished_file,
    write_atomically,
)
from flux.errors import UserError

ROOT = Path(__file__).resolve().parents[1]


def python(code: str, *args: object) -> subprocess.Popen:
    """Start a process that runs `code` with the helpers imported. Its output is a pipe."""
    script = "import sys, time\nfrom pathlib import Path\nfrom flux.atomic_files import *\n" + code
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, args)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


HOLD = """
with write_atomically(Path(sys.argv[1])) as file:
    file.write_text("half")
    (file.parent / ".tmpXYZ").write_text("of a library")
    print("writing", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def writer(tmp_path):
    """A process in the middle of writing tmp_path/a.txt."""
    process = python(HOLD, tmp_path / "a.txt")
    assert process.stdout.readline() == "writing\n"
    yield process
    process.kill()
    process.communicate()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_file_appears_at_the_end_and_replaces_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with write_atomically(path) as file:
        file.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new"
    assert names(tmp_path) == ["a.txt"]


def test_error_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(ZeroDivisionError), write_atomically(path) as file:
        file.write_text("new")
        raise ZeroDivisionError
    assert path.read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


def test_file_gets_the_default_mode_even_if_written_as_private(tmp_path):
    with write_atomically(tmp_path / "private") as file:
        file.touch(mode=0o600)
    (tmp_path / "default").touch()
    modes = [(tmp_path / name).stat().st_mode for name in ("private", "default")]
    assert modes[0] == modes[1]


def test_new_file_has_the_mode_of_the_file_that_it_replaces(tmp_path):
    path = tmp_path / "a"
    path.touch(mode=0o640)
    with write_atomically(path) as file:
        file.touch()
    assert path.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize("kind", ["file", "folder", "link that leads nowhere"])
def test_without_overwrite_nothing_that_exists_is_replaced(tmp_path, kind):
    path = tmp_path / "a"
    if kind == "file":
        path.write_text("old")
    elif kind == "folder":
        path.mkdir()
        (path / "old").touch()
    else:
        path.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match="exists already"):
        with write_atomically(path, overwrite=False):
            raise AssertionError("must not begin")
    assert names(tmp_path) == ["a"]


@pytest.mark.parametrize("has_links", [True, False])
def test_without_overwrite_a_file_that_appears_meanwhile_stays(tmp_path, monkeypatch, has_links):
    path = tmp_path / "a.txt"
    if not has_links:
        monkeypatch.setattr(os, "link", raising(PermissionError))
    with pytest.raises(UserError, match="exists already"):
        with write_atomically(path, overwrite=False) as file:
            file.write_text("ours")
            path.write_text("theirs")
    assert path.read_text() == "theirs"


def raising(error: type[Exception]):
    def fail(*args, **kwargs):
        raise error

    return fail


def test_without_hard_links_a_file_is_moved(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "link", raising(PermissionError))
    (tmp_path / "a").write_text("text")
    move_without_overwriting(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "b").read_text() == "text"


def test_folder_is_moved_as_one_and_may_replace_an_empty_folder(tmp_path):
    path = tmp_path / "kit"
    path.mkdir()
    with write_atomically(path, overwrite=False) as folder:
        folder.mkdir()
        (folder / "a").touch()
        assert not names(path)
    assert names(tmp_path) == ["kit"]
    assert names(path) == ["a"]


def test_second_writer_is_refused_at_once_or_waits(tmp_path, writer):
    path = tmp_path / "a.txt"
    with pytest.raises(UserError, match="another process is using this file"):
        with write_atomically(path):
            raise AssertionError("must not begin")
    waiting = python(
        'with write_atomically(Path(sys.argv[1]), wait=True) as f: f.write_text("second")', path
    )
    time.sleep(0.3)
    assert waiting.poll() is None
    os.kill(writer.pid, signal.SIGKILL)
    assert waiting.wait(30) == 0
    waiting.communicate()
    assert path.read_text() == "second"
    assert names(tmp_path) == ["a.txt"]


def test_leftovers_of_a_killed_process_go_and_those_of_a_living_one_stay(tmp_path, writer):
    unfinished = tmp_path / ".a.txt.unfinished"
    remove_leftovers(tmp_path)
    assert names(unfinished) == [".tmpXYZ", "a.txt"]
    writer.kill()
    writer.wait()
    assert names(unfinished) == [".tmpXYZ", "a.txt"]
    remove_leftovers(tmp_path)
    assert names(tmp_path) == []


def test_lock_of_a_process_that_was_killed_before_it_wrote_goes(tmp_path):
    (tmp_path / ".a.txt.unfinished.lock").touch()
    (tmp_path / ".b.lock").touch()  # of another program
    with exclusive_lock(tmp_path / "c"):
        remove_leftovers(tmp_path)
        assert names(tmp_path) == [".b.lock", ".c.unfinished.lock"]


def test_next_write_removes_the_leftovers_of_its_target(tmp_path, writer):
    writer.kill()
    writer.wait()
    with write_atomically(tmp_path / "a.txt") as file:
        assert names(file.parent) == []
        file.write_text("whole")
    assert names(tmp_path) == ["a.txt"]


def test_leftovers_of_other_names_and_files_of_the_user_stay(tmp_path):
    (tmp_path / ".b.unfinished").write_text("a file of the user")
    (tmp_path / ".c.part").mkdir()
    remove_leftovers(tmp_path)
    remove_leftovers(tmp_path / "absent")
    assert names(tmp_path) == [".b.unfinished", ".c.part"]


def test_read_modify_write_of_many_processes_loses_nothing(tmp_path):
    """Each process appends a line by rewriting the file; the lock file is deleted every time."""
    path = tmp_path / "a.txt"
    path.touch()
    code = """
for number in range(25):
    with write_atomically(Path(sys.argv[1]), wait=True) as file:
        file.write_text(Path(sys.argv[1]).read_text() + f"{sys.argv[2]}.{number}\\n")
"""
    processes = [python(code, path, number) for number in range(4)]
    for process in processes:
        assert process.communicate()[1] == ""
    lines = path.read_text().split()
    assert sorted(lines) == sorted(f"{p}.{n}" for p in range(4) for n in range(25))
    assert names(tmp_path) == ["a.txt"]


def test_lock_of_a_folder_is_next_to_the_folder(tmp_path):
    folder = tmp_path / "run"
    with exclusive_lock(folder) as is_locked:
        assert is_locked
        assert names(tmp_path) == [".run.unfinished.lock"]
        with pytest.raises(UserError, match="another process"), exclusive_lock(folder):
            pass
    assert names(tmp_path) == []


@pytest.mark.parametrize("fcntl", ["absent", "not supported by the file system"])
def test_where_nothing_can_lock_a_second_writer_is_still_refused(tmp_path, monkeypatch, fcntl):
    if fcntl == "absent":
        monkeypatch.setattr(atomic_files, "fcntl", None)
    else:
        monkeypatch.setattr(atomic_files.fcntl, "flock", raising(OSError))
    path = tmp_path / "a.txt"
    with write_atomically(path) as file:
        file.write_text("first")
        with pytest.raises(UserError, match=r"delete .*\.a\.txt\.unfinished"):
            with write_atomically(path):
                raise AssertionError("must not begin")
        assert file.read_text() == "first"
    assert names(tmp_path) == ["a.txt"]
    assert path.read_text() == "first"


def test_folder_that_is_absent_is_an_os_error(tmp_path):
    with pytest.raises(FileNotFoundError), unfinished_file(tmp_path / "absent" / "a.txt"):
        pass
