"""The k-th best score of each row, from lists of candidates, for `gpu_bits`. Triton body, a program of 8 warps a row.

`gpu_score.candidates` lists the scores that reach a row's bound. If none was lost and there are at least k, the k best
are among them. A row:

1. Load its lists, a few lanes a list, into registers: some 3,000 scores in 7,168 places.
2. Find the k-th by counting at two bounds at a time, the first two where an exponential tail would have it.
3. Where more scores equal it than are wanted, find the key below which they are taken, by reading the lists again.

Measured on one H200, ns a row of 8,192: 15 at 8K, 17 to 19 at 128K; 31 with 16 warps.

The compiler needs 60 registers, so that four rows share a processor. What is read in loops must not be unrolled: the
addresses of 28 scores are as many pairs of registers (124 then, and 26 ns).
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_filter import FULL
from kernels_pallas.index_select.gpu_pieces import count_two, iota, ones, place_of, put_one, tie_cut
from kernels_pallas.index_select.gpu_search import search
from kernels_pallas.index_select.sort_keys import score_of, sort_key

LEFT = -1
"""In the place of a cut: the candidates are not enough, or not all there."""
NAN = 0x7FC00000


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warps: int = 8
    """Powers of two, with at least as many lanes as a row has lists."""


def thresholds(
    lists: jax.Array,
    sizes: jax.Array,
    start: jax.Array,
    first: jax.Array,
    total: int,
    chunk: int,
    capacity: int,
    topk: int,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """What tells the selected candidates: scores above the first result, or equal to it with a key below the second.

    Args:
        lists, sizes: as `gpu_score.candidates` leaves them.
        start, first, total, chunk, capacity, topk, interpret: as in `gpu_bound.bounds`.
        tuning: sizes.

    Returns:
        [rows] float32 and [rows] int32, LEFT where the lists do not tell. Without a meaning for rows that see at most
        topk keys.
    """
    rows = lists.shape[0]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    shape = {"total": total, "chunk": chunk, "capacity": capacity, "topk": topk}
    kth, cut = pl.pallas_call(
        partial(_body, **shape, lanes=32 * tuning.warps, interpret=interpret),
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
    _, n_lists, room, _ = lists.shape
    _, seen = place_of(start, first, r, total, chunk, capacity)
    share = lanes // n_lists
    mine, own = lax.div(iota(lanes), share), lax.rem(iota(lanes), share)
    steps = room // share

    def mark(kth: jax.Array, cut: jax.Array) -> None:
        put_one(kth_out, r, kth, lanes)
        put_one(cut_out, r, cut, lanes)

    def find() -> None:
        size = plt.load(sizes.at[r, mine])
        n = jnp.sum(jnp.where(own == 0, size, 0))
        enough = (jnp.max(size) < FULL) & (n >= topk)
        pl.when(enough)(partial(select, size, n))
        pl.when(~enough)(partial(mark, jnp.float32(0), jnp.int32(LEFT)))

    def select(size: jax.Array, n: jax.Array) -> None:
        def score(j: Any) -> jax.Array:
            slot = j * share + own
            x = plt.load(lists.at[r, mine, slot, 0], mask=slot < size, other=NAN)
            return lax.bitcast_convert_type(x, jnp.float32)

        values = [score(j) for j in range(steps)]
        least, most, total = jnp.inf, -jnp.inf, 0.0
        for x in values:
            real = x == x
            least = jnp.minimum(least, jnp.where(real, x, jnp.inf))
            most = jnp.maximum(most, jnp.where(real, x, -jnp.inf))
            total += jnp.where(real, x, 0.0)
        bottom, size_n = jnp.min(least), n.astype(jnp.float32)
        excess = jnp.sum(total) / size_n - bottom
        middle = bottom + excess * jnp.log(size_n / topk)
        guess = middle - 0.1 * excess, middle + 0.1 * excess
        low, high = sort_key(bottom), sort_key(jnp.max(most))
        key, reach, above = search(partial(count_two, values, interpret), low, high, n, topk, 0, guess)
        kth = score_of(key)

        def equal_below(cut: jax.Array) -> jax.Array:
            def count(j: jax.Array, found: jax.Array) -> jax.Array:
                return found + ones((score(j) == kth) & (plt.load(lists.at[r, mine, j * share + own, 1]) < cut))

            return jnp.sum(lax.fori_loop(0, steps, count, jnp.zeros((lanes,), jnp.int32)))

        mark(kth, tie_cut(equal_below, reach, above, topk, capacity))

    pl.when(seen > topk)(find)
    pl.when(seen <= topk)(partial(mark, jnp.float32(0), jnp.int32(0)))
