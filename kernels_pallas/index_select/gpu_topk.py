"""Exact causal top-k of rows of scores, as bits, for `gpu_bits`. Triton body, one program of a few warps a row.

Keys are taken in units of 8: 32 bytes of scores, one byte of the result. `gpu_score` left each unit's maximum. A row:

1. Guess a lower bound: a quantile of 2,048 sampled maxima, such that probably some more than k units reach it.
2. Go through the maxima once, noting the places of those that reach it, and narrow these to k units or little more by
   counting in registers. Every one of the k best keys is in such a unit or in the last tile, and the least of their
   maxima is a lower bound of the k-th score.
3. Gather the units, write a byte for the keys of each that reach the bound over a cleared row, note those keys' places.
4. Narrow them to exactly k, ties by index, and write the bytes of the units that lose keys anew.

Rows that see few keys take all their units in step 3, with a guessed bound. Steps 2 and 3 are the same code: 4,096
places are held at most; when they fill up, they are narrowed to the best k and the bound rises. So nothing is assumed
about the data: too low a bound costs more narrowing, too high a one a second pass. No atomics: results are the same in
every run.

Bytes a row of 128K keys: 64 KiB of maxima, about 2,100 sectors, each 64 bytes of memory, and 16 KiB of result, = 0.06
us at 3.5 TB/s; some 60 KiB of lists stay in the second-level cache. Measured on one H200, 1,024 rows, in us a row:

| context | 16K | 32K | 64K | 128K | 256K |
|---|---|---|---|---|---|
| independent scores | 0.14 | 0.30 | 0.29 | 0.32 | 0.42 |
| keys and queries that resemble their neighbours | 0.13 | 0.33 | 0.36 | 0.45 | 0.49 |

All scores equal: 1.1 us. Steps 1 and 2 take 0.10 us at 128K. What holds step 3 is not known: neither its loads (the
next two or three steps' in flight: 5-10% slower, by fewer rows at a time), nor the bytes it writes (none: the same),
nor the bytes written anew (none: 5%) explain it.

Why Triton: gathers, scans and stores at computed places are what it has and Mosaic GPU has not.

Tried and lost: a dense copy of the gathered units, counted in four passes (0.42 and 0.54 us at 128K); exchanges of
layout between loads and stores, 18 barriers a step (0.41); a thread a score instead of a unit (twice the instructions);
8 warps a row (0.47), and steps of half the size (0.54); lists of each lane's own, which took minutes to compile.
"""

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_score import TILE, UNIT, UNITS, unit_at
from kernels_pallas.index_select.gpu_threshold import (
    MINUS_INFINITY,
    Tuning,
    clear,
    guess,
    iota,
    ones,
    place_of,
    put,
    search,
    steps_of,
    take_all,
)
from kernels_pallas.index_select.sort_keys import LOWEST, score_of, sort_key

PARTS = 2
"""A unit is loaded in so many vectors of 16 bytes."""


def select_rows(
    scores: jax.Array,
    maxima: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    first: jax.Array,
    wanted: jax.Array,
    chunk: int,
    topk: int,
    tuning: Tuning,
    interpret: bool = False,
) -> jax.Array:
    """Selects the top-k of the visible scores of each row that is wanted.

    Args:
        scores: [rows, S] float32 of the rows that begin at block `first`, as `gpu_score.scores` leaves them.
        maxima: [rows, S // UNIT] float32.
        bits: [B * chunk, S // UNIT] uint8, of which these rows are overwritten, in place.
        start: [B] int32.
        first: [1] int32, in blocks of QUERIES rows.
        wanted: [rows] int32; where it is zero, a row of `bits` stays as it is.
        chunk: rows of a sequence.
        topk: how many, such that `tuning.takes(topk)`.
        tuning: sizes.
        interpret: run on any platform.
    """
    rows, held = maxima.shape[0], tuning.held
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = (
        jax.ShapeDtypeStruct((rows, held), jnp.float32),
        jax.ShapeDtypeStruct((rows, held), jnp.int32),
        jax.ShapeDtypeStruct((rows, held + UNITS), jnp.int32),
        jax.ShapeDtypeStruct((rows, held), jnp.int32),
    )
    bits, *_ = pl.pallas_call(
        partial(_body, chunk=chunk, topk=topk, tuning=tuning, interpret=interpret),
        out_shape=(jax.ShapeDtypeStruct(bits.shape, bits.dtype), *scratch),
        grid=(rows,),
        in_specs=[anywhere] * 6,
        out_specs=(anywhere,) * 5,
        input_output_aliases={5: 0},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="index_select_bits",
    )(first, start, wanted, scores, maxima, bits)
    return bits


