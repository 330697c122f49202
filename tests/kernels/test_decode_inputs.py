"""decode_inputs: the GPU body, interpreted, against the reference; the reference's pieces against their definitions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kernels_pallas import numerics
from kernels_pallas.decode_inputs import DecodeInputs, decode_inputs, gpu, reference
from kernels_pallas.quantized import DTYPES
from tests.kernels.attention_inputs import FP8, HIDDEN, LAYERS, PUBLISHED, SMALL, Arguments, projection_arguments
from tests.kernels.eight_bits import NAMES, random_weights

CAPACITY, EPS = 128, 1e-6
run_reference = jax.jit(reference.decode_inputs, static_argnums=6)


def arguments(B: int, sizes: tuple[int, ...], dtype: Any, idx_dtype: Any) -> Arguments:
    return projection_arguments((B,), CAPACITY, sizes, dtype, idx_dtype)


def check(args: Arguments, slots: list[int], layer: int = 1) -> DecodeInputs:
    at = jnp.asarray(slots, jnp.int32)
    expected = run_reference(*args, jnp.int32(layer), at, EPS)
    out = gpu.decode_inputs(*args, jnp.int32(layer), at, EPS, interpret=True)
    for one, other in zip(jax.tree.leaves(out), jax.tree.leaves(expected), strict=True):
        assert one.dtype == other.dtype
        # Sums run in another order. The coarser the dtype, the more one unit in the last place is: float8, bfloat16.
        tolerance = {1: 2**-3, 2: 2**-7}.get(one.dtype.itemsize, 1e-5)
        np.testing.assert_allclose(one.astype(jnp.float32), other.astype(jnp.float32), rtol=tolerance, atol=tolerance)
    return out


@pytest.mark.parametrize(
    ("sizes", "dtype", "idx_dtype"),
    [
        (SMALL, jnp.float32, jnp.float32),
        (PUBLISHED, jnp.bfloat16, jnp.bfloat16),
        (PUBLISHED, jnp.bfloat16, FP8),
        ((12, 3, 16, 20, 8), jnp.float32, jnp.float32),
    ],
)
def test_equals_the_reference(sizes: tuple[int, ...], dtype: Any, idx_dtype: Any) -> None:
    check(arguments(2, sizes, dtype, idx_dtype), [0, 77])


@pytest.mark.parametrize("stored", DTYPES, ids=NAMES)
def test_projections_stored_with_8_bits(stored: Any) -> None:
    h, weights, tables, caches = arguments(2, SMALL, jnp.float32, jnp.float32)
    packed = {
        name: random_weights(getattr(weights, name).shape, stored, 1, size=HIDDEN**-0.5) for name in ("q", "k", "v")
    }
    check((h, weights._replace(**packed), tables, caches), [0, 77])


def test_slots_beyond_the_capacity_are_not_written() -> None:
    args = arguments(3, SMALL, jnp.float32, FP8)
    out = check(args, [CAPACITY - 1, CAPACITY, 5 * CAPACITY], layer=0)
    for before, after in zip(args[3], out.caches, strict=True):
        assert before is not None
        assert after is not None
        changed = np.argwhere(np.asarray(before != after).reshape(LAYERS, 3, CAPACITY, -1).any(-1))
        assert changed.tolist() == [[0, 0, CAPACITY - 1]]


def test_one_row_of_zeros() -> None:
    """Norms of nothing are zero, and quantise at the smallest scale; a single row takes the path of its own."""
    h, weights, tables, caches = arguments(1, SMALL, jnp.bfloat16, FP8)
    weights = weights._replace(idx_k_norm_bias=jnp.zeros_like(weights.idx_k_norm_bias))
    out = check((jnp.zeros_like(h), weights, tables, caches), [1])
    assert not out.q.any()
    assert out.caches.idx_scale is not None
    assert float(out.caches.idx_scale[1, 0, 1]) == 2.0**-22


def test_rounding_to_e4m3_is_the_nearest_value() -> None:
    """Against ml_dtypes' conversion, at every representable value, halfway between neighbours, and just beside."""
    values = np.arange(256, dtype=np.uint8).view(jnp.dtype(FP8)).astype(np.float32)
    values = np.unique(values[np.isfinite(values)])
    middle = (values[1:] + values[:-1]) / 2
    x = np.concatenate([values, middle, np.nextafter(middle, np.inf), np.nextafter(middle, -np.inf)]).astype(np.float32)
    round_e4m3 = jax.jit(numerics.round_e4m3)
    np.testing.assert_array_equal(round_e4m3(x), x.astype(jnp.dtype(FP8)).astype(np.float32))
    np.testing.assert_array_equal(round_e4m3(np.float32([-1e9, 1e9, 465.0])), np.float32([-448, 448, 448]))
    assert np.signbit(round_e4m3(np.float32([-0.0, -1e-5]))).all()


def test_hadamard_is_its_own_inverse() -> None:
    x = jnp.asarray(np.random.default_rng(0).standard_normal((3, 64)), jnp.float32)
    np.testing.assert_allclose(numerics.hadamard(numerics.hadamard(x)), x, rtol=0, atol=1e-5)
    np.testing.assert_allclose(numerics.hadamard(jnp.eye(4))[:, 1], [0.5, -0.5, 0.5, -0.5])


def test_the_public_function_runs_the_reference_off_the_gpu() -> None:
    args = (*arguments(3, SMALL, jnp.float32, FP8), jnp.int32(0), jnp.asarray([1, 2, 3], jnp.int32))
    out, expected = jax.jit(decode_inputs, static_argnums=6)(*args, EPS), run_reference(*args, EPS)
    jax.tree.map(np.testing.assert_array_equal, out, expected)


def test_wrong_shapes_are_refused() -> None:
    h, weights, tables, caches = arguments(2, SMALL, jnp.float32, FP8)
    slots = jnp.zeros(2, jnp.int32)
    with pytest.raises(ValueError, match="do not fit"):
        decode_inputs(h, weights, tables, caches, jnp.int32(0), slots[:1], EPS)
    with pytest.raises(ValueError, match="do not fit"):
        decode_inputs(h, weights, tables, caches._replace(kv=caches.kv[:, :1]), jnp.int32(0), slots, EPS)
    with pytest.raises(ValueError, match="idx_scale"):
        decode_inputs(h, weights, tables, caches._replace(idx_scale=caches.kv[..., 0, 0]), jnp.int32(0), slots, EPS)
