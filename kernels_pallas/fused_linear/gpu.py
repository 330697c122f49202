"""fused_linear on Hopper (Mosaic GPU): dense layers whose bias, GELU and residual are applied before they are stored.

Schedule. 132 blocks in clusters of two walk through the output in tiles of 128 x 192. The two blocks of a cluster take
the same columns of neighbouring row tiles; each fetches half of the weight's tile by TMA and sends it to both. In a
block, one warpgroup streams tiles of 64 columns of x and 64 rows of the weight through four buffers. Two others take
turns with whole output tiles: while one adds bias and residual, applies GELU and stores, 64 columns at a time, the
other has the tensor cores to itself. Sums, bias, GELU and residual are float32 and rounded once.

Floor: 2 M N K FLOPs at 790 TFLOP/s, the fastest product measured on an H200. Measured there at M = 65,536, TFLOP/s:
fc1 with GELU (1152 x 4304) 707, fc2 with residual 676, out_proj with residual 635, q_proj 662; XLA, which stores the
float32 sums and reads them back, 485, 635, 398 and 477. At M = 16,384: 620, 632, 503, 537.
What remains: 24 turns where 23.3 tiles a block would do at 1,152 columns, the start of each call, and 2.6% of zero
columns where 4304 is filled up to 4416.
Tried and lost: two warpgroups on halves of one tile (in fc1, GELU leaves the tensor cores idle: 505); no clusters
(659 in fc1); tiles of 128 x 128 (656) and 64 x 256; walking through groups of row tiles (up to 20% longer).
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas.compat import load

CONSUMERS = 2
STRIPE = 64
"""Columns that are rounded and stored at a time, and a swizzled row of 128 bytes."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; they have no effect on the result."""

    rows: int = 128
    columns: int = 192
    depth: int = 64
    stages: int = 4
    cluster: int = 2
    """Blocks that share the tiles of a weight."""
    clusters: int = 66


DEFAULT = Tuning()


def supports(x: jax.Array, *weights: jax.Array) -> bool:
    """Whether the kernel takes these operands; only the last of them must have whole tiles of columns."""
    return (
        all(a.dtype == jnp.bfloat16 for a in (x, *weights))
        and x.shape[0] % (DEFAULT.cluster * DEFAULT.rows) == 0
        and weights[-1].shape[1] % DEFAULT.columns == 0
    )


