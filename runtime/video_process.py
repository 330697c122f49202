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
    count: int
    absent: int
    """Frames that the container's header declares but the file does not hold."""
    pts: np.ndarray
    """int64 [count], ascending, in time_base seconds; empty where the container has no usable times."""
    time_base: Fraction
    average_rate: Fraction | None


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
        size = os.path.getsize(path) if path else len(held)
        with self._watched(START_SECONDS + size / SLOWEST_BYTES):
            self._send({"path": path}, held)
            header, payload = self._receive("probe", 8 * MAX_PACKETS)
        pts = np.frombuffer(payload, np.int64)
        height, width, count = (int(header[name]) for name in ("height", "width", "count"))
        if not 0 < height * width <= MAX_FRAME_PIXELS or len(pts) not in (0, count) or count < 1:
            raise self._failure(f"it declares {count} frames of {width}x{height} pixels")
        rate = header["average_rate"]
        return Probe(
            height=height,
            width=width,
            count=count,
            absent=int(header["absent"]),
            pts=pts,
            time_base=Fraction(*header["time_base"]),
            average_rate=Fraction(*rate) if rate else None,
        )

    def frames(
        self, probe: Probe, numbers: np.ndarray, height: int, width: int, resample: str
    ) -> Iterator[tuple[int, int | None, np.ndarray]]:
        """Decode the frames `numbers` (ascending): yields (position in `numbers`, pts, uint8 [height,width,3]).

        Frames that cannot be decoded are left out. Raises InputError when the child dies or takes too long.
        """
        work = probe.count * probe.height * probe.width / SLOWEST_PIXELS
        seconds = min(START_SECONDS + work, MAX_CPU_SECONDS)
        request = {
            "height": height,
            "width": width,
            "resample": resample,
            "cpu_seconds": int(seconds) + 1,
        }
        last = -1
        with self._watched(seconds):
            self._send(request, array("q", numbers.tolist()).tobytes())
            while True:
                header, payload = self._receive("frame", height * width * 3)
                if header["kind"] == "done":
                    return
                slot = header["slot"]
                if not last < slot < len(numbers) or len(payload) != height * width * 3:
                    raise self._failure("the decoder sent an unexpected frame")
                last = slot
                yield slot, header["pts"], np.frombuffer(payload, np.uint8).reshape(height, width, 3)

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
                raise EOFError(f"{size} bytes where {most_bytes} are the most")
            payload = receive_payload(self._child.stdout, size)
        except (EOFError, ValueError):
            raise self._failure(self._death()) from None
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
