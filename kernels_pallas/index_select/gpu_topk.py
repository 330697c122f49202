"""Exact causal top-k of rows of scores, as bits, for the rows whose candidates `gpu_score` could not list. Triton body,
one program of 4 warps a row; programs of other rows end at once.

Simple, not fast: ten to twenty passes over the row to find its k-th score by counting, as many to find the index below
which scores equal to it are taken (only where there are too many), one to write the words. Nothing is assumed about the
data, nothing is kept but two counts. Measured: half a millisecond for six rows of 128K; with 16 warps a row as long,
and 3 us more a launch where no row is wanted.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import WORD
from kernels_pallas.index_select.gpu_filter import QUERIES
from kernels_pallas.index_select.gpu_pieces import iota, ones, place_of, put, tie_cut
from kernels_pallas.index_select.gpu_search import search
from kernels_pallas.index_select.sort_keys import score_of, sort_key

WARPS = 4
STEP = 1024
"""Scores that are looked at in a step."""


def select_rows(
    scores: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    first: jax.Array,
    wanted: jax.Array,
    chunk: int,
    topk: int,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Selects the top-k of the visible scores of each row that is wanted and sees more than `topk` keys.

    Args:
        scores: [rows, S] float32 of the rows that begin at block `first`, as `gpu_score.scores` leaves them.
        bits: [B * chunk, S // 32] uint32, of which these rows are overwritten, in place.
        start: [B] int32.
        first: [1] int32, in blocks of QUERIES rows.
        wanted: [B * chunk] int32; where it is zero, a row of `bits` stays as it is.
        chunk: rows of a sequence.
        topk: how many.
        interpret: run on any platform.

    Returns:
        bits, and the block behind these rows, [1] int32: what depends on it runs later, and may use their scratch.
    """
    rows = scores.shape[0]
    anywhere = pl.BlockSpec(memory_space=pl.ANY)
    return pl.pallas_call(
        partial(_body, chunk=chunk, topk=topk),
        out_shape=(jax.ShapeDtypeStruct(bits.shape, bits.dtype), jax.ShapeDtypeStruct(first.shape, first.dtype)),
        grid=(rows,),
        in_specs=[anywhere] * 5,
        out_specs=(anywhere,) * 2,
        input_output_aliases={4: 0},
        compiler_params=plt.CompilerParams(num_warps=WARPS, num_stages=1),
        interpret=interpret,
        name="index_select_topk",
    )(first, start, wanted, scores, bits)


def _body(
    first: Any, start: Any, wanted: Any, scores: Any, _: Any, bits: Any, following: Any, *, chunk: int, topk: int
) -> None:
    r = pl.program_id(0)
    rows, width = bits.shape
    capacity = scores.shape[1]
    row, seen = place_of(start, first, r, rows, chunk, capacity)
    steps = lax.div(seen + (STEP - 1), STEP)

    def fold(measure: Callable[..., tuple], initial: tuple) -> tuple:
        """Goes through all visible scores; measure: (what is known, scores, indices) → what is known then, by lane."""

        def step(i: jax.Array, carry: tuple) -> tuple:
            index = i * STEP + iota(STEP)
            return measure(carry, plt.load(scores.at[r, index], mask=index < seen, other=jnp.nan), index)

        return lax.fori_loop(0, steps, step, tuple(jnp.full((STEP,), x) for x in initial))

    def select() -> None:
        def extremes(carry: tuple, x: jax.Array, _: jax.Array) -> tuple:
            real = x == x
            least, most = carry
            return jnp.minimum(least, jnp.where(real, x, jnp.inf)), jnp.maximum(most, jnp.where(real, x, -jnp.inf))

        least, most = fold(extremes, (jnp.float32(jnp.inf), jnp.float32(-jnp.inf)))

        def count(p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
            low, high = score_of(p), score_of(q)
            both = fold(lambda c, x, _: (c[0] + ones(x >= low), c[1] + ones(x >= high)), (jnp.int32(0),) * 2)
            return jnp.sum(both[0]), jnp.sum(both[1])

        key, reach, above = search(count, sort_key(jnp.min(least)), sort_key(jnp.max(most)), seen, topk, 0)
        kth = score_of(key)

        def equal_below(cut: jax.Array) -> jax.Array:
            return jnp.sum(fold(lambda c, x, index: (c[0] + ones((x == kth) & (index < cut)),), (jnp.int32(0),))[0])

        cut = tie_cut(equal_below, reach, above, topk, capacity)

        def write(i: jax.Array, _: None) -> None:
            word = i * (STEP // WORD) + iota(STEP // WORD)
            index = word[:, None] * WORD + iota(WORD)[None]
            x = plt.load(scores.at[r, index], mask=index < seen, other=jnp.nan)
            take = (x > kth) | ((x == kth) & (index < cut))
            bit = jnp.where(take, lax.shift_left(jnp.ones_like(index), index & (WORD - 1)), 0)
            put(bits, row, word, lax.bitcast_convert_type(jnp.sum(bit, axis=1), jnp.uint32), word < width)

        lax.fori_loop(0, lax.div(capacity + (STEP - 1), STEP), write, None)

    pl.when((seen > topk) & (wanted[jnp.minimum(row, rows - 1)] != 0))(select)

    @pl.when(r == 0)
    def _pass_on() -> None:
        following[0] = first[0] + scores.shape[0] // QUERIES
