"""Grouped-query attention over the selected keys only: exact softmax, one set per query shared by all heads."""

from functools import partial

import jax
import jax.numpy as jnp

from kernels_pallas.common import WORD
from kernels_pallas.dispatch import dispatch
from kernels_pallas.sparse_attention import gpu_bits, gpu_ids, reference, tpu_bits, tpu_ids


def attend_bits(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array | int,
    bits: jax.Array,
    start: jax.Array,
    most: int | None = None,
) -> jax.Array:
    """Attention of a chunk of consecutive queries (prefill).

    Args:
        q: [B, C, H, K] queries after norm and rotary embedding.
        kv: [L, B, S, 2, G, K] cache of all layers; index 0 of the fourth axis holds keys, 1 values. H % G == 0.
        layer: which layer's cache, int32 scalar.
        bits: [B, C, S // 32] uint32 from `index_select.select_bits`.
        start: [B] int32, sequence index of the first query; no key after start + C - 1 is selected.
        most: no query selects more keys than this; it bounds the memory that a kernel takes. None: not known.

    Returns:
        [B, C, H, K], dtype of q; softmax in float32, scale K ** -0.5.

    Raises:
        ValueError: shapes that do not fit together.
    """
    _check_bits(q, kv, bits)
    cuda = partial(gpu_bits.attend_bits, most=most) if gpu_bits.supports(q, kv) else None
    tpu = tpu_bits.attend_bits if tpu_bits.supports(q, kv) else None
    return dispatch(reference.attend_bits, q, kv, jnp.asarray(layer, jnp.int32), bits, start, cuda=cuda, tpu=tpu)


def attend_ids(q: jax.Array, kv: jax.Array, layer: jax.Array | int, ids: jax.Array) -> jax.Array:
    """Attention of one query per sequence over listed keys (decode).

    Args:
        q: [B, H, K].
        kv, layer: as in `attend_bits`.
        ids: [B, k] int32 key indices; -1 marks an unused slot.

    Returns:
        [B, H, K], dtype of q.
    """
    _check_ids(q, kv, ids)
    cuda = gpu_ids.attend_ids if gpu_ids.supports(q, kv) else None
    tpu = tpu_ids.attend_ids if tpu_ids.supports(q, kv, ids) else None
    return dispatch(reference.attend_ids, q, kv, jnp.asarray(layer, jnp.int32), ids, cuda=cuda, tpu=tpu)


def attend_bits_lse(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array | int,
    bits: jax.Array,
    start: jax.Array,
    most: int | None = None,
) -> tuple[jax.Array, jax.Array]:
    """`attend_bits` over a part of the keys, to be merged with others.

    Returns:
        The result in float32 [B, C, H, K], zero where nothing is selected, and the log-sum-exp of the scaled scores
        [B, C, H] float32, -1e30 there.
    """
    _check_bits(q, kv, bits)
    cuda = partial(gpu_bits.attend_bits_lse, most=most) if gpu_bits.supports(q, kv) else None
    tpu = tpu_bits.attend_bits_lse if tpu_bits.supports(q, kv) else None
    return dispatch(reference.attend_bits_lse, q, kv, jnp.asarray(layer, jnp.int32), bits, start, cuda=cuda, tpu=tpu)


def attend_ids_lse(q: jax.Array, kv: jax.Array, layer: jax.Array | int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """`attend_ids` over a part of the keys: [B, H, K] float32 and [B, H] float32, as `attend_bits_lse`."""
    _check_ids(q, kv, ids)
    cuda = gpu_ids.attend_ids_lse if gpu_ids.supports(q, kv) else None
    tpu = tpu_ids.attend_ids_lse if tpu_ids.supports(q, kv, ids) else None
    return dispatch(reference.attend_ids_lse, q, kv, jnp.asarray(layer, jnp.int32), ids, cuda=cuda, tpu=tpu)


def _check_bits(q: jax.Array, kv: jax.Array, bits: jax.Array) -> None:
    _check(q.shape[0], q.shape[2:], q, kv)
    if bits.shape != (*q.shape[:2], kv.shape[2] // WORD):
        raise ValueError(f"bits {bits.shape} do not fit q {q.shape} and kv {kv.shape}")


def _check_ids(q: jax.Array, kv: jax.Array, ids: jax.Array) -> None:
    _check(q.shape[0], q.shape[1:], q, kv)
    if ids.ndim != 2 or ids.shape[0] != q.shape[0]:
        raise ValueError(f"ids {ids.shape} do not fit q {q.shape}")


def _check(batch: int, heads: tuple[int, ...], q: jax.Array, kv: jax.Array) -> None:
    if kv.ndim != 6 or kv.shape[1] != batch or kv.shape[3] != 2 or kv.shape[5] != heads[1]:
        raise ValueError(f"q {q.shape} and kv {kv.shape} do not fit")
    if heads[0] % kv.shape[4]:
        raise ValueError(f"{heads[0]} query heads are not a multiple of {kv.shape[4]} key/value heads")
