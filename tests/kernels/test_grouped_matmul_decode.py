"""The decode kernels of a mixture of experts: reference against plain products, kernel bodies (interpreted) against
the reference."""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas.grouped_matmul import decode, decode_gpu, decode_gpu_router, decode_gpu_row, decode_reference
from kernels_pallas.quantized import Weights
from tests.kernels.eight_bits import random_weights

LAYERS, LAYER, EPS = 2, 1, 1e-6

RTOL = {jnp.float32: 2e-6, jnp.bfloat16: 2**-7}
"""float32: the order of sums; bfloat16: a sum that falls on the other side of a rounding step."""


@dataclass(frozen=True)
class Case:
    """Sizes of a layer and what is special about its numbers."""

    rows: int
    D: int = 64
    F: int = 32
    E: int = 8
    k: int = 2
    dtype: Any = jnp.float32
    stored: Any = None  # of the experts, where they have 8 bits
    renormalise: bool = True
    equal_rows: bool = False
    flat_router: bool = False

    def weights(self) -> tuple[jax.Array, jax.Array, Any, Any]:
        """norm, router, gate_up, down."""
        rng = np.random.default_rng(self.rows)

        def draw(*shape: int) -> jax.Array:
            return jnp.asarray(rng.standard_normal(shape) * shape[-2] ** -0.5, self.dtype)

        def experts(*shape: int) -> Weights:
            if self.stored is None:
                return draw(*shape)
            return random_weights(shape, self.stored, 2, size=shape[-2] ** -0.5, seed=self.rows)

        router = draw(LAYERS, self.D, self.E)
        return (
            draw(LAYERS, self.D) + 1,
            jnp.zeros_like(router) if self.flat_router else router * 4,
            experts(LAYERS, self.E, self.D, 2 * self.F),
            experts(LAYERS, self.E, self.F, self.D),
        )

    def residual(self) -> jax.Array:
        h = np.random.default_rng(7).standard_normal((1 if self.equal_rows else self.rows, self.D))
        return jnp.asarray(np.broadcast_to(h, (self.rows, self.D)), self.dtype)

    @property
    def routing(self) -> dict[str, Any]:
        return {"k": self.k, "renormalise": self.renormalise, "eps": EPS}


def assert_close(actual: jax.Array, expected: jax.Array, dtype: Any) -> None:
    assert actual.dtype == expected.dtype
    a, b = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    np.testing.assert_allclose(a, b, rtol=RTOL[dtype], atol=RTOL[dtype] * max(1.0, np.abs(b).max()))


CASES = [
    Case(1, dtype=jnp.bfloat16, D=128, F=48),
    Case(3, D=96, F=48, E=6, k=3, renormalise=False),
    Case(5, dtype=jnp.bfloat16, E=5, k=5, equal_rows=True),
    Case(17, E=16, k=1),
    Case(3, k=3, dtype=jnp.bfloat16, stored=jnp.int8),
    Case(4, D=96, E=5, k=2, stored=jnp.float8_e4m3fn),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_kernels_equal_the_reference(case: Case) -> None:
    norm, router, gate_up, down = case.weights()
    h, layer = case.residual(), jnp.int32(LAYER)

    @jax.jit
    def both(h: jax.Array) -> list[tuple[Any, Any]]:
        routed = decode_reference.norm_route(h, norm, router, layer, **case.routing)
        m, weights, experts = routed
        hidden = decode_reference.expert_swiglu(m, gate_up, layer, experts)
        down_arguments = hidden, down, layer, experts, weights, h
        kernel = partial(decode_gpu_router.norm_route, **case.routing, interpret=True)
        return [
            (kernel(h, norm, router, layer), routed),
            (decode_gpu.expert_swiglu(m, gate_up, layer, experts, interpret=True), hidden),
            (decode_gpu.expert_down(*down_arguments, interpret=True), decode_reference.expert_down(*down_arguments)),
        ]

    (routed, expected), *products = both(h)
    np.testing.assert_array_equal(routed[2], expected[2])
    np.testing.assert_allclose(routed[1], expected[1], rtol=1e-5)
    for actual, reference in [(routed[0], expected[0]), *products]:
        assert_close(actual, reference, case.dtype)


SPREAD = {
    "none": [[-1, -1, -1], [-1, -1, -1], [-1, -1, -1]],
    "one": [[-1, -1, -1], [-1, 0, -1], [-1, -1, -1]],
    "all of a row": [[3, 0, 5], [-1, -1, -1], [5, -1, 3]],
    "some of every row": [[-1, 2, -1], [2, -1, 4], [-1, -1, 2]],
}
"""Experts of three rows where other devices have the rest, which is -1."""


def spread(case: Case, experts: list[list[int]]) -> tuple[Any, ...]:
    """Arguments of `experts_add`, in the first layer, before whose stack there is nothing that could be read."""
    _, _, gate_up, down = case.weights()
    weights = jnp.asarray(np.random.default_rng(3).uniform(0, 1, (case.rows, case.k)), jnp.float32)
    residual = jnp.zeros((case.rows, case.D), jnp.float32)
    return case.residual(), gate_up, down, jnp.int32(0), jnp.asarray(experts, jnp.int32), weights, residual


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("experts", SPREAD.values(), ids=SPREAD)
def test_experts_of_other_devices_add_nothing(experts: list[list[int]], dtype: Any) -> None:
    case = Case(3, k=3, dtype=dtype)
    arguments = spread(case, experts)
    expected = decode_reference.experts_add(*arguments)
    assert expected.dtype == jnp.float32
    rows = [any(expert >= 0 for expert in row) for row in experts]
    np.testing.assert_array_equal(np.asarray(expected).any(axis=1), rows)
    actual = jax.jit(partial(decode_gpu.experts_add, interpret=True))(*arguments)
    np.testing.assert_array_equal(np.asarray(actual).any(axis=1), rows)
    assert_close(actual, expected, dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, D=128, F=48, k=2),
        Case(1, dtype=jnp.bfloat16, k=8),
        Case(1, D=96, E=6, k=3, renormalise=False),
        Case(1, D=128, k=3, dtype=jnp.bfloat16, stored=jnp.float8_e4m3fn),
        Case(1, k=2, stored=jnp.int8),
    ],
    ids=str,
)
def test_one_row_equals_the_reference(case: Case) -> None:
    arguments = case.residual(), *case.weights(), jnp.int32(LAYER)
    expected = jax.jit(partial(decode_reference.moe_step, **case.routing))(*arguments)
    actual = jax.jit(partial(decode_gpu_row.moe_row, **case.routing, interpret=True))(*arguments)
    assert_close(actual, expected, case.dtype)


