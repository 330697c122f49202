"""Reading videos: the planned frames with their true times, in bounded memory, from nothing but the file given."""

import json
import os
import subprocess
import sys
from fractions import Fraction

import numpy as np
import pytest
from PIL import Image

from runtime import video_process
from runtime.errors import InputError
from runtime.media_options import MAX_FRAMES
from runtime.sizing import frame_indices
from runtime.video import FrameList, Video, VideoOptions, load_video, plan_video
from tests.runtime.media import (
    damage_packets,
    decode_all,
    encoded,
    numbered_picture,
    read_number,
    real_clip,
    turn_mp4,
    write_audio,
    write_repeated,
    write_video,
)

CONTAINERS = {
    "h264.mp4": {"g": "12"},
    "h264.mov": {"g": "12"},
    "h264.mkv": {"g": "12"},
    "open-gop.mkv": {"g": "12", "x264-params": "open-gop=1:scenecut=0"},
    "h264.avi": {"g": "12"},
    "h264.ts": {"g": "12"},
    "mpeg4.avi": {"codec": "mpeg4", "g": "12", "bf": "2"},
    "vp8.webm": {"codec": "libvpx", "g": "30", "auto-alt-ref": "1", "lag-in-frames": "10"},
    "vp9.webm": {"codec": "libvpx-vp9", "g": "30", "cpu-used": "8", "deadline": "realtime"},
    "mjpeg.mov": {"codec": "mjpeg", "pixels": "yuvj420p"},
    "anim.gif": {"codec": "gif", "pixels": "rgb8", "rate": 20},
}
IRREGULAR = [0, 40, 50, 200, 1000, 1010, 1500, 3000, 3100, 3333, 4000, 9000]


def numbers(video: Video) -> list[int]:
    return [read_number(frame) for frame in video.frames]


def times(video: Video) -> np.ndarray:
    assert video.timestamps is not None
    assert video.timestamps.dtype == np.float32
    return video.timestamps


@pytest.mark.parametrize("name", CONTAINERS)
def test_every_container_gives_the_planned_frames_at_their_times(name, tmp_path):
    path = write_video(tmp_path / name, 90, **CONTAINERS[name])
    rate = CONTAINERS[name].get("rate", 30)
    video = load_video(path)
    count = int(90 / rate * 2)
    assert video.plan.indices.tolist() == frame_indices(90, count).tolist() == numbers(video)
    # Matroska rounds times to milliseconds.
    np.testing.assert_allclose(times(video), video.plan.indices / rate, atol=6e-4)
    assert video.plan.total_frames == 90
    assert video.plan.fps == pytest.approx(rate)
    assert video.plan.duration == pytest.approx(90 / rate)
    assert video.plan.source_size == (96, 160)
    assert video.warnings == ()


