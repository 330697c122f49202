"""Synthetic scenes: coloured shapes that appear, move, change colour, show digits and leave.

A scene is exact in time. What a video or a training batch sees of it are its states at the frames' times, so the same
scene can be written as an mp4 at any rate and asked about at the frames that a model is given.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

SHAPES = ("circle", "square", "triangle", "star", "cross", "diamond")
COLOURS = {
    "red": (220, 40, 40),
    "green": (40, 180, 60),
    "blue": (50, 90, 230),
    "yellow": (240, 220, 40),
    "purple": (160, 60, 200),
    "orange": (245, 140, 20),
    "cyan": (60, 210, 220),
}
COLOUR_NAMES = tuple(COLOURS)

SIDE = 224
"""Pixels of a frame's side: 64 tokens, the fewest that preprocessing leaves a video frame."""
SPRITE = 70
"""Pixels of a shape's side."""
LANES = (0, 84, 154)
"""Each shape keeps to a lane of its own, so that none hides another."""
STEP = 14
"""Shapes stand on a grid of this many pixels, one patch: a shape with its digit is then one picture to learn, not one
for each way that patches cut it, and minutes of training are enough."""
MAX_TRACKS = len(LANES)
NO_DIGIT = -1


@dataclass(frozen=True)
class Track:
    """One shape's life. Times are seconds; changes are (from second, value), ascending, the first at `start`."""

    shape: int
    start: float
    end: float
    """The first moment at which the shape is gone."""
    colours: tuple[tuple[float, int], ...]
    digits: tuple[tuple[float, int], ...]
    """Empty: the shape carries no digit."""
    path: tuple[tuple[int, int], tuple[int, int]]
    """(column, row) in pixels of the upper left corner, at `start` and at `end`."""


@dataclass(frozen=True)
class Scene:
    duration: float
    tracks: tuple[Track, ...]
    background: int
    """Grey level."""


class States(NamedTuple):
    """What is to be seen at F moments of O shapes: int16 [F, O]. Where `visible` is 0 the rest means nothing."""

    visible: np.ndarray
    column: np.ndarray
    row: np.ndarray
    shape: np.ndarray
    colour: np.ndarray
    digit: np.ndarray


def states(scene: Scene, times: np.ndarray) -> States:
    """The scene at `times` [F], seconds."""
    rows = []
    for track in scene.tracks:
        share = np.clip((times - track.start) / max(track.end - track.start, 1e-6), 0, 1)
        (x0, y0), (x1, y1) = track.path
        rows.append(
            (
                (times >= track.start) & (times < track.end),
                np.rint((x0 + share * (x1 - x0)) / STEP) * STEP,
                np.rint((y0 + share * (y1 - y0)) / STEP) * STEP,
                np.full(len(times), track.shape),
                _value(track.colours, times),
                _value(track.digits, times) if track.digits else np.full(len(times), NO_DIGIT),
            )
        )
    return States(*np.array(rows, np.int16).transpose(1, 2, 0))


def _value(changes: tuple[tuple[float, int], ...], times: np.ndarray) -> np.ndarray:
    starts, values = np.array(changes).T
    return values[np.maximum(np.searchsorted(starts, times, side="right") - 1, 0)]


def sample_scene(rng: np.random.Generator, times: np.ndarray, duration: float) -> Scene:
    """A random scene for frames at `times` [F >= 4], ascending seconds.

    Every shape, colour phase and most digit phases last at least two frames, no two shapes share a form or ever a
    colour, and everything happens between two frames, never at one: the frames decide every question.
    """
    count = int(rng.integers(1, MAX_TRACKS + 1))
    shapes = rng.permutation(len(SHAPES))
    colours = list(rng.permutation(len(COLOURS)))
    lanes = rng.permutation(LANES)
    upright = rng.random() < 0.5
    tracks = []
    for i in range(count):
        first, last = _visible_frames(rng, len(times))
        start, end = _moment(rng, times, first, duration), _moment(rng, times, last + 1, duration)
        phases = [(start, int(colours.pop()))]
        if last - first >= 3 and rng.random() < 0.4:
            change = int(rng.integers(first + 2, last))
            phases.append((_moment(rng, times, change, duration), int(colours.pop())))
        ends = rng.integers(0, (SIDE - SPRITE) // STEP + 1, 2) * STEP
        lane, still = int(lanes[i]), rng.random() < 0.25
        along = (int(ends[0]), int(ends[0] if still else ends[1]))
        path = tuple((lane, at) if upright else (at, lane) for at in along)
        digits = _digits(rng, times, first, last, start, duration) if rng.random() < 0.6 else ()
        tracks.append(Track(int(shapes[i]), start, end, tuple(phases), digits, (path[0], path[1])))
    return Scene(duration, tuple(tracks), int(rng.integers(15, 60)))


def _visible_frames(rng: np.random.Generator, frames: int) -> tuple[int, int]:
    """First and last frame of a shape, at least two."""
    if rng.random() < 0.1:
        return 0, frames - 1
    first, last = sorted(rng.choice(frames, 2, replace=False))
    return int(first), int(last)


def _moment(rng: np.random.Generator, times: np.ndarray, frame: int, duration: float) -> float:
    """A moment after the frame before `frame` and not after `frame`, away from both; 0 and the end beyond the ends."""
    if frame == 0:
        return 0.0
    if frame == len(times):
        return max(duration, float(times[-1]) + 1e-3)
    before, after = float(times[frame - 1]), float(times[frame])
    return before + (after - before) * float(rng.uniform(0.2, 0.9))


def _digits(
    rng: np.random.Generator, times: np.ndarray, first: int, last: int, start: float, duration: float
) -> tuple[tuple[float, int], ...]:
    """Up to three different digits, each shown in at least two frames where there are enough."""
    values = rng.permutation(10)
    most = min(3, (last - first + 1) // 2)
    count = min(int(rng.integers(0, most)), max(0, last - first - 2))
    changes = sorted(rng.choice(range(first + 2, last), count, replace=False))
    moments = [start, *(_moment(rng, times, int(frame), duration) for frame in changes)]
    return tuple((moment, int(value)) for moment, value in zip(moments, values, strict=False))
