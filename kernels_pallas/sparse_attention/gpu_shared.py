"""attend_bits on Hopper where 16 neighbouring queries share one gathered union of their keys (Mosaic GPU).

Schedule. A block of three warpgroups does 16 queries x 8 heads of one KV head: two compute 8 queries (64 rows) each,
the third gathers. Gathering: 128 listed keys a tile, their keys and values copied asynchronously, 16 bytes a lane,
to the places where the tensor cores' swizzled layout wants them, while the tile before it is computed on. Computing:
scores of 64 x 128, what a query did not select masked by the bits of `members`, streaming softmax, weighted values.
The two take turns: while one has the tensor cores, the other does its softmax.

Floor: 4 H K FLOPs for each query and key of the union at 790 TFLOP/s; 490 to 508 reached from 32K to 256K.
Tried and lost: one warpgroup a block (272 TFLOP/s), tiles of 64 keys (430), no turns (465), the next scores started
before the softmax (444). Queries in registers leave room for a third buffer and reach 554, but ptxas of CUDA 13 then
reuses the registers and the result is wrong. The same in Triton, without roles: 330.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log2
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import MASKED
from kernels_pallas.compat import load
from kernels_pallas.sparse_attention import gpu_rows
from kernels_pallas.sparse_attention.gpu_lists import SPAN, Lists

CONSUMERS, QUERIES, HEADS, ROWS, WIDTH, KEYS = 2, 8, 8, 64, 128, 128


@dataclass(frozen=True)
class Tuning:
    """Sizes that change the speed only."""

    stages: int = 2
    lag: int = 0
    """Tiles in the air while the one before them is handed over; at most stages - 2, or the turns deadlock."""


def supports(q: jax.Array, kv: jax.Array) -> bool:
    """Whether the kernel takes these shapes and dtypes."""
    return q.dtype == kv.dtype == jnp.bfloat16 and q.shape[3] == WIDTH and q.shape[2] == HEADS * kv.shape[4]


def attend(
    q: jax.Array, kv: jax.Array, layer: jax.Array, lists: Lists, skip: jax.Array, *, tuning: Tuning, interpret: Any
) -> jax.Array:
    """Attends over lists of SPAN queries each; where `skip` [B, n] is True the result is left unwritten."""
    B, K = q.shape[0], q.shape[3]
    S, G = kv.shape[2], kv.shape[4]
    n = lists.counts.shape[1]

    def tiles(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=gpu_rows.TRANSFORMS)

    scratch = {
        "q_smem": tiles(CONSUMERS, ROWS, K),
        "k_smem": tiles(tuning.stages, KEYS, K),
        "v_smem": tiles(tuning.stages, KEYS, K),
        "lists_smem": plgpu.SMEM((tuning.stages + tuning.lag + 1, 2 * KEYS), jnp.int32),
        "q_full": plgpu.Barrier(num_arrivals=QUERIES, num_barriers=CONSUMERS),
        "full": plgpu.Barrier(num_barriers=tuning.stages),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tuning.stages),
        "turn": plgpu.Barrier(num_arrivals=CONSUMERS),
    }
    kernel = plgpu.kernel(
        partial(_block, S=S, G=G, n=n, tuning=tuning, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch,
        grid=(n * G * B,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="wg",
        kernel_name="attend_shared",
        compiler_params=plgpu.CompilerParams(approx_math=True, lowering_semantics=plgpu.LoweringSemantics.Lane),
        interpret=interpret or None,
    )
    return kernel(layer.reshape(1), q, kv.reshape(-1, K), *lists, skip.astype(jnp.int32))


def _block(
    layer_ref: Any,
    q_ref: Any,
    kv_ref: Any,
    ids_ref: Any,
    members_ref: Any,
    counts_ref: Any,
    skip_ref: Any,
    o_ref: Any,
    *,
    S: int,
    G: int,
    n: int,
    tuning: Tuning,
    interpret: bool,
    q_smem: Any,
    k_smem: Any,
    v_smem: Any,
    lists_smem: Any,
    q_full: Any,
    full: Any,
    empty: Any,
    turn: Any,
) -> None:
    index, wg = lax.axis_index("block"), lax.axis_index("wg")
    block, g, b = lax.rem(index, n), lax.rem(lax.div(index, n), G), lax.div(index, n * G)
    tiles = jnp.maximum(lax.div(counts_ref[b, block] + (KEYS - 1), KEYS), 1)
    stages, lag = tuning.stages, tuning.lag

    def part(ref: Any, i: jax.Array) -> Any:
        return ref.at[b, block, pl.ds(pl.multiple_of(i * KEYS, KEYS), KEYS)]

    def listed(i: jax.Array, column: int) -> Any:
        # The list of a tile is copied lag + 1 tiles ahead of its rows.
        return lists_smem.at[lax.rem(i, stages + lag + 1), pl.ds(column, KEYS)]

    def produce() -> None:
        plgpu.set_max_registers(40, action="decrease")
        rows = gpu_rows.Rows(kv_ref, ((layer_ref[0] * q_ref.shape[0] + b) * S) * 2 * G + g, G, interpret)

        def list_tile(i: jax.Array) -> None:
            @pl.when(i < tiles)
            def _() -> None:
                rows.copy_list(part(ids_ref, i), listed(i, 0))
                rows.copy_list(part(members_ref, i), listed(i, KEYS))

        for i in range(lag + 1):
            list_tile(jnp.int32(i))
        rows.commit()
        rows.wait(0)
        plgpu.commit_smem()

        def step(i: jax.Array, _: None) -> None:
            @pl.when(i < tiles)
            def _() -> None:
                slot = lax.rem(i, stages)

                pl.when(i >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                rows.gather(listed(i, 0), k_smem.at[slot], v_smem.at[slot])
                list_tile(i + lag + 1)

            rows.commit()
            rows.wait(lag)
            # Makes what all lanes copied visible to the tensor cores, and the next list to all lanes.
            plgpu.commit_smem()

            @pl.when(i >= lag)
            def _() -> None:
                plgpu.barrier_arrive(full.at[lax.rem(i - lag, stages)])

        lax.fori_loop(0, tiles + lag, step, None)
        # No phase of a barrier may stay unseen.
        last = jnp.maximum(tiles - stages, 0)
        lax.fori_loop(last, tiles, lambda i, _: plgpu.barrier_wait(empty.at[lax.rem(i, stages)]), None)

    def consume() -> None:
        plgpu.set_max_registers(232, action="increase")
        C, first = q_ref.shape[1], block * SPAN + wg * QUERIES
        heads = pl.ds(pl.multiple_of(g * HEADS, HEADS), HEADS)
        for i in range(QUERIES):
            at = b, jnp.minimum(first + i, C - 1), heads
            plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem.at[wg, pl.ds(i * HEADS, HEADS)], q_full.at[wg])
        plgpu.barrier_wait(q_full.at[wg])
        layout = _Layout(interpret)
        test = _member_bit(layout, wg)
        scale = WIDTH**-0.5 * log2(jnp.e)

        def take_turn() -> None:
            plgpu.barrier_arrive(turn)
            plgpu.barrier_wait(turn)

        def add_tile(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
            maximum, denominator, numerator = state
            slot = lax.rem(i, stages)
            plgpu.barrier_wait(full.at[slot])
            scores = _product(q_smem.at[wg], k_smem.at[slot], take_turn, interpret)
            members = layout.load_columns(listed(i, KEYS))
            scores = jnp.where((lax.broadcast_in_dim(members, scores.shape, [1]) & test) != 0, scores, MASKED)
            new = jnp.maximum(maximum, scores.max(axis=1) * scale)
            # In a row without any key so far, exp2(MASKED - MASKED) would be 1.
            shift = jnp.where(new > MASKED * scale, new, 0.0)
            p = jnp.exp2(scores * scale - lax.broadcast_in_dim(shift, scores.shape, [0]))
            decay = jnp.exp2(maximum - shift)
            denominator = denominator * decay + p.sum(axis=1)
            numerator = numerator * lax.broadcast_in_dim(decay, numerator.shape, [0])
            p = p.astype(kv_ref.dtype)
            # Without this the compiler may move the softmax into the other warpgroup's turn.
            numerator, denominator, new, p = lax.optimization_barrier((numerator, denominator, new, p))
            take_turn()
            numerator = _add_product(numerator, p, v_smem.at[slot], interpret)
            plgpu.barrier_arrive(empty.at[slot])
            return new, denominator, numerator

        pl.when(wg == 1)(take_turn)
        none = layout.rows(MASKED * scale), layout.rows(0.0), layout.tile(0.0)
        _, denominator, numerator = lax.fori_loop(0, tiles, add_tile, none)
        pl.when(wg == 0)(take_turn)
        denominator = jnp.where(denominator == 0, 1.0, denominator)
        q_smem.at[wg][...] = (numerator / lax.broadcast_in_dim(denominator, numerator.shape, [0])).astype(o_ref.dtype)
        plgpu.commit_smem()
        for i in range(QUERIES):

            @pl.when(first + i < C)
            def _(i: int = i) -> None:
                plgpu.copy_smem_to_gmem(q_smem.at[wg, pl.ds(i * HEADS, HEADS)], o_ref.at[b, first + i, heads])

        plgpu.wait_smem_to_gmem(0)

    @pl.when(skip_ref[b, block] == 0)
    def _() -> None:
        pl.when(wg == CONSUMERS)(produce)
        pl.when(wg < CONSUMERS)(consume)


@dataclass(frozen=True)
class _Layout:
    """Arrays as the tensor cores leave them in the registers of a warpgroup; interpretation knows no layouts."""

    interpret: bool

    def rows(self, value: float) -> jax.Array:
        return self._cast(jnp.full((ROWS,), value, jnp.float32), plgpu.Layout.WGMMA.reduce(1))

    def tile(self, value: float) -> jax.Array:
        return self._cast(jnp.full((ROWS, WIDTH), value, jnp.float32), plgpu.Layout.WGMMA)

    def load_columns(self, ref: Any) -> jax.Array:
        return ref[...] if self.interpret else load(ref, plgpu.Layout.WGMMA.reduce(0))

    def row_numbers(self) -> jax.Array:
        shape = ROWS, KEYS
        if self.interpret:
            return lax.broadcasted_iota(jnp.int32, shape, 0)
        return plgpu.broadcasted_iota(jnp.int32, shape, 0, layout=plgpu.Layout.WGMMA)

    def _cast(self, x: jax.Array, layout: Any) -> jax.Array:
        return x if self.interpret else plgpu.layout_cast(x, layout)


def _member_bit(layout: _Layout, wg: jax.Array) -> jax.Array:
    """[ROWS, KEYS] int32: the bit of `members` that belongs to the query of each row."""
    query = layout.row_numbers() + wg * ROWS
    bit = jnp.zeros_like(query)
    for i in range(SPAN):  # There is no shift by arrays.
        bit = jnp.where((query >= i * HEADS) & (query < (i + 1) * HEADS), 1 << i, bit)
    return bit


def _product(queries: Any, keys: Any, then: Callable[[], None], interpret: bool) -> jax.Array:
    """queries @ keys.T; calls `then` when the tensor cores have got the work."""
    if interpret:
        then()
        return jnp.dot(queries[...], keys[...].T, preferred_element_type=jnp.float32)

    def multiply(scores: Any) -> jax.Array:
        plgpu.wgmma(scores, queries, keys.T)
        then()
        return scores[...]

    return pl.run_scoped(multiply, plgpu.WGMMAAccumulatorRef((ROWS, KEYS), jnp.float32))


def _add_product(total: jax.Array, p: jax.Array, values: Any, interpret: bool) -> jax.Array:
    """total + p @ values, on the tensor cores."""
    if interpret:
        return total + jnp.dot(p, values[...], preferred_element_type=jnp.float32)
    accumulate: Any = pl.run_state(lambda total_ref: plgpu.wgmma(total_ref, p, values))
    return accumulate(plgpu.WGMMAAccumulatorRef.init(total))
