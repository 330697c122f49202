"""sparse_attention against a softmax over the selected keys in float64, one query and one head at a time."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_pallas.common import pack_bits
from kernels_pallas.sparse_attention import attend_bits, attend_bits_lse, attend_ids, attend_ids_lse

B, H, K, LAYERS = 2, 4, 8, 2
# Capacity (with tiles of 32, 32, 128 and 32: the largest that divides), key/value heads, dtype.
SHAPES = [(32, 4, jnp.float32), (96, 1, jnp.float32), (128, 2, jnp.bfloat16), (544, 2, jnp.float32)]

bits_attention = jax.jit(attend_bits)
ids_attention = jax.jit(attend_ids)

# float32: sums of at most 544 terms of size one; bfloat16: operands and probabilities are rounded to 8 bits.
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def plain_attention(q: Any, kv: Any, layer: int, mask: np.ndarray) -> np.ndarray:
    """[B, C, H, K] for q [B, C, H, K] and mask [B, C, S]; zero where a query sees nothing."""
    q, rows = np.asarray(q).astype(np.float64), np.asarray(kv)[layer].astype(np.float64)
    group = q.shape[2] // rows.shape[3]
    out = np.zeros(q.shape)
    for b, c, h in np.ndindex(q.shape[:3]):
        keys, values = rows[b, mask[b, c], :, h // group].swapaxes(0, 1)
        if len(keys):
            p = np.exp(keys @ q[b, c, h] / np.sqrt(q.shape[3]))
            out[b, c, h] = p @ values / p.sum()
    return out


def random_inputs(seed: int, capacity: int, chunk: int, kv_heads: int, dtype: Any) -> tuple[jax.Array, jax.Array]:
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((B, chunk, H, K)), dtype)
    return q, jnp.asarray(rng.standard_normal((LAYERS, B, capacity, 2, kv_heads, K)), dtype)


@settings(max_examples=40)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    place=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    density=st.sampled_from([0.0, 0.02, 0.5, 1.0]),
)
@example(seed=0, shape=SHAPES[3], place=(0.0, 1.0), density=1.0)
@example(seed=0, shape=SHAPES[0], place=(0.0, 0.0), density=1.0)  # the first query sees one key
def test_chunks_attend_to_the_selected_keys(
    seed: int, shape: tuple[int, int, Any], place: tuple[float, float], density: float
) -> None:
    """Any sets, empty ones included, for rows of different lengths and any share of key/value heads."""
    capacity, kv_heads, dtype = shape
    chunk = 3
    q, kv = random_inputs(seed, capacity, chunk, kv_heads, dtype)
    start = np.array([int(p * (capacity - chunk)) for p in place], np.int32)
    visible = np.arange(capacity) <= start[:, None, None] + np.arange(chunk)[:, None]
    mask = visible & (np.random.default_rng(seed + 1).random(visible.shape) <= density)
    mask &= density > 0
    actual = bits_attention(q, kv, 1, pack_bits(jnp.asarray(mask)), jnp.asarray(start))
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), plain_attention(q, kv, 1, mask), rtol=0, atol=BOUNDS[dtype]
    )


@settings(max_examples=30)
@given(
    seed=st.integers(0, 2**32 - 1),
    kind=st.sampled_from([(1, jnp.float32), (2, jnp.bfloat16)]),
    counts=st.tuples(st.integers(0, 12), st.integers(0, 12)),
)
def test_single_queries_attend_to_the_listed_keys(seed: int, kind: tuple[int, Any], counts: tuple[int, int]) -> None:
    """Lists of different length in one batch; -1 marks unused slots, and a list may be empty."""
    kv_heads, dtype = kind
    q, kv = random_inputs(seed, 96, 1, kv_heads, dtype)
    rng = np.random.default_rng(seed + 1)
    ids, mask = np.full((B, 12), -1, np.int32), np.zeros((B, 1, 96), bool)
    for b, count in enumerate(counts):
        ids[b, :count] = np.sort(rng.choice(96, count, replace=False))
        mask[b, 0, ids[b, :count]] = True
    actual = ids_attention(q[:, 0], kv, 0, jnp.asarray(ids))
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(actual, np.float64), plain_attention(q, kv, 0, mask)[:, 0], rtol=0, atol=BOUNDS[dtype]
    )


@settings(max_examples=15)
@given(seed=st.integers(0, 2**32 - 1), starts=st.tuples(st.integers(-200, 300), st.integers(-4, 130)))
@example(seed=0, starts=(-3, -2))  # nothing visible, and one key of the last query
def test_parts_merge_to_the_whole(seed: int, starts: tuple[int, int]) -> None:
    """Two halves of the keys with their log-sum-exps, each with slots counted from its own first, give what all keys
    give; a half without a selected key gives zeros and -1e30."""
    capacity, chunk, half = 256, 3, 128
    q, kv = random_inputs(seed, capacity, chunk, 2, jnp.float32)
    start = np.array(starts, np.int32)
    visible = np.arange(capacity) <= start[:, None, None] + np.arange(chunk)[:, None]
    mask = visible & (np.random.default_rng(seed + 1).random(visible.shape) < 0.3)
    outs, lses = [], []
    for first in (0, half):
        own = slice(first, first + half)
        bits = pack_bits(jnp.asarray(mask[:, :, own]))
        out, lse = attend_bits_lse(q, kv[:, :, own], 1, bits, jnp.asarray(start - first))
        assert out.dtype == lse.dtype == jnp.float32
        nothing = ~mask[:, :, own].any(-1)
        assert np.all(np.asarray(lse)[nothing] == np.float32(-1e30))
        assert not np.asarray(out)[nothing].any()
        ids = np.where(mask[:, 1, own], np.arange(half), -1)
        one, one_lse = attend_ids_lse(q[:, 1], kv[:, :, own], 1, jnp.asarray(ids, jnp.int32))
        np.testing.assert_allclose(one, out[:, 1], rtol=0, atol=BOUNDS[jnp.float32])
        np.testing.assert_allclose(one_lse, lse[:, 1], rtol=1e-6, atol=BOUNDS[jnp.float32])
        outs.append(np.asarray(out, np.float64))
        lses.append(np.asarray(lse, np.float64))
    share = np.exp(np.array(lses) - np.max(lses, axis=0))
    merged = (share[..., None] * outs).sum(0) / share.sum(0)[..., None]
    np.testing.assert_allclose(merged, plain_attention(q, kv, 1, mask), rtol=0, atol=BOUNDS[jnp.float32])


def test_chunk_of_one_equals_ids() -> None:
    q, kv = random_inputs(3, 128, 1, 2, jnp.float32)
    mask = np.zeros((B, 1, 128), bool)
    ids = np.array([[0, 5, 63, 64, 127], [1, 2, 3, 4, 126]], np.int32)
    for b in range(B):
        mask[b, 0, ids[b]] = True
    chunk = bits_attention(q, kv, 0, pack_bits(jnp.asarray(mask)), jnp.full(B, 127, jnp.int32))
    np.testing.assert_allclose(chunk[:, 0], ids_attention(q[:, 0], kv, 0, jnp.asarray(ids)), rtol=0, atol=1e-6)


def test_large_scores_do_not_overflow() -> None:
    """Scores of +-1e6 make the softmax one-hot; nothing becomes NaN, also where tiles decay a running maximum."""
    q, kv = random_inputs(4, 544, 3, 2, jnp.float32)
    kv = kv.at[:, :, :, 0].multiply(1e6)
    mask = np.ones((B, 3, 544), bool)
    actual = np.asarray(bits_attention(q, kv, 0, pack_bits(jnp.asarray(mask)), jnp.full(B, 541, jnp.int32)))
    keys, values = np.asarray(kv)[0, :, :, 0], np.asarray(kv)[0, :, :, 1]
    for b, c, h in np.ndindex(B, 3, H):
        best = np.argmax(keys[b, :, h // 2].astype(np.float64) @ np.asarray(q)[b, c, h])
        np.testing.assert_allclose(actual[b, c, h], values[b, best, h // 2], rtol=1e-6)


def test_unselected_slots_do_not_count() -> None:
    """What lies in slots that are not selected, stale rows included, leaves the result as it is, to the last bit."""
    q, kv = random_inputs(5, 128, 3, 2, jnp.float32)
    mask = np.zeros((B, 3, 128), bool)
    mask[:, :, ::7] = True
    mask[:, :, 100:] = False
    bits, start = pack_bits(jnp.asarray(mask)), jnp.full(B, 100, jnp.int32)
    stale = jnp.where(jnp.asarray(mask[0, 0])[:, None, None, None], kv, 1e4)
    np.testing.assert_array_equal(bits_attention(q, kv, 1, bits, start), bits_attention(q, stale, 1, bits, start))


@pytest.mark.parametrize(
    ("q", "kv", "bits"),
    [
        ((2, 3, 4, 8), (2, 1, 32, 2, 2, 8), (2, 3, 1)),  # batch
        ((2, 3, 4, 8), (2, 2, 32, 2, 2, 16), (2, 3, 1)),  # head width
        ((2, 3, 4, 8), (2, 2, 32, 2, 3, 8), (2, 3, 1)),  # 4 query heads over 3
        ((2, 3, 4, 8), (2, 2, 32, 3, 2, 8), (2, 3, 1)),  # neither keys nor values
        ((2, 3, 4, 8), (2, 2, 32, 2, 8), (2, 3, 1)),  # an axis missing
        ((2, 3, 4, 8), (2, 2, 64, 2, 2, 8), (2, 3, 1)),  # too few words
    ],
)
def test_wrong_shapes_are_refused(q: tuple[int, ...], kv: tuple[int, ...], bits: tuple[int, ...]) -> None:
    for attend in (attend_bits, attend_bits_lse):
        with pytest.raises(ValueError, match=r"fit|multiple"):
            attend(jnp.zeros(q), jnp.zeros(kv), 0, jnp.zeros(bits, jnp.uint32), jnp.zeros(2, jnp.int32))


@pytest.mark.parametrize("ids", [(3, 5), (2, 5, 1)])
def test_wrong_lists_are_refused(ids: tuple[int, ...]) -> None:
    for attend in (attend_ids, attend_ids_lse):
        with pytest.raises(ValueError, match="ids"):
            attend(jnp.zeros((2, 4, 8)), jnp.zeros((2, 2, 32, 2, 2, 8)), 0, jnp.zeros(ids, jnp.int32))
