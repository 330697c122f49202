"""What `graphs.prefill` and `graphs.decode` are compared with: the same programs with another function in the place
of one of `keye_jax.ops`.

    local   prefill whose selections are local: neighbouring queries share most of their keys. The indexer and the
            selection run as ever and are paid for; attention is then given the local bits.
    dense   every query attends to every earlier key, through cuDNN in prefill; nothing is selected.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax import graphs, ops
from keye_jax.config import KeyeConfig


@contextmanager
def _replaced(**functions: Any) -> Iterator[None]:
    """Programs traced inside call these in the place of the functions of `keye_jax.ops` of the same names."""
    with mock.patch.multiple(ops, **functions):
        yield


def local_prefill(
    params: dict[str, Any], cache: Any, logits: jax.Array, chunk: Any, config: KeyeConfig
) -> tuple[Any, jax.Array]:
    """`graphs.prefill` whose layers all attend to chunk["bits"] [B, C, S // 32]."""
    select = ops.select_bits

    def selected(*args: Any) -> jax.Array:
        bits = select(*args)
        # Never true: in all but a cache's last chunk the first query sees no key of the last word, and there not all
        # of them. No compiler knows, so that the selection is computed.
        return lax.select(bits[0, 0, -1] == jnp.uint32(0xFFFFFFFF), bits, chunk["bits"])

    with _replaced(select_bits=selected):
        return graphs.prefill(params, cache, logits, chunk, config)


def dense_prefill(
    params: dict[str, Any], cache: Any, logits: jax.Array, chunk: graphs.Chunk, config: KeyeConfig
) -> tuple[Any, jax.Array]:
    """`graphs.prefill` with dense attention; batch 1."""

    def nothing(idx_q: jax.Array, *_: Any) -> jax.Array:
        return jnp.zeros((*idx_q.shape[:2], 1), jnp.uint32)

    with _replaced(select_bits=nothing, attend_bits=attend_causal):
        return graphs.prefill(params, cache, logits, chunk, config)


def dense_decode(
    params: dict[str, Any], cache: Any, logits: jax.Array, state: Any, steps: jax.Array, config: KeyeConfig
) -> Any:
    """`graphs.decode` with dense attention."""

    def last_key(_q: Any, _w: Any, _k: Any, _s: Any, _l: Any, start: jax.Array, _t: int) -> jax.Array:
        return start[:, None]

    with _replaced(select_ids=last_key, attend_ids=partial(attend_all, kernel=ops.attend_ids)):
        return graphs.decode(params, cache, logits, state, steps, config)


def attend_causal(q: jax.Array, kv: jax.Array, layer: Any, _bits: Any, start: jax.Array, most: Any = None) -> jax.Array:
    """Causal attention of a chunk to everything before it; shapes as in `ops.attend_bits`, one row.

    Two library calls, over the keys before the chunk and over the chunk's own, merged by their log-sum-exps. The
    library hands those out in the model's dtype, which is too coarse for use and right for timing.
    """
    C, S = q.shape[1], kv.shape[2]
    # The library needs keys and values apart: copying them is below 2 % of the attention.
    k, v = kv[layer, :, :, 0], kv[layer, :, :, 1]
    best = "cudnn" if jax.default_backend() == "gpu" else "xla"
    own_k, own_v = (lax.dynamic_slice_in_dim(x, start[0], C, axis=1) for x in (k, v))
    if C == S:
        return jax.nn.dot_product_attention(q, own_k, own_v, is_causal=True, implementation=best)
    near, near_lse = jax.nn.dot_product_attention(
        q, own_k, own_v, is_causal=True, implementation=best, return_residual=True
    )
    far, far_lse = jax.nn.dot_product_attention(
        q, k, v, key_value_seq_lengths=jnp.maximum(start, 1), implementation=best, return_residual=True
    )
    share = jax.nn.sigmoid(far_lse.astype(jnp.float32) - near_lse.astype(jnp.float32))
    share = jnp.where(start[:, None, None] > 0, share, 0.0)[..., None]
    return (near * (1 - share) + far * share).astype(q.dtype)


def attend_all(q: jax.Array, kv: jax.Array, layer: Any, last: jax.Array, kernel: Any) -> jax.Array:
    """Attention of one query per sequence to all keys up to `last` [B, 1]; shapes as in `ops.attend_ids`, which is
    `kernel`: with every key listed it is faster than XLA's own products from a few rows on."""
    (B, H, K), (S, G) = q.shape, (kv.shape[2], kv.shape[4])
    visible = jnp.arange(S, dtype=jnp.int32) <= last
    if B >= FEW_ROWS:
        return kernel(q, kv, layer, jnp.where(visible, jnp.arange(S, dtype=jnp.int32), -1))
    keys, values = kv[layer, :, :, 0], kv[layer, :, :, 1]
    grouped = q.reshape(B, G, H // G, K)
    scores = ops.einsum_f32("bgrk,bsgk->bgrs", grouped, keys) * K**-0.5
    p = jax.nn.softmax(jnp.where(visible[:, None, None], scores, -jnp.inf), axis=-1).astype(q.dtype)
    return ops.einsum_f32("bgrs,bsgk->bgrk", p, values).astype(q.dtype).reshape(B, H, K)


FEW_ROWS = 4
"""Measured on an H200: 238 us against 383 for one row of 128K keys, 500 us against 255 for eight of 32K."""
