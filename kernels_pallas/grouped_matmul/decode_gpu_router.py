"""The router of a decode step on a GPU, in two launches.

Every program norms the row, multiplies its rows of the router and leaves float32 partial logits; a second launch adds
them, and ranks each probability by counting those before it.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.grouped_matmul.decode_gpu_tiles import (
    FLOATS,
    MAX_ROWS,
    MMA_ROWS,
    TUNING,
    Tile,
    Tuning,
    grid,
    power_of_two,
    tile_size,
)


def supports(h: jax.Array, router: jax.Array) -> bool:
    """Whether the kernels take rows h [M, D] and routers [L, D, E]."""
    return h.shape[0] <= MAX_ROWS and h.dtype in FLOATS and router.dtype == h.dtype and h.shape[1] % MMA_ROWS == 0


def norm_route(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    layer: jax.Array,
    *,
    k: int,
    renormalise: bool,
    eps: float,
    tuning: Tuning = TUNING,
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
