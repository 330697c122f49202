"""grouped_matmul in plain jnp: the specification and the fallback.

Rows are walked in tiles that each lie in one group, in ascending order. A tile that reaches past its group's end
writes rows of the next group, whose own tiles come later and overwrite them: no masks, no padding per group, and
only chosen experts are read.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import einsum_f32
from kernels_pallas.quantized import Weights, pick, scaled, values_of

ROW_TILE = 32


def grouped_matmul(
    x: jax.Array,
    w: Weights,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    out_dtype: Any,
    row_scale: jax.Array | None = None,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_matmul`."""
    M, D = x.shape
    F = w.shape[3]
    tile = min(ROW_TILE, M)
    padded = jnp.pad(x, ((0, tile), (0, 0)))
    row_scales = None if row_scale is None else jnp.pad(row_scale, (0, tile))
    tiles = (group_sizes + tile - 1) // tile
    tiles_end = jnp.cumsum(tiles)
    group_start = jnp.cumsum(group_sizes) - group_sizes

    def multiply(i: jax.Array, out: jax.Array) -> jax.Array:
        group = jnp.searchsorted(tiles_end, i, side="right")
        first = group_start[group] + (i - (tiles_end[group] - tiles[group])) * tile
        rows = lax.dynamic_slice(padded, (first, 0), (tile, D))
        # Tied to the turn: XLA's CPU backend would widen the whole stack once, ahead of the loop, and keep that.
        stack, group = lax.optimization_barrier((w, group))
        matrix = pick(stack, layer, group)
        product = scaled(einsum_f32("md,df->mf", rows, values_of(matrix, x.dtype)), matrix)
        if row_scales is not None:
            product = product * lax.dynamic_slice(row_scales, (first,), (tile,))[:, None]
        return lax.dynamic_update_slice(out, product.astype(out_dtype), (first, 0))

    return lax.fori_loop(0, tiles_end[-1], multiply, jnp.zeros((M + tile, F), out_dtype))[:M]


def grouped_swiglu(x: jax.Array, w: Weights, layer: jax.Array | int, group_sizes: jax.Array) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`."""
    return swiglu(grouped_matmul(x, w, layer, group_sizes, x.dtype))


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up for [N, 2F] with gate in the first half; computed in float32, rounded once."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def spread_rows(x: jax.Array, positions: jax.Array) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.spread_rows`."""
    N, k = positions.shape
    copies = jnp.repeat(x, k, axis=0)
    return jnp.zeros_like(copies).at[positions.reshape(N * k)].set(copies, unique_indices=True)
