"""Mixture of experts: float32 softmax router, top-k, renormalised weights, SwiGLU experts."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax.config import TextConfig
from keye_jax.layers import project
from keye_jax.ops import Quantized, choose_experts, einsum_f32, grouped_matmul, grouped_swiglu, spread_rows
from keye_jax.parallel import ALONE, Axis

COUNTED = 128
"""Tokens per block of the counting sort: below 256, so that bfloat16 operands and any accumulation are exact."""


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
    N, _ = m.shape
    weights, experts = route(params["router"], m, config)
    k, axis = config.num_experts_per_tok, axis.over(config.num_experts)
    count = config.num_experts // axis.size
    own, mine = owned(experts, count, axis)
    # Other devices' pairs come last, as a group that is not multiplied.
    groups = count if axis.size == 1 else count + 1
    # The barrier keeps XLA from working out the positions again for each element that it gathers by them.
    positions, sizes = lax.optimization_barrier(place(own, groups))
    sizes = sizes[:count]
    rows = spread_rows(m, positions)
    hidden = grouped_swiglu(rows, stacks["gate_up_proj"], layer, sizes)
    row_weights = jnp.zeros(N * k).at[positions].set(weights, mode="promise_in_bounds", unique_indices=True)
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


def place(experts: jax.Array, E: int) -> tuple[jax.Array, jax.Array]:
    """Where each (token, expert) pair goes when pairs are sorted by expert, those of one expert in token order.

    A counting sort: a pair comes after all pairs of lower experts and after its own expert's pairs of earlier tokens.

    Args:
        experts: [N, k] int32; the experts of one token differ.
        E: how many experts there are.

    Returns:
        positions [N, k] int32, every number below N * k once, and the experts' pair counts [E] int32.
    """
    N, _ = experts.shape
    blocks = -(-N // COUNTED)
    chosen = jnp.any(experts[:, :, None] == jnp.arange(E), axis=1)
    chosen = jnp.pad(chosen, ((0, blocks * COUNTED - N), (0, 0))).reshape(blocks, COUNTED, E).astype(jnp.bfloat16)
    # Counts within a block of tokens as a product of zeros and ones: exact, and much faster than a cumulative sum.
    earlier = jnp.tril(jnp.ones((COUNTED, COUNTED), jnp.bfloat16), -1)
    in_block = einsum_f32("tu,bue->bte", earlier, chosen).astype(jnp.int32)
    per_block = jnp.sum(chosen, axis=1, dtype=jnp.float32).astype(jnp.int32)
    sizes = jnp.sum(per_block, axis=0)
    first = (jnp.cumsum(per_block, axis=0) - per_block) + (jnp.cumsum(sizes) - sizes)
    slots = (in_block + first[:, None]).reshape(blocks * COUNTED, E)[:N]
    return jnp.take_along_axis(slots, experts, axis=1), sizes
