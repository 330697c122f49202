"""skinny_matmul in plain jnp: the specification and the fallback."""

import jax

from kernels_pallas.common import einsum_f32
from kernels_pallas.quantized import Weights, pick, scaled, values_of


def project_add(x: jax.Array, w: Weights, layer: jax.Array | int, residual: jax.Array) -> jax.Array:
    """See `kernels_pallas.skinny_matmul.project_add`."""
    M, N = residual.shape
    own = pick(w, layer)
    product = scaled(einsum_f32("md,dn->mn", x.reshape(M, -1), values_of(own, x.dtype).reshape(-1, N)), own)
    return residual + product.astype(residual.dtype)
