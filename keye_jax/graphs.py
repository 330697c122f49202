"""The programs the runtime executes, as pure functions of dictionaries and arrays with static shapes.
Plain dictionaries, because whoever runs a serialised program need not have this package.

    vision   params, patches, grid                     → vision rows
    prefill  params, cache, logits, a chunk            → cache, logits of each row's last valid token so far
    decode   params, cache, logits, decoding state     → cache, logits, state, up to n new tokens
    explain  params, cache, tokens it produced         → cache, how many layers selected each slot for each token

Prefill leaves logits, and decode starts by sampling from them: choosing a token is written, and compiled, once.
"""

from typing import Any, TypedDict

import jax
import jax.numpy as jnp
from jax import lax

from keye_jax.cache import Cache
from keye_jax.config import KeyeConfig
from keye_jax.decoder import decoder, embed, lm_head
from keye_jax.parallel import UNDIVIDED, Layout
from keye_jax.sampling import Sampling, sample
from keye_jax.vision import vision_tokens

NO_TOKEN = -1

STOP_IDS = 8
"""Stop tokens that the runtime's decode graphs compare with."""

MAX_DECODE_STEPS = 16
"""Tokens one decode call can produce: the width of its result. How many it does produce is an argument."""


class Chunk(TypedDict):
    """The next tokens of every row's prompt."""

    tokens: jax.Array  # [B, C] int32
    positions: jax.Array  # [3, B, C] int32
    vision_rows: jax.Array  # [B, C, D] model dtype
    is_vision: jax.Array  # [B, C] bool
    valid: jax.Array  # [B] int32, how many of the C tokens count


class Produced(TypedDict):
    """Text tokens that the cache holds already, to be looked at again."""

    tokens: jax.Array  # [B, C] int32
    positions: jax.Array  # [3, B, C] int32
    valid: jax.Array  # [B] int32, how many of the C tokens count


class DecodeState(TypedDict):
    """What a row needs to go on; all [B] unless noted."""

    delta: jax.Array  # int32, rotary position minus sequence index
    done: jax.Array  # bool
    budget: jax.Array  # int32, tokens it may still produce
    stop_ids: jax.Array  # [STOP_IDS] int32; NO_TOKEN pads
    sampling: Sampling


def vision(
    params: dict[str, Any], patches: jax.Array, grid_thw: jax.Array, config: KeyeConfig, layout: Layout = UNDIVIDED
) -> jax.Array:
    """Vision rows; see `keye_jax.vision.vision_tokens`.

    Args:
        patches, grid_thw: inside `shard_map` this device's share, whole frames with padding of its own behind them.

    Returns:
        The rows of all shares, one after the other. Gathering them is all that is communicated.
    """
    return layout.frames.gather(vision_tokens(params, patches, grid_thw, config.vision), 0)


def prefill(
    params: dict[str, Any],
    cache: Cache,
    logits: jax.Array,
    chunk: Chunk,
    config: KeyeConfig,
    layout: Layout = UNDIVIDED,
) -> tuple[Cache, jax.Array]:
    """Appends a chunk to every row.

    Args:
        params: the "text" parameters.
        cache: see `keye_jax.cache`; donated by the caller.
        logits: [B, V] float32; rows without a valid token in this chunk keep theirs.
        layout: how the model is spread, inside `shard_map`; params and cache are this device's part.
    """
    valid, vocab = chunk["valid"], layout.experts.over(config.text.vocab_size)
    h = embed(params, chunk["tokens"], chunk["vision_rows"], chunk["is_vision"], vocab)
    hidden, cache = decoder(params, h, cache, chunk["positions"], valid, config, layout)
    last = jnp.maximum(valid - 1, 0)
    new = lm_head(params, jnp.take_along_axis(hidden, last[:, None, None], axis=1)[:, 0], vocab)
    return cache, jnp.where(valid[:, None] > 0, new, logits)


