"""What the compiled programs promise beside the mathematics: stopping, budgets, rows that wait, bad values reported,
memory."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.segment_attention import segment_attention
from keye_jax import graphs
from keye_jax.cache import CAPACITY_STEP, abstract_cache, init_cache
from keye_jax.model import PREFILL_CHUNK
from keye_jax.model import _forward as forward_program
from keye_jax.params import abstract_params
from tests.keye_jax.tiny import (
    TINY,
    decode,
    empty_cache,
    empty_logits,
    greedy_state,
    prefill,
    random_params,
    steps,
    text_chunk,
    text_prompt,
)

ROWS, CHUNK = 3, 16
VALID = np.array([16, 9, 4], np.int32)


@pytest.fixture(scope="module")
def params() -> dict[str, Any]:
    return random_params(TINY)["text"]


@pytest.fixture(scope="module")
def prompt() -> graphs.Chunk:
    ids, positions = zip(*(text_prompt(TINY, CHUNK, seed) for seed in range(ROWS)), strict=True)
    return text_chunk(np.stack(ids), np.stack(positions, 1), VALID, TINY.text.hidden_size)


@pytest.fixture(scope="module")
def prefilled(params: Any, prompt: graphs.Chunk) -> tuple[Any, jax.Array]:
    return prefill(params, empty_cache(TINY, ROWS), empty_logits(TINY, ROWS), prompt, TINY)


@pytest.fixture(scope="module")
def greedy(params: Any, prefilled: tuple[Any, jax.Array]) -> np.ndarray:
    """The first 16 tokens of each row."""
    return np.asarray(decode(params, *prefilled, greedy_state([0] * ROWS), steps(16), TINY)[3])


def test_rows_without_tokens_wait(params: Any, prompt: graphs.Chunk, prefilled: tuple[Any, jax.Array]) -> None:
    """A chunk in which a row has no token leaves its cache and its logits as they are."""
    cache, logits = prefilled
    chunk = graphs.Chunk(**{**prompt, "valid": jnp.asarray([0, 5, 0], jnp.int32)})
    after, new = prefill(params, cache, logits, chunk, TINY)
    np.testing.assert_array_equal(after["length"], VALID + np.array([0, 5, 0]))
    for row in (0, 2):
        np.testing.assert_array_equal(new[row], logits[row])
        np.testing.assert_array_equal(after["kv"][:, row], cache["kv"][:, row])
        np.testing.assert_array_equal(after["idx_k"][:, row], cache["idx_k"][:, row])
    assert np.abs(new[1] - logits[1]).max() > 0.1


@pytest.mark.parametrize("count", [1, 5, 16])
def test_decode_produces_as_many_as_asked(
    params: Any, prefilled: tuple[Any, jax.Array], greedy: np.ndarray, count: int
) -> None:
    cache, _, state, tokens, finite = decode(params, *prefilled, greedy_state([0] * ROWS), steps(count), TINY)
    assert tokens.shape == (ROWS, graphs.MAX_DECODE_STEPS)
    np.testing.assert_array_equal(tokens[:, :count], greedy[:, :count])
    assert (np.asarray(tokens)[:, count:] == graphs.NO_TOKEN).all()
    np.testing.assert_array_equal(cache["length"], VALID + count)
    np.testing.assert_array_equal(state["budget"], 1000 - count)
    assert finite.all()
    assert not state["done"].any()


def test_stop_tokens_end_a_row(params: Any, prefilled: tuple[Any, jax.Array], greedy: np.ndarray) -> None:
    """The stop token is returned, nothing after it; other rows go on undisturbed."""
    stop = int(greedy[1, 3])
    state = greedy_state([0] * ROWS, stop=stop)
    cache, _, state, tokens, _ = decode(params, *prefilled, state, steps(16), TINY)
    for row in range(ROWS):
        hits = np.flatnonzero(greedy[row] == stop)
        length = hits[0] + 1 if len(hits) else 16
        assert bool(state["done"][row]) == bool(len(hits))
        np.testing.assert_array_equal(tokens[row, :length], greedy[row, :length])
        assert (np.asarray(tokens)[row, length:] == graphs.NO_TOKEN).all()
        assert int(cache["length"][row]) == VALID[row] + length - len(hits[:1])
    assert bool(state["done"][1])


def test_budgets_end_rows(params: Any, prefilled: tuple[Any, jax.Array], greedy: np.ndarray) -> None:
    state = greedy_state([0] * ROWS)
    state["budget"] = jnp.asarray([2, 16, 1], jnp.int32)
    _, _, state, tokens, _ = decode(params, *prefilled, state, steps(16), TINY)
    for row, budget in enumerate((2, 16, 1)):
        np.testing.assert_array_equal(tokens[row, :budget], greedy[row, :budget])
        assert (np.asarray(tokens)[row, budget:] == graphs.NO_TOKEN).all()
    np.testing.assert_array_equal(state["budget"], 0)
    assert state["done"].all()


def test_finished_rows_stay(params: Any, prefilled: tuple[Any, jax.Array]) -> None:
    """Nothing runs for a batch that is done: no token, no change of the cache."""
    state = greedy_state([0] * ROWS)
    state["done"] = jnp.ones(ROWS, bool)
    cache, logits, after, tokens, finite = decode(params, *prefilled, state, steps(16), TINY)
    assert (np.asarray(tokens) == graphs.NO_TOKEN).all()
    jax.tree.map(np.testing.assert_array_equal, (cache, logits), prefilled)
    np.testing.assert_array_equal(after["budget"], state["budget"])
    assert finite.all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_bad_logits_are_reported(params: Any, prefilled: tuple[Any, jax.Array], bad: float) -> None:
    """For the row that drew from them; a row that was done before is not blamed."""
    cache, logits = prefilled
    broken = logits.at[:2, 3].set(bad)
    state = greedy_state([0] * ROWS)
    state["done"] = jnp.asarray([False, True, False])
    finite = decode(params, cache, broken, state, steps(1), TINY)[4]
    np.testing.assert_array_equal(finite, [False, True, True])


def test_positions_run_ahead_by_delta(params: Any, prefilled: tuple[Any, jax.Array]) -> None:
    """A decoded token stands at its sequence index plus delta on all three axes."""
    cache, logits = prefilled
    delta = np.array([-7, 0, 5], np.int32)
    after, new = decode(params, cache, logits, greedy_state(delta), steps(1), TINY)[:2]
    tokens = np.argmax(logits, axis=-1)[:, None]
    positions = np.broadcast_to((VALID + delta)[None, :, None], (3, ROWS, 1))
    chunk = text_chunk(tokens, positions, [1] * ROWS, TINY.text.hidden_size)
    expected, expected_logits = prefill(params, cache, logits, chunk, TINY)
    np.testing.assert_allclose(new, expected_logits, rtol=0, atol=1e-5)
    np.testing.assert_allclose(after["kv"], expected["kv"], rtol=0, atol=1e-5)


def test_seeded_draws_do_not_depend_on_the_step_count(params: Any, prefilled: tuple[Any, jax.Array]) -> None:
    """Sampling, too, gives the same tokens for any number of tokens a device loop."""

    def run(per_call: int) -> np.ndarray:
        (cache, logits), state, tokens = prefilled, greedy_state([0] * ROWS), []
        state["sampling"]["temperature"] = jnp.full(ROWS, 0.8, jnp.float32)
        state["sampling"]["seed"] = jnp.asarray([5, 6, 7], jnp.uint32)
        for _ in range(8 // per_call):
            cache, logits, state, new, _ = decode(params, cache, logits, state, steps(per_call), TINY)
            tokens.append(np.asarray(new)[:, :per_call])
        return np.hstack(tokens)

    expected = run(8)
    np.testing.assert_array_equal(run(1), expected)
    np.testing.assert_array_equal(run(4), expected)


@pytest.mark.parametrize("capacity", [0, 1, CAPACITY_STEP - 1, CAPACITY_STEP + 32, -CAPACITY_STEP])
def test_capacities_are_whole_steps(capacity: int) -> None:
    with pytest.raises(ValueError, match=f"capacity {capacity} must be"):
        init_cache(TINY, 1, capacity, jnp.float32)


def temporary_bytes(function: Any, *args: Any, **static: Any) -> int:
    """Memory that a compiled program needs beside its arguments and results."""
    analysis = jax.jit(function, static_argnames=tuple(static)).lower(*args, **static).compile().memory_analysis()
    assert analysis is not None
    return analysis.temp_size_in_bytes


def shapes(tree: Any) -> Any:
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


@pytest.mark.slow
def test_prefill_memory_is_chunk_times_context() -> None:
    """32 tokens against 16,384 slots: a few [chunk, context] arrays in float32 beside the cache. One array of
    [context, context] would be a thousand times 1 MiB."""
    params = abstract_params(TINY, jnp.float32)["text"]
    chunk = shapes(text_chunk(np.zeros((1, 32)), np.zeros((3, 1, 32)), [32], TINY.text.hidden_size))
    cache, logits = abstract_cache(TINY, 1, 16384, jnp.float32), shapes(empty_logits(TINY, 1))
    needed = temporary_bytes(graphs.prefill, params, cache, logits, chunk, config=TINY)
    assert needed <= 8 * 32 * 16384 * 4


@pytest.mark.slow
def test_full_forward_memory_is_chunk_times_prompt() -> None:
    """16,384 tokens in one call: a few [chunk, prompt] arrays beside the logits it returns, a quarter of one
    [prompt, prompt] array."""
    T = 16384
    needed = temporary_bytes(
        forward_program,
        abstract_params(TINY, jnp.float32)["text"],
        jax.ShapeDtypeStruct((1, T), jnp.int32),
        jax.ShapeDtypeStruct((3, 1, T), jnp.int32),
        jax.ShapeDtypeStruct((1, TINY.text.hidden_size), jnp.float32),
        jax.ShapeDtypeStruct((1, T), bool),
        config=TINY,
    )
    assert needed <= 8 * PREFILL_CHUNK * T * 4


def test_segment_attention_memory_is_linear() -> None:
    small, large = (
        temporary_bytes(
            segment_attention,
            *[jax.ShapeDtypeStruct((N, 3, 16), jnp.float32)] * 3,
            jax.ShapeDtypeStruct((N, 2), jnp.int32),
        )
        for N in (1024, 8192)
    )
    assert large <= 8 * small
