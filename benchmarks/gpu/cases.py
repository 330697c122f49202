"""What `checks` runs of selection and attention: at the model's sizes, on random, ragged and adversarial arguments.

Index scores of small integers are exact in float32, whatever the order of summation: there the selected sets must be
equal to the last member, and equal scores are everywhere. For real-valued scores a set may differ only among keys
whose reference scores lie within rounding of each other.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.checks import FLOAT32, Case, rounding, unequal
from kernels_pallas import index_select, segment_attention, sparse_attention
from kernels_pallas.common import pack_bits, unpack_bits
from kernels_pallas.index_select.reference import index_scores
from keye_jax.config import KeyeConfig

LAYERS = 2
"""Of the stacks that kernels index; the last one is used, so that a wrong layer shows."""


@dataclass(frozen=True)
class Sizes:
    """How large the arguments are. References walk keys and rows in sequence, which bounds queries more than keys."""

    long: int = 131072
    short: int = 32768
    queries: int = 512
    rows: int = 65536
    frames: int = 24
    patches: int = 256


TINY_SIZES = Sizes(long=1024, short=256, queries=64, rows=256, frames=3, patches=64)


def selection_cases(config: KeyeConfig, sizes: Sizes) -> list[Case]:
    """Of the selection, for a model's sizes."""
    return [*_selection(config, sizes), *_decode_selection(config, sizes)]


def attention_cases(config: KeyeConfig, sizes: Sizes) -> list[Case]:
    """Of attention, the vision tower's included."""
    return [*_attention(config, sizes), *_decode_attention(config, sizes), *_vision(config, sizes)]


# Selection. A kind is what the scores look like; `start` is where the chunk begins.

