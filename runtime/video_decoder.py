"""The decoding child: `python -m runtime.video_decoder`, started by runtime.video_process.

FFmpeg parses hostile bytes in C, so it runs here: a process with neither model nor secrets, under limits, that the
parent may kill. PyAV is used directly: imageio's PyAV plugin takes the first video stream whatever it is (often a
cover picture), stops at the first damaged packet and hides packets and seeking, which timed decoding is made of.

Conversation over stdin and stdout. A message is the lengths of its two parts (uint32, uint64, little-endian), a JSON
object and a raw payload; nothing is pickled.
  parent: {"path"} or {"path": null} with the file as payload
  child:  {"kind": "probe", ...} with the presentation times (int64) of all frames, ascending, as payload
  parent: {"height", "width", "resample", "cpu_seconds"} with ascending frame numbers (int64) as payload
  child:  {"kind": "frame", "slot", "number"} with uint8 [height, width, 3] as payload, ...; {"kind": "done"}
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
ADDRESS_SPACE = 8 * 2**30
"""Bytes a child may map: a backstop for decoders gone wild, far above what 8K video takes."""
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
    """The next message's header and the length of its payload.

    Raises EOFError when the other side is gone and ValueError for what is no message.
    """
    header_bytes, payload_bytes = _LENGTHS.unpack(receive_payload(stream, _LENGTHS.size))
    if header_bytes > _MAX_HEADER:
        raise ValueError(f"a header of {header_bytes} bytes")
    header = json.loads(receive_payload(stream, header_bytes))
    if not isinstance(header, dict):
        raise ValueError("a header that is no object")
    return header, payload_bytes


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
    """(frame number, decode time) of every keyframe, ascending."""


class Reader:
    """One opening of the file: packets and frames of its picture stream from the start or from a keyframe on."""

    def __init__(self, handle: BinaryIO) -> None:
        import av
        from av.stream import Disposition

        # PyAV 19 took the option away and never fails on metadata.
        lenient: dict[str, Any] = {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}
        self._container = av.open(
            handle,
            "r",
            options={"max_pixels": str(MAX_FRAME_PIXELS)},
            container_options={"format_whitelist": DEMUXERS, "protocol_whitelist": "none"},
            io_open=_refuse,
            **lenient,
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

    @property
    def format(self) -> str:
        """The demuxer's name."""
        return self._container.format.name

    @property
    def duration(self) -> float:
        """Seconds that the container declares; 0 where it does not say."""
        return (self._container.duration or 0) / 1e6

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
        """Frames from the last keyframe at or before `position` (time_base units)."""
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
    for packet in reader.packets():
        if len(times) == MAX_PACKETS:
            raise UnreadableVideo(f"it has more than {MAX_PACKETS} frames; cut it into pieces")
        if packet.is_discard:  # hidden by an edit list
            continue
        times.append(packet.pts)
        if packet.is_keyframe and packet.pts is not None:
            keys.append((packet.pts, packet.pts if packet.dts is None else packet.dts))
    known = sorted(t for t in times if t is not None)
    # AVI numbers its packets in decoding order; the times that FFmpeg makes of that are wrong for reordered frames.
    timed = reader.format != "avi" and len(known) == len(times)
    if not timed or any(a == b for a, b in itertools.pairwise(known)):
        return Index(len(times), array.array("q"), [])
    ordered = [(bisect.bisect_left(known, pts), dts) for pts, dts in sorted(keys)]
    return Index(len(times), array.array("q", known), ordered)


