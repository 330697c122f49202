"""Lightning-indexer scores of blocks of queries on Hopper GPUs, for `gpu_bits`. Mosaic GPU bodies.

Computes scores[t, s] = sum_j weights[t, j] * max(0, q[t, j] . keys[s]) in float32. `candidates` lists those that reach
their row's bound, with their keys; `scores` stores all. Schedule:

- A program holds 64 queries with all their heads in shared memory (128 KiB) and walks a share of the key tiles.
- Each of its two warpgroups takes tiles of 128 keys of its own, two buffers each. A head's product is one wgmma
  m64n128k64; while it runs, relu and multiply-add put the previous head's into 64 registers of scores.
- The loop over heads stays a loop, of two heads so that they swap accumulators: 16 heads unrolled are 40 KB of
  instructions, which come more slowly than they are executed.
- Keys come permuted within groups of 32 so that neighbouring threads hold whole units of 8: every store of `scores`
  writes whole 32-byte sectors. What `candidates` does with a tile: `gpu_filter`.
- Tiles above the causal diagonal are not visited. On the diagonal `scores` masks nothing, `candidates` does.

A query and key cost 2,048 operations: a 128K prefill 17.6 TFLOP a layer, 22 ms at 790 TFLOP/s. Measured on one H200 for
8,192 queries at the end of 128K tokens, ms in the profiler: 3.20, of which the lists' stores are nothing (3.2 to 3.3
with bounds that nothing reaches; at 8K, where six of ten scores are listed, 0.15 of 0.35). A score and its key in two
stores of 4 bytes: 3.33, and 1.13 for 0.82 at 32K. Blocks that see most begin: at 8K 0.71 otherwise.

With all scores stored instead, and maxima of units: 3.18; 3.42 in bursts (623 TFLOP/s) and 3.85 without pause, where
690 W hold the clock at 1.6 to 1.75 GHz. The products alone, of all heads into one accumulator, took 2.55 and 2.85, with
the stores 2.84 and 3.16. The rest: two vector operations an element and head, half of all issue slots.

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
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import compat
from kernels_pallas.index_select import gpu_filter
from kernels_pallas.index_select.gpu_filter import QUAD, QUERIES, TILE

WIDTH = 64
"""Head size that the kernel multiplies; narrower heads are padded with zeros."""
BUFFERS = 2  # for key tiles, of each warpgroup
INPUTS = 7  # that both kernels have
MAX_LISTS = 128
"""Of a row: the threads that `gpu_emit` reads them with."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warpgroups: int = 2
    programs: int = 256
    """About so many share the work."""
    slots: int = 6144
    """Candidates of a row for which its lists have room together; `spare` are added to each."""
    spare: int = 64

    def splits(self, rows: int) -> int:
        """Programs that share a block of queries when `rows` are scored: a power of two."""
        most = min(self.programs * QUERIES // rows, MAX_LISTS // (self.warpgroups * QUAD))
        return 1 << max(most, 1).bit_length() - 1

    def lists(self, rows: int) -> tuple[int, int]:
        """How many lists a row has, and the room of each."""
        n = self.splits(rows) * self.warpgroups * QUAD
        return n, self.slots // n + self.spare


@dataclass(frozen=True)
class _Program:
    """What the two kernels share: a program's queries against its share of the key tiles."""

    rows: int
    blocks: int
    splits: int
    topk: int
    tuning: Tuning
    interpret: bool

    def own(self) -> jax.Array:
        """Which of the call's blocks this is: the last ones, which see most, begin."""
        return self.rows // QUERIES - 1 - lax.axis_index("block")

    def walk(
        self, refs: Sequence[Any], scratch: Sequence[Any], loads: Sequence[tuple[Any, Any]], put: Callable[..., None],
    ) -> None:  # fmt: skip
        """Calls put(rows, tile, keys that the first row sees, scores) for each tile of 128 keys.

        Args:
            refs: arguments of `scores`, in its order.
            scratch: the first five of `_call`.
            loads: what else of the program's rows is copied to shared memory before: from, to.
            put: what becomes of scores.
        """
        q, weights, keys, start, first, wanted, limit = refs
        q_smem, w_smem, k_smem, q_ready, k_ready = scratch
        C, J = q.shape[1:3]
        own, wg = self.own(), lax.axis_index("warpgroup")
        block = first[0] + own
        inside = block < self.blocks
        block = jnp.minimum(block, self.blocks - 1)
        b, c = lax.div(block, C // QUERIES), lax.rem(block, C // QUERIES) * QUERIES
        last = start[b] + c + QUERIES - 1
        tiles = jnp.minimum(lax.div(last, TILE) + 1, limit[b])
        # Rows that see at most topk keys are selected without scores.
        tiles = jnp.where(inside & (last >= self.topk) & (wanted[block] != 0), tiles, 0)
        mine, step = lax.axis_index("split") * self.tuning.warpgroups + wg, self.splits * self.tuning.warpgroups

        def place(i: jax.Array) -> jax.Array:
            """Which of `step` tiles is the own i-th: no regular one, as what is selected may come regularly."""
            return lax.rem(mine + lax.shift_right_logical(i * jnp.int32(-1640531535), 16), step)

        full = lax.div(tiles, step)
        count = full + jnp.where(place(full) < lax.rem(tiles, step), 1, 0)
        rows = pl.ds(own * QUERIES, QUERIES)

        def fetch(i: jax.Array) -> None:
            @pl.when(i < count)
            def _load_keys() -> None:
                slot = lax.rem(i, BUFFERS)
                tile = keys.at[b, :, pl.ds((i * step + place(i)) * TILE, TILE)]
                plgpu.copy_gmem_to_smem(tile, k_smem.at[wg, slot], k_ready.at[wg * BUFFERS + slot])

        def pin(x: jax.Array) -> jax.Array:
            return x if self.interpret else lax.optimization_barrier(x)

        def add(scores: jax.Array, j: Any, x: jax.Array) -> jax.Array:
            gate = w_smem[j] if self.interpret else compat.load(w_smem.at[j], plgpu.Layout.WGMMA.reduce(1))
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
            if not self.interpret:
                zero = plgpu.layout_cast(zero, plgpu.Layout.WGMMA)
            x, _ = multiply(0, partial(fetch, i + 1))  # into the buffer of the tile before, which is done with
            carry = lax.fori_loop(0, (J - 1) // 2, two_heads, (zero, x))
            scores, x = carry if J % 2 else head(J - 1, carry)
            put(rows, i * step + place(i), start[b] + c + 1, add(scores, J - 1, x))

        @pl.when(tiles > 0)
        def _run() -> None:
            @pl.when(wg == 0)
            def _load_queries() -> None:
                plgpu.copy_gmem_to_smem(weights.at[b, :, pl.ds(c, QUERIES)], w_smem, q_ready)
                for source, target in loads:
                    plgpu.copy_gmem_to_smem(source.at[rows], target, q_ready)
                for j in range(J):
                    plgpu.copy_gmem_to_smem(q.at[b, pl.ds(c, QUERIES), j], q_smem.at[j], q_ready)

            fetch(jnp.int32(0))
            plgpu.barrier_wait(q_ready)
            lax.fori_loop(0, count, score_tile, None)


def _score_body(*refs: Any, program: _Program) -> None:
    inputs, (out, *scratch) = refs[:INPUTS], refs[INPUTS:]

    def put(rows: Any, tile: jax.Array, _: jax.Array, scores: jax.Array) -> None:
        out_tile = out.at[rows, pl.ds(tile * TILE, TILE)]
        if program.interpret:  # where keys are in their own order
            out_tile[...] = scores
        else:
            types = plgpu.Layout.WGMMA, plgpu.Layout.WG_SPLAT(()), plgpu.RefType()
            plgpu.inline_mgpu(arg_types=types)(gpu_filter.store)(scores, tile * TILE, out_tile)

    program.walk(inputs, scratch, (), put)


def _list_body(*refs: Any, program: _Program) -> None:
    inputs, (bounds, lists, sizes, *scratch, b_smem, n_smem) = refs[:INPUTS], refs[INPUTS:]
    wg, split = lax.axis_index("warpgroup"), lax.axis_index("split")
    own = pl.ds((split * program.tuning.warpgroups + wg) * QUAD, QUAD)
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    def put(rows: Any, tile: jax.Array, seen: jax.Array, scores: jax.Array) -> None:
        key, mine = tile * TILE, lists.at[rows, own]
        known = seen - key
        if program.interpret:
            gpu_filter.append_plainly(scores, key, known, b_smem, n_smem.at[wg], mine)
        else:
            types = (plgpu.Layout.WGMMA, scalar, scalar, ref, ref, ref)
            add = plgpu.inline_mgpu(arg_types=types)(gpu_filter.append)
            add(scores, key, known, b_smem, n_smem.at[wg], mine)

    if program.interpret:
        n_smem[wg] = jnp.zeros(n_smem.shape[1:], jnp.int32)
    else:
        plgpu.inline_mgpu(arg_types=(ref,))(gpu_filter.clear)(n_smem.at[wg])
    program.walk(inputs, scratch, [(bounds, b_smem)], put)
    mine = sizes.at[pl.ds(program.own() * QUERIES, QUERIES), own]
    if program.interpret:
        mine[...] = n_smem[wg]
    else:
        plgpu.inline_mgpu(arg_types=(ref, ref))(gpu_filter.copy_sizes)(n_smem.at[wg], mine)


def scores(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    start: jax.Array,
    first: jax.Array,
    wanted: jax.Array,
    tiles: jax.Array,
    rows: int,
    topk: int,
    tuning: Tuning = Tuning(),
    interpret: Any = None,
) -> jax.Array:
    """Scores of consecutive blocks of queries against all keys that some query of a block sees.

    Args:
        q: [B, C, J, WIDTH] bfloat16, C a multiple of QUERIES.
        weights: [B, J, C] float32.
        keys: [B, WIDTH, S] bfloat16 as `gpu_filter.arrange` leaves them (in their own order with `interpret`), S a
            multiple of TILE, scales multiplied in.
        start: [B] int32.
        first: [1] int32, the first block, counted over all rows of the batch.
        wanted: [B * C // QUERIES] int32, zero for blocks that are left out.
        tiles: [B] int32, how many tiles of keys at most.
        rows: queries to score, a multiple of QUERIES; those past the end are left out.
        topk: blocks that see at most so many keys are left out.
        tuning: sizes.
        interpret: parameters of Pallas' interpret mode for GPUs, or None.

    Returns:
        [rows, S] float32, undefined for keys past a block's last tile.
    """
    out = jax.ShapeDtypeStruct((rows, keys.shape[2]), jnp.float32)
    inputs = q, weights, keys, start, first, wanted, tiles
    return _call(_score_body, "index_scores", out, (), inputs, (), rows, topk, tuning, interpret)


def candidates(
    q: jax.Array,
    weights: jax.Array,
    keys: jax.Array,
    start: jax.Array,
    first: jax.Array,
    bounds: jax.Array,
    rows: int,
    topk: int,
    tuning: Tuning = Tuning(),
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array]:
    """Lists the keys that a query sees whose scores reach its bound.

    Args:
        bounds: [rows] float32. Others as in `scores`.

    Returns:
        lists: [rows, n, room, 2] int32: bits of a score, and its key.
        sizes: [rows, n] int32, how many there are; FULL where there might have been too many.
    """
    n, room = tuning.lists(rows)
    out = jax.ShapeDtypeStruct((rows, n, room, 2), jnp.int32), jax.ShapeDtypeStruct((rows, n), jnp.int32)
    scratch = plgpu.SMEM((QUERIES,), jnp.float32), plgpu.SMEM((tuning.warpgroups, QUERIES, QUAD), jnp.int32)
    wanted = jnp.ones(q.shape[0] * q.shape[1] // QUERIES, jnp.int32)
    inputs = q, weights, keys, start, first, wanted, jnp.full_like(start, keys.shape[2] // TILE)
    return _call(_list_body, "index_candidates", out, scratch, inputs, (bounds,), rows, topk, tuning, interpret)


def _call(
    body: Any, name: str, out: Any, scratch: tuple, inputs: tuple, more: tuple, rows: int, topk: int, tuning: Tuning,
    interpret: Any,
) -> Any:  # fmt: skip
    B, C, J, _ = inputs[0].shape
    splits = tuning.splits(rows)
    layout: Any = (plgpu.TilingTransform((8, 64)), plgpu.SwizzleTransform(128))
    program = _Program(rows, B * C // QUERIES, splits, topk, tuning, interpret is not None)
    kernel = plgpu.kernel(
        partial(body, program=program),
        out_type=out,
        scratch_types=(
            plgpu.SMEM((J, QUERIES, WIDTH), jnp.bfloat16, transforms=layout),
            plgpu.SMEM((J, QUERIES), jnp.float32),
            plgpu.SMEM((tuning.warpgroups, BUFFERS, WIDTH, TILE), jnp.bfloat16, transforms=layout),
            plgpu.Barrier(num_arrivals=J + 1 + len(more)),
            plgpu.Barrier(num_barriers=tuning.warpgroups * BUFFERS),
            *scratch,
        ),
        grid=(rows // QUERIES, splits),
        grid_names=("block", "split"),
        num_threads=tuning.warpgroups,
        thread_name="warpgroup",
        kernel_name=name,
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,  # nothing is both read and written by threads
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )
    return kernel(*inputs, *more)
