"""The options of one image and of one video, checked when they are made.

Both are frozen and belong to one media item: nothing is shared between items. The caps are hard: a request can
ask for less than the default or a little more, never for more than a host can bear.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, Self, get_args

from runtime import sizing
from runtime.errors import InputError

MAX_VIDEO_TOTAL_PIXELS = 262_144 * sizing.TOKEN_PIXELS
"""One context length of visual tokens: no longer video could be read by the model."""
MAX_FRAMES = MAX_VIDEO_TOTAL_PIXELS // sizing.FRAME_MIN_PIXELS

TimestampSource = Literal["pts", "avg-fps"]
Resample = Literal["bilinear", "bicubic"]
Adaptive = Literal["off", "server", "paper"]


class _Options:
    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> Self:
        """The options in a JSON object. Raises InputError for an unknown key or a value out of range."""
        if not isinstance(mapping, Mapping):
            raise InputError(f"media options must be an object of names and values, not {mapping!r:.60}")
        known = [field.name for field in fields(cls)]  # pyright: ignore[reportArgumentType]
        for key in mapping:
            if key not in known:
                raise InputError(f"unknown media option {key!r:.60}; allowed: {', '.join(known)}")
        return cls(**mapping)


@dataclass(frozen=True)
class ImageOptions(_Options):
    """How one image is sized. Areas in pixels after resizing; 784 pixels are one token."""

    min_pixels: int = sizing.IMAGE_MIN_PIXELS
    max_pixels: int = sizing.IMAGE_MAX_PIXELS

    def __post_init__(self) -> None:
        _check_whole("max_pixels", self.max_pixels, sizing.TOKEN_PIXELS, sizing.IMAGE_MAX_PIXELS)
        _check_whole("min_pixels", self.min_pixels, 1, self.max_pixels)


@dataclass(frozen=True)
class VideoOptions(_Options):
    """How one video is sampled and sized. None stands for the official default named in the field's note."""

    fps: float | None = None
    """Frames taken per second: 2, or the video's own rate where that is lower. A FrameList says what it means
    for images."""
    min_frames: int = sizing.DEFAULT_MIN_FRAMES
    max_frames: int | None = None
    """As many as the budget allows at 64 tokens a frame."""
    min_pixels: int | None = None
    """Least area of a frame: 50,176 (64 tokens), which is also the least that can be asked for."""
    max_pixels: int | None = None
    """Largest area of a frame: 200,704 (256 tokens)."""
    video_total_pixels: int = sizing.VIDEO_TOTAL_PIXELS
    """Area of all frames together."""
    video_start: float | None = None
    """Seconds; frames shown earlier are left out. Timestamps still count from the start of the file."""
    video_end: float | None = None
    """Seconds; frames shown later are left out."""
    timestamp_source: TimestampSource = "pts"
    """pts: when the frame is shown, from the first frame on. avg-fps: frame number / average rate, as the official
    server has it; wrong where the frame rate varies."""
    resample: Resample = "bilinear"
    """Both are antialiased."""
    adaptive_budget: Adaptive = "off"
    """A smaller budget for a shorter video: the official server's table or the paper's."""
    time_limit: float | None = None
    """Seconds that reading the file may last; None: a limit that grows with the video's length and size."""

    def __post_init__(self) -> None:
        _check_real("fps", self.fps, 1e-4, 1000)
        _check_whole("max_frames", self.max_frames, 1, MAX_FRAMES, optional=True)
        _check_whole("min_frames", self.min_frames, 1, self.max_frames or MAX_FRAMES)
        _check_whole("max_pixels", self.max_pixels, 1, sizing.IMAGE_MAX_PIXELS, optional=True)
        largest = self.max_pixels or sizing.IMAGE_MAX_PIXELS
        _check_whole("min_pixels", self.min_pixels, 1, largest, optional=True)
        _check_whole("video_total_pixels", self.video_total_pixels, sizing.FRAME_MIN_PIXELS, MAX_VIDEO_TOTAL_PIXELS)
        _check_real("video_start", self.video_start, 0, 1e9)
        _check_real("video_end", self.video_end, self.video_start or 0, 1e9)
        _check_real("time_limit", self.time_limit, 0.1, 1e6)
        _check_choice("timestamp_source", self.timestamp_source, get_args(TimestampSource))
        _check_choice("resample", self.resample, get_args(Resample))
        _check_choice("adaptive_budget", self.adaptive_budget, get_args(Adaptive))


def _check_whole(name: str, value: object, low: int, high: int, *, optional: bool = False) -> None:
    if value is None and optional:
        return
    if isinstance(value, bool) or not isinstance(value, int) or not low <= value <= high:
        raise InputError(f"media option {name} is {value!r:.60}; it must be a whole number from {low} to {high}")


def _check_real(name: str, value: float | None, low: float, high: float) -> None:
    if value is None:
        return
    real = isinstance(value, int | float) and not isinstance(value, bool)
    if not real or not low <= value <= high:  # refuses NaN too
        raise InputError(f"media option {name} is {value!r:.60}; it must be a number from {low:g} to {high:g}")


def _check_choice(name: str, value: object, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise InputError(f"media option {name} is {value!r:.60}; it must be one of {', '.join(allowed)}")
