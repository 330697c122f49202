"""Runs kernels against their references on this device. What is run is in `cases`.

A case is a public function of `kernels_pallas` with arguments. It runs twice with kernels, which must give the same
bits, and once under `reference_only`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from benchmarks.gpu.model import Compiler
from kernels_pallas.dispatch import reference_only

Compare = Callable[..., Any]
"""(result, the reference's result, *arguments) → error, a number."""


@dataclass(frozen=True)
class Case:
    """Arguments for a function, and how far from the reference its result may be.

    Args:
        function: takes arrays only; cases of equal functions and shapes share their compiled programs.
        make: draws the arguments.
        bound: the largest error that passes.
    """

    name: str
    function: Callable[..., Any]
    make: Callable[[], tuple[Any, ...]]
    compare: Compare
    bound: float


@dataclass
class Outcome:
    """Of one case. `custom_kernel`: whether a kernel of ours is in the program, or only what XLA makes of the
    reference."""

    error: float
    bound: float
    repeats: bool
    custom_kernel: bool
    passed: bool = field(init=False)

    def __post_init__(self) -> None:
        self.passed = self.repeats and self.error <= self.bound


class Checks:
    """Cases whose programs are being compiled.

    Args:
        options: XLA's.
    """

    def __init__(self, cases: Sequence[Case], compiler: Compiler, **options: Any):
        self._cases, self._compiler = cases, compiler
        for case in cases:
            for key, lower in _programs(case).items():
                compiler.add(key, lower, **options)

    def run(self) -> Iterator[tuple[str, Outcome]]:
        """Outcomes by name, case after case."""
        for case in self._cases:
            yield case.name, attempt(case.name, partial(self._outcome, case))

    def _outcome(self, case: Case) -> Outcome:
        keys = list(_programs(case))
        make, kernel, reference, compare = (self._compiler.get(key) for key in keys)
        arguments = make()
        once, again, expected = kernel(*arguments), kernel(*arguments), reference(*arguments)
        error, same = compare(once, again, expected, *arguments)
        return Outcome(float(error), case.bound, bool(same), keys[1] in self._compiler.kernels)


def attempt(name: str, run: Callable[[], Outcome]) -> Outcome:
    """What `run` returns; if it raises, a failure."""
    try:
        return run()
    except Exception as error:
        print(f"{name}: {type(error).__name__}: {str(error)[:500]}", flush=True)
        return Outcome(float("inf"), 0, False, False)


def _programs(case: Case) -> dict[Any, Callable[[], Any]]:
    """What a case runs, as functions that lower it: its arguments, the kernel, the reference, the comparison."""
    shapes = jax.eval_shape(case.make)
    key = (case.function, *((x.shape, x.dtype) for x in jax.tree.leaves(shapes)))

    # Functions of their own: `jit` would remember the trace with the other body.
    def kernel() -> Any:
        return jax.jit(lambda *args: case.function(*args)).lower(*shapes)

    def reference() -> Any:
        with reference_only():
            return jax.jit(lambda *args: case.function(*args)).lower(*shapes)

    def compare(once: Any, again: Any, expected: Any, *args: Any) -> tuple[Any, jax.Array]:
        return case.compare(once, expected, *args), same_bits(once, again)

    def comparison() -> Any:
        with reference_only():
            result = jax.eval_shape(lambda *args: case.function(*args), *shapes)
        return jax.jit(compare).lower(result, result, result, *shapes)

    return {
        (case.name, "arguments"): lambda: jax.jit(lambda: case.make()).lower(),
        (*key, "kernel"): kernel,
        (*key, "reference"): reference,
        (*key, case.compare, "comparison"): comparison,
    }


def same_bits(a: Any, b: Any) -> jax.Array:
    """Whether two trees of arrays hold the same bits."""

    def equal(x: jax.Array, y: jax.Array) -> jax.Array:
        word = {1: jnp.uint8, 2: jnp.uint16, 4: jnp.uint32}[x.dtype.itemsize]
        return jnp.all(lax.bitcast_convert_type(x, word) == lax.bitcast_convert_type(y, word))

    return jnp.all(jnp.array([equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)]))


def unequal(result: Any, expected: Any, *_: Any) -> jax.Array:
    """How many integers differ."""
    return jnp.sum(result != expected)


BF16 = 2.0**-7
"""A result in bfloat16 is off by half of 2**-8 at most, and so are the probabilities or hidden values that went into
its last product: together 2**-8 of the largest magnitude, and the reference the same the other way."""

FLOAT8 = 2.0**-3
"""A value next to the middle of two float8_e4m3fn values may round either way."""

FLOAT32 = 2e-5
"""Sums of up to 2,048 float32 products in another order."""


def rounding(result: Any, expected: Any, *_: Any, float32: float = FLOAT32) -> jax.Array:
    """Largest difference in a tree of arrays as a part of what rounding explains, which is a part of each array's
    largest magnitude; infinite where a result is not finite or integers differ."""
    tolerance = {jnp.dtype(jnp.float8_e4m3fn): FLOAT8, jnp.dtype(jnp.bfloat16): BF16, jnp.dtype(jnp.float32): float32}

    def error(x: jax.Array, y: jax.Array) -> jax.Array:
        if jnp.issubdtype(x.dtype, jnp.integer):
            return jnp.where(jnp.all(x == y), 0.0, jnp.inf)
        wide, exact = x.astype(jnp.float32), y.astype(jnp.float32)
        scale = jnp.maximum(jnp.max(jnp.abs(exact)), 1e-30) * tolerance[x.dtype]
        return jnp.where(jnp.all(jnp.isfinite(wide)), jnp.max(jnp.abs(wide - exact)) / scale, jnp.inf)

    pairs = zip(jax.tree.leaves(result), jax.tree.leaves(expected), strict=True)
    return jnp.max(jnp.array([error(x, y) for x, y in pairs]))
