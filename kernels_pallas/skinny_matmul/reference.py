"""skinny_matmul in plain jnp: the specification and the fallback."""

import jax

from kernels_pallas.common import einsum_f32


def project_add(x: jax.Array, w: jax.Array, layer: jax.Array | int, residual: jax.Array) -> jax.Array:
    """See `kernels_pallas.skinny_matmul.project_add`."""
    M, N = residual.shape
    product = einsum_f32("md,dn->mn", x.reshape(M, -1), w[layer].reshape(-1, N))
    return residual + product.astype(residual.dtype)
