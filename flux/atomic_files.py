"""Write files that are complete or absent, whichever process is killed and whoever else writes.

While NAME is written, the file `.NAME.unfinished.lock` next to it is locked, and the folder
`.NAME.unfinished` holds what is written so far. The kernel releases the lock of a killed process:
what lies in such a folder without a locked file is a leftover, and the next write removes it.
"""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from flux.errors import UserError

try:
    import fcntl
except ImportError:  # Windows has no such locks
    fcntl = None  # type: ignore[assignment]

_made: list[Path] = []  # by `make_folder`, each folder after its parent


@contextmanager
def write_atomically(path: Path, overwrite: bool = True, wait: bool = False) -> Iterator[Path]:
    """Yield a path to write a file or folder to, and move the result to `path` at the end.

    The block may read the present `path`: no other process writes `path` meanwhile. After an error
    in the block, `path` is as before.

    `overwrite=False`: UserError if `path` exists, unless both are folders and `path` is empty.
    `wait`: wait for another process that writes `path`; without it, UserError.
    OSError if something cannot be written.
    """
    with unfinished_file(path, wait) as unfinished:
        if not overwrite:
            check_absent(path)
        yield unfinished
        if unfinished.is_dir():
            os.replace(unfinished, path)  # fails unless `path` is absent or an empty folder
            return
        # safetensors makes private files; a new folder has the mode that the user chose
        old = path if path.is_file() else unfinished.parent
        unfinished.chmod(old.stat().st_mode & 0o666)
        with unfinished.open("rb") as file:
            os.fsync(file.fileno())
        if overwrite:
            os.replace(unfinished, path)
        else:
            move_without_overwriting(unfinished, path)


def move_without_overwriting(file: Path, path: Path) -> None:
    """Move a file. UserError if `path` exists, even if another process made it just now."""
    try:
        os.link(file, path)  # unlike a rename, fails if the name is taken
    except OSError:  # the name is taken, or the file system has no hard links
        check_absent(path)
        os.replace(file, path)


def check_absent(path: Path) -> None:
    """Raise UserError if `path` exists. An empty folder counts as absent."""
    is_empty_folder = path.is_dir() and not path.is_symlink() and not any(path.iterdir())
    if os.path.lexists(path) and not is_empty_folder:
        raise UserError(f"{path}: exists already. Delete it, or choose another name.")


def make_folder(folder: Path) -> None:
    """Make a folder with its parents; `remove_empty_folders` removes those that stay empty."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    _made.extend(reversed([path.absolute() for path in new]))


def remove_empty_folders() -> None:
    """Remove the folders that this process made and wrote nothing to."""
    while _made:
        with suppress(OSError):  # it has files
            _made.pop().rmdir()


@contextmanager
def unfinished_file(path: Path, wait: bool = False) -> Iterator[Path]:
    """Yield the path of a file that shall become `path`; the block moves the finished file itself.

    Everything else in the folder of that file is deleted at the end. `wait` and errors are those
    of `write_atomically`.
    """
    with exclusive_lock(path, wait) as is_locked:
        folder = path.with_name(f".{path.name}.unfinished")
        if is_locked:
            shutil.rmtree(folder, ignore_errors=True)  # left by a killed process
        try:
            folder.mkdir()
        except FileExistsError:
            raise UserError(
                f"{path}: another process writes this file, or was killed while it did. "
                f"If none runs, delete {folder}."
            ) from None
        try:
            yield folder / path.name
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def exclusive_lock(path: Path, wait: bool = False) -> Iterator[bool]:
    """Lock `path`, a file or folder that need not exist, against all other processes.

    `wait`: wait for the process that holds the lock; without it, UserError. OSError if the folder
    of `path` is not writable. The lock is not reentrant: a second call waits or fails too.
    Yields False where the system or the file system cannot lock.
    """
    lock = path.with_name(f".{path.name}.unfinished.lock")
    descriptor, is_locked = _open_locked(lock, path, wait)
    try:
        yield is_locked
    finally:
        with suppress(OSError):
            lock.unlink()
        os.close(descriptor)  # after the name is gone: whoever waits looks for a new file


def _open_locked(lock: Path, path: Path, wait: bool) -> tuple[int, bool]:
    """Return the open file, and whether it is locked."""
    while True:
        try:
            descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o666)
        except OSError as error:
            error.filename = str(path)  # whose name the user knows
            raise
        try:
            is_locked = _lock(descriptor, path, wait)
            # who held the lock before has deleted the file, which another process may then create
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor, is_locked
        except FileNotFoundError:
            pass
        except BaseException:
            os.close(descriptor)
            raise
        os.close(descriptor)


def _lock(descriptor: int, path: Path, wait: bool) -> bool:
    try:
        return lock_open_file(descriptor, wait)
    except BlockingIOError:
        raise UserError(
            f"{path}: another process is using this file. Wait until that process ends."
        ) from None


def lock_open_file(descriptor: int, wait: bool = False) -> bool:
    """Lock an open file until it is closed; return False where the system cannot lock.

    BlockingIOError if another process of this machine holds the lock, unless `wait` is true.
    """
    if fcntl is None:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except BlockingIOError:
        raise
    except OSError:  # a network file system without locks
        return False


def remove_leftovers(folder: Path) -> None:
    """Delete what killed processes left unfinished in `folder`, and nothing of living processes."""
    left = *folder.glob(".*.unfinished"), *folder.glob(".*.unfinished.lock")
    for name in {path.name[1:].removesuffix(".lock").removesuffix(".unfinished") for path in left}:
        try:
            with unfinished_file(folder / name):
                pass
        except (UserError, OSError):  # another process writes the file, or the folder is read-only
            continue
