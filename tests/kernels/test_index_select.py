"""index_select against sorting in plain Python.

Queries, keys and weights are small integers: every product and sum is then exact in float32, so that sets must be
equal to the last member, and equal scores are everywhere.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_pallas.common import pack_bits, unpack_bits
from kernels_pallas.index_select import reference, select_bits, select_ids

CAPACITIES = (32, 96, 1120)  # one word; not a power of two; past a tile of 1024 with a ragged last one
LAYERS = 2

topk_mask = jax.jit(reference.topk_mask, static_argnums=2)
index_scores = jax.jit(reference.index_scores)
bits_of = jax.jit(select_bits, static_argnums=6)
ids_of = jax.jit(select_ids, static_argnums=6)


def sorted_mask(scores: np.ndarray, visible: np.ndarray, topk: int) -> np.ndarray:
    """The `topk` largest visible scores of a row; of equal ones those with the lower index."""
    keys = [s for s in range(len(scores)) if visible[s]]
    keys.sort(key=lambda s: (-float(scores[s]), s))
    mask = np.zeros(len(scores), bool)
    mask[keys[:topk]] = True
    return mask


FLOATS = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, -1.0, -np.inf, np.inf, 3e38, -3e38, 2.0**-126]),
    st.floats(width=32, allow_nan=False, allow_subnormal=False),  # platforms differ in flushing those to zero
)


@given(
    pool=st.lists(FLOATS, min_size=1, max_size=12),
    shape=st.sampled_from([(1, 1), (1, 2), (31, 7), (32, 32), (97, 1), (97, 32), (97, 200)]),
    seed=st.integers(0, 2**32 - 1),
)
def test_topk_mask_of_any_scores(pool: list[float], shape: tuple[int, int], seed: int) -> None:
    """Ties, both zeros, infinities and huge scores; more or fewer visible keys than topk, or none."""
    (size, topk), rng = shape, np.random.default_rng(seed)
    scores = rng.choice(np.array(pool, np.float32), size)
    visible = rng.random(size) < rng.random()
    actual = np.asarray(topk_mask(jnp.asarray(scores), jnp.asarray(visible), topk))
    np.testing.assert_array_equal(actual, sorted_mask(scores, visible, topk))


@pytest.mark.parametrize("value", [0.0, -0.0, -3.5, np.inf, -np.inf])
@pytest.mark.parametrize("topk", [1, 31, 32, 33])
def test_equal_scores_keep_the_lowest_keys(value: float, topk: int) -> None:
    mask = topk_mask(jnp.full((3, 97), value, jnp.float32), jnp.ones((3, 97), bool), topk)
    np.testing.assert_array_equal(mask, np.broadcast_to(np.arange(97) < topk, (3, 97)))


def test_zeros_of_both_signs_are_one_value() -> None:
    scores = jnp.array([-0.0, 0.0, -1.0, 0.0, -0.0, 1.0])
    np.testing.assert_array_equal(np.flatnonzero(topk_mask(scores, jnp.ones(6, bool), 3)), [0, 1, 5])


def test_sortable_keeps_order() -> None:
    values = np.array([-np.inf, -3e38, -1.5, -(2.0**-126), 0.0, 2.0**-126, 1.0, 1.5, 3e38, np.inf], np.float32)
    keys = np.asarray(reference.sortable(jnp.asarray(values))).astype(np.int64)
    assert (np.diff(keys) > 0).all()
    # Zero is what hidden keys are given: below every score.
    assert keys[0] > 0


@settings(max_examples=10)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 3]))
def test_bits_pack_and_unpack(seed: int, words: int) -> None:
    mask = np.random.default_rng(seed).random((3, 32 * words)) < 0.5
    bits = np.asarray(pack_bits(jnp.asarray(mask)))
    for row in range(3):
        for key in range(32 * words):
            assert bool(bits[row, key // 32] >> (key % 32) & 1) == mask[row, key]
    np.testing.assert_array_equal(unpack_bits(jnp.asarray(bits)), mask)


def integer_inputs(seed: int, capacity: int, chunk: int, *, scaled: bool, dtype: Any) -> dict[str, Any]:
    """Arguments of `select_bits` for B = 2, J = 3, I = 8, all small integers (scales are powers of two)."""
    rng = np.random.default_rng(seed)
    B, J, I = 2, 3, 8  # noqa: E741
    return {
        "idx_q": jnp.asarray(rng.integers(-2, 3, (B, chunk, J, I)), dtype),
        "weights": jnp.asarray(rng.integers(-1, 3, (B, chunk, J)), jnp.float32),
        "idx_k": jnp.asarray(rng.integers(-2, 3, (LAYERS, B, capacity, I)), dtype),
        "key_scale": jnp.asarray(2.0 ** rng.integers(-2, 3, (LAYERS, B, capacity)), jnp.float32) if scaled else None,
    }


def plain_scores(inputs: dict[str, Any], layer: int) -> np.ndarray:
    """[B, C, S] in float64, without a causal mask."""
    q, w, k = (np.asarray(inputs[n]).astype(np.float64) for n in ("idx_q", "weights", "idx_k"))
    scores = np.zeros((*w.shape[:2], k.shape[2]))
    for j in range(w.shape[2]):
        scores += w[:, :, j, None] * np.maximum(0, np.einsum("bci,bsi->bcs", q[:, :, j], k[layer]))
    scale = inputs["key_scale"]
    return scores if scale is None else scores * np.asarray(scale)[layer][:, None]


def plain_masks(inputs: dict[str, Any], layer: int, start: np.ndarray, topk: int) -> np.ndarray:
    scores = plain_scores(inputs, layer)
    masks = np.zeros(scores.shape, bool)
    for b in range(scores.shape[0]):
        for c in range(scores.shape[1]):
            masks[b, c] = sorted_mask(scores[b, c], np.arange(scores.shape[2]) <= start[b] + c, topk)
    return masks


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    capacity=st.sampled_from(CAPACITIES),
    dtype=st.sampled_from([jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn]),
    layer=st.integers(0, LAYERS - 1),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@example(seed=0, capacity=1120, dtype=jnp.float32, layer=1, place=(0.0, 1.0))
def test_scores_of_visible_keys(seed: int, capacity: int, dtype: Any, layer: int, place: tuple[float, float]) -> None:
    """Exact scores up to each query's own key, minus infinity behind it, for rows of different lengths."""
    chunk = 5
    inputs = integer_inputs(seed, capacity, chunk, scaled=dtype == jnp.float8_e4m3fn, dtype=dtype)
    start = np.array([int(p * (capacity - chunk)) for p in place], np.int32)
    actual = np.asarray(index_scores(**inputs, layer=layer, start=jnp.asarray(start)))
    expected = plain_scores(inputs, layer)
    visible = np.arange(capacity) <= start[:, None, None] + np.arange(chunk)[:, None]
    np.testing.assert_array_equal(actual, np.where(visible, expected, -np.inf))


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from([(32, 1, 1), (96, 5, 32), (96, 5, 96), (96, 5, 500), (1120, 5, 40)]),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
)
@example(seed=1, shape=(96, 5, 32), place=(0.0, 0.0))  # fewer keys than topk
@example(seed=1, shape=(96, 5, 32), place=(0.297, 0.297))  # topk passed inside the chunk (27 + 5 keys and more)
def test_bits_and_ids_are_the_sorted_sets(seed: int, shape: tuple[int, int, int], place: tuple[float, float]) -> None:
    """For a chunk, and one query after the other: the same sets."""
    capacity, chunk, topk = shape
    inputs = integer_inputs(seed, capacity, chunk, scaled=True, dtype=jnp.float32)
    start = np.array([int(p * (capacity - chunk)) for p in place], np.int32)
    expected = plain_masks(inputs, 1, start, topk)
    arrays = (inputs["idx_k"], inputs["key_scale"], 1)
    bits = bits_of(inputs["idx_q"], inputs["weights"], *arrays, jnp.asarray(start), topk)
    assert bits.shape == (2, chunk, capacity // 32)
    np.testing.assert_array_equal(unpack_bits(bits), expected)
    for c in range(chunk):
        one = slice(c, c + 1)
        ids = np.asarray(
            ids_of(inputs["idx_q"][:, one], inputs["weights"][:, one], *arrays, jnp.asarray(start + c), topk)
        )
        assert ids.shape == (2, min(topk, capacity))
        for b in range(2):
            keys = np.flatnonzero(expected[b, c])
            np.testing.assert_array_equal(ids[b], np.pad(keys, (0, ids.shape[1] - len(keys)), constant_values=-1))


def test_all_negative_scores_are_ranked_too() -> None:
    """Gates may be negative: a set is still full, and zero (all heads rectified) beats a negative score."""
    inputs = integer_inputs(0, 32, 2, scaled=False, dtype=jnp.float32)
    inputs["weights"] = -jnp.ones_like(inputs["weights"])
    start = np.array([20, 29], np.int32)
    bits = bits_of(*(inputs[n] for n in ("idx_q", "weights", "idx_k", "key_scale")), 0, jnp.asarray(start), 4)
    masks = np.asarray(unpack_bits(bits))
    np.testing.assert_array_equal(masks, plain_masks(inputs, 0, start, 4))
    assert (masks.sum(-1) == 4).all()


def test_huge_scores_stay_ordered() -> None:
    """Scores near the end of float32, where sums overflow to infinity, still give full sets and no NaN."""
    q = jnp.full((1, 2, 1, 4), 1e18, jnp.float32)
    k = jnp.full((1, 1, 32, 4), 1e18, jnp.float32) * jnp.where(jnp.arange(32) % 2, 1.0, 10.0)[:, None]
    bits = bits_of(q, jnp.full((1, 2, 1), 100.0), k, None, 0, jnp.array([30], jnp.int32), 4)
    masks = np.asarray(unpack_bits(bits))
    # Everything overflows: all tie at infinity.
    np.testing.assert_array_equal(masks, np.broadcast_to(np.arange(32) < 4, (1, 2, 32)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"weights": (2, 5, 4)}, "weights"),
        ({"idx_k": (2, 3, 32, 8)}, "idx_k"),
        ({"idx_k": (2, 2, 32, 4)}, "idx_k"),
        ({"key_scale": (2, 2, 31)}, "key_scale"),
        ({"idx_k": (2, 2, 40, 8), "key_scale": (2, 2, 40)}, "multiple of 32"),
        ({"topk": 0}, "topk=0"),
    ],
)
def test_wrong_shapes_are_refused(change: dict[str, Any], words: str) -> None:
    shapes = {"idx_q": (2, 5, 3, 8), "weights": (2, 5, 3), "idx_k": (2, 2, 32, 8), "key_scale": (2, 2, 32)}
    topk = change.get("topk", 4)
    arrays = {name: jnp.zeros(change.get(name, shape)) for name, shape in shapes.items()}
    call = partial(select_bits, **arrays, layer=0, start=jnp.zeros(2, jnp.int32), topk=topk)
    with pytest.raises(ValueError, match=words):
        call()


def test_ids_are_for_one_query_a_row() -> None:
    inputs = integer_inputs(0, 32, 2, scaled=False, dtype=jnp.float32)
    with pytest.raises(ValueError, match="one query per sequence"):
        select_ids(**inputs, layer=0, start=jnp.zeros(2, jnp.int32), topk=4)
