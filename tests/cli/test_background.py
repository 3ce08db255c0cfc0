"""modules/background.py: files are written while others are made; messages keep their order."""

from threading import Event, get_ident

import pytest
from support.load_script import script

background = script("modules/background")


def test_file_is_written_while_the_caller_goes_on_and_reported_by_the_caller():
    may_end, told = Event(), []

    def write() -> int:
        assert may_end.wait(30)
        return get_ident()

    with background.BackgroundWriter() as writer:
        writer.start(write, lambda thread: told.append((thread, get_ident())))
        assert not writer.is_ready
        may_end.set()
        writer.finish()
        ((thread, reporter),) = told
        assert thread != reporter == get_ident()
        writer.finish()
    assert len(told) == 1


def test_reports_keep_the_order_of_the_files():
    events = []

    def writes(name: str):
        return lambda: events.append(f"write {name}") or name

    with background.BackgroundWriter() as writer:
        for name in "abc":
            events.append(f"make {name}")
            writer.start(writes(name), lambda name: events.append(f"report {name}"))
    assert [e for e in events if e.startswith("report")] == ["report a", "report b", "report c"]
    assert events.index("report a") < events.index("write b")  # one file at a time


@pytest.mark.parametrize("at", ["ready", "next", "end"])
def test_error_of_writing_is_raised_by_the_caller(at):
    def fail() -> None:
        raise OSError(28, "No space left on device", "a.png")

    reported = []
    with pytest.raises(OSError, match="No space left"), background.BackgroundWriter() as writer:
        writer.start(fail, reported.append)
        if at == "ready":
            background.wait([writer.pending[0]])
            assert writer.is_ready
            writer.finish()
        if at == "next":
            writer.start(lambda: "b.png", reported.append)
    assert reported == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, ValueError])
def test_finished_file_is_reported_when_the_caller_fails(error):
    reported = []
    with pytest.raises(error), background.BackgroundWriter() as writer:
        writer.start(lambda: "a.png", reported.append)
        raise error
    assert reported == ["a.png"]
