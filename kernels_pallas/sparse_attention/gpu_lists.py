"""From bits to lists: which keys a block of neighbouring queries selects together. Triton body, used by attend_bits.

Schedule. One block of `queries` rows of bits per program. A word is OR-ed over the rows; its population count gives
each lane its place in the list by a prefix sum; then every lane peels the lowest bits off its word, in `parts` pieces
side by side because one chain of dependent bits is all latency, and stores key and members. Lists are ascending.

Floor: bits are read once, 4 bytes for 32 keys of a query: 4 us for 8,192 queries over 16K keys. What is measured is
the latency of peeling and of scattered stores; a fixed walk over all 32 bits of a word took 1.3 to 7 times as long.
"""

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
    first = block * queries
    live = jnp.minimum((start_ref[b] + jnp.minimum(first + queries, C) + WORD - 1) // WORD, W)
    if selective:
        flags = refs[0]
        live = jnp.where(flags[b, first // SPAN] != 0, live, 0)
    lanes = lax.iota(jnp.int32, tuning.words)

    def store(at: jax.Array, keys: jax.Array, members: jax.Array, used: jax.Array) -> None:
        # Unused lanes point outside, so that interpretation, which writes every lane, drops them too.
        spot = jnp.where(used & (at < capacity), at, capacity)
        plt.store(ids_ref.at[b, block, spot], keys, mask=spot < capacity)
        plt.store(members_ref.at[b, block, spot], members, mask=spot < capacity)

    def load(w: jax.Array, i: int) -> jax.Array:
        return plt.load(bits_ref.at[b, jnp.minimum(first + i, C - 1), w], mask=(w < live) & (first + i < C), other=0)

    def walk(step: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        total, own = carry
        places = [(step * tuning.steps + i) * tuning.words + lanes for i in range(tuning.steps)]
        for w, rows in [(w, [load(w, i) for i in range(queries)]) for w in places]:
            union = reduce(jnp.bitwise_or, rows)
            number = lax.population_count(union)
            begin = total + jnp.cumsum(number) - number
            _peel(union, rows, w * WORD, begin, tuning.parts, store)
            total += jnp.sum(number)
            own += jnp.sum(lax.population_count(rows[-1]))
        return total, own

    stride = tuning.words * tuning.steps
    total, own = lax.fori_loop(0, (live + stride - 1) // stride, walk, (jnp.int32(0), jnp.int32(0)))
    total = jnp.minimum(total, capacity)
    counts_ref[b, block] = total
    own_ref[b, block] = own
    tail = total + lax.iota(jnp.int32, PAD)
    nothing = jnp.zeros_like(tail)
    store(tail, nothing, nothing, tail < jnp.maximum((total + PAD - 1) // PAD, 1) * PAD)


def _peel(union: jax.Array, rows: list[jax.Array], key: jax.Array, begin: jax.Array, parts: int, store: Any) -> None:
    """Stores the keys of one word a lane: bit j of `union` is key `key` + j, the first goes to place `begin`."""
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
            store(at, key + lax.population_count(low - 1), members, left != 0)
            rest.append((left ^ low, at + 1))
        return rest

    lax.fori_loop(0, jnp.max(reduce(jnp.maximum, numbers)), peel, list(zip(pieces, begins, strict=True)))
