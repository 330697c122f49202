"""Three position rows (time, row, column) of a prompt with vision tokens: MRoPE's input."""

from collections.abc import Sequence

import numpy as np

from runtime.errors import InputError


def position_ids(
    token_ids: np.ndarray,
    grids: np.ndarray | Sequence[Sequence[int]],
    *,
    image_token_id: int,
    video_token_id: int,
    merge_size: int = 2,
) -> tuple[np.ndarray, int]:
    """Positions of every prompt token, and what to add to a sequence index while decoding.

    A counter p starts at 0. A text token gets (p, p, p) and p grows by one. The pad tokens of one image or
    one frame, of merged size (h, w), get (p, p + R, p + C) for their cell (R, C), row-major, and p grows by
    max(h, w) once they are over (`get_rope_index_keye`).

    token_ids: int [T]. grids: int [M, 3], rows (t, patch rows, patch columns) in the order of the pad tokens,
    images and videos alike; a row with t > 1 stands for t frames of one size. Frames need no separator: their
    sizes split a run of pad tokens.

    Returns int32 [3, T] and delta: the token at sequence index n >= T has position n + delta on all rows.
    Raises InputError if the pad tokens are not exactly those that the grids ask for.
    """
    ids = np.asarray(token_ids)
    is_pad = (ids == image_token_id) | (ids == video_token_id)
    pads = np.flatnonzero(is_pad)
    rows, columns = _merged_sizes(grids, merge_size)
    sizes = rows * columns
    ends = np.cumsum(sizes)
    starts = ends - sizes
    _check_runs(ids, pads, starts, ends)

    # Inside a frame p stands still; its last token makes the whole step.
    step = np.where(is_pad, 0, 1)
    step[pads[ends - 1]] = np.maximum(rows, columns)
    p = np.cumsum(step) - step
    cell = np.arange(len(pads)) - np.repeat(starts, sizes)
    width = np.repeat(columns, sizes)
    positions = np.tile(p, (3, 1))
    positions[1, pads] += cell // width
    positions[2, pads] += cell % width
    delta = int(positions.max(initial=-1)) + 1 - len(ids)
    return positions.astype(np.int32), delta


def _merged_sizes(grids: np.ndarray | Sequence[Sequence[int]], merge_size: int) -> tuple[np.ndarray, np.ndarray]:
    """Token rows and columns of every frame, int64 [number of frames] each."""
    table = np.asarray(grids, np.int64).reshape(-1, 3)
    for t, height, width in table:
        if min(t, height, width) < 1 or height % merge_size or width % merge_size:
            raise InputError(
                f"grid (t={t}, {height} x {width} patches) is impossible: t must be positive, "
                f"patch rows and columns positive multiples of {merge_size}"
            )
    frames = np.repeat(table[:, 1:], table[:, 0], axis=0) // merge_size
    return frames[:, 0], frames[:, 1]


def _check_runs(ids: np.ndarray, pads: np.ndarray, starts: np.ndarray, ends: np.ndarray) -> None:
    """Each frame's pad tokens must be neighbours and of one kind, and none may be left over."""
    needed = int(ends[-1]) if len(ends) else 0
    if needed != len(pads):
        raise InputError(
            f"the prompt has {len(pads)} image/video pad tokens but its {len(starts)} images and frames "
            f"need {needed}: give one pad token per 2x2 patches of every image and frame"
        )
    if not len(starts):
        return
    first, last = pads[starts], pads[ends - 1]
    kinds = ids[pads]
    mixed = np.minimum.reduceat(kinds, starts) != np.maximum.reduceat(kinds, starts)
    for frame in np.flatnonzero((last - first != ends - starts - 1) | mixed)[:1]:
        raise InputError(
            f"image or frame {frame} needs {ends[frame] - starts[frame]} neighbouring pad tokens of one "
            f"kind from token {first[frame]} on, but the run is shorter or changes kind: mend the ids or the "
            "order of the media"
        )
