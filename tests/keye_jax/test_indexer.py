"""The indexer's pieces against tables of all e4m3 values and float64."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from kernels_pallas.numerics import hadamard, quantise, round_e4m3
from keye_jax.indexer import index_inputs
from tests.keye_jax import dense_numpy as dense
from tests.keye_jax.tiny import TINY, random_params, text_prompt

rounded = jax.jit(round_e4m3)
quantised = jax.jit(quantise)
inputs_of = jax.jit(index_inputs, static_argnames="config")


def test_every_e4m3_value_and_every_middle() -> None:
    """Representable values stay; a middle goes to the even neighbour; just beside it, to the nearer one."""
    middles = ((dense.E4M3[1:] + dense.E4M3[:-1]) / 2).astype(np.float32)
    points = np.concatenate([dense.E4M3, middles, np.nextafter(middles, 0), np.nextafter(middles, 1e9)])
    points = np.concatenate([points, -points]).astype(np.float32)
    np.testing.assert_array_equal(rounded(jnp.asarray(points)), [dense.round_e4m3(p) for p in points])


def test_every_bfloat16_rounds_as_ml_dtypes_does() -> None:
    """All finite bfloat16 values, saturated at 448."""
    values = np.arange(2**16, dtype=np.uint16).view(ml_dtypes.bfloat16).astype(np.float32)
    values = values[np.isfinite(values)]
    expected = np.clip(values, -448, 448).astype(ml_dtypes.float8_e4m3fn).astype(np.float32)
    np.testing.assert_array_equal(rounded(jnp.asarray(values)), expected)


@given(st.lists(st.floats(-500, 500, width=32), min_size=1, max_size=1))
def test_any_float_rounds_to_the_nearest(values: list[float]) -> None:
    np.testing.assert_array_equal(rounded(jnp.asarray(values, jnp.float32)), [dense.round_e4m3(v) for v in values])


@pytest.mark.parametrize(
    ("block", "scale", "values"),
    [
        ([1, -0.3, 0.01], 2.0**-8, [256, -80, 2.5]),
        ([448, 1, 0], 1.0, [448, 1, 0]),
        ([450, 1, 0], 2.0, [224, 0.5, 0]),
        ([0, 0, 0], 2.0**-22, [0, 0, 0]),
        ([-448 * 2.0**-5, 0, 0], 2.0**-5, [-448, 0, 0]),
        ([np.nextafter(np.float32(448 * 2.0**7), np.float32(1e9)), 0, 0], 2.0**8, [224, 0, 0]),
    ],
)
def test_stated_blocks(block: list[float], scale: float, values: list[float]) -> None:
    """The description's examples, and blocks at and just above a power of two times 448."""
    actual, actual_scale = quantised(jnp.asarray(block, jnp.float32))
    assert actual.dtype == jnp.float8_e4m3fn
    assert float(actual_scale) == scale
    np.testing.assert_array_equal(actual.astype(jnp.float32), values)


@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-30, 30))
def test_any_block_equals_the_definition(seed: int, exponent: int) -> None:
    block = (np.random.default_rng(seed).standard_normal((2, 16)) * 2.0**exponent).astype(np.float32)
    actual, scales = quantised(jnp.asarray(block))
    for row in range(2):
        values, scale = dense.quantise(block[row].astype(np.float64))
        assert float(scales[row]) == scale
        np.testing.assert_array_equal(actual[row].astype(jnp.float32), values)


@pytest.mark.parametrize("width", [1, 2, 16, 64])
def test_hadamard_equals_the_doubled_matrix(width: int) -> None:
    x = np.random.default_rng(width).standard_normal((3, width)).astype(np.float32)
    expected = [dense.hadamard(row.astype(np.float64)) for row in x]
    actual = hadamard(jnp.asarray(x))
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-6)
    np.testing.assert_allclose(hadamard(actual), x, rtol=0, atol=4e-6)  # its own inverse


def test_hadamard_of_bfloat16_rounds_once() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((50, 16)), jnp.bfloat16)
    y = hadamard(x)
    assert y.dtype == jnp.bfloat16
    exact = np.array([dense.hadamard(row) for row in np.asarray(x).astype(np.float64)])
    np.testing.assert_allclose(np.asarray(y).astype(np.float64), exact, rtol=2**-8, atol=1e-6)


@pytest.mark.parametrize(
    ("dtype", "stored"), [("fp8", jnp.float8_e4m3fn), ("bf16", jnp.bfloat16), ("float32", jnp.float32)]
)
def test_scores_of_each_number_format(dtype: str, stored: jnp.dtype) -> None:
    """What `index_inputs` gives multiplies out to the dense model's scores."""
    config = dataclasses.replace(TINY, sparse=dataclasses.replace(TINY.sparse, indexer_dtype=dtype))
    params = jax.tree.map(lambda w: w[0], random_params(config)["text"]["layers"]["indexer"])
    a = np.random.default_rng(0).standard_normal((9, config.text.hidden_size)).astype(np.float32)
    _, positions = text_prompt(config, 9)
    angles = np.array([dense.mrope_angles(p, (2, 1, 1), config.text.rope_theta, False) for p in positions.T])
    cos, sin = (jnp.asarray(f(angles), jnp.float32)[None] for f in (np.cos, np.sin))
    index = inputs_of(params, jnp.asarray(a)[None], cos, sin, config=config)
    assert index.q.dtype == index.k.dtype == stored
    assert (index.k_scale is not None) == (dtype == "fp8")
    q, k = (np.asarray(x[0].astype(jnp.float32), np.float64) for x in (index.q, index.k))
    terms = np.maximum(0, np.einsum("tji,si->tjs", q, k))
    scores = np.einsum("tj,tjs->ts", np.asarray(index.weights[0], np.float64), terms)
    if index.k_scale is not None:
        scores = scores * np.asarray(index.k_scale[0], np.float64)
    expected = dense.index_scores(dense.as_numpy(params), a.astype(np.float64), positions, config)
    visible = np.isfinite(expected)
    # bf16: queries and keys rounded to 8 bits, sums of 8 products and 2 heads.
    bound = 2e-2 if dtype == "bf16" else 1e-5
    error = np.abs(scores - np.where(visible, expected, 0))[visible]
    assert error.max() <= bound * np.abs(expected[visible]).max()
