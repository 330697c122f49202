import io

import pytest

from runtime import progress
from runtime.progress import ProgressLine


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time in seconds, to be set by the test."""
    now = [100.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    return now


def test_a_short_stage_is_not_worth_a_line(clock: list[float]) -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for done in range(1, 11):
        clock[0] += 0.05
        line("reading", done, 10)
    assert stream.getvalue() == ""


def test_a_long_stage_is_logged_every_five_seconds_and_at_its_end(clock: list[float]) -> None:
    stream = io.StringIO()
    line = ProgressLine(stream)
    for done in range(13):
        line("reading", done, 12)
        clock[0] += 1
    assert stream.getvalue().splitlines() == [
        "[reading 1/12, 1 s]",
        "[reading 6/12, 6 s]",
        "[reading 11/12, 11 s]",
        "[reading 12/12, 12 s]",
    ]


def test_a_stage_without_known_end_is_announced_at_once(clock: list[float]) -> None:
    stream = io.StringIO()
    ProgressLine(stream)("compiling")
    assert stream.getvalue() == "[compiling ...]\n"


def test_on_a_terminal_the_line_is_rewritten_and_ended_once(clock: list[float]) -> None:
    stream = Terminal()
    line = ProgressLine(stream)
    for done in (0, 1, 2):
        line("reading", done, 2)
        clock[0] += 2
    line.close()
    line.close()
    assert stream.getvalue() == "\r\x1b[K[reading 1/2, 2 s]\r\x1b[K[reading 2/2, 4 s]\n"
