"""segment_attention against a float64 softmax of every segment on its own."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.segment_attention import segment_attention

H, K = 2, 8
# float32: sums of at most 600 terms of size one; bfloat16: operands and probabilities are rounded to 8 bits.
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}

attention = jax.jit(segment_attention)


def spans(lengths: list[int]) -> jax.Array:
    """Where the segment of each token begins and ends."""
    end = np.cumsum(lengths)
    return jnp.asarray(np.repeat(np.stack([end - lengths, end], axis=1), lengths, axis=0), jnp.int32)


def check(lengths: list[int], dtype: Any = jnp.float32, seed: int = 0) -> None:
    """Packs segments of the given lengths."""
    N = sum(lengths)
    rng = np.random.default_rng(seed)
    q, k, v = (jnp.asarray(rng.standard_normal((N, H, K)), dtype) for _ in range(3))
    first = np.cumsum([0, *lengths[:-1]])
    out = attention(q, k, v, spans(lengths))
    assert out.shape == (N, H, K)
    assert out.dtype == dtype
    actual = np.asarray(out, np.float64)
    wide = [np.asarray(x).astype(np.float64) for x in (q, k, v)]
    for start, length in zip(first, lengths, strict=True):
        own_q, own_k, own_v = (x[start : start + length] for x in wide)
        p = np.exp(np.einsum("qhk,shk->hqs", own_q, own_k) / np.sqrt(K))
        expected = np.einsum("hqs,shk->qhk", p / p.sum(-1, keepdims=True), own_v)
        np.testing.assert_allclose(actual[start : start + length], expected, rtol=0, atol=BOUNDS[dtype])


@pytest.mark.parametrize(
    "lengths",
    [
        [1],
        [1, 1, 1],
        [255],
        [256],
        [257],
        [256, 256],
        [255, 1, 256],
        [100, 300, 112],  # a segment across tiles that starts inside one
        [3, 506, 3],  # a segment longer than a tile, its ends inside tiles
        [600],
    ],
)
def test_segments_around_the_tile(lengths: list[int]) -> None:
    check(lengths)


def test_bfloat16() -> None:
    check([100, 300, 112], jnp.bfloat16)


@settings(max_examples=25)
@given(cuts=st.sets(st.integers(1, 599), max_size=40), seed=st.integers(0, 2**32 - 1))
def test_ragged_segments(cuts: set[int], seed: int) -> None:
    """600 tokens cut anywhere."""
    edges = [0, *sorted(cuts), 600]
    check([b - a for a, b in pairwise(edges)], seed=seed)


def test_segments_do_not_see_each_other() -> None:
    """Changing one segment leaves the others as they are, to the last bit."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal((300, H, K)).astype(np.float32) for _ in range(3))
    where = spans([120, 80, 100])
    before = np.asarray(attention(q, k, v, where))
    for x in (q, k, v):
        x[120:200] *= 1e3
    after = np.asarray(attention(q, k, v, where))
    np.testing.assert_array_equal(before[:120], after[:120])
    np.testing.assert_array_equal(before[200:], after[200:])
    assert np.isfinite(after).all()


@pytest.mark.parametrize(
    "shapes",
    [
        [(5, 2, 8), (4, 2, 8), (5, 2, 8), (5, 2)],
        [(5, 2, 8), (5, 2, 8), (5, 2, 4), (5, 2)],
        [(5, 2, 8), (5, 2, 8), (5, 2, 8), (4, 2)],
        [(5, 2, 8), (5, 2, 8), (5, 2, 8), (5,)],
        [(5, 16), (5, 16), (5, 16), (5, 2)],
    ],
)
def test_wrong_shapes_are_refused(shapes: list[tuple[int, ...]]) -> None:
    q, k, v, where = shapes
    with pytest.raises(ValueError, match="do not fit"):
        segment_attention(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), jnp.zeros(where, jnp.int32))
