"""Lightning-indexer scores of a block of queries on Hopper GPUs, for `gpu_bits`. Mosaic GPU body.

Computes scores[t, s] = sum_j weights[t, j] * max(0, q[t, j] . keys[s]) in float32, and the maximum of every unit of
8 neighbouring keys, by which `gpu_topk` finds the few units that it has to read. Schedule:

- A program holds 64 queries with all their heads in shared memory (128 KiB) and walks a share of the key tiles.
- Each of its two warpgroups takes tiles of 128 keys of its own, two buffers each. A head's product is one wgmma
  m64n128k64; while it runs, relu and multiply-add put the previous head's into 64 registers of scores.
- The loop over heads stays a loop, of two heads so that they swap accumulators: 16 heads unrolled are 40 KB of
  instructions, which come more slowly than they are executed.
- Keys come permuted within groups of 32 so that neighbouring threads hold whole units: every store writes whole
  32-byte sectors, and a unit's maximum takes one exchange between the two.
- Tiles above the causal diagonal are not visited. On the diagonal nothing is masked: the reader knows what it may see.

A query and key cost 2,048 operations: a 128K prefill 17.6 TFLOP a layer, 22 ms at 790 TFLOP/s. Measured on one H200
for 8,192 queries at the end of 128K tokens: 3.42 ms in bursts (623 TFLOP/s) and 3.85 ms without pause, where 690 W hold
the clock at 1.6 to 1.75 GHz. The products alone, of all heads into one accumulator, take 2.55 and 2.85 ms, with the
stores 2.84 and 3.16. The rest: two vector operations an element and head, half of all issue slots.

Tried and lost, ms in bursts, and without pause where it says so: all heads unrolled, three warpgroups 4.1 (4.5 without
pause), two warpgroups with a product ahead 4.65 without pause; three warpgroups, one head an iteration 3.6, two 3.5,
four 9.2; the next tile's first product during the stores 3.54; warpgroups that take turns, by barriers, at starting
products 3.8 to 4.0; a head's four wgmma all started before its neighbour's sums 3.65; x + |x| for the maximum, in three
warpgroups, 0.25 less or 0.4 more; generic stores and exchanged scores 0.04 more; 132 programs of 768 queries 1 to 3%
less, without the last block that they leave part empty.

fp8 products are not the same: wgmma adds them with errors up to 2^-9 of the sum of their sizes (bfloat16: 2^-21), and
0.1 to 0.3 of a row's best 2,048 among 16,384 random keys became others.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial, reduce
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxlib.mlir import ir
from jaxlib.mlir.dialects import arith, llvm, vector

from kernels_pallas import compat

QUERIES = 64
"""Queries of a block: the rows of a wgmma."""
TILE = 128
UNIT = 8
"""Neighbouring keys that share a maximum; their scores are one 32-byte sector."""
WIDTH = 64
"""Head size that the kernel multiplies; narrower heads are padded with zeros."""
UNITS = TILE // UNIT
BUFFERS = 2  # for key tiles, of each warpgroup
QUAD = 4  # threads that share a row of a wgmma accumulator


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warpgroups: int = 2
    programs: int = 128


def arrange(keys: jax.Array) -> jax.Array:
    """[B, S, I] keys → [B, I, S], in the column order that gives each pair of threads of a wgmma whole units.

    In an accumulator, thread q of a quad holds columns 8i + 2q + b (b = 0, 1). Of a group of 32 keys, threads 2p and
    2p + 1 get units 2p and 2p + 1, the even thread the first four keys of both, in order.
    """
    B, S, I = keys.shape  # noqa: E741
    # Pair, unit, parity, high and low bit of the place → unit, high bit, pair, parity, low bit.
    return keys.reshape(B, S // 32, 2, 2, 2, 2, 2, I).transpose(0, 7, 1, 3, 5, 2, 4, 6).reshape(B, I, S)


def unit_at(position: jax.Array) -> jax.Array:
    """The unit whose maximum stands at a position of `maxima`: thread q of a quad writes q, q + 4, q + 8 and q + 12."""
    return (position & ~(UNITS - 1)) | ((position & 3) << 2) | ((position >> 2) & 3)


def _store(_: Any, scores: Any, out: ir.Value, maxima: ir.Value) -> None:
    """Writes a [QUERIES, TILE] accumulator and its units' maxima from registers.

    Row r of warp w's 16 is held by threads 4r..4r + 3 (and 8 rows further down, in the second half of the registers).
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def const(value: int) -> ir.Value:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def times(value: ir.Value, factor: int) -> ir.Value:
        return arith.muli(value, const(factor))

    def start_of(ref: ir.Value, offset: ir.Value) -> ir.Value:
        # Generic stores would have to find out first that this is not shared memory.
        pointer = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(ref))
        return mgpu.utils.getelementptr(pointer, [offset], f32)

    def store(base: ir.Value, offset: int, values: Sequence[ir.Value]) -> None:
        packed = vector.from_elements(ir.VectorType.get((len(values),), f32), values)
        llvm.store(packed, mgpu.utils.getelementptr(base, [offset], f32), alignment=16)

    registers = scores.registers.reshape(TILE // 8, 2)
    stride = ir.MemRefType(out.type).get_strides_and_offset()[0][0]
    thread = arith.andi(mgpu.utils.thread_idx(), const(127))
    lane = arith.andi(thread, const(31))
    row = arith.addi(times(arith.shrui(thread, const(5)), 16), arith.shrui(lane, const(2)))
    quad, parity = arith.andi(lane, const(3)), arith.andi(lane, const(1))
    odd = arith.cmpi(arith.CmpIPredicate.eq, parity, const(1))
    pair = arith.addi(times(arith.andi(lane, const(2)), UNIT), times(parity, UNIT // 2))
    scores_at = start_of(out, arith.addi(times(row, stride), pair))
    maxima_at = start_of(maxima, arith.addi(times(row, stride // UNIT), times(quad, UNITS // QUAD)))
    for half in range(2):
        tops = []
        for group in range(TILE // 32):
            parts = []
            for unit in range(2):
                own = [
                    vector.extract(
                        registers[QUAD * group + 2 * unit + i, half], dynamic_position=[], static_position=[b]
                    )
                    for i in range(2)
                    for b in range(2)
                ]
                # Neighbours write a unit together, a sector at once.
                store(scores_at, half * 8 * stride + group * 32 + unit * UNIT, own)
                parts.append(reduce(arith.maximumf, own))
            other = mgpu.utils.shfl_bfly(arith.select(odd, parts[0], parts[1]), 1)
            tops.append(arith.maximumf(arith.select(odd, parts[1], parts[0]), other))
        store(maxima_at, half * 8 * (stride // UNIT), tops)


def _body(
    q: Any, weights: Any, keys: Any, start: Any, first: Any, out: Any, maxima: Any,
    q_smem: Any, w_smem: Any, k_smem: Any, q_ready: Any, k_ready: Any,
    *, blocks: int, splits: int, topk: int, tuning: Tuning, interpret: bool,
) -> None:  # fmt: skip
    C, J = q.shape[1:3]
    own, wg = lax.axis_index("block"), lax.axis_index("warpgroup")
    block = first[0] + own
    inside = block < blocks
    block = jnp.minimum(block, blocks - 1)
    b, c = lax.div(block, C // QUERIES), lax.rem(block, C // QUERIES) * QUERIES
    last = start[b] + c + QUERIES - 1
    tiles = jnp.minimum(lax.div(last, TILE) + 1, keys.shape[2] // TILE)
    # Rows that see at most topk keys are selected without scores.
    tiles = jnp.where(inside & (last >= topk), tiles, 0)
    mine, step = lax.axis_index("split") * tuning.warpgroups + wg, splits * tuning.warpgroups
    count = lax.div(tiles - mine + step - 1, step)
    rows = pl.ds(own * QUERIES, QUERIES)

    def fetch(i: jax.Array) -> None:
        @pl.when(i < count)
        def _load_keys() -> None:
            slot = lax.rem(i, BUFFERS)
            tile = keys.at[b, :, pl.ds((mine + i * step) * TILE, TILE)]
            plgpu.copy_gmem_to_smem(tile, k_smem.at[wg, slot], k_ready.at[wg * BUFFERS + slot])

    @pl.when(wg == 0)
    def _load_queries() -> None:
        plgpu.copy_gmem_to_smem(weights.at[b, :, pl.ds(c, QUERIES)], w_smem, q_ready)
        for j in range(J):
            plgpu.copy_gmem_to_smem(q.at[b, pl.ds(c, QUERIES), j], q_smem.at[j], q_ready)

    fetch(jnp.int32(0))
    plgpu.barrier_wait(q_ready)

    def pin(x: jax.Array) -> jax.Array:
        return x if interpret else lax.optimization_barrier(x)

    def add(scores: jax.Array, j: Any, x: jax.Array) -> jax.Array:
        gate = w_smem[j] if interpret else compat.load(w_smem.at[j], plgpu.Layout.WGMMA.reduce(1))
        return pin(scores + lax.broadcast_in_dim(gate, (QUERIES, TILE), [0]) * jnp.maximum(x, 0.0))

    def score_tile(i: jax.Array, _: None) -> None:
        slot = lax.rem(i, BUFFERS)
        plgpu.barrier_wait(k_ready.at[wg * BUFFERS + slot])

        def multiply(j: Any, meanwhile: Callable[[], Any]) -> tuple[jax.Array, Any]:
            def product(acc: Any) -> tuple[jax.Array, Any]:
                plgpu.wgmma(acc, q_smem.at[j], k_smem.at[wg, slot])
                done = meanwhile()
                return pin(plgpu.wgmma_accumulator_load(acc)), done

            return pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((QUERIES, TILE), jnp.float32))

        def head(j: Any, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            scores, before = carry
            x, scores = multiply(j, partial(add, scores, j - 1, before))
            return scores, x

        def two_heads(g: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            return head(2 * g + 2, head(2 * g + 1, carry))

        zero = jnp.zeros((QUERIES, TILE), jnp.float32)
        if not interpret:
            zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
        x, _ = multiply(0, partial(fetch, i + 1))  # into the buffer of the tile before, which is done with
        carry = lax.fori_loop(0, (J - 1) // 2, two_heads, (zero, x))
        scores, x = carry if J % 2 else head(J - 1, carry)
        scores = add(scores, J - 1, x)

        tile = mine + i * step
        out_tile = out.at[rows, pl.ds(tile * TILE, TILE)]
        maxima_tile = maxima.at[rows, pl.ds(tile * UNITS, UNITS)]
        if interpret:  # where keys are in their own order
            out_tile[...] = scores
            tops = scores.reshape(QUERIES, UNITS // QUAD, QUAD, UNIT).max(3)
            maxima_tile[...] = tops.transpose(0, 2, 1).reshape(QUERIES, UNITS)
        else:
            types = (plgpu.Layout.WGMMA, plgpu.RefType(), plgpu.RefType())
            plgpu.inline_mgpu(arg_types=types)(_store)(scores, out_tile, maxima_tile)

    lax.fori_loop(0, count, score_tile, None)


def scores(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    start: jax.Array,
    first: jax.Array,
    rows: int,
    topk: int,
    tuning: Tuning = Tuning(),
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Scores of consecutive blocks of queries against all keys that some query of a block sees.

    Args:
        q: [B, C, J, WIDTH] bfloat16, C a multiple of QUERIES.
        weights: [B, J, C] float32.
        keys: [B, WIDTH, S] bfloat16 as `arrange` leaves them (in their own order with `interpret`), S a multiple of
            TILE, scales multiplied in.
        start: [B] int32.
        first: [1] int32, the first block, counted over all rows of the batch.
        rows: queries to score, a multiple of QUERIES; those past the end are left out.
        topk: blocks that see at most so many keys are left out.
        tuning: sizes.
        interpret: parameters of Pallas' interpret mode for GPUs, or None.

    Returns:
        scores [rows, S] and maxima [rows, S // UNIT] float32, the latter at `unit_at` positions.
        Undefined for keys past a block's last tile.
    """
    B, C, J, _ = q.shape
    S = keys.shape[2]
    splits = max(1, tuning.programs * QUERIES // rows)
    layout: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    body = partial(
        _body,
        blocks=B * C // QUERIES,
        splits=splits,
        topk=topk,
        tuning=tuning,
        interpret=interpret is not None,
    )
    kernel = plgpu.kernel(
        body,
        out_type=(
            jax.ShapeDtypeStruct((rows, S), jnp.float32),
            jax.ShapeDtypeStruct((rows, S // UNIT), jnp.float32),
        ),
        scratch_types=(
            plgpu.SMEM((J, QUERIES, WIDTH), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((J, QUERIES), jnp.float32),
            plgpu.SMEM((tuning.warpgroups, BUFFERS, WIDTH, TILE), jnp.bfloat16, transforms=layout),
            plgpu.Barrier(num_arrivals=J + 1),
            plgpu.Barrier(num_barriers=tuning.warpgroups * BUFFERS),
        ),
        grid=(rows // QUERIES, splits),
        grid_names=("block", "split"),
        num_threads=tuning.warpgroups,
        thread_name="warpgroup",
        kernel_name="index_scores",
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,  # nothing is both read and written by threads
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )
    return kernel(q, weights, keys, start, first)
