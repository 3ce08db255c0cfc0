"""Tell a listener how far long work is: downloading, loading, encoding, sampling.

Nobody listens by default. `with listen(f):` calls f(what, done, total, unit) in this thread, such
as f("loading flux1-dev.safetensors", 1.5, 23.8, "GB"). A total of 0 is unknown.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from threading import Event, Thread
from typing import TypeVar

T = TypeVar("T")
Listener = Callable[[str, float, float, str], object]
POLL = 1.0  # seconds between two looks at a download
_LISTENER: ContextVar[Listener | None] = ContextVar("listener", default=None)


@contextmanager
def listen(listener: Listener | None) -> Iterator[None]:
    """Tell `listener` of the work in this block."""
    token = _LISTENER.set(listener)
    try:
        yield
    finally:
        _LISTENER.reset(token)


def tell(what: str, done: float, total: float, unit: str) -> None:
    """Call the listener, if there is one."""
    if (listener := _LISTENER.get()) is not None:
        listener(what, done, total, unit)


def counted(items: Collection[T], what: str, unit: str) -> Iterator[T]:
    """Yield the items, and tell how many are done."""
    return measured(items, len(items), lambda item: 1, what, unit)


def measured(
    items: Iterable[T], total: float, size: Callable[[T], float], what: str, unit: str
) -> Iterator[T]:
    """Yield the items, and tell the sum of the sizes of those that are done."""
    done = 0.0
    for item in items:
        yield item
        done += size(item)
        tell(what, done, total, unit)


@contextmanager
def polled(what: str, size: Callable[[], float], unit: str) -> Iterator[None]:
    """Tell `size()` of the work in this block again and again, from another thread."""
    listener = _LISTENER.get()
    if listener is None:
        yield
        return
    ended = Event()

    def poll() -> None:
        while not ended.wait(POLL):
            listener(what, size(), 0, unit)

    thread = Thread(target=poll, daemon=True)
    thread.start()
    try:
        yield
    finally:
        ended.set()
        thread.join()


def duration(seconds: float) -> str:
    """Return "40 s", "12 min", "3.5 h" or "2.3 days"."""
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 2 * 86400 else f"{seconds / 86400:.1f} days"
