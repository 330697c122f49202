"""grouped_matmul and grouped_swiglu for TPUs: every matrix is read once, straight from the stack of all layers.

out[r] = x[r] @ w[layer, group of r], optionally times a scale per row, or silu(gate) * up of two such products whose
columns lie F apart in w.

Schedule. Rows are cut into tiles that know nothing of groups; a visit is a tile and a group with rows in it, in order,
so that a group's visits and a tile's visits follow each other. XLA makes the table of visits, at most tiles + groups -
1, and the grid walks it. A visit multiplies the whole tile, with the whole depth at once, and writes the rows of its
group over the others' in the tile's output, which stays in VMEM until the next tile. A group's matrix is copied by hand
into one of two buffers, the next one's while the present one is multiplied for as long as it has visits: the pipeline
that Pallas makes would begin that copy only one visit before. The columns are walked in two parts or more, each over
all visits: the two cores of a v5p take them at the same time, elsewhere x is read once for each. A matrix of 8 bits is
widened to x's dtype once, when it has arrived; its scales multiply the float32 products.

Cost at the published sizes, 512 tokens (4,096 rows, 128 groups, 159 visits): gate and up 805 MB + 2 x 17 MB of x + 6 of
output, 1.03 ms at the memory's datasheet rate on a v5e, 0.51 (v6e), 0.31 (v5p), 0.23 (tpu7x); down 403 + 2 x 6 + 17 MB,
0.53 ms, 0.26, 0.16, 0.12. The products of whole tiles, 128 GFLOP of gate and up for 26 needed, take 0.65 ms on a v5e,
0.14 on a v6e, and hide: the compiler schedules 2,700 and 1,300 bundles a visit and part, fewer than the 3,070 and 1,540
cycles of the matrix units. With 8,192 tokens (65,536 rows, 639 visits) a v5e multiplies for 2.6 ms, of which 2.1 are
needed rows.

Not taken: `lax.ragged_dot` and megablox. Both can walk the matrices of all layers without a copy, the other layers'
groups being empty, but fuse neither SwiGLU nor the scales: gate and up would go to memory and back as 25 MB of float32.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import einsum_f32
from kernels_pallas.grouped_matmul.tpu_scales import scale_row, scale_spec
from kernels_pallas.quantized import Quantized, Weights, multiplies

LANES = 128
SLOTS = 2
"""Buffers for matrices."""
TILE, GROUP, BEGIN, END, SLOT, NEXT = range(6)
"""Rows of the table of visits."""


@dataclass(frozen=True)
class Tuning:
    """Rows of a tile: a multiple of 128, the length of a row of scales; and bytes of one buffer for matrices."""

    rows: int = 128
    buffer: int = 4 * 2**20


def supports(x: jax.Array, w: Weights, halves: int) -> bool:
    """Whether the kernel takes these shapes and dtypes; `halves` is 2 for the fused SwiGLU."""
    D, F = w.shape[2:]
    return (
        x.shape[0] > 0
        and multiplies(w, x.dtype)
        and x.dtype in (jnp.float32, jnp.bfloat16)
        and D % LANES == 0
        and F % (halves * LANES) == 0
        and D <= 8192
    )


def grouped_matmul(
    x: jax.Array,
    w: Weights,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    row_scale: jax.Array | None = None,
    *,
    out_dtype: Any,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_matmul`."""
    return _grouped(x, w, layer, group_sizes, row_scale, 1, out_dtype, tuning, interpret)


