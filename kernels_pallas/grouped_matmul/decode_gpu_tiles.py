"""Tiles and index arithmetic of a decode step's expert kernels for GPUs (Triton)."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from kernels_pallas.quantized import Quantized

MAX_ROWS = 64
MMA_ROWS = 16
"""Rows of the smallest tensor core product."""
FLOATS = (jnp.float32, jnp.bfloat16)


@dataclass(frozen=True)
class Tile:
    """A tile of weights and how a program walks it: rows and columns of the tile, warps, tiles in flight."""

    depth: int
    width: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Measured on an H200 at the published sizes."""

    router: Tile = Tile(64, 0, 4, 1)
    """Programs own all columns of the router."""
    gate_up: Tile = Tile(64, 64, 4, 6)
    down: Tile = Tile(64, 128, 4, 6)


TUNING = Tuning()


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 product of tiles; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def load_weights(w: Any, dtype: Any, *index: Any) -> jax.Array:
    """A tile of matrices; 8-bit values are exact in `dtype`."""
    values = w.values if isinstance(w, Quantized) else w
    return plt.load(values.at[index]).astype(dtype)


def scaled(product: jax.Array, w: Any, *index: Any) -> jax.Array:
    """A float32 product [..., width] times the scales at `index` if w has scales."""
    return product * plt.load(w.scale.at[index]) if isinstance(w, Quantized) else product


def compiler_params(tile: Tile, dtype: Any) -> plt.CompilerParams:
    """Triton's parameters. float32 tiles have twice the bytes: half as many in flight fit the shared memory."""
    stages = tile.stages if dtype == jnp.bfloat16 else max(1, tile.stages // 2)
    return plt.CompilerParams(num_warps=tile.warps, num_stages=stages)


def tile_size(n: int, limit: int) -> int:
    """The largest power of two that divides n, at most `limit`."""
    return min(n & -n, limit)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def grid(*indices: Any) -> tuple[jax.Array, ...]:
    """Index arrays of one shape: interpret mode does not mix arrays and slices."""
    return tuple(jnp.broadcast_arrays(*(jnp.asarray(i, jnp.int32) for i in indices)))
