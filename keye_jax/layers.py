"""Dense layers: products accumulate in float32 and round once."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from keye_jax.ops import einsum_f32


def project(subscripts: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Einsum of activations and a weight, plus bias, in float32, rounded once to the dtype of x."""
    y = einsum_f32(subscripts, x, weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def linear(x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    """x [N, in] times params["weight"] [in, out] plus params["bias"] [out]."""
    return project("ni,io->no", x, params["weight"], params["bias"])