def grouped_swiglu(
    x: jax.Array,
    w: Weights,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    *,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`."""
    return _grouped(x, w, layer, group_sizes, None, 2, x.dtype, tuning, interpret)


def visit_table(group_sizes: jax.Array, tiles: int, rows: int) -> jax.Array:
    """What the grid's steps do.

    Args:
        group_sizes: [E] int32.
        tiles: tiles of `rows` rows that hold all groups.

    Returns:
        [6, tiles + E - 1] int32, per visit: tile; group; the group's first row and the one behind its last, counted
        from the tile's first; which buffer holds the group's matrix; the next group that has rows, -1 behind the last.
        Visits behind the last are to the last tile, and no row is theirs.
    """
    E = group_sizes.shape[0]
    group = jnp.arange(E, dtype=jnp.int32)
    # Comparisons and sums over [E, E] and [visits, E] instead of cumulative sums: a few small fusions.
    before = group[:, None] > group
    exists = group_sizes > 0

    def total_before(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(before, values, 0), axis=1, dtype=jnp.int32)

    start = total_before(group_sizes)
    first_tile = start // rows
    visits_of = jnp.where(exists, (start + group_sizes - 1) // rows - first_tile + 1, 0)
    first_visit = total_before(visits_of)
    following = jnp.min(jnp.where(before.T & exists, group, E), axis=1)
    following = jnp.where(following == E, -1, following)
    visit = jnp.arange(tiles + E - 1, dtype=jnp.int32)[:, None]
    mine = (visit >= first_visit) & (visit < first_visit + visits_of)

    def of_group(values: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(mine, values, 0), axis=1, dtype=jnp.int32)

    used = jnp.any(mine, axis=1)
    tile = jnp.where(used, of_group(first_tile - first_visit) + visit[:, 0], tiles - 1)
    begin, end = (jnp.where(used, of_group(row) - tile * rows, 0) for row in (start, start + group_sizes))
    slot = of_group(total_before(exists.astype(jnp.int32)) % SLOTS)
    return jnp.stack([tile, of_group(group), begin, end, slot, of_group(following)])


def _grouped(
    x: jax.Array,
    w: Weights,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    row_scale: jax.Array | None,
    halves: int,
    out_dtype: Any,
    tuning: Tuning,
    interpret: Any,
) -> jax.Array:
    M = x.shape[0]
    _, E, D, F = w.shape
    columns, rows = F // halves, tuning.rows
    width = _width(columns, D * halves * x.dtype.itemsize, tuning.buffer)
    tiles = pl.cdiv(M, rows)
    if M % rows:
        x = jnp.pad(x, ((0, tiles * rows - M), (0, 0)))
        row_scale = None if row_scale is None else jnp.pad(row_scale, (0, tiles * rows - M))
    visits = visit_table(group_sizes, tiles, rows)
    row_scales = [] if row_scale is None else [row_scale[None]]
    values, scale = (w.values, w.scale) if isinstance(w, Quantized) else (w, None)

    def scales_of(half: int) -> pl.BlockSpec:
        first = half * (columns // width)
        return scale_spec(E, width, lambda part, v, layer, visits: (layer[0], visits[GROUP, v], first + part))

    scales = [] if scale is None else [scale] * halves
    in_specs = (
        pl.BlockSpec((rows, D), lambda _, v, layer, visits: (visits[TILE, v], 0)),
        [pl.BlockSpec((1, rows), lambda _, v, layer, visits: (0, visits[TILE, v])) for _ in row_scales],
        [scales_of(half) for half in range(len(scales))],
        pl.BlockSpec(memory_space=pl.ANY),
    )
    matrix = (halves, D, width)
    scratch = (
        pltpu.VMEM((SLOTS, *matrix), values.dtype),
        pltpu.SemaphoreType.DMA((SLOTS,)),
        [pltpu.VMEM(matrix, x.dtype)] if scales else [],
    )
    block_bytes = rows * (D * x.dtype.itemsize + 4 * (halves + 1) * width)
    out = pl.pallas_call(
        _kernel,
        out_shape=jax.ShapeDtypeStruct((tiles * rows, columns), out_dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(columns // width, visits.shape[1]),
            in_specs=in_specs,
            out_specs=pl.BlockSpec((rows, width), lambda part, v, layer, visits: (visits[TILE, v], part)),
            scratch_shapes=scratch,
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary"),
            vmem_limit_bytes=SLOTS * halves * D * width * x.dtype.itemsize + 4 * block_bytes + 8 * 2**20,
        ),
        interpret=interpret,
        name="grouped_matmul" if halves == 1 else "grouped_swiglu",
    )(jnp.asarray(layer, jnp.int32).reshape(1), visits, x, row_scales, scales, values)
    return out[:M]


def _width(columns: int, bytes_a_column: int, buffer: int) -> int:
    """Columns at once: a divisor of `columns` that leaves two parts if it can, and fits the buffer if it can."""
    fitting = [c for c in range(LANES, columns // 2 + 1, LANES) if columns % c == 0 and c * bytes_a_column <= buffer]
    return max(fitting, default=LANES)


def _kernel(
    layer: Any,
    visits: Any,
    x: Any,
    row_scales: list[Any],
    scales: list[Any],
    w: Any,
    out: Any,
    buffers: Any,
    arrived: Any,
    widened: list[Any],
) -> None:
    _, halves, _, width = buffers.shape
    columns = w.shape[3] // halves
    part, v = pl.program_id(0), pl.program_id(1)
    group, slot, following = visits[GROUP, v], visits[SLOT, v], visits[NEXT, v]
    begin, end = visits[BEGIN, v], visits[END, v]

    def copies(group: jax.Array, slot: jax.Array) -> list[Any]:
        first = [pl.multiple_of(half * columns + part * width, LANES) for half in range(halves)]
        return [
            pltpu.make_async_copy(
                w.at[layer[0], group, :, pl.ds(column, width)], buffers.at[slot, half], arrived.at[slot]
            )
            for half, column in enumerate(first)
        ]

    def start(group: jax.Array, slot: jax.Array) -> None:
        for copy in copies(group, slot):
            copy.start()

    pl.when((v == 0) & (end > begin))(lambda: start(group, slot))

    # A group's first visit is to the tile that its first row lies in.
    @pl.when((begin >= 0) & (end > begin))
    def _() -> None:
        # The other buffer's matrix was last used in the visit before.
        pl.when(following >= 0)(lambda: start(following, SLOTS - 1 - slot))
        for copy in copies(group, slot):
            copy.wait()
        for matrix in widened:
            _widen(buffers, slot, matrix)

    @pl.when(end > begin)
    def _() -> None:
        matrix = widened[0] if widened else buffers.at[slot]
        products = [einsum_f32("md,df->mf", x[...], matrix[half]) for half in range(halves)]
        if scales:
            products = [product * scale_row(scale, group) for product, scale in zip(products, scales, strict=True)]
        value = _finish(products, x.dtype, row_scales)
        row = lax.broadcasted_iota(jnp.int32, (x.shape[0], 1), 0)
        out[...] = jnp.where((begin <= row) & (row < end), value.astype(out.dtype), out[...])


def _widen(buffers: Any, slot: jax.Array, matrix: Any) -> None:
    """Fills [halves, D, width] with the 8-bit matrix of a buffer."""

    @pl.loop(0, matrix.shape[1] // LANES)
    def _(step: jax.Array) -> None:
        rows = pl.ds(pl.multiple_of(step * LANES, LANES), LANES)
        for half in range(matrix.shape[0]):
            matrix[half, rows, :] = buffers[slot, half, rows, :].astype(matrix.dtype)


def _finish(products: list[jax.Array], dtype: Any, row_scales: list[Any]) -> jax.Array:
    if len(products) == 2:
        gate, up = (product.astype(dtype).astype(jnp.float32) for product in products)
        return jax.nn.silu(gate) * up
    (product,) = products
    if not row_scales:
        return product
    # A row of scales becomes a column: each taken from the diagonal, exactly.
    rows = product.shape[0]
    diagonal = lax.broadcasted_iota(jnp.int32, (rows, rows), 0) == lax.broadcasted_iota(jnp.int32, (rows, rows), 1)
    return product * jnp.sum(jnp.where(diagonal, row_scales[0][...], 0.0), axis=1, keepdims=True)
