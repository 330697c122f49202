"""Mixture of experts: float32 softmax router, top-k, renormalised weights, SwiGLU experts."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax.config import TextConfig
from keye_jax.layers import project
from keye_jax.ops import grouped_matmul


def route(router: jax.Array, m: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """Chooses experts. Ties go to the lower expert.

    Args:
        router: [D, E].
        m: [N, D].

    Returns:
        weights [N, k] float32 and experts [N, k] int32, best first.
    """
    logits = project("nd,de->ne", m, router)
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(probabilities, config.num_experts_per_tok)
    if config.norm_topk_prob:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


def moe(
    params: dict[str, Any],
    stacks: dict[str, jax.Array],
    layer: jax.Array | int,
    m: jax.Array,
    config: TextConfig,
) -> jax.Array:
    """The layer's output for m [N, D].

    Args:
        params: this layer's "router".
        stacks: "gate_up_proj" [L, E, D, 2F] and "down_proj" [L, E, F, D] of all layers.
        layer: which layer.
    """
    N, D = m.shape
    weights, experts = route(params["router"], m, config)
    k = config.num_experts_per_tok
    flat = experts.reshape(N * k)
    # Stable: rows of one expert stay in token order, so results do not depend on the platform's sort.
    order = jnp.argsort(flat, stable=True)
    sizes = jnp.bincount(flat, length=config.num_experts).astype(jnp.int32)
    rows = m[order // k]
    gate_up = grouped_matmul(rows, stacks["gate_up_proj"], layer, sizes, m.dtype)
    hidden = swiglu(gate_up)
    out = grouped_matmul(hidden, stacks["down_proj"], layer, sizes, jnp.float32)
    # The router weight multiplies the float32 product; each expert's row is rounded, then the k rows are summed.
    out = (out * weights.reshape(N * k)[order, None]).astype(m.dtype)
    restored = jnp.zeros_like(out).at[order].set(out, unique_indices=True).reshape(N, k, D)
    return jnp.sum(restored, axis=1, dtype=jnp.float32).astype(m.dtype)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """silu(gate) * up for [N, 2F] with gate in the first half; computed in float32, rounded once."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
