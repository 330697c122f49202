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
from functools import partial
from typing import Any

import jax
import jax.experimental.mosaic.gpu as mgpu
import jax.numpy as jnp
import numpy as np
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
FULL = 1 << 20
"""The size of a list that had no room."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    warpgroups: int = 2
    programs: int = 256
    slots: int = 7168

    def splits(self, rows: int) -> int:
        return max(1, self.programs * QUERIES // rows)

    def room(self, rows: int) -> int:
        return self.slots // (self.splits(rows) * self.warpgroups * QUAD)


def arrange(keys: jax.Array) -> jax.Array:
    """[B, S, I] keys → [B, I, S], in the column order that gives each pair of threads of a wgmma whole units.

    In an accumulator, thread q of a quad holds columns 8i + 2q + b (b = 0, 1). Of a group of 32 keys, threads 2p and
    2p + 1 get units 2p and 2p + 1, the even thread the first four keys of both, in order.
    """
    B, S, I = keys.shape  # noqa: E741
    # Pair, unit, parity, high and low bit of the place → unit, high bit, pair, parity, low bit.
    return keys.reshape(B, S // 32, 2, 2, 2, 2, 2, I).transpose(0, 7, 1, 3, 5, 2, 4, 6).reshape(B, I, S)


def _store(_: Any, scores: Any, out: ir.Value) -> None:
    """Writes a [QUERIES, TILE] accumulator from registers.

    Row r of warp w's 16 is held by threads 4r..4r + 3 (and 8 rows further down, in the second half of the registers).
    """
    f32, i32 = ir.F32Type.get(), ir.IntegerType.get_signless(32)

    def const(value: int) -> ir.Value:
        return arith.constant(i32, ir.IntegerAttr.get(i32, value))

    def times(value: ir.Value, factor: int) -> ir.Value:
        return arith.muli(value, const(factor))

    registers = scores.registers.reshape(TILE // 8, 2)
    stride = ir.MemRefType(out.type).get_strides_and_offset()[0][0]
    thread = arith.andi(mgpu.utils.thread_idx(), const(127))
    lane = arith.andi(thread, const(31))
    row = arith.addi(times(arith.shrui(thread, const(5)), 16), arith.shrui(lane, const(2)))
    pair = arith.addi(times(arith.andi(lane, const(2)), UNIT), times(arith.andi(lane, const(1)), UNIT // 2))
    # Generic stores would have to find out first that this is not shared memory.
    base = llvm.addrspacecast(llvm.PointerType.get(1), mgpu.utils.memref_ptr(out))
    base = mgpu.utils.getelementptr(base, [arith.addi(times(row, stride), pair)], f32)
    for half, place in np.ndindex(2, TILE // 16):
        own = [
            vector.extract(registers[2 * place + i, half], dynamic_position=[], static_position=[b])
            for i in range(2)
            for b in range(2)
        ]
        # Neighbours write a unit together, a sector at once.
        offset = half * 8 * stride + place // 2 * 32 + place % 2 * UNIT
        packed = vector.from_elements(ir.VectorType.get((len(own),), f32), own)
        llvm.store(packed, mgpu.utils.getelementptr(base, [offset], f32), alignment=16)


def _filter(
    room: int, segments: int, _: Any, scores: Any, key: Any, known: Any, bounds: Any, sizes: Any, lists: Any
) -> None:  # fmt: skip
    """Appends the scores of a [QUERIES, TILE] accumulator that reach their row's bound, and their keys, to the lists.

    Each thread has a list of its own for either of its two rows. The first row knows so many of the tile's keys.
    """
    registers = scores.registers.reshape(TILE // 8, 2)
    offsets = [32 * (i // QUAD) + UNIT * (i % QUAD // 2) + 2 * (i % 2) + b for i in range(TILE // 8) for b in range(2)]
    n = len(offsets)
    at, first, ahead, bound, size = (f"${n + i}" for i in range(5))
    for half in range(2):
        code = [
            f"{{ .reg .pred p; .reg .b32 t, w, x, n, own, size, bound, v<{n}>; .reg .u64 list, at;",
            "mov.u32 t, %tid.x; and.b32 t, t, 127; shr.u32 w, t, 5; and.b32 t, t, 31;",
            f"mad.lo.u32 x, w, 256, {size}; mad.lo.u32 size, t, 4, x; add.u32 size, size, {half * 128};",
            f"shr.u32 x, t, 2; mad.lo.u32 w, w, 16, x; add.u32 w, w, {half * 8};",
            f"mad.lo.u32 x, w, 4, {bound}; ld.shared.f32 bound, [x]; ld.shared.u32 n, [size];",
            f"mad.wide.u32 list, w, {segments * 8 * room}, {at};",
            f"and.b32 x, t, 3; mad.wide.u32 list, x, {8 * room}, list;",
            "and.b32 x, t, 2; shl.b32 own, x, 3; and.b32 x, t, 1; mad.lo.u32 own, x, 4, own;",
            f"setp.gt.u32 p, n, {room - n}; selp.b32 n, {FULL}, n, p; selp.f32 bound, 0f7FC00000, bound, p;",
            "mad.wide.u32 at, n, 8, list;",
            *(f"mov.f32 v{i}, ${i};" for i in range(n)),
            f"setp.ge.s32 p, {ahead}, {TILE}; @p bra seen; add.s32 x, {ahead}, w; sub.s32 x, x, own;",
            *(f"setp.gt.s32 p, x, {offset}; selp.f32 v{i}, v{i}, 0f7FC00000, p;" for i, offset in enumerate(offsets)),
            f"seen: add.s32 own, own, {first};",
        ]
        for i, offset in enumerate(offsets):
            code += [
                f"setp.ge.f32 p, v{i}, bound; add.u32 x, own, {offset};",
                f"@p st.global.v2.b32 [at], {{v{i}, x}}; @p add.u64 at, at, 8;",
            ]
        code += ["sub.u64 at, at, list; shr.u64 at, at, 3; cvt.u32.u64 n, at; st.shared.u32 [size], n; }"]
        own = [
            vector.extract(registers[i, half], dynamic_position=[], static_position=[b])
            for i in range(TILE // 8)
            for b in range(2)
        ]
        scalars = [x.registers.item() for x in (key, known)]
        operands = [*own, _address(lists), *scalars, _address(bounds), _address(sizes)]
        constraints = ",".join(["f"] * n + ["l", "r", "r", "r", "r"])
        llvm.inline_asm(None, operands, "\n".join(code), constraints, has_side_effects=True)


def _address(ref: Any) -> Any:
    pointer = mgpu.utils.memref_ptr(ref)
    shared = str(pointer.type) == "!llvm.ptr<3>"
    return llvm.ptrtoint(ir.IntegerType.get_signless(32 if shared else 64), pointer)


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
            refs: q, weights, keys, start, first, wanted, most.
            scratch: as `_scratch` describes it.
            loads: what else to copy to shared memory before: (from, to), given the program's rows.
            put: what becomes of scores.
        """
        q, weights, keys, start, first, wanted, most = refs
        q_smem, w_smem, k_smem, q_ready, k_ready = scratch
        C, J = q.shape[1:3]
        own, wg = self.own(), lax.axis_index("warpgroup")
        block = first[0] + own
        inside = block < self.blocks
        block = jnp.minimum(block, self.blocks - 1)
        b, c = lax.div(block, C // QUERIES), lax.rem(block, C // QUERIES) * QUERIES
        last = start[b] + c + QUERIES - 1
        tiles = jnp.minimum(lax.div(last, TILE) + 1, most[b])
        # Rows that see at most topk keys are selected without scores.
        tiles = jnp.where(inside & (last >= self.topk) & (wanted[block] != 0), tiles, 0)
        mine, step = lax.axis_index("split") * self.tuning.warpgroups + wg, self.splits * self.tuning.warpgroups
        count = lax.div(tiles - mine + step - 1, step)
        rows = pl.ds(own * QUERIES, QUERIES)

        def fetch(i: jax.Array) -> None:
            @pl.when(i < count)
            def _load_keys() -> None:
                slot = lax.rem(i, BUFFERS)
                tile = keys.at[b, :, pl.ds((mine + i * step) * TILE, TILE)]
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
            put(rows, mine + i * step, start[b] + c + 1, add(scores, J - 1, x))

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
    *inputs, out, q_smem, w_smem, k_smem, q_ready, k_ready = refs

    def put(rows: Any, tile: jax.Array, _: jax.Array, scores: jax.Array) -> None:
        out_tile = out.at[rows, pl.ds(tile * TILE, TILE)]
        if program.interpret:  # where keys are in their own order
            out_tile[...] = scores
        else:
            plgpu.inline_mgpu(arg_types=(plgpu.Layout.WGMMA, plgpu.RefType()))(_store)(scores, out_tile)

    program.walk(inputs, (q_smem, w_smem, k_smem, q_ready, k_ready), (), put)


def _list_body(*refs: Any, program: _Program) -> None:
    *inputs, bounds, lists, sizes, q_smem, w_smem, k_smem, q_ready, k_ready, b_smem, n_smem = refs
    wg, split = lax.axis_index("warpgroup"), lax.axis_index("split")
    segments, room = lists.shape[1:3]
    own = pl.ds((split * program.tuning.warpgroups + wg) * QUAD, QUAD)
    ref, scalar = plgpu.RefType(), plgpu.Layout.WG_SPLAT(())

    def put(rows: Any, tile: jax.Array, seen: jax.Array, scores: jax.Array) -> None:
        key, mine = tile * TILE, lists.at[rows, own]
        known = seen - key
        if program.interpret:
            _filter_plainly(scores, key, known, b_smem, n_smem.at[wg], mine)
        else:
            types = (plgpu.Layout.WGMMA, scalar, scalar, ref, ref, ref)
            plgpu.inline_mgpu(arg_types=types)(partial(_filter, room, segments))(
                scores, key, known, b_smem, n_smem.at[wg], mine
            )

    if program.interpret:
        n_smem[wg] = jnp.zeros(n_smem.shape[1:], jnp.int32)
    else:
        plgpu.inline_mgpu(arg_types=(ref,))(_clear)(n_smem.at[wg])
    program.walk(inputs, (q_smem, w_smem, k_smem, q_ready, k_ready), [(bounds, b_smem)], put)
    mine = sizes.at[pl.ds(program.own() * QUERIES, QUERIES), own]
    if program.interpret:
        mine[...] = n_smem[wg]
    else:
        plgpu.inline_mgpu(arg_types=(ref, ref))(partial(_copy_sizes, segments))(n_smem.at[wg], mine)


def _filter_plainly(
    scores: jax.Array, key: jax.Array, known: jax.Array, bounds: Any, sizes: Any, lists: Any
) -> None:  # fmt: skip
    """As `_filter`, with keys in their own order, a quarter of the tile for each thread."""
    room, own = lists.shape[2], TILE // QUAD
    n = sizes[...]
    full = n > room - own
    bound = jnp.where(full, jnp.nan, bounds[...][:, None])
    place = jnp.arange(TILE)
    scores = jnp.where(place < known + jnp.arange(QUERIES)[:, None], scores, jnp.nan).reshape(QUERIES, QUAD, own)
    hit = scores >= bound[..., None]
    at = n[..., None] + jnp.cumsum(hit, axis=2) - 1
    pairs = lax.bitcast_convert_type(scores, jnp.int32), jnp.broadcast_to((key + place).reshape(QUAD, own), hit.shape)
    kept = lists[...]
    for i in range(own):
        here = (jnp.arange(room) == at[:, :, i, None]) & hit[:, :, i, None]
        pair = jnp.stack([x[:, :, i] for x in pairs], axis=-1)
        kept = jnp.where(here[..., None], pair[:, :, None], kept)
    lists[...] = kept
    sizes[...] = jnp.where(full, FULL, n + jnp.sum(hit, axis=2))


def _clear(_: Any, sizes: Any) -> None:
    code = (
        "{ .reg .u32 t, w, x; mov.u32 t, %tid.x; and.b32 t, t, 127; shr.u32 w, t, 5; and.b32 t, t, 31;"
        " mad.lo.u32 x, w, 256, $0; mad.lo.u32 x, t, 4, x; st.shared.u32 [x], 0; st.shared.u32 [x + 128], 0; }"
    )
    llvm.inline_asm(None, [_address(sizes)], code, "r", has_side_effects=True)


def _copy_sizes(segments: int, _: Any, sizes: Any, out: Any) -> None:
    code = (
        "{ .reg .u32 t, w, x, n; .reg .u64 at; mov.u32 t, %tid.x; and.b32 t, t, 127; shr.u32 w, t, 5;"
        " and.b32 t, t, 31; mad.lo.u32 x, w, 256, $0; mad.lo.u32 x, t, 4, x; shl.b32 w, w, 4; shr.u32 n, t, 2;"
        f" add.u32 w, w, n; mad.wide.u32 at, w, {4 * segments}, $1; and.b32 t, t, 3; mad.wide.u32 at, t, 4, at;"
        f" ld.shared.u32 n, [x]; st.global.u32 [at], n; ld.shared.u32 n, [x + 128];"
        f" st.global.u32 [at + {32 * segments}], n; }}"
    )
    llvm.inline_asm(None, [_address(sizes), _address(out)], code, "r,l", has_side_effects=True)


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
        keys: [B, WIDTH, S] bfloat16 as `arrange` leaves them (in their own order with `interpret`), S a multiple of
            TILE, scales multiplied in.
        start: [B] int32.
        first: [1] int32, the first block, counted over all rows of the batch.
        wanted: [B * C // QUERIES] int32, zero for blocks that are left out.
        tiles: [B] int32, of how many tiles of keys at most.
        rows: queries to score, a multiple of QUERIES; those past the end are left out.
        topk: blocks that see at most so many keys are left out.
        tuning: sizes.
        interpret: parameters of Pallas' interpret mode for GPUs, or None.

    Returns:
        [rows, S] float32, undefined for keys past a block's last tile.
    """
    out = jax.ShapeDtypeStruct((rows, keys.shape[2]), jnp.float32)
    return _call(_score_body, out, (), (q, weights, keys, start, first, wanted, tiles), (), rows, topk, tuning, interpret)


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
    """Scores as of `scores`, but only of the keys that reach their row's bound.

    Args:
        bounds: [rows] float32.

    Returns:
        lists: [rows, segments, room, 2] int32: bits of a score, and its key.
        sizes: [rows, segments] int32, how many there are; FULL where there were too many. Undefined for blocks left
            out.
    """
    splits = tuning.splits(rows)
    segments = splits * tuning.warpgroups * QUAD
    out = (
        jax.ShapeDtypeStruct((rows, segments, tuning.room(rows), 2), jnp.int32),
        jax.ShapeDtypeStruct((rows, segments), jnp.int32),
    )
    scratch = plgpu.SMEM((QUERIES,), jnp.float32), plgpu.SMEM((tuning.warpgroups, QUERIES, QUAD), jnp.int32)
    wanted, tiles = jnp.ones(q.shape[0] * q.shape[1] // QUERIES, jnp.int32), jnp.full_like(start, keys.shape[2] // TILE)
    inputs = q, weights, keys, start, first, wanted, tiles
    return _call(_list_body, out, scratch, inputs, (bounds,), rows, topk, tuning, interpret)


def _call(
    body: Any, out: Any, scratch: Any, inputs: tuple, more: tuple, rows: int, topk: int, tuning: Tuning, interpret: Any
) -> Any:
    q = inputs[0]
    B, C, J, _ = q.shape
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
        kernel_name=body.__name__.strip("_"),
        compiler_params=plgpu.CompilerParams(
            unsafe_no_auto_barriers=True,  # nothing is both read and written by threads
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
        interpret=interpret,
    )
    return kernel(*inputs, *more)
