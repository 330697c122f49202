"""Exact causal top-k of rows of scores, as bits, for `gpu_bits`. Triton body, one program a row.

Keys are taken in units of 8: 32 bytes of scores, one byte of the result. `gpu_score` left each unit's maximum. A row:

1. Bounds: strided maxima of the units' maxima leave 4,096 scores of different keys in registers; their k-th largest
   is a lower bound of the row's k-th score, and a smaller quantile is a good guess of an upper bound.
2. List the units whose maximum reaches the lower bound (2,600 of 16,384 at 128K where scores are independent) and
   gather them into a dense scratch row: the only scattered reads, and the only ones of scores.
3. The k-th score: count at both bounds, halve the bracket while it holds too many, move its members to a list, and
   find the k-th in registers (`gpu_threshold`). Where scores equal to it exceed k, the last index taken is counted out.
4. Emit a byte for each listed unit over a cleared row.

Nothing is assumed about the data: a wrong guess costs more counting, and rows with too many listed units (ties) go
through steps 3 and 4 with all their scores (6 us a row of 128K, measured with 8 warps and without a guess). No atomics:
results are the same in every run.

Bytes a row of 128K keys: 64 KiB of maxima and 2,600 sectors, each 64 bytes of memory, = 0.08 us at 3 TB/s; then four
passes over 80 KiB of scratch in the second-level cache. Measured 0.37 us in blocks of
512 rows (0.16 us at 16K): short dependent steps that wait for memory.

Why Triton: gathers, scans and stores at computed places are what it has and Mosaic GPU has not.

Tried and lost: a scan a tile to compact (20 barriers a tile, mostly changes of layout); contiguous ranges of units a
lane (each sector read twice); gathering anew in every pass (each misses the cache, whose lines are 128 bytes: 50 us a
pass and 512 rows); a guess that is no upper bound, so that the bracket has to be halved (twice the time); 4 warps a row
instead of 16 (+50%); clearing the result in XLA (170 us for 128 MiB of bytes).
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_score import QUERIES, TILE, UNIT, UNITS, unit_at
from kernels_pallas.index_select.gpu_threshold import (
    LOWEST,
    MINUS_INFINITY,
    Members,
    Tuning,
    ones,
    put,
    score_of,
    sort_key,
    steps_of,
    threshold,
)


def spare_rows(S: int, tuning: Tuning) -> int:
    """Rows past the last that reads of whole vectors may touch."""
    return -(-max(tuning.groups, 32 * tuning.warps * tuning.unroll, tuning.gather) * UNIT // S)


def select_rows(
    scores: jax.Array,
    maxima: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    first: jax.Array,
    chunk: int,
    topk: int,
    tuning: Tuning,
    interpret: bool = False,
) -> jax.Array:
    """Selects the top-k of the visible scores of each row.

    Args:
        scores: [rows + spare, S] float32 of the rows that begin at block `first`, as `gpu_score.scores` leaves them.
        maxima: [rows + spare, S // UNIT] float32.
        bits: [B * chunk, S // UNIT] uint8, of which these rows are overwritten, in place.
        start: [B] int32.
        first: [1] int32, in blocks of QUERIES rows.
        chunk: rows of a sequence.
        topk: how many.
        tuning: sizes.
        interpret: run on any platform.
    """
    rows = maxima.shape[0] - spare_rows(scores.shape[1], tuning)
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    scratch = (
        jax.ShapeDtypeStruct((rows, tuning.listed), jnp.int32),
        jax.ShapeDtypeStruct((rows + 1, tuning.listed * UNIT), jnp.float32),
        jax.ShapeDtypeStruct((rows, tuning.bracket), jnp.int32),
    )
    bits, *_ = pl.pallas_call(
        partial(_body, chunk=chunk, topk=topk, tuning=tuning, interpret=interpret),
        out_shape=(jax.ShapeDtypeStruct(bits.shape, bits.dtype), *scratch),
        grid=(rows,),
        in_specs=[anywhere] * 5,
        out_specs=(anywhere,) * 4,
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=2),
        interpret=interpret,
        name="index_select_bits",
    )(first, start, scores, maxima, bits)
    return bits


def _body(
    first: Any, start: Any, scores: Any, maxima: Any, _: Any, bits: Any, units: Any, dense: Any, bracket: Any,
    *, chunk: int, topk: int, tuning: Tuning, interpret: bool,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    row = first[0] * QUERIES + r
    rows, width = bits.shape

    def select() -> None:
        # Rows that only fill a block up may lie past the end of the sequence.
        seen = jnp.minimum(start[lax.div(row, chunk)] + lax.rem(row, chunk) + 1, width * UNIT)
        vector = min(16 * 32 * tuning.warps, width & -width)

        def clear(i: jax.Array, _: None) -> None:
            plt.store(bits.at[row, i * vector + jnp.arange(vector, dtype=jnp.int32)], jnp.zeros((vector,), jnp.uint8))

        lax.fori_loop(0, width // vector, clear, None)
        barrier()
        pl.when(seen <= topk)(partial(_all, bits, row, seen, tuning))
        pl.when(seen > topk)(partial(search, seen))

    def barrier() -> None:
        if not interpret:
            plt.debug_barrier()

    def search(seen: jax.Array) -> None:
        floor, guess = _bounds(scores, maxima, r, seen, topk, tuning)
        least = score_of(floor)
        lanes, unroll = 32 * tuning.warps, tuning.unroll
        lane = jnp.arange(lanes, dtype=jnp.int32)
        eight = jnp.arange(UNIT, dtype=jnp.int32)[None]
        steps = steps_of(steps_of(seen, TILE) * UNITS, lanes * unroll)

        def reaching(step: jax.Array) -> list[tuple[jax.Array, jax.Array]]:
            found = []
            for j in range(unroll):
                position = (step * unroll + j) * lanes + lane
                unit = unit_at(position)
                top = plt.load(maxima.at[r, position])
                # The last unit's maximum may be that of a key that the query does not see.
                last = lax.div(seen - 1, UNIT)
                found.append((unit, (unit <= last) & ((top >= least) | (unit == last))))
            return found

        def count(step: jax.Array, counts: jax.Array) -> jax.Array:
            return counts + sum(ones(keep) for _, keep in reaching(step))

        counts = lax.fori_loop(0, steps, count, jnp.zeros((lanes,), jnp.int32))
        listed = jnp.sum(counts)

        def among_listed() -> Members:
            def place(step: jax.Array, at: jax.Array) -> jax.Array:
                for unit, keep in reaching(step):
                    put(units, r, at, unit, keep)
                    at += ones(keep)
                return at

            lax.fori_loop(0, steps, place, jnp.cumsum(counts) - counts)
            barrier()

            def tile(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                slot = i * tuning.gather + jnp.arange(tuning.gather, dtype=jnp.int32)
                valid = slot < listed
                return valid, plt.load(units.at[r, slot], mask=valid, other=0), slot[:, None] * UNIT + eight

            def gather(i: jax.Array, _: None) -> None:
                valid, unit, place = tile(i)
                index = unit[:, None] * UNIT + eight
                x = jnp.where(valid[:, None] & (index < seen), plt.load(scores.at[r, index]), jnp.nan)
                plt.store(dense.at[r, place], x)

            tiles = steps_of(listed, tuning.gather)
            lax.fori_loop(0, tiles, gather, None)
            barrier()

            def load(place: jax.Array) -> jax.Array:
                return jnp.where(place < listed * UNIT, plt.load(dense.at[r, place]), jnp.nan)

            def index(place: jax.Array) -> jax.Array:
                unit = plt.load(units.at[r, lax.div(place, UNIT)], mask=place < listed * UNIT, other=0)
                return unit * UNIT + lax.rem(place, UNIT)

            def load_tile(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                valid, unit, place = tile(i)
                return valid, unit, plt.load(dense.at[r, place])

            return Members(listed * UNIT, load, index, tiles, load_tile)

        def among_all() -> Members:
            def load(index: jax.Array) -> jax.Array:
                return jnp.where(index < seen, plt.load(scores.at[r, index]), jnp.nan)

            def load_tile(i: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
                unit = i * tuning.gather + jnp.arange(tuning.gather, dtype=jnp.int32)
                return unit * UNIT < seen, unit, load(unit[:, None] * UNIT + eight)

            return Members(seen, load, lambda index: index, steps_of(seen, tuning.gather * UNIT), load_tile)

        def finish(members: Callable[[], Members]) -> None:
            found = members()
            kth, cut = threshold(found, floor, guess, bracket, r, topk, width * UNIT, barrier, tuning)

            def emit(i: jax.Array, _: None) -> None:
                valid, unit, x = found.tile(i)
                take = ones((x > kth) | ((x == kth) & (unit[:, None] * UNIT + eight < cut)))
                byte = jnp.sum(lax.shift_left(take, jnp.broadcast_to(eight, take.shape)), axis=1)
                put(bits, row, unit, byte.astype(jnp.uint8), valid)

            lax.fori_loop(0, found.tiles, emit, None)

        pl.when(listed <= tuning.listed)(partial(finish, among_listed))
        pl.when(listed > tuning.listed)(partial(finish, among_all))

    pl.when(row < rows)(select)


def _all(bits: Any, row: jax.Array, seen: jax.Array, tuning: Tuning) -> None:
    """Everything visible."""
    lanes = 32 * tuning.warps

    def step(i: jax.Array, _: None) -> None:
        unit = i * lanes + jnp.arange(lanes, dtype=jnp.int32)
        keys = jnp.clip(seen - unit * UNIT, 0, UNIT)
        byte = lax.shift_left(jnp.ones_like(unit), keys) - 1
        put(bits, row, unit, byte.astype(jnp.uint8), keys > 0)

    lax.fori_loop(0, steps_of(seen, lanes * UNIT), step, None)


def _bounds(
    scores: Any, maxima: Any, r: jax.Array, seen: jax.Array, topk: int, tuning: Tuning
) -> tuple[jax.Array, jax.Array]:
    """Sort keys: a lower bound of the k-th score, and a larger number that probably is an upper bound."""
    groups = tuning.groups
    short = seen <= groups * UNIT  # maxima of units would be too few
    lane = jnp.arange(groups, dtype=jnp.int32)

    def of_scores(i: jax.Array, best: jax.Array) -> jax.Array:
        index = i * groups + lane
        return jnp.maximum(best, jnp.where(index < seen, plt.load(scores.at[r, index]), -jnp.inf))

    def of_maxima(i: jax.Array, best: jax.Array) -> jax.Array:
        position = i * groups + lane
        whole = unit_at(position) * UNIT + UNIT <= seen
        return jnp.maximum(best, jnp.where(whole, plt.load(maxima.at[r, position]), -jnp.inf))

    best = jnp.full((groups,), -jnp.inf, jnp.float32)
    best = lax.fori_loop(0, jnp.where(short, steps_of(seen, groups), 0), of_scores, best)
    best = lax.fori_loop(0, jnp.where(short, 0, steps_of(steps_of(seen, TILE) * UNITS, groups)), of_maxima, best)
    keys = sort_key(best)

    # Both quantiles at once; two counts share a word and its reduction.
    def fix_bits(i: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        one = lax.shift_left(jnp.int32(1), 31 - i)
        low, high = found[0] ^ one, found[1] ^ one
        both = jnp.sum(ones(keys >= low) + lax.shift_left(ones(keys >= high), 16))
        return (
            jnp.where(both & 0xFFFF >= topk, low, found[0]),
            jnp.where(lax.shift_right_logical(both, 16) >= topk * tuning.guess // 16, high, found[1]),
        )

    floor, guess = lax.fori_loop(0, tuning.bits, fix_bits, (jnp.int32(LOWEST), jnp.int32(LOWEST)))
    floor = jnp.maximum(floor, MINUS_INFINITY)
    return floor, jnp.maximum(guess, floor + 1)
