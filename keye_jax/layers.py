"""Norms and dense layers. Norms compute in float32 and round once; products accumulate in float32 and round once."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax.ops import einsum_f32


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis; dtype of x."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis; dtype of x."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * scale * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def project(subscripts: str, x: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Einsum of activations and a weight, plus bias, in float32, rounded once to the dtype of x."""
    y = einsum_f32(subscripts, x, weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def linear(x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    """x [N, in] times params["weight"] [in, out] plus params["bias"] [out]."""
    return project("ni,io->no", x, params["weight"], params["bias"])
