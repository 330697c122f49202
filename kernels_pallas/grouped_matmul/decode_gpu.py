"""The mixture of experts of a decode step on a GPU: two launches choose the experts, one each for gate_up and down.

Schedule. Router: every program norms the row, multiplies its rows of the router and leaves float32 partial logits; a
second launch adds them, and ranks each probability by counting those before it. Experts: a program owns a tile of
columns of one (row, expert) pair's matrix and walks its rows, copies of later tiles in flight while a tensor core
multiplies the present one. Rows that share an expert (batch 2 to 64) are multiplied by the first pair that names it,
so that every chosen matrix is read once. Nothing is accumulated across programs: results are the same in every run.

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

MAX_ROWS = 64
MMA_ROWS = 16
"""Rows of the smallest tensor core product."""
_FLOATS = (jnp.float32, jnp.bfloat16)


@dataclass(frozen=True)
class Tile:
    """A tile of weights and how a program walks it: rows and columns of the tile, warps, tiles in flight."""

    depth: int
    width: int
    warps: int
    stages: int


@dataclass(frozen=True)
class Tuning:
    """Measured on an H200 at the published sizes."""

    router: Tile = Tile(64, 0, 4, 1)
    """Programs own all columns of the router."""
    gate_up: Tile = Tile(64, 64, 4, 6)
    down: Tile = Tile(64, 128, 4, 6)


def supports(x: jax.Array, *weights: jax.Array) -> bool:
    """Whether the kernels take rows x [M, ...] and stacks of expert matrices [L, E, rows, columns]."""
    return (
        x.shape[0] <= MAX_ROWS
        and x.dtype in _FLOATS
        and all(w.dtype == x.dtype and w.shape[2] % MMA_ROWS == 0 and w.shape[3] % (2 * MMA_ROWS) == 0 for w in weights)
    )


def supports_router(h: jax.Array, router: jax.Array) -> bool:
    """Whether the kernels take rows h [M, D] and routers [L, D, E]."""
    return h.shape[0] <= MAX_ROWS and h.dtype in _FLOATS and router.dtype == h.dtype and h.shape[1] % MMA_ROWS == 0


def moe_step(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    gate_up: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    *,
    k: int,
    renormalise: bool,
    eps: float,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> jax.Array:
    """`decode.moe_step` on a GPU."""
    how = {"tuning": tuning, "interpret": interpret}
    m, weights, experts = norm_route(h, norm, router, layer, k=k, renormalise=renormalise, eps=eps, **how)
    hidden = expert_swiglu(m, gate_up, layer, experts, **how)
    return expert_down(hidden, down, layer, experts, weights, h, **how)


def norm_route(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    layer: jax.Array,
    *,
    k: int,
    renormalise: bool,
    eps: float,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`decode.norm_route` on a GPU."""
    M = h.shape[0]
    m, parts, _ = partial_logits(h, norm, router, layer, eps=eps, tile=tuning.router, interpret=interpret)
    weights, experts = pl.pallas_call(
        partial(_choose_body, experts=router.shape[2], k=k, renormalise=renormalise, dtype=h.dtype),
        out_shape=(jax.ShapeDtypeStruct((M, k), jnp.float32), jax.ShapeDtypeStruct((M, k), jnp.int32)),
        grid=(M,),
        compiler_params=plt.CompilerParams(num_warps=tuning.router.warps, num_stages=1),
        interpret=interpret,
        name="choose_experts",
    )(parts)
    return m, weights, experts


