"""The GPU body of attend_ids, interpreted, against its reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_pallas.common import MASKED
from kernels_pallas.sparse_attention import gpu_ids, reference
from kernels_pallas.sparse_attention.gpu_ids import Tuning

B, LAYERS, CAPACITY, LAYER = 2, 2, 160, 1
# Query heads, key/value heads, head_dim, slots, tile, dtype: one split and several, a ragged last one; 1 to 17 heads a
# group.
SHAPES = [
    (8, 2, 32, 24, 32, jnp.float32),
    (4, 4, 16, 1, 16, jnp.float32),
    (17, 1, 16, 65, 32, jnp.float32),
    (8, 1, 128, 150, 64, jnp.bfloat16),
]
# float32: sums of at most 150 terms of size one; bfloat16: probabilities are rounded relative to another maximum.
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}

# Log-sum-exps: of scores of size one, float32 sums of at most 150 exponentials, whose inputs are equal.
LSE_BOUND = 2e-5

expected = {False: jax.jit(reference.attend_ids), True: jax.jit(reference.attend_ids_lse)}
bodies = {False: gpu_ids.attend_ids, True: gpu_ids.attend_ids_lse}
actual = {
    (tile, partly): jax.jit(partial(body, tuning=Tuning(tile=tile), interpret=True))
    for tile in (16, 32, 64)
    for partly, body in bodies.items()
}


@settings(max_examples=15)
@given(
    seed=st.integers(0, 2**32 - 1),
    shape=st.sampled_from(SHAPES),
    used=st.tuples(st.floats(0, 1), st.floats(0, 1)),
    partly=st.booleans(),
)
@example(seed=0, shape=SHAPES[3], used=(0.0, 1.0), partly=False)  # a row without keys
@example(seed=0, shape=SHAPES[2], used=(0.01, 1.0), partly=False)  # one key; a split of one slot
@example(seed=0, shape=SHAPES[3], used=(0.0, 1.0), partly=True)
@example(seed=0, shape=SHAPES[2], used=(0.01, 1.0), partly=True)
@example(seed=0, shape=SHAPES[0], used=(0.0, 0.0), partly=True)
def test_equals_the_reference(
    seed: int, shape: tuple[int, int, int, int, int, Any], used: tuple[float, float], partly: bool
) -> None:
    """Any share of used slots; unused ones give nothing, also where a whole split has none. `partly`: in float32, with
    the log-sum-exp."""
    heads, kv_heads, head_dim, slots, tile, dtype = shape
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((B, heads, head_dim)), dtype)
    kv = jnp.asarray(rng.standard_normal((LAYERS, B, CAPACITY, 2, kv_heads, head_dim)), dtype)
    ids = np.stack([np.sort(rng.permutation(CAPACITY)[:slots]) for _ in range(B)])
    for row, share in zip(ids, used, strict=True):
        row[int(np.ceil(share * slots)) :] = -1
    arguments = q, kv, LAYER, jnp.asarray(ids, jnp.int32)
    out, target = actual[tile, partly](*arguments), expected[partly](*arguments)
    if partly:
        (out, lse), (target, target_lse) = out, target
        assert out.dtype == lse.dtype == jnp.float32
        np.testing.assert_allclose(lse, target_lse, rtol=1e-6, atol=LSE_BOUND)
        assert np.all(np.asarray(lse)[~(ids >= 0).any(-1)] == np.float32(MASKED))
    else:
        assert out.dtype == q.dtype
    difference = np.abs(np.asarray(out, np.float32) - np.asarray(target, np.float32))
    assert difference.max() <= BOUNDS[dtype]


@pytest.mark.parametrize(
    ("heads", "head_dim", "dtype"),
    [(8, 24, jnp.float32), (8, 8, jnp.float32), (8, 32, jnp.float16), (1024, 32, jnp.float32)],
)
def test_refuses_what_it_cannot_take(heads: int, head_dim: int, dtype: Any) -> None:
    """Head sizes that are no power of two or below the tensor cores' least, other dtypes, too many heads a group."""
    q = jnp.zeros((B, heads, head_dim), dtype)
    assert not gpu_ids.supports(q, jnp.zeros((LAYERS, B, 32, 2, 1, head_dim), dtype))
