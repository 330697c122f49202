"""The decoder as a whole: against the dense numpy model at many sizes; and cut into chunks, batched, continued token
by token, in caches of any capacity, always with the same result."""

import dataclasses
from collections.abc import Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from keye_jax import KeyeConfig, KeyeVL, graphs
from keye_jax.params import map_specs
from tests.keye_jax.dense_numpy import Trace, decode_text
from tests.keye_jax.golden_prompts import CASES, LENGTH, MODES
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

# Relative to the largest logit. The golden logits' own distance from a float64 run is up to 1.6e-6; ours from the
# dense float64 model is up to 3e-6 (another order of summation); the rest is headroom for other platforms.
BOUND = 1e-5

each_mode = pytest.mark.parametrize("mode", MODES)


def assert_close(actual: Any, expected: Any, bound: float = BOUND) -> None:
    actual, expected = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() <= bound * np.abs(expected).max()


def resized(text: dict[str, Any] | None = None, sparse: dict[str, Any] | None = None) -> KeyeConfig:
    return dataclasses.replace(
        TINY,
        text=dataclasses.replace(TINY.text, **(text or {})),
        sparse=dataclasses.replace(TINY.sparse, **(sparse or {})),
    )


VARIANTS = {
    "one KV head, 5 experts": resized({"num_key_value_heads": 1, "num_experts": 5, "num_experts_per_tok": 3}),
    "a KV head per head, narrow hidden": resized(
        {"num_attention_heads": 3, "num_key_value_heads": 3, "hidden_size": 40, "num_experts": 7},
        {"indexer_num_heads": 1},
    ),
    "topk beyond the context, one layer": resized({"num_hidden_layers": 1}, {"topk": 500}),
    "topk 1, all experts": resized({"num_experts": 3, "num_experts_per_tok": 3}, {"topk": 1, "indexer_num_heads": 3}),
    "interleaved, wide heads": resized(
        {"head_dim": 32, "mrope_section": (4, 6, 6), "mrope_interleaved": True}, {"indexer_head_dim": 16}
    ),
    "interleaved indexer only, weights as they are": resized(
        {"norm_topk_prob": False, "rms_norm_eps": 1e-5}, {"mrope_interleaved": True, "indexer_head_dim": 16}
    ),
    "fp8": resized({"num_attention_heads": 6}, {"indexer_dtype": "fp8", "indexer_num_heads": 3}),
}
TOKENS = 45  # no multiple of the 8 that lengths are rounded to


@pytest.fixture(scope="module")
def dense() -> dict[str, Trace]:
    """The dense model's run of every variant."""
    traces = {}
    for name, config in VARIANTS.items():
        text = random_params(config)["text"]
        ids, positions = text_prompt(config, TOKENS)
        traces[name] = decode_text(text, np.asarray(text["embed_tokens"])[ids], positions, config)
        # Else a rounding error may change a set and the comparison says nothing: take another seed.
        assert traces[name].smallest_gap(config.sparse.topk) > 1e-5
    return traces


@pytest.mark.parametrize("name", VARIANTS)
def test_equals_the_dense_model(dense: dict[str, Trace], name: str) -> None:
    config = VARIANTS[name]
    ids, positions = text_prompt(config, TOKENS)
    logits = KeyeVL(config, random_params(config))(jnp.asarray(ids)[None], jnp.asarray(positions)[:, None])
    assert logits.dtype == jnp.float32
    assert_close(logits[0], dense[name].logits)


@pytest.mark.parametrize("name", ["topk 1, all experts", "fp8"])
def test_token_by_token_equals_the_dense_model(dense: dict[str, Trace], name: str) -> None:
    """Every token through the decode form of a layer (listed keys instead of bits)."""
    config = VARIANTS[name]
    text = random_params(config)["text"]
    ids, positions = text_prompt(config, TOKENS)
    cache, logits = empty_cache(config, 1), empty_logits(config, 1)
    for t in range(TOKENS):
        chunk = text_chunk(ids[None, t : t + 1], positions[:, None, t : t + 1], [1], config.text.hidden_size)
        cache, logits = prefill(text, cache, logits, chunk, config)
        assert_close(logits[0], dense[name].logits[t], bound=2 * BOUND)


