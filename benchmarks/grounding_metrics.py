"""Temporal grounding's arithmetic: overlaps of spans, and what they come to over many items."""

from collections.abc import Sequence

import numpy as np

from runtime.spans import Span

THRESHOLDS = (0.3, 0.5, 0.7)
RESAMPLES = 2000


def iou(one: Span | None, other: Span) -> float:
    """Length of the intersection over length of the union; 0 without a span. Two equal moments overlap wholly."""
    if one is None:
        return 0.0
    inside = min(one[1], other[1]) - max(one[0], other[0])
    whole = max(one[1], other[1]) - min(one[0], other[0])
    if whole <= 0:
        return 1.0
    return max(0.0, inside) / whole


def same_answer(given: str, true: str) -> bool:
    """Equal words, whatever their case, spaces and punctuation at the end."""
    return _words(given) == _words(true)


def _words(text: str) -> list[str]:
    return [word for part in text.lower().split() if (word := part.strip(".,;:!?'\"`*()"))]


def interval(values: Sequence[float], groups: Sequence[str], *, seed: int = 0) -> tuple[float, float, float]:
    """Mean and its 95 % bootstrap interval (mean, low, high).

    Whole groups are drawn, not single values: questions about one video are right or wrong together.

    Args:
        values: one for each item.
        groups: the item's group, its video.
    """
    names, member = np.unique(np.asarray(groups), return_inverse=True)
    sums = np.bincount(member, np.asarray(values, np.float64), len(names))
    counts = np.bincount(member, minlength=len(names))
    drawn = np.random.default_rng(seed).integers(0, len(names), (RESAMPLES, len(names)))
    means = sums[drawn].sum(1) / counts[drawn].sum(1)
    low, high = np.percentile(means, (2.5, 97.5))
    return float(sums.sum() / counts.sum()), float(low), float(high)
