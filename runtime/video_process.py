"""The parent's side of the decoding child (runtime.video_decoder): start it, talk to it, end it."""

import importlib.util
import os
import signal
import subprocess
import sys
import tempfile
import threading
from array import array
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from types import TracebackType
from typing import Any, Self

import numpy as np

from runtime.errors import InputError
from runtime.video_decoder import (
    MAX_CPU_SECONDS,
    MAX_FRAME_PIXELS,
    MAX_PACKETS,
    receive_header,
    receive_payload,
    send,
)

SLOWEST_PIXELS = 2e7
"""Pixels decoded per second that even a slow core reaches: ten 1080p frames."""
SLOWEST_BYTES = 5e6
"""Bytes read per second that even a slow disk or network folder reaches."""
START_SECONDS = 60.0

# What a Python process needs to start and nothing that could be a secret. The arena limit keeps the allocator's
# reservations for a many-core machine's threads within the child's address space.
_KEPT_ENVIRONMENT = ("PATH", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "SYSTEMROOT", "TEMP", "TMP", "TMPDIR", "LANG")


@dataclass(frozen=True)
class Probe:
    """What a file holds, before any frame but the first is decoded."""

    height: int
    """As displayed: after rotation."""
    width: int
    container: str
    """FFmpeg's name of the file format."""
    count: int
    duration: float
    """Seconds that the container declares, of sound or picture; 0 where it does not say."""
    pts: np.ndarray
    """int64 [count], ascending, in time_base seconds; empty where the container has no usable times."""
    time_base: Fraction
    average_rate: Fraction | None


def _checked_probe(header: dict[str, Any], payload: bytes) -> Probe:
    # The child read hostile bytes: what it says is checked like any other input.
    rate = header["average_rate"]
    probe = Probe(
        height=int(header["height"]),
        width=int(header["width"]),
        container=str(header["container"]),
        count=int(header["count"]),
        duration=float(header["duration"]),
        pts=np.frombuffer(payload, np.int64),
        time_base=Fraction(*header["time_base"]),
        average_rate=Fraction(*rate) if rate else None,
    )
    sized = min(probe.height, probe.width) > 0 and probe.height * probe.width <= MAX_FRAME_PIXELS
    counted = 1 <= probe.count <= MAX_PACKETS and len(probe.pts) in (0, probe.count)
    timed = probe.time_base > 0 and bool((probe.pts[1:] > probe.pts[:-1]).all())
    if not (sized and counted and timed and (probe.average_rate is None or probe.average_rate > 0)):
        raise ValueError("out of range")
    return probe


