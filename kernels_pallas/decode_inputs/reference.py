"""decode_inputs in plain jnp: the specification and the fallback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.common import einsum_f32, scatter_slots, write_slots
from kernels_pallas.decode_inputs.types import Caches, DecodeInputs, Tables, Weights
from kernels_pallas.numerics import hadamard, layer_norm, quantise, rms_norm, rotate
from kernels_pallas.quantized import Weights as Matrix
from kernels_pallas.quantized import scaled, values_of


class IndexInputs(NamedTuple):
    """What `select_bits` and `select_ids` score with, and what the cache keeps of these keys."""

    q: jax.Array  # [..., J, I] in the indexer's dtype
    weights: jax.Array  # [..., J] float32: gate * query scale * I ** -0.5
    k: jax.Array  # [..., I] in the indexer's dtype
    k_scale: jax.Array | None  # [...] float32; None unless quantised


def decode_inputs(
    h: jax.Array, weights: Weights, tables: Tables, caches: Caches, layer: jax.Array, slots: jax.Array, eps: float
) -> DecodeInputs:
    """See `kernels_pallas.decode_inputs.decode_inputs`."""
    w: Weights = jax.tree.map(lambda array: array[layer], weights)
    a = rms_norm(h, w.norm, eps)
    q, k, v, idx_q, idx_k, gate = (project(a, matrix) for matrix in w.projections)
    q = rotate(rms_norm(q, w.q_norm, eps), tables.cos, tables.sin)
    k = rotate(rms_norm(k, w.k_norm, eps), tables.cos, tables.sin)
    norms = (w.idx_q_norm, w.idx_k_norm, w.idx_k_norm_bias)
    index = index_vectors(idx_q, idx_k, gate, norms, (tables.idx_cos, tables.idx_sin), caches.idx_k.dtype, eps)
    # A chunk of one token a row.
    k, v, chunk = jax.tree.map(lambda x: x[:, None], (k, v, index))
    return DecodeInputs(q, index.q, index.weights, append(caches, layer, slots, jnp.ones_like(slots), k, v, chunk))


def index_vectors(
    query: jax.Array,
    key: jax.Array,
    gates: jax.Array,
    norms: tuple[jax.Array, jax.Array, jax.Array],
    turn: tuple[jax.Array, jax.Array],
    dtype: Any,
    eps: float,
) -> IndexInputs:
    """What the indexer makes of its projections. Order matters: norm, rotary embedding, Hadamard transform,
    quantisation.

    Args:
        query, key, gates: [..., J, I], [..., I], [..., J].
        norms: of queries, of keys, and its bias; [I] each.
        turn: rotary tables [..., I // 2].
        dtype: the indexer's; float8_e4m3fn is quantised to.
    """
    query = hadamard(rotate(rms_norm(query, norms[0], eps), *turn))
    key = layer_norm(key, norms[1], norms[2], eps)
    key = hadamard(rotate(key[..., None, :], *turn))[..., 0, :]
    weights = gates.astype(jnp.float32) * query.shape[-1] ** -0.5
    if dtype != jnp.float8_e4m3fn:
        return IndexInputs(query.astype(dtype), weights, key.astype(dtype), None)
    query, query_scale = quantise(query)
    key, key_scale = quantise(key)
    return IndexInputs(query, weights * query_scale, key, key_scale)


def append(
    caches: Caches,
    layer: jax.Array,
    start: jax.Array,
    valid: jax.Array,
    k: jax.Array,
    v: jax.Array,
    index: IndexInputs,
) -> Caches:
    """Writes one layer's rows of a chunk.

    Args:
        start, valid: [B] int32, as in `write_slots`.
        k, v: [B, C, G, K].
        index: the chunk's index keys.
    """
    idx_k = write_slots(caches.idx_k, index.k, layer, start, valid)
    scale = caches.idx_scale
    if scale is not None and index.k_scale is not None:
        scale = write_slots(scale, index.k_scale, layer, start, valid)
    kv = scatter_slots(caches.kv, jnp.stack([k, v], axis=2), layer, start, valid)
    return Caches(kv, idx_k, scale)


def project(a: jax.Array, matrix: Matrix) -> jax.Array:
    """[B, D] times [D, ...N]: float32 sums, scaled if the matrix is, rounded once to the dtype of a.

    N stays several axes: to flatten them XLA's TPU backend changes the layout of each layer's matrix, which for one row
    moves three times the bytes (query and output projections of eight layers on v5e, by its own count, 806 MB instead
    of 269 in bfloat16 and 739 instead of 202 in int8).
    """
    return scaled(einsum_f32("bd,d...->b...", a, values_of(matrix, a.dtype)), matrix).astype(a.dtype)
