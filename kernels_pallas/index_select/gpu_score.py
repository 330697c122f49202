"""Lightning-indexer scores of a block of queries on Hopper GPUs, for `gpu_bits`. Mosaic GPU body.

Computes scores[t, s] = sum_j weights[t, j] * max(0, q[t, j] . keys[s]) in float32, and the maximum of every unit of
8 neighbouring keys, by which `gpu_topk` finds the few units that it has to read. Schedule:

- A program holds 64 queries with all their heads in shared memory (128 KiB) and walks a share of the key tiles.
- Each of its three warpgroups takes tiles of 128 keys of its own: per head one wgmma m64n128k64, then relu and
  multiply-add into 64 registers of scores. ptxas starts the next head's wgmma before that, and other warpgroups
  fill what is left of the tensor cores' time.
- Keys come permuted within groups of 32 so that a thread ends up with whole units: the maximum of a unit needs no
  exchange between threads, and one exchange between neighbours makes every store write whole 32-byte sectors.
- Tiles above the causal diagonal are not visited. On the diagonal nothing is masked: the reader knows what it may see.

A query and key cost 2,048 operations: a 128K prefill 17.6 TFLOP a layer, 22 ms at 790 TFLOP/s. Reached: about 510
TFLOP/s within `gpu_bits` (its time less that of the selection alone), 65%. What holds it there: two vector operations
an element and head, half of the tensor cores' time if perfectly hidden, and 128 KiB of queries loaded by every program.

Tried and lost: 4 warpgroups (128 registers: spills, half the speed); 16-byte stores 128 bytes apart, the natural way
for a thread with 32 neighbouring keys (20% slower); starting all heads' products at once (ptxas serialises them). fp8
products were not tried: they accumulate in fewer bits, and sets would differ.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
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
QUAD = 4  # threads that share a row of a wgmma accumulator


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warpgroups: int = 3
    stages: int = 1
    programs: int = 128


def arrange(keys: jax.Array) -> jax.Array:
    """[B, S, I] keys → [B, I, S], in the column order that gives each thread of a wgmma whole units.

    In an accumulator, thread q of a quad holds columns 8i + 2q + b (b = 0, 1). Key 8q + 2i + b of a group of 32 goes
    there, so that the thread has keys 8q..8q + 7.
    """
    B, S, I = keys.shape  # noqa: E741
    return keys.reshape(B, S // 32, QUAD, 4, 2, I).transpose(0, 5, 1, 3, 2, 4).reshape(B, I, S)


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
    scores_at = mgpu.utils.getelementptr(mgpu.utils.memref_ptr(out), [arith.addi(times(row, stride), pair)], f32)
    maxima_at = mgpu.utils.getelementptr(
        mgpu.utils.memref_ptr(maxima), [arith.addi(times(row, stride // UNIT), times(quad, UNITS // QUAD))], f32
    )
    for half in range(2):
        tops = []
        for group in range(TILE // 32):
            own = [
                vector.extract(registers[i, half], dynamic_position=[], static_position=[b])
                for i in range(QUAD * group, QUAD * group + QUAD)
                for b in range(2)
            ]
            top = own[0]
            for value in own[1:]:
                top = arith.maximumf(top, value)
            tops.append(top)
            # Neighbours swap halves of units, and then write one unit together, a sector at once.
            other = [mgpu.utils.shfl_bfly(arith.select(odd, own[j], own[j + 4]), 1) for j in range(4)]
            of_even = [arith.select(odd, other[j], own[j]) for j in range(4)]
            of_odd = [arith.select(odd, own[j + 4], other[j]) for j in range(4)]
            offset = half * 8 * stride + group * 32
            store(scores_at, offset, of_even)
            store(scores_at, offset + UNIT, of_odd)
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
        slot = lax.rem(i, tuning.stages)
        tile = keys.at[b, :, pl.ds((mine + i * step) * TILE, TILE)]
        plgpu.copy_gmem_to_smem(tile, k_smem.at[wg, slot], k_ready.at[wg * tuning.stages + slot])

    @pl.when(wg == 0)
    def _load_queries() -> None:
        plgpu.copy_gmem_to_smem(weights.at[b, :, pl.ds(c, QUERIES)], w_smem, q_ready)
        for j in range(J):
            plgpu.copy_gmem_to_smem(q.at[b, pl.ds(c, QUERIES), j], q_smem.at[j], q_ready)

    for i in range(tuning.stages):
        pl.when(i < count)(partial(fetch, jnp.int32(i)))
    plgpu.barrier_wait(q_ready)

    def score_tile(i: jax.Array, _: None) -> None:
        slot = lax.rem(i, tuning.stages)
        plgpu.barrier_wait(k_ready.at[wg * tuning.stages + slot])
        scores = jnp.zeros((QUERIES, TILE), jnp.float32)
        if not interpret:
            scores = plgpu.layout_cast(scores, plgpu.Layout.WGMMA)
        for j in range(J):

            def product(acc: Any, j: int = j) -> jax.Array:
                plgpu.wgmma(acc, q_smem.at[j], k_smem.at[wg, slot])
                return acc[...]

            x = pl.run_scoped(product, plgpu.WGMMAAccumulatorRef((QUERIES, TILE), jnp.float32))
            if j == J - 1:
                pl.when(i + tuning.stages < count)(partial(fetch, i + tuning.stages))
            gate = w_smem[j] if interpret else compat.load(w_smem.at[j], plgpu.Layout.WGMMA.reduce(1))
            scores += lax.broadcast_in_dim(gate, (QUERIES, TILE), [0]) * jnp.maximum(x, 0.0)
            if not interpret:
                # Without it all heads' products are started first, more than there are registers for.
                scores = lax.optimization_barrier(scores)
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
    stages = tuning.warpgroups * tuning.stages
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
            plgpu.SMEM((tuning.warpgroups, tuning.stages, WIDTH, TILE), jnp.bfloat16, transforms=layout),
            plgpu.Barrier(num_arrivals=J + 1),
            plgpu.Barrier(num_barriers=stages),
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
