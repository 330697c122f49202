"""Products of a few rows with large matrices as one Triton kernel (Ampere and newer).

Schedule: one program for each tile of columns and each stretch of the contracted axis, over all matrices at once. It
streams its part of the matrix through shared memory (asynchronous copies, `stages` deep), multiplies on the tensor
cores with the rows padded to 16, and writes float32 partial sums. Who needs the result adds them, in a fixed order.

The matrices' bytes are the floor: 25.5 MB for the six projections before attention take 8.0 us on an H200 (5.9 at 4.3
TB/s), 16.8 MB of the output projection 5.8 us (3.9), in a profile of whole decode steps; launch, ramp and tail make up
the rest: read from L2 instead, they take 5.9 and 4.1 us alone, and the output projection 5.5 within a step.
Per-program stretches of 64 columns fill 128-byte lines, and all programs fit the GPU at once.

Tried and lost: one program a tile without splitting the contracted axis (narrow tiles of 16 and 32 columns read DRAM
badly: 17 and 9 us); products on the plain cores from registers (10.3 and 6.4 us); a norm of the rows inside (1.1 us
for one row, 4 for eight); tiles of 256 to 1,024 columns; the layer as a constant (0.3 us less, but a compilation a
layer). Within a step, microseconds more for the six projections and the output projection: 3 stages -0.1, 0.5; 5 stages
0.4, 0.1; depth 256 0.5, 0.4; depth 1,024 0.8, 0.4; steps of 128 rows 0.4, 0.2; 2 warps 0.2, 0. Asking for the next
kernel's launch early (`griddepcontrol.launch_dependents`) gains nothing: XLA has kernels set up early as it is.
The Triton lowering, because Mosaic's smallest wgmma wants 64 rows of one operand.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import MMA
from kernels_pallas.quantized import Quantized, Weights, multiplies

MAX_ROWS = 64


@dataclass(frozen=True)
class Tuning:
    """Tile of a program: `depth` of the contracted axis by `columns`, copied in `stages` of `step` rows."""

    columns: int = 64
    depth: int = 512
    step: int = 64
    stages: int = 4
    warps: int = 4


def supports(x: jax.Array, *weights: Weights) -> bool:
    """Whether the kernel takes rows x [M, D] and stacks of matrices [L, D, ...N]."""
    M, D = x.shape
    return (
        M <= MAX_ROWS
        and D >= MMA
        and D & (D - 1) == 0
        and x.dtype in (jnp.float32, jnp.bfloat16)
        and all(multiplies(w, x.dtype) for w in weights)
    )


def project_add(
    x: jax.Array, w: Weights, layer: jax.Array | int, residual: jax.Array, interpret: bool = False
) -> jax.Array:
    """See `kernels_pallas.skinny_matmul.project_add`; x [M, D] and w [L, D, N]."""
    sums = partial_products(x, (w,), layer, interpret=interpret)
    return residual + jnp.sum(sums, axis=0).astype(residual.dtype)


def partial_products(
    x: jax.Array,
    weights: Sequence[Weights],
    layer: jax.Array | int,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> jax.Array:
    """Products of rows with one layer's matrices, side by side, in parts that add up to them.

    Args:
        x: [M, D].
        weights: stacks [L, D, ...N]; with scales [L, ...N], which multiply every part.
        layer: which layer, int32 scalar.
        tuning: see there.
        interpret: runs on any platform, slowly.

    Returns:
        [P, M, sum of all N] float32.
    """
    M, D = x.shape
    flat = [_flat(w) for w in weights]
    widths = [w.shape[2] for w in flat]
    columns = [min(tuning.columns, max(MMA, 1 << (n - 1).bit_length())) for n in widths]
    tiles = [pl.cdiv(n, c) for n, c in zip(widths, columns, strict=True)]
    depth = min(tuning.depth, D)
    return pl.pallas_call(
        partial(_body, columns=columns, tiles=tiles, depth=depth, step=min(tuning.step, depth)),
        out_shape=jax.ShapeDtypeStruct((D // depth, M, sum(widths)), jnp.float32),
        grid=(sum(tiles), D // depth),
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=interpret,
        name="partial_products",
    )(jnp.asarray(layer, jnp.int32).reshape(1), x, *flat)


def _flat(w: Weights) -> Weights:
    """[L, D, ...N] as [L, D, N], and scales as [L, N]."""
    if isinstance(w, Quantized):
        scale = w.scale.reshape(w.scale.shape[0], -1)
        return Quantized(w.values.reshape(*w.shape[:2], scale.shape[1]), scale)
    return w.reshape(*w.shape[:2], -1)


def _body(layer_ref: Any, x_ref: Any, *refs: Any, columns: list[int], tiles: list[int], depth: int, step: int) -> None:
    *weights, out_ref = refs
    layer, pid, part = layer_ref[0], pl.program_id(0), pl.program_id(1)
    M = x_ref.shape[0]
    m = jnp.arange(max(MMA, 1 << (M - 1).bit_length()))[:, None]
    first = offset = 0
    for w_ref, width, count in zip(weights, columns, tiles, strict=True):
        N = w_ref.shape[2]

        @pl.when((pid >= first) & (pid < first + count))
        def _(w_ref: Any = w_ref, N: int = N, width: int = width, first: int = first, offset: int = offset) -> None:
            n = (pid - first) * width + jnp.arange(width)[None]
            values_ref: Any = w_ref.values if isinstance(w_ref, Quantized) else w_ref

            def add(i: jax.Array, sums: jax.Array) -> jax.Array:
                k = part * depth + i * step + jnp.arange(step)
                rows = jnp.broadcast_to(m < M, (m.shape[0], step))
                x = plt.load(x_ref.at[m, k[None]], mask=rows, other=0.0)
                if N % width:
                    live = jnp.broadcast_to(n < N, (step, width))
                    w = plt.load(values_ref.at[layer, k[:, None], n], mask=live, other=0)
                else:
                    w = plt.load(values_ref.at[layer, k[:, None], n])
                return sums + _dot(x, w.astype(x.dtype))

            sums = lax.fori_loop(0, depth // step, add, jnp.zeros((m.shape[0], width), jnp.float32))
            if isinstance(w_ref, Quantized):
                scale_ref: Any = w_ref.scale
                sums = sums * plt.load(scale_ref.at[layer, n], mask=n < N, other=0.0)
            plt.store(out_ref.at[part, m, offset + n], sums, mask=(m < M) & (n < N))

        first, offset = first + count, offset + N


def _dot(x: jax.Array, w: jax.Array) -> jax.Array:
    """[m, k] times [k, n] in float32; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    return lax.dot_general(x, w, (((1,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
