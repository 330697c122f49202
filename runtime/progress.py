"""Progress of long stages on stderr, for people: one line a stage, rewritten in place on a terminal."""

import sys
import time
from typing import TextIO

_TERMINAL_SECONDS = 0.1
_LOG_SECONDS = 5.0
_WORTH_A_LINE = 1.0


class ProgressLine:
    """Call it as often as you like with (stage, done, total); it prints as often as is useful.

    A total of 0 means that nothing more is heard until the stage is over: it is announced at once. Other stages show
    once they have lasted a second; then on a terminal the line is rewritten ten times a second, and a log gets a line
    every five seconds and one at the end.
    """

    def __init__(self, stream: TextIO | None = None):
        self._stream = stream or sys.stderr
        self._terminal = self._stream.isatty()
        self._interval = _TERMINAL_SECONDS if self._terminal else _LOG_SECONDS
        self._stage = ""
        self._started = self._printed = 0.0
        self._open = False

    def __call__(self, stage: str, done: int = 0, total: int = 0) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self.close()
            self._stage, self._started, self._printed = stage, now, 0.0
        if not total:
            self._write(f"[{stage} ...]")
            return
        elapsed = now - self._started
        if elapsed < _WORTH_A_LINE or (now - self._printed < self._interval and done < total):
            return
        self._printed = now
        self._write(f"[{stage} {done:,}/{total:,}, {elapsed:.0f} s]")

    def close(self) -> None:
        """Ends the line in progress, so that other output starts on a fresh one."""
        if self._open:
            self._stream.write("\n")
            self._stream.flush()
            self._open = False
        self._stage = ""

    def _write(self, line: str) -> None:
        self._stream.write(f"\r\x1b[K{line}" if self._terminal else f"{line}\n")
        self._stream.flush()
        self._open = self._terminal
