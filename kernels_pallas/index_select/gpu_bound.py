"""Bounds."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_search import count_two, search, upper_quantile
from kernels_pallas.index_select.gpu_threshold import iota, ones, place_of, put
from kernels_pallas.index_select.sort_keys import LOWEST, score_of, sort_key

DEVIATIONS = 5.0


def positions(start: jax.Array, chunk: int, capacity: int, n: int) -> jax.Array:
    """[B, n] int32: ascending keys, one of each n-th of those that a chunk of queries sees."""
    seen = jnp.clip(start + chunk, n, capacity)[:, None]
    i = jnp.arange(n, dtype=jnp.int32)
    stride, rest = lax.div(seen, n), lax.rem(seen, n)
    # Multiples of the golden ratio: places within the strides as even as they can be, in step with nothing.
    jitter = (i.astype(jnp.uint32) * jnp.uint32(2654435769)) >> 16
    jitter = (jitter * stride.astype(jnp.uint32)) >> 16
    return i * stride + lax.div(i * rest, n) + jitter.astype(jnp.int32)


def bounds(
    samples: jax.Array, places: jax.Array, start: jax.Array, first: jax.Array, total: int, chunk: int, capacity: int,
    topk: int, warps: int = 4, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    rows = samples.shape[0]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        partial(_body, total=total, chunk=chunk, capacity=capacity, topk=topk, lanes=32 * warps),
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        grid=(rows,),
        in_specs=[anywhere] * 4,
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="index_select_bounds",
    )(first, start, places, samples)
    return out[:, 0]


def _body(
    first: Any, start: Any, places: Any, samples: Any, out: Any,
    *, total: int, chunk: int, capacity: int, topk: int, lanes: int,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    n = samples.shape[1]
    lane = iota(lanes)
    row, seen = place_of(start, first, r, total, chunk, capacity)
    b = lax.div(jnp.minimum(row, total - 1), chunk)

    def mark(bound: jax.Array) -> None:
        put(out, r, lane, jnp.broadcast_to(bound, lane.shape), lane == 0)

    def find() -> None:
        values = []
        for j in range(n // lanes):
            slot = j * lanes + lane
            x = plt.load(samples.at[r, slot])
            values.append(jnp.where(plt.load(places.at[b, slot]) < seen, x, jnp.nan))
        least, most, sums, squares, known = jnp.inf, -jnp.inf, 0.0, 0.0, 0
        for x in values:
            real = x == x
            y = jnp.where(real, x, 0.0)
            least = jnp.minimum(least, jnp.where(real, x, jnp.inf))
            most = jnp.maximum(most, jnp.where(real, x, -jnp.inf))
            sums, squares, known = sums + y, squares + y * y, known + ones(real)
        known = jnp.sum(known)
        size, everything = known.astype(jnp.float32), seen.astype(jnp.float32)
        expected = size * topk / everything
        spread = jnp.sqrt(expected * (1 - topk / everything) * jnp.maximum(1 - size / everything, 0.0))
        rank = (expected + DEVIATIONS * spread).astype(jnp.int32) + 1
        slack = lax.div(rank, 16)
        mean = jnp.sum(sums) / size
        deviation = jnp.sqrt(jnp.maximum(jnp.sum(squares) / size - mean * mean, 0.0))

        def guess(count: jax.Array) -> jax.Array:
            return mean + deviation * upper_quantile(jnp.clip(count / size, 1e-6, 0.99))

        def count(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
            low, high = score_of(p), score_of(q)
            both = jnp.sum(sum(jnp.where(x >= low, 1, 0) + jnp.where(x >= high, 1 << 16, 0) for x in values))
            return both & 0xFFFF, both >> 16

        wanted = rank.astype(jnp.float32), slack.astype(jnp.float32)
        pair = guess(wanted[0] + wanted[1]), guess(wanted[0])
        key, *_ = search(count, sort_key(jnp.min(least)), sort_key(jnp.max(most)), known, rank, slack, pair)
        mark(jnp.where(rank < known, score_of(key), -jnp.inf))

    pl.when(seen > topk)(find)
    pl.when(seen <= topk)(partial(mark, jnp.float32(jnp.inf)))
