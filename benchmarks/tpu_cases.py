"""What `benchmarks.tpu_kernels` compiles: the public kernel functions at the published model's sizes, with the
operations and the bytes of HBM that the schedule of each takes (its module's head says why)."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.floors import WEIGHT_BYTES, Work, experts_read
from benchmarks.published import CONFIG
from keye_jax import KeyeConfig, ops
from keye_jax.cache import abstract_cache
from keye_jax.config import IndexerDtype
from keye_jax.params import abstract_params

CONTEXT = 262144
"""Slots of the cache; the calls are the last of a sequence that fills it."""
CHUNK, PATCHES, FRAME = 512, 8192, 256
LAYERS = 2
"""Of the stacks that the kernels read from: few, so that the smallest chip holds four rows of cache. Kernels take any
number of layers; the whole model is compiled by `benchmarks.tpu_aot`."""
DTYPE = jnp.bfloat16


@dataclass(frozen=True)
class Case:
    """One call of a public kernel function."""

    kernel: str
    shape: str
    run: Callable[..., Any]
    args: tuple[Any, ...]
    flops: float
    bytes: float


def cases() -> Iterator[Case]:
    """All kernels, prefill first."""
    for indexer in ("fp8", "bf16"):
        yield from _selection(_config(indexer), indexer)
    config = _config("fp8")
    yield from _attention(config)
    yield from _experts(config)
    yield _vision(config)


def _config(indexer: IndexerDtype) -> KeyeConfig:
    config = KeyeConfig.from_hf(CONFIG, indexer_dtype=indexer)
    return replace(config, text=replace(config.text, num_hidden_layers=LAYERS))


def _array(shape: tuple[int, ...], dtype: Any = DTYPE) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype)


_SCALAR = _array((), jnp.int32)


def _selection(config: KeyeConfig, indexer: IndexerDtype) -> Iterator[Case]:
    s, work = config.sparse, Work(config)
    for batch, chunk in ((1, CHUNK), (1, 1), (4, 1)):
        cache = abstract_cache(config, batch, CONTEXT, DTYPE)
        heads = (batch, chunk, s.indexer_num_heads)
        q = _array((*heads, s.indexer_head_dim), cache["idx_k"].dtype)
        inputs = (q, _array(heads, jnp.float32), cache["idx_k"], cache.get("idx_scale"), _SCALAR)
        run = ops.select_bits if chunk > 1 else ops.select_ids
        pairs = batch * work.attended(CONTEXT - chunk, chunk, dense=True)
        passes = -(-chunk // QUERIES)
        read = batch * passes * CONTEXT * work.index_key_bytes + batch * chunk * CONTEXT // 8 * (chunk > 1)
        name = "select_bits" if chunk > 1 else "select_ids"
        shape = f"{batch} x {chunk} of {CONTEXT}, {indexer} keys"
        args = (*inputs, _array((batch,), jnp.int32))
        yield Case(name, shape, partial(run, topk=s.topk), args, work.index_flops(pairs), float(read))


QUERIES = 32
"""Of a block of `select_bits` at this context: each block reads all keys. Twice as many on v5e and v6e."""
ATTENDING = 64
"""Of a block of `attend_bits`: each block reads the pages that one of its queries selected, at worst all."""


def _attention(config: KeyeConfig) -> Iterator[Case]:
    t, s = config.text, config.sparse
    token = 2 * t.num_key_value_heads * t.head_dim * WEIGHT_BYTES
    work = Work(config)
    cache = abstract_cache(config, 1, CONTEXT, DTYPE)
    q = _array((1, CHUNK, t.num_attention_heads, t.head_dim))
    args = (q, cache["kv"], _SCALAR, _array((1, CHUNK, CONTEXT // 32), jnp.uint32), _array((1,), jnp.int32))
    flops = work.attention_flops(CHUNK * CONTEXT)
    read = -(-CHUNK // ATTENDING) * CONTEXT * token
    shape = f"1 x {CHUNK} of {CONTEXT}, every page"
    yield Case("attend_bits", shape, partial(ops.attend_bits, most=s.topk), args, flops, float(read))
    yield from _parts(config)
    for batch in (1, 4):
        cache = abstract_cache(config, batch, CONTEXT, DTYPE)
        q = _array((batch, t.num_attention_heads, t.head_dim))
        args = (q, cache["kv"], _SCALAR, _array((batch, s.topk), jnp.int32))
        flops = work.attention_flops(batch * s.topk)
        yield Case(
            "attend_ids", f"{batch} x {s.topk} of {CONTEXT}", ops.attend_ids, args, flops, batch * s.topk * token
        )


def _parts(config: KeyeConfig) -> Iterator[Case]:
    """Attention over an eighth of the keys, as in a program for eight devices."""
    t, s = config.text, config.sparse
    token = 2 * t.num_key_value_heads * t.head_dim * WEIGHT_BYTES
    work, slots = Work(config), CONTEXT // 8
    cache = abstract_cache(config, 1, slots, DTYPE)
    q = _array((1, CHUNK, t.num_attention_heads, t.head_dim))
    args = (q, cache["kv"], _SCALAR, _array((1, CHUNK, slots // 32), jnp.uint32), _array((1,), jnp.int32))
    read = -(-CHUNK // ATTENDING) * slots * token + 4 * q.size
    shape = f"1 x {CHUNK} of {slots}, every page"
    flops = work.attention_flops(CHUNK * slots)
    yield Case("attend_bits_lse", shape, partial(ops.attend_bits_lse, most=s.topk), args, flops, float(read))
    args = (q.update(shape=(1, *q.shape[2:])), cache["kv"], _SCALAR, _array((1, s.topk), jnp.int32))
    shape = f"1 x {s.topk} of {slots}"
    yield Case("attend_ids_lse", shape, ops.attend_ids_lse, args, work.attention_flops(s.topk), float(s.topk * token))


def _experts(config: KeyeConfig) -> Iterator[Case]:
    t, work = config.text, Work(config)
    layers = abstract_params(config, DTYPE)["text"]["layers"]
    moe, D, F, E, k = layers["moe"], t.hidden_size, t.moe_intermediate_size, t.num_experts, t.num_experts_per_tok
    rows, sizes = CHUNK * k, _array((E,), jnp.int32)
    flops = work.expert_flops(CHUNK)
    shape = f"{CHUNK} x {k} of {E} experts"
    read = WEIGHT_BYTES * (2 * E * D * F + 2 * rows * D + rows * F)
    args = (_array((rows, D)), moe["gate_up_proj"], _SCALAR, sizes)
    yield Case("grouped_swiglu", shape, ops.grouped_swiglu, args, flops * 2 / 3, float(read))
    read = WEIGHT_BYTES * (E * D * F + 2 * rows * F + rows * D)
    args = (_array((rows, F)), moe["down_proj"], _SCALAR, sizes, _array((rows,), jnp.float32))
    yield Case("grouped_matmul", shape, _down, args, flops / 3, float(read))
    step = partial(ops.moe_step, k=k, renormalise=t.norm_topk_prob, eps=t.rms_norm_eps)
    for batch in (1, 8):
        weights = (layers["post_attention_layernorm"], moe["router"], moe["gate_up_proj"], moe["down_proj"], _SCALAR)
        read = experts_read(config, batch) * work.expert_weights * WEIGHT_BYTES
        args = (_array((batch, D)), *weights)
        yield Case("moe_step", f"{batch} x {k} of {E} experts", step, args, work.expert_flops(batch), read)


def _down(x: Any, w: Any, layer: Any, sizes: Any, scale: Any) -> Any:
    return ops.grouped_matmul(x, w, layer, sizes, x.dtype, scale)


def _vision(config: KeyeConfig) -> Case:
    v = config.vision
    tokens = _array((PATCHES, v.num_attention_heads, v.head_dim))
    flops = 4.0 * PATCHES * FRAME * v.num_attention_heads * v.head_dim
    moved = 4 * tokens.size * WEIGHT_BYTES
    args = (tokens, tokens, tokens, _array((PATCHES, 2), jnp.int32))
    shape = f"{PATCHES} patches, {FRAME} a frame"
    return Case("segment_attention", shape, ops.segment_attention, args, flops, float(moved))
