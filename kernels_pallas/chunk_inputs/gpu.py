"""chunk_inputs on NVIDIA GPUs: two products, then one Triton kernel over blocks of head vectors (float8 caches need Ada
or Hopper).

Schedule. XLA norms and multiplies: queries apart, the five other projections as one product. The kernel's programs then
take blocks of (token, head) rows of one kind each: index queries, index keys, keys with their values, queries. A block
is read once, normed, rotated, transformed and quantised in registers (`halves`), and written where attention and the
selection read it; keys, values and index keys go straight to their slots of the caches.

8,192 tokens of the published model, one H200: 63 us (floor: 200 MB moved, 47 us at 4.3 TB/s), where XLA takes some 230
us in twenty kernels: norms and rotations of queries in two passes, the transform as a product with 36 MB of float32
results that three kernels read. The index queries' arithmetic is not hidden: half or twice their rows a program 8 to 13
us more; more or fewer rows of other kinds, 2 or 8 warps 0 to 5 us more.

Tried and lost: index keys and gates as a product of their own, and products that are asked for in bfloat16. XLA then
rounds and transposes the float32 sums of the large one in another kernel, or adds one row's up in bfloat16.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.chunk_inputs.types import ChunkInputs
from kernels_pallas.common import MMA, einsum_f32
from kernels_pallas.decode_inputs.gpu import supports_heads
from kernels_pallas.decode_inputs.types import Caches, Tables, Weights
from kernels_pallas.halves import Halved, Halves, quantise
from kernels_pallas.numerics import rms_norm
from kernels_pallas.quantized import Quantized, pick, values_of
from kernels_pallas.quantized import Weights as Matrix

LINE = 128
"""Columns of a product are a multiple of this: heads begin at whole memory lines."""


@dataclass(frozen=True)
class Tuning:
    """Measured choices; they have no effect on the result. Rows of a program: vectors of its kind."""

    queries: int = 32
    keys: int = 32
    index_queries: int = 64
    index_keys: int = 32
    warps: int = 4


DEFAULT = Tuning()


def supports(h: jax.Array, weights: Weights, caches: Caches) -> bool:
    """Whether the kernel takes these shapes and dtypes."""
    return h.size > 0 and supports_heads(h, weights, caches)


def chunk_inputs(
    h: jax.Array,
    weights: Weights,
    tables: Tables,
    caches: Caches,
    layer: jax.Array | int,
    start: jax.Array,
    valid: jax.Array,
    eps: float,
    *,
    tuning: Tuning = DEFAULT,
    interpret: bool = False,
) -> ChunkInputs:
    """See `kernels_pallas.chunk_inputs.chunk_inputs`."""
    B, C, D = h.shape
    H, G, J, I = weights.q.shape[2], weights.k.shape[2], *weights.idx_q.shape[2:]  # noqa: E741
    N = B * C
    a = rms_norm(h, pick(weights.norm, layer), eps).reshape(N, D)
    q, *others = (pick(matrix, layer) for matrix in weights.projections)
    inputs = (
        jnp.asarray(layer, jnp.int32).reshape(1),
        start.astype(jnp.int32),
        valid.astype(jnp.int32),
        _product(a, [q]),
        _product(a, others),
        *weights[7:],
        *(table.reshape(N, -1) for table in tables),
    )
    live = [cache for cache in caches if cache is not None]
    shapes = [
        jax.ShapeDtypeStruct((N, H, weights.q.shape[3]), h.dtype),
        jax.ShapeDtypeStruct((N, J, I), caches.idx_k.dtype),
        jax.ShapeDtypeStruct((N, J), jnp.float32),
        *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in live),
    ]
    out_q, idx_q, idx_weights, *written = pl.pallas_call(
        partial(_body, length=C, eps=eps, caches=len(live), tuning=tuning),
        out_shape=shapes,
        grid=(sum(_programs(tuning, N, H, G, J)),),
        input_output_aliases={len(inputs) + i: 3 + i for i in range(len(live))},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="chunk_inputs",
    )(*inputs, *live)
    return ChunkInputs(
        out_q.reshape(B, C, *out_q.shape[1:]),
        idx_q.reshape(B, C, J, I),
        idx_weights.reshape(B, C, J),
        Caches(written[0], written[1], *(written[2:] or [None])),
    )


def _product(a: jax.Array, matrices: Sequence[Matrix]) -> jax.Array:
    """a [N, D] times matrices [D, ...] side by side: [N, all their columns and zeros up to whole memory lines], rounded
    once to the dtype of a."""
    flat = [values_of(matrix, a.dtype).reshape(a.shape[1], -1) for matrix in matrices]
    joined = jnp.concatenate(flat, axis=1)
    spare = -joined.shape[1] % LINE
    # The sums are asked for in float32: XLA is free to add up bfloat16 products in bfloat16.
    product = einsum_f32("nd,df->nf", a, jnp.pad(joined, ((0, 0), (0, spare))))
    if any(isinstance(matrix, Quantized) for matrix in matrices):
        scales = [
            matrix.scale.reshape(-1) if isinstance(matrix, Quantized) else jnp.ones(values.shape[1], jnp.float32)
            for matrix, values in zip(matrices, flat, strict=True)
        ]
        product = product * jnp.pad(jnp.concatenate(scales), (0, spare))
    return product.astype(a.dtype)


def _programs(tuning: Tuning, tokens: int, H: int, G: int, J: int) -> tuple[int, int, int, int]:
    """How many programs take index queries, index keys, keys, queries."""
    return (
        pl.cdiv(tokens * J, tuning.index_queries),
        pl.cdiv(tokens, tuning.index_keys),
        pl.cdiv(tokens * G, tuning.keys),
        pl.cdiv(tokens * H, tuning.queries),
    )


def _body(*refs: Any, length: int, eps: float, caches: int, tuning: Tuning) -> None:
    layer_ref, start_ref, valid_ref, q_in, others = refs[:5]
    q_norm, k_norm, idx_q_norm, idx_k_norm, idx_k_bias = refs[5:10]
    cos, sin, idx_cos, idx_sin = refs[10:14]
    q_ref, idx_q_ref, weights_ref, *cache_refs = refs[14 + caches :]
    kv_ref, idx_k_ref = cache_refs[:2]
    scale_ref = cache_refs[2] if caches == 3 else None
    N, H, K = q_ref.shape
    J, I = idx_q_ref.shape[1:]  # noqa: E741
    G, S = kv_ref.shape[4], kv_ref.shape[2]
    # Where each projection's columns begin among the others.
    at_v, at_idx_q = G * K, 2 * G * K
    at_idx_k, at_gate = at_idx_q + J * I, at_idx_q + (J + 1) * I
    layer = layer_ref[0]

    def index_queries(part: jax.Array) -> None:
        rows = _Rows.block(I, tuning.index_queries, J, N, part, MMA)
        weight, turn = rows.vector(idx_q_norm, layer), rows.turn(idx_cos, idx_sin, rows.token, rows.live)
        halves = rows.load(others, at_idx_q)
        token, head, live = (x[:, 0] for x in (rows.token, rows.head, rows.live))
        gate = plt.load(others.at[token, at_gate + head], mask=live, other=0.0).astype(jnp.float32)
        halves = rows.hadamard(rows.rotate(rows.rms_norm(halves, weight, eps), turn))
        weights = gate * I**-0.5
        if scale_ref is not None:
            halves, scale = quantise(halves)
            weights = weights * scale
        rows.store(idx_q_ref, halves, rows.live, rows.token, rows.head)
        plt.store(weights_ref.at[token, head], weights, mask=live)

    def index_keys(part: jax.Array) -> None:
        rows = _Rows.block(I, tuning.index_keys, 1, N, part, MMA)
        weight, bias = rows.vector(idx_k_norm, layer), rows.vector(idx_k_bias, layer)
        turn = rows.turn(idx_cos, idx_sin, rows.token, rows.live)
        row, slot, written = rows.slots(start_ref, valid_ref, length, S)
        halves = rows.layer_norm(rows.load(others, at_idx_k), weight, bias, eps)
        halves = rows.hadamard(rows.rotate(halves, turn))
        at = jnp.full_like(row, layer)
        if scale_ref is not None:
            halves, scale = quantise(halves)
            plt.store(scale_ref.at[at[:, 0], row[:, 0], slot[:, 0]], scale, mask=written[:, 0])
        rows.store(idx_k_ref, halves, written, at, row, slot)

    def keys(part: jax.Array) -> None:
        rows = _Rows.block(K, tuning.keys, G, N, part)
        weight, turn = rows.vector(k_norm, layer), rows.turn(cos, sin, rows.token, rows.live)
        row, slot, written = rows.slots(start_ref, valid_ref, length, S)
        halves, values = rows.load(others, 0), rows.load(others, at_v)
        halves = rows.rotate(rows.rms_norm(halves, weight, eps), turn)
        at = jnp.full_like(row, layer)
        for i, vectors in enumerate((halves, values)):
            rows.store(kv_ref, vectors, written, at, row, slot, jnp.full_like(row, i), rows.head)

    def queries(part: jax.Array) -> None:
        rows = _Rows.block(K, tuning.queries, H, N, part)
        weight, turn = rows.vector(q_norm, layer), rows.turn(cos, sin, rows.token, rows.live)
        halves = rows.rotate(rows.rms_norm(rows.load(q_in, 0), weight, eps), turn)
        rows.store(q_ref, halves, rows.live, rows.token, rows.head)

    program, first = pl.program_id(0), 0
    kinds: tuple[Callable[[jax.Array], None], ...] = (index_queries, index_keys, keys, queries)
    for kind, count in zip(kinds, _programs(tuning, N, H, G, J), strict=True):
        pl.when((program >= first) & (program < first + count))(partial(kind, program - first))
        first += count


@dataclass(frozen=True)
class _Rows(Halved):
    """Some (token, head) pairs: int32 [rows, 1] each. `live`, bool [rows, 1], is False beyond the last token."""

    token: jax.Array
    head: jax.Array
    live: jax.Array

    @classmethod
    def block(cls, width: int, rows: int, heads: int, tokens: int, block: jax.Array, least: int = 1) -> "_Rows":
        """One block of the pairs of `heads` heads and all tokens, token by token.

        Args:
            width: of the vectors.
            least: columns of their halves.
        """
        pair = block * rows + jnp.arange(rows, dtype=jnp.int32)[:, None]
        return cls(width // 2, max(least, width // 2), pair // heads, pair % heads, pair < tokens * heads)

    def slots(self, start: Any, valid: Any, length: int, capacity: int) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Row of the batch, slot of the cache, and whether there is one for the token: [rows, 1]."""
        row, step = self.token // length, self.token % length
        slot = plt.load(start.at[row], mask=self.live, other=0) + step
        counts = step < plt.load(valid.at[row], mask=self.live, other=0)
        return row, slot, self.live & counts & (slot >= 0) & (slot < capacity)

    def load(self, ref: Any, at: int) -> Halves:
        """Halves of the vectors in ref [tokens, columns] whose heads begin at column `at`."""
        column = jnp.arange(self.columns)[None]
        low, mask = at + self.head * (2 * self.half) + column, self.live & (column < self.half)
        places = (ref.at[self.token, low + start] for start in (0, self.half))
        first, second = (plt.load(place, mask=mask, other=0.0) for place in places)
        return first, second

    def store(self, ref: Any, halves: Halves, mask: jax.Array, *at: jax.Array) -> None:
        """Writes the rows of `mask` [rows, 1] to ref[*at] [2 * half]."""
        column = jnp.arange(self.columns)[None]
        for half, start in zip(halves, (0, self.half), strict=True):
            plt.store(ref.at[(*at, start + column)], half.astype(ref.dtype), mask=mask & (column < self.half))
