"""Searches for the k-th largest of many numbers inside a TPU kernel, by counting.

Scores are compared as sort keys: int32 of the same order. Many rows are searched at once, until all have ended. A step
counts the keys that reach one pivot a row, placed where their number would reach topk if its logarithm were linear
between the bounds: true enough of the tails of scores that half as many steps are left as with halving (14 instead of
27 for 32 rows of 256K random scores, topk 2,048). Where one bound stays, the pivot is moved towards it (the "Illinois"
rule), and every fifth step halves, so that no scores make the search long. Nothing depends on the order of keys.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

HALVE_EVERY = 5

Count = Callable[[jax.Array], jax.Array]
"""Pivots [Q, 1] int32 → how many keys of each row are at least the row's pivot, [Q, 1] int32."""


def any_row(rows: jax.Array) -> jax.Array:
    """Whether any of [Q, 1] bool holds; a scalar."""
    return jnp.max(rows.astype(jnp.float32)) > 0


def search(
    count: Count, topk: int, low: jax.Array, high: jax.Array, enough: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The largest pivot that at least `topk` keys reach, or any that exactly `topk` reach.

    Args:
        count: see `Count`.
        low: [Q, 1] int32, a pivot that at least `topk` keys reach; rows in which fewer do are left at it.
        high: [Q, 1] int32, a pivot that no key reaches.
        enough: [Q, 1] bool; other rows are left at `low` too.

    Returns:
        The pivots; how many keys reach them; how many lie above them, where more than `topk` reach them.
    """

    def middle(low: jax.Array, high: jax.Array) -> jax.Array:
        # The mean without overflow.
        return (low & high) + ((low ^ high) >> 1)

    def unsettled(low: jax.Array, high: jax.Array, reach: jax.Array) -> jax.Array:
        return enough & (reach > topk) & (middle(low, high) != low)

    def interpolated(
        low: jax.Array, high: jax.Array, reach: jax.Array, above: jax.Array, streak: jax.Array
    ) -> jax.Array:
        width = high - low
        from_low = jnp.log(reach.astype(jnp.float32) / topk)
        from_high = jnp.log(topk / jnp.maximum(above.astype(jnp.float32), 0.5))
        stays = jnp.exp2(1.0 - jnp.clip(jnp.abs(streak), 1, 7).astype(jnp.float32))
        from_low = jnp.where(streak < 0, from_low * stays, from_low)
        from_high = jnp.where(streak > 0, from_high * stays, from_high)
        step = (width.astype(jnp.float32) * (from_low / (from_low + from_high))).astype(jnp.int32)
        pivot = jnp.clip(low + step, low + 1, high - 1)
        # Bounds so far apart that their distance overflows, or that rounding a step could.
        return jnp.where((width > 0) & (width < 1 << 30), pivot, middle(low, high))

    def step(state: tuple) -> tuple:
        i, low, high, reach, above, streak = state
        active = unsettled(low, high, reach)
        pivot = interpolated(low, high, reach, above, streak)
        pivot = jnp.where(lax.rem(i, HALVE_EVERY) == 0, middle(low, high), pivot)
        n = count(pivot)
        up, down = active & (n >= topk), active & (n < topk)
        streak = jnp.where(n >= topk, jnp.maximum(streak, 0) + 1, jnp.minimum(streak, 0) - 1)
        return (
            i + 1,
            jnp.where(up, pivot, low),
            jnp.where(down, pivot, high),
            jnp.where(up, n, reach),
            jnp.where(down, n, above),
            streak,
        )

    zero = jnp.zeros_like(low)
    state = jnp.int32(1), low, high, count(low), zero, zero
    _, low, _, reach, above, _ = lax.while_loop(lambda s: any_row(unsettled(*s[1:4])), step, state)
    return low, reach, above


def cut(count_below: Count, wanted: jax.Array, tied: jax.Array, capacity: int) -> jax.Array:
    """The index below which keys equal to the threshold are taken; `capacity` in rows that take all of them.

    Args:
        count_below: indices [Q, 1] → how many tied keys lie below, [Q, 1] int32.
        wanted: [Q, 1] int32, how many of them to take.
        tied: [Q, 1] bool: rows with more of them than wanted.
        capacity: above all indices.
    """
    bits = capacity.bit_length()

    def fix_bit(i: jax.Array, cutoff: jax.Array) -> jax.Array:
        candidate = cutoff + (jnp.int32(1 << (bits - 1)) >> i)
        return jnp.where(count_below(candidate) <= wanted, candidate, cutoff)

    steps = jnp.where(any_row(tied), bits, 0)
    cutoff = lax.fori_loop(0, steps, fix_bit, jnp.zeros_like(wanted))
    return jnp.where(tied, cutoff, capacity)
