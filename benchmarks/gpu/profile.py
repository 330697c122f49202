"""What a profile shows: device time by kernel, of one prefill chunk at the longest context and of one decode call."""

import collections
import re
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
from jax.profiler import ProfileData

from benchmarks.gpu import decode, prefill
from benchmarks.gpu.model import Compiler, Model, chunks, decode_state, empty_cache, random_cache
from benchmarks.gpu.record import Record

TOP = 16
"""Kernels listed."""

Rows = dict[str, list[float]]
"""[microseconds of device time, launches] by kernel."""


def measure(model: Model, prefills: prefill.Plan, decodes: decode.Plan, compiler: Compiler, record: Record) -> None:
    """Fills profile[program] with the kernels that take longest."""
    config, vocabulary = model.config, model.config.text.vocab_size
    context = max((c for c in prefills.contexts if c <= 131072), default=0)
    program = compiler.get(("prefill", "dsa_random", context))
    if program is not None:
        name = f"last prefill chunk at {context}"
        # What is selected depends on the cache, and with it the time: the chunk continues a prompt, not random keys.
        _report(name, record.attempt(("profile", name), 20, partial(_trace_prompt, program, model, prefills, context)))
    for batch, context in decodes.sizes:
        program = compiler.get(("decode", "dsa", batch, context))
        if program is not None:
            cache = random_cache(config, batch, context, context - decode.STEPS)
            rest = (jnp.zeros((batch, vocabulary)), decode_state(batch), jnp.int32(decode.STEPS))
            name = f"decode {batch}x{context}"
            _report(name, record.attempt(("profile", name), 8, partial(_trace_step, program, model, cache, *rest)))


def _report(name: str, rows: Rows | None) -> None:
    if rows is None:
        return
    total = sum(us for us, _ in rows.values())
    print(f"{name}: {total / 1e3:.2f} ms of device time", flush=True)
    for kernel, (us, count) in rows.items():
        print(f"  {us / 1e3:9.3f} ms {100 * us / max(total, 1e-9):5.1f} % {count:>6} x {kernel}", flush=True)


def _trace_prompt(program: Any, model: Model, plan: prefill.Plan, context: int) -> Rows:
    """Of a prompt's last chunk."""
    *parts, last = chunks(model.config, context, plan.length(context))
    cache = empty_cache(model.config, 1, context)
    logits = jnp.zeros((1, model.config.text.vocab_size), jnp.float32)
    for part in parts:
        cache, logits = program(model.text, cache, logits, part)
    cache = jax.block_until_ready(cache)
    return _longest(trace(lambda: program(model.text, cache, logits, last)))


def _trace_step(program: Any, model: Model, cache: Any, logits: jax.Array, *rest: Any) -> Rows:
    """Of one call, after a warm one."""
    length = cache["length"] + 0  # the cache is donated
    cache, logits, *_ = program(model.text, cache, logits, *rest)
    cache = jax.block_until_ready({**cache, "length": length})
    return _longest(trace(lambda: program(model.text, cache, logits, *rest)))


def _longest(kernels: dict[str, tuple[float, int]]) -> Rows:
    """Those that take longest, and all others as "other"."""
    longest = sorted(kernels.items(), key=lambda row: -row[1][0])
    found = {kernel: [round(us, 1), count] for kernel, (us, count) in longest[:TOP]}
    others = [row for _, row in longest[TOP:]]
    found["other"] = [round(sum(us for us, _ in others), 1), sum(count for _, count in others)]
    return found


def trace(run: Callable[[], Any]) -> dict[str, tuple[float, int]]:
    """Microseconds of device time and launches by kernel, of whatever `run` launches; empty on a CPU."""
    with tempfile.TemporaryDirectory() as folder:
        with jax.profiler.trace(folder):
            jax.block_until_ready(run())
        files = sorted(Path(folder).rglob("*.xplane.pb"))
        return device_time(ProfileData.from_file(str(files[-1])))


def device_time(data: Any) -> dict[str, tuple[float, int]]:
    """Microseconds and number of launches by kernel; kernels that differ by a number at the end are one."""
    found: dict[str, tuple[float, int]] = collections.defaultdict(lambda: (0.0, 0))
    for plane in data.planes:
        if "GPU" not in plane.name or "Host" in plane.name:
            continue
        for line in plane.lines:
            if not line.name.startswith("Stream"):
                continue
            for event in line.events:
                name = re.sub(r"(_\d+)+$", "", event.name)
                us, count = found[name]
                found[name] = us + event.duration_ns / 1e3, count + 1
    return dict(found)
