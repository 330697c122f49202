"""The TPU bodies of a decode step's experts, interpreted on the CPU, against the references."""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.grouped_matmul import decode, decode_reference, decode_tpu, decode_tpu_router
from tests.kernels.test_grouped_matmul_decode import LAYER, SPREAD, Case, assert_close, spread

INTERPRET = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
ONE_TILE_OF_TWO = decode_tpu.Tuning(tile=128)


def compare(case: Case, tuning: decode_tpu.Tuning = ONE_TILE_OF_TWO) -> None:
    arguments = case.residual(), *case.weights(), jnp.int32(LAYER)
    expected = jax.jit(partial(decode_reference.moe_step, **case.routing))(*arguments)
    kernel = partial(decode_tpu.moe_step, **case.routing, tuning=tuning, interpret=INTERPRET)
    actual = jax.block_until_ready(jax.jit(kernel)(*arguments))
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    assert_close(actual, expected, case.dtype)


@pytest.mark.parametrize(
    "case",
    [
        Case(1, D=128, F=256, E=16, k=8, dtype=jnp.bfloat16),
        Case(1, D=256, F=128, k=1),  # the second core has nothing to do
        Case(5, D=128, F=128, E=5, k=5, dtype=jnp.bfloat16, equal_rows=True),  # all rows share all experts
        Case(17, D=128, F=128, E=16, k=2),  # rows of two registers; more pairs than experts
        Case(2, D=128, F=256, E=16, k=8, dtype=jnp.bfloat16, stored=jnp.int8),
        Case(5, D=256, F=128, E=12, k=3, dtype=jnp.bfloat16, stored=jnp.float8_e4m3fn),  # no whole blocks of scales
        Case(3, D=128, F=128, E=5, k=2, stored=jnp.int8),
    ],
    ids=str,
)
def test_step_equals_the_reference(case: Case) -> None:
    compare(case)


@pytest.mark.parametrize("experts", SPREAD.values(), ids=SPREAD)
def test_experts_of_other_devices_add_nothing_and_are_not_listed(experts: list[list[int]]) -> None:
    case = Case(3, D=128, F=128, k=3, dtype=jnp.bfloat16)
    arguments = spread(case, experts)
    expected = decode_reference.experts_add(*arguments)
    actual = jax.block_until_ready(jax.jit(partial(decode_tpu.experts_add, interpret=INTERPRET))(*arguments))
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    rows = [any(expert >= 0 for expert in row) for row in experts]
    np.testing.assert_array_equal(np.asarray(actual).any(axis=1), rows)
    assert_close(actual, expected, case.dtype)
    *_, listed = decode_tpu_router.arrange(arguments[0], arguments[5], arguments[4], case.E, interpret=INTERPRET)
    distinct = sorted({expert for row in experts for expert in row} - {-1})
    np.testing.assert_array_equal(listed[0, : len(distinct)], distinct)
    np.testing.assert_array_equal(listed[1], len(distinct))


def test_a_tile_may_hold_all_columns() -> None:
    compare(Case(2, D=128, F=256, E=6, k=3, renormalise=False), decode_tpu.Tuning())


@pytest.mark.parametrize(
    "case",
    [
        Case(1, D=128, E=128, k=8, dtype=jnp.bfloat16),
        Case(19, D=128, E=6, k=3, renormalise=False),
        Case(3, D=128, E=8, k=4, flat_router=True),  # equal scores: the lowest experts in order
        Case(2, D=128, E=5, k=5),
    ],
    ids=str,
)
def test_routing_equals_the_reference_and_lists_the_experts(case: Case) -> None:
    norm, router, *_ = case.weights()
    arguments = case.residual(), norm, router, jnp.int32(LAYER)
    m, weights, experts = jax.jit(partial(decode_reference.norm_route, **case.routing))(*arguments)
    routed = jax.jit(partial(decode_tpu_router.route, **case.routing, interpret=INTERPRET))(*arguments)
    actual_m, *rest = jax.block_until_ready(routed)
    actual_weights, actual_experts, listed = (np.asarray(x) for x in rest)
    rows = slice(None, case.rows)
    assert_close(actual_m[rows], m, case.dtype)
    np.testing.assert_allclose(actual_weights[rows], weights, rtol=1e-5)
    np.testing.assert_array_equal(actual_experts[rows], experts)
    assert (actual_experts[case.rows :] == -1).all()
    distinct = np.unique(np.asarray(experts))
    np.testing.assert_array_equal(listed[0, : len(distinct)], distinct)
    np.testing.assert_array_equal(listed[1], len(distinct))
    # Behind the end each core's last one, or the other's first: nothing new to fetch.
    for core in range(decode_tpu_router.LISTS):
        mine = listed[0, core::2]
        used = len(distinct[core::2])
        assert (mine[used:] == (mine[used - 1] if used else distinct[0])).all()


def test_norm_route_has_the_rows_that_it_was_given() -> None:
    case = Case(3, D=128)
    arguments = case.residual(), *case.weights()[:2], jnp.int32(LAYER)
    routed = jax.eval_shape(partial(decode_tpu_router.norm_route, **case.routing, interpret=INTERPRET), *arguments)
    assert routed == jax.eval_shape(partial(decode_reference.norm_route, **case.routing), *arguments)


def test_rows_of_nan_name_experts_that_exist_and_leave_other_rows_alone() -> None:
    case = Case(3, D=128, F=128)
    h, weights = case.residual(), case.weights()
    step = jax.jit(partial(decode_tpu.moe_step, **case.routing, interpret=INTERPRET))
    expected = step(h, *weights, jnp.int32(LAYER))
    actual = np.asarray(step(h.at[1].set(jnp.nan), *weights, jnp.int32(LAYER)))
    assert np.isnan(actual[1]).all()
    # The row names other experts now, and so the cores divide those of the other rows differently.
    np.testing.assert_allclose(actual[::2], expected[::2], rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("rows", [1, 8, 64])
def test_programs_for_tpus_at_the_published_sizes(rows: int) -> None:
    S = partial(jax.ShapeDtypeStruct, dtype=jnp.bfloat16)
    L, D, E, F = 48, 2048, 128, 768
    args = (S((rows, D)), S((L, D)), S((L, D, E)), S((L, E, D, 2 * F)), S((L, E, F, D)))
    layer = jax.ShapeDtypeStruct((), jnp.int32)

    step = partial(decode.moe_step, k=8, renormalise=True, eps=1e-6)
    text = jax.jit(step).trace(*args, layer).lower(lowering_platforms=("tpu",)).as_text()
    assert text.count("stablehlo.custom_call @tpu_custom_call") == 2
    assert "stablehlo.while" not in text