def fused_linear(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None = None,
    *,
    tuning: Tuning = DEFAULT,
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.fused_linear.fused_linear`."""
    return _multiply(x, weight, bias, residual, _identity, tuning, interpret)


def gelu_mlp(
    x: jax.Array,
    fc1: tuple[jax.Array, jax.Array],
    fc2: tuple[jax.Array, jax.Array],
    residual: jax.Array,
    *,
    tuning: Tuning = DEFAULT,
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.fused_linear.gelu_mlp`."""
    # Whole tiles: the columns that are added stay zero through GELU and meet rows of zeros.
    extra = -fc1[1].size % tuning.columns
    weight, bias = jnp.pad(fc1[0], ((0, 0), (0, extra))), jnp.pad(fc1[1], (0, extra))
    hidden = _multiply(x, weight, bias, None, _gelu, tuning, interpret)
    weight = jnp.pad(fc2[0], ((0, extra), (0, 0)))
    return _multiply(hidden, weight, fc2[1], residual, _identity, tuning, interpret)


def _identity(y: jax.Array) -> jax.Array:
    return y


def _gelu(y: jax.Array) -> jax.Array:
    """The tanh form, 0.5 y (1 + tanh(u)), as y sigmoid(2 u)."""
    return y / (1.0 + jnp.exp(-2.0 * 0.7978845608028654 * (y + 0.044715 * (y * y * y))))


def _multiply(
    x: jax.Array,
    weight: jax.Array,
    bias: jax.Array,
    residual: jax.Array | None,
    activation: Callable[[jax.Array], jax.Array],
    t: Tuning,
    interpret: Any,
) -> jax.Array:
    """activation(x @ weight + bias) + residual."""
    (M, K), (_, N) = x.shape, weight.shape
    if extra := -K % t.depth:
        x, weight = jnp.pad(x, ((0, 0), (0, extra))), jnp.pad(weight, ((0, extra), (0, 0)))
    if M % (t.cluster * t.rows) or N % t.columns:
        raise ValueError(f"[{M}, {K}] x [{K}, {N}] is not made of whole tiles of {t}")
    swizzle = (plgpu.TilingTransform((8, STRIPE)), plgpu.SwizzleTransform(128))
    kernel = plgpu.kernel(
        partial(_body, has_residual=residual is not None, activation=activation, t=t, plain=interpret),
        out_type=jax.ShapeDtypeStruct((M, N), x.dtype),
        scratch_types={
            "x_smem": plgpu.SMEM((t.stages, t.rows, t.depth), x.dtype, transforms=swizzle),
            "w_smem": plgpu.SMEM((t.stages, t.depth, t.columns), x.dtype, transforms=swizzle),
            "stripe_smem": plgpu.SMEM((CONSUMERS, t.rows, STRIPE), x.dtype, transforms=swizzle),
            # Two copies arrive. A consumer waits for its own tiles only, so each has its own barriers.
            "full": plgpu.Barrier(num_arrivals=2, num_barriers=CONSUMERS * t.stages),
            "empty": plgpu.Barrier(num_barriers=t.stages)
            if t.cluster == 1
            else plgpu.ClusterBarrier(collective_axes=("member",), num_barriers=t.stages),
            "residual_full": plgpu.Barrier(num_barriers=CONSUMERS),
        },
        grid=(t.clusters,),
        grid_names=("cluster",),
        cluster=(t.cluster,),
        cluster_names=("member",),
        num_threads=CONSUMERS + 1,
        thread_name="warpgroup",
        kernel_name="fused_linear",
        compiler_params=plgpu.CompilerParams(approx_math=True),
        interpret=interpret,
    )
    return kernel(x, weight, bias, *([] if residual is None else [residual]))


def _body(
    x_ref: Any,
    w_ref: Any,
    bias_ref: Any,
    *refs: Any,
    has_residual: bool,
    activation: Callable[[jax.Array], jax.Array],
    t: Tuning,
    plain: Any,
    x_smem: Any,
    w_smem: Any,
    stripe_smem: Any,
    full: Any,
    empty: Any,
    residual_full: Any,
) -> None:
    residual_ref, out_ref = refs if has_residual else (None, refs[0])
    (M, K), (_, N) = x_ref.shape, w_ref.shape
    row_tiles, column_tiles, steps = M // (t.cluster * t.rows), N // t.columns, K // t.depth
    cluster, member, me = lax.axis_index("cluster"), lax.axis_index("member"), lax.axis_index("warpgroup")
    tiles = (row_tiles * column_tiles - cluster + t.clusters - 1) // t.clusters

    def place(i: jax.Array) -> tuple[jax.Array, jax.Array]:
        """First row and column of this block's i-th tile. Columns come first: the rows of x stay in cache."""
        tile = cluster + i * t.clusters
        return (t.cluster * (tile // column_tiles) + member) * t.rows, tile % column_tiles * t.columns

    def read(ref: Any, layout: Any) -> jax.Array:
        return ref[...] if plain else load(ref, layout)

    def wait_empty(at: jax.Array) -> None:
        pl.when(at >= t.stages)(lambda: plgpu.barrier_wait(empty.at[lax.rem(at, t.stages)]))

    @pl.when(me == CONSUMERS)
    def _load() -> None:
        plgpu.set_max_registers(40, action="decrease")

        @pl.loop(0, tiles)
        def _tile(i: jax.Array) -> None:
            row, column = place(i)

            @pl.loop(0, steps)
            def _step(step: jax.Array) -> None:
                at = i * steps + step
                slot = lax.rem(at, t.stages)
                wait_empty(at)
                ready = full.at[lax.rem(i, CONSUMERS) * t.stages + slot]
                depth = pl.ds(step * t.depth, t.depth)
                plgpu.copy_gmem_to_smem(x_ref.at[pl.ds(row, t.rows), depth], x_smem.at[slot], ready)
                plgpu.copy_gmem_to_smem(
                    w_ref.at[depth, pl.ds(column, t.columns)],
                    w_smem.at[slot],
                    ready,
                    collective_axes="member" if t.cluster > 1 else None,
                )

        # The other block of the cluster sends tiles here: stay until all that was sent has been used.
        pl.loop(tiles * steps, tiles * steps + t.stages)(wait_empty)

    @pl.when(me < CONSUMERS)
    def _compute() -> None:
        plgpu.set_max_registers(232, action="increase")
        stripe = stripe_smem.at[me]

        @pl.loop(0, (tiles - me + CONSUMERS - 1) // CONSUMERS)
        def _tile(turn: jax.Array) -> None:
            i = turn * CONSUMERS + me
            row, column = place(i)
            rows = pl.ds(row, t.rows)

            def fetch_residual(offset: int) -> None:
                if residual_ref is not None and offset < t.columns:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                    source = residual_ref.at[rows, pl.ds(column + offset, STRIPE)]
                    plgpu.copy_gmem_to_smem(source, stripe, residual_full.at[me])

            fetch_residual(0)

            def accumulate(sums: Any) -> jax.Array:
                @pl.loop(0, steps)
                def _step(step: jax.Array) -> None:
                    at = i * steps + step
                    slot = lax.rem(at, t.stages)
                    plgpu.barrier_wait(full.at[me * t.stages + slot])
                    plgpu.wgmma(sums, x_smem.at[slot], w_smem.at[slot])
                    # One product stays in flight; the buffers of the one before are free.
                    plgpu.wgmma_wait(1)
                    pl.when(step > 0)(lambda: plgpu.barrier_arrive(empty.at[lax.rem(at + t.stages - 1, t.stages)]))

                plgpu.wgmma_wait(0)
                plgpu.barrier_arrive(empty.at[lax.rem(i * steps + steps - 1, t.stages)])
                return sums[...]

            sums = pl.run_scoped(accumulate, plgpu.WGMMAAccumulatorRef((t.rows, t.columns), jnp.float32))
            for offset in range(0, t.columns, STRIPE):
                columns = pl.ds(column + offset, STRIPE)
                y = sums[:, offset : offset + STRIPE]
                bias = read(bias_ref.at[columns], plgpu.Layout.WGMMA.reduce(0)).astype(jnp.float32)
                y = activation(y + lax.broadcast_in_dim(bias, y.shape, [1]))
                if has_residual:
                    plgpu.barrier_wait(residual_full.at[me])
                    y += read(stripe, plgpu.Layout.WGMMA).astype(jnp.float32)
                else:
                    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
                stripe[...] = y.astype(x_ref.dtype)
                plgpu.commit_smem()
                plgpu.copy_smem_to_gmem(stripe, out_ref.at[rows, columns])
                fetch_residual(offset + STRIPE)

        plgpu.wait_smem_to_gmem(0)
