"""The decoding child: `python -m runtime.video_decoder`, started by runtime.video_process.

FFmpeg parses hostile bytes in C, so it runs here: a process with neither model nor secrets, under limits, that the
parent may kill. PyAV is used directly: imageio's PyAV plugin takes the first video stream whatever it is (often a
cover picture), stops at the first damaged packet and hides packets and seeking, which timed decoding is made of.

Conversation over stdin and stdout. A message is the lengths of its two parts (uint32, uint64, little-endian), a JSON
object and a raw payload; nothing is pickled.
  parent: {"path"} or {"path": null} with the file as payload
  child:  {"kind": "probe", ...} with the presentation times (int64) of all frames, ascending, as payload
  parent: {"height", "width", "resample", "cpu_seconds"} with ascending frame numbers (int64) as payload
  child:  {"kind": "frame", "slot", "pts"} with uint8 [height, width, 3] as payload, ...; {"kind": "done"}
The child may say {"kind": "error", "message"} instead of any reply.
"""

import array
import bisect
import contextlib
import io
import itertools
import json
import os
import struct
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

DEMUXERS = "mov,mp4,m4a,3gp,3g2,mj2,matroska,webm,avi,mpegts,gif"
MAX_FRAME_PIXELS = 8192 * 4352
"""Pixels of a decoded frame, before resizing: 8K."""
MAX_PACKETS = 2**22
"""Frames of a file: 38 hours at 30 a second."""
MAX_CPU_SECONDS = 24 * 3600
PROBE_CPU_SECONDS = 600
MAX_THREADS = 8
SEEK_GAIN = 24
"""Frames worth skipping: a seek flushes the decoder's pipeline, which costs about this many."""

_LENGTHS = struct.Struct("<IQ")
_MAX_HEADER = 2**16


class UnreadableVideo(Exception):
    """Why the file cannot be served, for a person."""


def send(stream: IO[bytes], header: dict[str, Any], payload: bytes | memoryview = b"") -> None:
    """Write one message and flush it."""
    text = json.dumps(header).encode()
    stream.write(_LENGTHS.pack(len(text), len(payload)) + text)
    stream.write(payload)
    stream.flush()


def receive_header(stream: IO[bytes]) -> tuple[dict[str, Any], int]:
    """The next message's header and the length of its payload. Raises EOFError when the other side is gone."""
    header_bytes, payload_bytes = _LENGTHS.unpack(receive_payload(stream, _LENGTHS.size))
    if header_bytes > _MAX_HEADER:
        raise EOFError(f"a header of {header_bytes} bytes")
    return json.loads(receive_payload(stream, header_bytes)), payload_bytes


def receive_payload(stream: IO[bytes], size: int) -> bytes:
    """Exactly `size` bytes. Raises EOFError when the stream ends before."""
    data = stream.read(size)
    if len(data) < size:
        raise EOFError(f"{len(data)} of {size} bytes")
    return data


@dataclass(frozen=True)
class Index:
    """What demuxing tells about the frames of one stream, in presentation order."""

    count: int
    pts: array.array
    """Presentation times in time_base units, strictly ascending; empty where the container has no usable ones."""
    keys: list[tuple[int, int]]
    """(frame number, where to seek to) of every keyframe, ascending."""
    stored: int
    """Packets found, those that an edit list hides included."""


