"""segment_attention in plain jnp: the specification and the fallback.

For each tile of queries, only the tiles of keys between the start of its first segment and the end of its last one
are visited, with a streaming softmax: time O(N x segment), memory O(tile x tile).
"""

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import SoftmaxState, einsum_f32

TILE = 256


def segment_attention(q: jax.Array, k: jax.Array, v: jax.Array, spans: jax.Array) -> jax.Array:
    """See `kernels_pallas.segment_attention.segment_attention`."""
    N, H, K = q.shape
    tile = min(TILE, N)
    pad = -N % tile
    # Padding forms a segment of its own, behind all others.
    spans = jnp.concatenate([spans, jnp.broadcast_to(jnp.array([N, N + pad], spans.dtype), (pad, 2))])
    q, k, v = (jnp.pad(x, ((0, pad), (0, 0), (0, 0))) for x in (q, k, v))

    def query_tile(i: jax.Array) -> jax.Array:
        own = lax.dynamic_slice_in_dim(spans, i * tile, tile)
        rows = lax.dynamic_slice_in_dim(q, i * tile, tile)
        first, end = own[0, 0], own[-1, 1]

        def add_tile(j: jax.Array, state: SoftmaxState) -> SoftmaxState:
            keys = lax.dynamic_slice_in_dim(k, j * tile, tile)
            values = lax.dynamic_slice_in_dim(v, j * tile, tile)
            index = j * tile + jnp.arange(tile)
            seen = (own[:, :1] <= index) & (index < own[:, 1:])
            scores = einsum_f32("qhk,shk->hqs", rows, keys) * K**-0.5
            return state.add(scores, seen, values, "hqs,shk->hqk")

        state = SoftmaxState.start((H, tile), K)
        state = lax.fori_loop(first // tile, (end + tile - 1) // tile, add_tile, state)
        return state.result().astype(q.dtype).swapaxes(0, 1)

    tiles = lax.map(query_tile, jnp.arange((N + pad) // tile))
    return tiles.reshape(N + pad, H, K)[:N]
