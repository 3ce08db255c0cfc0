"""Write a file in a thread while the next is made: to encode a PNG takes as long as some steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from types import TracebackType
from typing import Any


class BackgroundWriter:
    """Writes one file at a time; a context manager, which waits for the last one.

    What `write` returns is passed to `report` in the thread of the caller, when the caller asks for
    it by `finish`: so messages keep their order. What `write` raises is raised there too, and
    nothing is reported. A complete file is reported even if the caller fails or is interrupted.
    """

    def __init__(self) -> None:
        self.thread = ThreadPoolExecutor(max_workers=1)
        self.pending: tuple[Future, Callable[[Any], None]] | None = None

    def start(self, write: Callable[[], Any], report: Callable[[Any], None]) -> None:
        """Start to write, after the file before is finished."""
        self.finish()
        self.pending = self.thread.submit(write), report

    @property
    def is_ready(self) -> bool:
        """Whether `finish` has something to report, and need not wait."""
        return self.pending is not None and self.pending[0].done()

    def finish(self) -> None:
        """Wait for the file, and report it."""
        if self.pending is not None:
            future, report = self.pending
            wait([future])  # an interrupt leaves it pending
            self.pending = None
            report(future.result())

    def __enter__(self) -> "BackgroundWriter":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        try:
            self.finish()
        finally:
            self.thread.shutdown()
