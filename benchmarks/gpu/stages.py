"""Where the time goes: every kernel alone, at the sizes and with the weights of the whole program, beside its floor.

Times are device time, as the profiler has it: a launch from Python takes longer than most stages of a decode step. A
stage's floor is its products at the measured bf16 rate, or its bytes at the measured memory rate, whichever is longer.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks import selections
from benchmarks.gpu import profile, variants
from benchmarks.gpu.cases_products import group_sizes
from benchmarks.gpu.floors import WEIGHT_BYTES, Rates, Work, experts_read
from benchmarks.gpu.model import DTYPE, Compiler, Model, random_cache
from benchmarks.gpu.rates import seconds
from benchmarks.gpu.record import Record
from keye_jax import ops
from keye_jax.config import KeyeConfig
from keye_jax.moe import moe as mixture
from keye_jax.params import abstract_params

CALLS = 4
"""Profiled calls of a stage, of which the first does not count."""

GROUPED = "grouped_swiglu"
"""The stage whose rate is grouped_gemm_tflops."""


@dataclass(frozen=True)
class Plan:
    """Tokens of a prefill chunk, contexts that its stages are timed at, and (batch, context) of decode steps."""

    chunk: int
    contexts: tuple[int, ...]
    steps: tuple[tuple[int, int], ...]

    @property
    def groups(self) -> dict[tuple[str, str], Callable[[Model], Iterator["Stage"]]]:
        """What makes the stages, by kind and name."""
        found: dict[tuple[str, str], Any] = {("prefill", "products"): partial(_products, length=self.chunk)}
        for context in self.contexts:
            chunk = partial(_chunk, context=context, length=min(self.chunk, context))
            found["prefill", str(context)] = chunk
        for batch, context in self.steps:
            found["decode", f"{batch}x{context}"] = partial(_step, batch=batch, context=context)
        return found


@dataclass(frozen=True)
class Stage:
    """Something to time: `calls` of it are in the whole program."""

    name: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    calls: int
    flops: float = 0.0
    bytes: float = 0.0

    def floor(self, rates: Rates) -> float:
        return max(self.flops / rates.flops, self.bytes / rates.bytes)


def add(config: KeyeConfig, plan: Plan, compiler: Compiler) -> None:
    """Adds the programs ("stage", kind, name, stage)."""
    params = abstract_params(config, DTYPE)
    for (kind, name), make in plan.groups.items():
        functions: dict[str, Any] = {}

        def arguments(params: Any, make: Any = make, functions: Any = functions) -> dict[str, Any]:
            stages = list(make(Model(config, params)))
            functions.update({stage.name: stage.run for stage in stages})
            return {stage.name: stage.args for stage in stages}

        for stage, shapes in jax.eval_shape(arguments, params).items():
            compiler.add(("stage", kind, name, stage), partial(jax.jit(functions[stage]).lower, *shapes))


def measure(model: Model, plan: Plan, compiler: Compiler, rates: Rates, record: Record) -> None:
    """Fills stages[kind][name][stage] and grouped_gemm_tflops."""
    for (kind, name), make in plan.groups.items():
        for stage in make(model) if record.allows(10, "stages", kind, name) else ():
            program = compiler.get(("stage", kind, name, stage.name))
            run = partial(_time, stage, program, rates)
            row = record.attempt(("stages", kind, name, stage.name), 2, run) if program else None
            if row is not None:
                rate = f"{row['tflops']:>7.1f} TFLOP/s" if stage.flops else f"{row['tb_per_s']:>7.2f} TB/s   "
                line = f"{kind} {name:<9} {stage.name:<26} {row['us']:>11.1f} us x {stage.calls:<3} {rate}"
                print(f"{line} {row['percent_of_floor']:>6.1f} % of floor", flush=True)
    row = record.get("stages", "prefill", "products", GROUPED)
    if row is not None:
        record.put(("grouped_gemm_tflops",), row["tflops"])


def _time(stage: Stage, program: Any, rates: Rates) -> dict[str, float]:
    """Of one call."""
    jax.block_until_ready(program(*stage.args))
    kernels = profile.trace(lambda: [program(*stage.args) for _ in range(CALLS)])
    taken = sum(us for us, _ in kernels.values()) / CALLS / 1e6 or seconds(program, *stage.args, budget=0.2)
    floor = stage.floor(rates)
    return {
        "us": round(1e6 * taken, 2),
        "calls": stage.calls,
        "floor_us": round(1e6 * floor, 2),
        "percent_of_floor": round(100 * floor / taken, 1),
        "tflops": round(stage.flops / taken / 1e12, 1),
        "tb_per_s": round(stage.bytes / taken / 1e12, 3),
    }


def _chunk(model: Model, context: int, length: int) -> Iterator[Stage]:
    """Selection and attention of a prompt's last chunk."""
    config, work = model.config, Work(model.config)
    t, s, L = config.text, config.sparse, config.text.num_hidden_layers
    first = context - length
    cache, layer, start = random_cache(config, 1, context, first), jnp.int32(1), jnp.array([first], jnp.int32)
    keys = iter(jax.random.split(jax.random.key(5, impl="rbg"), 8))
    idx_q = jax.random.normal(next(keys), (1, length, s.indexer_num_heads, s.indexer_head_dim))
    weights = jax.random.normal(next(keys), (1, length, s.indexer_num_heads))
    select = partial(ops.select_bits, topk=s.topk)
    arguments = (idx_q.astype(cache["idx_k"].dtype), weights, cache["idx_k"], cache.get("idx_scale"), layer, start)
    yield Stage("select_bits", select, arguments, L, work.index_flops(work.attended(first, length, dense=True)))

    q = jax.random.normal(next(keys), (1, length, t.num_attention_heads, t.head_dim), DTYPE)
    flops = work.attention_flops(work.attended(first, length))
    for name, bits_of in {"random": selections.random_bits, "local": selections.local_bits}.items():
        bits = bits_of(next(keys), first, queries=length, capacity=context, topk=s.topk)[None]
        attend = partial(ops.attend_bits, most=s.topk)
        yield Stage(f"attend_bits {name}", attend, (q, cache["kv"], layer, bits, start), L, flops)
    flops = work.attention_flops(work.attended(first, length, dense=True))
    yield Stage("dense attention", _dense_chunk, (q, cache["kv"], layer, start), 0, flops)


