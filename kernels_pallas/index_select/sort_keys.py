"""Sort keys: int32 that order as the float32 scores they stand for. Every kernel compares and counts these."""

import jax
import jax.numpy as jnp
from jax import lax

LOWEST = -(2**31)
"""Below the sort key of every score: what a query does not see."""
HIGHEST = 2**31 - 1


def sort_key(scores: jax.Array) -> jax.Array:
    """float32 → int32 of the same order; both zeros map to the same value."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ HIGHEST, bits)


def score_of(key: jax.Array) -> jax.Array:
    """The inverse of `sort_key`."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ HIGHEST, key), jnp.float32)
