"""The k-th largest of a row's scores, for `gpu_topk`: counting between bounds, and the list of what is left between.

Inside a Triton body. A lane looks at every (32 * warps)-th score and keeps its own count and its own part of the list,
so that no step of a pass waits for another lane.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

LOWEST = -(2**31)
"""Below the sort key of every score."""
MINUS_INFINITY = -0x7F800001
PAST_INFINITY = 0x7F800001
"""Sort keys. The latter's float is a NaN: no score compares as at least that."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results. Powers of two, but for `guess`."""

    groups: int = 4096
    listed: int = 4096
    """Units that the dense scratch row holds."""
    bracket: int = 2048
    """Scores that are resolved in registers."""
    gather: int = 512
    """Units a step of a gather."""
    unroll: int = 4
    """Scores a lane looks at in a step."""
    warps: int = 16
    bits: int = 18
    """Upper bits of the sort key to which bounds are found."""
    guess: int = 11
    """The upper bound of the bracket is guessed where this many sixteenths of k group maxima are larger."""


def sort_key(scores: jax.Array) -> jax.Array:
    """float32 → int32 of the same order, both zeros alike."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.int32)
    return jnp.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


def score_of(key: jax.Array) -> jax.Array:
    """The inverse of `sort_key`; -1 is minus zero, which compares as zero: as the next larger key does."""
    return lax.bitcast_convert_type(jnp.where(key < 0, key ^ 0x7FFFFFFF, key), jnp.float32)


def ones(mask: jax.Array) -> jax.Array:
    """bool → int32."""
    return mask.astype(jnp.int32)


def put(ref: Any, row: jax.Array, column: jax.Array, value: jax.Array, mask: jax.Array) -> None:
    """Stores where `mask`."""
    # In interpret mode masked-off elements write back what they read, unless they point past the end.
    plt.store(ref.at[row, jnp.where(mask, column, ref.shape[1])], value, mask=mask)


def steps_of(total: jax.Array, size: int) -> jax.Array:
    """How many pieces of `size` cover `total`."""
    return lax.div(total + (size - 1), size)


def _kth_largest(keys: jax.Array, k: jax.Array, known: jax.Array, width: jax.Array) -> jax.Array:
    """The k-th largest key, all but the lowest `width` bits of which are those of `known`."""

    def fix_bit(i: jax.Array, v: jax.Array) -> jax.Array:
        candidate = v ^ lax.shift_left(jnp.int32(1), width - 1 - i)
        return jnp.where(jnp.sum(ones(keys >= candidate)) >= k, candidate, v)

    return lax.fori_loop(0, width, fix_bit, known)


class Members(NamedTuple):
    """The scores among which a row's top-k is searched; what is not to be selected reads as NaN."""

    size: jax.Array
    load: Callable[[jax.Array], jax.Array]  # of places below size, and some beyond
    index: Callable[[jax.Array], jax.Array]  # key index of a place
    tiles: jax.Array
    tile: Callable[[jax.Array], tuple[jax.Array, jax.Array, jax.Array]]  # valid [N], unit [N], scores [N, UNIT]


