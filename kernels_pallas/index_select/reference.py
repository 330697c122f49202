"""index_select in plain jnp: the specification and the fallback.

Schedule: score the chunk against tiles of keys up to the last visible one ([B, C, S] float32 is the largest array);
map scores to integers of the same order; find the k-th largest by fixing one bit at a time and counting; find the
index below which ties are taken, again by counting. No sort, no data-dependent shape: every backend can say the same.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import einsum_f32, pack_bits

KEY_TILE = 1024


def index_scores(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
) -> jax.Array:
    """[B, C, S] float32 index scores; -inf where the query does not see the key. Arguments as in `select_bits`."""
    B, C = idx_q.shape[:2]
    S, I = idx_k.shape[2:]  # noqa: E741
    tile = min(KEY_TILE, S)
    # e4m3 values are exact in bfloat16 and their products in float32; not every chip multiplies fp8.
    wide = jnp.bfloat16 if idx_q.dtype == jnp.float8_e4m3fn else idx_q.dtype
    idx_q = idx_q.astype(wide)
    query_index = start[:, None] + jnp.arange(C, dtype=jnp.int32)

    def score_tile(i: jax.Array, scores: jax.Array) -> jax.Array:
        # The last tile of a ragged capacity starts early and rewrites equal values.
        first = jnp.minimum(i * tile, S - tile)
        keys = lax.dynamic_slice(idx_k, (layer, 0, first, 0), (1, B, tile, I))[0].astype(wide)
        products = jnp.maximum(einsum_f32("bcji,bsi->bcjs", idx_q, keys), 0.0)
        block = jnp.sum(weights[..., None] * products, axis=2)
        if key_scale is not None:
            block *= lax.dynamic_slice(key_scale, (layer, 0, first), (1, B, tile))[0][:, None]
        visible = (first + jnp.arange(tile, dtype=jnp.int32)) <= query_index[..., None]
        return lax.dynamic_update_slice(scores, jnp.where(visible, block, -jnp.inf), (0, 0, first))

    tiles = (jnp.max(start) + C + tile - 1) // tile
    tiles = jnp.minimum(tiles, -(-S // tile))
    return lax.fori_loop(0, tiles, score_tile, jnp.full((B, C, S), -jnp.inf, jnp.float32))


def scores_at(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    ids: jax.Array,
) -> jax.Array:
    """See `kernels_pallas.index_select.scores_at`."""
    wide = jnp.bfloat16 if idx_q.dtype == jnp.float8_e4m3fn else idx_q.dtype
    ids = jnp.maximum(ids, 0)
    # The layer's slice first: to gather rows out of the stack, XLA's TPU backend changes the layout of the whole stack.
    keys = jnp.take_along_axis(lax.dynamic_index_in_dim(idx_k, layer, keepdims=False), ids[..., None], axis=1)
    products = einsum_f32("bji,bki->bjk", idx_q[:, 0].astype(wide), keys.astype(wide))
    scores = jnp.sum(weights[:, 0, :, None] * jnp.maximum(products, 0.0), axis=1)
    if key_scale is None:
        return scores
    return scores * jnp.take_along_axis(lax.dynamic_index_in_dim(key_scale, layer, keepdims=False), ids, axis=1)


def sortable(scores: jax.Array) -> jax.Array:
    """Maps float32 to uint32 of the same order. -0.0 and +0.0 map to the same value."""
    bits = lax.bitcast_convert_type(jnp.where(scores == 0, 0.0, scores), jnp.uint32)
    negative = bits >> 31 == 1
    return jnp.where(negative, ~bits, bits | jnp.uint32(1 << 31))


def topk_mask(scores: jax.Array, visible: jax.Array, topk: int) -> jax.Array:
    """The `topk` largest visible scores of each row (all visible ones if they are fewer); ties to the lower index.

    Args:
        scores: [..., S] float32.
        visible: [..., S] bool.

    Returns:
        [..., S] bool.
    """
    S = scores.shape[-1]
    keys = jnp.where(visible, sortable(scores), 0)

    def fix_bit(i: jax.Array, threshold: jax.Array) -> jax.Array:
        candidate = threshold | (jnp.uint32(1 << 31) >> i.astype(jnp.uint32))
        enough = jnp.sum(keys >= candidate[..., None], axis=-1, dtype=jnp.int32) >= topk
        return jnp.where(enough, candidate, threshold)

    threshold = lax.fori_loop(0, 32, fix_bit, jnp.zeros(keys.shape[:-1], jnp.uint32))[..., None]
    above = keys > threshold
    tied = keys == threshold
    wanted = topk - jnp.sum(above, axis=-1, dtype=jnp.int32)
    index = jnp.arange(S, dtype=jnp.int32)

    def fix_index_bit(i: jax.Array, cutoff: jax.Array) -> jax.Array:
        candidate = cutoff + (jnp.int32(1 << (S.bit_length() - 1)) >> i)
        taken = jnp.sum(tied & (index < candidate[..., None]), axis=-1, dtype=jnp.int32)
        return jnp.where(taken <= wanted, candidate, cutoff)

    # Largest cutoff with at most `wanted` ties below it.
    cutoff = lax.fori_loop(0, S.bit_length(), fix_index_bit, jnp.zeros(wanted.shape, jnp.int32))
    return visible & (above | (tied & (index < cutoff[..., None])))


def _visible(start: jax.Array, chunk: int, capacity: int) -> jax.Array:
    """[B, C, S] bool: key index at most the query's."""
    query_index = start[:, None] + jnp.arange(chunk, dtype=jnp.int32)
    return jnp.arange(capacity, dtype=jnp.int32) <= query_index[..., None]


def select_mask(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
) -> jax.Array:
    """[B, C, S] bool: the selected keys. Arguments as in `select_bits`."""
    C, S = idx_q.shape[1], idx_k.shape[2]
    visible = _visible(start, C, S)
    if topk >= S:
        return visible

    def scored() -> jax.Array:
        scores = index_scores(idx_q, weights, idx_k, key_scale, layer, start)
        return topk_mask(scores, visible, topk)

    # While every query sees at most topk keys, everything visible is selected by definition.
    return lax.cond(jnp.max(start) + C <= topk, lambda: visible, scored)


def select_bits(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
) -> jax.Array:
    """See `kernels_pallas.index_select.select_bits`."""
    return pack_bits(select_mask(idx_q, weights, idx_k, key_scale, layer, start, topk))


def select_ids(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
) -> jax.Array:
    """See `kernels_pallas.index_select.select_ids`."""
    S = idx_k.shape[2]
    mask = select_mask(idx_q, weights, idx_k, key_scale, layer, start, topk)[:, 0]
    ids = jnp.sort(jnp.where(mask, jnp.arange(S, dtype=jnp.int32), S), axis=-1)[:, : min(topk, S)]
    return jnp.where(ids < S, ids, -1)
