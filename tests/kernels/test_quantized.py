"""8-bit weights: the references against products with float64 matrices, and what is refused."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.decode_inputs import decode_inputs
from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu
from kernels_pallas.grouped_matmul.decode import expert_down, expert_swiglu, experts_add, moe_step
from kernels_pallas.quantized import DTYPES, Quantized
from kernels_pallas.skinny_matmul import project_add
from tests.kernels.eight_bits import NAMES, dequantised, random_weights
from tests.kernels.test_decode_inputs import EPS, SMALL, arguments

L, E, D, F, LAYER = 2, 3, 64, 16, 1

each = pytest.mark.parametrize("dtype", DTYPES, ids=NAMES)


def normal(*shape: int, seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).standard_normal(shape), jnp.float32)


def wide(w: Quantized, *contracted: int) -> jax.Array:
    return jnp.asarray(dequantised(w, *contracted), jnp.float32)


@each
@pytest.mark.parametrize("scaled", [False, True])
def test_grouped_product(dtype: Any, scaled: bool) -> None:
    x, w, sizes = normal(40, D), random_weights((L, E, D, F), dtype, 2), np.array([33, 0, 7])
    row_scale = normal(40, seed=1) if scaled else None
    out = grouped_matmul(x, w, LAYER, jnp.asarray(sizes, jnp.int32), jnp.float32, row_scale)
    matrices = dequantised(w, 2)[LAYER]
    rows = np.split(np.asarray(x, np.float64), np.cumsum(sizes)[:-1])
    expected = np.concatenate([part @ matrix for part, matrix in zip(rows, matrices, strict=True)])
    if row_scale is not None:
        expected = expected * np.asarray(row_scale, np.float64)[:, None]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-6 * np.abs(expected).max())


@each
def test_the_scale_comes_before_any_rounding(dtype: Any) -> None:
    """Sums that bfloat16 cannot hold and float32 can, times scales that are no powers of two: rounded once."""
    rng = np.random.default_rng(0)
    values, scale = jnp.asarray(rng.integers(-16, 17, (L, E, D, F)), dtype), normal(L, E, F, seed=2)
    x, sizes = jnp.asarray(rng.integers(-9, 10, (40, D)), jnp.bfloat16), jnp.asarray([33, 0, 7], jnp.int32)
    out = grouped_matmul(x, Quantized(values, scale), LAYER, sizes, jnp.bfloat16)
    group = np.repeat(np.arange(E), sizes)
    product = np.einsum("md,mdf->mf", np.asarray(x, np.float32), np.asarray(values[LAYER], np.float32)[group])
    assert (product != product.astype(jnp.bfloat16)).any()
    np.testing.assert_array_equal(out, jnp.asarray(product * np.asarray(scale)[LAYER][group]).astype(jnp.bfloat16))


@each
def test_functions_of_experts_equal_those_of_wide_matrices(dtype: Any) -> None:
    gate_up = random_weights((L, E, D, 2 * F), dtype, 2, size=D**-0.5)
    down = random_weights((L, E, F, D), dtype, 2, size=F**-0.5, seed=1)
    m, sizes = normal(4, D), jnp.asarray([1, 0, 3], jnp.int32)
    experts, weights = jnp.asarray([[0, 2], [1, -1], [-1, -1], [2, 1]], jnp.int32), jnp.full((4, 2), 0.4)
    norm, router = normal(L, D, seed=4), normal(L, D, E, seed=5)

    def results(gate_up: Any, down: Any) -> list[jax.Array]:
        hidden = expert_swiglu(m, gate_up, LAYER, experts)
        return [
            grouped_swiglu(m, gate_up, LAYER, sizes),
            hidden,
            expert_down(hidden, down, LAYER, experts, weights, m),
            experts_add(m, gate_up, down, LAYER, experts, weights, m),
            moe_step(m, norm, router, gate_up, down, LAYER, 2, True, EPS),
        ]

    for out, expected in zip(results(gate_up, down), results(wide(gate_up, 2), wide(down, 2)), strict=True):
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)


@each
def test_output_projection(dtype: Any) -> None:
    x, w, residual = normal(3, 4, 16), random_weights((L, 4, 16, 24), dtype, 1, 2), normal(3, 24, seed=1)
    expected = np.asarray(residual) + np.einsum("mhk,hkn->mn", np.asarray(x, np.float64), dequantised(w, 1, 2)[LAYER])
    np.testing.assert_allclose(project_add(x, w, LAYER, residual), expected, rtol=1e-5, atol=1e-5)


@each
def test_projections_of_a_decode_step(dtype: Any) -> None:
    h, weights, tables, caches = arguments(2, SMALL, jnp.float32, jnp.float32)
    packed = {name: random_weights(getattr(weights, name).shape, dtype, 1, size=0.1) for name in ("q", "k", "v")}
    unpacked = {name: wide(w, 1) for name, w in packed.items()}
    slots, layer = jnp.asarray([3, 77], jnp.int32), jnp.int32(LAYER)
    out, expected = (
        decode_inputs(h, weights._replace(**own), tables, caches, layer, slots, EPS) for own in (packed, unpacked)
    )
    for one, other in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [*DTYPES, jnp.bfloat16], ids=[*NAMES, "bfloat16"])
def test_a_cpu_widens_only_the_matrices_that_it_multiplies(dtype: Any) -> None:
    S: Any = jax.ShapeDtypeStruct
    L, E, D, F = 8, 16, 64, 64

    def stack(*shape: int) -> Any:
        w = S(shape, dtype)
        return w if dtype == jnp.bfloat16 else Quantized(w, S((*shape[:2], shape[3]), jnp.float32))

    m, experts = S((2, D), jnp.bfloat16), S((2, 4), jnp.int32)
    args = (m, stack(L, E, D, 2 * F), stack(L, E, F, D), S((), jnp.int32), experts, S((2, 4), jnp.float32), m)
    used = jax.jit(experts_add).trace(*args).lower(lowering_platforms=("cpu",)).compile().memory_analysis()
    assert used is not None
    assert used.temp_size_in_bytes < 4 * E * F * D  # float32 of one layer's smaller stack


@pytest.mark.parametrize(
    ("values", "scale", "dtype"),
    [
        (jnp.int8, (L, E, D), jnp.float32),
        (jnp.int8, (L, E, 1, F), jnp.float32),
        (jnp.int8, (L, E, F), jnp.bfloat16),
        (jnp.uint8, (L, E, F), jnp.float32),
    ],
)
def test_wrong_scales_are_refused(values: Any, scale: tuple[int, ...], dtype: Any) -> None:
    x, sizes, experts = normal(4, D), jnp.zeros(E, jnp.int32), jnp.zeros((4, 2), jnp.int32)
    w = Quantized(jnp.zeros((L, E, D, F), values), jnp.zeros(scale, dtype))
    hidden, weights = jnp.zeros((4, 2, D)), jnp.zeros((4, 2))
    with pytest.raises(ValueError, match=r"scale \("):
        grouped_matmul(x, w, 0, sizes, jnp.float32)
    with pytest.raises(ValueError, match=r"scale \("):
        grouped_swiglu(x, w, 0, sizes)
    with pytest.raises(ValueError, match=r"scale \("):
        expert_swiglu(x, w, 0, experts)
    with pytest.raises(ValueError, match=r"scale \("):
        expert_down(hidden, w, 0, experts, weights, normal(4, F))
    down = Quantized(jnp.zeros((L, E, F // 2, D), jnp.int8), jnp.zeros((L, E, D), jnp.float32))
    with pytest.raises(ValueError, match=r"scale \("):
        experts_add(x, w, down, 0, experts, weights, x)
    with pytest.raises(ValueError, match=r"scale \("):
        experts_add(x, jnp.zeros((L, E, D, F)), down._replace(scale=down.scale[:1]), 0, experts, weights, x)
    with pytest.raises(ValueError, match=r"scale \("):
        project_add(normal(4, E, D), w, 0, normal(4, F))


def test_wrong_scales_of_projections_are_refused() -> None:
    h, weights, tables, caches = arguments(2, SMALL, jnp.float32, jnp.float32)
    k = random_weights(weights.k.shape, jnp.int8, 1)
    wrong = weights._replace(k=k._replace(scale=k.scale[0]))
    with pytest.raises(ValueError, match=r"scale \("):
        decode_inputs(h, wrong, tables, caches, jnp.int32(0), jnp.zeros(2, jnp.int32), EPS)
