"""Progress of long stages on stderr, for people: one line a stage, rewritten in place on a terminal."""

import sys
import time
from typing import TextIO

_TERMINAL_SECONDS = 0.1
_LOG_SECONDS = 5.0
_WORTH_A_LINE = 1.0


class StatusLine:
    """A line that says how something stands: rewritten in place on a terminal, added again and again to a log."""

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        self._written = 0.0
        self._open = False

    def due(self, now: float) -> bool:
        """Whether the line written last has stood long enough at time.monotonic() `now`."""
        return now - self._written >= self._interval

    def write(self, line: str, now: float) -> None:
        self._written = now
        self._stream.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._stream.flush()
        self._open = self._terminal

    def restart(self) -> None:
        """Makes the next line due at once."""
        self._written = 0.0

    def close(self) -> None:
        """Ends the line in progress, so that other output starts on a fresh one."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False


class ProgressLine(StatusLine):
    """Call it as often as you like with (stage, done, total); it prints as often as is useful.

    A total of 0 means that nothing more is heard until the stage is over: it is announced at once. Other stages show
    once they have lasted a second; then on a terminal the line is rewritten ten times a second, and a log gets a line
    every five seconds and one at the end.
    """

    def __init__(self, stream: TextIO | None = None):
        super().__init__(stream)
        self._stage = ""
        self._started = 0.0

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self.restart()
            self._stage, self._started = stage, now
        if not total:
            self.write(f"[{stage} ...]", now)
            return
        elapsed = now - self._started
        if elapsed < _WORTH_A_LINE or (not self.due(now) and done < total):
            return
        self.write(f"[{stage} {done:,}/{total:,}, {elapsed:.0f} s]", now)

    def close(self) -> None:
        """Ends the line in progress and the stage."""
        super().close()
        self._stage = ""
