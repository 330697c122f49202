"""fused_linear in plain jnp: the specification and the fallback."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import einsum_f32


def fused_linear(x: jax.Array, weight: jax.Array, bias: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    """See `kernels_pallas.fused_linear.fused_linear`."""
    y = (einsum_f32("mk,kn->mn", x, weight) + bias.astype(jnp.float32)).astype(x.dtype)
    return y if residual is None else residual + y


def gelu_mlp(
    x: jax.Array, fc1: tuple[jax.Array, jax.Array], fc2: tuple[jax.Array, jax.Array], residual: jax.Array
) -> jax.Array:
    """See `kernels_pallas.fused_linear.gelu_mlp`."""
    hidden = jax.nn.gelu(fused_linear(x, *fc1).astype(jnp.float32), approximate=True).astype(x.dtype)
    return fused_linear(hidden, *fc2, residual)
