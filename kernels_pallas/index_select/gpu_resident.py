"""Exact causal top-k of rows of scores, as bits, while everything that is compared stays in registers. Triton body, one
program of 8 warps a row; rows that it cannot take are left, and marked, for `gpu_topk`.

Keys are taken in units of 8: 32 bytes of scores, one byte of the result. `gpu_units` lists the units among which the k
best keys are, k to 1.1 k of them, and a bound of the scores. A row:

1. Gather the listed units' scores, two loads of 16 bytes a unit: the only scattered reads, and the only ones of scores.
   Scores below the bound are struck out.
2. Find the k-th score by counting at two bounds at a time, the first two where an exponential tail would have it; and
   where scores equal it the index below which they are taken.
3. Write a byte for each listed unit over a cleared row.

A row is left where its list is too short: where more than a tenth of k units tie with the k-th.

Measured on one H200, 1,024 rows, in ns a row, lists included (scores of neighbouring rows and keys alike), beside the
one kernel that did all of it before, with one row a processor, in the same run:

| context | 8K | 16K | 32K | 64K | 128K |
|---|---|---|---|---|---|
| this | 120 | 131 | 146 | 154 | 165 |
| of it `gpu_units` | 36 | 40 | 59 | 45 | 54 |
| one kernel | 175 | 203 | 242 | 270 | 275 |

Bytes a row of 128K keys: 64 KiB of maxima, 2,100 sectors of 32 bytes in as many lines of 128, 16 KiB of result: 30 to
80 ns at 4.2 TB/s, by what the memory fetches for a sector. Two rows share a processor as long as the compiler finds 128
registers a thread enough, which the order of a few instructions decides. Look before changing any.
"""

from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select import gpu_units
from kernels_pallas.index_select.gpu_score import UNIT, UNITS
from kernels_pallas.index_select.gpu_search import search
from kernels_pallas.index_select.gpu_threshold import clear, iota, ones, place_of, put, take_all
from kernels_pallas.index_select.sort_keys import score_of, sort_key

HALF = UNIT // 2
"""Scores that a thread loads at once: 16 bytes."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warps: int = 8
    spare: int = 16
    """One part in so many more units than k have room in the list at least."""
    units: gpu_units.Tuning = field(default_factory=gpu_units.Tuning)

    @property
    def lanes(self) -> int:
        return 32 * self.warps

    def room(self, topk: int) -> int:
        """Units that a list holds: those of the last tile are always in it."""
        return -(-(topk + topk // self.spare + UNITS) // self.lanes) * self.lanes


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
    if width > tuning.units.most * tuning.units.lanes:
        return bits, jnp.ones(rows, jnp.int32)
    total_rows, room = bits.shape[0], tuning.room(topk)
    units, sizes, bounds = gpu_units.list_rows(
        maxima, start, first, total_rows, chunk, topk, room, tuning.units, interpret
    )
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    bits = pl.pallas_call(
        partial(_body, chunk=chunk, topk=topk, tuning=tuning, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(bits.shape, bits.dtype),
        grid=(rows,),
        in_specs=[anywhere] * 7,
        out_specs=anywhere,
        input_output_aliases={6: 0},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="index_select_resident",
    )(first, start, units, sizes, bounds, scores, bits)
    return bits, ones(sizes[:, 0] == gpu_units.LEFT)


def _body(
    first: Any, start: Any, units: Any, sizes: Any, bounds: Any, scores: Any, _: Any, bits: Any,
    *, chunk: int, topk: int, tuning: Tuning, interpret: bool,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    rows, width = bits.shape
    lanes, capacity = tuning.lanes, width * UNIT
    row, seen = place_of(start, first, r, rows, chunk, capacity)
    size, least = sizes[r, 0], bounds[r, 0]
    lane = iota(lanes)

    def empty() -> None:
        clear(bits, row, lanes)
        if not interpret:
            plt.debug_barrier()

    def take() -> None:
        empty()
        take_all(bits, row, seen, lanes)

    def find() -> None:
        slots = [j * lanes + lane for j in range(tuning.room(topk) // lanes)]
        own = [plt.load(units.at[r, slot], mask=slot < size, other=-1) for slot in slots]
        # [lanes, 4] twice a unit: so a thread has whole units, and sums over them are its own.
        pieces = [(unit, part * HALF + iota(HALF)[None]) for unit in own for part in range(2)]
        # No masks: with masks that differ within a vector Triton loads single scores.
        numbers = [plt.load(scores.at[r, jnp.maximum(unit, 0)[:, None] * UNIT + bit]) for unit, bit in pieces]
        empty()
        known = [jnp.where(unit >= 0, seen - unit * UNIT, 0)[:, None] for unit in own]
        values, found = [], (jnp.inf, -jnp.inf, 0.0, 0)
        for j, ((_, bit), x) in enumerate(zip(pieces, numbers, strict=True)):
            values.append(_strike_out(x, bit, known[j // 2], least, interpret))
            found = _measure(found, values[-1])
        low, high, n, guess = _expect(found, topk)
        key, reach, above = search(partial(_count_two, values, interpret), low, high, n, topk, 0, guess)
        kth = score_of(key)
        more, equal = _bytes(pieces, [x > kth for x in values]), _bytes(pieces, [x == kth for x in values])

        def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = state
            middle = lax.div(low + high, 2)
            taken = [lax.population_count(e & _before(unit, middle)) for unit, e in zip(own, equal, strict=True)]
            fits = jnp.sum(sum(taken)) <= topk - above
            return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

        # Largest cut with at most the wanted ties below it, as in the reference; everything where all are wanted.
        low = jnp.where(reach != topk, jnp.int32(0), jnp.int32(capacity))
        cut, _ = lax.while_loop(lambda state: state[1] - state[0] > 1, halve, (low, jnp.int32(capacity + 1)))
        for unit, m, e in zip(own, more, equal, strict=True):
            put(bits, row, unit, (m | (e & _before(unit, cut))).astype(jnp.uint8), unit >= 0)

    pl.when((seen > 0) & (seen <= topk))(take)
    pl.when(size > 0)(find)


def _strike_out(x: jax.Array, bit: jax.Array, known: jax.Array, least: jax.Array, interpret: bool) -> jax.Array:
    """NaN in the place of scores below a bound and of those that are not among a unit's `known` first."""
    bit, known, least = (jnp.broadcast_to(a, x.shape) for a in (bit, known, least))
    if interpret:
        return jnp.where((bit < known) & (x >= least), x, jnp.nan)
    return _assembled(
        "{.reg .pred p; setp.lt.s32 p, $2, $3; setp.ge.and.f32 p, $1, $4, p; selp.f32 $0, $1, 0f7FC00000, p;}",
        "=f,0,r,r,f",
        *(x, bit, known, least),
    )


