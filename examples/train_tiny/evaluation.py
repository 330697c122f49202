"""Exactness without generating: an answer comes out greedily if every one of its tokens is the likeliest."""

import numpy as np

from examples.train_tiny.data import Batch
from examples.train_tiny.questions import KINDS


def exact_answers(right: np.ndarray, batch: Batch) -> dict[str, np.ndarray]:
    """By kind of question, whether thinking and answer would come out exactly: bool [number of such questions].

    Args:
        right: bool [B, T], whether the likeliest token at a position is the true next one.
        batch: the batch that it was measured on.
    """
    found: dict[str, list[bool]] = {}
    for row, learned, segment, kinds in zip(right, batch.learned, batch.segment, batch.kinds, strict=True):
        for number, kind in enumerate(kinds[kinds >= 0], start=1):
            found.setdefault(KINDS[kind], []).append(bool(row[learned & (segment == number)].all()))
    return {kind: np.array(exact) for kind, exact in found.items()}
