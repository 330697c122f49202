"""What the selections of whole rows share (`gpu_resident`, `gpu_topk`): rows of bits, counting searches. Pieces of
Triton bodies."""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_score import QUERIES, UNIT, UNITS
from kernels_pallas.index_select.sort_keys import HIGHEST, LOWEST, sort_key

MINUS_INFINITY = -0x7F800001
"""The sort key of minus infinity."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results. Powers of two, but for `margin` and `spare`."""

    warps: int = 4
    groups: int = 128
    """Groups of 8 numbers that are looked at in a step, a multiple of the lanes."""
    held: int = 4096
    """Candidates that a row holds at most."""
    sample: int = 2048
    """Numbers by which a lower bound is guessed."""
    margin: int = 5
    """The guess is made for so many quarters of k."""
    spare: int = 32
    """One part in so many more units than k may be gathered, where finding fewer costs more counting."""

    @property
    def lanes(self) -> int:
        return 32 * self.warps

    def takes(self, topk: int) -> bool:
        """Whether a step's numbers always find room beside the best `topk`, a tile of equal ones among them."""
        return topk + self.slack(topk) + UNITS + self.groups * UNIT <= self.held

    def slack(self, topk: int) -> int:
        """How many more units than `topk` may be gathered."""
        return topk // self.spare


def ones(mask: jax.Array) -> jax.Array:
    """bool → int32."""
    return mask.astype(jnp.int32)


def iota(size: int) -> jax.Array:
    """0, 1, ..., size - 1."""
    return jnp.arange(size, dtype=jnp.int32)


def put(ref: Any, row: jax.Array, column: jax.Array, value: jax.Array, mask: jax.Array) -> None:
    """Stores where `mask`."""
    # In interpret mode masked-off elements write back what they read, unless they point past the end.
    plt.store(ref.at[row, jnp.where(mask, column, ref.shape[1])], value, mask=mask)


def place_of(start: Any, first: Any, r: jax.Array, rows: int, chunk: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Row r of those that begin at block `first` → its number among all `rows`, and how many keys it sees.

    Of a row past the end, which only fills a block up: 0.
    """
    row = first[0] * QUERIES + r
    inside = jnp.minimum(row, rows - 1)
    # A chunk's last rows may lie past the end of the sequence.
    seen = jnp.minimum(start[lax.div(inside, chunk)] + lax.rem(inside, chunk) + 1, capacity)
    return row, jnp.where(row < rows, seen, 0)


def steps_of(total: jax.Array, size: int) -> jax.Array:
    """How many pieces of `size` cover `total`."""
    return lax.div(total + (size - 1), size)


def clear(bits: Any, row: jax.Array, lanes: int) -> None:
    """Zeroes a row of bits, with `lanes` threads."""
    width = bits.shape[1]
    vector = min(16 * lanes, width & -width)

    def step(i: jax.Array, _: None) -> None:
        plt.store(bits.at[row, i * vector + iota(vector)], jnp.zeros((vector,), jnp.uint8))

    lax.fori_loop(0, width // vector, step, None)


def take_all(bits: Any, row: jax.Array, seen: jax.Array, lanes: int) -> None:
    """Sets the bits of the first `seen` keys of a row, with `lanes` threads."""

    def step(i: jax.Array, _: None) -> None:
        unit = i * lanes + iota(lanes)
        keys = jnp.clip(seen - unit * UNIT, 0, UNIT)
        put(bits, row, unit, (lax.shift_left(jnp.ones_like(unit), keys) - 1).astype(jnp.uint8), keys > 0)

    lax.fori_loop(0, steps_of(seen, lanes * UNIT), step, None)


def search(
    keys: jax.Array, low: jax.Array, from_low: jax.Array, k: jax.Array | int, slack: jax.Array | int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A key that at least k and, ties aside, at most k + slack keys reach.

    Args:
        keys: [N] int32.
        low: a key that at least k keys reach.
        from_low: how many.
        k: how many are wanted.
        slack: how many more may be found.

    Returns:
        One of the keys, the number of keys that reach it, and, if those are too many, the number of larger keys.
    """

    def wide(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, from_low, *_ = state
        return (from_low > k + slack) & (high - 1 > low)

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, from_low, from_high, guess = state
        # By turns where the counts suggest, which takes half the steps, and in the middle, which bounds them.
        share = (from_low - k).astype(jnp.float32) / (from_low - from_high).astype(jnp.float32)
        span = high.astype(jnp.float32) - low.astype(jnp.float32)
        near = jnp.clip(low + jnp.minimum(span * share, 2.0**30).astype(jnp.int32), low + 1, high - 1)
        middle = (low & high) + lax.shift_right_arithmetic(low ^ high, 1)
        at = jnp.where(guess, near, middle)
        total = jnp.sum(ones(keys >= at))
        enough = total >= k
        return (
            jnp.where(enough, at, low),
            jnp.where(enough, high, at),
            jnp.where(enough, total, from_low),
            jnp.where(enough, from_high, total),
            ~guess,
        )

    # from_low >= k > from_high, the counts of keys at least `low` and `high`, hold throughout.
    state = low, jnp.max(keys) + 1, from_low, jnp.int32(0), jnp.bool_(True)
    low, _, from_low, from_high, _ = lax.while_loop(wide, narrow, state)
    # A score's own key: what lies between two scores may be a denormal, which compares as zero where those are flushed.
    return jnp.min(jnp.where(keys >= low, keys, HIGHEST)), from_low, from_high


def guess(sample: jax.Array, rank: jax.Array) -> jax.Array:
    """The sort key of about the rank-th largest of some scores ([N] float32, NaN where there is none)."""
    keys = jnp.where(sample == sample, sort_key(sample), LOWEST)
    known = jnp.sum(ones(keys > LOWEST))
    lowest = jnp.min(jnp.where(keys > LOWEST, keys, HIGHEST))
    low, *_ = search(keys, lowest, known, rank, lax.div(rank, 8))
    return jnp.where(rank < known, low, MINUS_INFINITY)
