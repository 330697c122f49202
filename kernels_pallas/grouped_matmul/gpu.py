"""grouped_matmul and grouped_swiglu for Hopper (Mosaic GPU: warpgroup matrix products fed by bulk copies).

out[r] = x[r] @ w[layer, group of r], optionally times a scale per row, or silu(gate) * up of two such products whose
columns lie F apart in w.

Schedule. 132 persistent blocks walk tiles of 128 rows x 256 columns, columns fastest, so that the blocks at work at
one time share the rows and the matrices of about five groups in L2. In a block one warpgroup copies (two 64-row
halves of x and 256 columns of w, 64 deep) into a ring of four stages, running ahead over tile borders; two
warpgroups multiply, 64 rows each, and write through swizzled staging buffers. Whoever ends a tile first leaves the
tensor cores to the other, which hides most of the epilogue.

Ragged groups. A tile lies in one group. The last 64 rows of a group are counted back from its end, so that they overlap
the rows before them: those are computed twice, with equal bits, and no store needs a mask. Only a group of fewer
than 64 rows is written in pieces of 32, 16, ... 1 rows.

Cost at 65,536 rows, 128 groups, one H200 (floors: 0.52 and 0.26 ms at 790 TFLOP/s, 0.27 and 0.15 ms of memory traffic):
gate and up with SwiGLU 2048 -> 768 0.69 ms (600 TFLOP/s over real rows, 675 over the rows of whole tiles), down
768 -> 2048 0.38 ms (548). A ninth of the work is repeated rows: groups of about 512 end in the middle of a tile. With 4
rows a group 0.23 and 0.13 ms: the matrices are read at 3.5 and 3.2 TB/s.

Tried and lost: 128 columns with 6 stages (530, 498), two blocks an SM (473, 456), 3 stages (550, 533), x multicast over
clusters of two blocks (562, 556), automatic barriers around copies (588, 537); JAX's ragged_dot_mgpu (386, 250).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.compat import load
from kernels_pallas.quantized import Weights

ROWS = 64
"""Rows of one warpgroup's product."""
DEPTH = 64
"""Depth of one step: 128 bytes, the width of a swizzled row."""
CONSUMERS = 2
SWIZZLE = 128


