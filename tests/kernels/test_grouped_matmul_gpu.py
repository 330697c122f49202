"""The Hopper bodies in interpret mode against the references, and what their tiles cover.

Operands are small integers where results must be equal.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from kernels_pallas.grouped_matmul import gpu, gpu_rows, grouped_matmul, grouped_swiglu, ragged, reference, spread_rows
from kernels_pallas.grouped_matmul.gpu import CONSUMERS, ROWS, Tuning, tile_table
from kernels_pallas.quantized import Quantized

SMALL = Tuning(columns=128, stages=2, blocks=2)


def operands(
    sizes: list[int], D: int, F: int, scale: float = 1.0, stored: Any = None
) -> tuple[jax.Array, Any, int, jax.Array]:
    rng = np.random.default_rng(sum(sizes))
    x = rng.integers(-2, 3, (sum(sizes), D)) * scale
    w = rng.integers(-2, 3, (2, len(sizes), D, F)) * scale
    weights: Any = jnp.asarray(w, jnp.bfloat16)
    if stored is not None:
        channels = rng.uniform(0.5, 2.0, (2, len(sizes), F)) * scale
        weights = Quantized(jnp.asarray(w / scale, stored), jnp.asarray(channels, jnp.float32))
    return jnp.asarray(x, jnp.bfloat16), weights, 1, jnp.asarray(sizes, jnp.int32)


@pytest.mark.parametrize(
    ("sizes", "D", "F", "out_dtype", "scaled"),
    [
        # Small groups between large ones, a tile and one row, half a tile, empty groups; more steps than stages.
        ([3, 129, 0, 64, 70], 192, 128, jnp.bfloat16, True),
        # Fewer rows than a half tile, in all: padded.
        ([1, 0, 30, 7], 64, 64, jnp.float32, False),
    ],
)
def test_products_equal_the_reference(sizes: list[int], D: int, F: int, out_dtype: Any, scaled: bool) -> None:
    x, w, layer, group_sizes = operands(sizes, D, F)
    scale = (jnp.asarray(2.0 ** -(np.arange(sum(sizes)) % 5), jnp.float32),) if scaled else ()
    out = gpu.grouped_matmul(
        x, w, layer, group_sizes, *scale, out_dtype=out_dtype, tuning=SMALL, interpret=InterpretGPUParams()
    )
    assert out.dtype == out_dtype
    np.testing.assert_array_equal(out, reference.grouped_matmul(x, w, layer, group_sizes, out_dtype, *scale))


def test_swiglu_equals_the_reference() -> None:
    x, w, layer, group_sizes = operands([5, 66, 0, 1], 64, 128, 0.25)
    out = gpu.grouped_swiglu(x, w, layer, group_sizes, tuning=SMALL, interpret=InterpretGPUParams())
    expected = reference.grouped_swiglu(x, w, layer, group_sizes).astype(jnp.float32)
    # The exponential of two backends may differ in the last bit of float32, and so the rounded result in its own.
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=2**-7, atol=1e-30)


@given(sizes=st.lists(st.sampled_from([0, 1, 3, 63, 64, 65, 127, 128, 129, 200]), min_size=1, max_size=9))
@settings(max_examples=30, deadline=None)
@example(sizes=[0, 0, 1])
@example(sizes=[200, 3])
def test_tiles_write_each_row_of_its_group_and_no_other(sizes: list[int]) -> None:
    M = sum(sizes)
    tiles, count = (np.asarray(a) for a in jax.jit(tile_table, static_argnums=1)(jnp.asarray(sizes, jnp.int32), M))
    used = int(count[0])
    assert used <= len(tiles) == M // (CONSUMERS * ROWS) + len(sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    written = np.zeros(M, bool)
    for group, *rows, skip, keep in tiles[:used]:
        for row in rows:
            assert row >= 0
            assert row + ROWS <= max(M, ROWS)
            assert (owner[row + skip : row + skip + keep] == group).all()
            written[row + skip : row + skip + keep] = True
    assert written.all()


@pytest.mark.parametrize(("N", "k"), [(4, 3), (3, 1)])
def test_spread_rows_equals_the_reference(N: int, k: int) -> None:
    rng = np.random.default_rng(N)
    x = jnp.asarray(rng.standard_normal((N, 64)), jnp.bfloat16)
    positions = jnp.asarray(rng.permutation(N * k).reshape(N, k), jnp.int32)
    expected = np.zeros((N * k, 64), np.float32)
    for row, places in zip(np.asarray(x, np.float32), np.asarray(positions), strict=True):
        expected[places] = row
    np.testing.assert_array_equal(spread_rows(x, positions).astype(jnp.float32), expected)
    out = gpu_rows.spread_rows(x, positions, interpret=InterpretGPUParams())
    np.testing.assert_array_equal(out.astype(jnp.float32), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_ragged_dot_equals_the_reference(dtype: Any) -> None:
    x, w, layer, group_sizes = operands([3, 0, 40, 1], 6, 10)
    x, w, scale = x.astype(dtype), w.astype(dtype), jnp.arange(44.0)
    np.testing.assert_array_equal(
        ragged.grouped_matmul(x, w, layer, group_sizes, scale, out_dtype=dtype),
        reference.grouped_matmul(x, w, layer, group_sizes, dtype, scale),
    )
    np.testing.assert_array_equal(
        ragged.grouped_swiglu(x, w, layer, group_sizes), reference.grouped_swiglu(x, w, layer, group_sizes)
    )


@pytest.mark.parametrize("D", [64, 48])
def test_programs_for_gpus_have_no_loop_that_the_host_watches(D: int) -> None:
    S = jax.ShapeDtypeStruct
    x, sizes = S((40, D), jnp.bfloat16), S((3,), jnp.int32)
    args = (x, S((2, 3, D, 128), jnp.bfloat16), S((), jnp.int32), sizes)
    for f in (partial(grouped_matmul, out_dtype=jnp.float32), grouped_swiglu):
        text = jax.jit(f).trace(*args).lower(lowering_platforms=("cuda",)).as_text()
        assert "stablehlo.while" not in text
        assert ("mosaic_gpu" in text) == (D == 64)


@pytest.mark.parametrize("scale", [(3,), (4, 1)])
def test_wrong_row_scales_are_refused(scale: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="row_scale"):
        grouped_matmul(
            jnp.zeros((4, 6)), jnp.zeros((2, 3, 6, 5)), 0, jnp.zeros(3, jnp.int32), jnp.float32, jnp.zeros(scale)
        )


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match="two halves"):
        grouped_swiglu(jnp.zeros((4, 6)), jnp.zeros((2, 3, 6, 5)), 0, jnp.zeros(3, jnp.int32))
    with pytest.raises(ValueError, match="do not fit"):
        spread_rows(jnp.zeros((4, 6)), jnp.zeros((3, 2), jnp.int32))
