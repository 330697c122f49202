"""What `checks` runs of matrix products and what is fused with them: the experts of a chunk and of a decode step, its
projections and inputs, the vision tower's dense layers."""

from collections.abc import Callable, Iterator
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.gpu.cases import LAYERS, Sizes
from benchmarks.gpu.checks import BF16, Case, rounding
from kernels_pallas import fused_linear, grouped_matmul, layer_norm, routing, skinny_matmul
from kernels_pallas.chunk_inputs import chunk_inputs
from kernels_pallas.common import einsum_f32
from kernels_pallas.decode_inputs import Caches, Tables, Weights, decode_inputs
from kernels_pallas.grouped_matmul.decode import expert_down, expert_swiglu, moe_step, norm_route
from keye_jax.config import KeyeConfig

LAST = LAYERS - 1


def product_cases(config: KeyeConfig, sizes: Sizes) -> list[Case]:
    """Of the products, for a model's sizes."""
    parts = (_experts, _decode, _decode_experts, _vision, _chunk)
    return [case for part in parts for case in part(config, sizes)]


def _normal(seed: int, *shapes: tuple[int, ...]) -> Iterator[jax.Array]:
    """bfloat16, of variance 1 over the second axis from the front of what has three or more: products stay near 1."""
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), len(shapes))
    for key, shape in zip(keys, shapes, strict=True):
        scale = shape[1] ** -0.5 if len(shape) > 2 else 1.0
        yield (scale * jax.random.normal(key, shape)).astype(jnp.bfloat16)


# The experts of a chunk.


@lru_cache
def grouped(out_dtype: Any) -> Callable[..., Any]:
    return lambda x, w, layer, sizes, *scale: grouped_matmul.grouped_matmul(x, w, layer, sizes, out_dtype, *scale)


