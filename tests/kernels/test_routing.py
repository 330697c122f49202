"""The routing of a chunk: the GPU bodies, interpreted, and the references against numpy."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.routing import choose_experts, gpu, place, reference

CHOOSE = {
    "reference": jax.jit(reference.choose_experts, static_argnums=(1, 2)),
    "gpu": jax.jit(lambda x, k, r: gpu.choose_experts(x, k, r, interpret=True), static_argnums=(1, 2)),
}
PLACE = {
    "reference": jax.jit(reference.place, static_argnums=2),
    "gpu": jax.jit(lambda e, w, n: gpu.place(e, w, n, interpret=True), static_argnums=2),
}


@pytest.mark.parametrize("body", CHOOSE)
@pytest.mark.parametrize(
    ("tokens", "count", "k", "renormalise", "dtype"),
    [(1, 5, 2, True, jnp.float32), (33, 128, 8, True, jnp.bfloat16), (16, 7, 7, False, jnp.float32)],
)
def test_the_most_probable_are_chosen(
    tokens: int, count: int, k: int, renormalise: bool, dtype: Any, body: str
) -> None:
    # Steps of an eighth: many logits are equal, and those that differ have different probabilities.
    logits = np.random.default_rng(tokens).integers(-16, 16, (tokens, count)) / 8
    weights, experts = CHOOSE[body](jnp.asarray(logits, dtype), k, renormalise)
    order = np.argsort(-logits, axis=1, kind="stable")[:, :k]
    np.testing.assert_array_equal(experts, order)
    expected = np.take_along_axis(np.exp(logits) / np.exp(logits).sum(1, keepdims=True), order, 1)
    expected = expected / expected.sum(1, keepdims=True) if renormalise else expected
    np.testing.assert_allclose(weights, expected, rtol=1e-5)


def test_logits_that_are_not_finite_choose_experts_that_exist() -> None:
    logits = jnp.full((3, 5), jnp.nan).at[1].set(jnp.inf).at[2].set(-jnp.inf)
    _, experts = CHOOSE["gpu"](logits, 2, True)
    assert ((experts >= 0) & (experts < 5)).all()


@pytest.mark.parametrize("body", PLACE)
@pytest.mark.parametrize(("tokens", "count", "k"), [(1, 5, 2), (127, 128, 8), (128, 8, 8), (300, 7, 3)])
def test_pairs_are_placed_by_expert_in_token_order(tokens: int, count: int, k: int, body: str) -> None:
    rng = np.random.default_rng(tokens)
    experts = np.stack([rng.permutation(count)[:k] for _ in range(tokens)]).astype(np.int32)
    weights = rng.random((tokens, k)).astype(np.float32)
    positions, sizes, placed = PLACE[body](experts, weights, count)
    order = np.argsort(experts.reshape(-1), kind="stable")
    np.testing.assert_array_equal(np.argsort(np.asarray(positions).reshape(-1)), order)
    np.testing.assert_array_equal(sizes, np.bincount(experts.reshape(-1), minlength=count))
    np.testing.assert_array_equal(placed, weights.reshape(-1)[order])


@settings(max_examples=10, deadline=None)
@given(seed=st.integers(0, 2**31), share=st.floats(0, 1))
def test_of_the_last_expert_a_token_may_have_several_pairs(seed: int, share: float) -> None:
    """As where other devices own them: the positions of all others are as if it were not there."""
    rng = np.random.default_rng(seed)
    experts = np.stack([rng.permutation(8)[:3] for _ in range(70)]).astype(np.int32)
    experts = np.where(rng.random(experts.shape) < share, 8, experts)
    weights = rng.random(experts.shape).astype(np.float32)
    positions, sizes, placed = (np.asarray(x) for x in PLACE["gpu"](experts, weights, 9))
    own = experts < 8
    count = int(own.sum())
    assert sizes[:8].tolist() == np.bincount(experts[own], minlength=8).tolist()
    np.testing.assert_array_equal(np.sort(positions[own]), np.arange(count))
    np.testing.assert_array_equal(placed[positions[own]], weights[own])
    assert ((positions[~own] >= count) & (positions[~own] < experts.size)).all()
    expected = PLACE["reference"](experts, weights, 9)
    np.testing.assert_array_equal(positions, expected[0])
    np.testing.assert_array_equal(sizes, expected[1])


def test_the_public_functions_run_the_references_off_the_gpu() -> None:
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((20, 6)), jnp.float32)
    weights, experts = jax.jit(choose_experts, static_argnums=(1, 2))(logits, 2, True)
    expected = CHOOSE["reference"](logits, 2, True)
    jax.tree.map(np.testing.assert_array_equal, (weights, experts), expected)
    placed, expected = jax.jit(place, static_argnums=2)(experts, weights, 6), PLACE["reference"](experts, weights, 6)
    jax.tree.map(np.testing.assert_array_equal, placed, expected)


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="cannot choose 7 experts"):
        choose_experts(jnp.zeros((3, 6)), 7, True)
    with pytest.raises(ValueError, match="do not fit"):
        place(jnp.zeros((3, 2), jnp.int32), jnp.zeros((3, 3)), 6)
