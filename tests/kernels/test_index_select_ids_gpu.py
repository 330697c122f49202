"""The GPU body of select_ids, interpreted, against its reference.

Queries, keys and weights are small integers: every product and sum is then exact in float32, so that ids must be
equal, and equal scores are everywhere.
"""

from dataclasses import replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_pallas.index_select import gpu_ids, gpu_search, reference, sort_keys
from kernels_pallas.index_select.gpu_ids import Tuning

LAYERS, LAYER, B, TOPK = 2, 1, 2, 64
# Pruning and all branches behind it, at sizes that the interpreter can take.
SMALL = Tuning(score_tile=32, score_blocks=32, slice=64, blocks=8, slack=8, whole=256, held=128)
CAPACITY = 1120  # neither a power of two nor a multiple of a tile or slice

expected = jax.jit(reference.select_ids, static_argnums=6)


@partial(jax.jit, static_argnums=(6, 7))
def actual(*arguments: Any) -> jax.Array:
    *arrays, topk, tuning = arguments
    return gpu_ids.select_ids(*arrays, topk=topk, tuning=tuning, interpret=True)


def inputs(seed: int, capacity: int, heads: int, size: int, dtype: Any, spread: int) -> tuple[Any, ...]:
    """Integers in 1 - spread..spread: equal keys with spread 0."""
    rng = np.random.default_rng(seed)
    scale = None
    if dtype == jnp.float8_e4m3fn:
        scale = jnp.asarray(2.0 ** rng.integers(-1, 2, (LAYERS, B, capacity)), jnp.float32)
    return (
        jnp.asarray(rng.integers(-3, 4, (B, 1, heads, size)), dtype),
        jnp.asarray(rng.integers(-2, 3, (B, 1, heads)), jnp.float32),
        jnp.asarray(rng.integers(min(1 - spread, 0), spread + 1, (LAYERS, B, capacity, size)), dtype),
        scale,
        LAYER,
    )


def check(arguments: tuple[Any, ...], start: list[int], topk: int, tuning: Tuning) -> None:
    arguments = (*arguments, jnp.asarray(start, jnp.int32), topk)
    np.testing.assert_array_equal(actual(*arguments, tuning), expected(*arguments))


@settings(max_examples=12)
@given(
    seed=st.integers(0, 2**32 - 1),
    # A device that holds a part of the keys is asked for queries before and behind them.
    start=st.tuples(st.integers(-CAPACITY, 2 * CAPACITY), st.integers(0, CAPACITY - 1)),
    spread=st.sampled_from([0, 1, 3]),
)
@example(seed=0, start=(CAPACITY - 1, 0), spread=3)
@example(seed=0, start=(-5, 2 * CAPACITY), spread=3)
@example(seed=0, start=(TOPK - 1, TOPK), spread=3)  # all visible keys are selected; all but one
@example(seed=0, start=(255, 256), spread=3)  # searched whole; pruned first
@example(seed=0, start=(300, 700), spread=0)  # all scores equal: more candidates than are held at once
def test_pruned_contexts(seed: int, start: tuple[int, int], spread: int) -> None:
    check(inputs(seed, CAPACITY, 4, 16, jnp.float32, spread), list(start), TOPK, SMALL)


@pytest.mark.parametrize(("blocks", "topk"), [(8, 1), (32, 200), (8, 300)])
def test_any_topk(blocks: int, topk: int) -> None:
    """One key; nearly as many as there are groups; more than groups, so that nothing can be pruned."""
    tuning = replace(SMALL, score_blocks=blocks)
    check(inputs(1, CAPACITY, 4, 16, jnp.float32, 3), [CAPACITY - 1, 500], topk, tuning)


@pytest.mark.parametrize(
    ("dtype", "capacity", "heads", "topk"),
    [
        (jnp.float32, 32, 4, 24),
        (jnp.bfloat16, 128, 16, 2048),
        (jnp.float8_e4m3fn, 384, 5, 24),
    ],
)
def test_small_capacities(dtype: Any, capacity: int, heads: int, topk: int) -> None:
    """Searched whole; topk beyond the capacity; heads that are no power of two."""
    check(inputs(2, capacity, heads, 64, dtype, 3), [capacity - 1, 7], topk, Tuning())
    check(inputs(2, capacity, heads, 64, dtype, 3), [3 * capacity, -7], topk, Tuning())


