"""decode_inputs in plain jnp: the specification and the fallback."""

import jax
import jax.numpy as jnp

from kernels_pallas.common import einsum_f32, scatter_slots, write_slots
from kernels_pallas.decode_inputs.types import Caches, DecodeInputs, Tables, Weights
from kernels_pallas.numerics import hadamard, layer_norm, quantise, rms_norm, rotate
from kernels_pallas.quantized import Weights as Matrix
from kernels_pallas.quantized import scaled, values_of


def decode_inputs(
    h: jax.Array, weights: Weights, tables: Tables, caches: Caches, layer: jax.Array, slots: jax.Array, eps: float
) -> DecodeInputs:
    """See `kernels_pallas.decode_inputs.decode_inputs`."""
    w: Weights = jax.tree.map(lambda array: array[layer], weights)
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

    def append(cache: jax.Array, new: jax.Array) -> jax.Array:
        return write_slots(cache, new[:, None], layer, slots, jnp.ones_like(slots))

    kv = scatter_slots(caches.kv, jnp.stack([k, v], axis=1)[:, None], layer, slots, jnp.ones_like(slots))
    idx_scale = None if caches.idx_scale is None or scale is None else append(caches.idx_scale, scale)
    return DecodeInputs(q, idx_q, idx_weights, Caches(kv, append(caches.idx_k, idx_k), idx_scale))


def project(a: jax.Array, matrix: Matrix) -> jax.Array:
    """[B, D] times [D, ...N]: float32 sums, scaled if the matrix is, rounded once to the dtype of a.

    N stays several axes: to flatten them XLA's TPU backend changes the layout of each layer's matrix, which for one row
    moves three times the bytes (query and output projections of eight layers on v5e, by its own count, 806 MB instead
    of 269 in bfloat16 and 739 instead of 202 in int8).
    """
    return scaled(einsum_f32("bd,d...->b...", a, values_of(matrix, a.dtype)), matrix).astype(a.dtype)
