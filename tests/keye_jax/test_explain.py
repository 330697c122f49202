"""The program that looks at produced tokens again: what it counts is what was selected."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh

from keye_jax import distributed, graphs, sharding
from keye_jax.params import map_specs
from tests.keye_jax.tiny import (
    TINY,
    empty_cache,
    empty_logits,
    greedy_state,
    prefill,
    random_params,
    steps,
    text_chunk,
    text_prompt,
)

PROMPT, NEW = 40, 12
explain = jax.jit(graphs.explain, static_argnames="config")


def produced(ids: np.ndarray, positions: np.ndarray, valid: Any) -> graphs.Produced:
    """ids [B, C], positions [3, B, C]."""
    return graphs.Produced(
        tokens=jnp.asarray(ids, jnp.int32),
        positions=jnp.asarray(positions, jnp.int32),
        valid=jnp.asarray(valid, jnp.int32),
    )


@pytest.mark.slow
def test_counts_are_the_golden_selected_sets(
    golden: dict[str, np.ndarray], golden_params: Any, golden_configs: Any
) -> None:
    """Also after the cache has gone on: what stands behind a query is not looked at. (The index keys of the tests below
    are not quantised.)"""
    config, params = golden_configs["fp8_on"], golden_params["text"]
    ids, positions = golden["text_long/input_ids"][None], golden["text_long/position_ids"][:, None]
    expected = golden["text_long/fp8_on/selected_mask"].sum(axis=0)
    chunk = text_chunk(ids, positions, [ids.shape[1]], config.text.hidden_size)
    cache, _ = prefill(params, empty_cache(config, 1), empty_logits(config, 1), chunk, config)
    first, count = 50, 40
    part = slice(first, first + count)
    chunk = produced(
        np.pad(ids[:, part], ((0, 0), (0, 24))), np.pad(positions[..., part], ((0, 0), (0, 0), (0, 24))), [count]
    )
    after, counts = explain(params, {**cache, "length": jnp.array([first])}, chunk, config)
    np.testing.assert_array_equal(counts[0, :count, : ids.shape[1]], expected[part])
    assert not np.asarray(counts)[0, :count, ids.shape[1] :].any()
    assert expected[part].max() > 0
    assert expected[part].min() == 0
    assert int(after["length"][0]) == first + count
    assert after.keys() == cache.keys()


@pytest.fixture(scope="module")
def decoded() -> tuple[Any, Any, np.ndarray, np.ndarray]:
    """Parameters, the cache after decoding two rows, their tokens [B, NEW], and what each step selected by then:
    counts [B, NEW, S]."""
    params = random_params(TINY)["text"]
    ids, positions = zip(*(text_prompt(TINY, PROMPT, seed) for seed in (3, 4)), strict=True)
    chunk = text_chunk(np.stack(ids), np.stack(positions, 1), [PROMPT, PROMPT - 7], TINY.text.hidden_size)
    cache, logits = prefill(params, empty_cache(TINY, 2), empty_logits(TINY, 2), chunk, TINY)
    seen: list[np.ndarray] = []
    select_ids = distributed.select_ids

    def watched(*args: Any) -> jax.Array:
        found = select_ids(*args)
        jax.debug.callback(lambda found: seen.append(np.asarray(found)), found, ordered=True)
        return found

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(distributed, "select_ids", watched)
        cache, _, _, tokens, _ = jax.jit(partial(graphs.decode, config=TINY))(
            params, cache, logits, greedy_state([0, 0]), steps(NEW)
        )
        jax.effects_barrier()
    layers, S = TINY.text.num_hidden_layers, cache["kv"].shape[2]
    assert len(seen) == NEW * layers
    counts = np.zeros((2, NEW, S), int)
    for number, found in enumerate(seen):
        for row in range(2):
            counts[row, number // layers, found[row][found[row] >= 0]] += 1
    return params, cache, np.asarray(tokens)[:, :NEW], counts


def again(decoded: Any) -> tuple[Any, graphs.Produced]:
    _, cache, tokens, _ = decoded
    start = np.array([PROMPT, PROMPT - 7])
    positions = np.broadcast_to(start[:, None] + np.arange(NEW), (3, 2, NEW))
    return {**cache, "length": jnp.asarray(start, jnp.int32)}, produced(tokens, positions, [NEW, NEW])


def test_counts_are_what_decoding_selected(decoded: Any) -> None:
    params, cache, _, expected = decoded
    start, chunk = again(decoded)
    after, counts = explain(params, start, chunk, TINY)
    np.testing.assert_array_equal(counts, expected)
    # Fewer than all, and as many as each layer takes.
    assert (expected.sum(-1) == TINY.text.num_hidden_layers * TINY.sparse.topk).all()
    np.testing.assert_allclose(after["kv"], cache["kv"], rtol=0, atol=1e-5)
    np.testing.assert_array_equal(after["length"], cache["length"])


@pytest.mark.parametrize(("preset", "devices"), [("context", 4), ("expert", 2)])
def test_counts_of_a_model_on_several_devices(decoded: Any, preset: str, devices: int) -> None:
    params, _, _, expected = decoded
    cache, chunk = again(decoded)
    mesh = Mesh(np.array(jax.devices()[:devices]), (sharding.MODEL_AXIS,))
    slots = sharding.cache_partitions(cache, preset)
    program = partial(graphs.explain, config=TINY, layout=sharding.layout(preset, devices))
    partitions = (sharding.param_partitions(TINY, preset, devices)["text"], slots, sharding.WHOLE)
    spread: Any = sharding.spread(program, mesh, partitions, (slots, sharding.WHOLE))  # pyright: ignore
    # A device's share of the slots is a multiple of the selection's words.
    room = 128 * devices - cache["kv"].shape[2]
    cache = {
        name: array if name == "length" else jnp.pad(array, [(0, 0), (0, 0), (0, room), *[(0, 0)] * (array.ndim - 3)])
        for name, array in cache.items()
    }
    _, counts = jax.jit(spread)(params, cache, chunk)
    np.testing.assert_array_equal(np.asarray(counts)[..., : expected.shape[-1]], expected)


def test_one_token_has_no_counts() -> None:
    params: Any = map_specs(lambda spec: jax.ShapeDtypeStruct(spec.shape, jnp.float32), TINY)["text"]
    chunk = produced(np.zeros((1, 1)), np.zeros((3, 1, 1)), [1])
    with pytest.raises(ValueError, match="needs 2 tokens"):
        jax.eval_shape(partial(graphs.explain, config=TINY), params, empty_cache(TINY, 1), chunk)
