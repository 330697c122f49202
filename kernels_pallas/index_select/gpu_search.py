"""Searches for the k-th largest of many numbers inside a GPU kernel, by counting.

Scores are compared as sort keys: int32 of the same order. A step counts the keys at two pivots with one reduction over
the program's threads. Nothing depends on the order of the keys, so that no result depends on the order of a list.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.index_select.sort_keys import HIGHEST, LOWEST, score_of, sort_key


def boundary(
    fold: Callable, n: jax.Array, topk: int, origin: jax.Array, S: int, guess: Callable | None = None
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Threshold key, the id below which keys equal to it are selected, and how many are selected before `origin`.

    Args:
        fold: (measure, combine, initial) → the combination of measure(keys, ids) over the pieces of a list.
        n: length of the list, at least topk.
        guess: () → two scores to begin with, as `search` takes them.
    """

    def add(a: tuple, b: tuple) -> tuple:
        return tuple(x + y for x, y in zip(a, b, strict=True))

    def total(mask: Callable) -> jax.Array:
        return fold(lambda key, index: (jnp.sum(mask(key, index).astype(jnp.int32)),), add, (jnp.int32(0),))[0]

    def count(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
        return fold(lambda key, _: count_two(key, p, q), add, (jnp.int32(0), jnp.int32(0)))

    low, high = fold(
        lambda key, _: bounds(key),
        lambda a, b: (jnp.minimum(a[0], b[0]), jnp.maximum(a[1], b[1])),
        (jnp.int32(HIGHEST), jnp.int32(LOWEST)),
    )
    first = None if guess is None else guess()
    threshold, reached, above = search(count, low, high, n, topk, 0, first)

    def halve(carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = carry
        middle = (low + high) // 2
        enough = above + total(lambda key, index: (key == threshold) & (index < middle)) >= topk
        return jnp.where(enough, low, middle), jnp.where(enough, middle, high)

    # Only a surplus of equal keys needs a cut among them.
    low = (reached == topk).astype(jnp.int32) * (S - 1)
    _, cutoff = lax.while_loop(lambda carry: carry[1] - carry[0] > 1, halve, (low, jnp.int32(S)))
    before = total(lambda key, index: ((key > threshold) | ((key == threshold) & (index < cutoff))) & (index < origin))
    return threshold, cutoff, before


def bounds(key: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Smallest and largest visible key."""
    return jnp.min(jnp.where(key == LOWEST, HIGHEST, key)), jnp.max(key)


def normal_quantile(key: jax.Array, n: jax.Array, topk: int) -> tuple[jax.Array, jax.Array]:
    """Scores a little below and above the topk-th largest of n visible ones, if they are distributed normally."""
    count = n.astype(jnp.float32)
    x = jnp.where(key == LOWEST, 0.0, score_of(key))
    mean = jnp.sum(x) / count
    deviation = jnp.sqrt(jnp.maximum(jnp.sum(x * x) / count - mean * mean, 0.0))
    middle = mean + deviation * upper_quantile(topk / count)
    return middle - 0.08 * deviation, middle + 0.08 * deviation


def upper_quantile(share: jax.Array) -> jax.Array:
    """What a share (0 to 1, neither included) of a standard normal distribution exceeds."""
    # Hastings' approximation (Abramowitz & Stegun 26.2.23), for the smaller of the two tails.
    t = jnp.sqrt(-2.0 * jnp.log(jnp.minimum(share, 1.0 - share)))
    z = t - (2.515517 + t * (0.802853 + t * 0.010328)) / (1.0 + t * (1.432788 + t * (0.189269 + t * 0.001308)))
    return jnp.where(share > 0.5, -z, z)


def count_two(key: jax.Array, p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many keys are at least p, and at least q. One reduction for both: 16 bits hold either."""
    both = jnp.sum(jnp.where(key >= p, 1, 0) + jnp.where(key >= q, 1 << 16, 0))
    return both & 0xFFFF, both >> 16


def search(
    count: Callable,
    low: jax.Array,
    high: jax.Array,
    n: jax.Array,
    topk: jax.Array | int,
    slack: jax.Array | int,
    guess: tuple[jax.Array, jax.Array] | None = None,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Finds a threshold that topk to topk + slack of the keys reach, or the topk-th key where equal keys leave none.

    Args:
        count: (p, q) → how many keys are at least p, and at least q.
        low, high: the smallest and the largest key.
        n: how many keys there are, or any figure that is returned as `reached` if they are fewer than topk.
        guess: scores that are the first two pivots; keys are then taken to be spread evenly as scores, not as integers.
            Any two will do, not a number included.

    Returns:
        (threshold, reached, above): how many keys reach the threshold; how many exceed it, if these are not topk to
        topk + slack.
    """

    def unsettled(carry: tuple) -> jax.Array:
        low, high, reached, *_ = carry
        return ((high - low).astype(jnp.uint32) > 1) & (reached > topk + slack)

    def narrow(carry: tuple) -> tuple:
        low, high, reached, above, turn = carry
        gap = (high - low).astype(jnp.uint32)
        # Two pivots around where the threshold would be if keys were spread evenly, as close as their number allows.
        # Every fourth step divides in three, so that no distribution takes many steps.
        inside = (reached - above).astype(jnp.float32)
        even = ((turn & 3) == 3).astype(jnp.float32)
        at = (reached - topk - slack // 2).astype(jnp.float32) / inside
        at += even * (1 / 2 - at)
        margin = 0.35 * lax.rsqrt(inside) + 1.5e-5 * inside
        margin += even * (1 / 6 - margin)

        def pivot(fraction: jax.Array, first: int) -> jax.Array:
            offset = (gap.astype(jnp.float32) * jnp.maximum(fraction, 0.0)).astype(jnp.uint32)
            key = low + jnp.minimum(jnp.maximum(offset, 1), gap - 1).astype(jnp.int32)
            if guess is None:
                return key
            between = score_of(low) + (score_of(high) - score_of(low)) * fraction
            between = sort_key(jnp.where(turn == 0, guess[first], between))
            between = jnp.minimum(jnp.maximum(between, low + 1), high - 1)
            return jnp.where((turn & 3) == 3, key, between)

        p, q = pivot(at - margin, 0), pivot(at + margin, 1)
        at_p, at_q = count(p, q)
        return (
            jnp.where(at_q >= topk, q, jnp.where(at_p >= topk, p, low)),
            jnp.where(at_q >= topk, high, jnp.where(at_p >= topk, q, p)),
            jnp.where(at_q >= topk, at_q, jnp.where(at_p >= topk, at_p, reached)),
            jnp.where(at_q >= topk, above, jnp.where(at_p >= topk, at_q, at_p)),
            turn + 1,
        )

    # Nothing reaches the key above the largest one.
    found = lax.while_loop(unsettled, narrow, (low, high + 1, n, jnp.int32(0), jnp.int32(0)))
    threshold, _, reached, above, _ = found
    return threshold, reached, above
