"""Prompts of the runtime on a model of the library, and what its layers select for them."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from examples.train_tiny.attention import probabilities, queries_and_keys, recall
from keye_jax import KeyeConfig, KeyeVL
from keye_jax.cache import CAPACITY_STEP, Cache, init_cache
from keye_jax.decoder import decoder_layer, embed, rope_tables
from keye_jax.graphs import Chunk
from keye_jax.layers import weights_of
from keye_jax.ops import Quantized, rms_norm
from runtime.bundle import Bundle
from runtime.processor import Prompt

_BATCH_PATCHES = 8192


def bundle_model(bundle: Bundle) -> KeyeVL:
    """The model of a bundle, on the default device."""
    indexer_dtype: Any = bundle.indexer_dtype
    weights: Any = bundle.weight_format
    return KeyeVL(KeyeConfig.from_hf(bundle.config, indexer_dtype=indexer_dtype), bundle.load_params(), weights)


def chunks(model: KeyeVL, prompt: Prompt, size: int) -> Iterator[Chunk]:
    """A prompt as chunks of `size` tokens, the last one padded."""
    config, T = model.config, len(prompt.token_ids)
    is_vision = np.isin(prompt.token_ids, (config.image_token_id, config.video_token_id))
    rows = np.zeros((T, config.text.hidden_size), np.float32)
    if prompt.media:
        parts = [model.encode_vision(*map(jnp.asarray, batch)) for batch in prompt.patch_batches(_BATCH_PATCHES)]
        rows[is_vision] = np.concatenate([np.asarray(part, np.float32) for part in parts])
    dtype = model.arrays()["text"]["norm"].dtype
    for first in range(0, T, size):
        part = slice(first, first + size)
        valid = min(size, T - first)
        spare = (0, size - valid)
        yield Chunk(
            tokens=jnp.asarray(np.pad(prompt.token_ids[part], spare))[None],
            positions=jnp.asarray(np.pad(prompt.position_ids[:, part], ((0, 0), spare)))[:, None],
            vision_rows=jnp.asarray(np.pad(rows[part], (spare, (0, 0))), dtype)[None],
            is_vision=jnp.asarray(np.pad(is_vision[part], spare))[None],
            valid=jnp.array([valid], jnp.int32),
        )


def selected_by(
    layers: Any, layer: jax.Array, h: jax.Array, cache: Cache, rest: tuple[Any, ...]
) -> tuple[jax.Array, Cache, jax.Array]:
    """`decoder_layer(layers, layer, h, cache, *rest)`, and which slots each token selected: bool [B, C, S]."""
    counting = {**cache, "selected": jnp.zeros((*h.shape[:2], cache["kv"].shape[2]), jnp.uint8)}
    h, counted = decoder_layer(layers, layer, h, counting, *rest)
    return h, {name: counted[name] for name in cache}, counted["selected"] > 0


def dense(config: KeyeConfig, tokens: int) -> KeyeConfig:
    """The configuration under which up to `tokens` tokens are all selected."""
    return replace(config, sparse=replace(config.sparse, topk=tokens))


def index_recall(model: KeyeVL, prompt: Prompt) -> np.ndarray:
    """How much of dense attention falls on the keys that the indexer selects: [L], averaged over heads and tokens.

    The definition is that of training (`examples.train_tiny.attention.recall`): the layers attend to everything, and
    the selection that each would have made is held against its attention. Takes [T, T] float32 arrays for T tokens.
    """
    size = -(-len(prompt.token_ids) // 512) * 512
    (chunk,) = chunks(model, prompt, size)
    return np.asarray(_index_recall(model.arrays()["text"], chunk, model.config))


def _widened(w: jax.Array | Quantized, dtype: Any) -> jax.Array:
    """Weights [D, H, K] as numbers of `dtype`."""
    return (w.values.astype(jnp.float32) * w.scale).astype(dtype) if isinstance(w, Quantized) else w


@partial(jax.jit, static_argnames="config")
def _index_recall(text: dict[str, Any], chunk: Chunk, config: KeyeConfig) -> jax.Array:
    h = embed(text, chunk["tokens"], chunk["vision_rows"], chunk["is_vision"])
    T, layers, valid = h.shape[1], weights_of(text["layers"]), chunk["valid"]
    tables = rope_tables(chunk["positions"], config, h.dtype)
    visible = jnp.tril(jnp.ones((1, T, T), bool))
    counted = jnp.arange(T) < valid[0]

    def body(layer: jax.Array, carry: tuple[Any, ...]) -> tuple[Any, ...]:
        h, cache, found = carry
        a = rms_norm(h, layers["input_layernorm"][layer], config.text.rms_norm_eps)
        attn = jax.tree.map(lambda w: w[layer], layers["attn"])
        wide = {name: _widened(attn[name], h.dtype) for name in ("q_proj", "k_proj")}
        q, k = queries_and_keys({**attn, **wide}, a, tables[0], config)
        share = probabilities(q, k, visible).mean(axis=2)
        _, _, selected = selected_by(layers, layer, h, cache, (tables, valid, config))
        each = recall(share, selected[..., :T])[0]
        h, cache = decoder_layer(layers, layer, h, cache, tables, valid, dense(config, T))
        return h, cache, found.at[layer].set(jnp.sum(each * counted) / valid[0])

    capacity = -(-T // CAPACITY_STEP) * CAPACITY_STEP
    carry = (h, init_cache(config, 1, capacity, h.dtype), jnp.zeros(config.text.num_hidden_layers))
    return lax.fori_loop(0, config.text.num_hidden_layers, body, carry)[2]
