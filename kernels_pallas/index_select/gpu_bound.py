"""Bounds."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_search import search, upper_quantile
from kernels_pallas.index_select.gpu_pieces import count_two, iota, place_of, put_one
from kernels_pallas.index_select.gpu_score import TILE
from kernels_pallas.index_select.sort_keys import score_of, sort_key

DEVIATIONS = 5.0
FEWEST = 1024
WIDEST = 32


def sample(start: jax.Array, chunk: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Keys by which to guess.

    Returns:
        [B, n] int32 ascending, one of every `stride` keys; [B] int32 strides.
    """
    seen = jnp.minimum(start + chunk, capacity)
    stride = jnp.clip(lax.div(seen, FEWEST), 1, WIDEST)
    i = jnp.arange(count(capacity), dtype=jnp.int32)
    # Multiples of the golden ratio: places within the strides as even as they can be, in step with nothing.
    jitter = (i.astype(jnp.uint32) * jnp.uint32(2654435769)) >> 16
    jitter = (jitter * stride.astype(jnp.uint32)[:, None]) >> 16
    return jnp.minimum(i * stride[:, None] + jitter.astype(jnp.int32), capacity - 1), stride


def count(capacity: int) -> int:
    """How many keys at most are sampled, a multiple of TILE."""
    return min(max(-(-capacity // (WIDEST * TILE)) * TILE, 2 * FEWEST), capacity)


def bounds(
    scores: jax.Array, stride: jax.Array, start: jax.Array, first: jax.Array, total: int, chunk: int, capacity: int,
    topk: int, warps: int = 4, interpret: bool = False,
) -> jax.Array:  # fmt: skip
    rows = scores.shape[0]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    out = pl.pallas_call(
        partial(_body, total=total, chunk=chunk, capacity=capacity, topk=topk, lanes=32 * warps, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct((rows, 1), jnp.float32),
        grid=(rows,),
        in_specs=[anywhere] * 4,
        out_specs=anywhere,
        compiler_params=plt.CompilerParams(num_warps=warps, num_stages=1),
        interpret=interpret,
        name="index_select_bounds",
    )(first, start, stride, scores)
    return out[:, 0]


def _body(
    first: Any, start: Any, stride: Any, scores: Any, out: Any,
    *, total: int, chunk: int, capacity: int, topk: int, lanes: int, interpret: bool,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    n = scores.shape[1]
    lane = iota(lanes)
    row, seen = place_of(start, first, r, total, chunk, capacity)
    b = lax.div(jnp.minimum(row, total - 1), chunk)

    def mark(bound: jax.Array) -> None:
        put_one(out, r, bound, lanes)

    def find() -> None:
        known = jnp.minimum(lax.div(seen, stride[b]), n)
        slots = [j * lanes + lane for j in range(n // lanes)]
        values = [plt.load(scores.at[r, slot], mask=slot < known, other=jnp.nan) for slot in slots]
        least, most, sums, squares = jnp.inf, -jnp.inf, 0.0, 0.0
        for x in values:
            real = x == x
            y = jnp.where(real, x, 0.0)
            least = jnp.minimum(least, jnp.where(real, x, jnp.inf))
            most = jnp.maximum(most, jnp.where(real, x, -jnp.inf))
            sums, squares = sums + y, squares + y * y
        size, everything = known.astype(jnp.float32), seen.astype(jnp.float32)
        expected = size * topk / everything
        spread = jnp.sqrt(expected * (1 - topk / everything) * jnp.maximum(1 - size / everything, 0.0))
        rank = (expected + DEVIATIONS * spread).astype(jnp.int32) + 1
        slack = lax.div(rank, 16)
        mean = jnp.sum(sums) / size
        deviation = jnp.sqrt(jnp.maximum(jnp.sum(squares) / size - mean * mean, 0.0))

        def guess(count: jax.Array) -> jax.Array:
            return mean + deviation * upper_quantile(jnp.clip(count / size, 1e-6, 0.99))

        wanted = rank.astype(jnp.float32), slack.astype(jnp.float32)
        pair = guess(wanted[0] + wanted[1]), guess(wanted[0])
        key, *_ = search(partial(count_two, values, interpret), sort_key(jnp.min(least)), sort_key(jnp.max(most)), known, rank, slack, pair)
        mark(jnp.where(rank < known, score_of(key), -jnp.inf))

    pl.when(seen > topk)(find)
    pl.when(seen <= topk)(partial(mark, jnp.float32(jnp.inf)))
