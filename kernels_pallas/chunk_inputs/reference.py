"""chunk_inputs in plain jnp: the specification and the fallback."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kernels_pallas.chunk_inputs.types import ChunkInputs
from kernels_pallas.common import einsum_f32, scatter_slots, write_slots
from kernels_pallas.decode_inputs.types import Caches, Tables, Weights
from kernels_pallas.numerics import hadamard, layer_norm, quantise, rms_norm, rotate
from kernels_pallas.quantized import Weights as Matrix
from kernels_pallas.quantized import scaled, values_of


class IndexInputs(NamedTuple):
    """What `select_bits` and `select_ids` score with, and what the cache keeps of this chunk's keys."""

    q: jax.Array  # [B, C, J, I] in the indexer's dtype
    weights: jax.Array  # [B, C, J] float32: gate * query scale * I ** -0.5
    k: jax.Array  # [B, C, I] in the indexer's dtype
    k_scale: jax.Array | None  # [B, C] float32; None unless quantised


def chunk_inputs(
    h: jax.Array,
    weights: Weights,
    tables: Tables,
    caches: Caches,
    layer: jax.Array,
    start: jax.Array,
    valid: jax.Array,
    eps: float,
) -> ChunkInputs:
    """See `kernels_pallas.chunk_inputs.chunk_inputs`."""
    w: Weights = jax.tree.map(lambda array: array[layer], weights)
    a = rms_norm(h, w.norm, eps)
    q = rms_norm(project("bcd,dhk->bchk", a, w.q), w.q_norm, eps)
    k = rms_norm(project("bcd,dgk->bcgk", a, w.k), w.k_norm, eps)
    v = project("bcd,dgk->bcgk", a, w.v)
    q, k = rotate(q, tables.cos, tables.sin), rotate(k, tables.cos, tables.sin)
    norms = (w.idx_q_norm, w.idx_k_norm, w.idx_k_norm_bias)
    turn = (tables.idx_cos, tables.idx_sin)
    index = index_inputs(a, w.idx_q, w.idx_k, w.gate, norms, turn, caches.idx_k.dtype, eps)
    return ChunkInputs(q, index.q, index.weights, append(caches, layer, start, valid, k, v, index))


def index_inputs(
    a: jax.Array,
    q: jax.Array,
    k: jax.Array,
    gate: jax.Array,
    norms: tuple[jax.Array, jax.Array, jax.Array],
    turn: tuple[jax.Array, jax.Array],
    dtype: Any,
    eps: float,
) -> IndexInputs:
    """Index queries, weights and keys of a chunk. Order matters: norm, rotary embedding, Hadamard transform,
    quantisation.

    Args:
        a: [B, C, D] the normed input of the attention block.
        q, k, gate: one layer's matrices [D, J, I], [D, I], [D, J].
        norms: of queries, of keys, and its bias; [I] each.
        turn: rotary tables [B, C, I // 2].
        dtype: the indexer's; float8_e4m3fn is quantised to.
    """
    query = rms_norm(project("bcd,dji->bcji", a, q), norms[0], eps)
    key = layer_norm(project("bcd,di->bci", a, k), norms[1], norms[2], eps)
    gates = project("bcd,dj->bcj", a, gate)
    query = hadamard(rotate(query, *turn))
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


def project(subscripts: str, x: jax.Array, weight: Matrix) -> jax.Array:
    """Einsum of activations and a weight in float32, scaled if the weight is, rounded once to the dtype of x."""
    return scaled(einsum_f32(subscripts, x, values_of(weight, x.dtype)), weight).astype(x.dtype)
