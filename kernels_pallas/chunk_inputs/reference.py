"""chunk_inputs in plain jnp: the specification and the fallback."""

from typing import Any

import jax

from kernels_pallas.chunk_inputs.types import ChunkInputs
from kernels_pallas.common import einsum_f32
from kernels_pallas.decode_inputs.reference import IndexInputs, append, index_vectors
from kernels_pallas.decode_inputs.types import Caches, Tables, Weights
from kernels_pallas.numerics import rms_norm, rotate
from kernels_pallas.quantized import Weights as Matrix
from kernels_pallas.quantized import scaled, values_of


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
    """Index queries, weights and keys of a chunk.

    Args:
        a: [B, C, D] the normed input of the attention block.
        q, k, gate: one layer's matrices [D, J, I], [D, I], [D, J].
        norms: of queries, of keys, and its bias; [I] each.
        turn: rotary tables [B, C, I // 2].
        dtype: the indexer's; float8_e4m3fn is quantised to.
    """
    query, key, gates = project("bcd,dji->bcji", a, q), project("bcd,di->bci", a, k), project("bcd,dj->bcj", a, gate)
    return index_vectors(query, key, gates, norms, turn, dtype, eps)


def project(subscripts: str, x: jax.Array, weight: Matrix) -> jax.Array:
    """Einsum of activations and a weight in float32, scaled if the weight is, rounded once to the dtype of x."""
    return scaled(einsum_f32(subscripts, x, values_of(weight, x.dtype)), weight).astype(x.dtype)
