"""decode_inputs in plain jnp: the specification and the fallback."""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from kernels_pallas.common import einsum_f32
from kernels_pallas.decode_inputs.types import Caches, DecodeInputs, Tables, Weights

E4M3_MAX = 448.0


def decode_inputs(
    h: jax.Array, weights: Weights, tables: Tables, caches: Caches, layer: jax.Array, slots: jax.Array, eps: float
) -> DecodeInputs:
    """See `kernels_pallas.decode_inputs.decode_inputs`."""
    w = Weights(*(array[layer] for array in weights))
    a = rms_norm(h, w.norm, eps)
    q, k, v, idx_q, idx_k, gate = (project(a, matrix) for matrix in w.projections)
    q = rotate(rms_norm(q, w.q_norm, eps), tables.cos, tables.sin)
    k = rotate(rms_norm(k, w.k_norm, eps), tables.cos, tables.sin)
    idx_q = hadamard(rotate(rms_norm(idx_q, w.idx_q_norm, eps), tables.idx_cos, tables.idx_sin))
    idx_k = layer_norm(idx_k, w.idx_k_norm, w.idx_k_norm_bias, eps)
    idx_k = hadamard(rotate(idx_k[:, None], tables.idx_cos, tables.idx_sin))[:, 0]
    idx_weights = gate.astype(jnp.float32) * idx_q.shape[-1] ** -0.5
    scale = None
    if caches.idx_scale is None:
        idx_q, idx_k = idx_q.astype(caches.idx_k.dtype), idx_k.astype(caches.idx_k.dtype)
    else:
        idx_q, q_scale = quantise(idx_q)
        idx_k, scale = quantise(idx_k)
        idx_weights = idx_weights * q_scale
    rows = jnp.arange(slots.shape[0])

    def append(cache: jax.Array, new: jax.Array) -> jax.Array:
        return cache.at[layer, rows, slots].set(new, mode="drop", unique_indices=True)

    kv = append(caches.kv, jnp.stack([k, v], axis=1))
    idx_scale = None if caches.idx_scale is None or scale is None else append(caches.idx_scale, scale)
    return DecodeInputs(q, idx_q, idx_weights, Caches(kv, append(caches.idx_k, idx_k), idx_scale))


def project(a: jax.Array, matrix: jax.Array) -> jax.Array:
    """[B, D] times [D, ...N]: float32 sums, rounded once to the dtype of a."""
    flat = einsum_f32("bd,dn->bn", a, matrix.reshape(a.shape[1], -1))
    return flat.astype(a.dtype).reshape(a.shape[0], *matrix.shape[1:])


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


def hadamard(x: jax.Array) -> jax.Array:
    """x times the orthonormal Sylvester matrix H[i, j] = (-1) ** popcount(i & j) / sqrt(I); dtype of x."""
    width = x.shape[-1]
    index = np.arange(width)
    signs = 1.0 - 2.0 * (np.bitwise_count(index[:, None] & index) % 2)
    y = einsum_f32("...i,ij->...j", x.astype(jnp.float32), jnp.asarray(signs, jnp.float32))
    return (y * width**-0.5).astype(x.dtype)


def quantise(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Vectors [..., I] as float8_e4m3fn with a power-of-two scale each: 2 ** ceil(log2(max(amax, 1e-4) / 448))."""
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
