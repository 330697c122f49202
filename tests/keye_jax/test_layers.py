"""Norms and dense layers against float64."""

from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_jax.layers import linear, project
from keye_jax.ops import plain_layer_norm as layer_norm
from keye_jax.ops import rms_norm
from tests.keye_jax import dense_numpy as dense


def draw(seed: int, *shapes: tuple[int, ...]) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.standard_normal(shape).astype(np.float32) for shape in shapes]


@settings(max_examples=20)
@given(seed=st.integers(0, 2**32 - 1), scale=st.sampled_from([1e-6, 1e-3, 1.0, 1e3, 1e8]))
def test_norms_equal_float64(seed: int, scale: float) -> None:
    """At any size of the input: epsilon counts for small ones."""
    x, weight, bias = draw(seed, (3, 16), (16,), (16,))
    x *= scale
    wide = [a.astype(np.float64) for a in (x, weight, bias)]
    rms = [dense.rms_norm(row, wide[1], 1e-6) for row in wide[0]]
    np.testing.assert_allclose(rms_norm(jnp.asarray(x), jnp.asarray(weight), 1e-6), rms, rtol=2e-6, atol=1e-6)
    norm = [dense.layer_norm(row, wide[1], wide[2], 1e-5) for row in wide[0]]
    actual = layer_norm(jnp.asarray(x), jnp.asarray(weight), jnp.asarray(bias), 1e-5)
    np.testing.assert_allclose(actual, norm, rtol=2e-5, atol=2e-6)


def test_zero_input_is_finite() -> None:
    zeros, ones = jnp.zeros((1, 8)), jnp.ones(8)
    np.testing.assert_array_equal(rms_norm(zeros, ones, 1e-6), np.zeros((1, 8)))
    np.testing.assert_array_equal(layer_norm(zeros, ones, 3 * ones, 1e-6), np.full((1, 8), 3.0))


@pytest.mark.parametrize("name", ["rms_norm", "layer_norm", "project"])
def test_bfloat16_rounds_once(name: str) -> None:
    """Each result is the float64 one rounded to bfloat16, weights and biases included: nothing between is rounded.
    (One step off where float32 lands on the other side of a middle.)"""
    x, weight, bias, matrix = (jnp.asarray(a, jnp.bfloat16) for a in draw(0, (64, 32), (32,), (32,), (32, 32)))
    wide = [np.asarray(a).astype(np.float64) for a in (x, weight, bias, matrix)]
    actual, expected = {
        "rms_norm": lambda: (rms_norm(x, weight, 1e-6), [dense.rms_norm(row, wide[1], 1e-6) for row in wide[0]]),
        "layer_norm": lambda: (
            layer_norm(x, weight, bias, 1e-6),
            [dense.layer_norm(row, wide[1], wide[2], 1e-6) for row in wide[0]],
        ),
        "project": lambda: (project("ni,io->no", x, matrix, bias), wide[0] @ wide[3] + wide[2]),
    }[name]()
    rounded = np.asarray(np.array(expected), jnp.bfloat16)
    assert actual.dtype == jnp.bfloat16
    different = np.asarray(actual) != rounded
    assert different.mean() < 0.002
    np.testing.assert_allclose(np.asarray(actual).astype(np.float64), np.array(expected), rtol=2**-8)


def test_products_keep_float32() -> None:
    """Not TF32 or bfloat16, on any platform."""
    x, weight, bias = draw(1, (8, 256), (256, 4), (4,))
    expected = x.astype(np.float64) @ weight.astype(np.float64) + bias
    actual = linear(jnp.asarray(x), {"weight": jnp.asarray(weight), "bias": jnp.asarray(bias)})
    # Sums of 256 products of size one: float32 errs by about 1e-6 * 16, TF32 by a thousand times that.
    np.testing.assert_allclose(actual, expected, rtol=0, atol=2e-5)


def test_small_terms_survive_a_bfloat16_product() -> None:
    """1 + 256 * 2**-9 is 1.5 when accumulated in float32, 1 when in bfloat16."""
    x: Any = jnp.full((1, 257), 2.0**-9, jnp.bfloat16).at[0, 0].set(1)
    assert float(project("ni,io->no", x, jnp.ones((257, 1), jnp.bfloat16))[0, 0]) == 1.5