def _measure(found: tuple[Any, ...], x: jax.Array) -> tuple[Any, ...]:
    """Each lane's smallest and largest value, sum and number of values (NaN: none), with those of x."""
    least, most, total, n = found
    real = x == x
    return (
        jnp.minimum(least, jnp.min(jnp.where(real, x, jnp.inf), axis=1)),
        jnp.maximum(most, jnp.max(jnp.where(real, x, -jnp.inf), axis=1)),
        total + jnp.sum(jnp.where(real, x, 0.0), axis=1),
        n + jnp.sum(ones(real), axis=1),
    )


def _expect(found: tuple[Any, ...], k: int) -> tuple[jax.Array, jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Sort keys of the smallest and the largest value, how many there are, and two bounds beside the k-th largest if
    values thin out exponentially."""
    least, most, total, n = found
    bottom = jnp.min(least)
    low, high, n = sort_key(bottom), sort_key(jnp.max(most)), jnp.sum(n)
    size = n.astype(jnp.float32)
    excess = jnp.sum(total) / size - bottom
    middle = bottom + excess * jnp.log(size / k)
    return low, high, n, (middle - 0.1 * excess, middle + 0.1 * excess)


def _count_two(values: list[Any], interpret: bool, p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many values reach two bounds, as `gpu_search.search` wants it."""
    both = jnp.zeros(values[0].shape, jnp.int32)
    low, high = (jnp.broadcast_to(score_of(key), both.shape) for key in (p, q))
    for x in values:
        if interpret:
            both += jnp.where(x >= low, 1, 0) + jnp.where(x >= high, 1 << 16, 0)
        else:
            both = _assembled(
                "{.reg .pred p, q; setp.ge.f32 p, $2, $3; setp.ge.f32 q, $2, $4;"
                " @p add.s32 $0, $0, 1; @q add.s32 $0, $0, 65536;}",
                "=r,0,f,f,f",
                *(both, x, low, high),
            )
    both = jnp.sum(both)
    return both & 0xFFFF, both >> 16


def _assembled(code: str, constraints: str, *args: jax.Array) -> jax.Array:
    """Instructions for each element, with a result of the kind of the first argument.

    In this order and with no more registers than these: the compiler would rather have more conditions and summands
    at a time than two rows a processor.
    """
    shape = jax.ShapeDtypeStruct(args[0].shape, args[0].dtype)
    return plt.elementwise_inline_asm(code, args=args, constraints=constraints, pack=1, result_shape_dtypes=[shape])[0]


def _bytes(pieces: list[Any], masks: list[Any]) -> list[Any]:
    """Masks of half units → a bit for each key of a unit."""
    parts = [
        jnp.sum(jnp.where(mask, lax.shift_left(jnp.int32(1), bit), 0), axis=1)
        for (_, bit), mask in zip(pieces, masks, strict=True)
    ]
    return [parts[j] + parts[j + 1] for j in range(0, len(parts), 2)]


def _before(unit: jax.Array, cut: jax.Array) -> jax.Array:
    """The bits of a unit's keys whose index is below `cut`."""
    return lax.shift_left(jnp.ones_like(unit), jnp.clip(cut - unit * UNIT, 0, UNIT)) - 1