@dataclass(frozen=True)
class Tuning:
    columns: int = 256
    stages: int = 4
    blocks: int = 132


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    row_scale: jax.Array | None = None,
    *,
    out_dtype: Any,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_matmul`."""
    return _grouped(
        x, w, layer, group_sizes, row_scale, parts=1, out_dtype=out_dtype, tuning=tuning, interpret=interpret
    )


def grouped_swiglu(
    x: jax.Array,
    w: jax.Array,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    *,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`."""
    return _grouped(x, w, layer, group_sizes, None, parts=2, out_dtype=x.dtype, tuning=tuning, interpret=interpret)


def supports(x: jax.Array, w: Weights, parts: int) -> bool:
    """Whether the kernel takes these shapes and dtypes; `parts` is 2 for the fused SwiGLU."""
    D, F = w.shape[2:]
    return x.dtype == w.dtype == jnp.bfloat16 and x.shape[0] > 0 and D % DEPTH == 0 and F % (parts * 64) == 0


def tile_table(group_sizes: jax.Array, M: int) -> tuple[jax.Array, jax.Array]:
    """What each tile covers.

    Returns:
        tiles [T, 2 + 3] int32: group; first row of each half; rows of the half to skip and to write after those
        (0 and 64 but in groups of fewer than 64 rows, whose halves hold rows of their neighbours too);
        count [1] int32: the rows of `tiles` in use.
    """
    E = group_sizes.shape[0]
    group = jnp.arange(E, dtype=jnp.int32)
    tiles_of = (group_sizes + CONSUMERS * ROWS - 1) // (CONSUMERS * ROWS)
    # Comparisons and sums over [E, E] and [T, E] instead of cumulative sums: three small fused kernels.
    before = group[:, None] > group
    first_tile = jnp.sum(jnp.where(before, tiles_of, 0), axis=1, dtype=jnp.int32)
    first_row = jnp.sum(jnp.where(before, group_sizes, 0), axis=1, dtype=jnp.int32)
    tile = jnp.arange(M // (CONSUMERS * ROWS) + E, dtype=jnp.int32)[:, None]
    mine = (tile >= first_tile) & (tile < first_tile + tiles_of)

    def of_group(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mine, values, 0), axis=1, keepdims=True, dtype=jnp.int32)

    start, size = of_group(first_row), of_group(group_sizes)
    half = CONSUMERS * (tile - of_group(first_tile)) + jnp.arange(CONSUMERS, dtype=jnp.int32)
    rows = jnp.maximum(start + jnp.minimum(half * ROWS, size - ROWS), 0)
    skip = jnp.maximum(start - rows[:, :1], 0)
    tiles = jnp.concatenate([of_group(group), rows, skip, jnp.minimum(size, ROWS)], axis=1)
    return tiles, jnp.sum(tiles_of, dtype=jnp.int32)[None]


def _grouped(
    x: jax.Array,
    w: jax.Array,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    row_scale: jax.Array | None,
    *,
    parts: int,
    out_dtype: Any,
    tuning: Tuning,
    interpret: Any,
) -> jax.Array:
    M = x.shape[0]
    L, E, D, F = w.shape
    out_columns = F // parts
    width = max(c for c in (64, 128, 256) if out_columns % c == 0 and c <= max(64, tuning.columns // parts))
    chunk = SWIZZLE // jnp.dtype(out_dtype).itemsize
    short = max(ROWS - M, 0)
    if short:
        x = jnp.pad(x, ((0, short), (0, 0)))
        row_scale = None if row_scale is None else jnp.pad(row_scale, (0, short))
    tiles, count = tile_table(group_sizes, M)

    def by_rows_and_tiles(shape: tuple[int, ...], dtype: Any) -> Any:
        # The same bytes under two names: copies start at any row, products and stores see the swizzled 8-row tiles.
        # (With 128-byte rows both layouts are the same; tiled copies could start only at multiples of 8.)
        tiled = _shared(shape, dtype, 8)
        return tiled if interpret else plgpu.RefUnion(_shared(shape, dtype, 1), tiled)

    kernel = plgpu.kernel(
        partial(_kernel, parts=parts, tuning=tuning, scaled=row_scale is not None, interpret=bool(interpret)),
        out_type=jax.ShapeDtypeStruct((M + short, out_columns), out_dtype),
        scratch_types=[
            by_rows_and_tiles((tuning.stages, CONSUMERS, ROWS, DEPTH), x.dtype),
            _shared((tuning.stages, parts, DEPTH, width), w.dtype, 8),
            by_rows_and_tiles((CONSUMERS, min(2, width // chunk), ROWS, chunk), out_dtype),
            plgpu.Barrier(num_arrivals=CONSUMERS + parts, num_barriers=tuning.stages),
            plgpu.Barrier(num_arrivals=CONSUMERS, num_barriers=tuning.stages),
        ],
        grid=(tuning.blocks,),
        grid_names=("block",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="grouped_swiglu" if parts > 1 else "grouped_matmul",
        compiler_params=plgpu.CompilerParams(
            lowering_semantics=plgpu.LoweringSemantics.Lane,
            approx_math=True,
            # Safe: threads write staging buffers and never read them; waits and commits synchronise the warpgroup.
            unsafe_no_auto_barriers=True,
        ),
        interpret=interpret or None,
    )
    matrices = w.reshape(L * E, D, F)
    first_matrix = (jnp.asarray(layer, jnp.int32) * E).reshape(1)
    scale = () if row_scale is None else (row_scale,)
    return kernel(first_matrix, tiles, count, x, matrices, *scale)[:M]


def _shared(shape: tuple[int, ...], dtype: Any, tile_rows: int) -> Any:
    tiling = plgpu.TilingTransform((tile_rows, SWIZZLE // jnp.dtype(dtype).itemsize))
    return plgpu.SMEM(shape, dtype, transforms=(tiling, plgpu.SwizzleTransform(SWIZZLE)))


def _kernel(
    first_matrix: Any,
    tiles: Any,
    count: Any,
    x: Any,
    w: Any,
    *rest: Any,
    parts: int,
    tuning: Tuning,
    scaled: bool,
    interpret: bool,
) -> None:
    scale, (out, x_shared, w_shared, staging, full, empty) = (rest[0], rest[1:]) if scaled else (None, rest)
    x_rows, x_tiles = (x_shared, x_shared) if interpret else x_shared
    width = w_shared.shape[-1]
    tiles_across = out.shape[1] // width
    steps = w.shape[1] // DEPTH
    stages = tuning.stages
    warpgroup = lax.axis_index("warpgroup")
    block = lax.axis_index("block")
    # Tiles of this block: block, block + blocks, ...
    items = lax.div(count[0] * tiles_across - block + tuning.blocks - 1, jnp.int32(tuning.blocks))

    def locate(item: jax.Array) -> tuple[jax.Array, jax.Array]:
        index = block + item * tuning.blocks
        return lax.div(index, jnp.int32(tiles_across)), lax.rem(index, jnp.int32(tiles_across)) * width

    def slot_of(step: jax.Array) -> jax.Array:
        return lax.rem(step, jnp.int32(stages))

    @pl.when(warpgroup == CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(40, action="decrease")

        def fill(item: jax.Array, _: None) -> None:
            tile, column = locate(item)
            matrix = first_matrix[0] + tiles[tile, 0]
            rows = [tiles[tile, 1 + half] for half in range(CONSUMERS)]

            def copy(k: jax.Array, _: None) -> None:
                step = item * steps + k
                slot = slot_of(step)
                pl.when(step >= stages)(lambda: plgpu.barrier_wait(empty.at[slot]))
                depth = pl.ds(k * DEPTH, DEPTH)
                for half, row in enumerate(rows):
                    plgpu.copy_gmem_to_smem(x.at[pl.ds(row, ROWS), depth], x_rows.at[slot, half], full.at[slot])
                for part in range(parts):
                    columns = pl.ds(column + part * out.shape[1], width)
                    plgpu.copy_gmem_to_smem(w.at[matrix, depth, columns], w_shared.at[slot, part], full.at[slot])

            lax.fori_loop(0, steps, copy, None)

        lax.fori_loop(0, items, fill, None)
        total = items * steps
        lax.fori_loop(
            jnp.maximum(total - stages, 0), total, lambda step, _: plgpu.barrier_wait(empty.at[slot_of(step)]), None
        )

    @pl.when(warpgroup < CONSUMERS)
    def _() -> None:
        plgpu.set_max_registers(232, action="increase")

        def multiply(item: jax.Array, _: None) -> None:
            tile, column = locate(item)

            def accumulate(*sums: Any) -> list[jax.Array]:
                def step(k: jax.Array, _: None) -> None:
                    step = item * steps + k
                    slot = slot_of(step)
                    plgpu.barrier_wait(full.at[slot])
                    for part in range(parts):
                        plgpu.wgmma(sums[part], x_tiles.at[slot, warpgroup], w_shared.at[slot, part])
                    # This step's products stay in flight; the step before is done with its stage.
                    plgpu.wgmma_wait(parts)
                    pl.when(k > 0)(lambda: plgpu.barrier_arrive(empty.at[slot_of(step + stages - 1)]))

                lax.fori_loop(0, steps, step, None)
                return [total[...] for total in sums]

            products = pl.run_scoped(accumulate, *[plgpu.WGMMAAccumulatorRef((ROWS, width), jnp.float32)] * parts)
            plgpu.barrier_arrive(empty.at[slot_of((item + 1) * steps - 1)])
            row = tiles[tile, 1 + warpgroup]
            value = _finish(products, x.dtype, scale, row, interpret)
            skip, keep = tiles[tile, 1 + CONSUMERS], tiles[tile, 2 + CONSUMERS]
            _store(value.astype(out.dtype), staging, out, row, column, skip, keep, interpret)

        lax.fori_loop(0, items, multiply, None)
        plgpu.wait_smem_to_gmem(0)


def _finish(products: list[jax.Array], dtype: Any, scale: Any, row: jax.Array, interpret: bool) -> jax.Array:
    if len(products) == 2:
        gate, up = (product.astype(dtype).astype(jnp.float32) for product in products)
        return gate / (1 + jnp.exp(-gate)) * up
    (product,) = products
    if scale is None:
        return product
    rows = scale.at[pl.ds(row, ROWS)]
    layout = plgpu.Layout.WGMMA.reduce(1)
    factor = rows[...] if interpret else load(rows, layout)
    return product * lax.broadcast_in_dim(factor, product.shape, [0])


def _store(
    value: jax.Array,
    staging: Any,
    out: Any,
    row: jax.Array,
    column: jax.Array,
    skip: jax.Array,
    keep: jax.Array,
    interpret: bool,
) -> None:
    """Writes rows skip ... skip + keep of value to `out` at (row, column), in chunks of 128 bytes of columns."""
    staging_rows, staging_tiles = (staging, staging) if interpret else staging
    warpgroup = lax.axis_index("warpgroup")
    buffers, _, chunk = staging_rows.shape[1:]
    for c in range(value.shape[1] // chunk):
        buffer = staging_rows.at[warpgroup, c % buffers]
        columns = pl.ds(column + c * chunk, chunk)

        def send(first: Any, count: int, buffer: Any = buffer, columns: Any = columns) -> None:
            plgpu.copy_smem_to_gmem(
                buffer.at[pl.ds(first, count)], out.at[pl.ds(row + first, count), columns], commit_group=False
            )

        plgpu.wait_smem_to_gmem(buffers - 1, wait_read_only=True)
        staging_tiles[warpgroup, c % buffers] = value[:, c * chunk : (c + 1) * chunk]
        plgpu.commit_smem()
        pl.when(keep == ROWS)(partial(send, 0, ROWS))

        @pl.when(keep < ROWS)
        def _(send: Callable[[Any, int], None] = send) -> None:
            first = skip
            for power in reversed(range(ROWS.bit_length() - 1)):
                piece = keep & (1 << power)
                pl.when(piece != 0)(partial(send, first, 1 << power))
                first = first + piece

        plgpu.commit_smem_to_gmem_group()
