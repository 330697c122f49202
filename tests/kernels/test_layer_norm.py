"""layer_norm against float64, and its GPU body, interpreted, against its reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.layer_norm import gpu, layer_norm, reference

EPS = 1e-6


def operands(C: int, dtype: Any, spread: float = 3.0) -> tuple[jax.Array, jax.Array, jax.Array]:
    rng = np.random.default_rng(C)
    x, weight, bias = (jnp.asarray(rng.standard_normal(shape), dtype) for shape in ((8, C), C, C))
    return (spread * x + 1).astype(dtype), weight, bias


def test_equals_the_definition() -> None:
    x, weight, bias = operands(48, jnp.float32)
    wide = np.asarray(x, np.float64)
    expected = (wide - wide.mean(1, keepdims=True)) / np.sqrt(wide.var(1, keepdims=True) + EPS) * weight + bias
    np.testing.assert_allclose(layer_norm(x, weight, bias, EPS), expected, rtol=0, atol=2e-6)


@pytest.mark.parametrize("C", [16, 17, 72, 1152])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gpu_body(C: int, dtype: Any) -> None:
    args = operands(C, dtype)
    actual = gpu.layer_norm(*args, EPS, interpret=True)
    assert actual.dtype == dtype
    # Sums in another order; a bfloat16 result may then round the other way.
    tolerance = 4e-6 if dtype == jnp.float32 else 2**-5
    wanted = reference.layer_norm(*args, EPS)
    np.testing.assert_allclose(np.asarray(actual, np.float32), np.asarray(wanted, np.float32), rtol=0, atol=tolerance)


def test_gpu_body_on_equal_values() -> None:
    """A row without variance is its bias, also where columns were added to fill a tile."""
    x, weight, bias = operands(72, jnp.float32, spread=0.0)
    np.testing.assert_allclose(gpu.layer_norm(x, weight, bias, EPS, interpret=True), np.tile(bias, (8, 1)), atol=1e-6)


def test_wrong_shapes_are_refused() -> None:
    x, weight, bias = operands(16, jnp.float32)
    for args in ((x[0], weight, bias), (x, weight[:8], bias), (x, weight, bias[:8])):
        with pytest.raises(ValueError, match="do not fit"):
            layer_norm(*args, EPS)
