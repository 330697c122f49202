"""Choosing the next token from logits: greedy, or temperature, top-k and top-p with a seeded generator."""

from typing import TypedDict

import jax
import jax.numpy as jnp
from jax import lax


class Sampling(TypedDict):
    """Per-row settings; all [B]."""

    temperature: jax.Array  # float32; 0 is greedy
    top_p: jax.Array  # float32 in (0, 1]; 1 keeps everything
    top_k: jax.Array  # int32; 0 keeps everything
    seed: jax.Array  # uint32


def sample(logits: jax.Array, settings: Sampling, index: jax.Array) -> jax.Array:
    """The next token of each row.

    The filters apply in the order of transformers' generation: temperature, top-k, top-p. Random numbers depend on
    the row's seed and token index only, so a row draws the same tokens in any batch. Ties go to the lower token.

    Args:
        logits: [B, V] float32.
        index: [B] int32, sequence index of the token being drawn.

    Returns:
        [B] int32.
    """
    greedy = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    # Sorting a vocabulary costs more than the rest of a step: only when some row asks for it.
    return lax.cond(
        jnp.any(settings["temperature"] > 0),
        lambda: jnp.where(settings["temperature"] > 0, _draw(logits, settings, index), greedy),
        lambda: greedy,
    )


def _draw(logits: jax.Array, settings: Sampling, index: jax.Array) -> jax.Array:
    V = logits.shape[-1]
    temperature = jnp.where(settings["temperature"] > 0, settings["temperature"], 1.0)
    order = jnp.argsort(-logits, axis=-1, stable=True)
    scaled = jnp.take_along_axis(logits, order, axis=-1) / temperature[:, None]
    rank = jnp.arange(V, dtype=jnp.int32)
    kept = (settings["top_k"][:, None] <= 0) | (rank < settings["top_k"][:, None])
    probabilities = jax.nn.softmax(jnp.where(kept, scaled, -jnp.inf), axis=-1)
    # A token stays while those before it hold less than top_p: the first one always does. A sum of a whole
    # vocabulary can round to more than 1, so 1 is asked for apart.
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    top_p = settings["top_p"][:, None]
    kept &= (top_p >= 1) | (before < top_p)

    def gumbel(seed: jax.Array, index: jax.Array) -> jax.Array:
        return jax.random.gumbel(jax.random.fold_in(jax.random.key(seed), index), (V,), jnp.float32)

    noise = jax.vmap(gumbel)(settings["seed"], index)
    choice = jnp.argmax(jnp.where(kept, scaled + noise, -jnp.inf), axis=-1)
    return jnp.take_along_axis(order, choice[:, None], axis=-1)[:, 0].astype(jnp.int32)