def test_prompt_longer_than_a_prefill_chunk() -> None:
    """A prompt that the library call takes in two steps. One layer, so that a row whose set hangs on rounding (left
    out) says nothing about others."""
    config = resized({"num_hidden_layers": 1}, {"topk": 100})
    text = random_params(config)
    ids, positions = text_prompt(config, 530)
    trace = decode_text(text["text"], np.asarray(text["text"]["embed_tokens"])[ids], positions, config)
    ranked = -np.sort(-np.maximum(trace.scores[0], -1e9), axis=-1)
    clear = (ranked[:, 99] - ranked[:, 100] > 1e-5 * ranked[:, 0]) | (np.arange(530) < 100)
    assert clear[512:].sum() >= 10
    logits = KeyeVL(config, text)(jnp.asarray(ids)[None], jnp.asarray(positions)[:, None])
    assert_close(logits[0][clear], trace.logits[clear])


def feed(
    params: Any, config: KeyeConfig, batch: dict[str, jax.Array], splits: Iterable[np.ndarray], width: int, cache: Any
) -> tuple[Any, jax.Array, list[np.ndarray]]:
    """Prefills `batch` in chunks of `width` slots of which `splits` [6] count; slots that do not count hold garbage.

    Returns:
        The cache, the last logits, and the logits after every chunk.
    """
    rng = np.random.default_rng(0)
    source = {name: np.asarray(batch[name]) for name in ("tokens", "positions", "vision_rows", "is_vision")}
    done, logits, seen = np.zeros(len(CASES), int), empty_logits(config, len(CASES)), []
    for counts in splits:
        tokens = rng.integers(0, config.text.vocab_size, (len(CASES), width)).astype(np.int32)
        positions = rng.integers(0, 10**5, (3, len(CASES), width)).astype(np.int32)
        rows = 1e3 * rng.standard_normal((len(CASES), width, config.text.hidden_size)).astype(np.float32)
        is_vision = rng.random((len(CASES), width)) < 0.5
        for row, count in enumerate(counts):
            part = slice(done[row], done[row] + count)
            tokens[row, :count] = source["tokens"][row, part]
            positions[:, row, :count] = source["positions"][:, row, part]
            rows[row, :count] = source["vision_rows"][row, part]
            is_vision[row, :count] = source["is_vision"][row, part]
        chunk = graphs.Chunk(
            tokens=jnp.asarray(tokens),
            positions=jnp.asarray(positions),
            vision_rows=jnp.asarray(rows),
            is_vision=jnp.asarray(is_vision),
            valid=jnp.asarray(counts, jnp.int32),
        )
        cache, logits = prefill(params["text"], cache, logits, chunk, config)
        seen.append(np.asarray(logits))
        done += counts
    return cache, logits, seen


def equal_chunks(valid: jax.Array, width: int) -> list[np.ndarray]:
    """Counts of chunks of `width` tokens until every row is through."""
    lengths = np.asarray(valid)
    return [np.clip(lengths - start, 0, width) for start in range(0, lengths.max(), width)]


@pytest.fixture(scope="module")
def one_shot(golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array]) -> dict[str, Any]:
    """Per mode, the cache and logits after the golden prompts in one chunk."""
    results = {}
    for mode, config in golden_configs.items():
        counts = [np.asarray(golden_batch["valid"])]
        cache = empty_cache(config, len(CASES))
        results[mode] = feed(golden_params, config, golden_batch, counts, LENGTH, cache)[:2]
    return results


def assert_same_state(actual: tuple[Any, jax.Array], expected: tuple[Any, jax.Array]) -> None:
    """Equal logits and lengths; caches equal where tokens lie."""
    (cache, logits), (expected_cache, expected_logits) = jax.device_get((actual, expected))
    np.testing.assert_array_equal(cache["length"], expected_cache["length"])
    for row, tokens in enumerate(cache["length"]):
        assert_close(logits[row], expected_logits[row])
        assert_close(cache["kv"][:, row, :tokens], expected_cache["kv"][:, row, :tokens])
        if "idx_scale" not in cache:
            assert_close(cache["idx_k"][:, row, :tokens], expected_cache["idx_k"][:, row, :tokens])


