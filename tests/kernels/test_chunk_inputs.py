"""chunk_inputs: the GPU body, interpreted, against the reference; the reference against decode_inputs, token by token.

The slots of the caches are in `test_append`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kernels_pallas.chunk_inputs import ChunkInputs, chunk_inputs, gpu, reference
from kernels_pallas.decode_inputs import Tables, decode_inputs
from kernels_pallas.quantized import DTYPES
from tests.kernels.attention_inputs import FP8, HIDDEN, LAYERS, PUBLISHED, SMALL, Arguments, projection_arguments
from tests.kernels.eight_bits import NAMES, random_weights

CAPACITY, EPS = 16, 1e-6
TOKENS = 20
run_reference = jax.jit(reference.chunk_inputs, static_argnums=7)
run_kernel = jax.jit(gpu.chunk_inputs, static_argnums=7, static_argnames=("tuning", "interpret"))


def arguments(B: int, C: int, sizes: tuple[int, ...], dtype: Any, idx_dtype: Any) -> Arguments:
    return projection_arguments((B, C), CAPACITY, sizes, dtype, idx_dtype)


def check(args: Arguments, start: list[int], valid: list[int], layer: int = 1) -> ChunkInputs:
    rest = (jnp.int32(layer), jnp.asarray(start, jnp.int32), jnp.asarray(valid, jnp.int32), EPS)
    expected = run_reference(*args, *rest)
    out = run_kernel(*args, *rest, interpret=True)
    close(out, expected)
    return out


def close(out: Any, expected: Any) -> None:
    for one, other in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert (one.dtype, one.shape) == (other.dtype, other.shape)
        # Sums run in another order. The coarser the dtype, the more one unit in the last place is: float8, bfloat16.
        tolerance = {1: 2**-3, 2: 2**-7}.get(one.dtype.itemsize, 1e-5)
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize(
    ("C", "sizes", "dtype", "idx_dtype"),
    [
        (TOKENS, SMALL, jnp.float32, FP8),
        (1, SMALL, jnp.bfloat16, jnp.bfloat16),
        (7, PUBLISHED, jnp.bfloat16, FP8),
        (5, (12, 3, 16, 20, 8), jnp.float32, jnp.float32),
    ],
)
def test_equals_the_reference(C: int, sizes: tuple[int, ...], dtype: Any, idx_dtype: Any) -> None:
    """Blocks that end in the middle of a token's heads, tokens that are no whole number of blocks, one token."""
    check(arguments(2, C, sizes, dtype, idx_dtype), [0, 9], [C, C - C // 4])


@pytest.mark.parametrize("stored", DTYPES[:1], ids=NAMES[:1])
def test_projections_stored_with_8_bits(stored: Any) -> None:
    h, weights, tables, caches = arguments(1, 5, SMALL, jnp.float32, jnp.bfloat16)
    packed = {
        name: random_weights(getattr(weights, name).shape, stored, 1, size=HIDDEN**-0.5) for name in ("q", "k", "v")
    }
    check((h, weights._replace(**packed), tables, caches), [3], [5])


@settings(max_examples=8, deadline=None)
@given(
    start=st.tuples(st.integers(-25, 20), st.integers(-25, 20)),
    valid=st.tuples(st.integers(0, TOKENS), st.integers(0, TOKENS)),
    layer=st.integers(0, LAYERS - 1),
)
@example(start=(-3, 0), valid=(20, 20), layer=1)  # longer than the caches, which hold another part
@example(start=(14, 15), valid=(20, 1), layer=0)  # over the end
def test_only_slots_that_there_are_are_written(start: tuple[int, int], valid: tuple[int, int], layer: int) -> None:
    args = arguments(2, TOKENS, SMALL, jnp.float32, FP8)
    out = check(args, list(start), list(valid), layer)
    places = [(b, start[b] + c) for b in range(2) for c in range(valid[b])]
    expected = [[layer, b, slot] for b, slot in places if 0 <= slot < CAPACITY]
    for before, after in zip(args[3], out.caches, strict=True):
        assert before is not None
        changed = np.argwhere(np.asarray(before != after).reshape(LAYERS, 2, CAPACITY, -1).any(-1))
        assert changed.tolist() == expected


def test_rows_of_zeros() -> None:
    """Norms of nothing are zero, and quantise at the smallest scale."""
    h, weights, tables, caches = arguments(2, TOKENS, SMALL, jnp.float32, FP8)
    weights = weights._replace(idx_k_norm_bias=jnp.zeros_like(weights.idx_k_norm_bias))
    out = check((jnp.zeros_like(h), weights, tables, caches), [1, 1], [3, 3])
    assert not out.q.any()
    assert out.caches.idx_scale is not None
    assert out.caches.idx_scale[1, 0, 1:4].tolist() == [2.0**-22] * 3


def test_a_chunk_is_its_tokens_one_by_one() -> None:
    C, step = 3, jax.jit(decode_inputs, static_argnums=6)
    h, weights, tables, caches = args = arguments(2, C, SMALL, jnp.float32, FP8)
    start, layer = jnp.asarray([3, 12], jnp.int32), jnp.int32(1)
    out = run_reference(*args, layer, start, jnp.full(2, C, jnp.int32), EPS)
    for c in range(C):
        one = step(h[:, c], weights, Tables(*(table[:, c] for table in tables)), caches, layer, start + c, EPS)
        caches = one.caches
        close((out.q[:, c], out.idx_q[:, c], out.idx_weights[:, c]), (one.q, one.idx_q, one.idx_weights))
    close(out.caches, caches)


def test_the_public_function_runs_the_reference_off_the_gpu() -> None:
    args = arguments(2, 3, SMALL, jnp.float32, FP8)
    rest = (jnp.int32(0), jnp.asarray([1, 2], jnp.int32), jnp.asarray([3, 2], jnp.int32), EPS)
    out, expected = jax.jit(chunk_inputs, static_argnums=7)(*args, *rest), run_reference(*args, *rest)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_wrong_shapes_are_refused() -> None:
    h, weights, tables, caches = arguments(2, 3, SMALL, jnp.float32, FP8)
    two = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="do not fit"):
        chunk_inputs(h, weights, tables, caches, jnp.int32(0), two[:1], two, EPS)
    with pytest.raises(ValueError, match="tables"):
        chunk_inputs(h[:, :2], weights, tables, caches, jnp.int32(0), two, two, EPS)
    with pytest.raises(ValueError, match="do not fit"):
        chunk_inputs(h, weights, tables, caches._replace(kv=caches.kv[:, :1]), jnp.int32(0), two, two, EPS)
    wrong = caches._replace(idx_scale=caches.kv[..., 0, 0])
    with pytest.raises(ValueError, match="idx_scale"):
        chunk_inputs(h, weights, tables, wrong, jnp.int32(0), two, two, EPS)
