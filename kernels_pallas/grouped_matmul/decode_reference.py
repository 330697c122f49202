"""The decode kernels in plain jnp: the specification and the fallback. Arguments as in `decode`'s public functions."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import einsum_f32
from kernels_pallas.grouped_matmul.reference import grouped_matmul
from kernels_pallas.numerics import rms_norm


def norm_route(
    h: jax.Array, norm: jax.Array, router: jax.Array, layer: jax.Array, *, k: int, renormalise: bool, eps: float
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels_pallas.grouped_matmul.norm_route`."""
    m = rms_norm(h, norm[layer], eps)
    logits = einsum_f32("md,de->me", m, router[layer]).astype(h.dtype)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(probabilities, k)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return m, weights, experts


def expert_swiglu(m: jax.Array, gate_up: jax.Array, layer: jax.Array, experts: jax.Array) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.expert_swiglu`."""
    M, k = experts.shape
    order, sizes = _by_expert(experts, gate_up.shape[1])
    product = grouped_matmul(m[order // k], gate_up, layer, sizes, m.dtype)
    gate, up = jnp.split(product.astype(jnp.float32), 2, axis=-1)
    return _restore((jax.nn.silu(gate) * up).astype(m.dtype), order).reshape(M, k, -1)


def expert_down(
    hidden: jax.Array,
    down: jax.Array,
    layer: jax.Array,
    experts: jax.Array,
    weights: jax.Array,
    residual: jax.Array,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.expert_down`."""
    M, k, F = hidden.shape
    order, sizes = _by_expert(experts, down.shape[1])
    product = grouped_matmul(hidden.reshape(M * k, F)[order], down, layer, sizes, jnp.float32)
    weighted = (product * weights.reshape(M * k)[order, None]).astype(residual.dtype)
    rows = _restore(weighted, order).reshape(M, k, -1)
    return residual + jnp.sum(rows, axis=1, dtype=jnp.float32).astype(residual.dtype)


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
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.moe_step`."""
    m, weights, experts = norm_route(h, norm, router, layer, k=k, renormalise=renormalise, eps=eps)
    return expert_down(expert_swiglu(m, gate_up, layer, experts), down, layer, experts, weights, h)


def _by_expert(experts: jax.Array, count: int) -> tuple[jax.Array, jax.Array]:
    """The order that sorts [M, k] (row, expert) pairs by expert, and the pairs of each expert."""
    flat = experts.reshape(-1)
    # Stable: rows of one expert stay in token order, so results do not depend on the platform's sort.
    return jnp.argsort(flat, stable=True), jnp.bincount(flat, length=count).astype(jnp.int32)


def _restore(rows: jax.Array, order: jax.Array) -> jax.Array:
    return jnp.zeros_like(rows).at[order].set(rows, unique_indices=True)