@st.composite
def random_splits(draw: st.DrawFn, width: int) -> list[list[int]]:
    """For every row, chunk lengths from 0 to `width` whose sum reaches LENGTH."""
    rows = []
    for _ in CASES:
        lengths: list[int] = []
        while sum(lengths) < LENGTH:
            lengths.append(draw(st.integers(0 if len(lengths) < 5 else width // 2, width)))
        rows.append(lengths)
    return rows


@pytest.mark.slow
@settings(max_examples=5)
@given(splits=random_splits(16), mode=st.sampled_from(MODES))
@example(splits=[[16] * 7] * 6, mode="fp8_on")
@example(splits=[[1] + [16] * 7] * 6, mode="fp8_on")
@example(splits=[[0] * row + [7] * 16 for row in range(6)], mode="fp8_off")
def test_any_chunks_equal_one_shot(
    golden_params: Any,
    golden_configs: Any,
    golden_batch: dict[str, jax.Array],
    one_shot: Any,
    splits: list[list[int]],
    mode: str,
) -> None:
    """Every row cut on its own, empty chunks included. Golden prompts, whose sets do not hang on rounding."""
    config, left = golden_configs[mode], np.asarray(golden_batch["valid"]).copy()
    counts = []
    for turn in range(max(map(len, splits))):
        now = np.array([row[turn] if turn < len(row) else 0 for row in splits])
        counts.append(np.minimum(now, left))
        left -= counts[-1]
    assert not left.any()
    state = feed(golden_params, config, golden_batch, counts, 16, empty_cache(config, len(CASES)))[:2]
    assert_same_state(state, one_shot[mode])


@pytest.mark.slow
@each_mode
def test_token_by_token_equals_the_full_forward(
    golden: dict[str, np.ndarray],
    golden_params: Any,
    golden_configs: Any,
    golden_batch: dict[str, jax.Array],
    one_shot: Any,
    mode: str,
) -> None:
    """The decode form of a layer, from the first token on, against the golden logits of every position."""
    config, counts = golden_configs[mode], equal_chunks(golden_batch["valid"], 1)
    cache = empty_cache(config, len(CASES))
    cache, logits, seen = feed(golden_params, config, golden_batch, counts, 1, cache)
    assert_same_state((cache, logits), one_shot[mode])
    for row, case in enumerate(CASES):
        expected = golden[f"{case}/{mode}/logits"]
        assert_close(np.stack(seen)[: len(expected), row], expected)


@pytest.mark.slow
def test_capacity_does_not_matter(
    golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array], one_shot: Any
) -> None:
    """A larger cache, past a tile of the scores and of attention (1152 slots divide into neither), in chunks of 7,
    which divide nothing."""
    config, counts = golden_configs["fp8_on"], equal_chunks(golden_batch["valid"], 7)
    cache = empty_cache(config, len(CASES), 1152)
    state = feed(golden_params, config, golden_batch, counts, 7, cache)[:2]
    assert_same_state(state, one_shot["fp8_on"])


def test_stale_slots_are_never_read(
    golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array], one_shot: Any
) -> None:
    """A cache full of an earlier conversation gives the same logits, to the last bit."""
    config = golden_configs["fp8_off"]
    rng = np.random.default_rng(0)
    clean = empty_cache(config, len(CASES))
    stale = {
        name: array if name == "length" else jnp.asarray(100 * rng.standard_normal(array.shape), array.dtype)
        for name, array in clean.items()
    }
    counts = equal_chunks(golden_batch["valid"], 16)
    expected, actual = (feed(golden_params, config, golden_batch, counts, 16, cache)[1] for cache in (clean, stale))
    np.testing.assert_array_equal(actual, expected)


@pytest.mark.slow
def test_batch_equals_single_runs(
    golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array], one_shot: Any
) -> None:
    """A batch of unequal prompts, prefilled and decoded, against each prompt alone. Rows finish at different times;
    a finished row disturbs no other."""
    config, rows = golden_configs["fp8_on"], len(CASES)
    budgets = np.array([16, 3, 16, 1, 7, 16], np.int32)
    state = greedy_state(golden_batch["delta"])
    state["budget"] = jnp.asarray(budgets)
    result = decode(golden_params["text"], *one_shot["fp8_on"], state, steps(16), config)
    together, _, _, together_tokens, _ = jax.device_get(result)
    for row in range(rows):
        part: Any = {
            name: golden_batch[name][:, row : row + 1] if name == "positions" else golden_batch[name][row : row + 1]
            for name in graphs.Chunk.__annotations__
        }
        cache, logits = prefill(golden_params["text"], empty_cache(config, 1), empty_logits(config, 1), part, config)
        assert_close(logits[0], one_shot["fp8_on"][1][row])
        alone = greedy_state(golden_batch["delta"][row : row + 1], budget=int(budgets[row]))
        result = decode(golden_params["text"], cache, logits, alone, steps(16), config)
        cache, _, _, tokens, _ = jax.device_get(result)
        np.testing.assert_array_equal(tokens[0], together_tokens[row])
        assert (tokens[0] >= 0).sum() == budgets[row]
        # The last token of a spent budget is returned and not cached.
        held = int(golden_batch["valid"][row]) + budgets[row] - 1
        assert cache["length"][0] == together["length"][row] == held
        assert_close(cache["kv"][:, 0, :held], together["kv"][:, row, :held])


