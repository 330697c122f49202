"""Attention with gradients: dense under a mask, or over the keys that the lightning indexer selects."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax.config import KeyeConfig
from keye_jax.decoder import Tables
from keye_jax.indexer import index_inputs
from keye_jax.ops import rms_norm, rotate

HIDDEN = -1e30
"""Score of a key that is not seen; finite, so that differences stay numbers."""


class Attended(NamedTuple):
    out: jax.Array  # [B, T, D]
    divergence: jax.Array  # float32, see model.Outputs
    recall: jax.Array  # float32


def attend(
    block: dict[str, Any],
    a: jax.Array,
    tables: tuple[Tables, Tables],
    visible: jax.Array,
    counted: jax.Array,
    config: KeyeConfig,
    mode: str,
) -> Attended:
    """One layer's attention for normed inputs a [B, T, D].

    Args:
        block: the layer's parameters.
        tables: from `keye_jax.decoder.rope_tables`.
        visible: bool [B, T, T], keys that a query may see.
        counted: bool [B, T], tokens that are no padding: the ones that comparisons are averaged over.
        mode: see `model.Mode`.
    """
    attn = block["attn"]
    main_tables, index_tables = tables
    q, k = queries_and_keys(attn, a, main_tables, config)
    v = jnp.einsum("btd,dgk->btgk", a, attn["v_proj"])

    def project_out(mixed: jax.Array) -> jax.Array:
        return jnp.einsum("bthk,hkd->btd", mixed, attn["o_proj"])

    seen, index = visible, None
    if mode != "dense":
        index = index_scores(block["indexer"], lax.stop_gradient(a), index_tables, config)
        selected = select(lax.stop_gradient(index), visible, config.sparse.topk)
        seen = selected if mode == "sparse" else visible
    if index is None:
        return Attended(project_out(plain(q, k, v, visible[:, None])), jnp.float32(0), jnp.float32(1))
    p = probabilities(q, k, seen)
    out = project_out(jnp.einsum("bgrts,bsgk->btgrk", p.astype(v.dtype), v).reshape(q.shape))
    share = lax.stop_gradient(p.mean(axis=2))
    found = _mean(recall(share, selected), counted)
    return Attended(out, _mean(divergence(share, index, seen), counted), found)


def queries_and_keys(
    attn: dict[str, Any], a: jax.Array, tables: Tables, config: KeyeConfig
) -> tuple[jax.Array, jax.Array]:
    """q [B, T, H, K] and k [B, T, G, K] of normed inputs a [B, T, D]."""
    eps = config.text.rms_norm_eps
    q = rotate(rms_norm(jnp.einsum("btd,dhk->bthk", a, attn["q_proj"]), attn["q_norm"], eps), *tables)
    k = rotate(rms_norm(jnp.einsum("btd,dgk->btgk", a, attn["k_proj"]), attn["k_norm"], eps), *tables)
    return q, k


def probabilities(q: jax.Array, k: jax.Array, seen: jax.Array) -> jax.Array:
    """Attention [B, G, H / G, T, S] float32 of q over k where `seen` [B, T, S]."""
    B, T, _, K = q.shape
    scores = jnp.einsum("btgrk,bsgk->bgrts", q.reshape(B, T, k.shape[2], -1, K), k, preferred_element_type=jnp.float32)
    return jax.nn.softmax(jnp.where(seen[:, None, None], scores * K**-0.5, HIDDEN))


def recall(share: jax.Array, selected: jax.Array) -> jax.Array:
    """[B, T] float32: how much of dense attention falls on the selected keys, averaged over groups.

    Args:
        share: [B, G, T, S] float32, attention averaged over the heads of a group.
        selected: bool [B, T, S].
    """
    return jnp.sum(share * selected[:, None], axis=-1).mean(axis=1)


def plain(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """Softmax attention of q [B, T, H, K] over k, v [B, S, G, K], under mask [B, 1, T, S] if given: [B, T, H, K].

    In bfloat16 on a GPU this is cuDNN's kernel, which keeps no array of T x S numbers.
    """
    fused = q.dtype == jnp.bfloat16 and jax.default_backend() == "gpu"
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if fused else "xla")


def index_scores(params: dict[str, Any], a: jax.Array, tables: Tables, config: KeyeConfig) -> jax.Array:
    """[B, T, T] float32: the indexer's score of every key for every query, unmasked.

    The library's quantised formats have no gradient: in training the indexer multiplies float32 or bfloat16.
    """
    index = index_inputs(params, a, *tables, config)
    products = jnp.einsum("btji,bsi->btjs", index.q, index.k, preferred_element_type=jnp.float32)
    return jnp.einsum("btj,btjs->bts", index.weights, jax.nn.relu(products))


def select(scores: jax.Array, visible: jax.Array, topk: int) -> jax.Array:
    """bool [..., S]: the `topk` largest visible scores of each row, all visible ones where they are fewer; of equal
    scores the earlier ones, as in the library."""
    if topk >= scores.shape[-1]:
        return visible
    masked = jnp.where(visible, scores, -jnp.inf)
    least = jnp.sort(masked, axis=-1)[..., -topk, None]
    above, tied = masked > least, masked == least
    room = topk - jnp.sum(above, axis=-1, keepdims=True)
    return visible & (above | (tied & (jnp.cumsum(tied, axis=-1) <= room)))


def divergence(share: jax.Array, index: jax.Array, seen: jax.Array) -> jax.Array:
    """[B, T] float32: KL of softmax(index) from each group's attention distribution, averaged over groups.

    Args:
        share: [B, G, T, S] float32, attention averaged over the heads of a group; zero where not `seen`.
        index: [B, T, S] float32 scores.
        seen: bool [B, T, S].
    """
    believed = jax.nn.log_softmax(jnp.where(seen, index, HIDDEN))
    wanted = jnp.log(jnp.maximum(share, 1e-30))
    return jnp.sum(share * (wanted - believed[:, None]), axis=-1).mean(axis=1)


def _mean(values: jax.Array, counted: jax.Array) -> jax.Array:
    return jnp.sum(values * counted) / jnp.maximum(jnp.sum(counted), 1)
