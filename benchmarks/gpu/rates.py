"""What this device does at best, measured in the same run: the two rates that floors are made of. And how long a call
takes."""

import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.floors import Rates


def seconds(function: Callable[..., Any], *args: Any, budget: float = 0.5) -> float:
    """Of one call of a compiled function: the median of five batches of asynchronous calls, after a warm one."""
    jax.block_until_ready(function(*args))
    begin = time.perf_counter()
    jax.block_until_ready(function(*args))
    once = time.perf_counter() - begin
    calls, taken = max(1, min(20, int(budget / 5 / once))), []
    for _ in range(5):
        begin = time.perf_counter()
        for _ in range(calls):
            result = function(*args)
        jax.block_until_ready(result)
        taken.append((time.perf_counter() - begin) / calls)
    return sorted(taken)[2]


def measure(large: int, side: int) -> Rates:
    """Args: bytes of the copy, and rows and columns of the square product in bfloat16."""
    words = jnp.zeros(large // 4, jnp.uint32)
    copy = seconds(jax.jit(lambda x: x + 1), words)
    key = jax.random.key(0, impl="rbg")
    a, b = (jax.random.normal(k, (side, side), jnp.bfloat16) for k in jax.random.split(key))
    product = seconds(jax.jit(lambda a, b: a @ b), a, b)
    return Rates(flops=2.0 * side**3 / product, bytes=2.0 * words.nbytes / copy)
