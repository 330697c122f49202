"""skinny_matmul: the GPU body, interpreted, against the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.skinny_matmul import gpu, project_add, reference

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
    assert not gpu.supports(x, w.astype(jnp.float32))
    assert not gpu.supports(jnp.zeros((65, 64), jnp.bfloat16), w)
    assert not gpu.supports(x.astype(jnp.float16), w.astype(jnp.float16))
