"""Which frames of a clip a model is given, and when they are shown: what the runtime's own planning says."""

from dataclasses import dataclass

import numpy as np

from examples.train_tiny.scenes import SIDE
from runtime.sizing import plan_frames

SOURCE_RATES = (1, 2, 5, 8, 10, 25)
"""Frames per second of files. At 1 and 2 every frame is taken; others are thinned to uneven times."""
RATE_WEIGHTS = (0.4, 0.3, 0.05, 0.05, 0.15, 0.05)


@dataclass(frozen=True)
class Timeline:
    """A file of `total` frames at `rate` frames per second, of which `wanted` per second are asked for (None: the
    default)."""

    rate: int
    total: int
    wanted: float | None = None

    @property
    def duration(self) -> float:
        """Seconds."""
        return self.total / self.rate

    @property
    def file_times(self) -> np.ndarray:
        """Seconds of all frames of the file, float64 [total]."""
        return np.arange(self.total) / self.rate

    @property
    def times(self) -> np.ndarray:
        """Seconds of the frames that are taken, float32 [F]."""
        plan = plan_frames(self.total, self.rate, SIDE, SIDE, fps=self.wanted)
        return self.file_times[plan.indices].astype(np.float32)


def sample_timeline(rng: np.random.Generator, fewest: int, most: int) -> Timeline:
    """A random file of which `fewest` to `most` frames are taken."""
    rate = int(rng.choice(SOURCE_RATES, p=RATE_WEIGHTS))
    frames = int(rng.integers(fewest, most + 1))
    if rate <= 2:
        return Timeline(rate, frames)
    wanted = None if rng.random() < 0.5 else 1.0
    taken = wanted or 2
    # Any length from that of `frames` taken frames to just below that of one more.
    total = int(np.ceil(frames * rate / taken)) + int(rng.integers(0, max(1, rate // int(taken))))
    return Timeline(rate, total, wanted)
