"""The mixture of experts for one row on a GPU, in three launches: time is the weights' bytes plus latency.

Schedule. 1: normed row and partial logits, see `decode_gpu_router`. 2: every program of the gate_up product adds the
partial logits and ranks the experts itself (16 KB from L2: cheaper than one more launch), then multiplies 64 columns of
its expert. 3: every program of the down product takes the gate and up products through SwiGLU as it reads them,
multiplies its columns, rounds; the last of a column tile's k programs, known by a counter, adds the k rows in order
and the residual. Counters are zeroed by launch 1. No sum depends on the order of arrival.

Floor at the published sizes: 75.5 MB, 17.6 us at 4.3 TB/s. One H200, profile of whole decode steps: 2.4 + 16.4 + 9.8
us. What is missing is latency, 3 to 4 us a launch before its weights flow: ranking is 1.9 of gate_up, counting and the
sum behind it 1.5 of down. Batch 8 reaches 82 to 88% of the rate.

Tried and lost: weights through registers instead of asynchronous copies (27 to 46 us for gate_up); tiles of 32 columns
or fewer (64-byte rows: 20 to 26 us); gate_up split along D with the sum left to launch 3 (17 us); one program a
column tile for all k experts of down (23 to 94 us: narrow rows or idle processors); the router's sum by its last
program to arrive (6.5 us, and 1.5 us to zero its counter) or in one program (16 to 21 us); gate_up and down in one
launch, down programs waiting on counters with their first weights in registers (34 to 38 us instead of 27). Within a
step: the output projection's parts added up in launch 1 (4.7 us where two launches take 3.4); 16 parts of the logits
(+0.6, and -0.1 in launch 2); router weights only where they are written (+0.5); down's weights asked for into L2 by
launch 2 after or before its own (+1.4 and +5 in all); 8 warps (+0.7 and +1.6), 4 stages (+0.8 for gate_up), tiles of 32
rows (+0.4 and +1.6), of 128 columns (+0.8 for down).
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.grouped_matmul import decode_gpu_tiles as tiles
from kernels_pallas.grouped_matmul.decode_gpu import swiglu
from kernels_pallas.grouped_matmul.decode_gpu_router import partial_logits, ranked
from kernels_pallas.grouped_matmul.decode_gpu_tiles import Tile, Tuning
from kernels_pallas.quantized import Weights

TUNING = Tuning(router=Tile(64, 0, 4, 1), gate_up=Tile(64, 64, 4, 6), down=Tile(128, 64, 4, 4))


def moe_row(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array,
    *,
    k: int,
    renormalise: bool,
    eps: float,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> jax.Array:
    """`decode.moe_step` for h [1, D]."""
    D, F = h.shape[1], down.shape[2]
    down_width = tiles.tile_size(D, tuning.down.width)
    m, parts, counters = partial_logits(
        h,
        norm,
        router,
        layer,
        eps=eps,
        tile=tuning.router,
        interpret=interpret,
        counters=tiles.power_of_two(D // down_width),
    )
    t = tuning.gate_up
    width = tiles.tile_size(2 * F, t.width)
    products, weights, experts = pl.pallas_call(
        partial(_gate_up_body, depth=tiles.tile_size(D, t.depth), width=width, renormalise=renormalise),
        out_shape=(
            jax.ShapeDtypeStruct((k, 2 * F), jnp.float32),
            jax.ShapeDtypeStruct((k,), jnp.float32),
            jax.ShapeDtypeStruct((k,), jnp.int32),
        ),
        grid=(2 * F // width, k),
        compiler_params=tiles.compiler_params(t, h.dtype),
        interpret=interpret,
        name="row_gate_up",
    )(m, gate_up, layer, parts)
    t = tuning.down
    out, _, _ = pl.pallas_call(
        partial(_down_body, depth=tiles.tile_size(F, t.depth), width=down_width, interpret=interpret),
        out_shape=(
            jax.ShapeDtypeStruct(h.shape, h.dtype),
            jax.ShapeDtypeStruct((k, D), h.dtype),
            jax.ShapeDtypeStruct(counters.shape, jnp.int32),
        ),
        grid=(k, D // down_width),
        input_output_aliases={0: 2},
        compiler_params=tiles.compiler_params(t, h.dtype),
        interpret=interpret,
        name="row_down",
    )(counters, products, down, layer, weights, experts, h)
    return out


def _gate_up_body(
    m_ref: Any,
    gate_up_ref: Any,
    layer_ref: Any,
    parts_ref: Any,
    products_ref: Any,
    weights_ref: Any,
    experts_ref: Any,
    *,
    depth: int,
    width: int,
    renormalise: bool,
) -> None:
    E, D = gate_up_ref.shape[1:3]
    k = weights_ref.shape[0]
    tile, slot = pl.program_id(0), pl.program_id(1)
    layer, columns = layer_ref[()], pl.ds(tile * width, width)
    all_weights, rank = ranked(parts_ref[0], experts=E, k=k, renormalise=renormalise, dtype=m_ref.dtype)
    expert = jnp.sum(jnp.where(rank == slot, jnp.arange(rank.shape[0], dtype=jnp.int32), 0))

    @pl.when(tile == 0)
    def _() -> None:
        experts_ref[slot] = expert
        weights_ref[slot] = jnp.sum(jnp.where(rank == slot, all_weights, 0.0))

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        row, column = tiles.grid(_tile_rows()[:, None], (i * depth + jnp.arange(depth, dtype=jnp.int32))[None])
        x = plt.load(m_ref.at[row, column], mask=row < 1, other=0.0)
        rows = pl.ds(i * depth, depth)
        return total + tiles.dot(x, tiles.load_weights(gate_up_ref, x.dtype, layer, expert, rows, columns))

    total = lax.fori_loop(0, D // depth, step, jnp.zeros((tiles.MMA_ROWS, width), jnp.float32))
    products_ref[slot, columns] = tiles.scaled(jnp.sum(total, axis=0), gate_up_ref, layer, expert, columns)


def _down_body(
    _: Any,
    products_ref: Any,
    down_ref: Any,
    layer_ref: Any,
    weights_ref: Any,
    experts_ref: Any,
    residual_ref: Any,
    out_ref: Any,
    rows_ref: Any,
    counters_ref: Any,
    *,
    depth: int,
    width: int,
    interpret: bool,
) -> None:
    k, F = products_ref.shape[0], down_ref.shape[2]
    dtype = residual_ref.dtype
    slot, tile = pl.program_id(0), pl.program_id(1)
    layer, expert, columns = layer_ref[()], experts_ref[slot], pl.ds(tile * width, width)

    def step(i: jax.Array, total: jax.Array) -> jax.Array:
        gate = plt.load(products_ref.at[slot, pl.ds(i * depth, depth)])
        up = plt.load(products_ref.at[slot, pl.ds(F + i * depth, depth)])
        x = swiglu(gate, up, jnp.dtype(dtype)).astype(jnp.float32)
        x = jnp.where(_tile_rows()[:, None] == 0, x[None], 0.0).astype(dtype)
        rows = pl.ds(i * depth, depth)
        return total + tiles.dot(x, tiles.load_weights(down_ref, x.dtype, layer, expert, rows, columns))

    total = lax.fori_loop(0, F // depth, step, jnp.zeros((tiles.MMA_ROWS, width), jnp.float32))
    row = tiles.scaled(jnp.sum(total, axis=0), down_ref, layer, expert, columns)
    rows_ref[slot, columns] = (row * weights_ref[slot]).astype(dtype)
    # All threads' stores come before the count, all loads of the last program after it.
    if not interpret:
        plt.debug_barrier()
    # Interpret mode cannot add a literal.
    arrived = plt.atomic_add(counters_ref, (tile,), 1 + 0 * tile)

    @pl.when(arrived == k - 1)
    def _() -> None:
        index = tiles.grid(
            jnp.arange(tiles.power_of_two(k), dtype=jnp.int32)[:, None],
            (tile * width + jnp.arange(width, dtype=jnp.int32))[None],
        )
        rows = plt.load(rows_ref.at[index], mask=index[0] < k, other=0.0, volatile=True)
        moe = jnp.sum(rows.astype(jnp.float32), axis=0)
        out_ref[0, columns] = residual_ref[0, columns] + moe.astype(dtype)


def _tile_rows() -> jax.Array:
    """Rows of a tensor core's smallest tile: row 0 is ours, the others are zero."""
    return jnp.arange(tiles.MMA_ROWS, dtype=jnp.int32)
