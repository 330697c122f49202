"""The TPU bodies of the grouped products, interpreted on the CPU with their copies and semaphores, against the
references, and what their tables of visits cover. Operands are small integers where results must be equal."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul import grouped_matmul, grouped_swiglu, reference, spread_rows, tpu, tpu_rows
from tests.kernels.test_grouped_matmul_gpu import operands

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")


visit_table = jax.jit(tpu.visit_table, static_argnums=(1, 2))


def without_races(out: jax.Array) -> jax.Array:
    jax.block_until_ready(out)
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    return out


@pytest.mark.parametrize(
    ("sizes", "F", "dtype", "out_dtype", "scaled"),
    [
        # Small groups between large ones, a tile and one row, half a tile, empty groups, the last one too.
        ([3, 129, 0, 64, 70, 0], 256, jnp.bfloat16, jnp.bfloat16, True),
        # Fewer rows than a tile; one part of columns.
        ([1, 0, 30, 7], 128, jnp.float32, jnp.float32, True),
        # Borders of groups and of tiles coincide; three parts.
        ([0, 128, 256, 128], 384, jnp.bfloat16, jnp.float32, False),
        # One group of one row, and no other.
        ([0, 1, 0], 256, jnp.float32, jnp.bfloat16, False),
    ],
)
def test_products_equal_the_reference(sizes: list[int], F: int, dtype: Any, out_dtype: Any, scaled: bool) -> None:
    x, w, layer, group_sizes = operands(sizes, 128, F)
    x, w = x.astype(dtype), w.astype(dtype)
    scale = (jnp.asarray(2.0 ** -(np.arange(sum(sizes)) % 5), jnp.float32),) if scaled else ()
    out = tpu.grouped_matmul(x, w, layer, group_sizes, *scale, out_dtype=out_dtype, interpret=INTERPRET)
    assert out.dtype == out_dtype
    expected = reference.grouped_matmul(x, w, layer, group_sizes, out_dtype, *scale)
    np.testing.assert_array_equal(without_races(out), expected)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_swiglu_equals_the_reference(dtype: Any) -> None:
    x, w, layer, group_sizes = operands([5, 126, 0, 1], 128, 512, 0.25)
    x, w = x.astype(dtype), w.astype(dtype)
    out = without_races(tpu.grouped_swiglu(x, w, layer, group_sizes, interpret=INTERPRET))
    assert out.dtype == dtype
    expected = reference.grouped_swiglu(x, w, layer, group_sizes).astype(jnp.float32)
    # The exponential may differ in the last bit of float32, and so the rounded result in its own.
    bound = 2**-7 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(out.astype(jnp.float32), expected, rtol=bound, atol=1e-30)


@pytest.mark.parametrize(
    ("stored", "dtype", "sizes"),
    [
        (jnp.int8, jnp.bfloat16, [3, 129, 0, 64, 70, 0]),
        (jnp.float8_e4m3fn, jnp.bfloat16, [1, 0, 2, 0, 30, 0, 0, 4, 9, 8, 0, 3]),  # no whole blocks of scales
        (jnp.int8, jnp.float32, [5, 0, 7]),
    ],
    ids=str,
)
def test_products_with_8_bit_weights_equal_the_reference(stored: Any, dtype: Any, sizes: list[int]) -> None:
    x, w, layer, group_sizes = operands(sizes, 256, 512, 0.25, stored)
    x, row_scale = x.astype(dtype), jnp.asarray(np.random.default_rng(0).uniform(0.1, 1, sum(sizes)), jnp.float32)
    arguments = x, w, layer, group_sizes, row_scale
    out = without_races(tpu.grouped_matmul(*arguments, out_dtype=dtype, interpret=INTERPRET))
    np.testing.assert_array_equal(out, reference.grouped_matmul(*arguments[:4], dtype, row_scale))
    gated = without_races(tpu.grouped_swiglu(*arguments[:4], interpret=INTERPRET))
    expected = reference.grouped_swiglu(*arguments[:4]).astype(jnp.float32)
    bound = 2**-7 if dtype == jnp.bfloat16 else 1e-6
    np.testing.assert_allclose(gated.astype(jnp.float32), expected, rtol=bound, atol=1e-30)


def test_a_group_of_infinities_leaves_the_others_alone() -> None:
    x, w, layer, group_sizes = operands([5, 40, 3], 128, 256)
    expected = np.asarray(reference.grouped_matmul(x, w, layer, group_sizes, jnp.float32))
    x = x.at[5:45].set(jnp.inf)
    out = np.asarray(tpu.grouped_matmul(x, w, layer, group_sizes, out_dtype=jnp.float32, interpret=INTERPRET))
    np.testing.assert_array_equal(np.delete(out, np.s_[5:45], axis=0), np.delete(expected, np.s_[5:45], axis=0))


@given(sizes=st.lists(st.sampled_from([0, 1, 3, 7, 8, 9, 15, 16, 17, 30]), min_size=1, max_size=9).filter(any))
@settings(max_examples=50)
@example(sizes=[0, 0, 1])
@example(sizes=[30, 3])
def test_visits_write_each_row_of_its_group_and_copy_each_matrix_once(sizes: list[int]) -> None:
    rows, M = 8, sum(sizes)
    # One shape for all, so that it is compiled once.
    sizes, tiles = sizes + [0] * (9 - len(sizes)), 9 * 30 // rows + 1
    table = np.asarray(visit_table(jnp.asarray(sizes, jnp.int32), tiles, rows))
    assert table.shape == (6, tiles + len(sizes) - 1)
    assert (table[tpu.END] > table[tpu.BEGIN]).sum() <= -(-M // rows) + len(sizes) - 1
    owner = np.repeat(np.arange(len(sizes)), sizes)
    written, copied, expected_next = np.zeros(M, int), [], None
    for tile, group, begin, end, slot, following in table.T:
        if end <= begin:
            assert tile == tiles - 1
            continue
        own = np.arange(tile * rows, min((tile + 1) * rows, M))[max(begin, 0) : end]
        assert (owner[own] == group).all()
        written[own] += 1
        if begin >= 0:
            assert expected_next in (None, group)
            copied.append(group)
        # Copies alternate between the buffers, and each is announced by the group before it.
        assert slot == (len(copied) - 1) % tpu.SLOTS
        assert group == copied[-1]
        expected_next = following
    assert (written == 1).all()
    assert copied == [group for group, size in enumerate(sizes) if size]
    assert expected_next == -1
    assert (np.diff(table[tpu.TILE]) >= 0).all()


@pytest.mark.parametrize(("N", "k"), [(4, 3), (3, 1)])
def test_spread_rows_equals_the_reference(N: int, k: int) -> None:
    rng = np.random.default_rng(N)
    x = jnp.asarray(rng.standard_normal((N, 64)), jnp.bfloat16)
    positions = jnp.asarray(rng.permutation(N * k).reshape(N, k), jnp.int32)
    out = tpu_rows.spread_rows(x, positions)
    np.testing.assert_array_equal(out.astype(jnp.float32), reference.spread_rows(x, positions).astype(jnp.float32))


@pytest.mark.parametrize("tokens", [64, 512])
def test_programs_for_tpus_at_the_published_sizes(tokens: int) -> None:
    """Kernels and no loops; lowering checks the kernels' operations and blocks, too."""
    S = jax.ShapeDtypeStruct
    L, E, D, F, M = 48, 128, 2048, 768, tokens * 8
    layer, sizes = S((), jnp.int32), S((E,), jnp.int32)

    def experts(x: Any, positions: Any, up: Any, down: Any, layer: Any, sizes: Any, scale: Any) -> jax.Array:
        hidden = grouped_swiglu(spread_rows(x, positions), up, layer, sizes)
        return grouped_matmul(hidden, down, layer, sizes, x.dtype, scale)

    stacks = S((L, E, D, 2 * F), jnp.bfloat16), S((L, E, F, D), jnp.bfloat16)
    args = (S((tokens, D), jnp.bfloat16), S((tokens, 8), jnp.int32), *stacks, layer, sizes, S((M,), jnp.float32))
    text = jax.jit(experts).trace(*args).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 2
    assert "stablehlo.while" not in text


def test_supported_shapes() -> None:
    supports = partial(tpu.supports, jnp.zeros((4, 256), jnp.bfloat16))
    assert supports(jnp.zeros((1, 2, 256, 256), jnp.bfloat16), 2)
    assert not supports(jnp.zeros((1, 2, 256, 128), jnp.bfloat16), 2)
    assert not supports(jnp.zeros((1, 2, 256, 256), jnp.float32), 2)
    assert not tpu.supports(jnp.zeros((4, 96)), jnp.zeros((1, 2, 96, 256)), 1)
