"""Milliseconds a decode step takes: `graphs.decode` over a cache filled with random tokens."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu import variants
from benchmarks.gpu.model import Compiler, Model, decode_state, lower_decode, random_cache
from benchmarks.gpu.record import Record
from keye_jax import graphs
from keye_jax.config import KeyeConfig

PROGRAMS = {"dsa": graphs.decode, "dense": variants.dense_decode}

STEPS = graphs.MAX_DECODE_STEPS

CALLS = 5
"""Timed calls of STEPS tokens each."""

SPARE = (CALLS + 1) * STEPS
"""Tokens that a row is decoded by."""


@dataclass(frozen=True)
class Plan:
    """(batch, context) pairs; the cache holds `context` tokens a row when the last call ends."""

    sizes: tuple[tuple[int, int], ...]


def add(config: KeyeConfig, plan: Plan, compiler: Compiler) -> None:
    """Adds the programs ("decode", way, batch, context)."""
    for way, program in PROGRAMS.items():
        for batch, context in plan.sizes:
            lower = partial(lower_decode, program, config, context, batch)
            compiler.add(("decode", way, batch, context), lower)


def measure(model: Model, plan: Plan, compiler: Compiler, record: Record) -> None:
    """Fills decode_ms[batch][context][way]."""
    for batch, context in plan.sizes:
        for way in PROGRAMS:
            program = compiler.get(("decode", way, batch, context))
            if program is None:
                continue
            keys = ("decode_ms", batch, context, way)
            ms = record.attempt(keys, 5, partial(time_decode, model, program, batch, context))
            if ms is not None:
                rate = 1e3 * batch / ms
                print(f"decode batch {batch} {context:>7} {way:<5} {ms:8.3f} ms  {rate:7.0f} tokens/s", flush=True)


def time_decode(model: Model, program: Any, batch: int, context: int) -> float:
    """Milliseconds a step, over a random cache that ends full."""
    config = model.config
    cache = random_cache(config, batch, context, context - SPARE)
    logits = jnp.zeros((batch, config.text.vocab_size), jnp.float32)
    return time_steps(program, model.text, cache, logits, decode_state(batch), jnp.int32(STEPS))[0]


def time_steps(
    program: Any, params: Any, cache: Any, logits: jax.Array, state: Any, steps: jax.Array
) -> tuple[float, jax.Array]:
    """Milliseconds a step: of the median call, each waited for as the runtime does to show tokens. And the tokens
    [B, STEPS] of the first call, which is not counted.

    Args:
        cache, logits: taken over by the program; the cache has room for SPARE tokens.
        state: see `model.decode_state`.
        steps: STEPS, where the program wants it.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    taken, told = [], []
    for _ in range(CALLS + 1):
        begin = time.perf_counter()
        cache, logits, state, tokens, finite = jax.block_until_ready(program(params, cache, logits, state, steps))
        taken.append((time.perf_counter() - begin) / STEPS)
        told.append(tokens)
        if not bool(jnp.all(finite)) or bool(jnp.any(tokens == graphs.NO_TOKEN)):
            raise FloatingPointError("decoding gave logits that are not finite")
    return round(1e3 * sorted(taken[1:])[CALLS // 2], 4), told[0]
