"""Arithmetic that kernels share with the model around them: norms, rotary embedding, the choice of experts, the
indexer's transform and quantisation. Norms compute in float32 and round once."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.common import einsum_f32

E4M3_MAX = 448.0


def rms_norm(x: jax.Array, weight: jax.Array, eps: float) -> jax.Array:
    """x * rsqrt(mean(x^2) + eps) * weight over the last axis, in float32; dtype of x."""
    wide = x.astype(jnp.float32)
    scale = lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + eps)
    return (wide * scale * weight.astype(jnp.float32)).astype(x.dtype)


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, in float32; dtype of x."""
    wide = x.astype(jnp.float32)
    centred = wide - jnp.mean(wide, axis=-1, keepdims=True)
    scale = lax.rsqrt(jnp.mean(centred * centred, axis=-1, keepdims=True) + eps)
    return (centred * scale * weight.astype(jnp.float32) + bias.astype(jnp.float32)).astype(x.dtype)


def rotate(x: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotates pairs (i, i + K/2) of x [..., heads, K] by tables [..., K/2], in the tables' dtype; dtype of x."""
    half = x.shape[-1] // 2
    wide = x.astype(cos.dtype)
    low, high = wide[..., :half], wide[..., half:]
    cos, sin = cos[..., None, :], sin[..., None, :]
    return jnp.concatenate([low * cos - high * sin, high * cos + low * sin], axis=-1).astype(x.dtype)


def choose_experts(logits: jax.Array, k: int, renormalise: bool) -> tuple[jax.Array, jax.Array]:
    """Weights [N, k] float32 and ids [N, k] int32 of the k most probable experts for router logits [N, E], best first,
    ties to the lower id. Softmax in float32; with `renormalise` the weights of a row sum to 1."""
    probabilities = jax.nn.softmax(logits.astype(jnp.float32), axis=-1)
    weights, experts = lax.top_k(probabilities, k)
    if renormalise:
        weights = weights / jnp.sum(weights, axis=-1, keepdims=True)
    return weights, experts


def hadamard(x: jax.Array) -> jax.Array:
    """x times the orthonormal Sylvester matrix H[i, j] = (-1) ** popcount(i & j) / sqrt(I); dtype of x."""
    width = x.shape[-1]
    index = np.arange(width)
    signs = 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)
    y = einsum_f32("...i,ij->...j", x.astype(jnp.float32), jnp.asarray(signs, jnp.float32))
    return (y * width**-0.5).astype(x.dtype)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Quantises vectors to float8_e4m3fn with a power-of-two scale each ("ue8m0").

    Args:
        x: [..., I]; the last axis is one block.

    Returns:
        float8_e4m3fn [..., I] and float32 scales [...]: 2 ** ceil(log2(max(amax, 1e-4) / 448)).
    """
    x = x.astype(jnp.float32)
    scale, inverse = power_of_two_scale(jnp.max(jnp.abs(x), axis=-1))
    return round_e4m3(x * inverse[..., None]).astype(jnp.float8_e4m3fn), scale


def power_of_two_scale(amax: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The scale of vectors whose largest magnitude is `amax`, and its inverse; float32."""
    # 448 = 1.75 * 2**8, so the exponent follows from amax's own bits: exact, where log2 would round.
    bits = lax.bitcast_convert_type(jnp.maximum(amax, 1e-4), jnp.int32)
    exponent = (bits >> 23) - 127 - 8 + ((bits & 0x7FFFFF) > 0x600000).astype(jnp.int32)
    scale = lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
    return scale, lax.bitcast_convert_type((127 - exponent) << 23, jnp.float32)


def round_e4m3(x: jax.Array) -> jax.Array:
    """Nearest e4m3 value of each float32, ties to even, saturating at 448; stays float32.

    Written out because platforms convert to float8 through different intermediate types and then round twice.
    """
    bits = lax.bitcast_convert_type(jnp.clip(x, -E4M3_MAX, E4M3_MAX), jnp.int32)
    sign, magnitude = bits & jnp.int32(-(1 << 31)), bits & 0x7FFFFFFF
    normal = (magnitude + 0x7FFFF + ((magnitude >> 20) & 1)) & ~0xFFFFF
    # Below 2**-6 e4m3 is subnormal: multiples of 2**-9.
    steps = lax.bitcast_convert_type(magnitude, jnp.float32) * 512.0
    whole = steps.astype(jnp.int32)
    rest = steps - whole.astype(jnp.float32)
    up = (rest > 0.5) | ((rest == 0.5) & (whole & 1 == 1))
    multiple = (whole + up.astype(jnp.int32)).astype(jnp.float32) / 512.0
    subnormal = lax.bitcast_convert_type(multiple, jnp.int32)
    return lax.bitcast_convert_type(sign | jnp.where(steps < 8.0, subnormal, normal), jnp.float32)
