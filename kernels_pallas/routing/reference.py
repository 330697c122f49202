"""The router's choice and the order of its pairs in plain jnp: the specification and the fallback."""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import einsum_f32
from kernels_pallas.numerics import choose_experts as choose_experts

COUNTED = 128
"""Tokens per block of the counting sort: below 256, so that bfloat16 operands and any accumulation are exact."""


def place(experts: jax.Array, weights: jax.Array, E: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """See `kernels_pallas.routing.place`."""
    # The barrier keeps XLA from working out the positions again for each element that it gathers by them.
    positions, sizes = lax.optimization_barrier(_positions(experts, E))
    scattered = jnp.zeros(experts.size).at[positions].set(weights, mode="promise_in_bounds", unique_indices=True)
    return positions, sizes, scattered


def _positions(experts: jax.Array, E: int) -> tuple[jax.Array, jax.Array]:
    """Positions [N, k] and sizes [E]."""
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