class VideoProcess:
    """A decoding child for one video file. Use as a context manager: leaving it ends the child.

    source: absolute path of a file, or a file's bytes. label: what error messages call it. time_limit: seconds, or
    None for limits that scale with the file's length and pictures.
    """

    def __init__(self, source: str | bytes, label: str, time_limit: float | None) -> None:
        if importlib.util.find_spec("av") is None:
            raise InputError(f"{label}: reading videos needs PyAV; run: pip install 'keye-jax[video]'")
        self._label = label
        self._time_limit = time_limit
        self._overdue = False
        self._source = source
        self._stderr = tempfile.TemporaryFile()  # noqa: SIM115 - closed with the child
        environment = {name: os.environ[name] for name in _KEPT_ENVIRONMENT if name in os.environ}
        environment["PYTHONPATH"] = os.pathsep.join(os.path.abspath(folder) for folder in sys.path)
        environment["MALLOC_ARENA_MAX"] = "4"
        self._child = subprocess.Popen(
            [sys.executable, "-P", "-m", "runtime.video_decoder"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._stderr,
            env=environment,
            # Ctrl-C in a terminal reaches this process only, which then ends the child.
            start_new_session=True,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._child.kill()
        self._child.communicate()
        self._stderr.close()

    def probe(self) -> Probe:
        """Index the file. Raises InputError when it is not a video that can be served."""
        path, held = (self._source, b"") if isinstance(self._source, str) else (None, self._source)
        with self._watched(self._reading_seconds()):
            self._send({"path": path}, held)
            header, payload = self._receive("probe", 8 * MAX_PACKETS)
        try:
            return _checked_probe(header, payload)
        except (KeyError, TypeError, ValueError, ArithmeticError):
            raise self._failure("the decoder found no sensible size, times or rate in it") from None

    def frames(
        self, probe: Probe, numbers: np.ndarray, height: int, width: int, resample: str
    ) -> Iterator[tuple[int, int, np.ndarray]]:
        """Decode the frames `numbers` (ascending): yields (position in `numbers`, number, uint8 [height,width,3]).

        A frame that cannot be decoded is replaced by the next, whose number is given, or left out where that is
        asked for too. Raises InputError when the child dies or takes too long.
        """
        work = probe.count * probe.height * probe.width / SLOWEST_PIXELS
        seconds = min(self._reading_seconds() + work, MAX_CPU_SECONDS)
        request = {"height": height, "width": width, "resample": resample, "cpu_seconds": int(seconds) + 1}
        last = -1
        with self._watched(seconds):
            self._send(request, array("q", numbers.tolist()).tobytes())
            while True:
                header, payload = self._receive("frame", height * width * 3)
                if header["kind"] == "done":
                    return
                slot, number = header.get("slot"), header.get("number")
                if not (isinstance(slot, int) and last < slot < len(numbers)):
                    raise self._failure("the decoder sent a frame that was not asked for")
                if not (isinstance(number, int) and numbers[slot] <= number < probe.count):
                    raise self._failure("the decoder sent a frame that does not exist")
                if len(payload) != height * width * 3:
                    raise self._failure("the decoder sent a frame of the wrong size")
                last = slot
                yield slot, number, np.frombuffer(payload, np.uint8).reshape(height, width, 3)

    def _reading_seconds(self) -> float:
        size = os.path.getsize(self._source) if isinstance(self._source, str) else len(self._source)
        return START_SECONDS + size / SLOWEST_BYTES

    def _send(self, header: dict[str, Any], payload: bytes) -> None:
        assert self._child.stdin is not None
        try:
            send(self._child.stdin, header, payload)
        except BrokenPipeError:
            raise self._failure(self._death()) from None

    def _receive(self, kind: str, most_bytes: int) -> tuple[dict[str, Any], bytes]:
        assert self._child.stdout is not None
        try:
            header, size = receive_header(self._child.stdout)
            if size > most_bytes:
                raise ValueError(f"{size} bytes where {most_bytes} are the most")
            payload = receive_payload(self._child.stdout, size)
        except EOFError:
            raise self._failure(self._death()) from None
        except (ValueError, RecursionError):
            raise self._failure("the decoder sent what is no message") from None
        if header.get("kind") == "error":
            raise self._failure(" ".join(str(header.get("message")).split())[:300])
        if header.get("kind") not in (kind, "done"):
            raise self._failure("the decoder sent an unexpected message")
        return header, payload

    def _failure(self, cause: str) -> InputError:
        return InputError(f"{self._label} cannot be read as a video: {cause}")

    def _death(self) -> str:
        try:
            status = self._child.wait(timeout=5)
        except subprocess.TimeoutExpired:
            self._child.kill()
            status = self._child.wait()
        if self._overdue or status == -getattr(signal, "SIGXCPU", 0):
            return "decoding took too long; cut it shorter, or raise time_limit if one was given"
        self._stderr.seek(0)
        lines = self._stderr.read().decode(errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "no message")
        return f"the decoder stopped (status {status}: {last[:200]}); the file is damaged or too demanding"

    @contextmanager
    def _watched(self, seconds: float) -> Iterator[None]:
        """Kill the child if the block outlasts the limit; the reply then waited for ends in `_death`."""

        def end() -> None:
            self._overdue = True
            self._child.kill()

        timer = threading.Timer(min(seconds, self._time_limit or seconds), end)
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
