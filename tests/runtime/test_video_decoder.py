"""Inside the decoding child: exact frames with few decoded, whatever the container's seeking is worth, and the wire."""

import array
import io

import numpy as np
import pytest

from runtime import video_decoder
from runtime.video_decoder import Reader, pick, receive_header, receive_payload, scan, send
from tests.runtime.media import read_number, write_video

FRAMES = 240


class CountingReader(Reader):
    """Counts decoded frames; may land `late` time units behind the wanted place when seeking."""

    decoded = 0
    opened = 0
    late = 0

    def __init__(self, handle) -> None:
        CountingReader.opened += 1
        super().__init__(handle)

    def frames(self):
        for frame in super().frames():
            CountingReader.decoded += 1
            yield frame

    def seek(self, position):
        return super().seek(position + self.late)


@pytest.fixture
def counter(monkeypatch):
    for name in ("decoded", "opened", "late"):
        monkeypatch.setattr(CountingReader, name, 0)
    return CountingReader


@pytest.fixture(scope="module")
def films(tmp_path_factory):
    folder = tmp_path_factory.mktemp("films")
    return {
        name: write_video(folder / name, FRAMES, g="40", **options)
        for name, options in {
            "a.mp4": {},
            "a.mkv": {},
            "open-gop.mkv": {"x264-params": "open-gop=1:scenecut=0"},
            "a.ts": {},
            "a.avi": {},
            "vp9.webm": {"codec": "libvpx-vp9", "cpu-used": "8", "deadline": "realtime"},
        }.items()
    }


def picked(path, wanted, reader=CountingReader):
    def open_reader():
        return reader(io.BytesIO(path.read_bytes()))

    index = scan(open_reader())
    assert index.count == FRAMES
    found = pick(open_reader, index, array.array("q", wanted))
    shown = [(slot, number, read_number(frame.to_ndarray(format="rgb24"))) for slot, number, frame in found]
    assert all(number == seen for _, number, seen in shown)
    return [(slot, number) for slot, number, _ in shown]


@pytest.mark.parametrize("name", ["a.mp4", "a.mkv", "open-gop.mkv", "a.ts", "vp9.webm"])
def test_far_frames_are_reached_by_seeking(name, films, counter):
    wanted = [0, 45, 123, 239]
    assert picked(films[name], wanted) == list(enumerate(wanted))
    assert counter.decoded < 160


@pytest.mark.parametrize("name", ["a.mp4", "open-gop.mkv", "a.ts", "a.avi"])
def test_any_choice_of_frames_is_exact(name, films, counter):
    rng = np.random.default_rng(0)
    for _ in range(4):
        wanted = sorted(rng.choice(FRAMES, 5, replace=False).tolist())
        assert picked(films[name], wanted) == list(enumerate(wanted))


def test_a_container_that_seeks_too_far_is_decoded_from_the_start(films, counter, monkeypatch):
    monkeypatch.setattr(counter, "late", 45 * 512)
    wanted = [0, 45, 123, 230]
    assert picked(films["a.mp4"], wanted) == list(enumerate(wanted))
    assert counter.opened == 3  # scan, first try, restart


def test_a_frame_wanted_twice_is_given_twice(films, counter):
    assert picked(films["a.mp4"], [5, 5, 6]) == [(0, 5), (1, 5), (2, 6)]


def test_no_more_packets_are_read_than_allowed(films, monkeypatch):
    monkeypatch.setattr(video_decoder, "MAX_PACKETS", FRAMES - 1)
    with pytest.raises(video_decoder.UnreadableVideo, match="more than 239 frames"):
        scan(Reader(io.BytesIO(films["a.mp4"].read_bytes())))


def test_references_to_other_files_are_refused():
    with pytest.raises(PermissionError):
        video_decoder._refuse("file:/etc/passwd", 1, {})


def test_messages_arrive_as_they_were_sent():
    stream = io.BytesIO()
    send(stream, {"kind": "frame", "name": "ü"}, b"payload")
    send(stream, {"kind": "done"})
    stream.seek(0)
    header, size = receive_header(stream)
    assert (header, receive_payload(stream, size)) == ({"kind": "frame", "name": "ü"}, b"payload")
    assert receive_header(stream) == ({"kind": "done"}, 0)
    with pytest.raises(EOFError):
        receive_header(stream)


def test_a_header_of_absurd_length_is_not_read():
    with pytest.raises(ValueError, match="a header of"):
        receive_header(io.BytesIO(b"\xff" * 12 + b"{}"))