def group_sizes(kind: str, key: jax.Array, rows: int, experts: int) -> jax.Array:
    """[E] int32 that sum to `rows`."""
    if kind == "one group":
        return jnp.zeros(experts, jnp.int32).at[experts - 2].set(rows)
    width = experts if kind == "even" else max(experts // 8, 1)  # "few": seven experts of eight have no row
    chosen = jax.random.randint(key, (rows,), 0, width) * (experts // width)
    return jnp.bincount(chosen, length=experts).astype(jnp.int32)


def group_inputs(
    kind: str, seed: int, rows: int, width: tuple[int, int], experts: int, scaled: bool = False
) -> tuple[Any, ...]:
    keys = jax.random.split(jax.random.key(seed, impl="rbg"), 4)
    x = jax.random.normal(keys[0], (rows, width[0]), jnp.bfloat16)
    w = jax.random.normal(keys[1], (LAYERS, experts, *width), jnp.bfloat16) * jnp.bfloat16(width[0] ** -0.5)
    scale = (jax.random.uniform(keys[3], (rows,)),) if scaled else ()
    return x, w, jnp.int32(LAST), group_sizes(kind, keys[2], rows, experts), *scale


def _spread_inputs(seed: int, tokens: int, config: KeyeConfig) -> tuple[Any, ...]:
    k = config.text.num_experts_per_tok
    keys = jax.random.split(jax.random.key(seed, impl="rbg"))
    x = jax.random.normal(keys[0], (tokens, config.text.hidden_size), jnp.bfloat16)
    return x, jax.random.permutation(keys[1], tokens * k).reshape(tokens, k).astype(jnp.int32)


def _experts(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    t, down = config.text, grouped(jnp.bfloat16)
    D, F, E, k = t.hidden_size, t.moe_intermediate_size, t.num_experts, t.num_experts_per_tok
    shapes = [("even", sizes.rows), ("few", sizes.rows), ("one group", sizes.rows), ("even", k), ("even", 8 * k + 3)]
    for seed, (kind, rows) in enumerate(shapes):
        make = partial(group_inputs, kind, 100 + seed, rows, (D, 2 * F), E)
        yield Case(f"grouped_swiglu {kind} {rows} rows", grouped_matmul.grouped_swiglu, make, rounding, 1)
        make = partial(group_inputs, kind, 110 + seed, rows, (F, D), E, scaled=True)
        yield Case(f"grouped_matmul down {kind} {rows} rows", down, make, rounding, 1)
    make = partial(group_inputs, "even", 120, 8 * k + 3, (D, 2 * F), E)
    yield Case("grouped_matmul in float32", grouped(jnp.float32), make, rounding, 1)
    make = partial(_spread_inputs, 130, sizes.rows // k, config)
    yield Case("spread_rows", grouped_matmul.spread_rows, make, rounding, 1)


# A decode step.


def project_add_inputs(seed: int, rows: int, config: KeyeConfig) -> tuple[Any, ...]:
    t = config.text
    heads = (t.num_attention_heads, t.head_dim)
    x, w, residual = _normal(seed, (rows, *heads), (LAYERS, *heads, t.hidden_size), (rows, t.hidden_size))
    return x, w * jnp.bfloat16(t.head_dim**-0.5), jnp.int32(LAST), residual


def step_inputs(seed: int, slots: tuple[int, ...], S: int, dtype: Any, config: KeyeConfig) -> tuple[Any, ...]:
    """Arguments of `decode_inputs` up to the slots."""
    t, s, B, D = config.text, config.sparse, len(slots), config.text.hidden_size
    G, K, J, I = t.num_key_value_heads, t.head_dim, s.indexer_num_heads, s.indexer_head_dim  # noqa: E741
    widths = ((t.num_attention_heads, K), (G, K), (G, K), (J, I), (I,), (J,))
    h, *matrices = _normal(seed, (B, D), *((LAYERS, D, *width) for width in widths))
    norm, *norms = (1 + 0.1 * x for x in _normal(seed + 1, *((LAYERS, width) for width in (D, K, K, I, I, I))))
    wide = [x.astype(jnp.float32) for x in norms[3:]]
    angles = (jax.random.uniform(jax.random.key(seed + 2), (B, width // 2), maxval=6.3) for width in (K, I))
    tables = [f(a).astype(jnp.bfloat16) for a in angles for f in (jnp.cos, jnp.sin)]
    kv, idx_k = _normal(seed + 3, (LAYERS, B, S, 2, G, K), (LAYERS, B, S, I))
    scale = jnp.ones((LAYERS, B, S)) if dtype == jnp.float8_e4m3fn else None
    weights, caches = Weights(norm, *matrices, *norms[:3], *wide), Caches(kv, idx_k.astype(dtype), scale)
    return h, weights, Tables(*tables), caches, jnp.int32(LAST), jnp.array(slots, jnp.int32)


def _decode(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    for rows in (1, 3, 8):
        make = partial(project_add_inputs, 210 + rows, rows, config)
        yield Case(f"project_add {rows} rows", skinny_matmul.project_add, make, rounding, 1)
    function, S = partial(decode_inputs, eps=config.text.rms_norm_eps), sizes.short
    # Three roundings to bfloat16 on the way, which float32 results come from too: projection, norm, rotation.
    compare = partial(rounding, float32=BF16)
    for dtype, label in ((jnp.float8_e4m3fn, "fp8"), (jnp.bfloat16, "bf16")):
        for slots in ((S - 1,), (0, S, S // 2 + 3)):  # a row at the capacity is not written
            make = partial(step_inputs, 230, slots, S, dtype, config)
            yield Case(f"decode_inputs {label} {len(slots)} rows", function, make, compare, 1)


@lru_cache
def _norm_route(k: int, renormalise: bool, eps: float) -> Callable[..., Any]:
    return partial(norm_route, k=k, renormalise=renormalise, eps=eps)


def _route_inputs(seed: int, rows: int, config: KeyeConfig) -> tuple[Any, ...]:
    D, E = config.text.hidden_size, config.text.num_experts
    h, norm, router = _normal(seed, (rows, D), (LAYERS, D), (LAYERS, D, E))
    return h, 1 + norm * jnp.bfloat16(0.1), router, jnp.int32(LAST)


def routed(
    result: Any,
    expected: Any,
    _h: jax.Array,
    _norm: jax.Array,
    router: jax.Array,
    layer: jax.Array,
    *,
    renormalised: bool,
) -> jax.Array:
    """How far the chosen experts and their weights are from the best ones, as a part of what rounding explains.

    Logits are rounded to bfloat16, so that two experts next to each other may change places and a probability be off
    by the exponential of one rounding; what was chosen is compared with unrounded logits.
    """
    (m, weights, experts), (expected_m, *_) = result, expected
    logits = einsum_f32("md,de->me", expected_m.astype(jnp.float32), router[layer].astype(jnp.float32))
    slack = jnp.expm1(2 * BF16 * jnp.max(jnp.abs(logits)))
    p = jax.nn.softmax(logits, axis=-1)
    chosen = jnp.take_along_axis(p, experts, axis=1)
    worst_allowed = jnp.sort(p, axis=1)[:, -experts.shape[1]]
    missed = jnp.max(worst_allowed / jnp.min(chosen, axis=1) - 1)
    share = chosen / jnp.sum(chosen, axis=1, keepdims=True) if renormalised else chosen
    off = jnp.max(jnp.abs(weights / share - 1))
    distinct = jnp.all(jnp.diff(jnp.sort(experts, axis=1), axis=1) > 0)
    error = jnp.maximum(jnp.maximum(missed, off) / slack, rounding(m, expected_m))
    return jnp.where(distinct & jnp.all(jnp.isfinite(weights)), error, jnp.inf)


def _expert_inputs(kind: str, seed: int, rows: int, config: KeyeConfig, *, down: bool) -> tuple[Any, ...]:
    t = config.text
    D, F, E, k = t.hidden_size, t.moe_intermediate_size, t.num_experts, t.num_experts_per_tok
    m, hidden, residual = _normal(seed, (rows, D), (rows, k, F), (rows, D))
    keys = jax.random.split(jax.random.key(seed + 1, impl="rbg"), 3)
    w = jax.random.normal(keys[0], (LAYERS, E, F, D) if down else (LAYERS, E, D, 2 * F), jnp.bfloat16)
    w = w * jnp.bfloat16(w.shape[2] ** -0.5)
    one = jnp.arange(E - k, E)  # all rows choose the same
    random = jnp.argsort(jax.random.uniform(keys[1], (rows, E)), axis=1)[:, :k]
    experts = (jnp.tile(one, (rows, 1)) if kind == "same" else random).astype(jnp.int32)
    weights = jax.random.uniform(keys[2], (rows, k))
    return (hidden, w, jnp.int32(LAST), experts, weights, residual) if down else (m, w, jnp.int32(LAST), experts)


@lru_cache
def moe_step_for(k: int, renormalise: bool, eps: float) -> Callable[..., Any]:
    return partial(moe_step, k=k, renormalise=renormalise, eps=eps)


def moe_inputs(seed: int, rows: int, config: KeyeConfig) -> tuple[Any, ...]:
    h, norm, router, layer = _route_inputs(seed, rows, config)
    _, gate_up, *_ = _expert_inputs("random", seed + 1, rows, config, down=False)
    _, down, *_ = _expert_inputs("random", seed + 2, rows, config, down=True)
    return h, norm, router, gate_up, down, layer


def _decode_experts(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    t = config.text
    route = _norm_route(t.num_experts_per_tok, t.norm_topk_prob, t.rms_norm_eps)
    for rows in (1, 3, 8):
        make = partial(_route_inputs, 260 + rows, rows, config)
        compare = partial(routed, renormalised=t.norm_topk_prob)
        yield Case(f"norm_route {rows} rows", route, make, compare, 1)
        for kind in ("random", "same"):
            make = partial(_expert_inputs, kind, 270 + rows, rows, config, down=False)
            yield Case(f"expert_swiglu {kind} {rows} rows", expert_swiglu, make, rounding, 1)
            make = partial(_expert_inputs, kind, 280 + rows, rows, config, down=True)
            yield Case(f"expert_down {kind} {rows} rows", expert_down, make, rounding, 1)
        step = moe_step_for(t.num_experts_per_tok, t.norm_topk_prob, t.rms_norm_eps)
        # Hidden values, rows of experts and their sum are rounded, one after the other.
        make = partial(moe_inputs, 290 + rows, rows, config)
        yield Case(f"moe_step {rows} rows", step, make, rounding, 2)


# The vision tower's dense layers.


def _linear_inputs(seed: int, rows: int, width: tuple[int, int], residual: bool) -> tuple[Any, ...]:
    K, N = width
    x, weight, bias, rest = _normal(seed, (rows, K), (K, N), (1, N), (rows, N))
    weight = weight * jnp.bfloat16(K**-0.5)
    return (x, weight, bias[0], rest) if residual else (x, weight, bias[0])


def _mlp_inputs(seed: int, rows: int, width: tuple[int, int]) -> tuple[Any, ...]:
    C, M = width
    x, weight, bias = _linear_inputs(seed, rows, (C, M), residual=False)
    _, back, back_bias, rest = _linear_inputs(seed + 1, rows, (M, C), residual=True)
    return x, (weight, bias), (back, back_bias), rest


@lru_cache
def _layer_norm(eps: float) -> Callable[..., Any]:
    return partial(layer_norm.layer_norm, eps=eps)


def _norm_inputs(seed: int, rows: int, width: int) -> tuple[Any, ...]:
    x, weight, bias = _normal(seed, (rows, width), (1, width), (1, width))
    return 3 * x + 1, 1 + weight[0], bias[0]


def _vision(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    v = config.vision
    C, M = v.hidden_size, v.intermediate_size
    for rows in (sizes.frames * sizes.patches, 4 * sizes.patches + 12):
        for residual in (False, True):
            make = partial(_linear_inputs, 240, rows, (C, C), residual)
            name = f"fused_linear {rows} rows" + " and residual" * residual
            yield Case(name, fused_linear.fused_linear, make, rounding, 1)
        norm = partial(_norm_inputs, 246, rows, C)
        yield Case(f"layer_norm {rows} rows", _layer_norm(v.layer_norm_eps), norm, rounding, 1)
        make = partial(_mlp_inputs, 250, rows, (C, M))
        yield Case(f"gelu_mlp {rows} rows", fused_linear.gelu_mlp, make, rounding, 1)


# What lies between a chunk's products.


def _chunk_inputs(
    seed: int, tokens: int, start: tuple[int, ...], S: int, dtype: Any, config: KeyeConfig
) -> tuple[Any, ...]:
    """Arguments of `chunk_inputs` up to valid; the last row has padding behind it."""
    B, C = len(start), tokens
    _, weights, _, caches, layer, first = step_inputs(seed, start, S, dtype, config)
    (h,) = _normal(seed + 4, (B * C, config.text.hidden_size))
    widths = (config.text.head_dim, config.sparse.indexer_head_dim)
    angles = (jax.random.uniform(jax.random.key(seed + 5), (B, C, width // 2), maxval=6.3) for width in widths)
    tables = Tables(*(f(a).astype(jnp.bfloat16) for a in angles for f in (jnp.cos, jnp.sin)))
    valid = jnp.full(B, C, jnp.int32).at[B - 1].set(C - C // 5)
    return h.reshape(B, C, -1), weights, tables, caches, layer, first, valid


@lru_cache
def _routing(E: int, k: int, renormalise: bool) -> Callable[..., Any]:
    def route(logits: jax.Array) -> Any:
        weights, experts = routing.choose_experts(logits, k, renormalise)
        return weights, experts, routing.place(experts, weights, E)

    return route


def _logits(seed: int, rows: int, experts: int) -> tuple[Any, ...]:
    """Steps of an eighth: many are equal, and different ones have different probabilities in any arithmetic."""
    return ((jax.random.randint(jax.random.key(seed), (rows, experts), -24, 25) / 8).astype(jnp.bfloat16),)


def _chunk(config: KeyeConfig, sizes: Sizes) -> Iterator[Case]:
    t, S = config.text, sizes.short
    function = partial(chunk_inputs, eps=t.rms_norm_eps)
    for dtype, label in ((jnp.float8_e4m3fn, "fp8"), (jnp.bfloat16, "bf16")):
        for tokens, start in ((sizes.queries, (S // 3,)), (sizes.queries // 2 - 3, (-9, S - 9))):
            make = partial(_chunk_inputs, 300, tokens, start, S, dtype, config)
            name = f"chunk_inputs {label} {len(start)} rows of {tokens}"
            yield Case(name, function, make, partial(rounding, float32=BF16), 1)
    route = _routing(t.num_experts, t.num_experts_per_tok, t.norm_topk_prob)
    for rows in (sizes.rows // t.num_experts_per_tok, sizes.queries + 3):
        yield Case(f"routing {rows} rows", route, partial(_logits, 310, rows, t.num_experts), rounding, 1)
