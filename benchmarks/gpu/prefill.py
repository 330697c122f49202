"""Seconds to prefill a whole prompt in chunks, and the device memory that it takes; batch 1.

Three ways, see `variants`: dsa_random is the model as it is, whose random weights select keys without locality;
dsa_local pays for the same selection and attends to local keys instead; dense attends to all.
"""

import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import selections
from benchmarks.gpu import variants
from benchmarks.gpu.model import GIB, Compiler, Model, chunks, empty_cache, lower_prefill, peak_bytes
from benchmarks.gpu.record import Record
from keye_jax import graphs
from keye_jax.config import KeyeConfig

PROGRAMS = {"dsa_random": graphs.prefill, "dsa_local": variants.local_prefill, "dense": variants.dense_prefill}


LONG = 262144
"""Tokens of a prompt that is prefilled once, after its first chunk."""


@dataclass(frozen=True)
class Plan:
    """Prompt lengths, tokens in a chunk (shorter prompts are one chunk), and timed runs of a prompt."""

    contexts: tuple[int, ...]
    chunk: int
    repeats: int = 2

    def length(self, context: int) -> int:
        return min(self.chunk, context)


def add(config: KeyeConfig, plan: Plan, compiler: Compiler) -> None:
    """Adds the programs ("prefill", way, context)."""
    for way, program in PROGRAMS.items():
        for context in plan.contexts:
            if way == "dsa_local" and context == selections.POOL:
                continue  # there, 16 queries share every key
            part = jax.eval_shape(lambda n=context, way=way: next(_parts(config, way, n, plan.length(n))))
            compiler.add(("prefill", way, context), partial(lower_prefill, program, config, context, part))


def _parts(config: KeyeConfig, way: str, context: int, length: int) -> Iterator[Any]:
    """The prompt's chunks, each with its selection where that is made beforehand."""
    key = jax.random.key(4, impl="rbg")
    for number, part in enumerate(chunks(config, context, length)):
        if way == "dsa_local":
            own, first = jax.random.fold_in(key, number), number * length
            bits = selections.local_bits(own, first, queries=length, capacity=context, topk=config.sparse.topk)
            yield {**part, "bits": bits[None]}
        else:
            yield part


def measure(
    model: Model, plan: Plan, ways: Sequence[str], contexts: Sequence[int], compiler: Compiler, record: Record
) -> None:
    """Fills prefill_s[context][way], and peak_gib[context] for the model itself: let it come first and contexts rise,
    then the most that the device had in use so far was in use for it."""
    for way in ways:
        for context in contexts:
            program = compiler.get(("prefill", way, context))
            if program is None:
                continue
            run = partial(_time, model, way, program, context, plan, record)
            seconds = record.attempt(("prefill_s", context, way), _guess(record, way, plan, context), run)
            if seconds is None:
                continue
            if way == "dsa_random":
                record.put(("peak_gib", context), round(_peak(program) / GIB, 2))
                record.put(("compiled_gib", context), round(peak_bytes(program) / GIB, 2))
            print(f"prefill {context:>7} {way:<11} {seconds:8.3f} s  {context / seconds:9.0f} tokens/s", flush=True)


def _guess(record: Record, way: str, plan: Plan, context: int) -> float:
    """Seconds that all runs of a context will take, from a shorter one and growth by the square."""
    known = [(n, record.get("prefill_s", n, way)) for n in plan.contexts if n < context]
    known = [(n, seconds) for n, seconds in known if seconds]
    if not known:
        return 0.0
    length, seconds = known[-1]
    return seconds * (context / length) ** 2 * (_repeats(plan, context) + 0.2)


def _repeats(plan: Plan, context: int) -> int:
    return plan.repeats if context < LONG else 1


def _time(model: Model, way: str, program: Any, context: int, plan: Plan, record: Record) -> float | None:
    """Median over whole prompts, warm. None if there is no time."""
    parts = list(_parts(model.config, way, context, plan.length(context)))
    logits = jnp.zeros((1, model.config.text.vocab_size), jnp.float32)

    def prompt(parts: list[Any]) -> float:
        return time_prompt(program, model.text, (empty_cache(model.config, 1, context), logits + 0), parts)[0]

    prompt(parts[:1])
    # The first chunk is the fastest one.
    if not record.allows(prompt(parts[:1]) * len(parts) * _repeats(plan, context), "prefill_s", context, way):
        return None
    return round(statistics.median(prompt(parts) for _ in range(_repeats(plan, context))), 4)


def time_prompt(
    program: Any, params: Any, carried: tuple[Any, jax.Array], parts: Sequence[Any]
) -> tuple[float, jax.Array]:
    """Seconds from the first chunk's dispatch to the last logits, and these [1, V].

    Args:
        carried: an empty cache and logits, which the program takes over.
        parts: the prompt's chunks.

    Raises:
        FloatingPointError: logits that are not finite.
    """
    cache, last = jax.block_until_ready(carried)
    begin = time.perf_counter()
    for part in parts:
        cache, last = program(params, cache, last, part)
    jax.block_until_ready((cache, last))
    seconds = time.perf_counter() - begin
    if not bool(jnp.all(jnp.isfinite(last))):
        raise FloatingPointError("a prefill ends in logits that are not finite")
    return seconds, last


def _peak(program: Any) -> int:
    """Bytes in use at most so far, as the device counts them, or as compiled where it does not count."""
    stats = jax.devices()[0].memory_stats() or {}
    return stats.get("peak_bytes_in_use") or peak_bytes(program)
