"""Kth."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_score import FULL
from kernels_pallas.index_select.gpu_search import search
from kernels_pallas.index_select.gpu_pieces import count_two, iota, ones, place_of, put_one
from kernels_pallas.index_select.sort_keys import score_of, sort_key

LEFT = -1
NAN = 0x7FC00000


@dataclass(frozen=True)
class Tuning:
    warps: int = 8


def thresholds(
    lists: jax.Array, sizes: jax.Array, start: jax.Array, first: jax.Array, total: int, chunk: int, capacity: int,
    topk: int, tuning: Tuning = Tuning(), interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:  # fmt: skip
    rows = lists.shape[0]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    kth, cut = pl.pallas_call(
        partial(_body, total=total, chunk=chunk, capacity=capacity, topk=topk, lanes=32 * tuning.warps, interpret=interpret),
        out_shape=(jax.ShapeDtypeStruct((rows, 1), jnp.float32), jax.ShapeDtypeStruct((rows, 1), jnp.int32)),
        grid=(rows,),
        in_specs=[anywhere] * 4,
        out_specs=(anywhere,) * 2,
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="index_select_kth",
    )(first, start, sizes, lists)
    return kth[:, 0], cut[:, 0]


def _body(
    first: Any, start: Any, sizes: Any, lists: Any, kth_out: Any, cut_out: Any,
    *, total: int, chunk: int, capacity: int, topk: int, lanes: int, interpret: bool,
) -> None:  # fmt: skip
    r = pl.program_id(0)
    _, segments, room, _ = lists.shape
    _, seen = place_of(start, first, r, total, chunk, capacity)
    lane = iota(lanes)
    share = lanes // segments
    segment, own = lax.div(lane, share), lax.rem(lane, share)

    def mark(kth: jax.Array, cut: jax.Array) -> None:
        put_one(kth_out, r, kth, lanes)
        put_one(cut_out, r, cut, lanes)

    def find() -> None:
        size = plt.load(sizes.at[r, segment])
        fits = jnp.max(size) < FULL
        size = jnp.minimum(size, room)

        def score(j: Any) -> jax.Array:
            slot = j * share + own
            x = plt.load(lists.at[r, segment, slot, 0], mask=slot < size, other=NAN)
            return lax.bitcast_convert_type(x, jnp.float32)

        values = [score(j) for j in range(room // share)]
        least, most, sums, n = jnp.inf, -jnp.inf, 0.0, 0
        for x in values:
            real = x == x
            least = jnp.minimum(least, jnp.where(real, x, jnp.inf))
            most = jnp.maximum(most, jnp.where(real, x, -jnp.inf))
            sums, n = sums + jnp.where(real, x, 0.0), n + ones(real)
        bottom, n = jnp.min(least), jnp.sum(n)
        good = fits & (n >= topk)
        count = n.astype(jnp.float32)
        excess = jnp.sum(sums) / count - bottom
        middle = bottom + excess * jnp.log(count / topk)
        guess = middle - 0.1 * excess, middle + 0.1 * excess

        def select() -> None:
            key, reach, above = search(
                partial(count_two, values, interpret), sort_key(bottom), sort_key(jnp.max(most)), n, topk, 0, guess
            )
            kth = score_of(key)

            def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                low, high = state
                middle = lax.div(low + high, 2)

                def count(j: jax.Array, taken: jax.Array) -> jax.Array:
                    key = plt.load(lists.at[r, segment, j * share + own, 1])
                    return taken + ones((score(j) == kth) & (key < middle))

                taken = lax.fori_loop(0, room // share, count, jnp.zeros((lanes,), jnp.int32))
                fits = jnp.sum(taken) <= topk - above
                return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

            # Largest cut with at most the wanted ties below it, as in the reference; everything where all are wanted.
            low = jnp.where(reach != topk, jnp.int32(0), jnp.int32(capacity))
            cut, _ = lax.while_loop(lambda state: state[1] - state[0] > 1, halve, (low, jnp.int32(capacity + 1)))
            mark(kth, cut)

        pl.when(good)(select)
        pl.when(~good)(partial(mark, jnp.float32(0), jnp.int32(LEFT)))

    pl.when(seen > topk)(find)
    pl.when(seen <= topk)(partial(mark, jnp.float32(0), jnp.int32(capacity)))