def decode(
    params: dict[str, Any],
    cache: Cache,
    logits: jax.Array,
    state: DecodeState,
    steps: jax.Array,
    config: KeyeConfig,
    layout: Layout = UNDIVIDED,
) -> tuple[Cache, jax.Array, DecodeState, jax.Array, jax.Array]:
    """Produces up to `steps` tokens a row in one device loop.

    A row is done after a stop token (which is returned) or when its budget is spent; a done row's cache stays as it
    is. The loop ends early when every row is done.

    Args:
        params: the "text" parameters.
        cache, logits: from `prefill` or the last `decode`; donated by the caller.
        steps: int32 scalar, at most MAX_DECODE_STEPS.
        layout: as in `prefill`.

    Returns:
        cache, logits, state, tokens [B, MAX_DECODE_STEPS] int32 (NO_TOKEN where none was produced), and finite [B]
        bool: whether all logits that tokens were drawn from were finite.
    """
    B, vocab = logits.shape[0], layout.experts.over(config.text.vocab_size)

    def running(carry: tuple[Any, ...]) -> jax.Array:
        i, _, _, state, _, _ = carry
        return (i < steps) & ~jnp.all(state["done"])

    def step(carry: tuple[Any, ...]) -> tuple[Any, ...]:
        i, cache, logits, state, tokens, finite = carry
        token = sample(logits, state["sampling"], cache["length"])
        alive = ~state["done"]
        finite &= ~alive | jnp.all(jnp.isfinite(logits), axis=-1)
        tokens = tokens.at[:, i].set(jnp.where(alive, token, NO_TOKEN))
        budget = state["budget"] - alive
        stopped = jnp.any(token[:, None] == state["stop_ids"], axis=-1)
        done = ~alive | stopped | (budget <= 0)
        positions = jnp.broadcast_to(cache["length"] + state["delta"], (3, B))[..., None]
        h = embed(params, token[:, None], None, None, vocab)
        hidden, cache = decoder(params, h, cache, positions, (~done).astype(jnp.int32), config, layout)
        state = {**state, "done": done, "budget": budget}
        return i + 1, cache, lm_head(params, hidden[:, 0], vocab), state, tokens, finite

    tokens = jnp.full((B, MAX_DECODE_STEPS), NO_TOKEN, jnp.int32)
    carry = (jnp.int32(0), cache, logits, state, tokens, jnp.ones((B,), bool))
    _, cache, logits, state, tokens, finite = lax.while_loop(running, step, carry)
    return cache, logits, state, tokens, finite


def explain(
    params: dict[str, Any],
    cache: Cache,
    produced: Produced,
    config: KeyeConfig,
    layout: Layout = UNDIVIDED,
) -> tuple[Cache, jax.Array]:
    """What tokens selected, layer by layer, when they were decoded: they go through the layers once more.

    Args:
        params: the "text" parameters.
        cache: its `length` set back to before the tokens, whose rows are written again; donated by the caller.
        layout: as in `prefill`.

    Returns:
        The cache, as long as before the length was set back, and counts [B, C, S] uint8: in how many layers each token
        selected each slot; for tokens beyond `valid` they mean nothing.

    Raises:
        ValueError: one token, whose layers are those of decoding; more layers than a count can hold.
    """
    B, C = produced["tokens"].shape
    if C < 2 or config.text.num_hidden_layers > jnp.iinfo(jnp.uint8).max:
        raise ValueError(f"{C} tokens of {config.text.num_hidden_layers} layers: needs 2 tokens, at most 255 layers")
    h = embed(params, produced["tokens"], None, None, layout.experts.over(config.text.vocab_size))
    selected = jnp.zeros((B, C, cache["kv"].shape[2]), jnp.uint8)
    counting = {**cache, "selected": selected}
    _, counted = decoder(params, h, counting, produced["positions"], produced["valid"], config, layout)
    return {name: counted[name] for name in cache}, layout.context.gather(counted["selected"], 2)