def threshold(
    found: Members,
    floor: jax.Array,
    guess: jax.Array,
    bracket: Any,
    r: jax.Array,
    topk: int,
    S: int,
    barrier: Callable[[], None],
    tuning: Tuning,
) -> tuple[jax.Array, jax.Array]:
    """The k-th largest score, and the key index below which scores equal to it are selected.

    Args:
        found: at least k scores, those that are at least `floor` among them.
        floor: sort key that at least k scores reach.
        guess: larger sort key; where fewer than k scores reach it, it saves halvings.
        bracket: [rows, tuning.bracket] int32 scratch.
        r: its row.
        topk: k.
        S: more than every key index.
        barrier: makes stores of all lanes visible.
        tuning: sizes.
    """
    lanes, unroll = 32 * tuning.warps, tuning.unroll
    zero = jnp.zeros((lanes,), jnp.int32)
    steps = steps_of(found.size, lanes * unroll)

    def places(step: jax.Array) -> list[jax.Array]:
        return [(step * unroll + j) * lanes + jnp.arange(lanes, dtype=jnp.int32) for j in range(unroll)]

    def counts(*keys: jax.Array) -> tuple[jax.Array, ...]:
        """[lanes] int32 for each key: scores at least as large, by the lane that looks at them."""
        least = [score_of(key) for key in keys]

        def step(i: jax.Array, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            for place in places(i):
                x = found.load(place)
                totals = tuple(total + ones(x >= v) for total, v in zip(totals, least, strict=True))
            return totals

        return lax.fori_loop(0, steps, step, tuple(zero for _ in keys))

    def collect(low: jax.Array, high: jax.Array, sizes: jax.Array) -> None:
        """Sort keys in low..high - 1 → bracket, where lane l has sizes[l]."""
        at_least, below = score_of(low), score_of(high)

        def step(i: jax.Array, at: jax.Array) -> jax.Array:
            for place in places(i):
                x = found.load(place)
                keep = (x >= at_least) & ~(x >= below)
                put(bracket, r, at, sort_key(x), keep & (at < tuning.bracket))
                at += ones(keep)
            return at

        lax.fori_loop(0, steps, step, jnp.cumsum(sizes) - sizes)

    def crowded(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, from_low, from_high = state
        return (from_low - from_high > tuning.bracket) & (high - 1 > low)

    def halve(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, from_low, from_high = state
        middle = (low & high) + lax.shift_right_arithmetic(low ^ high, 1)
        total = jnp.sum(counts(middle)[0])
        enough = total >= topk
        return (
            jnp.where(enough, middle, low),
            jnp.where(enough, high, middle),
            jnp.where(enough, total, from_low),
            jnp.where(enough, from_high, total),
        )

    # from_low >= k > from_high, the counts of scores at least `low` and `high`, hold throughout.
    of_floor, of_guess = counts(floor, guess)
    from_floor, from_guess = jnp.sum(of_floor), jnp.sum(of_guess)
    right = from_guess < topk
    state = (
        jnp.where(right, floor, guess),
        jnp.where(right, guess, PAST_INFINITY),
        jnp.where(right, from_floor, from_guess),
        jnp.where(right, from_guess, 0),
    )
    low, high, from_low, from_high = lax.while_loop(crowded, halve, state)
    held = from_low - from_high
    fits = held <= tuning.bracket
    unchanged = right & (low == floor) & (high == guess)

    def collect_first() -> None:
        collect(floor, guess, of_floor - of_guess)

    def collect_again() -> None:
        of_low, of_high = counts(low, high)
        collect(low, high, of_low - of_high)

    pl.when(fits & unchanged)(collect_first)
    pl.when(fits & ~unchanged)(collect_again)
    barrier()

    def resolve() -> tuple[jax.Array, jax.Array, jax.Array]:
        slot = jnp.arange(tuning.bracket, dtype=jnp.int32)
        keys = jnp.where(slot < held, plt.load(bracket.at[r, slot]), LOWEST)
        width = 32 - lax.clz(low ^ (high - 1))
        known = jnp.where(width >= 32, LOWEST, low & ~(lax.shift_left(jnp.int32(1), jnp.minimum(width, 31)) - 1))
        kth = _kth_largest(keys, topk - from_high, known, width)
        return kth, from_high + jnp.sum(ones(keys > kth)), from_high + jnp.sum(ones(keys >= kth))

    # A bracket that still holds too many is a single value.
    kth, above, reached = lax.cond(fits, resolve, lambda: (low, from_high, from_low))
    value = score_of(kth)
    wanted = topk - above

    def fix_index_bit(i: jax.Array, cut: jax.Array) -> jax.Array:
        candidate = cut + lax.shift_right_logical(jnp.int32(1 << (S.bit_length() - 1)), i)

        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            for place in places(i):
                total += ones((found.load(place) == value) & (found.index(place) < candidate))
            return total

        return jnp.where(jnp.sum(lax.fori_loop(0, steps, step, zero)) <= wanted, candidate, cut)

    # Largest cut with at most `wanted` ties below it, as in the reference; S where all of them are wanted.
    tied = reached != topk
    bits = jnp.where(tied, jnp.int32(S.bit_length()), jnp.int32(0))
    cut = lax.fori_loop(0, bits, fix_index_bit, jnp.where(tied, jnp.int32(0), jnp.int32(S)))
    return value, cut