class Reader:
    """One opening of the file: packets and frames of its picture stream from the start or from a keyframe on."""

    def __init__(self, handle: BinaryIO) -> None:
        import av
        from av.stream import Disposition

        self._container = av.open(
            handle,
            "r",
            options={"max_pixels": str(MAX_FRAME_PIXELS)},
            container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none"},
            metadata_errors="replace",
            io_open=_refuse,
        )
        streams = self._container.streams.video
        pictures = [stream for stream in streams if not stream.disposition & Disposition.attached_pic]
        if not pictures:
            raise UnreadableVideo("it holds no video, only other streams; give a file with moving pictures")
        self.stream = pictures[0]
        if self.stream.codec_context is None:
            raise UnreadableVideo("no decoder is installed for its video codec; convert it to H.264 mp4")
        self.stream.codec_context.options = {"max_pixels": str(MAX_FRAME_PIXELS)}
        self.stream.codec_context.thread_type = "AUTO"
        self.stream.codec_context.thread_count = min(MAX_THREADS, os.cpu_count() or 1)

    def packets(self) -> Iterator[Any]:
        """Data packets in file order. A damaged container ends early instead of raising."""
        from av.error import FFmpegError

        with contextlib.suppress(FFmpegError):
            yield from (p for p in self._container.demux(self.stream) if p.size)

    def frames(self) -> Iterator[Any]:
        """Decoded frames in presentation order; damaged packets are passed over."""
        from av.error import FFmpegError

        for packet in self.packets():
            with contextlib.suppress(FFmpegError):
                yield from packet.decode()
        with contextlib.suppress(FFmpegError):
            yield from self.stream.codec_context.decode(None)

    def seek(self, position: int) -> Iterator[Any]:
        """Frames from the last keyframe at or before `position` (time_base units of the packet order)."""
        from av.error import FFmpegError

        with contextlib.suppress(FFmpegError):
            self._container.seek(position, stream=self.stream)
            return self.frames()
        return iter(())


def _refuse(url: str, flags: int, options: dict[str, str]) -> BinaryIO:
    raise PermissionError("the file refers to another file")


def scan(reader: Reader) -> Index:
    """Read all packets, decoding none, and put them in presentation order."""
    times: list[int | None] = []
    keys: list[tuple[int, int]] = []
    stored = 0
    for packet in reader.packets():
        stored += 1
        if stored > MAX_PACKETS:
            raise UnreadableVideo(f"it has more than {MAX_PACKETS} frames; cut it into pieces")
        if packet.is_discard:
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            # Demuxers look up decode times; with the earlier of both, a seek never lands behind the keyframe.
            keys.append((packet.pts, packet.pts if packet.dts is None else min(packet.pts, packet.dts)))
    known = sorted(t for t in times if t is not None)
    if len(known) < len(times) or any(a == b for a, b in itertools.pairwise(known)):
        return Index(len(times), array.array("q"), [], stored)
    ordered = [(bisect.bisect_left(known, pts), position) for pts, position in sorted(keys)]
    return Index(len(times), array.array("q", known), ordered, stored)


def pick(open_reader: Callable[[], Reader], index: Index, numbers: array.array) -> Iterator[tuple[int, Any]]:
    """Yield (slot, frame) for the wanted frame numbers, in order, seeking where that skips enough.

    A frame that never comes out of the decoder (damaged, or hidden by the codec) is replaced by the next one, unless
    that one is wanted for a later slot; then its slot is left out.
    """
    timed = len(index.pts) > 0
    targets = [index.pts[number] for number in numbers] if timed else list(numbers)
    key_numbers = [number for number, _ in index.keys]
    reader = open_reader()
    frames, position, slot = enumerate(reader.frames()), -1, 0
    while slot < len(targets):
        key = bisect.bisect_right(key_numbers, numbers[slot]) - 1
        sought = key >= 0 and key_numbers[key] > position + SEEK_GAIN
        if sought:
            frames = enumerate(reader.seek(index.keys[key][1]))
        count, frame = next(frames, (0, None))
        if sought and (frame is None or frame.pts is None or frame.pts > index.pts[key_numbers[key]]):
            # The container cannot seek exactly: decode everything once instead, from the start.
            key_numbers, reader = [], open_reader()
            frames = enumerate(reader.frames())
            continue
        if frame is None:
            return
        now = frame.pts if timed else count
        if now is None:
            continue
        position = bisect.bisect_left(index.pts, now) if timed else count
        while slot < len(targets) and targets[slot] <= now:
            if targets[slot] == now or slot + 1 == len(targets) or targets[slot + 1] > now:
                yield slot, frame
            slot += 1


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """One conversation, as described at the top."""
    file, size = receive_header(requests)
    held = receive_payload(requests, size)
    set_limit("AS", 8 * 2**30 + 2 * len(held))
    set_limit("CPU", PROBE_CPU_SECONDS)

    def open_reader() -> Reader:
        return Reader(io.BytesIO(held) if file["path"] is None else _open_unnamed(file["path"]))

    from av.error import FFmpegError

    try:
        first = open_reader()
        index = scan(first)
        if index.count == 0:
            raise UnreadableVideo("its video stream has no frames")
        frame = next(open_reader().frames(), None)
        if frame is None:
            raise UnreadableVideo("none of its frames can be decoded; the file is damaged")
    except PermissionError as error:
        raise UnreadableVideo("it is a playlist or refers to other files; give the video itself") from error
    except FFmpegError as error:
        kinds = "mp4, mov, mkv, webm, avi, mpegts or gif"
        raise UnreadableVideo(f"it is not a readable {kinds} file ({error.strerror})") from error
    turn = round(-frame.rotation / 90) % 4
    send(replies, _probe_header(first, index, frame, turn), memoryview(index.pts).cast("B"))

    plan, size = receive_header(requests)
    numbers = array.array("q", receive_payload(requests, size))
    set_limit("CPU", plan["cpu_seconds"])
    _exit_with_parent(requests)
    for slot, frame in pick(open_reader, index, numbers):
        picture = render(frame, turn, plan["height"], plan["width"], plan["resample"])
        send(replies, {"kind": "frame", "slot": slot, "pts": frame.pts}, picture)
    send(replies, {"kind": "done"})


