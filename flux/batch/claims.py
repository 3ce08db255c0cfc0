"""Claims of blocks, so that two workers seldom work on the same one.

A claim only saves work: two workers on one block write the same bytes. So nothing depends on the
locks of a network file system, or on equal clocks.
"""

import os
import socket
import threading
import time
from contextlib import suppress
from pathlib import Path

from flux.atomic_files import lock_open_file

TOUCH = 20.0  # seconds between two signs of life
STALE = 120.0  # seconds without one, after which a claim of another machine is free


class Claim:
    """The claim of one block, which a thread keeps alive; `release` deletes it."""

    def __init__(self, path: Path, descriptor: int):
        self.path, self.descriptor = path, descriptor
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._touch, daemon=True)
        self.thread.start()

    def _touch(self) -> None:
        while not self.ended.wait(TOUCH):
            with suppress(OSError):
                os.utime(self.path)

    def release(self) -> None:
        self.ended.set()
        self.thread.join()
        with suppress(OSError):
            self.path.unlink()
        os.close(self.descriptor)


def claim(folder: Path, block: int) -> Claim | None:
    """Claim a block in the shared folder; None if a living worker holds the claim.

    The kernel unlocks the file of a killed worker: on one machine its claim is free at once.
    OSError if the folder is not writable.
    """
    path = folder / f"{block:09}"
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        lock_open_file(descriptor)
        held_by = os.read(descriptor, 300).decode("utf-8", "replace")
        age = time.time() - os.fstat(descriptor).st_mtime
        is_free = not held_by or held_by == socket.gethostname() or age > STALE
        # whoever held the claim before may have deleted the file that is open here
        still_there = os.path.samestat(os.fstat(descriptor), os.stat(path))
        if is_free and still_there:
            os.truncate(descriptor, 0)
            os.pwrite(descriptor, socket.gethostname().encode(), 0)
            return Claim(path, descriptor)
    except (BlockingIOError, FileNotFoundError):  # a living worker, or one that has just ended
        pass
    except BaseException:
        os.close(descriptor)
        raise
    os.close(descriptor)
    return None
