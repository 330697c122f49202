"""Mixture of experts: float32 softmax router, top-k, renormalised weights, SwiGLU experts."""

from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.config import TextConfig
from keye_jax.layers import project
from keye_jax.ops import Quantized, choose_experts, grouped_matmul, grouped_swiglu, place, spread_rows
from keye_jax.parallel import ALONE, Axis


def route(router: jax.Array, m: jax.Array, config: TextConfig) -> tuple[jax.Array, jax.Array]:
    """Chooses experts. Ties go to the lower expert.

    Args:
        router: [D, E].
        m: [N, D].

    Returns:
        weights [N, k] float32 and experts [N, k] int32, best first.
    """
    logits = project("nd,de->ne", m, router)
    return choose_experts(logits, config.num_experts_per_tok, config.norm_topk_prob)


def moe(
    params: dict[str, Any],
    stacks: dict[str, jax.Array | Quantized],
    layer: jax.Array | int,
    m: jax.Array,
    config: TextConfig,
    axis: Axis = ALONE,
) -> jax.Array:
    """The layer's output for m [N, D].

    Args:
        params: this layer's "router".
        stacks: "gate_up_proj" [L, E, D, 2F] and "down_proj" [L, E, F, D] of all layers.
        layer: which layer.
        axis: what the experts are spread over, if they divide: each device multiplies the rows of its own.
    """
    weights, experts = route(params["router"], m, config)
    axis = axis.over(config.num_experts)
    count = config.num_experts // axis.size
    own, mine = owned(experts, count, axis)
    # Other devices' pairs come last, as a group that is not multiplied.
    groups = count if axis.size == 1 else count + 1
    positions, sizes, row_weights = place(own, weights, groups)
    sizes = sizes[:count]
    rows = spread_rows(m, positions)
    hidden = grouped_swiglu(rows, stacks["gate_up_proj"], layer, sizes)
    # The router weight multiplies the float32 product; each expert's row is rounded, then the k rows are summed.
    out = grouped_matmul(hidden, stacks["down_proj"], layer, sizes, m.dtype, row_weights)
    rows = out[positions]
    if axis.size > 1:
        rows = jnp.where(mine[..., None], rows, 0)
    return axis.sum(jnp.sum(rows, axis=1, dtype=jnp.float32)).astype(m.dtype)


def owned(experts: jax.Array, count: int, axis: Axis) -> tuple[jax.Array, jax.Array]:
    """Experts [...] int32 of all devices → their numbers on this one, `count` where another device has them, and which
    are its own [...] bool.

    Args:
        count: experts a device.
    """
    own = experts - axis.index() * count
    mine = (own >= 0) & (own < count)
    return jnp.where(mine, own, count), mine
