"""That the checks find what they are for."""

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks.gpu import cases, cases_products, checks
from benchmarks.gpu.checks import Case, Outcome
from benchmarks.gpu.model import TINY, Compiler
from kernels_pallas import dispatch
from kernels_pallas.common import pack_bits, unpack_bits
from kernels_pallas.index_select import reference


def kernel() -> bool:
    """Whether what is being traced is the body under test."""
    return not dispatch._reference_only.get()


def outcome(function: Any, compare: Any = checks.rounding, bound: float = 1) -> Outcome:
    """Of a case whose reference doubles four numbers."""
    case = Case("doubled", function, lambda: (jnp.arange(4.0),), compare, bound)
    ((name, found),) = checks.Checks([case], Compiler()).run()
    assert name == "doubled"
    return found


def test_equal_bodies_pass() -> None:
    assert outcome(lambda x: 2 * x).passed


def test_a_wrong_kernel_fails() -> None:
    wrong = outcome(lambda x: (2.01 if kernel() else 2) * x)
    assert not wrong.passed
    assert wrong.error == pytest.approx(0.005 / 2e-5, rel=1e-2)


def test_a_kernel_that_gives_nan_fails() -> None:
    assert not outcome(lambda x: x * (jnp.nan if kernel() else 1)).passed


def test_a_kernel_that_changes_its_mind_fails() -> None:
    counter = itertools.count()

    def restless(x: jax.Array) -> jax.Array:
        return x + 1e-6 * jax.pure_callback(lambda: np.float32(next(counter)), jax.ShapeDtypeStruct((), jnp.float32))

    found = outcome(restless)
    assert found.error <= 1
    assert not found.repeats
    assert not found.passed


def test_a_kernel_that_does_not_trace_fails(capsys: pytest.CaptureFixture[str]) -> None:
    def broken(x: jax.Array) -> jax.Array:
        if kernel():
            raise NotImplementedError("no such tile")
        return x

    assert not outcome(broken).passed
    assert "no such tile" in capsys.readouterr().out


def test_integers_are_equal_or_wrong() -> None:
    a = jnp.arange(5)
    assert checks.rounding((a, jnp.ones(2)), (a, jnp.ones(2))) == 0
    assert checks.rounding((a.at[0].set(1), jnp.ones(2)), (a, jnp.ones(2))) == jnp.inf
    assert checks.unequal(a.at[1].set(3), a) == 1


def test_bits_of_all_widths_are_compared() -> None:
    for dtype in (jnp.float32, jnp.bfloat16, jnp.float8_e4m3fn, jnp.int32):
        ones = jnp.ones(3, dtype)
        assert checks.same_bits((ones, ones), (ones, ones))
        assert not checks.same_bits((ones, ones), (ones, ones.at[2].set(2)))


def test_selections_may_differ_among_equals_only() -> None:
    """One key exchanged for a clearly worse one, one key too few, a key that is not visible."""
    arguments = cases._index_inputs("real", 0, (1, 8, 128), (100,), TINY, jnp.float32)
    mask = np.array(reference.select_mask(*arguments, topk=16))
    scores = np.array(reference.index_scores(*arguments))

    def gap(mask: np.ndarray) -> float:
        return float(cases._score_gap(pack_bits(jnp.asarray(mask)), None, *arguments, topk=16))

    assert gap(mask) == 0
    best, next_best = (np.where(m, scores[0, 3], -np.inf).argmax() for m in (mask[0, 3], ~mask[0, 3]))
    swapped = mask.copy()
    swapped[0, 3, [best, next_best]] = False, True
    assert 0 < gap(swapped) <= 1
    fewer = mask.copy()
    fewer[0, 3, best] = False
    assert gap(fewer) == np.inf
    hidden = fewer.copy()
    hidden[0, 3, 127] = True
    assert gap(hidden) == np.inf


@pytest.mark.parametrize("kind", ["scattered", "local", "one key", "every second row empty", "every visible key"])
def test_patterns_of_bits_are_visible_keys(kind: str) -> None:
    start = jnp.array([0, 50], jnp.int32)
    mask = np.array(unpack_bits(cases._bits(kind, jax.random.key(0), (2, 8, 128), start, 16)))
    visible = np.arange(128) <= np.array([0, 50])[:, None, None] + np.arange(8)[:, None]
    assert mask.any()
    assert not (mask & ~visible).any()
    if kind == "one key":
        assert (mask.sum(-1) == 1).all()
    if kind == "every second row empty":
        assert (mask.sum(-1) == 0).any()


@pytest.mark.parametrize("kind", ["even", "few", "one group"])
def test_groups_sum_to_the_rows(kind: str) -> None:
    sizes = np.array(cases_products.group_sizes(kind, jax.random.key(0), 100, 16))
    assert sizes.sum() == 100
    assert kind != "even" or (sizes > 0).sum() > 8
    assert kind == "even" or (sizes == 0).sum() >= 14


def test_every_case_has_a_name_of_its_own() -> None:
    sizes = cases.TINY_SIZES
    parts = (cases.selection_cases, cases.attention_cases, cases_products.product_cases)
    names = [case.name for part in parts for case in part(TINY, sizes)]
    assert len(set(names)) == len(names)
