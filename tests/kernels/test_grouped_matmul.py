"""grouped_matmul against one product a group. Operands are small integers, so results must be equal."""

from itertools import pairwise
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kernels_pallas.grouped_matmul import grouped_matmul
from kernels_pallas.grouped_matmul.reference import swiglu

D, F, LAYERS = 6, 5, 2

product = jax.jit(grouped_matmul, static_argnums=4)


def check(sizes: list[int], dtype: Any = jnp.float32, out_dtype: Any = jnp.float32, seed: int = 0) -> None:
    rng = np.random.default_rng(seed)
    x = rng.integers(-3, 4, (sum(sizes), D))
    w = rng.integers(-3, 4, (LAYERS, len(sizes), D, F))
    expected = np.concatenate([rows @ w[1, e] for e, rows in enumerate(np.split(x, np.cumsum(sizes)[:-1]))], axis=0)
    out = product(jnp.asarray(x, dtype), jnp.asarray(w, dtype), 1, jnp.asarray(sizes, jnp.int32), out_dtype)
    assert out.dtype == out_dtype
    np.testing.assert_array_equal(np.asarray(out).astype(np.int64), expected)


@pytest.mark.parametrize(
    "sizes",
    [
        [1],
        [0, 1, 0],
        [100],
        [0, 0, 100],
        [100, 0, 0],
        [31, 32, 33],
        [1, 95],
        [32, 0, 0, 0, 64],
    ],
)
def test_empty_and_ragged_groups(sizes: list[int]) -> None:
    check(sizes)


@given(
    total=st.sampled_from([1, 5, 33, 96]),
    experts=st.sampled_from([1, 3, 8]),
    cuts=st.lists(st.floats(0, 1), min_size=7, max_size=7),
    seed=st.integers(0, 2**32 - 1),
)
@example(total=96, experts=8, cuts=[0.5] * 7, seed=0)
def test_any_division_of_rows(total: int, experts: int, cuts: list[float], seed: int) -> None:
    edges = [0, *sorted(int(c * total) for c in cuts[: experts - 1]), total]
    check([b - a for a, b in pairwise(edges)], seed=seed)


@pytest.mark.parametrize("out_dtype", [jnp.float32, jnp.bfloat16])
def test_bfloat16_operands(out_dtype: Any) -> None:
    """Sums stay below 256, where bfloat16 holds every integer."""
    check([3, 0, 40], jnp.bfloat16, out_dtype)


@pytest.mark.parametrize(
    ("x", "w", "sizes"),
    [
        ((4, 6), (2, 3, 5, 5), (3,)),
        ((4, 6), (2, 3, 6, 5), (2,)),
        ((4, 6), (3, 6, 5), (3,)),
        ((4, 1, 6), (2, 3, 6, 5), (3,)),
    ],
)
def test_wrong_shapes_are_refused(x: tuple[int, ...], w: tuple[int, ...], sizes: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="do not fit"):
        grouped_matmul(jnp.zeros(x), jnp.zeros(w), 0, jnp.zeros(sizes, jnp.int32), jnp.float32)


def test_swiglu_gates_with_the_first_half() -> None:
    gate_up = jnp.array([[0.0, 2.0, 5.0, -3.0]])
    np.testing.assert_allclose(swiglu(gate_up), [[0.0, 2 / (1 + np.exp(-2)) * -3.0]], rtol=1e-6)
    assert swiglu(gate_up.astype(jnp.bfloat16)).dtype == jnp.bfloat16
