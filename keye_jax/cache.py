"""The decoding state of a batch of sequences: keys and values, index keys, and how many tokens each row holds.

A plain dictionary, because it crosses `jit` and `jax.export`:

    kv         [L, B, S, 2, G, K]  keys (0) and values (1); all heads of a token lie together, one copy fetches them
    idx_k      [L, B, S, I]        index keys in the indexer's dtype
    idx_scale  [L, B, S] float32   their scales; only where they are quantised
    length     [B] int32           tokens held

Only inside the program that explains an answer it has one more entry, which the layers add to:

    selected   [B, C, S] uint8     in how many layers so far each token of the chunk selected each slot
"""

from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.config import KeyeConfig

Cache = dict[str, jax.Array]

CAPACITY_STEP = 128
"""Capacities are multiples of this: the selection packs 32 keys a word, and tiles of keys divide evenly."""

INDEX_DTYPES = {"fp8": jnp.float8_e4m3fn, "bf16": jnp.bfloat16, "float32": jnp.float32}


def abstract_cache(config: KeyeConfig, batch: int, capacity: int, dtype: Any) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes and dtypes of a cache for `batch` rows of `capacity` tokens.

    Raises:
        ValueError: capacity not a multiple of CAPACITY_STEP.
    """
    if capacity < CAPACITY_STEP or capacity % CAPACITY_STEP:
        raise ValueError(f"cache capacity {capacity} must be a positive multiple of {CAPACITY_STEP}")
    t, s = config.text, config.sparse
    slots = (t.num_hidden_layers, batch, capacity)
    cache = {
        "kv": jax.ShapeDtypeStruct((*slots, 2, t.num_key_value_heads, t.head_dim), dtype),
        "idx_k": jax.ShapeDtypeStruct((*slots, s.indexer_head_dim), INDEX_DTYPES[s.indexer_dtype]),
        "length": jax.ShapeDtypeStruct((batch,), jnp.int32),
    }
    if s.indexer_dtype == "fp8":
        cache["idx_scale"] = jax.ShapeDtypeStruct(slots, jnp.float32)
    return cache


def init_cache(config: KeyeConfig, batch: int, capacity: int, dtype: Any) -> Cache:
    """An empty cache; see `abstract_cache`."""
    # Zeros, not empty: unwritten slots take part in masked sums, where a NaN would survive the mask.
    return {k: jnp.zeros(v.shape, v.dtype) for k, v in abstract_cache(config, batch, capacity, dtype).items()}
