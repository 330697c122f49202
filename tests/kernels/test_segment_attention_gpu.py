"""The GPU body of segment_attention, interpreted, against its reference."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.pieces import column_pieces
from kernels_pallas.segment_attention import gpu, reference
from tests.kernels.test_segment_attention import spans

TINY = gpu.Tuning(queries=16, keys=16)
# float32: other order of sums; bfloat16: one unit in the last place of values up to four.
BOUNDS = {jnp.float32: 2e-6, jnp.bfloat16: 2**-6}

interpreted = jax.jit(partial(gpu.segment_attention, interpret=True), static_argnames="tuning")
expected = jax.jit(reference.segment_attention)


def check(
    lengths: list[int],
    K: int = 16,
    dtype: Any = jnp.float32,
    tuning: gpu.Tuning = TINY,
    sharpness: float = 1.0,
    bound: float | None = None,
) -> None:
    rng = np.random.default_rng(len(lengths))
    q, k, v = (jnp.asarray(rng.standard_normal((sum(lengths), 2, K)), dtype) for _ in range(3))
    q, where = q * sharpness, spans(lengths)
    actual, wanted = interpreted(q, k, v, where, tuning=tuning), expected(q, k, v, where)
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), np.asarray(wanted, np.float32), rtol=0, atol=bound or BOUNDS[dtype]
    )


@pytest.mark.parametrize(
    "lengths",
    [
        [1] * 100,  # patches behind the last image
        [16, 16, 32, 36],  # whole tiles: no masks but in the last
        [15, 1, 17, 31, 36],
        [5, 95],  # one segment in most blocks, its ends inside tiles
        [100],
        [33, *[1] * 67],
    ],
)
def test_segments_around_the_tiles(lengths: list[int]) -> None:
    check(lengths)


def test_one_token() -> None:
    check([1], K=8)


@pytest.mark.parametrize(("K", "dtype"), [(72, jnp.float32), (40, jnp.bfloat16)])
def test_head_widths(K: int, dtype: Any) -> None:
    check([20, 28, 5], K, dtype)


def test_tiles_of_the_vision_tower() -> None:
    check([70, 58, 3, 125], 72, jnp.bfloat16, gpu.DEFAULT)


def test_exponents_far_from_zero() -> None:
    """Scores of several hundred: their rounding, a few 1e-5, is what the results differ by."""
    check([5, 95], sharpness=100.0, bound=1e-3)


def test_equal_scores_average_the_values() -> None:
    q = jnp.zeros((100, 2, 16), jnp.float32)
    v = np.arange(100 * 2 * 16, dtype=np.float32).reshape(100, 2, 16)
    out = interpreted(q, q, jnp.asarray(v), spans([20, 80]), tuning=TINY)
    mean = np.concatenate([np.tile(v[:20].mean(0), (20, 1, 1)), np.tile(v[20:].mean(0), (80, 1, 1))])
    np.testing.assert_allclose(out, mean, rtol=1e-6)


@settings(max_examples=15)
@given(cuts=st.sets(st.integers(1, 99), max_size=20))
def test_ragged_segments(cuts: set[int]) -> None:
    check([b - a for a, b in pairwise([0, *sorted(cuts), 100])])


def test_supported_heads() -> None:
    heads = partial(jnp.zeros, (16, 2, 72))
    assert gpu.supports(heads(jnp.bfloat16))
    assert gpu.supports(heads(jnp.float32))
    assert not gpu.supports(heads(jnp.float16))


@pytest.mark.parametrize(
    ("width", "pieces"),
    [(8, [(0, 16)]), (64, [(0, 64)]), (72, [(0, 64), (64, 16)]), (100, [(0, 64), (64, 32), (96, 16)])],
)
def test_column_pieces(width: int, pieces: list[tuple[int, int]]) -> None:
    assert column_pieces(width) == pieces
