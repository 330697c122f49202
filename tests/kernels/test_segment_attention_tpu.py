"""The TPU body of segment_attention, interpreted on the CPU, against its reference."""

from functools import partial
from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.segment_attention import reference, segment_attention, tpu
from tests.kernels.test_segment_attention import spans
from tests.kernels.test_segment_attention_gpu import BOUNDS

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")

interpreted = jax.jit(partial(tpu.segment_attention, tuning=tpu.Tuning(128), interpret=INTERPRET))
expected = jax.jit(reference.segment_attention)


def check(
    lengths: list[int],
    heads: tuple[int, int] = (2, 16),
    dtype: Any = jnp.float32,
    sharpness: float = 1.0,
    bound: float | None = None,
) -> None:
    """Packs segments of the given lengths; heads: how many, and how wide."""
    rng = np.random.default_rng(len(lengths))
    q, k, v = (jnp.asarray(rng.standard_normal((sum(lengths), *heads)), dtype) for _ in range(3))
    q, where = q * sharpness, spans(lengths)
    actual, wanted = jax.block_until_ready(interpreted(q, k, v, where)), expected(q, k, v, where)
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    assert actual.dtype == dtype
    np.testing.assert_allclose(
        np.asarray(actual, np.float32), np.asarray(wanted, np.float32), rtol=0, atol=bound or BOUNDS[dtype]
    )


@pytest.mark.parametrize(
    "lengths",
    [
        [1] * 256,  # patches behind the last image
        [128, 128, 256],  # whole tiles: no masks
        [127, 1, 129, 255],
        [5, 507],  # one segment in most blocks, its ends inside tiles
        [300],  # padded
        [33, *[1] * 67],
    ],
)
def test_segments_around_the_tiles(lengths: list[int]) -> None:
    check(lengths)


@pytest.mark.parametrize(
    ("heads", "dtype"),
    [((1, 8), jnp.float32), ((3, 72), jnp.bfloat16), ((2, 72), jnp.float32)],
)
def test_heads(heads: tuple[int, int], dtype: Any) -> None:
    check([20, 128, 5], heads, dtype)


def test_exponents_far_from_zero() -> None:
    """Scores of several hundred: their rounding, a few 1e-5, is what the results differ by."""
    check([5, 195], sharpness=100.0, bound=1e-3)


def test_equal_scores_average_the_values() -> None:
    q = jnp.zeros((100, 2, 16), jnp.float32)
    v = np.arange(100 * 2 * 16, dtype=np.float32).reshape(100, 2, 16)
    out = interpreted(q, q, jnp.asarray(v), spans([20, 80]))
    mean = np.concatenate([np.tile(v[:20].mean(0), (20, 1, 1)), np.tile(v[20:].mean(0), (80, 1, 1))])
    np.testing.assert_allclose(out, mean, rtol=1e-6)


@settings(max_examples=8)
@given(cuts=st.sets(st.integers(1, 299), max_size=20))
def test_ragged_segments(cuts: set[int]) -> None:
    check([b - a for a, b in pairwise([0, *sorted(cuts), 300])])


def test_segments_do_not_see_each_other() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((300, 2, 8)), jnp.float32) for _ in range(3))
    where = spans([120, 80, 100])
    before = np.asarray(interpreted(q, k, v, where))
    after = np.asarray(interpreted(*(x.at[120:200].mul(1e3) for x in (q, k, v)), where))
    np.testing.assert_array_equal(np.delete(before, np.s_[120:200], axis=0), np.delete(after, np.s_[120:200], axis=0))
    assert np.isfinite(after).all()


@pytest.mark.parametrize("patches", [256, 8192, 131_072])
def test_programs_for_tpus_at_the_published_sizes(patches: int) -> None:
    x = jax.ShapeDtypeStruct((patches, 16, 72), jnp.bfloat16)
    args = x, x, x, jax.ShapeDtypeStruct((patches, 2), jnp.int32)
    text = jax.jit(segment_attention).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 1
    assert "stablehlo.while" not in text


def test_supported_heads() -> None:
    heads = partial(jnp.zeros, (16, 2, 72))
    assert tpu.supports(heads(jnp.bfloat16))
    assert tpu.supports(heads(jnp.float32))
    assert not tpu.supports(heads(jnp.float16))
