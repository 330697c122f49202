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
    "tiny": TINY,
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
    "fp8": resized({"num_attention_heads": 6}, {"indexer_dtype": "fp8", "indexer_num_heads": 4}),
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


@pytest.mark.parametrize("name", ["one KV head, 5 experts", "topk 1, all experts", "fp8"])
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
    ranked = -np.sort(-trace.scores[0], axis=-1)
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
    (cache, logits), (expected_cache, expected_logits) = actual, expected
    np.testing.assert_array_equal(cache["length"], expected_cache["length"])
    for row in range(len(CASES)):
        assert_close(logits[row], expected_logits[row])
        tokens = int(cache["length"][row])
        assert_close(cache["kv"][:, row, :tokens], expected_cache["kv"][:, row, :tokens])
    if "idx_scale" not in cache:
        assert_close(cache["idx_k"], expected_cache["idx_k"])


@st.composite
def random_splits(draw: st.DrawFn, width: int) -> list[list[int]]:
    """For every row, chunk lengths from 0 to `width` whose sum reaches LENGTH."""
    rows = []
    for _ in CASES:
        lengths: list[int] = []
        while sum(lengths) < LENGTH:
            lengths.append(draw(st.integers(0 if len(lengths) < 5 else 4, width)))
        rows.append(lengths)
    return rows


@settings(max_examples=15)
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


@pytest.mark.parametrize("width", [7, 40])
def test_chunk_widths_equal_one_shot(
    golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array], one_shot: Any, width: int
) -> None:
    """Widths that divide neither the prompts nor the capacity."""
    config, counts = golden_configs["fp8_on"], equal_chunks(golden_batch["valid"], width)
    state = feed(golden_params, config, golden_batch, counts, width, empty_cache(config, len(CASES)))[:2]
    assert_same_state(state, one_shot["fp8_on"])


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


@pytest.mark.parametrize("tokens", [256, 1152])
def test_capacity_does_not_matter(
    golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array], one_shot: Any, tokens: int
) -> None:
    """Larger caches, past a tile of the scores and of attention (1152 slots divide into neither)."""
    config = golden_configs["fp8_on"]
    cache = empty_cache(config, len(CASES), tokens)
    counts = equal_chunks(golden_batch["valid"], 40)
    cache, logits, _ = feed(golden_params, config, golden_batch, counts, 40, cache)
    for row in range(len(CASES)):
        assert_close(logits[row], one_shot["fp8_on"][1][row])


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
    results = [feed(golden_params, config, golden_batch, counts, 16, cache)[1] for cache in (clean, stale)]
    np.testing.assert_array_equal(*results)


def test_batch_equals_single_runs(
    golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array], one_shot: Any
) -> None:
    """A batch of unequal prompts, prefilled and decoded, against each prompt alone. Rows finish at different times;
    a finished row disturbs no other."""
    config, rows = golden_configs["fp8_on"], len(CASES)
    budgets = np.array([16, 3, 16, 1, 7, 16], np.int32)
    state = greedy_state(golden_batch["delta"])
    state["budget"] = jnp.asarray(budgets)
    together = decode(golden_params["text"], *one_shot["fp8_on"], state, steps(16), config)
    for row in range(rows):
        part: Any = {
            name: golden_batch[name][:, row : row + 1] if name == "positions" else golden_batch[name][row : row + 1]
            for name in graphs.Chunk.__annotations__
        }
        cache, logits = prefill(golden_params["text"], empty_cache(config, 1), empty_logits(config, 1), part, config)
        assert_close(logits[0], one_shot["fp8_on"][1][row])
        alone = greedy_state(golden_batch["delta"][row : row + 1], budget=int(budgets[row]))
        cache, logits, _, tokens, _ = decode(golden_params["text"], cache, logits, alone, steps(16), config)
        np.testing.assert_array_equal(tokens[0], together[3][row])
        assert int((tokens[0] >= 0).sum()) == budgets[row]
        # The last token of a spent budget is returned and not cached.
        held = int(golden_batch["valid"][row]) + budgets[row] - 1
        assert int(cache["length"][0]) == int(together[0]["length"][row]) == held
        assert_close(cache["kv"][:, 0, :held], together[0]["kv"][:, row, :held])


# bf16 against float32 on the golden prompts; `python -m benchmarks.precision` measures the same. Of the largest logit:
# measured, headroom. Weights are rounded to 8 bits, so a product of 128 terms is off by 2**-9 / sqrt(128) of ...
BF16_LARGEST, BF16_MEAN = 0.1, 0.01


def test_bfloat16_stays_near_float32(
    golden: dict[str, np.ndarray], golden_params: Any, golden_configs: Any, golden_batch: dict[str, jax.Array]
) -> None:
    """Patches to logits in bfloat16."""
    params = jax.tree.map(lambda x: x, golden_params)
    from keye_jax.params import map_specs

    config = golden_configs["fp8_on"]
    dtypes = map_specs(lambda spec: spec.as_dtype(jnp.bfloat16), config)
    params = jax.tree.map(lambda x, dtype: x.astype(dtype), params, dtypes)
    model = KeyeVL(config, params)
    rows = model.encode_vision(
        jnp.asarray(np.concatenate([golden["mixed/pixel_values"], golden["mixed/pixel_values_videos"]])),
        jnp.asarray(np.concatenate([golden["mixed/image_grid_thw"], golden["mixed/video_grid_thw"]])),
    )
    assert rows.dtype == jnp.bfloat16
    expected = np.concatenate([golden["mixed/image_tokens"], golden["mixed/video_tokens"]])
    assert_close(rows.astype(jnp.float32), expected, 0.05)
    rows = golden_batch["vision_rows"][golden_batch["is_vision"]]
    logits = np.asarray(model(golden_batch["tokens"], golden_batch["positions"], vision_rows=rows))
    assert np.isfinite(logits).all()
    for row, case in enumerate(CASES):
        expected = golden[f"{case}/fp8_on/logits"]
        error = np.abs(logits[row, : len(expected)] - expected) / np.abs(expected).max()
        print(case, error.max(), error.mean())