def test_equal_scores_choose_the_lowest_experts_in_order() -> None:
    case = Case(3, flat_router=True, k=4)
    norm, router, *_ = case.weights()
    for body in (decode_reference.norm_route, partial(decode_gpu_router.norm_route, interpret=True)):
        _, weights, experts = jax.jit(partial(body, **case.routing))(case.residual(), norm, router, jnp.int32(0))
        np.testing.assert_array_equal(experts, np.tile(np.arange(4), (3, 1)))
        np.testing.assert_allclose(weights, 0.25, rtol=1e-6)


def test_reference_against_one_product_a_pair() -> None:
    case = Case(3, k=3)
    norm, router, gate_up, down = case.weights()
    h = case.residual()
    m, weights, experts = decode.norm_route(h, norm, router, LAYER, case.k, True, EPS)
    x, w = np.asarray(m, np.float64), np.asarray(weights, np.float64)
    expected = np.asarray(h, np.float64).copy()
    for row in range(case.rows):
        for slot, expert in enumerate(np.asarray(experts)[row]):
            gate, up = np.split(x[row] @ np.asarray(gate_up, np.float64)[LAYER, expert], 2)
            hidden = gate / (1 + np.exp(-gate)) * up
            expected[row] += w[row, slot] * (hidden @ np.asarray(down, np.float64)[LAYER, expert])
    hidden = decode.expert_swiglu(m, gate_up, LAYER, experts)
    out = decode.expert_down(hidden, down, LAYER, experts, weights, h)
    np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5)
    step = decode.moe_step(h, norm, router, gate_up, down, LAYER, case.k, True, EPS)
    np.testing.assert_array_equal(step, out)


def test_arguments_that_do_not_fit() -> None:
    case = Case(2)
    norm, router, gate_up, down = case.weights()
    h = case.residual()
    experts, weights = jnp.zeros((2, 2), jnp.int32), jnp.zeros((2, 2), jnp.float32)
    with pytest.raises(ValueError, match="do not fit"):
        decode.norm_route(h[:, :32], norm, router, LAYER, 2, True, EPS)
    with pytest.raises(ValueError, match="k=9"):
        decode.norm_route(h, norm, router, LAYER, 9, True, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        decode.expert_swiglu(h, down, LAYER, experts)
    with pytest.raises(ValueError, match="int32"):
        decode.expert_swiglu(h, gate_up, LAYER, weights)
    hidden = jnp.zeros((2, 2, case.F), jnp.float32)
    with pytest.raises(ValueError, match="do not fit"):
        decode.expert_down(hidden, down, LAYER, experts, weights, h[:1])
    with pytest.raises(ValueError, match="do not fit"):
        decode.moe_step(h, norm, router, gate_up, down[:, :, :16], LAYER, 2, True, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        decode.moe_step(h, norm, router[:, :, 1:], gate_up, down, LAYER, 2, True, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        decode.experts_add(h, gate_up, down, LAYER, experts, weights, h[:1])
    with pytest.raises(ValueError, match="int32"):
        decode.experts_add(h, gate_up, down, LAYER, weights, weights, h)
