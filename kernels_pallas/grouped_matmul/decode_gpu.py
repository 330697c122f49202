"""The mixture of experts of a decode step on a GPU: two launches choose the experts, one each for gate_up and down.

Schedule. Router: see `decode_gpu_router`. Experts: a program owns a tile of columns of one (row, expert) pair's matrix
and walks its rows, copies of later tiles in flight while a tensor core multiplies the present one. Rows that share an
expert (batch 2 to 64) are multiplied by the first pair that names it, so that every chosen matrix is read once; a pair
without an expert writes zeros. Nothing is accumulated across programs: results are the same in every run.

Floor: bytes of the distinct experts at 4.3 TB/s. One H200, published sizes, batch 8 (52 distinct experts a layer):
gate_up 85 to 87 us of 76, down 47 us of 38. Triton rather than Mosaic: pipelined copies need no code, and the memory's
rate is reached. Lost: weights through registers (119 us at batch 8); tiles of 32 columns (122 us); one program a pair
without sharing costs the same at batch 8, where the second reader of a matrix finds it in L2, and more above.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.grouped_matmul.decode_gpu_router import norm_route
from kernels_pallas.grouped_matmul.decode_gpu_tiles import (
    FLOATS,
    MAX_ROWS,
    MMA_ROWS,
    TUNING,
    Tuning,
    compiler_params,
    dot,
    grid,
    load_weights,
    power_of_two,
    scaled,
    tile_size,
)
from kernels_pallas.quantized import Weights, multiplies


def supports(x: jax.Array, *weights: Weights) -> bool:
    """Whether the kernels take rows x [M, ...] and stacks of expert matrices [L, E, rows, columns]."""
    return (
        x.shape[0] <= MAX_ROWS
        and x.dtype in FLOATS
        and all(
            multiplies(w, x.dtype) and w.shape[2] % MMA_ROWS == 0 and w.shape[3] % (2 * MMA_ROWS) == 0 for w in weights
        )
    )


def moe_step(
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
    """`decode.moe_step` on a GPU."""
    how = {"tuning": tuning, "interpret": interpret}
    m, weights, experts = norm_route(h, norm, router, layer, k=k, renormalise=renormalise, eps=eps, **how)
    return experts_add(m, gate_up, down, layer, experts, weights, h, **how)


def experts_add(
    m: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
    *,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> jax.Array:
    """`decode.experts_add` on a GPU."""
    hidden = expert_swiglu(m, gate_up, layer, experts, tuning=tuning, interpret=interpret)
    return expert_down(hidden, down, layer, experts, weights, residual, tuning=tuning, interpret=interpret)


def expert_swiglu(
    m: jax.Array,
    gate_up: Weights,
    layer: jax.Array,
    experts: jax.Array,
    *,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> jax.Array:
    """`decode.expert_swiglu` on a GPU."""
    M, D = m.shape
    k = experts.shape[1]
    F = gate_up.shape[3] // 2
    t = tuning.gate_up
    depth, width = tile_size(D, t.depth), tile_size(F, t.width)
    return pl.pallas_call(
        partial(_swiglu_body, depth=depth, width=width),
        out_shape=jax.ShapeDtypeStruct((M, k, F), m.dtype),
        grid=(F // width, M * k),
        compiler_params=compiler_params(t, m.dtype),
        interpret=interpret,
        name="expert_swiglu",
    )(m, gate_up, layer, experts)


def _swiglu_body(
    m_ref: Any, gate_up_ref: Any, layer_ref: Any, experts_ref: Any, out_ref: Any, *, depth: int, width: int
) -> None:
    D, F = m_ref.shape[1], out_ref.shape[2]
    dtype = jnp.dtype(m_ref.dtype)
    layer, first = layer_ref[()], pl.program_id(0) * width
    pair = _Pair.load(experts_ref, pl.program_id(1))
    pair.clear(out_ref, first, width)

    @pl.when(pair.leads)
    def _() -> None:
        def step(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gate, up = sums
            rows = pl.ds(i * depth, depth)
            x = pair.rows(lambda row, _, column: m_ref.at[row, column], i * depth, depth)
            return (
                gate + dot(x, load_weights(gate_up_ref, dtype, layer, pair.expert, rows, pl.ds(first, width))),
                up + dot(x, load_weights(gate_up_ref, dtype, layer, pair.expert, rows, pl.ds(F + first, width))),
            )

        zero = jnp.zeros((pair.row.shape[0], width), jnp.float32)
        gate, up = lax.fori_loop(0, D // depth, step, (zero, zero))
        gate, up = (
            scaled(product, gate_up_ref, layer, pair.expert, pl.ds(start, width))
            for product, start in ((gate, first), (up, F + first))
        )
        pair.store(out_ref, first, swiglu(gate, up, dtype))


def expert_down(
    hidden: jax.Array,
    down: Weights,
    layer: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
    *,
    tuning: Tuning = TUNING,
    interpret: bool = False,
) -> jax.Array:
    """`decode.expert_down` on a GPU."""
    M, k, F = hidden.shape
    D = down.shape[3]
    t = tuning.down
    depth, width = tile_size(F, t.depth), tile_size(D, t.width)
    rows = pl.pallas_call(
        partial(_down_body, depth=depth, width=width),
        out_shape=jax.ShapeDtypeStruct((M, k, D), residual.dtype),
        grid=(D // width, M * k),
        compiler_params=compiler_params(t, hidden.dtype),
        interpret=interpret,
        name="expert_down",
    )(hidden, down, layer, experts, weights)
    return residual + jnp.sum(rows, axis=1, dtype=jnp.float32).astype(residual.dtype)


def _down_body(
    hidden_ref: Any,
    down_ref: Any,
    layer_ref: Any,
    experts_ref: Any,
    weights_ref: Any,
    out_ref: Any,
    *,
    depth: int,
    width: int,
) -> None:
    F = hidden_ref.shape[2]
    layer, first = layer_ref[()], pl.program_id(0) * width
    pair = _Pair.load(experts_ref, pl.program_id(1))
    pair.clear(out_ref, first, width)

    @pl.when(pair.leads)
    def _() -> None:
        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            x = pair.rows(lambda row, slot, column: hidden_ref.at[row, slot, column], i * depth, depth)
            rows = pl.ds(i * depth, depth)
            return total + dot(x, load_weights(down_ref, x.dtype, layer, pair.expert, rows, pl.ds(first, width)))

        zero = jnp.zeros((pair.row.shape[0], width), jnp.float32)
        product = lax.fori_loop(0, F // depth, step, zero)
        product = scaled(product, down_ref, layer, pair.expert, pl.ds(first, width))
        weights = plt.load(weights_ref.at[pair.row, pair.slot], mask=pair.names, other=0.0)
        pair.store(out_ref, first, (product * weights[:, None]).astype(out_ref.dtype))


@dataclass(frozen=True)
class _Pair:
    """A program's (row, expert) pair and all pairs of the same expert: (row[i], slot[i]) where names[i], arrays [R].

    `leads` says whether it is the first of them. It works for all; the others have nothing to do. A pair without an
    expert stands alone at `own`, its (row, slot).
    """

    own: tuple[jax.Array, jax.Array]
    expert: jax.Array
    leads: jax.Array
    row: jax.Array
    slot: jax.Array
    names: jax.Array

    @classmethod
    def load(cls, experts_ref: Any, index: jax.Array) -> "_Pair":
        M, k = experts_ref.shape
        own = lax.div(index, k), lax.rem(index, k)
        expert = experts_ref[own]
        row = jnp.arange(max(MMA_ROWS, power_of_two(M)), dtype=jnp.int32)
        place = grid(row[:, None], jnp.arange(power_of_two(k), dtype=jnp.int32)[None])
        exists = (place[0] < M) & (place[1] < k)
        same = exists & (plt.load(experts_ref.at[place], mask=exists, other=-1) == expert)
        first = jnp.min(jnp.where(same, place[0] * k + place[1], M * k))
        slot = jnp.max(jnp.where(same, place[1], -1), axis=1)
        return cls(own, expert, (first == index) & (expert >= 0), row, jnp.maximum(slot, 0), slot >= 0)

    def rows(self, at: Callable[..., Any], start: jax.Array, size: int) -> jax.Array:
        """[R, size]: columns from `start` of what `at` (row, slot, column) points to; zero where not `names`."""
        index = grid(self.row[:, None], self.slot[:, None], (start + jnp.arange(size, dtype=jnp.int32))[None])
        return plt.load(at(*index), mask=jnp.broadcast_to(self.names[:, None], index[0].shape), other=0.0)

    def clear(self, ref: Any, start: jax.Array, width: int) -> None:
        """Writes zeros to the pair's own columns from `start` of ref [M, k, ...] if it has no expert."""

        @pl.when(self.expert < 0)
        def _() -> None:
            ref[(*self.own, pl.ds(start, width))] = jnp.zeros((width,), ref.dtype)

    def store(self, ref: Any, start: jax.Array, values: jax.Array) -> None:
        """Writes values [R, width] to columns from `start` of ref [M, k, ...] where `names`."""
        column = (start + jnp.arange(values.shape[1], dtype=jnp.int32))[None]
        index = grid(self.row[:, None], self.slot[:, None], column)
        plt.store(ref.at[index], values, mask=jnp.broadcast_to(self.names[:, None], values.shape))


def swiglu(gate: jax.Array, up: jax.Array, dtype: Any) -> jax.Array:
    """silu(gate) * up in float32 of float32 products that are rounded to `dtype` first; rounded to `dtype`."""
    gate, up = gate.astype(dtype).astype(jnp.float32), up.astype(dtype).astype(jnp.float32)
    return (gate * jax.nn.sigmoid(gate) * up).astype(dtype)
