"""Arithmetic of head vectors inside Triton kernels, each held as the two halves of its vector: so rotation and Hadamard
transform (H_2n = [[H_n, H_n], [H_n, -H_n]]) need nothing moved between threads."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from kernels_pallas.numerics import power_of_two_scale, round_e4m3

Halves = tuple[jax.Array, jax.Array]


@dataclass(frozen=True)
class Halved:
    """Vectors of width 2 * half, any number of rows of them, as halves [rows, columns].

    Beyond `half` columns lie zeros, where powers of two or the tensor cores want a larger tile.
    """

    half: int
    columns: int

    def vector(self, ref: Any, row: jax.Array) -> Halves:
        """ref [..., 2 * half] at `row` in float32, as halves [1, columns]."""
        column = jnp.arange(self.columns)[None]
        at, mask = jnp.full_like(column, row), column < self.half
        low = plt.load(ref.at[at, column], mask=mask, other=0.0)
        high = plt.load(ref.at[at, column + self.half], mask=mask, other=0.0)
        return low.astype(jnp.float32), high.astype(jnp.float32)

    def turn(self, cos_ref: Any, sin_ref: Any, row: jax.Array, live: jax.Array | None = None) -> Halves:
        """Cosines and sines [rows, columns] of tables' rows [rows, 1], or [1, columns] of one row.

        Args:
            live: bool [rows, 1], which rows there are.
        """
        column = jnp.arange(self.columns)[None]
        shape = (row.shape[0] if row.ndim else 1, self.columns)
        at = (jnp.broadcast_to(row, shape), jnp.broadcast_to(column, shape))
        mask = jnp.broadcast_to(column < self.half if live is None else live & (column < self.half), shape)
        return plt.load(cos_ref.at[at], mask=mask, other=0.0), plt.load(sin_ref.at[at], mask=mask, other=0.0)

    def rms_norm(self, halves: Halves, weight: Halves, eps: float) -> Halves:
        """As `numerics.rms_norm`."""
        dtype = halves[0].dtype
        low, high = (x.astype(jnp.float32) for x in halves)
        scale = lax.rsqrt(self._mean(low * low + high * high) + eps)
        return (low * scale * weight[0]).astype(dtype), (high * scale * weight[1]).astype(dtype)

    def layer_norm(self, halves: Halves, weight: Halves, bias: Halves, eps: float) -> Halves:
        """As `numerics.layer_norm`."""
        dtype = halves[0].dtype
        low, high = (x.astype(jnp.float32) for x in halves)
        mean = self._mean(low + high)
        live = jnp.arange(self.columns)[None] < self.half
        low, high = jnp.where(live, low - mean, 0.0), jnp.where(live, high - mean, 0.0)
        scale = lax.rsqrt(self._mean(low * low + high * high) + eps)
        return (low * scale * weight[0] + bias[0]).astype(dtype), (high * scale * weight[1] + bias[1]).astype(dtype)

    def rotate(self, halves: Halves, turn: Halves) -> Halves:
        """As `numerics.rotate`: in the tables' dtype, every product and sum rounded."""
        (low, high), (cos, sin) = halves, turn
        narrow = cos.dtype

        def times(x: jax.Array, y: jax.Array) -> jax.Array:
            return (x.astype(jnp.float32) * y.astype(jnp.float32)).astype(narrow).astype(jnp.float32)

        turned = times(low, cos) - times(high, sin), times(high, cos) + times(low, sin)
        return turned[0].astype(narrow).astype(low.dtype), turned[1].astype(narrow).astype(low.dtype)

    def hadamard(self, halves: Halves) -> Halves:
        """As `numerics.hadamard`. Signs are exact in any dtype, so that rounded vectors multiply exactly."""
        dtype = halves[0].dtype
        i = lax.broadcasted_iota(jnp.int32, (self.columns, self.columns), 0)
        j = lax.broadcasted_iota(jnp.int32, (self.columns, self.columns), 1)
        signs = (1 - 2 * (lax.population_count(i & j) & 1)).astype(dtype)
        precision = lax.Precision.HIGHEST if dtype == jnp.float32 else None
        dims = (((1,), (0,)), ((), ()))
        low, high = (
            lax.dot_general(x, signs, dims, precision=precision, preferred_element_type=jnp.float32) for x in halves
        )
        norm = (2 * self.half) ** -0.5
        return ((low + high) * norm).astype(dtype), ((low - high) * norm).astype(dtype)

    def _mean(self, x: jax.Array) -> jax.Array:
        """[rows, 1] of the sums [rows, columns] of two halves."""
        return jnp.sum(x, axis=1, keepdims=True) / (2 * self.half)


def quantise(halves: Halves) -> tuple[Halves, jax.Array]:
    """Halves of e4m3 values and the scale of each row, all float32."""
    low, high = (x.astype(jnp.float32) for x in halves)
    scale, inverse = power_of_two_scale(jnp.max(jnp.maximum(jnp.abs(low), jnp.abs(high)), axis=1))
    return (round_e4m3(low * inverse[:, None]), round_e4m3(high * inverse[:, None])), scale
