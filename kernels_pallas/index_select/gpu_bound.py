"""Bounds of the rows of a selection, by a sample of their scores, for `gpu_bits`. Triton body, 4 warps a row.

One of every 32 keys (more where few are seen) is scored first. Of a row that sees n keys, of which m are in the sample,
some k m / n sampled ones are among the k best, with a standard deviation of sqrt(k m / n (1 - k / n) (1 - m / n)) for
keys in any order. The bound is a score that so many and five deviations more of the sample reach: in one of a million
rows fewer than k keys reach it, and on the average 1.2 k (8K) to 1.6 k (32K and more). Nothing depends on it but time:
a row with too few or too many candidates is selected otherwise.

Of each stride of keys one is taken, at a place that differs from stride to stride: what repeats along a sequence, as
rows of an image do, is sampled evenly, and neighbours that are alike make the estimate better, not worse.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_filter import TILE
from kernels_pallas.index_select.gpu_pieces import count_two, iota, place_of, put_one
from kernels_pallas.index_select.gpu_search import search, upper_quantile
from kernels_pallas.index_select.sort_keys import score_of, sort_key

DEVIATIONS = 5.0
FEWEST = 1024
"""Keys that are sampled at least, if there are so many."""
WIDEST = 32
"""Keys of which one is sampled at least."""
SLACK = 16
"""One part in so many more may reach a bound, where finding fewer costs more counting."""
WARPS = 4


def sample(start: jax.Array, chunk: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Which keys to score first for queries start, ..., start + chunk - 1.

    Args:
        start: [B] int32.
        chunk: queries of a sequence.
        capacity: keys, a multiple of TILE.

    Returns:
        [B, n] int32, ascending, and [B] int32: key i is one of those from i * stride to (i + 1) * stride - 1, as far as
        those are seen. n is a multiple of TILE.
    """
    n = min(max(-(-capacity // (WIDEST * TILE)) * TILE, 2 * FEWEST), capacity)
    seen = jnp.minimum(start + chunk, capacity)
    stride = jnp.clip(lax.div(seen, FEWEST), 1, WIDEST)
    i = jnp.arange(n, dtype=jnp.int32)
    # Multiples of the golden ratio: places as even as they can be, in step with nothing.
    place = (i.astype(jnp.uint32) * jnp.uint32(2654435769)) >> 16
    place = (place * stride.astype(jnp.uint32)[:, None]) >> 16
    return jnp.minimum(i * stride[:, None] + place.astype(jnp.int32), capacity - 1), stride


def bounds(
    scores: jax.Array,
    stride: jax.Array,
    start: jax.Array,
    first: jax.Array,
    total: int,
    chunk: int,
    capacity: int,
    topk: int,
    interpret: bool = False,
) -> jax.Array:
    """Bounds that probably more than k, but not many more, of each row's scores reach.

    Args:
        scores: [rows, n] float32 of the sampled keys.
        stride: [B] int32, as `sample` gives it.
        start: [B] int32.
        first: [1] int32, the block of QUERIES rows at which these rows begin.
        total: rows of all blocks.
        chunk: rows of a sequence.
        capacity: keys.
        topk: how many.
        interpret: run on any platform.

    Returns:
        [rows] float32: minus infinity where few keys are seen, infinity where at most topk.
    """
    rows = scores.shape[0]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        partial(_body, total=total, chunk=chunk, capacity=capacity, topk=topk, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        grid=(rows,),
        in_specs=[anywhere] * 4,
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="index_select_bounds",
    )(first, start, stride, scores)
    return out[:, 0]


def _body(
    first: Any, start: Any, stride: Any, scores: Any, out: Any,
    *, total: int, chunk: int, capacity: int, topk: int, interpret: bool,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    n, lanes = scores.shape[1], 32 * WARPS
    row, seen = place_of(start, first, r, total, chunk, capacity)

    def find() -> None:
        # Of the last stride that is seen in part nothing is known.
        known = jnp.minimum(lax.div(seen, stride[lax.div(row, chunk)]), n)
        slots = [j * lanes + iota(lanes) for j in range(n // lanes)]
        values = [plt.load(scores.at[r, slot], mask=slot < known, other=jnp.nan) for slot in slots]
        least, most, total, squares = jnp.inf, -jnp.inf, 0.0, 0.0
        for x in values:
            real = x == x
            y = jnp.where(real, x, 0.0)
            least = jnp.minimum(least, jnp.where(real, x, jnp.inf))
            most = jnp.maximum(most, jnp.where(real, x, -jnp.inf))
            total, squares = total + y, squares + y * y
        size, everything = known.astype(jnp.float32), seen.astype(jnp.float32)
        expected = size * topk / everything
        spread = jnp.sqrt(expected * (1 - topk / everything) * jnp.maximum(1 - size / everything, 0.0))
        rank = (expected + DEVIATIONS * spread).astype(jnp.int32) + 1
        slack = lax.div(rank, SLACK)
        mean = jnp.sum(total) / size
        deviation = jnp.sqrt(jnp.maximum(jnp.sum(squares) / size - mean * mean, 0.0))

        def normal(count: jax.Array) -> jax.Array:
            share = jnp.clip(count.astype(jnp.float32) / size, 1e-6, 0.99)
            return mean + deviation * upper_quantile(share)

        low, high = sort_key(jnp.min(least)), sort_key(jnp.max(most))
        guess = normal(rank + slack), normal(rank)
        key, *_ = search(partial(count_two, values, interpret), low, high, known, rank, slack, guess)
        put_one(out, r, jnp.where(rank < known, score_of(key), -jnp.inf), lanes)

    pl.when(seen > topk)(find)
    pl.when(seen <= topk)(lambda: put_one(out, r, jnp.float32(jnp.inf), lanes))
