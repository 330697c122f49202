"""The mixture of experts against one token and one expert at a time."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.moe import moe, route
from tests.keye_jax import dense_numpy as dense
from tests.keye_jax.tiny import TINY, random_params

run = jax.jit(moe, static_argnames="config")


@pytest.mark.parametrize(
    ("experts", "chosen", "renormalised"), [(4, 2, True), (7, 3, True), (5, 1, True), (3, 3, True), (6, 2, False)]
)
def test_equals_the_dense_experts(experts: int, chosen: int, renormalised: bool) -> None:
    text = dataclasses.replace(TINY.text, num_experts=experts, num_experts_per_tok=chosen, norm_topk_prob=renormalised)
    config = dataclasses.replace(TINY, text=text)
    stack = random_params(config)["text"]["layers"]["moe"]
    m = np.random.default_rng(experts).standard_normal((33, text.hidden_size)).astype(np.float32)
    layer = 1
    params = {"router": stack["router"][layer]}
    _, ids = route(params["router"], jnp.asarray(m), text)
    expected, expected_ids = dense.moe(dense.as_numpy(dense.layer_of(stack, layer)), m.astype(np.float64), config)
    np.testing.assert_array_equal(np.sort(ids, axis=-1), expected_ids)
    actual = run(params, stack, layer, jnp.asarray(m), config=text)
    np.testing.assert_allclose(actual, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_equal_router_logits_choose_the_lower_experts() -> None:
    text = dataclasses.replace(TINY.text, num_experts=6, num_experts_per_tok=3)
    weights, experts = route(jnp.zeros((text.hidden_size, 6)), jnp.ones((2, text.hidden_size)), text)
    np.testing.assert_array_equal(experts, [[0, 1, 2]] * 2)
    np.testing.assert_allclose(weights, np.full((2, 3), 1 / 3), rtol=1e-6)


def test_weights_come_best_first_and_sum_to_one() -> None:
    router = jnp.asarray(np.random.default_rng(0).standard_normal((TINY.text.hidden_size, 4)) / 8, jnp.float32)
    m = jnp.asarray(np.random.default_rng(1).standard_normal((20, TINY.text.hidden_size)), jnp.float32)
    weights, _ = route(router, m, TINY.text)
    assert (np.diff(weights, axis=-1) <= 0).all()
    np.testing.assert_allclose(weights.sum(-1), 1, rtol=1e-6)
    raw, _ = route(router, m, dataclasses.replace(TINY.text, norm_topk_prob=False))
    assert (raw.sum(-1) < 0.999).any()
    np.testing.assert_allclose(raw / raw.sum(-1, keepdims=True), weights, rtol=1e-6)


def test_a_token_does_not_depend_on_its_batch() -> None:
    """To the last bit: sorting rows by expert moves them, and must not change them."""
    stack = random_params(TINY)["text"]["layers"]["moe"]
    params = {"router": stack["router"][0]}
    m = jnp.asarray(np.random.default_rng(2).standard_normal((40, TINY.text.hidden_size)), jnp.float32)
    together = run(params, stack, 0, m, config=TINY.text)
    order = np.random.default_rng(3).permutation(40)
    shuffled = run(params, stack, 0, m[order], config=TINY.text)
    np.testing.assert_array_equal(shuffled, np.asarray(together)[order])