def test_every_value_of_float8() -> None:
    """Decoding is exact for both signs, normal, subnormal and zero."""
    bits = np.arange(256, dtype=np.uint8)
    values = bits[(bits & 0x7F) != 0x7F].view(jnp.float8_e4m3fn)
    capacity = 256
    keys = np.zeros((LAYERS, B, capacity, 64), jnp.float8_e4m3fn)
    for column in range(64):
        keys[:, :, : len(values), column] = np.roll(values, 4 * column)
    rng = np.random.default_rng(3)
    # One key component a head: scores are the decoded values themselves.
    query = np.zeros((B, 1, 16, 64), jnp.float8_e4m3fn)
    for b, head in np.ndindex(B, 16):
        query[b, 0, head, rng.integers(64)] = 1
    weights = np.zeros((B, 1, 16), np.float32)
    weights[0, 0, 3] = weights[1, 0, 11] = 1
    scale = jnp.ones((LAYERS, B, capacity), jnp.float32)
    arguments = jnp.asarray(query), jnp.asarray(weights), jnp.asarray(keys), scale, LAYER
    check(arguments, [len(values) - 1, len(values) - 2], 100, Tuning())


DISTRIBUTIONS = {
    "normal": lambda rng, n: rng.standard_normal(n),
    "exponential, far from zero": lambda rng, n: 1e4 + rng.exponential(size=n),
    "heavy tails": lambda rng, n: rng.standard_cauchy(n) ** 3,
    "two values": lambda rng, n: rng.integers(0, 2, n) - 0.5,
    "all equal": lambda rng, n: np.full(n, -3.0),
    "mostly zero": lambda rng, n: np.where(rng.random(n) < 0.9, 0.0, rng.standard_normal(n)),
    "squares overflow": lambda rng, n: rng.standard_normal(n) * 1e38,
    "infinite": lambda rng, n: np.where(rng.random(n) < 0.5, np.inf, rng.standard_normal(n)),
}


@pytest.mark.parametrize("topk", [1, 30, 299])
@pytest.mark.parametrize("distribution", DISTRIBUTIONS)
def test_a_guess_changes_no_selection(distribution: str, topk: int) -> None:
    """However wrong it is: of 300 visible scores and 212 that are not, the same ones are selected as without it."""
    n, origin = 300, 100
    scores = DISTRIBUTIONS[distribution](np.random.default_rng(4), 512).astype(np.float32)
    ids, visible = jnp.arange(512), jnp.arange(512) < n
    key = jnp.where(visible, sort_keys.sort_key(jnp.asarray(scores)), sort_keys.LOWEST)

    @jax.jit
    def select() -> tuple[jax.Array, jax.Array]:
        threshold, cutoff, before = gpu_search.boundary(
            lambda measure, *_: measure(key, ids),
            jnp.int32(n),
            topk,
            jnp.int32(origin),
            512,
            lambda: gpu_search.normal_quantile(key, jnp.int32(n), topk),
        )
        return (key > threshold) | ((key == threshold) & (ids < cutoff)), before

    selected, before = select()
    np.testing.assert_array_equal(selected, reference.topk_mask(jnp.asarray(scores), visible, topk))
    assert before == np.sum(np.asarray(selected)[:origin])


@pytest.mark.parametrize(
    ("size", "dtype", "key_dtype"),
    [
        (24, jnp.float32, jnp.float32),
        (8, jnp.float32, jnp.float32),
        (32, jnp.float8_e4m3fn, jnp.float8_e4m3fn),
        (64, jnp.bfloat16, jnp.float32),
    ],
)
def test_refuses_what_it_cannot_take(size: int, dtype: Any, key_dtype: Any) -> None:
    assert not gpu_ids.supports(jnp.zeros((B, 1, 4, size), dtype), jnp.zeros((LAYERS, B, 32, size), key_dtype))
