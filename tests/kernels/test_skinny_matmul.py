"""skinny_matmul: the GPU body, interpreted, against the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.quantized import DTYPES
from kernels_pallas.skinny_matmul import gpu, project_add, reference
from tests.kernels.eight_bits import NAMES, dequantised, random_weights

LAYERS = 2


def integers(*shape: int, dtype: Any = jnp.float32, seed: int = 0) -> jax.Array:
    """Small enough that sums of products are exact in every dtype here."""
    return jnp.asarray(np.random.default_rng(seed).integers(-1, 2, shape), dtype)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("M", "D", "N"), [(1, 16, 8), (1, 1024, 64), (5, 128, 40), (64, 64, 200)])
def test_partial_products_add_up(M: int, D: int, N: int, dtype: Any) -> None:
    x, w = integers(M, D, dtype=dtype), integers(LAYERS, D, N, dtype=dtype, seed=1)
    sums = gpu.partial_products(x, (w,), 1, interpret=True)
    np.testing.assert_array_equal(sums.sum(0), np.asarray(x, np.float64) @ np.asarray(w[1], np.float64))


@pytest.mark.parametrize("stored", DTYPES, ids=NAMES)
@pytest.mark.parametrize(("M", "dtype"), [(1, jnp.bfloat16), (3, jnp.float32)])
def test_8_bit_weights_are_scaled_by_channel(M: int, dtype: Any, stored: Any) -> None:
    """Beside matrices that are stored wide; more parts than one, and tiles that reach beyond the columns."""
    x, gate = integers(M, 1024, dtype=dtype), integers(LAYERS, 1024, 6, dtype=dtype, seed=1)
    w = random_weights((LAYERS, 1024, 3, 24), stored, 1)
    sums = gpu.partial_products(x, (gate, w), 1, interpret=True).sum(0)
    matrices = [np.asarray(gate, np.float64)[1], dequantised(w, 1)[1].reshape(1024, 72)]
    expected = np.asarray(x, np.float64) @ np.concatenate(matrices, axis=1)
    np.testing.assert_allclose(sums, expected, rtol=0, atol=1e-6 * np.abs(expected).max())
    residual = integers(M, 72, dtype=dtype, seed=2)
    flat = w._replace(values=w.values.reshape(LAYERS, 1024, 72), scale=w.scale.reshape(LAYERS, 72))
    out = gpu.project_add(x, flat, jnp.int32(1), residual, interpret=True)
    wanted = reference.project_add(x, flat, 1, residual)
    assert out.dtype == wanted.dtype == dtype
    tolerance = 2**-7 if dtype == jnp.bfloat16 else 1e-5
    np.testing.assert_allclose(out.astype(jnp.float32), wanted.astype(jnp.float32), rtol=tolerance, atol=1e-4)


@pytest.mark.parametrize("M", [1, 3])
def test_matrices_of_any_width_side_by_side(M: int) -> None:
    x = integers(M, 32)
    weights = [integers(LAYERS, 32, *shape, seed=i) for i, shape in enumerate([(4, 32), (2, 3), (1,), (65,)])]
    sums = gpu.partial_products(x, weights, 0, interpret=True).sum(0)
    np.testing.assert_array_equal(sums, jnp.concatenate([x @ w[0].reshape(32, -1) for w in weights], axis=1))


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("M", [1, 6])
def test_project_add_equals_the_reference(M: int, dtype: Any) -> None:
    rng = np.random.default_rng(0)
    x, w, residual = (
        jnp.asarray(rng.standard_normal(shape), jnp.float32).astype(dtype)
        for shape in [(M, 8, 32), (LAYERS, 8, 32, 96), (M, 96)]
    )
    out = gpu.project_add(x.reshape(M, -1), w.reshape(LAYERS, 256, 96), jnp.int32(1), residual, interpret=True)
    expected = reference.project_add(x, w, 1, residual)
    assert out.dtype == dtype
    # Sums run in another order: a unit in the last place of sums of magnitude 50.
    tolerance = 1e-4 if dtype == jnp.float32 else 0.25
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=tolerance)


def test_the_public_function_runs_the_reference_off_the_gpu() -> None:
    x, w, residual = integers(3, 2, 16), integers(LAYERS, 2, 16, 8, seed=1), integers(3, 8, seed=2)
    out = jax.jit(project_add)(x, w, 1, residual)
    np.testing.assert_array_equal(out, residual + jnp.einsum("mhk,hkn->mn", x, w[1]))


@pytest.mark.parametrize(
    ("x", "w", "residual"),
    [((2, 8), (2, 9, 4), (2, 4)), ((2, 8), (2, 8, 4), (2, 5)), ((2, 2, 4), (2, 8, 4), (2, 4))],
)
def test_wrong_shapes_are_refused(x: tuple[int, ...], w: tuple[int, ...], residual: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        project_add(jnp.zeros(x), jnp.zeros(w), 0, jnp.zeros(residual))


def test_what_the_gpu_body_takes() -> None:
    x, w = jnp.zeros((8, 64), jnp.bfloat16), jnp.zeros((1, 64, 24), jnp.bfloat16)
    assert gpu.supports(x, w)
    assert gpu.supports(x, w, random_weights(w.shape, jnp.int8, 1))
    assert not gpu.supports(x, w.astype(jnp.float32))
    assert not gpu.supports(jnp.zeros((65, 64), jnp.bfloat16), w)
    assert not gpu.supports(x.astype(jnp.float16), w.astype(jnp.float16))