def test_bytes_and_links_give_what_the_file_gives(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    (tmp_path / "link").symlink_to(path)
    wanted = load_video(path)
    for source in (str(path), path.read_bytes(), tmp_path / "link"):
        np.testing.assert_array_equal(load_video(source).frames, wanted.frames)


@pytest.mark.parametrize("name", ["bikes.mp4", "bigbuckbunny.mp4"])
def test_a_real_clip_equals_plain_decoding(name):
    video = load_video(real_clip(name))
    pictures, shown = decode_all(real_clip(name))
    assert video.plan.total_frames == len(pictures)
    height, width = video.plan.size
    for frame, time, index in zip(video.frames, times(video), video.plan.indices, strict=True):
        picture = Image.fromarray(pictures[index]).resize((width, height), Image.Resampling.BILINEAR)
        np.testing.assert_array_equal(frame, np.asarray(picture))
        assert time == np.float32(shown[index])


@pytest.mark.parametrize("name", ["a.mkv", "a.mp4"])
def test_variable_frame_rate_keeps_the_true_times(name, tmp_path):
    path = write_video(tmp_path / name, len(IRREGULAR), milliseconds=IRREGULAR)
    video = load_video(path, VideoOptions(min_frames=12))
    assert numbers(video) == list(range(12))
    assert times(video).tolist() == [np.float32(ms / 1000) for ms in IRREGULAR]
    assert video.plan.fps == pytest.approx(11 / 9)


def test_variable_frame_rate_is_sampled_evenly_by_frame_number(tmp_path):
    path = write_video(tmp_path / "a.mkv", len(IRREGULAR), milliseconds=IRREGULAR)
    video = load_video(path, VideoOptions(fps=100, max_frames=4))
    assert numbers(video) == frame_indices(12, 4).tolist() == [0, 4, 7, 11]
    assert times(video).tolist() == [0.0, 1.0, 3.0, 9.0]


def test_average_rate_timestamps_are_the_official_single_precision_division(tmp_path):
    path = write_video(tmp_path / "a.mkv", len(IRREGULAR), milliseconds=IRREGULAR)
    video = load_video(path, VideoOptions(min_frames=12, timestamp_source="avg-fps"))
    expected = np.arange(12, dtype=np.float32) / np.float32(video.plan.fps)
    assert times(video).tolist() == expected.tolist()


@pytest.mark.parametrize(
    ("start", "end", "expected"),
    [
        (0.05, None, range(2, 12)),
        (None, 1.0, range(5)),
        (1.0, 3.1, range(4, 9)),
        (8.5, 20, range(11, 12)),
    ],
)
def test_trimming_follows_true_times(start, end, expected, tmp_path):
    path = write_video(tmp_path / "a.mkv", len(IRREGULAR), milliseconds=IRREGULAR)
    video = load_video(path, VideoOptions(min_frames=12, video_start=start, video_end=end))
    assert numbers(video) == list(expected)
    assert times(video).tolist() == [np.float32(IRREGULAR[k] / 1000) for k in expected]


def test_trimming_a_constant_rate_video_samples_only_the_part(tmp_path):
    path = write_video(tmp_path / "a.mp4", 90)
    options = VideoOptions(video_start=1, video_end=2)
    video = load_video(path, options)
    assert numbers(video) == [30, 60]  # 31 frames, 1 s to 2 s, both ends included
    assert times(video).tolist() == [1.0, 2.0]
    assert video.plan.duration == pytest.approx(31 / 30)
    average = load_video(path, VideoOptions(video_start=1, video_end=2, timestamp_source="avg-fps"))
    assert times(average).tolist() == [1.0, 2.0]


def test_a_part_beyond_the_end_is_an_error_that_states_the_length(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    with pytest.raises(InputError, match=r"shows no frame from 5 s to the end; it lasts 1\.00 s"):
        load_video(path, VideoOptions(video_start=5))


@pytest.mark.parametrize("quarters", [1, 2, 3])
def test_a_phone_video_is_turned_as_its_metadata_says(quarters, tmp_path):
    picture = np.zeros((96, 160, 3), np.uint8)
    picture[:, :80] = 255
    picture[:32] //= 2
    path = write_video(tmp_path / "a.mp4", [picture] * 3)
    turn_mp4(path, quarters)
    video = load_video(path)
    upright = np.rot90(picture, -quarters)
    assert video.plan.source_size == upright.shape[:2]
    height, width = video.plan.size
    expected = Image.fromarray(upright).resize((width, height), Image.Resampling.BILINEAR)
    assert np.abs(video.frames[0].astype(int) - np.asarray(expected)).mean() < 5


def test_resampling_is_antialiased_bilinear_unless_bicubic_is_asked_for():
    pictures, _ = decode_all(real_clip())
    for name in ("bilinear", "bicubic"):
        video = load_video(real_clip(), VideoOptions(max_frames=2, resample=name))
        height, width = video.plan.size
        expected = Image.fromarray(pictures[0]).resize((width, height), Image.Resampling[name.upper()])
        np.testing.assert_array_equal(video.frames[0], np.asarray(expected))


def test_the_plan_is_what_gets_loaded_and_needs_no_decoding():
    plan = plan_video(real_clip())
    video = load_video(real_clip())
    assert plan.indices.tolist() == video.plan.indices.tolist()
    assert (len(plan.indices), *plan.size, 3) == video.frames.shape
    assert plan.tokens == video.frames[..., 0].size // 784
    assert plan.timestamps is not None
    assert plan.timestamps.tolist() == times(video).tolist()


def test_progress_counts_up_to_the_plan():
    seen = []
    video = load_video(real_clip(), progress=lambda done, total: seen.append((done, total)))
    assert seen == [(k + 1, len(video.frames)) for k in range(len(video.frames))]


def test_the_budget_bounds_frames_and_their_size(tmp_path):
    options = VideoOptions(fps=25, video_total_pixels=100 * 50_176)
    video = load_video(real_clip("bigbuckbunny.mp4"), options)
    assert len(video.frames) == 100
    assert video.frames[..., 0].size <= 100 * (50_176 + 784)


def test_options_that_cannot_be_met_leave_a_warning(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30)
    video = load_video(path, VideoOptions(min_frames=64))
    assert "30 frames instead of min_frames 64" in video.warnings[0]
    video = load_video(path, VideoOptions(max_pixels=10_000))
    assert "max_pixels 10000 raised to 50176" in video.warnings[0]


def test_damaged_frames_are_left_out_with_a_warning(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30, g="1", bf="0")
    damage_packets(path, range(10, 20))
    video = load_video(path, VideoOptions(fps=30))
    assert numbers(video) == [*range(10), *range(20, 30)]
    np.testing.assert_allclose(times(video), np.array(numbers(video)) / 30)
    assert "10 of 30 frames" in video.warnings[0]


def test_a_damaged_frame_is_replaced_by_the_next_where_that_is_free(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30, g="1", bf="0")
    damage_packets(path, [frame_indices(30, 4)[1]])
    video = load_video(path, VideoOptions(fps=4))
    assert video.plan.indices.tolist() == [0, 10, 19, 29]
    assert numbers(video) == [0, 11, 19, 29]
    assert times(video)[1] == np.float32(11 / 30)
    assert video.warnings == ()


def test_a_video_without_one_good_frame_is_an_error(tmp_path):
    path = write_video(tmp_path / "a.mp4", 30, g="1", bf="0")
    damage_packets(path, range(30))
    with pytest.raises(InputError, match="none of its frames can be decoded"):
        load_video(path)


def test_a_video_cut_short_says_so(tmp_path):
    path = write_video(tmp_path / "a.mp4", 90, g="10", container_options={"movflags": "faststart"})
    path.write_bytes(path.read_bytes()[: path.stat().st_size * 2 // 3])
    video = load_video(path, VideoOptions(fps=30))
    assert "declares 3.0 s but its pictures end at" in video.warnings[0]
    assert numbers(video) == list(range(len(video.frames)))
    assert 20 < len(video.frames) < 80


def test_a_video_stream_without_frames_is_an_error(tmp_path):
    import av

    with av.open(str(tmp_path / "a.avi"), "w") as output:
        stream = output.add_stream("mpeg4", rate=30)
        stream.width, stream.height, stream.pix_fmt = 160, 96, "yuv420p"
        output.start_encoding()
    with pytest.raises(InputError, match="has no frames"):
        load_video(tmp_path / "a.avi")


def test_frames_beyond_8k_are_refused(tmp_path):
    path = write_repeated(tmp_path / "a.mov", np.zeros((4400, 8200, 3), np.uint8), 1)
    with pytest.raises(InputError, match="or have more than 35651584 pixels"):
        load_video(path)


def test_a_cover_picture_is_not_the_video(tmp_path):
    import av
    from av.stream import Disposition

    cover = encoded(Image.fromarray(numbered_picture(999)), "JPEG")
    plain = write_video(tmp_path / "plain.mp4", 30)
    path = tmp_path / "covered.mp4"
    with av.open(str(plain)) as source, av.open(str(path), "w") as output:
        picture = output.add_stream("mjpeg", rate=1)
        picture.width, picture.height, picture.pix_fmt = 160, 96, "yuvj420p"
        picture.disposition = Disposition.attached_pic
        video = output.add_stream_from_template(source.streams.video[0])
        packet = av.Packet(cover)
        packet.stream, packet.pts, packet.dts, packet.time_base = picture, 0, 0, Fraction(1)
        output.mux(packet)
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = video
                output.mux(packet)
    assert numbers(load_video(path)) == [0, 29]


def test_sound_without_picture_is_an_error(tmp_path):
    with pytest.raises(InputError, match=r"sound\.mkv'.* holds no video"):
        load_video(write_audio(tmp_path / "sound.mkv"))


@pytest.mark.parametrize(
    "content",
    [
        b"#EXTM3U\n#EXTINF:1,\nfile:///etc/passwd\n#EXT-X-ENDLIST\n",
        b"ffconcat version 1.0\nfile '/etc/passwd'\n",
        b"<?xml version='1.0'?><MPD xmlns='urn:mpeg:dash:schema:mpd:2011'></MPD>",
        b"v=0\no=- 0 0 IN IP4 127.0.0.1\nm=video 5004 RTP/AVP 96\n",
        b"RIFF\0\0\0\0WAVEfmt ",
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        os.urandom(4096),
        b"\0",
    ],
    ids=["m3u8", "concat", "dash", "sdp", "wav", "png", "noise", "byte"],
)
@pytest.mark.parametrize("suffix", ["mp4", "m3u8"])
def test_playlists_and_other_formats_are_refused(content, suffix, tmp_path):
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(content)
    with pytest.raises(InputError, match="cannot be read as a video") as error:
        load_video(path)
    assert "\n" not in str(error.value)


def test_a_playlist_is_refused_although_what_it_lists_is_fine(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_video(tmp_path / "a.ts", 30)
    (tmp_path / "list.m3u8").write_text("#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\na.ts\n#EXT-X-ENDLIST\n")
    (tmp_path / "list.txt").write_text("ffconcat version 1.0\nfile a.ts\n")
    for name in ("list.m3u8", "list.txt"):
        with pytest.raises(InputError, match="not a readable"):
            load_video(name)


@pytest.mark.parametrize("name", ["<video0>", "concat:a.mp4|b.mp4", "file:a.mp4", "pipe:0", "-", "subfile,,a"])
def test_magic_strings_are_only_file_names(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = write_video(tmp_path / "a.mp4", 30)
    with pytest.raises(InputError, match="does not exist"):
        load_video(name)
    path.rename(tmp_path / name)
    assert numbers(load_video(name)) == [0, 29]


def test_urls_are_not_fetched():
    with pytest.raises(InputError, match="URLs are not fetched"):
        load_video("https://localhost/a.mp4")


def test_missing_empty_and_special_files_are_named(tmp_path):
    (tmp_path / "empty.mp4").touch()
    cases = {
        tmp_path / "missing.mp4": "does not exist",
        tmp_path / "empty.mp4": "empty",
        tmp_path: "not a regular",
    }
    for path, cause in cases.items():
        with pytest.raises(InputError, match=cause):
            load_video(path)
    with pytest.raises(InputError, match="0 bytes"):
        load_video(b"")
    with pytest.raises(InputError, match="cannot be a int"):
        load_video(5)  # pyright: ignore[reportArgumentType]


def test_without_pyav_the_mend_is_named(monkeypatch, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(InputError, match=r"pip install 'keye-jax\[video\]'"):
        load_video(path)


@pytest.fixture
def children(monkeypatch):
    """Every child process started during the test."""
    started = []
    popen = subprocess.Popen

    def record(*arguments, **options):
        started.append(popen(*arguments, **options))
        started[-1].environment = options["env"]
        return started[-1]

    monkeypatch.setattr(video_process.subprocess, "Popen", record)
    return started


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_the_child_ends_when_the_parent_is_interrupted(interruption, children):
    def interrupt(done: int, total: int) -> None:
        raise interruption

    with pytest.raises(interruption):
        load_video(real_clip(), progress=interrupt)
    assert [child.returncode is not None for child in children] == [True]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="named pipes are a POSIX thing")
def test_a_child_that_hangs_is_ended_at_the_time_limit(tmp_path, children):
    os.mkfifo(tmp_path / "pipe")
    with (
        video_process.VideoProcess(str(tmp_path / "pipe"), "'pipe'", 0.5) as process,
        pytest.raises(InputError, match="'pipe' cannot be read as a video: decoding took too long"),
    ):
        process.probe()
    assert children[0].returncode is not None


def test_the_child_sees_no_secrets_and_is_not_shared(children, monkeypatch):
    monkeypatch.setenv("SECRET_TOKEN", "abc")
    plan_video(real_clip())
    plan_video(real_clip())
    assert len(children) == 2
    assert all("SECRET_TOKEN" not in child.environment for child in children)


def test_a_child_that_dies_is_reported_in_one_line(children):
    def kill(done: int, total: int) -> None:
        children[0].kill()
        children[0].wait()

    with pytest.raises(InputError, match="the decoder stopped") as error:
        load_video(real_clip("bigbuckbunny.mp4"), VideoOptions(fps=25), progress=kill)
    assert "\n" not in str(error.value)


PROBE = {
    "kind": "probe",
    "width": 160,
    "height": 96,
    "container": "mov",
    "count": 2,
    "duration": 1,
    "time_base": [1, 30],
    "average_rate": [30, 1],
}
FRAME = {"kind": "frame", "slot": 0, "number": 0}
IMPOSTOR = """
import json, struct, sys
for header, size in json.loads(sys.argv[1]):
    text = json.dumps(header).encode()
    sys.stdout.buffer.write(struct.pack("<IQ", len(text), size) + text + bytes(min(size, 10**6)))
    sys.stdout.buffer.flush()
sys.stdin.buffer.read()
"""


@pytest.mark.parametrize(
    "messages",
    [
        [([], 0)],
        [({"kind": "frame"}, 0)],
        [({"kind": "probe"}, 0)],
        [(PROBE | {"count": -1}, 0)],
        [(PROBE | {"width": 10**6, "height": 10**6}, 0)],
        [(PROBE | {"time_base": [1, 0]}, 0)],
        [(PROBE | {"average_rate": [-1, 1]}, 0)],
        [(PROBE, 16)],
        [(PROBE, 2**60)],
        [(PROBE, 0), (FRAME | {"slot": 7}, 196 * 280 * 3)],
        [(PROBE, 0), (FRAME | {"slot": None}, 196 * 280 * 3)],
        [(PROBE, 0), (FRAME | {"number": 2}, 196 * 280 * 3)],
        [(PROBE, 0), (FRAME, 3)],
        [(PROBE, 0), (FRAME, 2**60)],
        [(PROBE, 0), (FRAME, 196 * 280 * 3), (FRAME, 196 * 280 * 3)],
        [(PROBE, 0), ({"kind": "done"}, 0)],
    ],
)
def test_a_child_taken_over_by_its_file_cannot_mislead_the_parent(messages, tmp_path, monkeypatch):
    path = tmp_path / "a.mp4"
    path.write_bytes(b"x")
    popen = subprocess.Popen
    command = [sys.executable, "-S", "-c", IMPOSTOR, json.dumps(messages)]
    monkeypatch.setattr(video_process.subprocess, "Popen", lambda _, **options: popen(command, **options))
    with pytest.raises(InputError):
        load_video(path)


MEASURE = """
import pathlib, re, resource, sys
from runtime.video import VideoOptions, load_video
video = load_video(sys.argv[1], VideoOptions(fps=30, max_pixels=50176))
assert len(video.frames) == 100
own = re.search(r"VmHWM:\\s+(\\d+) kB", pathlib.Path("/proc/self/status").read_text())[1]
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads Linux's process status")
def test_memory_is_bounded_by_the_plan_not_by_the_file(tmp_path):
    path = write_repeated(tmp_path / "a.mov", np.zeros((1080, 1920, 3), np.uint8), 100)
    result = subprocess.run([sys.executable, "-c", MEASURE, str(path)], capture_output=True, text=True, check=True)
    parent, child = (int(word) / 1024 for word in result.stdout.split())
    assert 1080 * 1920 * 3 * 100 / 2**20 > 590
    assert parent < 200
    assert child < 400


def test_a_frame_list_is_a_video_without_times():
    images = [numbered_picture(k) for k in range(5)]
    video = load_video(FrameList(images))
    assert numbers(video) == list(range(5))
    assert video.timestamps is None
    assert video.plan.source_size == (96, 160)


def test_a_frame_list_with_a_rate_or_times_has_timestamps(tmp_path):
    path = tmp_path / "a.png"
    Image.fromarray(numbered_picture(0)).save(path)
    images = [path, encoded(Image.fromarray(numbered_picture(1))), numbered_picture(2)]
    by_item = load_video(FrameList(images, fps=4))
    by_option = load_video(FrameList(images), VideoOptions(fps=4))
    assert times(by_item).tolist() == times(by_option).tolist() == [0.0, 0.25, 0.5]
    assert numbers(by_item) == [0, 1, 2]
    timed = load_video(FrameList(images, timestamps=[1.0, 1.5, 7.25]))
    assert times(timed).tolist() == [1.0, 1.5, 7.25]


def test_a_frame_list_is_thinned_and_trimmed_like_a_video():
    images = [numbered_picture(k) for k in range(40)]
    assert len(load_video(FrameList(images, fps=20), VideoOptions(fps=5)).frames) == 10
    trimmed = load_video(FrameList(images, fps=20), VideoOptions(fps=20, video_start=1, video_end=1.2))
    assert numbers(trimmed) == [20, 21, 22, 23, 24]
    with pytest.raises(InputError, match="has no times"):
        load_video(FrameList(images), VideoOptions(video_start=1))


def test_frames_of_a_list_are_resized_twice_as_officially():
    rng = np.random.default_rng(0)
    images = [rng.integers(0, 256, (600, 900, 3), np.uint8) for _ in range(3)]
    video = load_video(FrameList(images), VideoOptions(video_total_pixels=3 * 50_176))
    limited = Image.fromarray(images[1]).resize((532, 364), Image.Resampling.BICUBIC)
    height, width = video.plan.size
    assert (height, width) != (364, 532)
    expected = limited.resize((width, height), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(video.frames[1], np.asarray(expected))


def test_the_budget_holds_for_frame_lists_before_any_is_decoded(tmp_path, monkeypatch):
    path = tmp_path / "a.png"
    Image.new("RGB", (640, 480)).save(path)
    monkeypatch.setattr("runtime.video.render", None)
    plan = plan_video(FrameList([path] * 500), VideoOptions(video_total_pixels=100 * 50_176))
    assert len(plan.indices) == 100
    assert plan.tokens <= 100 * 65


@pytest.mark.parametrize(
    ("frames", "cause"),
    [
        (FrameList([]), "has 0 images"),
        (FrameList([np.zeros((30, 30, 3), np.uint8), np.zeros((30, 31, 3), np.uint8)]), "image 1 has 31x30"),
        (FrameList([np.zeros((30, 30, 3), np.uint8)], timestamps=[0, 1]), "1 ascending numbers"),
        (FrameList([np.zeros((30, 30, 3), np.uint8)] * 2, timestamps=[1, 0]), "ascending"),
        (FrameList([np.zeros((30, 30, 3), np.uint8)], timestamps=[float("nan")]), "ascending"),
        (FrameList([np.zeros((30, 30, 3), np.uint8)], timestamps=[0], fps=1), "both timestamps and fps"),
        (FrameList([np.zeros((30, 30, 3), np.uint8)], fps=0), "fps is 0"),
        (FrameList([np.zeros((1, 300, 3), np.uint8)]), "frame list: 300x1 pixels is too elongated"),
        (FrameList(["missing.png"]), "missing.png' does not exist"),
    ],
)
def test_frame_lists_that_cannot_be_served_are_refused(frames, cause):
    with pytest.raises(InputError, match=cause):
        load_video(frames)


def test_options_are_checked_by_name_type_and_range():
    official = {
        "fps": 1,
        "min_frames": 4,
        "max_frames": 16,
        "min_pixels": 50_176,
        "max_pixels": 100_352,
        "video_total_pixels": 10_000_000,
        "video_start": 0,
        "video_end": 2.5,
    }
    assert VideoOptions.from_mapping(official) == VideoOptions(**official)
    with pytest.raises(InputError, match="unknown media option 'nframes'; allowed: fps, min_frames"):
        VideoOptions.from_mapping({"nframes": 3})
    wrong = {
        "fps": (0, -1, "2", True, float("nan"), float("inf"), 10**400),
        "min_frames": (0, 1.0, None, MAX_FRAMES + 1),
        "max_frames": (0, "8", MAX_FRAMES + 1),
        "max_pixels": (0, 10**9),
        "video_total_pixels": (50_175, None, 10**9),
        "video_start": (-1, "0"),
        "video_end": (-1,),
        "timestamp_source": ("PTS", None, []),
        "resample": ("nearest",),
        "adaptive_budget": (True, "on"),
        "time_limit": (0,),
    }
    for name, values in wrong.items():
        for value in values:
            with pytest.raises(InputError, match=f"media option {name} is"):
                VideoOptions.from_mapping({name: value})
    for pair in ({"min_frames": 9, "max_frames": 8}, {"video_start": 2, "video_end": 1}):
        with pytest.raises(InputError, match="must be"):
            VideoOptions.from_mapping(pair)


def test_frames_read_with_imageio_stand_for_a_video() -> None:
    iio = pytest.importorskip("imageio.v3")
    frames = [frame for _, frame in zip(range(8), iio.imiter(real_clip(), plugin="pyav"), strict=False)]
    video = load_video(FrameList(frames, timestamps=[i / 10 for i in range(8)]), VideoOptions(fps=5))
    assert video.timestamps is not None
    assert 2 <= len(video.frames) == len(video.timestamps) <= 8
    assert video.frames.shape[1] % 28 == 0
