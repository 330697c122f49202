"""Videos: a file, its bytes or a list of images in; resized frames with their times out.

The file is indexed first, then frames and their size are planned, and only then is anything decoded, by a child
process that resizes each frame as it leaves the decoder. Memory here is the planned frames, whatever the file.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from runtime.errors import InputError
from runtime.images import ImageSource, check_file, describe, displayed_size, explained, open_image, render
from runtime.media_options import MAX_FRAMES, VideoOptions
from runtime.sizing import (
    DEFAULT_FPS,
    DEFAULT_MIN_FRAMES,
    FRAME_MAX_PIXELS,
    FRAME_MIN_PIXELS,
    FramePlan,
    plan_frames,
    smart_resize,
)
from runtime.video_process import Probe, VideoProcess

MAX_BYTES = 2 * 2**30
"""Size of a video given as bytes; files may be larger."""
MAX_LIST = 4 * MAX_FRAMES
"""Images in a list, before some are chosen."""
RATE_TOLERANCE = 0.01

Progress = Callable[[int, int], None]

__all__ = ["FrameList", "Video", "VideoOptions", "VideoPlan", "load_video", "plan_video"]


@dataclass(frozen=True)
class FrameList:
    """Images of one size that stand for a video, with the seconds of each or a rate, or without times.

    `fps` is the rate at which the images were taken. Where it is None the option `fps` is, as in the official
    server. All images are used up to the budget; together with `fps` or `timestamps` here, a lower option `fps`
    thins them out. The options `timestamp_source` and `time_limit` concern files only.
    """

    images: Sequence[ImageSource]
    timestamps: Sequence[float] | None = None
    fps: float | None = None


VideoSource = str | os.PathLike[str] | bytes | FrameList


@dataclass(frozen=True)
class VideoPlan:
    """What will be decoded: known before any frame is."""

    source_size: tuple[int, int]
    """(height, width) in the file, as displayed."""
    total_frames: int
    fps: float
    """Average rate of the whole file."""
    duration: float
    """Seconds of the part that is looked at: all, or video_start to video_end."""
    indices: np.ndarray
    """int64 [n], frame numbers from the start of the file in order of presentation."""
    timestamps: np.ndarray | None
    """float32 [n], seconds; None for images without times."""
    size: tuple[int, int]
    """(height, width) of every frame, multiples of 28."""
    warnings: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """Vision tokens of all frames, timestamps not counted."""
        return FramePlan(self.indices, *self.size).tokens


@dataclass(frozen=True)
class Video:
    """Decoded frames and the plan they were made by."""

    frames: np.ndarray
    """uint8 [n,H,W,3]. Fewer than planned where some could not be decoded; `warnings` then says so."""
    timestamps: np.ndarray | None
    """float32 [n], seconds; None for images without times."""
    plan: VideoPlan
    warnings: tuple[str, ...]


@dataclass(frozen=True)
class _Timeline:
    """When every frame of the source is shown."""

    times: np.ndarray | None
    """float64 [N], seconds from the first frame on, not descending; None where nothing is known."""
    count: int
    fps: float


def load_video(source: VideoSource, options: VideoOptions | None = None, *, progress: Progress | None = None) -> Video:
    """Decode the frames that the official sampling rule takes from a video.

    A str is the name of a local file, never a URL, playlist or device; mp4, mov, mkv, webm, avi, mpegts and gif
    are read. Frames are chosen evenly by number (not by time) also where the frame rate varies; their timestamps
    are true. `progress(done, total)` is called as frames arrive. Raises InputError for what cannot be served.
    """
    options = options or VideoOptions()
    if isinstance(source, FrameList):
        return _load_list(source, options, progress)
    with _open(source, options) as process:
        probe = process.probe()
        plan, times = _plan_file(probe, options, describe_video(source))
        planned, (height, width) = len(plan.indices), plan.size
        frames = np.empty((planned, height, width, 3), np.uint8)
        numbers: list[int] = []
        for slot, number, picture in process.frames(probe, plan.indices, height, width, options.resample):
            frames[len(numbers)] = picture
            numbers.append(number)
            if progress:
                progress(slot + 1, planned)
    label, warnings = describe_video(source), plan.warnings
    if not numbers:
        raise InputError(f"{label}: none of {planned} planned frames can be decoded; the file is damaged")
    if len(numbers) < planned:
        lost = planned - len(numbers)
        warnings += (f"{lost} of {planned} frames of {label} could not be decoded; the file is damaged",)
    return Video(frames[: len(numbers)], times[numbers], plan, warnings)


def plan_video(source: VideoSource, options: VideoOptions | None = None) -> VideoPlan:
    """What `load_video` would decode, without decoding it. Raises InputError as it would."""
    options = options or VideoOptions()
    if isinstance(source, FrameList):
        return _plan_list(source, options)[0]
    with _open(source, options) as process:
        return _plan_file(process.probe(), options, describe_video(source))[0]


def describe_video(source: VideoSource) -> str:
    """How an error message calls a video."""
    return "the given frame list" if isinstance(source, FrameList) else describe(source)


def _open(source: str | os.PathLike[str] | bytes, options: VideoOptions) -> VideoProcess:
    label = describe_video(source)
    if isinstance(source, bytes):
        if not 0 < len(source) <= MAX_BYTES:
            raise InputError(f"{label} are {len(source)} bytes; a video given as bytes has 1 to {MAX_BYTES}")
        return VideoProcess(source, label, options.time_limit)
    if not isinstance(source, str | os.PathLike):
        raise InputError(f"a video cannot be a {type(source).__name__}; give a path, bytes or a FrameList")
    check_file(source)
    return VideoProcess(os.path.abspath(os.fsdecode(source)), label, options.time_limit)


def _plan_file(probe: Probe, options: VideoOptions, label: str) -> tuple[VideoPlan, np.ndarray]:
    """The plan, and the timestamps of all frames of the file: float32 [N], seconds."""
    nominal = float(probe.average_rate) if probe.average_rate else None
    warnings = []
    if len(probe.pts):
        times = (probe.pts - probe.pts[0]) * float(probe.time_base)
    elif nominal:
        times = np.arange(probe.count) / nominal
        if probe.container != "avi":  # which has no other times
            warnings.append(f"{label} does not say when frames are shown; assuming {nominal:g} a second")
    else:
        raise InputError(f"{label} states neither frame times nor a frame rate; convert it to mp4")
    timeline = _Timeline(times, probe.count, _rate(times, nominal))
    ends = times[-1] + 1 / timeline.fps
    if probe.duration > ends * 1.05 + 1:  # a little more sound than picture is usual
        warnings.append(f"{label} declares {probe.duration:.1f} s but its pictures end at {ends:.1f} s; cut short?")
    size = (probe.height, probe.width)
    plan = _plan(timeline, size, size, options, options.fps, label, warnings)
    stamps = times.astype(np.float32)
    if options.timestamp_source == "avg-fps":
        # torchcodec's arithmetic: one float32 division.
        stamps = np.arange(probe.count, dtype=np.float32) / np.float32(timeline.fps)
    return replace(plan, timestamps=stamps[plan.indices]), stamps


def _plan(
    timeline: _Timeline,
    source_size: tuple[int, int],
    sized: tuple[int, int],
    options: VideoOptions,
    sampling: float | None,
    label: str,
    warnings: list[str],
) -> VideoPlan:
    """Trim, sample and size. `sized`: what the frame size is derived from; `sampling`: frames per second."""
    first, last = _kept(timeline, options, label)
    fps = timeline.fps if timeline.times is None else _rate(timeline.times[first:last], timeline.fps)
    try:
        chosen = plan_frames(
            last - first,
            fps,
            *sized,
            fps=sampling,
            min_frames=options.min_frames,
            max_frames=options.max_frames,
            min_pixels=options.min_pixels,
            max_pixels=options.max_pixels,
            total_pixels=options.video_total_pixels,
            adaptive=options.adaptive_budget,
        )
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    indices = first + chosen.indices
    if options.max_pixels and options.max_pixels < FRAME_MIN_PIXELS:
        warnings.append(f"max_pixels {options.max_pixels} raised to {FRAME_MIN_PIXELS}, the smallest frame")
    if options.min_frames > DEFAULT_MIN_FRAMES and len(indices) < options.min_frames:
        warnings.append(f"{len(indices)} frames instead of min_frames {options.min_frames}: no more fit or exist")
    return VideoPlan(
        source_size=source_size,
        total_frames=timeline.count,
        fps=timeline.fps,
        duration=(last - first) / fps,
        indices=indices,
        timestamps=None if timeline.times is None else timeline.times[indices].astype(np.float32),
        size=(chosen.height, chosen.width),
        warnings=tuple(warnings),
    )


def _rate(times: np.ndarray, nominal: float | None) -> float:
    """Average frames per second: the nominal rate where the times, perhaps rounded to milliseconds, agree."""
    if len(times) < 2 or times[-1] <= times[0]:
        return nominal or 1.0
    measured = (len(times) - 1) / (times[-1] - times[0])
    return nominal if nominal and abs(measured / nominal - 1) < RATE_TOLERANCE else float(measured)


def _kept(timeline: _Timeline, options: VideoOptions, label: str) -> tuple[int, int]:
    """First frame and one past the last frame shown from video_start to video_end, both included."""
    if options.video_start is None and options.video_end is None:
        return 0, timeline.count
    if timeline.times is None:
        raise InputError(f"{label} has no times to apply video_start and video_end to; give timestamps or fps")
    start, end = options.video_start or 0.0, options.video_end
    rounding = 1e-6
    first = int(np.searchsorted(timeline.times, start - rounding))
    last = timeline.count if end is None else int(np.searchsorted(timeline.times, end + rounding))
    if first >= last:
        until = "the end" if end is None else f"{end:g} s"
        lasts = timeline.count / timeline.fps
        raise InputError(f"{label} shows no frame from {start:g} s to {until}; it lasts {lasts:.2f} s")
    return first, last


def _plan_list(source: FrameList, options: VideoOptions) -> tuple[VideoPlan, tuple[int, int]]:
    """The plan, and the size under the frame limits that every image first gets."""
    label, count = describe_video(source), len(source.images)
    if not 0 < count <= MAX_LIST:
        raise InputError(f"{label} has {count} images; it may have 1 to {MAX_LIST}")
    timeline = _list_timeline(source, options, label)
    sizes = []
    for image in source.images:
        with open_image(image) as opened:
            sizes.append(displayed_size(opened))
    odd = next((k for k, size in enumerate(sizes) if size != sizes[0]), None)
    if odd is not None:
        (h0, w0), (h, w) = sizes[0], sizes[odd]
        raise InputError(f"{label}: image 0 has {w0}x{h0} pixels and image {odd} has {w}x{h}; give one size")
    least = max(options.min_pixels or 0, FRAME_MIN_PIXELS)
    most = max(options.max_pixels or FRAME_MAX_PIXELS, least)
    try:
        limited = smart_resize(*sizes[0], min_pixels=least, max_pixels=most)
    except InputError as error:
        raise InputError(f"{label}: {error}") from error
    return _plan(timeline, sizes[0], limited, options, options.fps or timeline.fps, label, []), limited


def _list_timeline(source: FrameList, options: VideoOptions, label: str) -> _Timeline:
    count = len(source.images)
    if source.timestamps is not None:
        if source.fps is not None:
            raise InputError(f"{label} has both timestamps and fps; give one of them")
        times = np.asarray(source.timestamps, np.float64)
        ascending = times.shape == (count,) and times[0] >= 0 and bool((np.diff(times) >= 0).all())
        if not ascending or not np.isfinite(times).all():
            raise InputError(f"{label}: timestamps must be {count} ascending numbers of seconds from 0 on")
        return _Timeline(times, count, _rate(times, None))
    rate = VideoOptions(fps=source.fps).fps or options.fps
    times = None if rate is None else np.arange(count) / rate
    return _Timeline(times, count, rate or DEFAULT_FPS)


def _load_list(source: FrameList, options: VideoOptions, progress: Progress | None) -> Video:
    plan, limited = _plan_list(source, options)
    frames = np.empty((len(plan.indices), *plan.size, 3), np.uint8)
    for done, number in enumerate(plan.indices):
        image = source.images[number]
        with open_image(image) as opened, explained(image):
            frames[done] = render(opened, [(limited, "bicubic"), (plan.size, options.resample)])
        if progress:
            progress(done + 1, len(frames))
    return Video(frames, plan.timestamps, plan, plan.warnings)
