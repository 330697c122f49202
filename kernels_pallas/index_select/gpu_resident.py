"""Exact causal top-k of rows of scores, as bits, while everything that is compared stays in registers. Triton body, one
program of 16 warps a row; rows that it cannot take are left, and marked, for `gpu_topk`.

Keys are taken in units of 8: 32 bytes of scores, one byte of the result. `gpu_score` left each unit's maximum. A row:

1. Read all maxima. Count how many reach a bound until k to 1.25 k do: every one of the k best keys is in such a unit or
   in the last one. Nothing is sampled or guessed; halving the distance takes one to six counts.
2. List those units, a lane its own ones in turn: one prefix sum over the lanes.
3. Gather their scores, two loads of 16 bytes a unit: the only scattered reads, and the only ones of scores.
4. Find the k-th score by counting, and where scores equal it the index below which they are taken.
5. Write a byte for each listed unit over a cleared row.

A row is left where its list is too short: where more than a quarter of k units tie with the k-th.

Measured on one H200, 1,024 rows, in us a row (scores of neighbouring rows and keys alike; independent ones: 0.33 at
128K), beside `gpu_topk` alone:

| context | 40K | 64K | 128K |
|---|---|---|---|
| this | 0.23 | 0.25 | 0.25 |
| of it steps 1, 2, 3 | 0.04, 0.03, 0.08 | 0.04, 0.07, 0.06 | 0.05, 0.04, 0.12 |
| `gpu_topk` | | 0.36 | 0.45 |

Bytes a row of 128K keys: 64 KiB of maxima, 2,100 sectors of 32 bytes in as many lines of 128, 16 KiB of result: 0.03 to
0.08 us at 4.2 TB/s, by what the memory fetches for a sector. Held by one row a processor: it has 128 registers a thread
and the next row's loads wait until they are free.

The price is the compiler's time: every score is an instruction of the program, 20 to 60 s at 128K to 256K.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_score import QUERIES, UNIT, unit_at
from kernels_pallas.index_select.gpu_threshold import clear, iota, ones, put, take_all
from kernels_pallas.index_select.sort_keys import HIGHEST, LOWEST, score_of, sort_key

HALF = UNIT // 2
"""Scores that a thread loads at once: 16 bytes."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warps: int = 16
    spare: int = 4
    """One part in so many more units than k may be listed."""
    most: int = 64
    """Maxima a lane can hold: rows of more keys are left."""

    @property
    def lanes(self) -> int:
        return 32 * self.warps

    def room(self, topk: int) -> int:
        """Units that a list holds; the last one the query sees is always in it."""
        return -(-(topk + topk // self.spare + 1) // self.lanes) * self.lanes


def select_rows(
    scores: jax.Array,
    maxima: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    first: jax.Array,
    chunk: int,
    topk: int,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Selects the top-k of the visible scores of each row that it can. Arguments as in `gpu_topk.select_rows`.

    Returns:
        `bits`, and [rows] int32, which is not zero for the rows that are left.
    """
    rows, width = maxima.shape
    if width > tuning.most * tuning.lanes:
        return bits, jnp.ones(rows, jnp.int32)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    bits, left, _ = pl.pallas_call(
        partial(_body, chunk=chunk, topk=topk, tuning=tuning, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct(bits.shape, bits.dtype),
            jax.ShapeDtypeStruct((rows, 1), jnp.int32),
            jax.ShapeDtypeStruct((rows, tuning.room(topk)), jnp.int32),
        ),
        grid=(rows,),
        in_specs=[anywhere] * 5,
        out_specs=(anywhere,) * 3,
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="index_select_resident",
    )(first, start, scores, maxima, bits)
    return bits, left[:, 0]


def _body(
    first: Any, start: Any, scores: Any, maxima: Any, _: Any, bits: Any, left: Any, units: Any,
    *, chunk: int, topk: int, tuning: Tuning, interpret: bool,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    row = first[0] * QUERIES + r
    rows, width = bits.shape
    lanes, capacity = tuning.lanes, width * UNIT
    lane = iota(lanes)

    def barrier() -> None:
        if not interpret:
            plt.debug_barrier()

    def select() -> None:
        # Rows that only fill a block up may lie past the end of the sequence.
        seen = jnp.minimum(start[lax.div(row, chunk)] + lax.rem(row, chunk) + 1, capacity)
        clear(bits, row, lanes)
        barrier()
        pl.when(seen <= topk)(partial(take, seen))
        pl.when(seen > topk)(partial(find, seen))

    def mark(is_left: jax.Array | bool) -> None:
        put(left, r, lane, jnp.broadcast_to(jnp.int32(is_left), lane.shape), lane == 0)

    def take(seen: jax.Array) -> None:
        take_all(bits, row, seen, lanes)
        mark(False)

    def find(seen: jax.Array) -> None:
        last = lax.div(seen - 1, UNIT)  # a unit with keys, perhaps, that the query does not see
        room = tuning.room(topk)
        places = [j * lanes + lane for j in range(-(-width // lanes))]
        known = [(place < width) & (unit_at(place) < last) for place in places]
        tops = [
            jnp.where(real, sort_key(plt.load(maxima.at[r, place], mask=real, other=0.0)), LOWEST)
            for place, real in zip(places, known, strict=True)
        ]
        floor, reached, _ = _bracket(tops, _lowest(tops), last, topk, room - 1)
        # So few units bound nothing, and all of them fit.
        floor = jnp.where(last < room, jnp.int32(LOWEST + 1), floor)
        pl.when(reached < room)(partial(among_listed, seen, last, places, tops, floor, reached))
        mark(reached >= room)

    def among_listed(
        seen: jax.Array, last: jax.Array, places: list[Any], tops: list[Any], floor: jax.Array, listed: jax.Array
    ) -> None:
        keep = [top >= floor for top in tops]
        kept = sum(ones(k) for k in keep)
        at = jnp.cumsum(kept) - kept
        for place, k in zip(places, keep, strict=True):
            put(units, r, at, unit_at(place), k)
            at += ones(k)
        put(units, r, jnp.broadcast_to(listed, lane.shape), jnp.broadcast_to(last, lane.shape), lane == 0)
        barrier()
        slots = [j * lanes + lane for j in range(tuning.room(topk) // lanes)]
        inside = [slot <= listed for slot in slots]
        own = [plt.load(units.at[r, slot], mask=m, other=0) for slot, m in zip(slots, inside, strict=True)]
        # [lanes, 4] twice a unit: so a thread has whole units, and sums over them are its own.
        index = [unit[:, None] * UNIT + part * HALF + iota(HALF)[None] for unit in own for part in range(2)]
        keys = []
        for number, i in enumerate(index):
            real = inside[number // 2][:, None] & (i < seen)
            keys.append(jnp.where(real, sort_key(plt.load(scores.at[r, i], mask=real, other=0.0)), LOWEST))
        low = jnp.maximum(_lowest(keys), floor)
        kth, reach, above = _bracket(keys, low, _count(keys, low), topk, topk)
        tied = reach != topk

        def fix_bit(i: jax.Array, cut: jax.Array) -> jax.Array:
            candidate = cut + lax.shift_right_logical(jnp.int32(1 << (capacity.bit_length() - 1)), i)
            equal = [ones((key == kth) & (place < candidate)) for key, place in zip(keys, index, strict=True)]
            return jnp.where(jnp.sum(sum(equal)) <= topk - above, candidate, cut)

        # Largest cut with at most the wanted ties below it, as in the reference; everything where all are wanted.
        steps = jnp.where(tied, jnp.int32(capacity.bit_length()), jnp.int32(0))
        cut = lax.fori_loop(0, steps, fix_bit, jnp.where(tied, jnp.int32(0), jnp.int32(capacity)))
        for j, unit in enumerate(own):
            byte = jnp.zeros_like(unit)
            for part in range(2):
                key, place = keys[2 * j + part], index[2 * j + part]
                take = ones((key > kth) | ((key == kth) & (place < cut)))
                bit = jnp.broadcast_to(part * HALF + iota(HALF)[None], take.shape)
                byte += jnp.sum(lax.shift_left(take, bit), axis=1)
            put(bits, row, unit, byte.astype(jnp.uint8), inside[j])

    pl.when(row < rows)(select)
    pl.when(row >= rows)(partial(mark, False))


def _count(keys: Sequence[jax.Array], least: jax.Array) -> jax.Array:
    """How many of all keys are at least that."""
    return jnp.sum(sum(ones(key >= least) for key in keys))


def _lowest(keys: Sequence[jax.Array]) -> jax.Array:
    return jnp.min(reduce(jnp.minimum, [jnp.where(key > LOWEST, key, HIGHEST) for key in keys]))


def _bracket(
    keys: Sequence[jax.Array], low: jax.Array, from_low: jax.Array, k: int, most: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """A bound that k to `most` keys reach.

    Args:
        keys: arrays of int32 sort keys.
        low: a bound that `from_low` keys reach, at least k or all there are.

    Returns:
        The bound; how many keys reach it, more than `most` only if that many are equal to the k-th; how many reach the
        next larger bound, where they are equal.
    """
    aim = (k + most) // 2

    def wide(state: tuple[jax.Array, ...]) -> jax.Array:
        low, high, from_low, *_ = state
        return (from_low > most) & (high - 1 > low)

    def narrow(state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        low, high, from_low, from_high, turn = state
        # By turns where the counts suggest and in the middle, of scores or, which bounds the number of turns, of keys.
        share = (from_low - aim).astype(jnp.float32) / (from_low - from_high).astype(jnp.float32)
        share = jnp.where(turn & 1 == 0, share, 0.5)
        bottom, top = score_of(low), score_of(high - 1)
        middle = (low & high) + lax.shift_right_arithmetic(low ^ high, 1)
        at = jnp.where(turn & 3 == 3, middle, sort_key(bottom + (top - bottom) * share))
        at = jnp.clip(at, low + 1, high - 1)
        total = _count(keys, at)
        enough = total >= k
        return (
            jnp.where(enough, at, low),
            jnp.where(enough, high, at),
            jnp.where(enough, total, from_low),
            jnp.where(enough, from_high, total),
            turn + 1,
        )

    high = jnp.max(reduce(jnp.maximum, keys)) + 1
    state = (low, high, from_low, jnp.int32(0), jnp.int32(0))
    low, _, from_low, from_high, _ = lax.while_loop(wide, narrow, state)
    return low, from_low, from_high