def partial_logits(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    layer: jax.Array,
    *,
    eps: float,
    tile: Tile,
    interpret: bool,
    counters: int = MMA_ROWS,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Normed rows m [M, D], partial logits [M, parts, E'] float32 with E padded to a power of two, and `counters`
    zeros [counters] int32 (a power of two) for a later kernel: writing them here saves a launch."""
    M, D = h.shape
    E = router.shape[2]
    depth = tile_size(D, tile.depth)
    parts = D // depth
    return pl.pallas_call(
        partial(_logits_body, depth=depth, eps=eps),
        out_shape=(
            jax.ShapeDtypeStruct((M, D), h.dtype),
            jax.ShapeDtypeStruct((M, parts, power_of_two(E)), jnp.float32),
            jax.ShapeDtypeStruct((counters,), jnp.int32),
        ),
        grid=(parts, M),
        compiler_params=plt.CompilerParams(num_warps=tile.warps, num_stages=tile.stages),
        interpret=interpret,
        name="partial_logits",
    )(h, norm, router, layer)


def _logits_body(
    h_ref: Any,
    norm_ref: Any,
    router_ref: Any,
    layer_ref: Any,
    m_ref: Any,
    parts_ref: Any,
    counters_ref: Any,
    *,
    depth: int,
    eps: float,
) -> None:
    D, E = router_ref.shape[1:]
    part, row = pl.program_id(0), pl.program_id(1)
    layer = layer_ref[()]
    own = part * depth + jnp.arange(depth, dtype=jnp.int32)
    ids = jnp.arange(parts_ref.shape[2], dtype=jnp.int32)
    index = grid(layer, own[:, None], ids[None])
    router = plt.load(router_ref.at[index], mask=index[2] < E, other=0.0)
    columns = jnp.arange(power_of_two(D), dtype=jnp.int32)
    wide = plt.load(h_ref.at[grid(row, columns)], mask=columns < D, other=0.0).astype(jnp.float32)
    scale = lax.rsqrt(jnp.sum(wide * wide) / D + eps)
    chunk = pl.ds(part * depth, depth)
    m = h_ref[row, chunk].astype(jnp.float32) * scale * norm_ref[layer, chunk].astype(jnp.float32)
    m = m.astype(h_ref.dtype)
    m_ref[row, chunk] = m
    parts_ref[row, part, :] = jnp.sum(m.astype(jnp.float32)[:, None] * router.astype(jnp.float32), axis=0)

    @pl.when((part == 0) & (row == 0))
    def _() -> None:
        counters_ref[:] = jnp.zeros(counters_ref.shape, jnp.int32)


def _choose_body(
    parts_ref: Any, weights_ref: Any, experts_ref: Any, *, experts: int, k: int, renormalise: bool, dtype: Any
) -> None:
    row = pl.program_id(0)
    weights, rank = ranked(parts_ref[row], experts=experts, k=k, renormalise=renormalise, dtype=dtype)
    index = grid(row, rank)
    plt.store(weights_ref.at[index], weights, mask=rank < k)
    plt.store(experts_ref.at[index], jnp.arange(rank.shape[0], dtype=jnp.int32), mask=rank < k)


def ranked(parts: jax.Array, *, experts: int, k: int, renormalise: bool, dtype: Any) -> tuple[jax.Array, jax.Array]:
    """Router weight and rank (0 is best, ties to the lower expert) of every expert of a row, [E'] each.

    `parts` [parts, E'] are partial logits; their sum is rounded to `dtype`.
    """
    ids = jnp.arange(parts.shape[1], dtype=jnp.int32)
    logits = jnp.sum(parts, axis=0).astype(dtype).astype(jnp.float32)
    logits = jnp.where(ids < experts, logits, -jnp.inf)
    p = jnp.exp(logits - jnp.max(logits))
    p = p / jnp.sum(p)
    before = (p[None] > p[:, None]) | ((p[None] == p[:, None]) & (ids[None] < ids[:, None]))
    rank = jnp.sum(before.astype(jnp.int32), axis=1)
    if renormalise:
        p = p / jnp.sum(jnp.where(rank < k, p, 0.0))
    return p, rank


def expert_swiglu(
    m: jax.Array,
    gate_up: jax.Array,
    layer: jax.Array,
    experts: jax.Array,
    *,
    tuning: Tuning = Tuning(),
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
    dtype = m_ref.dtype
    layer, first = layer_ref[()], pl.program_id(0) * width
    pair = _Pair.load(experts_ref, pl.program_id(1))

    @pl.when(pair.leads)
    def _() -> None:
        def step(i: jax.Array, sums: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            gate, up = sums
            rows = pl.ds(i * depth, depth)
            x = pair.rows(lambda row, _, column: m_ref.at[row, column], i * depth, depth)
            return (
                gate + dot(x, plt.load(gate_up_ref.at[layer, pair.expert, rows, pl.ds(first, width)])),
                up + dot(x, plt.load(gate_up_ref.at[layer, pair.expert, rows, pl.ds(F + first, width)])),
            )

        zero = jnp.zeros((pair.row.shape[0], width), jnp.float32)
        gate, up = lax.fori_loop(0, D // depth, step, (zero, zero))
        pair.store(out_ref, first, swiglu(gate, up, dtype))


def expert_down(
    hidden: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
    *,
    tuning: Tuning = Tuning(),
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

    @pl.when(pair.leads)
    def _() -> None:
        def step(i: jax.Array, total: jax.Array) -> jax.Array:
            x = pair.rows(lambda row, slot, column: hidden_ref.at[row, slot, column], i * depth, depth)
            rows = pl.ds(i * depth, depth)
            return total + dot(x, plt.load(down_ref.at[layer, pair.expert, rows, pl.ds(first, width)]))

        zero = jnp.zeros((pair.row.shape[0], width), jnp.float32)
        product = lax.fori_loop(0, F // depth, step, zero)
        weights = plt.load(weights_ref.at[pair.row, pair.slot], mask=pair.names, other=0.0)
        pair.store(out_ref, first, (product * weights[:, None]).astype(out_ref.dtype))


@dataclass(frozen=True)
class _Pair:
    """A program's (row, expert) pair and all pairs of the same expert: (row[i], slot[i]) where names[i], arrays [R].

    `leads` says whether it is the first of them. It works for all; the others have nothing to do.
    """

    expert: jax.Array
    leads: jax.Array
    row: jax.Array
    slot: jax.Array
    names: jax.Array

    @classmethod
    def load(cls, experts_ref: Any, index: jax.Array) -> "_Pair":
        M, k = experts_ref.shape
        expert = experts_ref[lax.div(index, k), lax.rem(index, k)]
        row = jnp.arange(max(MMA_ROWS, power_of_two(M)), dtype=jnp.int32)
        place = grid(row[:, None], jnp.arange(power_of_two(k), dtype=jnp.int32)[None])
        exists = (place[0] < M) & (place[1] < k)
        same = exists & (plt.load(experts_ref.at[place], mask=exists, other=-1) == expert)
        first = jnp.min(jnp.where(same, place[0] * k + place[1], M * k))
        slot = jnp.max(jnp.where(same, place[1], -1), axis=1)
        return cls(expert, first == index, row, jnp.maximum(slot, 0), slot >= 0)

    def rows(self, at: Callable[..., Any], start: jax.Array, size: int) -> jax.Array:
        """[R, size]: columns from `start` of what `at` (row, slot, column) points to; zero where not `names`."""
        index = grid(self.row[:, None], self.slot[:, None], (start + jnp.arange(size, dtype=jnp.int32))[None])
        return plt.load(at(*index), mask=jnp.broadcast_to(self.names[:, None], index[0].shape), other=0.0)

    def store(self, ref: Any, start: jax.Array, values: jax.Array) -> None:
        """Writes values [R, width] to columns from `start` of ref [M, k, ...] where `names`."""
        column = (start + jnp.arange(values.shape[1], dtype=jnp.int32))[None]
        index = grid(self.row[:, None], self.slot[:, None], column)
        plt.store(ref.at[index], values, mask=jnp.broadcast_to(self.names[:, None], values.shape))


def swiglu(gate: jax.Array, up: jax.Array, dtype: Any) -> jax.Array:
    """silu(gate) * up in float32 of float32 products that are rounded to `dtype` first; rounded to `dtype`."""
    gate, up = gate.astype(dtype).astype(jnp.float32), up.astype(dtype).astype(jnp.float32)
    return (gate * jax.nn.sigmoid(gate) * up).astype(dtype)


def dot(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 product of tiles; float32 operands are not rounded to TF32."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return jnp.dot(a, b, precision=precision, preferred_element_type=jnp.float32)


def compiler_params(tile: Tile, dtype: Any) -> plt.CompilerParams:
    """Triton's parameters. float32 tiles have twice the bytes: half as many in flight fit the shared memory."""
    stages = tile.stages if dtype == jnp.bfloat16 else max(1, tile.stages // 2)
    return plt.CompilerParams(num_warps=tile.warps, num_stages=stages)


def tile_size(n: int, limit: int) -> int:
    """The largest power of two that divides n, at most `limit`."""
    return min(n & -n, limit)


def power_of_two(n: int) -> int:
    """The smallest power of two that is at least n."""
    return 1 << (n - 1).bit_length()


def grid(*indices: Any) -> tuple[jax.Array, ...]:
    """Index arrays of one shape: interpret mode does not mix arrays and slices."""
    return tuple(jnp.broadcast_arrays(*(jnp.asarray(i, jnp.int32) for i in indices)))