def _dense_chunk(q: jax.Array, kv: jax.Array, layer: jax.Array, start: jax.Array) -> jax.Array:
    return variants.attend_causal(q, kv, layer, None, start)


def _products(model: Model, length: int) -> Iterator[Stage]:
    """The experts of a chunk in any context, and one of its projections."""
    config, work, layers = model.config, Work(model.config), model.text["layers"]
    t, L, layer = config.text, config.text.num_hidden_layers, jnp.int32(1)
    k, moe = t.num_experts_per_tok, layers["moe"]
    keys = jax.random.split(jax.random.key(6, impl="rbg"), 5)
    sizes = group_sizes("even", keys[0], length * k, t.num_experts)
    m = jax.random.normal(keys[1], (length, t.hidden_size), DTYPE)
    positions = jax.random.permutation(keys[2], length * k).reshape(length, k).astype(jnp.int32)
    rows = jax.random.normal(keys[3], (length * k, t.hidden_size), DTYPE)
    hidden = jax.random.normal(keys[4], (length * k, t.moe_intermediate_size), DTYPE)
    flops, copied = work.expert_flops(length), float((length + length * k) * t.hidden_size * WEIGHT_BYTES)
    yield Stage("spread_rows", ops.spread_rows, (m, positions), L, bytes=copied)
    yield Stage(GROUPED, ops.grouped_swiglu, (rows, moe["gate_up_proj"], layer, sizes), L, flops * 2 / 3)
    weights = jnp.ones(length * k, jnp.float32)
    yield Stage("grouped_matmul down", _down, (hidden, moe["down_proj"], layer, sizes, weights), L, flops / 3)
    yield Stage("sum of experts", _sum_rows, (rows, positions), L, bytes=copied)
    stacks = {name: moe[name] for name in ("gate_up_proj", "down_proj")}
    whole = partial(mixture, config=t)
    yield Stage("all of the experts", whole, ({"router": moe["router"][1]}, stacks, layer, m), 0, flops)
    size = t.hidden_size * t.num_attention_heads * t.head_dim
    yield Stage("q projection", _q_projection, (m, layers["attn"]["q_proj"]), L, 2.0 * length * size)


