"""Large matrices to 8 bits a weight and a scale for each output channel: on the host, the same bits on every machine.

Symmetric: the scale is the channel's largest magnitude divided by the largest number of the format; a weight becomes
the integer or the float8_e4m3fn nearest to weight / scale, ties to even. All of it in float32. The scales are no powers
of two: they multiply float32 products, where that would gain nothing.
"""

from collections.abc import Mapping

import ml_dtypes
import numpy as np

_LARGEST: Mapping[np.dtype, float] = {np.dtype(np.int8): 127.0, np.dtype(ml_dtypes.float8_e4m3fn): 448.0}
_PIECE_BYTES = 16 << 20
_TINY = np.finfo(np.float32).tiny


def quantise(weights: np.ndarray, contracted: tuple[int, ...], values: np.ndarray, scale: np.ndarray) -> None:
    """Fills `values` and `scale` in pieces that take 16 MiB, or what one index of the first output axis takes.

    Args:
        weights: finite, float32 or bfloat16.
        contracted: axes that a product sums over, counted from the last (-1).
        values: int8 or float8_e4m3fn, the shape of `weights`.
        scale: float32, that shape without the contracted axes.
    """
    outer = next(axis for axis in range(weights.ndim) if axis - weights.ndim not in contracted)
    rows = weights.shape[outer]
    step = max(1, _PIECE_BYTES // (4 * weights.size // rows))
    for first in range(0, rows, step):
        piece = (*[slice(None)] * outer, slice(first, first + step))
        wide = weights[piece].astype(np.float32)
        whole = _scales(wide, contracted, _LARGEST[values.dtype])
        scale[first : first + step] = whole.squeeze(contracted)
        wide /= whole
        if values.dtype == np.int8:
            np.rint(wide, out=wide)
        # Within the format: the scale's rounding lifts no quotient beyond the middle to what would follow the largest.
        values[piece] = wide


def _scales(wide: np.ndarray, contracted: tuple[int, ...], largest: float) -> np.ndarray:
    """Scales of a piece, the contracted axes kept with extent 1."""
    amax = np.maximum(wide.max(contracted, keepdims=True), -wide.min(contracted, keepdims=True))
    # Accelerators read subnormal numbers as zero, and zero divides nothing.
    return np.where(amax > 0, np.maximum(amax / np.float32(largest), _TINY), np.float32(1))
