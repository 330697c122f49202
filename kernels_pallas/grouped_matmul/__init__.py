"""Matrix products of row groups with a stack of matrices: the experts of a mixture-of-experts layer."""

from typing import Any

import jax

from kernels_pallas.grouped_matmul import reference


def grouped_matmul(
    x: jax.Array, w: jax.Array, layer: jax.Array | int, group_sizes: jax.Array, out_dtype: Any
) -> jax.Array:
    """Multiplies consecutive groups of rows, each with its own matrix.

    Args:
        x: [M, D] rows sorted by group.
        w: [L, E, D, F] matrices of all layers; passed whole so that no layer is copied out of the stack.
        layer: which layer's matrices, int32 scalar.
        group_sizes: [E] int32, rows per group; they sum to M.
        out_dtype: dtype of the result; products accumulate in float32.

    Returns:
        [M, F].

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim != 2 or w.ndim != 4 or w.shape[2] != x.shape[1] or group_sizes.shape != (w.shape[1],):
        raise ValueError(f"x {x.shape}, w {w.shape} and group_sizes {group_sizes.shape} do not fit")
    return reference.grouped_matmul(x, w, layer, group_sizes, out_dtype)