_STARTS: dict[str, Callable[[int, int, int], int]] = {
    "first": lambda S, C, topk: 0,  # the first query sees one key; none sees more than topk
    "boundary": lambda S, C, topk: max(topk - C // 2, 0),  # k = context in the middle of the chunk
    "full": lambda S, C, topk: S - C,
    "ragged": lambda S, C, topk: S // 3 + 5,
}


def _index_inputs(
    kind: str, seed: int, shape: tuple[int, int, int], starts: tuple[int, ...], config: KeyeConfig, dtype: Any
) -> tuple[Any, ...]:
    """Arguments of `select_bits` up to start, for [B, C, S]."""
    (B, C, S), s = shape, config.sparse
    J, I = s.indexer_num_heads, s.indexer_head_dim  # noqa: E741
    keys = iter(jax.random.split(jax.random.key(seed, impl="rbg"), 8))

    def draw(shape: tuple[int, ...], low: int, high: int) -> jax.Array:
        if kind == "real":
            return jax.random.normal(next(keys), shape)
        return jax.random.randint(next(keys), shape, low, high + 1).astype(jnp.float32)

    q, k, w = draw((B, C, J, I), -3, 3), draw((LAYERS, B, S, I), -3, 3), draw((B, C, J), -2, 3)
    if kind == "equal":
        w = jnp.zeros_like(w)
    if kind == "negative":
        w = -jnp.abs(w)
    if kind == "outliers":  # one key in a thousand towers over all others
        k = jnp.where(jax.random.bernoulli(next(keys), 1e-3, k.shape[:3])[..., None], 3 * jnp.sign(k), 0)
    scale = None
    if dtype == jnp.float8_e4m3fn:
        scale = 2.0 ** jax.random.randint(next(keys), (LAYERS, B, S), -2, 3)
    return q.astype(dtype), w, k.astype(dtype), scale, jnp.int32(LAYERS - 1), jnp.array(starts, jnp.int32)


@lru_cache
def _select_bits(topk: int) -> Callable[..., Any]:
    return partial(index_select.select_bits, topk=topk)


@lru_cache
def _select_ids(topk: int) -> Callable[..., Any]:
    return partial(index_select.select_ids, topk=topk)


def _selection(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    topk, C, S = config.sparse.topk, sizes.queries, sizes.long
    function = _select_bits(topk)
    for dtype, label in ((jnp.float8_e4m3fn, "fp8"), (jnp.bfloat16, "bf16")):
        kinds = [("integers", start) for start in _STARTS]
        kinds += [(kind, "full") for kind in ("equal", "negative", "outliers", "real")]
        for seed, (kind, place) in enumerate(kinds):
            start = (_STARTS[place](S, C, topk),)
            make = partial(_index_inputs, kind, seed, (1, C, S), start, config, dtype)
            rule = (partial(_score_gap, topk=topk), FLOAT32) if kind == "real" else (unequal, 0)
            yield Case(f"select_bits {label} {kind} {place}", function, make, *rule)
    B, C, S = 2, sizes.queries // 4, sizes.short
    make = partial(_index_inputs, "integers", 20, (B, C, S), (3, S - C - 7), config, jnp.float8_e4m3fn)
    yield Case("select_bits fp8 integers two rows", function, make, unequal, 0)


def _decode_selection(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    topk, S = config.sparse.topk, sizes.long
    function = _select_ids(topk)
    for dtype, label in ((jnp.float8_e4m3fn, "fp8"), (jnp.bfloat16, "bf16")):
        kinds = [("integers", 0), ("integers", topk - 1), ("integers", topk), ("integers", S // 3), ("integers", S - 1)]
        kinds += [(kind, S - 1) for kind in ("equal", "negative", "outliers")]
        for seed, (kind, start) in enumerate(kinds):
            make = partial(_index_inputs, kind, 30 + seed, (1, 1, S), (start,), config, dtype)
            yield Case(f"select_ids {label} {kind} at {start}", function, make, unequal, 0)
    starts = tuple(int(sizes.short * (i + 1) / 8) - 1 - 3 * i for i in range(8))
    make = partial(_index_inputs, "integers", 50, (8, 1, sizes.short), starts, config, jnp.float8_e4m3fn)
    yield Case("select_ids fp8 integers eight rows", function, make, unequal, 0)


def _score_gap(result: jax.Array, _: Any, *arguments: Any, topk: int) -> jax.Array:
    """By how much the best key left out beats the worst one selected, over the largest score; infinite where a row
    has not min(visible, topk) keys."""
    scores, mask = index_scores(*arguments), unpack_bits(result)
    visible = scores > -jnp.inf
    full = jnp.sum(mask, axis=-1) == jnp.minimum(jnp.sum(visible, axis=-1), topk)
    worst = jnp.min(jnp.where(mask, scores, jnp.inf), axis=-1)
    best = jnp.max(jnp.where(mask, -jnp.inf, scores), axis=-1)
    largest = jnp.max(jnp.where(visible, jnp.abs(scores), 0))
    gap = jnp.maximum(jnp.max(best - worst), 0) / largest
    return jnp.where(jnp.all(full) & jnp.all(visible | ~mask), gap, jnp.inf)


# Attention.


def _bits(kind: str, key: jax.Array, shape: tuple[int, int, int], starts: jax.Array, topk: int) -> jax.Array:
    """[B, C, S // 32] uint32 of some pattern; never a key that the query does not see."""
    B, C, S = shape
    query = starts[:, None, None] + jnp.arange(C)[:, None]
    key_index = jnp.arange(S)
    if kind == "scattered":
        mask = jax.random.bernoulli(key, topk / S, shape)
    elif kind == "local":  # the last keys and whole blocks that all queries share
        blocks = jax.random.bernoulli(key, topk / S, (B, 1, S // 32))
        mask = jnp.repeat(blocks, 32, axis=-1) | (key_index > query - topk // 4)
    elif kind == "one key":
        mask = key_index == jax.random.randint(key, (B, C, 1), 0, starts[:, None, None] + 1)
    elif kind == "every second row empty":
        mask = (key_index % 61 == 0) & (query % 2 == 0)
    else:
        mask = jnp.ones(shape, bool)
    return pack_bits(mask & (key_index <= query))


def _chunk_inputs(
    kind: str, seed: int, shape: tuple[int, int, int], starts: tuple[int, ...], config: KeyeConfig
) -> tuple[Any, ...]:
    """Arguments of `attend_bits` for [B, C, S]."""
    (B, C, S), t = shape, config.text
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    q = jax.random.normal(keys[0], (B, C, t.num_attention_heads, t.head_dim), jnp.bfloat16)
    kv = jax.random.normal(keys[1], (LAYERS, B, S, 2, t.num_key_value_heads, t.head_dim), jnp.bfloat16)
    start = jnp.array(starts, jnp.int32)
    return q, kv, jnp.int32(LAYERS - 1), _bits(kind, keys[2], shape, start, config.sparse.topk), start


@lru_cache
def _attend_bits(most: int | None) -> Callable[..., Any]:
    return partial(sparse_attention.attend_bits, most=most)


def _attention(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    C, S, bounded = sizes.queries, sizes.long, _attend_bits(2 * config.sparse.topk)
    for seed, kind in enumerate(("scattered", "local", "one key", "every second row empty", "every visible key")):
        function = bounded if kind in ("scattered", "local") else _attend_bits(None)
        for place in ("full", "first") if kind == "every visible key" else ("full",):
            start = (_STARTS[place](S, C, config.sparse.topk),)
            make = partial(_chunk_inputs, kind, 60 + seed, (1, C, S), start, config)
            yield Case(f"attend_bits {kind} {place}", function, make, rounding, 1)
    B, C, S = 2, sizes.queries // 4, sizes.short
    for kind in ("scattered", "every second row empty"):
        make = partial(_chunk_inputs, kind, 70, (B, C, S), (3, S - C - 7), config)
        yield Case(f"attend_bits {kind} two rows", _attend_bits(None), make, rounding, 1)


def _step_inputs(seed: int, batch: int, S: int, used: tuple[int, ...], config: KeyeConfig) -> tuple[Any, ...]:
    """Arguments of `attend_ids`: row b has `used[b]` ascending ids."""
    t, k = config.text, min(config.sparse.topk, S)
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 3)
    q = jax.random.normal(keys[0], (batch, t.num_attention_heads, t.head_dim), jnp.bfloat16)
    kv = jax.random.normal(keys[1], (LAYERS, batch, S, 2, t.num_key_value_heads, t.head_dim), jnp.bfloat16)
    step = S // k
    ids = jnp.arange(k) * step + jax.random.randint(keys[2], (batch, k), 0, step)
    ids = jnp.where(jnp.arange(k) < jnp.array(used)[:, None], ids, -1)
    return q, kv, jnp.int32(LAYERS - 1), ids.astype(jnp.int32)


def _decode_attention(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    topk = config.sparse.topk
    for used in (topk, topk - 37, 1, 0):
        make = partial(_step_inputs, 80 + used, 1, sizes.long, (used,), config)
        yield Case(f"attend_ids {used} keys", sparse_attention.attend_ids, make, rounding, 1)
    several = (topk, 0, 1, 33, topk // 2, topk - 1, topk, 7)
    make = partial(_step_inputs, 90, 8, sizes.short, several, config)
    yield Case("attend_ids eight rows", sparse_attention.attend_ids, make, rounding, 1)


# Vision.


def _vision_inputs(kind: str, seed: int, tokens: int, patches: int, heads: int, width: int) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
    q, k, v = (jax.random.normal(key, (tokens, heads, width), jnp.bfloat16) for key in keys[:3])
    index = jnp.arange(tokens)
    first = {
        "frames": index % patches == 0,
        "ragged": jax.random.bernoulli(keys[3], 3 / patches, (tokens,)),
        "one segment": index < 1,
        "single tokens": index >= 0,
    }[kind]
    segment = jnp.cumsum(first)
    spans = [jnp.searchsorted(segment, segment, side=side, method="sort") for side in ("left", "right")]
    return q, k, v, jnp.stack(spans, axis=-1).astype(jnp.int32)


def _vision(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    v = config.vision
    for seed, kind in enumerate(("frames", "ragged", "one segment", "single tokens")):
        tokens = sizes.frames * sizes.patches + (0 if kind == "frames" else 5)
        make = partial(_vision_inputs, kind, 120 + seed, tokens, sizes.patches, v.num_attention_heads, v.head_dim)
        yield Case(f"segment_attention {kind}", segment_attention.segment_attention, make, rounding, 1)