class Held(NamedTuple):
    """The candidates of a row: numbers larger than that of sort key `key`, or as large with an index below `cut`."""

    key: jax.Array
    cut: jax.Array
    size: jax.Array


class Scratch(NamedTuple):
    """A row of each holds: the numbers of its candidates, their indices, the units to gather, units to write anew."""

    numbers: Any
    places: Any
    units: Any
    stale: Any


class Source(NamedTuple):
    """What candidates are taken from, by index; groups are the indices 8 * group ... 8 * group + 7.

    Of maxima at least k + slack are wanted, with all indices of the last tile among those of equal maxima; of scores
    exactly k, and their bits are kept up to date.
    """

    load: Callable[[jax.Array], jax.Array]
    groups: Callable[[jax.Array], jax.Array]  # by number
    slack: int
    is_scores: bool


def _body(
    first: Any, start: Any, wanted: Any, scores: Any, maxima: Any, _: Any, bits: Any, *scratch: Any,
    chunk: int, topk: int, tuning: Tuning, interpret: bool,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    rows, width = bits.shape
    row, seen = place_of(start, first, r, rows, chunk, width * UNIT)

    def select() -> None:
        clear(bits, row, tuning.lanes)
        barrier()
        pl.when(seen <= topk)(partial(take_all, bits, row, seen, tuning.lanes))
        pl.when(seen > topk)(_Row(scores, maxima, bits, Scratch(*scratch), r, row, seen, topk, tuning, barrier).select)

    def barrier() -> None:
        if not interpret:
            plt.debug_barrier()

    pl.when((seen > 0) & (wanted[r] != 0))(select)


class _Row:
    """The selection of one row that sees more than k keys."""

    def __init__(
        self, scores: Any, maxima: Any, bits: Any, scratch: Scratch, r: jax.Array, row: jax.Array, seen: jax.Array,
        topk: int, tuning: Tuning, barrier: Callable[[], None],
    ) -> None:  # fmt: skip
        self.scores, self.maxima, self.bits, self.scratch = scores, maxima, bits, scratch
        self.r, self.row, self.seen, self.topk = r, row, seen, topk
        self.tuning, self.barrier = tuning, barrier
        self.capacity = scores.shape[1]
        # Neighbours swapped: where Triton sees no contiguity, a thread has the same elements of every array, and
        # nothing has to be exchanged before a store.
        self.lane = iota(tuning.groups) ^ 1

    def select(self) -> None:
        units = lax.div(self.seen + (UNIT - 1), UNIT)
        # With fewer, most units would be listed; there have to be k.
        many = self.seen > max(self.tuning.held * UNIT // 2, (self.topk + UNITS) * UNIT)
        floor, total = lax.cond(many, self._list_units, lambda: (self._guess(self._score, units), units))

        def listed(slot: jax.Array) -> jax.Array:
            return plt.load(self.scratch.units.at[self.r, slot], mask=jnp.broadcast_to(many, slot.shape), other=slot)

        source = Source(self._score, listed, 0, True)
        self._divide(source, self._settle(source, self._best(source, floor, total)), final=True)

    def _list_units(self) -> tuple[jax.Array, jax.Array]:
        """Lists the units of largest maxima. Returns a sort key that k scores reach, and the number of units."""
        tiles = lax.div(self.seen, TILE)  # that are visible as a whole
        groups = tiles * (UNITS // UNIT)
        source = Source(self._maximum, lambda slot: slot, self.tuning.slack(self.topk), False)
        best = self._best(source, self._guess(self._maximum, groups), groups)
        best = self._settle(source, best)
        listed = self._divide(source, best, final=True)
        rest = tiles * UNITS + iota(UNITS)
        put(self.scratch.units, self.r, listed + iota(UNITS), rest, rest * UNIT < self.seen)
        self.barrier()
        return best.key, listed + steps_of(self.seen - tiles * TILE, UNIT)

    def _maximum(self, position: jax.Array) -> jax.Array:
        return plt.load(self.maxima.at[self.r, position])

    def _score(self, index: jax.Array) -> jax.Array:
        return jnp.where(index < self.seen, plt.load(self.scores.at[self.r, index]), jnp.nan)

    def _guess(self, load: Callable[[jax.Array], jax.Array], groups: jax.Array) -> jax.Array:
        """A sort key that probably more than k, but not many more, of the groups' numbers reach."""
        size = self.tuning.sample
        slot = iota(size)
        group = lax.div(lax.div(slot, UNIT) * groups, size // UNIT)
        rank = lax.div(jnp.int32(self.topk * size * self.tuning.margin // (4 * UNIT)), groups)
        return guess(load(group * UNIT + lax.rem(slot, UNIT)), rank)

    def _best(self, source: Source, floor: jax.Array, total: jax.Array) -> Held:
        """Candidates among `total` groups, at least k, those of the largest numbers among them."""

        def attempt(held: Held) -> Held:
            first = held.key != MINUS_INFINITY
            held = self._stream(source, held._replace(size=jnp.int32(0)), total)
            again = jnp.where(first, jnp.int32(MINUS_INFINITY), jnp.int32(LOWEST))
            return held._replace(key=jnp.where(held.size < self.topk, again, held.key))

        # With minus infinity as the bound there are always enough, unless some are NaN.
        return lax.while_loop(
            lambda held: (held.size < self.topk) & (held.key != LOWEST),
            attempt,
            Held(floor, jnp.int32(self.capacity), jnp.int32(0)),
        )

    def _stream(self, source: Source, held: Held, total: jax.Array) -> Held:
        size = self.tuning.groups

        def groups(i: jax.Array) -> jax.Array:
            return source.groups(jnp.minimum(i * size + self.lane, total - 1))

        def step(i: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
            # Loads are started one step ahead, those of the list two.
            held, group, numbers, ahead = carry
            following = self._numbers(source, ahead), groups(i + 2)
            full = held.size > self.tuning.held - size * UNIT
            held = lax.cond(full, partial(self._shrink, source), lambda held: held, held)
            valid = i * size + self.lane < total
            byte = jnp.where(valid, self._byte(numbers, group, held), 0)
            if source.is_scores:
                put(self.bits, self.row, group, byte.astype(jnp.uint8), valid)
            count = lax.population_count(byte)
            at = held.size + jnp.cumsum(count) - count
            held = held._replace(size=held.size + jnp.sum(count))
            for _ in range(UNIT):
                lowest = lax.population_count((byte & -byte) - 1)
                put(self.scratch.places, self.r, at, group * UNIT + lowest, byte != 0)
                at += 1
                byte &= byte - 1
            return held, ahead, *following

        group = groups(jnp.int32(0))
        carry = held, group, self._numbers(source, group), groups(jnp.int32(1))
        return lax.fori_loop(0, steps_of(total, size), step, carry)[0]

    def _numbers(self, source: Source, group: jax.Array) -> tuple[jax.Array, ...]:
        """[N] groups → their numbers, [N, 4] twice: so a thread has whole groups."""
        size = UNIT // PARTS
        return tuple(source.load(group[:, None] * UNIT + part * size + iota(size)[None]) for part in range(PARTS))

    def _byte(self, numbers: tuple[jax.Array, ...], group: jax.Array, held: Held) -> jax.Array:
        """[N] int32, a bit for each of a group's numbers that is a candidate."""
        size = UNIT // PARTS
        byte = jnp.zeros_like(group)
        for part, number in enumerate(numbers):
            bit = part * size + iota(size)[None]
            take = _reaches(number, group[:, None] * UNIT + bit, held)
            byte |= jnp.sum(lax.shift_left(ones(take), jnp.broadcast_to(bit, take.shape)), axis=1)
        return byte

    def _settle(self, source: Source, held: Held) -> Held:
        """Narrows `key` and `cut` to the k best candidates, or some more; `size` stays that of the list."""
        r, (numbers, places, *_) = self.r, self.scratch
        self.barrier()
        slot = iota(self.tuning.held)
        inside = slot < held.size
        number = source.load(plt.load(places.at[r, slot], mask=inside, other=0))
        plt.store(numbers.at[r, slot], number, mask=inside)
        keys = jnp.where(inside, sort_key(number), LOWEST)
        key, reach, above = search(keys, held.key, held.size, self.topk, source.slack)
        self.barrier()
        value, size = score_of(key), self.tuning.groups

        def fix_bit(i: jax.Array, cut: jax.Array) -> jax.Array:
            candidate = cut + lax.shift_right_logical(jnp.int32(1 << (self.capacity.bit_length() - 1)), i)

            def count(i: jax.Array, total: jax.Array) -> jax.Array:
                slot = i * size + self.lane
                equal = (slot < held.size) & (plt.load(numbers.at[r, slot]) == value)
                return total + jnp.sum(ones(equal & (plt.load(places.at[r, slot]) < candidate)))

            below = lax.fori_loop(0, steps_of(held.size, size), count, jnp.int32(0))
            return jnp.where(below <= self.topk - above, candidate, cut)

        tied = reach > self.topk + source.slack
        bits = jnp.where(tied, jnp.int32(self.capacity.bit_length()), jnp.int32(0))
        cut = lax.fori_loop(0, bits, fix_bit, jnp.where(tied, jnp.int32(0), jnp.int32(self.capacity)))
        if not source.is_scores:
            cut = steps_of(cut, UNITS) * UNITS
        return Held(key, cut, held.size)

    def _shrink(self, source: Source, held: Held) -> Held:
        held = self._settle(source, held)
        return held._replace(size=self._divide(source, held, final=False))

    def _divide(self, source: Source, held: Held, final: bool) -> jax.Array:
        """Keeps the candidates that reach `held`: their indices, or, finally, their units or bits. Returns how many."""
        r, scratch, size = self.r, self.scratch, self.tuning.groups

        def step(i: jax.Array, done: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            slot = (i * 4 + iota(4)[:, None]) * size + self.lane[None]
            inside = slot < held.size
            number = plt.load(scratch.numbers.at[r, slot], mask=inside, other=jnp.nan)
            place = plt.load(scratch.places.at[r, slot], mask=inside, other=0)
            take = inside & _reaches(number, place, held)
            kept, dropped = done
            if not final:
                self.barrier()  # what is overwritten has been read
                kept = self._pack(scratch.places, kept, take, place)
            elif not source.is_scores:
                kept = self._pack(scratch.units, kept, take, unit_at(place))
            if source.is_scores:
                dropped = self._pack(scratch.stale, dropped, inside & ~take, lax.div(place, UNIT))
            return kept, dropped

        zero = jnp.int32(0)
        kept, dropped = lax.fori_loop(0, steps_of(held.size, 4 * size), step, (zero, zero))
        self.barrier()
        if source.is_scores:

            def write(i: jax.Array, _: None) -> None:
                slot = i * size + self.lane
                unit = plt.load(scratch.stale.at[r, jnp.minimum(slot, dropped - 1)])
                byte = self._byte(self._numbers(source, unit), unit, held)
                put(self.bits, self.row, unit, byte.astype(jnp.uint8), slot < dropped)

            lax.fori_loop(0, steps_of(dropped, size), write, None)
            self.barrier()
        return kept

    def _pack(self, ref: Any, before: jax.Array, take: jax.Array, value: jax.Array) -> jax.Array:
        """Stores the values ([M, N]) to take behind `before` others. Returns how many there are then."""
        count = jnp.sum(ones(take), axis=0)
        at = before + (jnp.cumsum(count) - count)[None] + jnp.cumsum(ones(take), axis=0) - ones(take)
        put(ref, self.r, at, value, take)
        return before + jnp.sum(count)


def _reaches(number: jax.Array, index: jax.Array, held: Held) -> jax.Array:
    value = score_of(held.key)
    return (number > value) | ((number == value) & (index < held.cut))
