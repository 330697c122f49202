"""Lists the units of a row of scores among which its top-k are. Triton body, one program of 16 warps a row.

Keys are taken in units of 8, of which `gpu_score` left the maximum. If k units or more have a maximum that reaches a
bound, then every one of the k best keys is in such a unit. A row:

1. Read all maxima into registers, with their extremes, sum and sum of squares.
2. Find a bound that k units or little more reach, by counting: the first two bounds are the quantiles of a normal
   distribution. They nearly always do; if not, `gpu_search.search` goes on. Nothing is assumed about the data.
3. List the units that reach it, a lane its own ones in turn: one prefix sum over the lanes. The last tile of keys,
   which the query may see in part, is always listed.

A row is left if its list is too short, because maxima are equal.

Apart from `gpu_resident`, which reads the list, because a row needs half the registers here: two rows a processor hide
each other's latency.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_score import TILE, UNIT, UNITS, unit_at
from kernels_pallas.index_select.gpu_search import search, upper_quantile
from kernels_pallas.index_select.gpu_threshold import iota, ones, place_of, put, steps_of
from kernels_pallas.index_select.sort_keys import score_of, sort_key

LEFT = -1
"""The length of a list that was not made."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warps: int = 16
    most: int = 64
    """Maxima a lane can hold: `gpu_resident` leaves rows of more keys."""

    @property
    def lanes(self) -> int:
        return 32 * self.warps


def list_rows(
    maxima: jax.Array,
    start: jax.Array,
    first: jax.Array,
    total_rows: int,
    chunk: int,
    topk: int,
    room: int,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Lists the units to select from.

    Args:
        maxima, start, first, chunk, topk, interpret: as in `gpu_topk.select_rows`.
        total_rows: rows of all blocks.
        room: units that a list holds, more than topk + UNITS.
        tuning: sizes.

    Returns:
        units [rows, room] int32; how many there are, [rows, 1] int32: LEFT where there is no room, 0 where the query
        sees at most topk keys or the row lies past the end; [rows, 1] float32, a bound that the topk best scores reach.
    """
    rows = maxima.shape[0]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_body, total_rows=total_rows, chunk=chunk, topk=topk, tuning=tuning),
        out_shape=(
            jax.ShapeDtypeStruct((rows, room), jnp.int32),
            jax.ShapeDtypeStruct((rows, 1), jnp.int32),
            jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        ),
        grid=(rows,),
        in_specs=[anywhere] * 3,
        out_specs=(anywhere,) * 3,
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="index_select_units",
    )(first, start, maxima)


def _body(
    first: Any, start: Any, maxima: Any, units: Any, sizes: Any, bounds: Any,
    *, total_rows: int, chunk: int, topk: int, tuning: Tuning,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    width, lanes = maxima.shape[1], tuning.lanes
    most = units.shape[1] - UNITS
    lane = iota(lanes)
    _, seen = place_of(start, first, r, total_rows, chunk, width * UNIT)

    def mark(size: jax.Array, bound: jax.Array) -> None:
        put(sizes, r, lane, jnp.broadcast_to(size, lane.shape), lane == 0)
        put(bounds, r, lane, jnp.broadcast_to(bound, lane.shape), lane == 0)

    def find() -> None:
        whole = lax.div(seen, TILE) * UNITS
        places = [j * lanes + lane for j in range(-(-width // lanes))]
        tops = [plt.load(maxima.at[r, place], mask=place < whole, other=jnp.nan) for place in places]
        low, high, guess = _expect(tops, whole, topk, most - topk)
        key, *_ = search(partial(_count_two, tops), low, high, whole, topk, most - topk, guess)
        # All of so few fit.
        least = jnp.where(whole <= most, -jnp.inf, score_of(key))
        kept = sum(ones(top >= least) for top in tops)
        listed = jnp.sum(kept)
        fits = listed <= most
        pl.when(fits)(partial(write, places, tops, least, jnp.cumsum(kept) - kept, whole, listed))
        # Fewer than k maxima bound no score.
        bound = jnp.where(whole < topk, -jnp.inf, score_of(key))
        mark(jnp.where(fits, listed + steps_of(seen - whole * UNIT, UNIT), LEFT), bound)

    def write(
        places: list[Any], tops: list[Any], least: jax.Array, at: jax.Array, whole: jax.Array, listed: jax.Array
    ) -> None:
        for place, top in zip(places, tops, strict=True):
            keep = top >= least
            put(units, r, at, unit_at(place), keep)
            at += ones(keep)
        rest = whole + iota(UNITS)
        put(units, r, listed + iota(UNITS), rest, rest * UNIT < seen)

    pl.when(seen > topk)(find)
    pl.when(seen <= topk)(partial(mark, jnp.int32(0), jnp.float32(0)))


def _count_two(tops: list[Any], p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many maxima reach two bounds, as `gpu_search.search` wants it."""
    low, high = score_of(p), score_of(q)
    both = jnp.sum(sum(jnp.where(top >= low, 1, 0) + jnp.where(top >= high, 1 << 16, 0) for top in tops))
    return both & 0xFFFF, both >> 16


def _expect(
    tops: list[Any], n: jax.Array, k: int, slack: int
) -> tuple[jax.Array, jax.Array, tuple[jax.Array, jax.Array]]:
    """Sort keys of the smallest and the largest of n maxima (NaN: none); two bounds that k and two thirds or a third of
    the slack reach, if maxima are distributed normally."""
    least, most, total, squares = jnp.inf, -jnp.inf, 0.0, 0.0
    for top in tops:
        real = top == top
        x = jnp.where(real, top, 0.0)
        least, most = (
            jnp.minimum(least, jnp.where(real, top, jnp.inf)),
            jnp.maximum(most, jnp.where(real, top, -jnp.inf)),
        )
        total, squares = total + x, squares + x * x
    size = n.astype(jnp.float32)
    mean = jnp.sum(total) / size
    deviation = jnp.sqrt(jnp.maximum(jnp.sum(squares) / size - mean * mean, 0.0))

    def bound(count: float) -> jax.Array:
        return mean + deviation * upper_quantile(jnp.minimum(count / size, 0.99))

    return sort_key(jnp.min(least)), sort_key(jnp.max(most)), (bound(k + slack * 2 / 3), bound(k + slack / 3))
