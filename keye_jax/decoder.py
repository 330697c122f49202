"""The text decoder over a cache: one chunk of tokens per row in, hidden states out.

A chunk of one token is a decode step. It is the same mathematics in other kernels: reading the weights is all it does,
so what lies between two products is fused with them.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax import distributed, ops
from keye_jax.cache import Cache
from keye_jax.config import KeyeConfig, indexer_sections
from keye_jax.layers import project, weights_of
from keye_jax.moe import moe
from keye_jax.ops import einsum_f32, pick, rms_norm, scaled, values_of
from keye_jax.parallel import ALONE, UNDIVIDED, Axis, Layout
from keye_jax.rope import mrope_tables

Tables = tuple[jax.Array, jax.Array]

DECODE_UNROLL = 8
"""Layers of a decode step in one turn of its loop: on a GPU a turn costs as much as a fifth of a layer."""


def embed(
    params: dict[str, Any],
    tokens: jax.Array,
    vision_rows: jax.Array | None,
    is_vision: jax.Array | None,
    vocab: Axis = ALONE,
) -> jax.Array:
    """Token embeddings [B, C, D], with `vision_rows` [B, C, D] where `is_vision` [B, C].

    Args:
        vocab: what the vocabulary is spread over.
    """
    table = params["embed_tokens"]
    if vocab.size == 1:
        h = table[tokens]
    else:
        rows = tokens - vocab.index() * table.shape[0]
        mine = (rows >= 0) & (rows < table.shape[0])
        h = vocab.sum(jnp.where(mine[..., None], table[jnp.where(mine, rows, 0)], 0))
    if vision_rows is None or is_vision is None:
        return h
    return jnp.where(is_vision[..., None], vision_rows.astype(h.dtype), h)


def rope_tables(positions: jax.Array, config: KeyeConfig, dtype: Any) -> tuple[Tables, Tables]:
    """Rotary tables of the attention heads and of the indexer for positions [3, B, C]."""
    t, s = config.text, config.sparse
    main = mrope_tables(positions, t.rope_theta, t.mrope_section, t.mrope_interleaved, dtype)
    interleaved = t.mrope_interleaved if s.mrope_interleaved is None else s.mrope_interleaved
    index = mrope_tables(positions, t.rope_theta, indexer_sections(config), interleaved, dtype)
    return main, index


def decoder_layer(
    stack: dict[str, Any],
    layer: jax.Array,
    h: jax.Array,
    cache: Cache,
    tables: tuple[Tables, Tables],
    valid: jax.Array,
    config: KeyeConfig,
    layout: Layout = UNDIVIDED,
) -> tuple[jax.Array, Cache]:
    """One layer for a chunk that continues every row at `cache["length"]`.

    Args:
        stack: parameters of all layers, stacked, as `weights_of` gives them.
        layer: int32 scalar, which one.
        h: [B, C, D] residual stream.
        tables: from `rope_tables`.
        valid: [B] int32, tokens of the chunk that count; what follows them is padding and is not cached.
        layout: how the model is spread over devices.

    Returns:
        The new residual stream and the cache with this layer's rows written (`length` unchanged).
    """
    experts = {name: stack["moe"][name] for name in ("gate_up_proj", "down_proj")}
    with jax.named_scope("attention"):
        out, cache = _attention(stack, layer, h, cache, tables, valid, config, layout)
        h = h + out
    with jax.named_scope("moe"):
        m = rms_norm(h, stack["post_attention_layernorm"][layer], config.text.rms_norm_eps)
        B, C, D = m.shape
        router = {"router": stack["moe"]["router"][layer]}
        h = h + moe(router, experts, layer, m.reshape(B * C, D), config.text, layout.experts).reshape(B, C, D)
    return h, cache


def _attention(
    stack: dict[str, Any],
    layer: jax.Array,
    h: jax.Array,
    cache: Cache,
    tables: tuple[Tables, Tables],
    valid: jax.Array,
    config: KeyeConfig,
    layout: Layout,
) -> tuple[jax.Array, Cache]:
    axis = layout.context
    heads = axis.over(config.text.num_attention_heads)
    start = cache["length"]
    inputs = ops.chunk_inputs(
        h,
        _input_weights(stack),
        ops.Tables(*(table for pair in tables for table in pair)),
        ops.Caches(cache["kv"], cache["idx_k"], cache.get("idx_scale")),
        layer,
        start - axis.index() * cache["kv"].shape[2],
        valid,
        config.text.rms_norm_eps,
    )
    cache = _with_caches(cache, inputs.caches)
    q, o_proj = heads.gather(inputs.q, 2), pick(stack["attn"]["o_proj"], layer)
    selection = (
        inputs.idx_q,
        inputs.idx_weights,
        cache["idx_k"],
        cache.get("idx_scale"),
        layer,
        start,
        config.sparse.topk,
        axis,
    )
    bits = distributed.select_bits(*selection)
    if "selected" in cache:
        cache = {**cache, "selected": cache["selected"] + ops.unpack_bits(bits)}
    out = distributed.attend_bits(q, cache["kv"], layer, bits, start, config.sparse.topk, axis)
    product = heads.sum(einsum_f32("bchk,hkd->bcd", out, values_of(o_proj, h.dtype)))
    return scaled(product, o_proj).astype(h.dtype), cache


def _input_weights(stack: dict[str, Any]) -> ops.Weights:
    """What an attention block needs before attention, of all layers."""
    attn, indexer = stack["attn"], stack["indexer"]
    return ops.Weights(
        stack["input_layernorm"],
        *(attn[name] for name in ("q_proj", "k_proj", "v_proj")),
        *(indexer[name] for name in ("q_proj", "k_proj", "gate_proj")),
        *(attn[name] for name in ("q_norm", "k_norm")),
        *(indexer[name] for name in ("q_norm", "k_norm", "k_norm_bias")),
    )


def _with_caches(cache: Cache, caches: ops.Caches) -> Cache:
    """`cache` with other contents."""
    return {**cache, **{name: array for name, array in caches._asdict().items() if array is not None}}


def decode_layer(
    stack: dict[str, Any],
    layer: jax.Array,
    h: jax.Array,
    cache: Cache,
    tables: tuple[Tables, Tables],
    valid: jax.Array,
    config: KeyeConfig,
    layout: Layout = UNDIVIDED,
) -> tuple[jax.Array, Cache]:
    """`decoder_layer` for one token a row: h [B, 1, D]."""
    axis = layout.context
    heads = axis.over(config.text.num_attention_heads)
    eps = config.text.rms_norm_eps
    rows, start, capacity = h[:, 0], cache["length"], cache["kv"].shape[2]
    with jax.named_scope("attention"):
        inputs = ops.decode_inputs(
            rows,
            _input_weights(stack),
            ops.Tables(*(table[:, 0] for pair in tables for table in pair)),
            ops.Caches(cache["kv"], cache["idx_k"], cache.get("idx_scale")),
            layer,
            distributed.local_slots(jnp.where(valid > 0, start, axis.size * capacity), capacity, axis),
            eps,
        )
        kv, idx_k, idx_scale = inputs.caches
        ids = distributed.select_ids(
            inputs.idx_q[:, None],
            inputs.idx_weights[:, None],
            idx_k,
            idx_scale,
            layer,
            start,
            config.sparse.topk,
            axis,
        )
        out = distributed.attend_ids(heads.gather(inputs.q, 1), kv, layer, ids, axis)
        rows = distributed.project_add(out, stack["attn"]["o_proj"], layer, rows, heads)
    with jax.named_scope("moe"):
        rows = distributed.moe_step(
            rows,
            stack["post_attention_layernorm"],
            stack["moe"]["router"],
            stack["moe"]["gate_up_proj"],
            stack["moe"]["down_proj"],
            layer,
            config.text.num_experts_per_tok,
            config.text.norm_topk_prob,
            eps,
            layout.experts.over(config.text.num_experts),
        )
    return rows[:, None], _with_caches(cache, inputs.caches)


def decoder(
    params: dict[str, Any],
    h: jax.Array,
    cache: Cache,
    positions: jax.Array,
    valid: jax.Array,
    config: KeyeConfig,
    layout: Layout = UNDIVIDED,
) -> tuple[jax.Array, Cache]:
    """All layers and the final norm.

    Args:
        params: the "text" parameters.
        h: [B, C, D] from `embed`.
        positions: [3, B, C] int32.
        valid: [B] int32, tokens of the chunk that count.
        layout: how the model is spread over devices.

    Returns:
        Normed hidden states [B, C, D] and the cache, `valid` tokens longer.
    """
    tables = rope_tables(positions, config, h.dtype)
    layers = weights_of(params["layers"])

    one_token = h.shape[1] == 1
    step = decode_layer if one_token else decoder_layer

    def body(layer: jax.Array, carry: tuple[jax.Array, Cache]) -> tuple[jax.Array, Cache]:
        return step(layers, layer, *carry, tables, valid, config, layout)

    # Carried, not scanned over: a cache that leaves a loop as a stacked output is copied.
    unroll = DECODE_UNROLL if one_token else 1
    h, cache = lax.fori_loop(0, config.text.num_hidden_layers, body, (h, cache), unroll=unroll)
    cache = {**cache, "length": cache["length"] + valid}
    return rms_norm(h, params["norm"], config.text.rms_norm_eps), cache


def lm_head(params: dict[str, Any], hidden: jax.Array, vocab: Axis = ALONE) -> jax.Array:
    """Logits [..., V] float32 of normed hidden states [..., D], rounded through the model's dtype as the official
    head is. `vocab`: what the vocabulary is spread over."""
    logits = project("...d,vd->...v", hidden, weights_of(params["lm_head"]))
    return vocab.gather(logits, logits.ndim - 1).astype(jnp.float32)
