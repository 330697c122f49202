"""How large an image becomes, which frames of a video are taken and how large they are: arithmetic only.

Sides are multiples of 28 pixels because one language token is a 2x2 block of 14x14 patches, so 784 pixels are
one token. The rules are those of the official server's image and adaptive-video preprocessing.
"""

import math
from dataclasses import dataclass

import numpy as np

from runtime.errors import InputError

FACTOR = 28
TOKEN_PIXELS = FACTOR * FACTOR
MAX_RATIO = 200

IMAGE_MIN_PIXELS = 4 * TOKEN_PIXELS
IMAGE_MAX_PIXELS = 20_480 * TOKEN_PIXELS
FRAME_MIN_PIXELS = 64 * TOKEN_PIXELS
FRAME_MAX_PIXELS = 256 * TOKEN_PIXELS
VIDEO_TOTAL_PIXELS = 184_320 * TOKEN_PIXELS
DEFAULT_FPS = 2.0
DEFAULT_MIN_FRAMES = 2

# Share of the pixel budget that a video may use, by its duration: rows (up to this many seconds, share).
ADAPTIVE_SHARES: dict[str, tuple[tuple[float, float], ...]] = {
    "off": (),
    "server": ((259, 0.09), (518, 0.18), (1036, 0.36), (2016, 0.7)),
    "paper": ((256, 0.125), (512, 0.25), (1024, 0.5)),
}


@dataclass(frozen=True)
class FramePlan:
    """Which frames of a video are taken and the size they are given."""

    indices: np.ndarray
    """int64 [n], ascending frame numbers in 0..N-1."""
    height: int
    width: int

    @property
    def tokens(self) -> int:
        """Language tokens of all frames together (placeholders only, without timestamps)."""
        return len(self.indices) * self.height * self.width // TOKEN_PIXELS


def smart_resize(height: int, width: int, *, factor: int = FACTOR, min_pixels: int, max_pixels: int) -> tuple[int, int]:
    """The (height, width) an image is resized to: multiples of `factor`, aspect kept as far as that allows.

    The area lands in [min_pixels, max_pixels], except that a side never falls below `factor` and that only one
    of the two limits is applied. Raises InputError for an empty image or an aspect ratio above 200.
    """
    if height < 1 or width < 1:
        raise InputError(f"an image of {width}x{height} pixels is empty; give one of at least 1x1")
    if max(height, width) / min(height, width) > MAX_RATIO:
        raise InputError(f"{width}x{height} pixels is too elongated (sides may differ {MAX_RATIO}-fold); crop it")
    rows = max(factor, round(height / factor) * factor)
    columns = max(factor, round(width / factor) * factor)
    if rows * columns > max_pixels:
        shrink = math.sqrt(height * width / max_pixels)
        rows = math.floor(height / shrink / factor) * factor
        columns = math.floor(width / shrink / factor) * factor
    elif rows * columns < min_pixels:
        grow = math.sqrt(min_pixels / (height * width))
        rows = math.ceil(height * grow / factor) * factor
        columns = math.ceil(width * grow / factor) * factor
    return max(rows, factor), max(columns, factor)


def frame_budget(duration: float, *, total_pixels: int = VIDEO_TOTAL_PIXELS, adaptive: str = "off") -> int:
    """Pixels that all frames of a video of `duration` seconds share; `adaptive` is a name in ADAPTIVE_SHARES."""
    for seconds, share in ADAPTIVE_SHARES[adaptive]:
        if duration <= seconds:
            return int(total_pixels * share)
    return total_pixels


def frame_count(
    total: int,
    average_fps: float,
    *,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    budget: int = VIDEO_TOTAL_PIXELS,
) -> int:
    """How many of `total` frames are taken. The frame budget caps it: no frame gets fewer than 64 tokens."""
    cap = max(1, budget // FRAME_MIN_PIXELS)
    rate = min(fps or DEFAULT_FPS, average_fps)
    wanted = max(int(total / average_fps * rate), min_frames or DEFAULT_MIN_FRAMES)
    return min(wanted, max_frames or cap, cap, total)


def frame_indices(total: int, count: int) -> np.ndarray:
    """int64 [count]: `count` frame numbers spread evenly over 0..total-1, both ends included.

    The official code rounds torch's float32 linspace, which differs from numpy's float64 one on some indices.
    That linspace walks up from the start in its first half and down from the end in the second, each value with
    a single rounding; float64 holds the products of float32 step and k exactly, so one cast reproduces it. Close
    to one frame per index the rounding can take a frame twice; so does the official code.
    """
    if count == 1:
        return np.zeros(1, np.int64)
    last = total - 1
    step = np.float64(np.float32(last / (count - 1)))
    k = np.arange(count)
    positions = np.where(k < count // 2, step * k, last - step * (count - 1 - k)).astype(np.float32)
    return np.clip(np.rint(positions), 0, last).astype(np.int64)


def frame_size(
    height: int,
    width: int,
    count: int,
    *,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    budget: int = VIDEO_TOTAL_PIXELS,
) -> tuple[int, int]:
    """The (height, width) of each of `count` frames whose source is height x width pixels.

    All frames together exceed the budget by at most one token each, and by a row and a column of tokens each where
    a picture below the least size is enlarged. Raises InputError when an elongated picture cannot meet its share,
    because its short side cannot fall below 28 pixels.
    """
    least = max(min_pixels or FRAME_MIN_PIXELS, FRAME_MIN_PIXELS)
    least_tokens = least // TOKEN_PIXELS
    most_tokens = max(least_tokens, (max_pixels or FRAME_MAX_PIXELS) // TOKEN_PIXELS)
    share = min(most_tokens, max(least_tokens, budget // (TOKEN_PIXELS * count) + 1))
    rows, columns = smart_resize(height, width, min_pixels=least, max_pixels=TOKEN_PIXELS * share)
    if rows * columns > TOKEN_PIXELS * share and min(rows, columns) == FACTOR:
        raise InputError(
            f"a {width}x{height} video is too elongated for {count} frames of at most {share} tokens; "
            "take fewer frames (fps, max_frames) or crop it"
        )
    return rows, columns


def plan_frames(
    total: int,
    average_fps: float,
    height: int,
    width: int,
    *,
    fps: float | None = None,
    min_frames: int | None = None,
    max_frames: int | None = None,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
    total_pixels: int = VIDEO_TOTAL_PIXELS,
    adaptive: str = "off",
) -> FramePlan:
    """Frames and their size for a video of `total` >= 1 frames of height x width pixels at `average_fps`."""
    budget = frame_budget(total / average_fps, total_pixels=total_pixels, adaptive=adaptive)
    count = frame_count(total, average_fps, fps=fps, min_frames=min_frames, max_frames=max_frames, budget=budget)
    rows, columns = frame_size(height, width, count, min_pixels=min_pixels, max_pixels=max_pixels, budget=budget)
    return FramePlan(frame_indices(total, count), rows, columns)
