"""sparse_attention in plain jnp: the specification and the fallback.

Prefill walks tiles of keys up to the last visible one with a streaming softmax, so its memory is O(C x tile);
decode gathers the selected rows. Arguments as in the package's public functions.
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import WORD, SoftmaxState, einsum_f32, unpack_bits

KEY_TILE = 512


def attend_bits(q: jax.Array, kv: jax.Array, layer: jax.Array | int, bits: jax.Array, start: jax.Array) -> jax.Array:
    """See `kernels_pallas.sparse_attention.attend_bits`."""
    return attend_bits_lse(q, kv, layer, bits, start)[0].astype(q.dtype)


def attend_bits_lse(
    q: jax.Array, kv: jax.Array, layer: jax.Array | int, bits: jax.Array, start: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.sparse_attention.attend_bits_lse`."""
    B, C, H, K = q.shape
    S, G = kv.shape[2], kv.shape[4]
    tile = next(t for t in (KEY_TILE, 256, 128, 64, 32) if S % t == 0)
    grouped = q.reshape(B, C, G, H // G, K)

    def add_tile(i: jax.Array, state: SoftmaxState) -> SoftmaxState:
        block = lax.dynamic_slice(kv, (layer, 0, i * tile, 0, 0, 0), (1, B, tile, 2, G, K))[0]
        words = lax.dynamic_slice(bits, (0, 0, i * (tile // WORD)), (B, C, tile // WORD))
        mask = unpack_bits(words)[:, :, None, None]
        scores = einsum_f32("bcgrk,bsgk->bcgrs", grouped, block[:, :, 0]) * K**-0.5
        return state.add(scores, mask, block[:, :, 1], "bcgrs,bsgk->bcgrk")

    tiles = jnp.minimum((jnp.max(start) + C + tile - 1) // tile, S // tile)
    state = lax.fori_loop(0, tiles, add_tile, SoftmaxState.start((B, C, G, H // G), K))
    return state.result().reshape(B, C, H, K), state.log_sum_exp().reshape(B, C, H)


def attend_ids(q: jax.Array, kv: jax.Array, layer: jax.Array | int, ids: jax.Array) -> jax.Array:
    """See `kernels_pallas.sparse_attention.attend_ids`."""
    return attend_ids_lse(q, kv, layer, ids)[0].astype(q.dtype)


def attend_ids_lse(q: jax.Array, kv: jax.Array, layer: jax.Array | int, ids: jax.Array) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.sparse_attention.attend_ids_lse`."""
    B, H, K = q.shape
    G = kv.shape[4]
    rows = kv[layer, jnp.arange(B)[:, None], jnp.maximum(ids, 0)]
    grouped = q.reshape(B, G, H // G, K)
    scores = einsum_f32("bgrk,bsgk->bgrs", grouped, rows[:, :, 0]) * K**-0.5
    state = SoftmaxState.start((B, G, H // G), K)
    state = state.add(scores, (ids >= 0)[:, None, None], rows[:, :, 1], "bgrs,bsgk->bgrk")
    return state.result().reshape(B, H, K), state.log_sum_exp().reshape(B, H)
