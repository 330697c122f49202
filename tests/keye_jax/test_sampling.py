"""Choosing tokens: filters, ties, distribution, and independence of the batch."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from keye_jax.sampling import Sampling, sample

choose = jax.jit(sample)


def settings(rows: int, **values: Any) -> Sampling:
    defaults = {"temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 0}
    dtypes = {"temperature": jnp.float32, "top_p": jnp.float32, "top_k": jnp.int32, "seed": jnp.uint32}
    return Sampling(
        **{
            name: jnp.broadcast_to(jnp.asarray(values.get(name, default), dtypes[name]), (rows,))
            for name, default in defaults.items()
        }
    )


def draws(logits: list[float] | np.ndarray, count: int = 4096, **values: Any) -> np.ndarray:
    """Tokens drawn at `count` sequence indices from the same logits."""
    rows = jnp.broadcast_to(jnp.asarray(logits, jnp.float32), (count, len(logits)))
    return np.asarray(choose(rows, settings(count, **values), jnp.arange(count, dtype=jnp.int32)))


LOGITS = np.log(np.array([0.05, 0.4, 0.1, 0.3, 0.15]))


def test_greedy_takes_the_largest_and_the_lower_of_equals() -> None:
    logits = jnp.asarray([[0.0, 3.0, 3.0, 1.0], [-jnp.inf, -2.0, -5.0, -2.0]])
    tokens = choose(logits, settings(2, temperature=0.0), jnp.zeros(2, jnp.int32))
    np.testing.assert_array_equal(tokens, [1, 1])


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_frequencies_follow_the_softmax(temperature: float) -> None:
    p = np.exp(LOGITS / temperature)
    counts = np.bincount(draws(LOGITS, temperature=temperature), minlength=5)
    expected = 4096 * p / p.sum()
    # Chi-square with 4 degrees of freedom exceeds 23.5 once in 10,000 times; the draws are fixed by the seed.
    assert ((counts - expected) ** 2 / expected).sum() < 23.5


@pytest.mark.parametrize(
    ("values", "allowed"),
    [
        ({"top_k": 1}, {1}),
        ({"top_k": 3}, {1, 3, 4}),
        ({"top_k": 99}, {0, 1, 2, 3, 4}),
        ({"top_p": 1e-6}, {1}),
        ({"top_p": 0.39}, {1}),
        ({"top_p": 0.69}, {1, 3}),
        ({"top_p": 0.71}, {1, 3, 4}),
        # top-k first: of 0.4 and 0.3 the first alone holds 0.57, so top-p 0.5 ends there and 0.6 does not.
        ({"top_k": 2, "top_p": 0.5}, {1}),
        ({"top_k": 2, "top_p": 0.6}, {1, 3}),
        # Temperature before top-p: at 0.5 the best token holds 0.54 instead of 0.4.
        ({"temperature": 0.5, "top_p": 0.5}, {1}),
        ({"temperature": 0.5, "top_p": 0.6}, {1, 3}),
    ],
)
def test_filters_keep_exactly(values: dict[str, Any], allowed: set[int]) -> None:
    assert set(draws(LOGITS, **values).tolist()) == allowed


def test_top_k_breaks_ties_to_the_lower_token() -> None:
    assert set(draws([1.0, 1.0, 1.0, 1.0], top_k=2).tolist()) == {0, 1}


@pytest.mark.parametrize(("top_p", "kept"), [(0.25, 1), (0.26, 2), (0.5, 2), (0.75, 3), (1.0, 4)])
def test_top_p_ends_where_its_share_is_reached(top_p: float, kept: int) -> None:
    """Four tokens of exactly a quarter each."""
    assert set(draws([0.0] * 4, top_p=top_p).tolist()) == set(range(kept))


def test_kept_tokens_keep_their_ratio() -> None:
    counts = np.bincount(draws(LOGITS, top_k=2), minlength=5)
    # 4096 draws with p = 4/7: standard deviation 32.
    assert abs(counts[1] - 4096 * 4 / 7) < 4 * 32


def test_same_seed_same_tokens_another_seed_others() -> None:
    first = draws(LOGITS, count=64, seed=7)
    np.testing.assert_array_equal(first, draws(LOGITS, count=64, seed=7))
    assert (first != draws(LOGITS, count=64, seed=8)).sum() > 20


def test_a_row_draws_the_same_in_any_batch() -> None:
    """Seed and sequence index alone decide: not the row's place, nor what others ask for."""
    logits = jnp.asarray(np.random.default_rng(0).standard_normal((4, 50)), jnp.float32)
    index = jnp.asarray([3, 9, 3, 100], jnp.int32)
    mixed = settings(
        4, temperature=jnp.array([0.0, 0.7, 1.3, 1.0]), top_k=jnp.array([0, 5, 0, 20]), seed=jnp.array([1, 2, 3, 4])
    )
    together = choose(logits, mixed, index)
    order = jnp.array([2, 0, 3, 1])
    shuffled = choose(logits[order], jax.tree.map(lambda x: x[order], mixed), index[order])
    np.testing.assert_array_equal(shuffled, together[order])
    for row in range(4):
        one = jax.tree.map(lambda x, row=row: x[row : row + 1], mixed)
        assert choose(logits[row : row + 1], one, index[row : row + 1])[0] == together[row]
    assert int(together[0]) == int(jnp.argmax(logits[0]))