def _down(x: jax.Array, w: jax.Array, layer: jax.Array, sizes: jax.Array, scale: jax.Array) -> jax.Array:
    return ops.grouped_matmul(x, w, layer, sizes, x.dtype, scale)


def _sum_rows(rows: jax.Array, positions: jax.Array) -> jax.Array:
    return jnp.sum(rows[positions], axis=1, dtype=jnp.float32).astype(rows.dtype)


def _q_projection(a: jax.Array, w: jax.Array) -> jax.Array:
    return ops.einsum_f32("cd,dhk->chk", a, w[1]).astype(a.dtype)


def _step(model: Model, batch: int, context: int) -> Iterator[Stage]:
    """Of one decode step over a full cache."""
    config, work, layers = model.config, Work(model.config), model.text["layers"]
    t, s, L = config.text, config.sparse, config.text.num_hidden_layers
    cache, layer = random_cache(config, batch, context, context - 1), jnp.int32(1)
    kv, start, D = cache["kv"], cache["length"], t.hidden_size
    keys = iter(jax.random.split(jax.random.key(7, impl="rbg"), 8))
    idx_q = jax.random.normal(next(keys), (batch, 1, s.indexer_num_heads, s.indexer_head_dim))
    weights = jax.random.normal(next(keys), (batch, 1, s.indexer_num_heads))
    select = partial(ops.select_ids, topk=s.topk)
    arguments = (idx_q.astype(cache["idx_k"].dtype), weights, cache["idx_k"], cache.get("idx_scale"), layer, start)
    yield Stage("select_ids", select, arguments, L, bytes=float(batch * context * work.index_key_bytes))

    q = jax.random.normal(next(keys), (batch, t.num_attention_heads, t.head_dim), DTYPE)
    count, token = min(s.topk, context), 2 * t.num_key_value_heads * t.head_dim * WEIGHT_BYTES
    ids = jnp.tile(jnp.arange(count, dtype=jnp.int32) * (context // count), (batch, 1))
    yield Stage("attend_ids", ops.attend_ids, (q, kv, layer, ids), L, bytes=float(batch * count * token))
    dense = partial(variants.attend_all, kernel=ops.attend_ids)
    yield Stage("dense attention", dense, (q, kv, layer, start[:, None]), 0, bytes=float(batch * context * token))

    h = jax.random.normal(next(keys), (batch, D), DTYPE)
    o_proj, moe = layers["attn"]["o_proj"], layers["moe"]
    yield Stage("project_add", ops.project_add, (q, o_proj, layer, h), L, bytes=float(o_proj[0].size * WEIGHT_BYTES))
    experts = tuple(moe[name] for name in ("router", "gate_up_proj", "down_proj"))
    read = (D * t.num_experts + experts_read(config, batch) * work.expert_weights) * WEIGHT_BYTES
    step = partial(ops.moe_step, k=t.num_experts_per_tok, renormalise=t.norm_topk_prob, eps=t.rms_norm_eps)
    yield Stage("moe_step", step, (h, layers["post_attention_layernorm"], *experts, layer), L, bytes=read)