def in_bfloat16(params: dict[str, Any], config: KeyeConfig) -> dict[str, Any]:
    dtypes = map_specs(lambda spec: spec.as_dtype(jnp.bfloat16), config)
    return jax.tree.map(lambda x, dtype: jnp.asarray(np.asarray(x).astype(dtype)), params, dtypes)


@pytest.mark.slow
def test_bfloat16_stays_near_float32(
    golden: dict[str, np.ndarray], golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array]
) -> None:
    """Patches to logits in bfloat16. Bounds are relative to the largest value, a good half above what
    `python -m benchmarks.precision` measures: without selection, rounding alone (0.018, mean 0.0026); with it, other
    keys and experts wherever two score almost alike, of which random weights have many (mean 0.024)."""
    config = golden_configs["fp8_on"]
    model = KeyeVL(config, in_bfloat16(golden_params, config))
    encoded = model.encode_vision(
        jnp.asarray(golden["video/pixel_values_videos"]), jnp.asarray(golden["video/video_grid_thw"])
    )
    assert encoded.dtype == jnp.bfloat16
    assert_close(encoded.astype(jnp.float32), golden["video/video_tokens"], 0.03)
    rows = golden_batch["vision_rows"][golden_batch["is_vision"]]
    logits = np.asarray(model(golden_batch["tokens"], golden_batch["positions"], vision_rows=rows))
    assert np.isfinite(logits).all()
    for row, case in enumerate(CASES):
        expected = golden[f"{case}/fp8_on/logits"]
        error = np.abs(logits[row, : len(expected)] - expected) / np.abs(expected).max()
        assert error.mean() <= 0.04
        if case == "text_short":  # fewer tokens than topk
            assert error.mean() <= 0.005
            assert error.max() <= 0.03


@pytest.fixture(scope="module")
def tiny_model() -> KeyeVL:
    return KeyeVL(TINY, random_params(TINY))


@pytest.mark.parametrize(
    ("ids", "positions", "rows", "words"),
    [
        (np.zeros(5, int), np.zeros((3, 1, 5), int), None, "input_ids"),
        (np.zeros((1, 5), int), np.zeros((3, 5), int), None, "position_ids"),
        (np.zeros((1, 5), int), np.zeros((3, 1, 6), int), None, "position_ids"),
        (np.zeros((1, 5), int), np.zeros((3, 1, 5), int), np.zeros((2, 64)), "0 image and video pad tokens"),
        (np.full((1, 5), 95), np.zeros((3, 1, 5), int), None, "5 image and video pad tokens"),
        (np.full((1, 5), 96), np.zeros((3, 1, 5), int), np.zeros((4, 64)), "5 image and video pad tokens"),
    ],
)
def test_call_refuses_what_does_not_fit(tiny_model: KeyeVL, ids: Any, positions: Any, rows: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_model(ids, positions, vision_rows=rows)


@pytest.mark.parametrize(
    ("patches", "grid", "words"),
    [
        ((8, 3, 14, 14), [[1, 2, 2]], "does not add up to 8"),
        ((6, 3, 14, 14), [[1, 2, 3]], "multiples of 2"),
        ((8, 3, 14, 14), [[-1, -4, 2]], "multiples of 2"),
        ((4, 3, 12, 14), [[1, 2, 2]], "patches"),
        ((4, 588), [[1, 2, 2]], "patches"),
        ((4, 3, 14, 14), [[2, 2]], "grid_thw"),
    ],
)
def test_encode_vision_refuses_what_does_not_fit(
    tiny_model: KeyeVL, patches: tuple[int, ...], grid: list[list[int]], words: str
) -> None:
    with pytest.raises(ValueError, match=words):
        tiny_model.encode_vision(jnp.zeros(patches), jnp.asarray(grid))


def test_weights_must_fit_the_config() -> None:
    params = random_params(TINY)
    with pytest.raises(ValueError, match=r"text/embed_tokens is \(97, 64\)"):
        KeyeVL(resized({"vocab_size": 98}), params)
    with pytest.raises(ValueError, match="text/norm is missing or not declared"):
        KeyeVL(TINY, {**params, "text": {k: v for k, v in params["text"].items() if k != "norm"}})


def test_dtype_must_be_known(tmp_path: Any) -> None:
    with pytest.raises(ValueError, match="float16"):
        KeyeVL.from_hf(tmp_path, dtype="float16")
