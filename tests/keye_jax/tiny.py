"""A model of toy sizes with random weights, and the compiled programs that tests share.

Compiling is what the tests spend their time on: whoever calls `prefill` or `decode` with shapes that another test has
used pays nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from keye_jax import graphs
from keye_jax.cache import CAPACITY_STEP, Cache, init_cache
from keye_jax.config import KeyeConfig, SparseConfig, TextConfig, VisionConfig
from keye_jax.params import ParamSpec, map_specs
from keye_jax.sampling import Sampling

TINY = KeyeConfig(
    text=TextConfig(
        vocab_size=97,
        hidden_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        moe_intermediate_size=24,
        num_experts=4,
        num_experts_per_tok=2,
        rope_theta=10000.0,
        mrope_section=(4, 2, 2),
    ),
    sparse=SparseConfig(indexer_num_heads=2, indexer_head_dim=8, topk=12, indexer_dtype="float32"),
    vision=VisionConfig(
        hidden_size=48, num_hidden_layers=2, num_attention_heads=3, intermediate_size=40, image_size=56
    ),
    image_token_id=95,
    video_token_id=96,
)

prefill = jax.jit(graphs.prefill, static_argnames="config")
decode = jax.jit(graphs.decode, static_argnames="config")


def random_params(config: KeyeConfig, seed: int = 0, dtype: Any = jnp.float32) -> dict[str, Any]:
    """Weights under which every term of every formula shows, unlike under `init_params`: matrices large enough that
    attention is not uniform, norms and biases away from one and zero."""
    rng = np.random.default_rng(seed)

    def draw(spec: ParamSpec) -> jax.Array:
        noise = rng.standard_normal(spec.shape, np.float32)
        value = {"normal": 0.15 * noise, "ones": 1 + 0.2 * noise, "zeros": 0.2 * noise}[spec.init]
        return jnp.asarray(value, spec.as_dtype(dtype))

    return map_specs(draw, config)


def text_prompt(config: KeyeConfig, length: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """Random ids [T] (no vision tokens) and positions [3, T] whose three rows differ, as after an image."""
    rng = np.random.default_rng(seed)
    ids = rng.integers(0, min(config.image_token_id, config.video_token_id), length).astype(np.int32)
    steps = rng.integers(0, 2, (3, length))
    return ids, np.cumsum(steps, axis=1).astype(np.int32)


def empty_cache(config: KeyeConfig, batch: int, tokens: int = CAPACITY_STEP, dtype: Any = jnp.float32) -> Cache:
    """A cache for at least `tokens` tokens a row."""
    return init_cache(config, batch, -(-tokens // CAPACITY_STEP) * CAPACITY_STEP, dtype)


def empty_logits(config: KeyeConfig, batch: int) -> jax.Array:
    return jnp.zeros((batch, config.text.vocab_size), jnp.float32)


def text_chunk(ids: np.ndarray, positions: np.ndarray, valid: Any, hidden: int) -> graphs.Chunk:
    """A chunk without vision rows from ids [B, C] and positions [3, B, C]."""
    return graphs.Chunk(
        tokens=jnp.asarray(ids, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        vision_rows=jnp.zeros((*ids.shape, hidden), jnp.float32),
        is_vision=jnp.zeros(ids.shape, bool),
        valid=jnp.asarray(valid, jnp.int32),
    )


def greedy_state(delta: Any, budget: int = 1000, stop: int = graphs.NO_TOKEN) -> graphs.DecodeState:
    """Greedy decoding of rows whose rotary positions run `delta` [B] ahead of their sequence indices."""
    delta = jnp.asarray(delta, jnp.int32)
    rows = delta.shape
    return graphs.DecodeState(
        delta=delta,
        done=jnp.zeros(rows, bool),
        budget=jnp.full(rows, budget, jnp.int32),
        stop_ids=jnp.asarray([graphs.NO_TOKEN, stop], jnp.int32),
        sampling=Sampling(
            temperature=jnp.zeros(rows, jnp.float32),
            top_p=jnp.ones(rows, jnp.float32),
            top_k=jnp.zeros(rows, jnp.int32),
            seed=jnp.zeros(rows, jnp.uint32),
        ),
    )


def steps(count: int) -> jax.Array:
    """The `steps` argument of `decode`: typed, because a Python int would compile a program of its own."""
    return jnp.asarray(count, jnp.int32)
