"""DSA over a cache that is spread along the sequence: device d of n holds slots d * S to (d + 1) * S - 1 of every row.

What is selected is what one device would select. Scores do not move:

- Prefill: each device scores its share of the chunk's queries against all keys of the layer, gathered for that moment
  (17 MB at 256K in fp8), and sends every other device the selection among that device's keys.
- Decode: each device takes the top-k of its own keys; the global k-th value among those candidates is found from
  summed histograms of their sort keys, three digits one after the other.
- Attention runs over the selected keys that a device holds; the parts merge by their log-sum-exps.

Kernels see local slots: a row's `start` less the device's first slot, below zero where a device holds nothing visible.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax import ops
from keye_jax.moe import owned
from keye_jax.parallel import Axis

DIGITS = ((21, 11), (10, 11), (0, 10))
"""(lowest bit, bits) of the digits of a 32-bit sort key, highest first."""


def local_slots(slots: jax.Array, capacity: int, axis: Axis) -> jax.Array:
    """Global sequence indices → slots of this device's cache of `capacity` slots; `capacity` where it has none."""
    own = slots - axis.index() * capacity
    return jnp.where((own >= 0) & (own < capacity), own, capacity)


def select_bits(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array,
    start: jax.Array,
    topk: int,
    axis: Axis,
) -> jax.Array:
    """`ops.select_bits`, cache and result local to this device: [B, C, S // 32] for its S slots."""
    if axis.size == 1:
        return ops.select_bits(idx_q, weights, idx_k, key_scale, layer, start, topk)
    C = idx_q.shape[1]
    share = -(-C // axis.size)
    spare = ((0, 0), (0, share * axis.size - C))
    own_q = axis.own(jnp.pad(idx_q, (*spare, (0, 0), (0, 0))), 1)
    own_weights = axis.own(jnp.pad(weights, (*spare, (0, 0))), 1)
    keys = _layer_of_all(idx_k, layer, axis)
    scale = None if key_scale is None else _layer_of_all(key_scale, layer, axis)
    bits = ops.select_bits(own_q, own_weights, keys, scale, jnp.int32(0), start + axis.index() * share, topk)
    return axis.exchange(bits, split=2, join=1)[:, :C]


def _layer_of_all(stack: jax.Array, layer: jax.Array, axis: Axis) -> jax.Array:
    """[L, B, S, ...] of this device → [1, B, size * S, ...] of one layer."""
    own = lax.dynamic_index_in_dim(stack, layer)
    # As bytes: not every backend's collectives know 8-bit floats.
    integers = jnp.dtype(f"uint{8 * own.dtype.itemsize}")
    return lax.bitcast_convert_type(axis.gather(lax.bitcast_convert_type(own, integers), 2), own.dtype)


def select_ids(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array,
    start: jax.Array,
    topk: int,
    axis: Axis,
) -> jax.Array:
    """`ops.select_ids`, cache and result local to this device: those of its slots that the global top-k holds."""
    if axis.size == 1:
        return ops.select_ids(idx_q, weights, idx_k, key_scale, layer, start, topk)
    S = idx_k.shape[2]
    ids = ops.select_ids(idx_q, weights, idx_k, key_scale, layer, start - axis.index() * S, topk)
    scores = ops.scores_at(idx_q, weights, idx_k, key_scale, layer, ids)
    chosen = _topk_of_all(ops.sortable(scores), ids >= 0, topk, axis)
    # While a row is no longer than topk, every key is selected and there is no k-th.
    chosen = jnp.where((start < topk)[:, None], ids >= 0, chosen)
    kept = jnp.sort(jnp.where(chosen, ids, S), axis=1)
    return jnp.where(kept < S, kept, -1)


def _topk_of_all(keys: jax.Array, valid: jax.Array, topk: int, axis: Axis) -> jax.Array:
    """Which of this device's candidates are among the topk largest of all devices'. Ties go to the lower device, and on
    it to the earlier candidate.

    Args:
        keys: [B, k] uint32.
        valid: [B, k] bool; at least topk of a row's are valid on all devices together.
    """
    alive, above = valid, jnp.zeros_like(valid)
    wanted = jnp.full(keys.shape[:1], topk, jnp.int32)
    each = jnp.zeros((1, 1, 1), jnp.int32)
    for low, width in DIGITS:
        digit = (keys >> low) & ((1 << width) - 1)
        counts = _histogram(digit, alive, width)
        each = axis.stack(counts) if low == 0 else axis.sum(counts)[None]
        at_least = lax.cumsum(each.sum(0), axis=1, reverse=True)
        # The k-th key's digit: the largest that enough candidates reach.
        kth = jnp.sum(at_least >= wanted[:, None], axis=1) - 1
        larger = jnp.take_along_axis(jnp.pad(at_least, ((0, 0), (0, 1))), kth[:, None] + 1, axis=1)[:, 0]
        wanted -= larger
        above |= alive & (digit > kth[:, None].astype(digit.dtype))
        alive &= digit == kth[:, None].astype(digit.dtype)
    # What is alive equals the k-th key.
    tied = jnp.take_along_axis(each, kth[None, :, None], axis=2)[..., 0]
    before = jnp.sum(jnp.where(jnp.arange(axis.size)[:, None] < axis.index(), tied, 0), axis=0)
    place = before[:, None] + jnp.cumsum(alive, axis=1) - alive
    return above | (alive & (place < wanted[:, None]))


def _histogram(digit: jax.Array, alive: jax.Array, width: int) -> jax.Array:
    """[B, k] → [B, 2 ** width] int32. As a product of zeros and ones, exact in float32: no scatter."""
    low = width // 2
    rows = (digit >> low)[..., None] == jnp.arange(1 << (width - low), dtype=digit.dtype)
    columns = (digit & ((1 << low) - 1))[..., None] == jnp.arange(1 << low, dtype=digit.dtype)
    rows = (rows & alive[..., None]).astype(jnp.bfloat16)
    counts = ops.einsum_f32("bkx,bky->bxy", rows, columns.astype(jnp.bfloat16))
    return counts.reshape(digit.shape[0], 1 << width).astype(jnp.int32)


def attend_bits(
    q: jax.Array, kv: jax.Array, layer: jax.Array, bits: jax.Array, start: jax.Array, most: int, axis: Axis
) -> jax.Array:
    """`ops.attend_bits` with all heads' queries over this device's keys; the result holds this device's heads of H,
    or all of them if they do not divide: [B, C, H / size, K]."""
    if axis.size == 1:
        return ops.attend_bits(q, kv, layer, bits, start, most=most)
    own = start - axis.index() * kv.shape[2]
    return _merge(*ops.attend_bits_lse(q, kv, layer, bits, own, most=most), axis).astype(q.dtype)


def attend_ids(q: jax.Array, kv: jax.Array, layer: jax.Array, ids: jax.Array, axis: Axis) -> jax.Array:
    """`ops.attend_ids`; see `attend_bits`."""
    if axis.size == 1:
        return ops.attend_ids(q, kv, layer, ids)
    return _merge(*ops.attend_ids_lse(q, kv, layer, ids), axis).astype(q.dtype)


def project_add(
    out: jax.Array, w: jax.Array | ops.Quantized, layer: jax.Array, residual: jax.Array, heads: Axis
) -> jax.Array:
    """`ops.project_add`, `out` [B, H / size, K] and w [L, H / size, K, D] of this device's heads."""
    if heads.size == 1:
        return ops.project_add(out, w, layer, residual)
    own = jax.tree.map(lambda array: array[layer], w)
    product = heads.sum(ops.einsum_f32("bhk,hkd->bd", out, ops.values_of(own, out.dtype)))
    return residual + ops.scaled(product, own).astype(residual.dtype)


def moe_step(
    h: jax.Array,
    norm: jax.Array,
    router: jax.Array,
    gate_up: jax.Array | ops.Quantized,
    down: jax.Array | ops.Quantized,
    layer: jax.Array,
    k: int,
    renormalise: bool,
    eps: float,
    axis: Axis,
) -> jax.Array:
    """`ops.moe_step` with the experts spread over `axis`."""
    if axis.size == 1:
        return ops.moe_step(h, norm, router, gate_up, down, layer, k, renormalise, eps)
    m, weights, experts = ops.norm_route(h, norm, router, layer, k, renormalise, eps)
    own, mine = owned(experts, down.shape[1], axis)
    own = jnp.where(mine, own, -1)
    part = ops.experts_add(m, gate_up, down, layer, own, weights, jnp.zeros(h.shape, jnp.float32))
    return h + axis.sum(part).astype(h.dtype)


def _merge(out: jax.Array, lse: jax.Array, axis: Axis) -> jax.Array:
    """Attention over all keys from that over each device's.

    Args:
        out: [..., H, K] float32.
        lse: [..., H] float32, log-sum-exp of the scaled scores; a large negative number where there was no key.

    Returns:
        [..., H / size, K] float32, or all heads if H does not divide.
    """
    both = jnp.concatenate([out, lse[..., None]], axis=-1)
    if axis.over(out.shape[-2]).size > 1:
        parts = axis.exchange(both[None], split=out.ndim - 1, join=0)
    else:
        parts = axis.stack(both)
    out, lse = parts[..., :-1], parts[..., -1]
    share: Any = jnp.exp(lse - lse.max(0))
    return jnp.sum(share[..., None] * out, axis=0) / share.sum(0)[..., None]
