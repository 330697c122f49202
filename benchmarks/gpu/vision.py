"""Seconds to encode an hour of video: `graphs.vision` over batches of frames that are already on the device."""

import time
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.model import Compiler, Model, lower_vision
from benchmarks.gpu.record import Record
from keye_jax.config import KeyeConfig


@dataclass(frozen=True)
class Plan:
    """`frames` frames of side x side patches, `batch` of them in a call."""

    frames: int = 2880
    batch: int = 32
    side: int = 16


def add(config: KeyeConfig, plan: Plan, compiler: Compiler) -> None:
    """Adds the program ("vision",)."""
    compiler.add(("vision",), partial(lower_vision, config, plan.batch, plan.side))


def measure(model: Model, plan: Plan, compiler: Compiler, record: Record) -> None:
    """Fills vit_s."""
    program = compiler.get(("vision",))
    if program is not None:
        taken = record.attempt(("vit_s",), 10, partial(_time, model, plan, program))
        print(f"vision {plan.frames} frames of {plan.side**2} patches: {taken} s", flush=True)


def _time(model: Model, plan: Plan, program: Any) -> float:
    v, calls = model.config.vision, -(-plan.frames // plan.batch)
    shape = (plan.batch * plan.side**2, v.num_channels, v.patch_size, v.patch_size)
    patches = jax.random.normal(jax.random.key(8, impl="rbg"), shape)
    grid = jnp.tile(jnp.array([1, plan.side, plan.side], jnp.int32), (plan.batch, 1))
    rows = jax.block_until_ready(program(model.eyes, patches, grid))
    if not bool(jnp.all(jnp.isfinite(rows.astype(jnp.float32)))):
        raise FloatingPointError("vision rows are not finite")
    begin = time.perf_counter()
    for _ in range(calls):
        rows = program(model.eyes, patches, grid)
    jax.block_until_ready(rows)
    # Frames of an incomplete last batch cost as much as those of a full one; they are not counted.
    return round((time.perf_counter() - begin) * plan.frames / (calls * plan.batch), 4)
