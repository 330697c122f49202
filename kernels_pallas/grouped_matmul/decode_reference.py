"""The decode kernels in plain jnp: the specification and the fallback. Arguments as in `decode`'s public functions."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import einsum_f32
from kernels_pallas.grouped_matmul.reference import grouped_matmul, grouped_swiglu
from kernels_pallas.numerics import choose_experts, rms_norm
from kernels_pallas.quantized import Weights


def norm_route(
    h: jax.Array, norm: jax.Array, router: jax.Array, layer: jax.Array, *, k: int, renormalise: bool, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels_pallas.grouped_matmul.norm_route`."""
    m = rms_norm(h, norm[layer], eps)
    logits = einsum_f32("md,de->me", m, router[layer]).astype(h.dtype)
    return m, *choose_experts(logits, k, renormalise)


def expert_swiglu(m: jax.Array, gate_up: Weights, layer: jax.Array, experts: jax.Array) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.expert_swiglu`."""
    M, k = experts.shape
    order, sizes = _by_expert(experts, gate_up.shape[1])
    hidden = _restore(grouped_swiglu(m[order // k], gate_up, layer, sizes), order).reshape(M, k, -1)
    return jnp.where(experts[..., None] < 0, 0, hidden)


def expert_down(
    hidden: jax.Array,
    down: Weights,
    layer: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.expert_down`."""
    M, k, F = hidden.shape
    order, sizes = _by_expert(experts, down.shape[1])
    in_order = hidden.reshape(M * k, F)[order]
    weighted = grouped_matmul(in_order, down, layer, sizes, residual.dtype, weights.reshape(M * k)[order])
    rows = jnp.where(experts[..., None] < 0, 0, _restore(weighted, order).reshape(M, k, -1))
    return residual + jnp.sum(rows, axis=1, dtype=jnp.float32).astype(residual.dtype)


def experts_add(
    m: jax.Array,
    gate_up: Weights,
    down: Weights,
    layer: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.experts_add`."""
    return expert_down(expert_swiglu(m, gate_up, layer, experts), down, layer, experts, weights, residual)


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
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.moe_step`."""
    m, weights, experts = norm_route(h, norm, router, layer, k=k, renormalise=renormalise, eps=eps)
    return experts_add(m, gate_up, down, layer, experts, weights, h)


def _by_expert(experts: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The order that sorts [M, k] (row, expert) pairs by expert, none last, and the pairs of each expert."""
    flat = jnp.where(experts < 0, count, experts).reshape(-1)
    # Stable: rows of one expert stay in token order, so results do not depend on the platform's sort.
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=count + 1)[:count].astype(jnp.int32)


def _restore(rows: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
