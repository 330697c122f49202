"""From bits to lists: which keys a block of neighbouring queries selects together. Triton body, used by attend_bits.

Schedule. One block of `queries` rows of bits per program. A word is OR-ed over the rows; its population count gives
each lane its place in the list by a prefix sum; then every lane peels the lowest bits off its word, in `parts` pieces
side by side because one chain of dependent bits is all latency, and stores key and members. Lists are ascending.
For blocks of 16 the keys come in three kinds, by the halves of the queries that select them, with a prefix sum each.

Floor: bits are read once, 4 bytes for 32 keys of a query: 4 us for 8,192 queries over 16K keys. What is measured is
the latency of peeling and of scattered stores; a fixed walk over all 32 bits of a word took 1.3 to 7 times as long.
The three kinds cost 25 us more than one list at 128K (160 for 130). Eight steps of two parts save 25 us there and
compile twice as long.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import WORD

PAD = 128
"""The last tile of a list is filled up to a multiple of this with key 0 that no query selects; no list is empty."""


SPAN = 16
"""Neighbouring queries that are taken together or in smaller blocks."""


class Lists(NamedTuple):
    """Unions of the selections of blocks of neighbouring queries, n blocks in a chunk; int32.

    ids [B, n, capacity]: keys in ascending order; members [B, n, capacity]: bit i where query i of the block selects
    the key; counts [B, n]: keys in the list.
    """

    ids: jax.Array
    members: jax.Array
    counts: jax.Array


class Halves(NamedTuple):
    """As `Lists`, for blocks of SPAN queries, ordered by which of its halves select a key: the first only, both, the
    second only; ascending in each.

    counts [B, n, 3]: a, b and c keys of these kinds. Of the room for an even number of entries, the first a entries
    are those of the first kind, b entries end at the middle and run backwards, and c entries start there: one pass
    over the bits needs no counts beforehand. Entries beyond are not written.
    """

    ids: jax.Array
    members: jax.Array
    counts: jax.Array


@dataclass(frozen=True)
class Tuning:
    """Sizes that change the speed only."""

    words: int = 32
    """Words a step: one for each lane."""
    steps: int = 4
    """Steps whose loads are in flight together."""
    parts: int = 4
    """Pieces of a word that are peeled side by side; a divisor of 32."""
    warps: int = 1


def list_keys(
    bits: jax.Array,
    start: jax.Array,
    wanted: jax.Array | None,
    *,
    queries: int,
    capacity: int,
    tuning: Tuning,
    interpret: bool = False,
) -> tuple[Lists, jax.Array]:
    """Lists the keys of every block of `queries` rows of bits.

    Args:
        bits: [B, C, S // 32] uint32 as in `attend_bits`.
        start: [B] int32 as in `attend_bits`.
        wanted: [B, ceil(C / SPAN)] bool: lists of queries where this is False stay empty. None for all.
        queries: rows of a block, a divisor of SPAN; the last block may be shorter.
        capacity: room for a list, a multiple of PAD; keys beyond it are dropped.

    Returns:
        The lists, and [B, n] int32: how many keys the last query of each block selects by itself.
    """
    B, C, W = bits.shape
    n = pl.cdiv(C, queries)
    entries, number = jax.ShapeDtypeStruct((B, n, capacity), jnp.int32), jax.ShapeDtypeStruct((B, n), jnp.int32)
    flags = () if wanted is None else (wanted.astype(jnp.int32),)
    ids, members, counts, own = pl.pallas_call(
        partial(_list_keys, C=C, W=W, queries=queries, capacity=capacity, tuning=tuning, selective=bool(flags)),
        grid=(n, B),
        out_shape=(entries, entries, number, number),
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="list_keys",
    )(start, lax.bitcast_convert_type(bits, jnp.int32), *flags)
    return Lists(ids, members, counts), own


def _list_keys(
    start_ref: Any,
    bits_ref: Any,
    *refs: Any,
    C: int,
    W: int,
    queries: int,
    capacity: int,
    tuning: Tuning,
    selective: bool,
) -> None:
    ids_ref, members_ref, counts_ref, own_ref = refs[-4:]
    block, b = pl.program_id(0), pl.program_id(1)
    words = _Words(bits_ref, b, block * queries, queries, C, _live(start_ref[b], (block + 1) * queries, C, W))
    if selective:
        flags = refs[0]
        words = words._replace(live=jnp.where(flags[b, words.first // SPAN] != 0, words.live, 0))

    def store(at: jax.Array, keys: jax.Array, members: jax.Array, used: jax.Array) -> None:
        # Unused lanes point outside, so that interpretation, which writes every lane, drops them too.
        spot = jnp.where(used & (at < capacity), at, capacity)
        plt.store(ids_ref.at[b, block, spot], keys, mask=spot < capacity)
        plt.store(members_ref.at[b, block, spot], members, mask=spot < capacity)

    def visit(key: jax.Array, rows: list[jax.Array], carry: list[jax.Array]) -> list[jax.Array]:
        total, own = carry
        union = reduce(jnp.bitwise_or, rows)
        number = lax.population_count(union)
        begin = total + jnp.cumsum(number) - number
        _peel(union, rows, key, begin, tuning.parts, store)
        return [total + jnp.sum(number), own + jnp.sum(lax.population_count(rows[-1]))]

    total, own = words.walk(tuning, visit, [jnp.int32(0)] * 2)
    total = jnp.minimum(total, capacity)
    counts_ref[b, block] = total
    own_ref[b, block] = own
    tail = total + lax.iota(jnp.int32, PAD)
    nothing = jnp.zeros_like(tail)
    store(tail, nothing, nothing, tail < jnp.maximum((total + PAD - 1) // PAD, 1) * PAD)


def list_halves(
    bits: jax.Array, start: jax.Array, *, half: int, tuning: Tuning, interpret: bool = False
) -> tuple[Halves, jax.Array]:
    """Lists the keys of every block of SPAN queries by halves.

    Args:
        bits, start: as in `list_keys`.
        half: room for the keys of one half of the queries. With more keys a list is wrong, but stays within its room.

    Returns:
        The lists, with room for 2 * half entries, and [B, n] int32 as `list_keys`.
    """
    B, C, W = bits.shape
    n = pl.cdiv(C, SPAN)
    entries = jax.ShapeDtypeStruct((B, n, 2 * half), jnp.int32)
    numbers = [jax.ShapeDtypeStruct((B, n, *more), jnp.int32) for more in ((3,), ())]
    ids, members, counts, own = pl.pallas_call(
        partial(_list_halves, C=C, W=W, half=half, tuning=tuning),
        grid=(n, B),
        out_shape=(entries, entries, *numbers),
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="list_halves",
    )(start, lax.bitcast_convert_type(bits, jnp.int32))
    return Halves(ids, members, counts), own


def _list_halves(
    start_ref: Any,
    bits_ref: Any,
    ids_ref: Any,
    members_ref: Any,
    counts_ref: Any,
    own_ref: Any,
    *,
    C: int,
    W: int,
    half: int,
    tuning: Tuning,
) -> None:
    block, b = pl.program_id(0), pl.program_id(1)
    words = _Words(bits_ref, b, block * SPAN, SPAN, C, _live(start_ref[b], (block + 1) * SPAN, C, W))

    def store(at: jax.Array, keys: jax.Array, members: jax.Array, used: jax.Array) -> None:
        spot = jnp.where(used, at, 2 * half)
        plt.store(ids_ref.at[b, block, spot], keys, mask=spot < 2 * half)
        plt.store(members_ref.at[b, block, spot], members, mask=spot < 2 * half)

    def visit(key: jax.Array, rows: list[jax.Array], carry: list[jax.Array]) -> list[jax.Array]:
        *totals, own = carry
        one, two = (reduce(jnp.bitwise_or, rows[i : i + SPAN // 2]) for i in (0, SPAN // 2))
        kinds = [one & ~two, one & two, two & ~one]
        numbers = [lax.population_count(kind) for kind in kinds]
        begins = [total + jnp.cumsum(number) - number for total, number in zip(totals, numbers, strict=True)]

        def place(low: jax.Array, _: jax.Array) -> jax.Array:
            front, both, back = (
                begin + lax.population_count(kind & (low - 1)) for kind, begin in zip(kinds, begins, strict=True)
            )
            front = jnp.where(front < half, front, 2 * half)
            both = jnp.where(both < half, half - 1 - both, 2 * half)
            back = jnp.where(back < half, half + back, 2 * half)
            return jnp.where((kinds[0] & low) != 0, front, jnp.where((kinds[1] & low) != 0, both, back))

        _peel(one | two, rows, key, jnp.zeros_like(one), tuning.parts, store, place)
        totals = [total + jnp.sum(number) for total, number in zip(totals, numbers, strict=True)]
        return [*totals, own + jnp.sum(lax.population_count(rows[-1]))]

    front, both, back, own = words.walk(tuning, visit, [jnp.int32(0)] * 4)
    front = jnp.minimum(front, half)
    for i, count in enumerate((front, jnp.minimum(both, half - front), jnp.minimum(back, half))):
        counts_ref[b, block, i] = count
    own_ref[b, block] = own


def _live(start: jax.Array, end: jax.Array, C: int, W: int) -> jax.Array:
    """Words that hold keys which queries below `end` see."""
    return jnp.minimum((start + jnp.minimum(end, C) + WORD - 1) // WORD, W)


class _Words(NamedTuple):
    """The bits of `queries` rows of sequence `b` from row `first` on, in words below `live`; of C rows in all."""

    bits_ref: Any
    b: jax.Array
    first: jax.Array
    queries: int
    C: int
    live: jax.Array

    def _load(self, w: jax.Array, i: int) -> jax.Array:
        row, used = jnp.minimum(self.first + i, self.C - 1), (w < self.live) & (self.first + i < self.C)
        return plt.load(self.bits_ref.at[self.b, row, w], mask=used, other=0)

    def walk(self, tuning: Tuning, visit: Callable[..., list[jax.Array]], carry: list[jax.Array]) -> list[jax.Array]:
        """Calls `visit` with the first key of each lane's word, the words of all rows, and the carry, which it gives
        back."""
        lanes, stride = lax.iota(jnp.int32, tuning.words), tuning.words * tuning.steps

        def step(i: jax.Array, carry: list[jax.Array]) -> list[jax.Array]:
            places = [(i * tuning.steps + j) * tuning.words + lanes for j in range(tuning.steps)]
            for w, rows in [(w, [self._load(w, j) for j in range(self.queries)]) for w in places]:
                carry = visit(w * WORD, rows, carry)
            return carry

        return lax.fori_loop(0, (self.live + stride - 1) // stride, step, carry)


def _peel(
    union: jax.Array,
    rows: list[jax.Array],
    key: jax.Array,
    begin: jax.Array,
    parts: int,
    store: Callable[..., None],
    place: Callable[[jax.Array, jax.Array], jax.Array] = lambda low, at: at,
) -> None:
    """Stores the keys of one word a lane: bit j of `union` is key `key` + j. `place` tells of a bit where its key goes,
    from itself and from what it is when the first key goes to `begin`."""
    width = WORD // parts
    masks = np.array([((1 << width) - 1) << (width * i) for i in range(parts)], np.uint32).view(np.int32)
    pieces = [union & int(mask) for mask in masks]
    numbers = [lax.population_count(piece) for piece in pieces]
    begins = [begin + sum(numbers[:i], jnp.zeros_like(begin)) for i in range(parts)]

    def peel(_: jax.Array, state: list[tuple[jax.Array, jax.Array]]) -> list[tuple[jax.Array, jax.Array]]:
        rest = []
        for left, at in state:
            low = left & -left
            members = reduce(jnp.bitwise_or, [jnp.where((r & low) != 0, 1 << i, 0) for i, r in enumerate(rows)])
            store(place(low, at), key + lax.population_count(low - 1), members, left != 0)
            rest.append((left ^ low, at + 1))
        return rest

    lax.fori_loop(0, jnp.max(reduce(jnp.maximum, numbers)), peel, list(zip(pieces, begins, strict=True)))
