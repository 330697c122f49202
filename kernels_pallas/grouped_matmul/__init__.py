"""Matrix products of row groups with a stack of matrices: the experts of a mixture-of-experts layer."""

from functools import partial
from typing import Any

import jax

from kernels_pallas.dispatch import dispatch
from kernels_pallas.grouped_matmul import gpu, gpu_rows, ragged, reference, tpu, tpu_rows
from kernels_pallas.quantized import Weights, check_scale


def grouped_matmul(
    x: jax.Array,
    w: Weights,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    out_dtype: Any,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """Multiplies consecutive groups of rows, each with its own matrix.

    Args:
        x: [M, D] rows sorted by group.
        w: [L, E, D, F] matrices of all layers; passed whole so that no layer is copied out of the stack. Stored with 8
            bits, they have a scale [L, E, F].
        layer: which layer's matrices, int32 scalar.
        group_sizes: [E] int32, rows per group; what the rows after their sum become is not defined.
        out_dtype: dtype of the result; products accumulate in float32.
        row_scale: [M] float32; multiplies each row of the product before it is rounded.

    Returns:
        [M, F].

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, w, group_sizes)
    if row_scale is not None and row_scale.shape != x.shape[:1]:
        raise ValueError(f"row_scale {row_scale.shape} does not fit x {x.shape}")
    body = gpu if gpu.supports(x, w, 1) else ragged
    scale = () if row_scale is None else (row_scale,)
    return dispatch(
        lambda x, w, layer, sizes, *scale: reference.grouped_matmul(x, w, layer, sizes, out_dtype, *scale),
        *(x, w, layer, group_sizes, *scale),
        cuda=partial(body.grouped_matmul, out_dtype=out_dtype),
        tpu=partial(tpu.grouped_matmul, out_dtype=out_dtype) if tpu.supports(x, w, 1) else None,
    )


def grouped_swiglu(x: jax.Array, w: Weights, layer: jax.Array | int, group_sizes: jax.Array) -> jax.Array:
    """silu(gate) * up of `grouped_matmul`, whose result is rounded to x's dtype in between.

    Args:
        x: [M, D] rows sorted by group.
        w: [L, E, D, 2F] matrices of all layers; gate is the first half of the columns, up the second.
        layer: which layer's matrices, int32 scalar.
        group_sizes: [E] int32, rows per group, as in `grouped_matmul`.

    Returns:
        [M, F] in x's dtype: computed in float32, rounded once.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(x, w, group_sizes)
    if w.shape[3] % 2:
        raise ValueError(f"w {w.shape} has no two halves of columns")
    body = gpu if gpu.supports(x, w, 2) else ragged
    on_tpu = tpu.grouped_swiglu if tpu.supports(x, w, 2) else None
    return dispatch(reference.grouped_swiglu, x, w, layer, group_sizes, cuda=body.grouped_swiglu, tpu=on_tpu)


def spread_rows(x: jax.Array, positions: jax.Array) -> jax.Array:
    """Copies row n of x to rows positions[n] of the result.

    Args:
        x: [N, D].
        positions: [N, k] int32; every number below N * k once.

    Returns:
        [N * k, D].

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim != 2 or positions.ndim != 2 or positions.shape[0] != x.shape[0]:
        raise ValueError(f"x {x.shape} and positions {positions.shape} do not fit")
    cuda = gpu_rows.spread_rows if gpu_rows.supports(x, positions) else reference.spread_rows
    return dispatch(reference.spread_rows, x, positions, cuda=cuda, tpu=tpu_rows.spread_rows)


def _check(x: jax.Array, w: Weights, group_sizes: jax.Array) -> None:
    if x.ndim != 2 or w.ndim != 4 or w.shape[2] != x.shape[1] or group_sizes.shape != (w.shape[1],):
        raise ValueError(f"x {x.shape}, w {w.shape} and group_sizes {group_sizes.shape} do not fit")
    check_scale(w, 2)
