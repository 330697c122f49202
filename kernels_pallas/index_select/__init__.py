"""Lightning-indexer scores and exact causal top-k: bits for a chunk of queries, ids for a decode step.

Index score of key s for query t (DeepSeek-V3.2; scale factors folded into `weights` by the caller):

    I[t, s] = key_scale[s] * sum_j weights[t, j] * max(0, idx_q[t, j] . idx_k[s])

A query at sequence index t sees keys 0..t and selects the min(t + 1, topk) of largest score; ties go to the lower
key index. The same set leaves every backend, for any chunking or batching.
"""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.common import WORD
from kernels_pallas.dispatch import dispatch
from kernels_pallas.index_select import gpu_bits, gpu_ids, reference, tpu_bits, tpu_ids


def select_bits(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
) -> jax.Array:
    """Selected keys of a chunk of consecutive queries, one bit a key.

    Args:
        idx_q: [B, C, J, I] index queries; float8_e4m3fn, bfloat16 or float32.
        weights: [B, C, J] float32, gate times the query's scales.
        idx_k: [L, B, S, I] index-key cache of all layers, same dtype; S a multiple of 32.
        key_scale: [L, B, S] float32 powers of two, or None where keys are not quantised.
        layer: which layer's cache, int32 scalar.
        start: [B] int32, sequence index of the first query of each row.
        topk: how many keys a query attends to.

    Returns:
        [B, C, S // 32] uint32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check(idx_q, weights, idx_k, key_scale, topk)
    cuda = partial(gpu_bits.select_bits, topk=topk) if gpu_bits.supports(idx_q, idx_k, topk) else None
    tpu = partial(tpu_bits.select_bits, topk=topk) if tpu_bits.supports(idx_q, idx_k) else None
    plain = partial(reference.select_bits, topk=topk)
    return dispatch(plain, idx_q, weights, idx_k, key_scale, jnp.asarray(layer, jnp.int32), start, cuda=cuda, tpu=tpu)


def select_ids(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
) -> jax.Array:
    """Selected keys of one query per sequence (C = 1), as ascending ids.

    Arguments as in `select_bits`. A query may lie before the first key and see none, or behind the last and see all: a
    device of several holds a part of the keys. Returns [B, min(topk, S)] int32, unused slots at the end are -1.
    """
    _check(idx_q, weights, idx_k, key_scale, topk)
    if idx_q.shape[1] != 1:
        raise ValueError(f"select_ids takes one query per sequence, got idx_q {idx_q.shape}")
    cuda = partial(gpu_ids.select_ids, topk=topk) if gpu_ids.supports(idx_q, idx_k) else None
    tpu = partial(tpu_ids.select_ids, topk=topk) if tpu_ids.supports(idx_q, idx_k) else None
    plain = partial(reference.select_ids, topk=topk)
    return dispatch(plain, idx_q, weights, idx_k, key_scale, jnp.asarray(layer, jnp.int32), start, cuda=cuda, tpu=tpu)


def scores_at(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    ids: jax.Array,
) -> jax.Array:
    """Index scores of listed keys for one query per sequence (C = 1).

    Args:
        ids: [B, k] int32 key indices, none beyond the capacity; where one is negative the score means nothing.

    Other arguments as in `select_bits`. Returns [B, k] float32.
    """
    return reference.scores_at(idx_q, weights, idx_k, key_scale, layer, ids)


def _check(idx_q: jax.Array, weights: jax.Array, idx_k: jax.Array, key_scale: jax.Array | None, topk: int) -> None:
    B, C, J, I = idx_q.shape  # noqa: E741
    if weights.shape != (B, C, J) or idx_k.shape[1] != B or idx_k.shape[3] != I:
        raise ValueError(f"idx_q {idx_q.shape}, weights {weights.shape} and idx_k {idx_k.shape} do not fit")
    if key_scale is not None and key_scale.shape != idx_k.shape[:3]:
        raise ValueError(f"key_scale {key_scale.shape} must be {idx_k.shape[:3]}")
    if idx_k.shape[2] % WORD:
        raise ValueError(f"cache capacity {idx_k.shape[2]} must be a multiple of {WORD}")
    if topk < 1:
        raise ValueError(f"topk={topk} must be at least 1")