def render(frame: Any, turn: int, height: int, width: int, resample: str) -> bytes:
    """RGB bytes of the frame, turned clockwise by `turn` quarters and resized."""
    from PIL import Image

    quarters = {1: Image.Transpose.ROTATE_270, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_90}
    picture = frame.to_image()
    if turn:
        picture = picture.transpose(quarters[turn])
    return picture.resize((width, height), Image.Resampling[resample.upper()]).tobytes()


def _probe_header(reader: Reader, index: Index, frame: Any, turn: int) -> dict[str, Any]:
    base, rate = reader.stream.time_base, reader.stream.average_rate
    width, height = (frame.height, frame.width) if turn % 2 else (frame.width, frame.height)
    return {
        "kind": "probe",
        "width": width,
        "height": height,
        "count": index.count,
        "absent": max(0, reader.stream.frames - index.stored),
        "time_base": [base.numerator, base.denominator] if base else [1, 1],
        "average_rate": [rate.numerator, rate.denominator] if rate else None,
    }


def _open_unnamed(path: str) -> BinaryIO:
    # A handle opened from a descriptor has no name, so nothing in FFmpeg can take the file's name for a protocol.
    return os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_BINARY", 0)), "rb")


def set_limit(name: str, value: int) -> None:
    """Lower a soft resource limit of this process, where the system has it."""
    try:
        import resource
    except ImportError:  # Windows: the parent's wall clock is the only limit
        return
    kind = getattr(resource, f"RLIMIT_{name}")
    hard = resource.getrlimit(kind)[1]
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(kind, (value if hard < 0 else min(value, hard), hard))


def _exit_with_parent(requests: BinaryIO) -> None:
    # The parent keeps stdin open as long as it lives; decoding must not outlast it. Read without the stream's lock,
    # which a waiting thread would still hold when the interpreter shuts down.
    threading.Thread(target=lambda: (os.read(requests.fileno(), 1), os._exit(1)), daemon=True).start()


def main() -> None:
    """Serve the parent on stdin and stdout; what libraries print goes to stderr."""
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    set_limit("CORE", 0)
    set_limit("FSIZE", 2**20)
    try:
        serve(sys.stdin.buffer, replies)
    except UnreadableVideo as error:
        send(replies, {"kind": "error", "message": str(error)})
    except (EOFError, BrokenPipeError):
        sys.exit(1)  # the parent is gone or needs no more


if __name__ == "__main__":
    main()
