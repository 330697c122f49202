"""A model spread over 2, 4 and 8 devices selects and answers what one device does."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax.sharding import Mesh, PartitionSpec

from keye_jax import distributed, graphs, ops, sharding
from keye_jax.cache import init_cache
from keye_jax.config import KeyeConfig
from keye_jax.parallel import Axis
from keye_jax.params import WeightFormat
from tests.keye_jax.tiny import greedy_state

PROGRAMS = [(2, 1, "float8_e4m3fn"), (4, 100, "float8_e4m3fn"), (8, 24, "float8_e4m3fn"), (8, 100, "float32")]
"""Devices, top-k and dtype: few, for each is compiled."""
WHOLE, SLOTS = PartitionSpec(), PartitionSpec(None, None, "model")


def mesh_of(devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), ("model",))


@partial(jax.jit, static_argnums=(0, 1))
def selected(devices: int, topk: int, q: Any, weights: Any, keys: Any, scale: Any, start: Any) -> tuple[Any, Any]:
    """Bits [B, C, S // 32] and each device's ids of the first query [B, devices, k], over a mesh."""
    axis = Axis("model", devices)

    def select(q: Any, weights: Any, keys: Any, scale: Any, start: Any) -> tuple[Any, Any]:
        rest = (keys, scale, jnp.int32(1), start, topk, axis)
        bits = distributed.select_bits(q, weights, *rest)
        return bits, distributed.select_ids(q[:, :1], weights[:, :1], *rest)[:, None]

    specs = (WHOLE, WHOLE, SLOTS, WHOLE if scale is None else SLOTS, WHOLE)
    out = (SLOTS, PartitionSpec(None, "model"))
    return jax.shard_map(select, mesh=mesh_of(devices), in_specs=specs, out_specs=out, check_vma=False)(
        q, weights, keys, scale, start
    )


@pytest.mark.slow
@settings(max_examples=10)
@given(
    seed=st.integers(0, 2**32 - 1),
    program=st.sampled_from(PROGRAMS),
    kind=st.sampled_from(["random", "many ties", "all equal"]),
)
@example(seed=0, program=(8, 24, "float8_e4m3fn"), kind="all equal")
@example(seed=0, program=(2, 1, "float8_e4m3fn"), kind="many ties")
@example(seed=0, program=(4, 100, "float8_e4m3fn"), kind="random")
@example(seed=0, program=(8, 100, "float32"), kind="random")
def test_selection_is_that_of_one_device(seed: int, program: tuple[int, int, str], kind: str) -> None:
    """Bits and ids, for rows that end on the first device, between devices and on the last one."""
    devices, topk, dtype = program
    rng, (B, C, S, J, I) = np.random.default_rng(seed), (4, 5, 512, 3, 16)  # noqa: E741
    q, keys = rng.normal(size=(B, C, J, I)), rng.normal(size=(2, B, S, I))
    weights = rng.normal(size=(B, C, J))
    if kind != "random":
        q, keys, weights = (np.round(x) if kind == "many ties" else np.ones_like(x) for x in (q, keys, weights))
    q, keys = jnp.asarray(q, dtype), jnp.asarray(keys, dtype)
    weights = jnp.asarray(weights, jnp.float32)
    scale = jnp.asarray(2.0 ** rng.integers(-1, 2, (2, B, S)), jnp.float32) if dtype.startswith("float8") else None
    start = jnp.asarray([0, 63, int(rng.integers(0, S - C)), S - C], jnp.int32)

    bits, ids = selected(devices, topk, q, weights, keys, scale, start)
    np.testing.assert_array_equal(bits, ops.select_bits(q, weights, keys, scale, 1, start, topk))
    expected = np.asarray(ops.select_ids(q[:, :1], weights[:, :1], keys, scale, 1, start, topk))
    for b in range(B):
        own = [row[row >= 0] + d * (S // devices) for d, row in enumerate(np.asarray(ids[b]))]
        np.testing.assert_array_equal(np.concatenate(own), expected[b][expected[b] >= 0])


@pytest.fixture(scope="module")
def alone(golden_params: Any, golden_configs: Any, golden_batch: Any) -> tuple[Any, Any]:
    """What one device answers."""
    return answer(golden_configs["fp8_on"], "single", 1, golden_params["text"], golden_batch)


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["context", "expert"])
def test_eight_devices_answer_what_one_does(
    preset: str,
    alone: tuple[Any, Any],
    golden_params: dict[str, Any],
    golden_configs: dict[str, KeyeConfig],
    golden_batch: dict[str, Any],
) -> None:
    """All golden prompts as one batch of unequal rows, in chunks, then decoded. (Two devices, and an indexer that is
    not quantised: `test_quantised_model.py`; four: `tests/runtime/test_engine_devices.py`.)"""
    tokens, logits = answer(golden_configs["fp8_on"], preset, 8, golden_params["text"], golden_batch)
    same, expected = alone
    np.testing.assert_array_equal(tokens, same)
    # Sums over devices round in another order.
    np.testing.assert_allclose(logits, expected, atol=1e-5 * np.abs(expected).max())


CHUNK, STEPS = 28, 8


def answer(
    config: KeyeConfig, preset: str, devices: int, params: Any, batch: dict[str, Any], weights: WeightFormat = "none"
) -> tuple[Any, Any]:
    """Tokens [B, MAX_DECODE_STEPS] and the logits that prefill leaves."""
    layout = sharding.layout(preset, devices)
    rows, length = batch["tokens"].shape
    cache = init_cache(config, rows, 256, jnp.float32)
    logits = jnp.zeros((rows, config.text.vocab_size), jnp.float32)
    prefill = partial(graphs.prefill, config=config, layout=layout)
    decode = partial(graphs.decode, config=config, layout=layout)
    if devices > 1:
        own = sharding.param_partitions(config, preset, devices, weights)["text"]
        slots = sharding.cache_partitions(cache, preset)
        mesh: Any = mesh_of(devices)
        prefill = sharding.spread(prefill, mesh, (own, slots, WHOLE, WHOLE), (slots, WHOLE))
        decode = sharding.spread(decode, mesh, (own, slots, WHOLE, WHOLE, WHOLE), (slots, *[WHOLE] * 4))
    prefill, decode = jax.jit(prefill), jax.jit(decode)
    valid = np.asarray(batch["valid"])
    for first in range(0, length, CHUNK):
        chunk = {name: batch[name][..., first : first + CHUNK] for name in ("tokens", "positions", "is_vision")}
        chunk["vision_rows"] = batch["vision_rows"][:, first : first + CHUNK]
        chunk["valid"] = jnp.asarray(np.clip(valid - first, 0, CHUNK), jnp.int32)
        cache, logits = prefill(params, cache, logits, chunk)
    state = greedy_state(batch["delta"])
    tokens = decode(params, cache, logits, state, jnp.int32(STEPS))[3]
    return np.asarray(tokens), np.asarray(logits)