class Frames:
    """Decoded frames with their numbers, seeking to keyframes as far as the container does that exactly."""

    def __init__(self, open_reader: Callable[[], Reader], index: Index) -> None:
        self._open_reader = open_reader
        self._index = index
        self._key_numbers = [number for number, _ in index.keys]
        self._seek_by_decode_time = False
        self._restart()

    def _restart(self) -> None:
        self._reader = self._open_reader()
        self._frames = self._reader.frames()
        self._position = -1

    def next_towards(self, number: int) -> tuple[int, Any] | None:
        """(number, frame) of the following frame, or of a later keyframe at or before frame `number`."""
        key = bisect.bisect_right(self._key_numbers, number) - 1
        if key >= 0 and self._key_numbers[key] > self._position + SEEK_GAIN:
            frame = self._seek(key)
        else:
            frame = next(self._frames, None)
        if frame is None:
            return None
        if len(self._index.pts) == 0 or frame.pts is None:
            self._position += 1
        else:
            self._position = bisect.bisect_left(self._index.pts, frame.pts)
        return min(self._position, self._index.count - 1), frame

    def _seek(self, key: int) -> Any:
        number, decode_time = self._index.keys[key]
        shown = self._index.pts[number]
        while True:
            self._frames = self._reader.seek(decode_time if self._seek_by_decode_time else shown)
            frame = next(self._frames, None)
            if frame is not None and frame.pts == shown:
                return frame
            if self._seek_by_decode_time:
                # Not exact by either time: from here on decode everything, from the start.
                self._key_numbers = []
                self._restart()
                return next(self._frames, None)
            self._seek_by_decode_time = True


def pick(open_reader: Callable[[], Reader], index: Index, numbers: array.array) -> Iterator[tuple[int, int, Any]]:
    """Yield (slot, number, frame) for the wanted frame numbers, in order, seeking where that skips enough.

    A frame that never comes out of the decoder (damaged, or hidden by the codec) is replaced by the next one, unless
    that one is wanted for a later slot; then its slot is left out.
    """
    frames, slot = Frames(open_reader, index), 0
    while slot < len(numbers) and (found := frames.next_towards(numbers[slot])):
        position, frame = found
        while slot < len(numbers) and numbers[slot] <= position:
            last = slot + 1 == len(numbers)
            if numbers[slot] == position or last or numbers[slot + 1] > position:
                yield slot, position, frame
            slot += 1


def serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """One conversation, as described at the top."""
    file, size = receive_header(requests)
    held = receive_payload(requests, size)
    set_limit("AS", ADDRESS_SPACE + 2 * len(held))
    set_limit("CPU", PROBE_CPU_SECONDS)

    def open_reader() -> Reader:
        return Reader(io.BytesIO(held) if file["path"] is None else _open_unnamed(file["path"]))

    with _explained():
        reader = open_reader()
        index = scan(reader)
        if index.count == 0:
            raise UnreadableVideo("its video stream has no frames")
        frame = next(open_reader().frames(), None)
        if frame is None:
            raise UnreadableVideo(
                f"none of its frames can be decoded; they are damaged or have more than {MAX_FRAME_PIXELS} pixels"
            )
    turn = round(-frame.rotation / 90) % 4
    send(replies, _probe_header(reader, index, frame, turn), memoryview(index.pts).cast("B"))

    plan, size = receive_header(requests)
    numbers = array.array("q", receive_payload(requests, size))
    set_limit("CPU", plan["cpu_seconds"])
    _exit_with_parent(requests)
    with _explained():
        for slot, number, frame in pick(open_reader, index, numbers):
            picture = render(frame, turn, plan["height"], plan["width"], plan["resample"])
            send(replies, {"kind": "frame", "slot": slot, "number": number}, picture)
    send(replies, {"kind": "done"})


@contextlib.contextmanager
def _explained() -> Iterator[None]:
    from av.error import FFmpegError

    try:
        yield
    except PermissionError as error:
        raise UnreadableVideo("it is a playlist or refers to other files; give the video itself") from error
    except FFmpegError as error:
        kinds = "mp4, mov, mkv, webm, avi, mpegts or gif"
        why = f"it is not a readable {kinds} file ({error.strerror}); convert it to mp4"
        raise UnreadableVideo(why) from error


def render(frame: Any, turn: int, height: int, width: int, resample: str) -> bytes:
    """RGB bytes of the frame, turned clockwise by `turn` quarters and resized."""
    from PIL import Image

    quarters = {1: Image.Transpose.ROTATE_270, 2: Image.Transpose.ROTATE_180, 3: Image.Transpose.ROTATE_90}
    plane = frame.reformat(format="rgb24").planes[0]
    # Not frame.to_image(): it copies row by row in Python and takes ten times as long as decoding.
    size = (frame.width, frame.height)
    picture = Image.frombytes("RGB", size, memoryview(plane), "raw", "RGB", plane.line_size, 1)
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
        "container": reader.format,
        "count": index.count,
        "duration": reader.duration,
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
