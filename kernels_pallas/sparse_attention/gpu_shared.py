"""attend_bits on Hopper where 16 neighbouring queries share one gathered union of their keys (Mosaic GPU).

Schedule. A block of four warpgroups does 16 queries x 8 heads of one KV head: two compute 8 queries (64 rows) each, two
gather. Gathering: units of 128 keys, or of their values, every other one each, copied asynchronously, 16 bytes a lane,
to the places where the tensor cores' swizzled layout wants them, in a ring of six. Computing: weighted values of the
last tile and scores of this one as one piece of work, what a query did not select masked by the bits of `members`,
streaming softmax. While one has the tensor cores, the other does its softmax. In a turn both compute the same tile, or,
as long as there are keys that only one half of the queries selected (`gpu_lists.Halves`), each its own; such turns lie
evenly among the others, which evens out the gather. Every unit comes in the order of its use and passes through both;
a warpgroup passes over those of the other at once.

Floor: 4 H K FLOPs for each query and key of the union of 8 at 790 TFLOP/s, and 512 bytes for each key of the union of
16 at 8.6 TB/s. 8,192 queries at 128K, 7,550 keys in a union of 16 and 5,430 in one of 8: 1.59 ms; 1.95 without turns
apart. Parts of it alone: products 0.86, softmax 1.01, both 1.42, gathering 0.98.
Tried and lost, in percent: units in the order of their tiles 4 to 5; no list loaded ahead 3 to 5; a unit less in the
air 2; one gathering warpgroup 0, and 10 if it spills; no turns 0; tiles of 64 keys 13; the next scores before the
softmax, where registers do not suffice, 11. Queries in registers: ptxas of CUDA 13 reuses those, the result is wrong.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from math import log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.common import MASKED
from kernels_pallas.compat import load
from kernels_pallas.sparse_attention import gpu_rows
from kernels_pallas.sparse_attention.gpu_lists import SPAN, Halves

CONSUMERS, PRODUCERS, QUERIES, HEADS, ROWS, WIDTH, KEYS = 2, 2, 8, 8, 64, 128, 128

SLOTS, MEMBERS = 6, 4
"""Units in shared memory, which they fill, and how many of so many in sequence can be keys."""


@dataclass(frozen=True)
class Tuning:
    """Sizes that change the speed only."""

    lag: int = 1
    """Units of a gathering warpgroup in the air while the one before them is handed over: more than one, and the turns
    deadlock."""


def supports(q: jax.Array, kv: jax.Array) -> bool:
    """Whether the kernel takes these shapes and dtypes."""
    return q.dtype == kv.dtype == jnp.bfloat16 and q.shape[3] == WIDTH and q.shape[2] == HEADS * kv.shape[4]


def attend(
    q: jax.Array, kv: jax.Array, layer: jax.Array, lists: Halves, skip: jax.Array, *, tuning: Tuning, interpret: Any
) -> jax.Array:
    """Attends over lists of SPAN queries each; where `skip` [B, n] is True the result is left unwritten."""
    B, K = q.shape[0], q.shape[3]
    S, G = kv.shape[2], kv.shape[4]
    n = lists.counts.shape[1]

    def tiles(*shape: int) -> Any:
        return plgpu.SMEM(shape, q.dtype, transforms=gpu_rows.TRANSFORMS)

    scratch = {
        "q_smem": tiles(CONSUMERS, ROWS, K),
        "kv_smem": tiles(SLOTS, KEYS, K),
        "members_smem": plgpu.SMEM((MEMBERS, KEYS), jnp.int32),
        "q_full": plgpu.Barrier(num_arrivals=QUERIES, num_barriers=CONSUMERS),
        "full": plgpu.Barrier(num_barriers=SLOTS),
        "empty": plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=SLOTS),
        "turn": plgpu.Barrier(num_barriers=CONSUMERS),
    }
    kernel = plgpu.kernel(
        partial(_block, S=S, G=G, n=n, tuning=tuning, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct(q.shape, q.dtype),
        scratch_types=scratch,
        grid=(n * G * B,),
        grid_names=("block",),
        num_threads=CONSUMERS + PRODUCERS,
        thread_name="wg",
        kernel_name="attend_shared",
        compiler_params=plgpu.CompilerParams(
            approx_math=True, reduction_scratch_bytes=0, lowering_semantics=plgpu.LoweringSemantics.Lane
        ),
        interpret=interpret or None,
    )
    return kernel(layer.reshape(1), q, kv.reshape(-1, K), *lists, skip.astype(jnp.int32))


class _Turns(NamedTuple):
    """How the tiles of a block follow each other. In a turn both warpgroups compute one tile: the same one, or, in
    `apart` of the `turns`, evenly spread over them, one tile each, the first warpgroup's coming first."""

    apart: jax.Array
    turns: jax.Array

    def step(self, sum: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Whether the next turn is one apart, and `sum`, which begins at 0, after it."""
        sum = sum + self.apart
        apart = sum >= self.turns
        return apart, sum - jnp.where(apart, self.turns, 0)


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
    kv_smem: Any,
    members_smem: Any,
    q_full: Any,
    full: Any,
    empty: Any,
    turn: Any,
) -> None:
    index, wg = lax.axis_index("block"), lax.axis_index("wg")
    block, g, b = lax.rem(index, n), lax.rem(lax.div(index, n), G), lax.div(index, n * G)
    behind = PRODUCERS * tuning.lag
    front, both, back = (counts_ref[b, block, i] for i in range(3))
    total = front + both + back
    apart = lax.div(jnp.minimum(front, back), KEYS)
    turns = _Turns(apart, jnp.maximum(apart + lax.div(total - 2 * KEYS * apart + (KEYS - 1), KEYS), 1))
    units = 2 * (turns.turns + apart)

    def produce() -> None:
        plgpu.set_max_registers(40, action="decrease")
        rows = gpu_rows.Rows(kv_ref, ((layer_ref[0] * q_ref.shape[0] + b) * S) * 2 * G + g, G, interpret)
        lists = ids_ref.at[b, block], members_ref.at[b, block]

        def list_turn(t: jax.Array, sum: jax.Array, pairs: jax.Array) -> tuple[Any, ...]:
            """Whether turn t is one apart, the lists of its tiles, and `sum` and `pairs`, turns apart, after it."""
            now, sum = turns.step(sum)
            first = jnp.where(now, pairs, apart + t - pairs) * KEYS, total + (pairs - apart) * KEYS
            end = jnp.where(now, apart * KEYS, total - apart * KEYS), jnp.where(now, total, 0)
            one, two = (
                rows.load_lists(lists, gpu_rows.Place(*place, front, front + both, lists[0].shape[0] // 2))
                for place in zip(first, end, strict=True)
            )
            return now & (t < turns.turns), one, two, sum, pairs + now.astype(jnp.int32)

        def own(unit: jax.Array, then: Callable[[], None]) -> None:
            pl.when((unit >= 0) & (lax.rem(unit, PRODUCERS) == wg - CONSUMERS))(then)

        def put(unit: jax.Array, ids: jax.Array, members: jax.Array | None = None, k: jax.Array | None = None) -> None:
            pl.when(lax.rem(unit, PRODUCERS) == wg - CONSUMERS)(partial(put_own, unit, ids, members, k))

        def put_own(unit: jax.Array, ids: jax.Array, members: jax.Array | None, k: jax.Array | None) -> None:
            """Gathers a unit: keys, number k of those, with their members; or values."""
            slot = lax.rem(unit, SLOTS)
            pl.when(unit >= SLOTS)(lambda: plgpu.barrier_wait(empty.at[slot]))
            if k is not None:
                members_smem.at[lax.rem(k, MEMBERS)][...] = members
            rows.gather(ids, kv_smem.at[slot], k is None)
            rows.commit()
            rows.wait(tuning.lag)
            # Makes what all lanes copied visible to the tensor cores.
            plgpu.commit_smem()
            pl.when(unit >= behind)(lambda: plgpu.barrier_arrive(full.at[lax.rem(unit - behind, SLOTS)]))

        def step(t: jax.Array, carry: Any) -> Any:
            """The values of turn t and the keys of the next, first for one consumer, then for the other if apart."""
            now, ids, own_ids, after, one, two, unit, k, sum, pairs = carry
            *ahead, sum, pairs = list_turn(t + 2, sum, pairs)
            put(unit, ids)
            unit = unit + 1
            more = t + 1 < turns.turns
            pl.when(more)(lambda: put(unit, one[0], one[1], k))
            unit = unit + more.astype(jnp.int32)
            pl.when(now)(lambda: put(unit, own_ids))
            unit = unit + now.astype(jnp.int32)
            pl.when(after)(lambda: put(unit, two[0], two[1], k + 1))
            both = after.astype(jnp.int32)
            return after, one[0], two[0], *ahead, unit + both, k + 1 + both, sum, pairs

        zero = jnp.int32(0)
        now, one, two, sum, pairs = list_turn(zero, zero, zero)
        *ahead, sum, pairs = list_turn(zero + 1, sum, pairs)
        put(zero, one[0], one[1], zero)
        pl.when(now)(lambda: put(jnp.int32(1), two[0], two[1], jnp.int32(1)))
        unit = 1 + now.astype(jnp.int32)
        lax.fori_loop(0, turns.turns, step, (now, one[0], two[0], *ahead, unit, unit, sum, pairs))
        rows.wait(0)
        plgpu.commit_smem()
        for i in range(behind, 0, -1):
            own(units - i, lambda i=i: plgpu.barrier_arrive(full.at[lax.rem(units - i, SLOTS)]))
        # No phase of a barrier may stay unseen.
        for i in range(SLOTS, 0, -1):
            own(units - i, lambda i=i: plgpu.barrier_wait(empty.at[lax.rem(units - i, SLOTS)]))

    def consume() -> None:
        plgpu.set_max_registers(216, action="increase")
        C, first = q_ref.shape[1], block * SPAN + wg * QUERIES
        heads = pl.ds(pl.multiple_of(g * HEADS, HEADS), HEADS)
        for i in range(QUERIES):
            at = b, jnp.minimum(first + i, C - 1), heads
            plgpu.copy_gmem_to_smem(q_ref.at[at], q_smem.at[wg, pl.ds(i * HEADS, HEADS)], q_full.at[wg])
        plgpu.barrier_wait(q_full.at[wg])
        layout = _Layout(interpret)
        test = _member_bit(layout, wg)
        scale = WIDTH**-0.5 * log2(jnp.e)

        def slot(unit: jax.Array) -> jax.Array:
            return lax.rem(unit, SLOTS)

        def pass_over(unit: jax.Array, when: jax.Array) -> None:
            @pl.when(when)
            def _() -> None:
                plgpu.barrier_wait(full.at[slot(unit)])
                plgpu.barrier_arrive(empty.at[slot(unit)])

        def choose(own: jax.Array, one: jax.Array, two: jax.Array) -> jax.Array:
            """Of a pair of units the one to compute, which is the first unless this turn is one apart; passes over the
            first where it is the other warpgroup's."""
            second = own & (wg == 1)
            pass_over(one, second)
            return jnp.where(second, two, one)

        def softmax(
            scores: jax.Array, keys: jax.Array, k: jax.Array, maximum: jax.Array, denominator: jax.Array
        ) -> tuple[jax.Array, ...]:
            members = layout.load_columns(members_smem.at[lax.rem(k, MEMBERS)])
            # After the members: the slot of the keys stands for theirs.
            plgpu.barrier_arrive(empty.at[slot(keys)])
            scores = jnp.where((lax.broadcast_in_dim(members, scores.shape, [1]) & test) != 0, scores, MASKED)
            new = jnp.maximum(maximum, scores.max(axis=1) * scale)
            # In a row without any key so far, exp2(MASKED - MASKED) would be 1.
            shift = jnp.where(new > MASKED * scale, new, 0.0)
            p = jnp.exp2(scores * scale - lax.broadcast_in_dim(shift, scores.shape, [0]))
            decay = jnp.exp2(maximum - shift)
            denominator = denominator * decay + p.sum(axis=1)
            return new, denominator, decay, p.astype(kv_ref.dtype)

        def hand_turn() -> None:
            plgpu.barrier_arrive(turn.at[1 - wg])

        def add_tile(_: jax.Array, state: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
            now, unit, k, sum, maximum, denominator, numerator, p = state
            after, sum = turns.step(sum)
            second = unit + 2, unit + 2 + now.astype(jnp.int32)
            values = choose(now, unit, second[0])
            keys = choose(after, unit + 1, second[1])
            plgpu.barrier_wait(full.at[slot(values)])
            plgpu.barrier_wait(full.at[slot(keys)])
            plgpu.barrier_wait(turn.at[wg])
            numerator, scores = _products(
                numerator,
                p,
                kv_smem.at[slot(values)],
                q_smem.at[wg],
                kv_smem.at[slot(keys)],
                hand_turn,
                lambda: plgpu.barrier_arrive(empty.at[slot(values)]),
                layout,
            )
            both = after.astype(jnp.int32)
            own = k + jnp.where(wg == 1, both, 0)
            maximum, denominator, decay, p = softmax(scores, keys, own, maximum, denominator)
            numerator = numerator * lax.broadcast_in_dim(decay, numerator.shape, [0])
            # Without this the compiler may move the softmax into the other warpgroup's turn.
            numerator, denominator, maximum, p = lax.optimization_barrier((numerator, denominator, maximum, p))
            pass_over(second[0], now & (wg == 0))
            pass_over(second[1], after & (wg == 0))
            return after, second[1] + both, k + 1 + both, sum, maximum, denominator, numerator, p

        pl.when(wg == 1)(lambda: plgpu.barrier_arrive(turn.at[0]))
        zero, one = jnp.int32(0), jnp.int32(1)
        now, sum = turns.step(zero)
        keys = choose(now, zero, one)
        plgpu.barrier_wait(full.at[slot(keys)])
        plgpu.barrier_wait(turn.at[wg])
        scores = _product(q_smem.at[wg], kv_smem.at[slot(keys)], hand_turn, interpret)
        none = layout.rows(MASKED * scale), layout.rows(0.0)
        maximum, denominator, *_unused, p = softmax(scores, keys, keys, *none)
        pass_over(one, now & (wg == 0))
        unit = 1 + now.astype(jnp.int32)
        state = now, unit, unit, sum, maximum, denominator, layout.tile(0.0), p
        now, unit, *_unused, denominator, numerator, p = lax.fori_loop(1, turns.turns, add_tile, state)
        values = choose(now, unit, unit + 1)
        plgpu.barrier_wait(full.at[slot(values)])
        numerator = _add_product(numerator, p, kv_smem.at[slot(values)], interpret)
        plgpu.barrier_arrive(empty.at[slot(values)])
        pass_over(unit + 1, now & (wg == 0))
        pl.when(wg == 0)(lambda: plgpu.barrier_wait(turn.at[0]))
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
        pl.when(wg >= CONSUMERS)(produce)
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


def _products(
    total: jax.Array,
    p: jax.Array,
    values: Any,
    queries: Any,
    keys: Any,
    issued: Callable[[], None],
    added: Callable[[], None],
    layout: "_Layout",
) -> tuple[jax.Array, jax.Array]:
    """total + p @ values, and queries @ keys.T; calls `issued` when the tensor cores have got the work and `added`
    after the first product."""
    if layout.interpret:
        issued()
        total = total + jnp.dot(p, values[...], preferred_element_type=jnp.float32)
        added()
        return total, jnp.dot(queries[...], keys[...].T, preferred_element_type=jnp.float32)

    def multiply(refs: Any) -> None:
        total_ref, scores_ref = refs
        plgpu.wgmma(total_ref, p, values)
        plgpu.wgmma(scores_ref, queries, keys.T)
        issued()
        plgpu.wgmma_wait(1)
        added()

    run: Any = pl.run_state(multiply)
    return run((plgpu.WGMMAAccumulatorRef.init(total), plgpu.WGMMAAccumulatorRef.init(layout.tile(0.0))))


def _add_product(total: jax.Array, p: jax.Array, values: Any, interpret: bool) -> jax.Array:
    """total + p @ values, on the tensor cores."""
    if interpret:
        return total + jnp.dot(p, values[...], preferred_element_type=jnp.float32)
    accumulate: Any = pl.run_state(lambda total_ref: plgpu.wgmma(total_ref, p, values))
    return accumulate(plgpu.WGMMAAccumulatorRef.init(total))
