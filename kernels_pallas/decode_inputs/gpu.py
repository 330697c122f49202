"""decode_inputs as three Triton kernels (Ampere and newer; float8 caches need Ada or Hopper).

Schedule: the rows are normed. `partial_products` streams the six matrices and leaves float32 partial sums. The last
kernel has one program for each row and tile of heads (tiles of query heads; the key and value heads; the index
queries; the index key). It adds the partial sums in a fixed order, rounds, and goes on in registers (`halves`) to the
final queries and cache rows.

The matrices are the floor (25.5 MB a layer, 5.9 us at 4.3 TB/s; measured 8.0). The last kernel is all latency, 2.6 us;
XLA takes 17 in twelve launches. The norm is one launch of ours where XLA makes two or three of it. Written for the
Triton lowering because masked rows of the caches at run-time positions are plain stores there. Smaller or larger tiles
of heads, and more warps, are no faster.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import MMA
from kernels_pallas.decode_inputs.types import Caches, DecodeInputs, Tables, Weights
from kernels_pallas.halves import Halved, Halves, quantise
from kernels_pallas.numerics import rms_norm
from kernels_pallas.skinny_matmul.gpu import partial_products
from kernels_pallas.skinny_matmul.gpu import supports as supports_products

HEADS = 4
"""Query heads a program."""
_FLOATS = (jnp.float32, jnp.bfloat16)


def supports(h: jax.Array, weights: Weights, caches: Caches) -> bool:
    """Whether the kernels take these shapes and dtypes."""
    return supports_products(h, *weights.projections) and supports_heads(h, weights, caches)


def supports_heads(h: jax.Array, weights: Weights, caches: Caches) -> bool:
    """Whether what follows the products takes these shapes and dtypes; the same for chunks."""
    widths = weights.q.shape[3], weights.idx_q.shape[3]
    # Triton's offsets have 32 bits up to arrays of 2**32 bytes: too few in this band of one-byte caches.
    narrow = caches.idx_k.size >= 2**31 and caches.idx_k.size * caches.idx_k.dtype.itemsize <= 2**32
    return (
        h.dtype in _FLOATS
        and all(width & (width - 1) == 0 for width in widths)
        and caches.kv.dtype == h.dtype
        and caches.idx_k.dtype in (*_FLOATS, jnp.float8_e4m3fn)
        and not narrow
    )


def decode_inputs(
    h: jax.Array,
    weights: Weights,
    tables: Tables,
    caches: Caches,
    layer: jax.Array | int,
    slots: jax.Array,
    eps: float,
    interpret: bool = False,
) -> DecodeInputs:
    """See `kernels_pallas.decode_inputs.decode_inputs`."""
    B = h.shape[0]
    H, K = weights.q.shape[2:]
    J, I = weights.idx_q.shape[2:]  # noqa: E741
    at = jnp.asarray(layer, jnp.int32).reshape(1)
    normed = pl.pallas_call(
        partial(_norm_body, eps=eps),
        out_shape=jax.ShapeDtypeStruct(h.shape, h.dtype),
        grid=(B,),
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_norm",
    )(at, h, weights.norm)
    sums = partial_products(normed, weights.projections, layer, interpret=interpret)
    inputs = (at, slots.astype(jnp.int32), sums, *weights[7:], *tables)
    live = [cache for cache in caches if cache is not None]
    shapes = [
        jax.ShapeDtypeStruct((B, H, K), h.dtype),
        jax.ShapeDtypeStruct((B, J, I), caches.idx_k.dtype),
        jax.ShapeDtypeStruct((B, J), jnp.float32),
        *(jax.ShapeDtypeStruct(cache.shape, cache.dtype) for cache in live),
    ]
    q, idx_q, idx_weights, *written = pl.pallas_call(
        partial(_body, eps=eps, caches=len(live)),
        out_shape=shapes,
        grid=(pl.cdiv(H, HEADS) + 3, B),
        input_output_aliases={len(inputs) + i: 3 + i for i in range(len(live))},
        compiler_params=plt.CompilerParams(num_warps=4, num_stages=1),
        interpret=interpret,
        name="decode_inputs",
    )(*inputs, *live)
    return DecodeInputs(q, idx_q, idx_weights, Caches(written[0], written[1], *(written[2:] or [None])))


def _norm_body(layer_ref: Any, h_ref: Any, weight_ref: Any, out_ref: Any, *, eps: float) -> None:
    b = pl.program_id(0)
    out_ref[b, :] = rms_norm(h_ref[b, :], weight_ref[layer_ref[0], :], eps)


def _body(*refs: Any, eps: float, caches: int) -> None:
    layer_ref, slots_ref, sums = refs[:3]
    q_norm, k_norm, idx_q_norm, idx_k_norm, idx_k_bias = refs[3:8]
    cos, sin, idx_cos, idx_sin = refs[8:12]
    q_ref, idx_q_ref, weights_ref, *cache_refs = refs[12 + caches :]
    kv_ref, idx_k_ref = cache_refs[:2]
    scale_ref = cache_refs[2] if caches == 3 else None
    dtype = q_ref.dtype
    H, K = q_ref.shape[1:]
    J, I = idx_q_ref.shape[1:]  # noqa: E741
    G, S = kv_ref.shape[4], kv_ref.shape[2]
    # Where each projection's columns begin in the partial sums.
    at_k, at_v, at_idx_q = H * K, (H + G) * K, (H + 2 * G) * K
    at_idx_k, at_gate = at_idx_q + J * I, at_idx_q + (J + 1) * I
    part, b = pl.program_id(0), pl.program_id(1)
    layer, slot = layer_ref[0], slots_ref[b]
    query_tiles = pl.cdiv(H, HEADS)

    # Every branch loads all it needs before its first sum: what follows waits once for memory, not once a step.
    @pl.when(part < query_tiles)
    def _() -> None:
        tile = _Tile(K // 2, K // 2, part * HEADS, HEADS, H)
        weight, turn = tile.vector(q_norm, layer), tile.turn(cos, sin, b)
        halves = tile.rms_norm(tile.summed(sums, b, 0, dtype), weight, eps)
        tile.store(q_ref, tile.rotate(halves, turn), b)

    @pl.when(part == query_tiles)
    def _() -> None:
        tile = _Tile(K // 2, K // 2, 0, pl.next_power_of_2(G), G)
        weight, turn = tile.vector(k_norm, layer), tile.turn(cos, sin, b)
        keys, values = tile.summed(sums, b, at_k, dtype), tile.summed(sums, b, at_v, dtype)
        keys = tile.rotate(tile.rms_norm(keys, weight, eps), turn)

        @pl.when(slot < S)
        def _() -> None:
            tile.store(kv_ref, keys, layer, b, slot, 0)
            tile.store(kv_ref, values, layer, b, slot, 1)

    @pl.when(part == query_tiles + 1)
    def _() -> None:
        tile = _Tile(I // 2, max(MMA, I // 2), 0, max(MMA, pl.next_power_of_2(J)), J)
        weight, turn = tile.vector(idx_q_norm, layer), tile.turn(idx_cos, idx_sin, b)
        heads = jnp.arange(tile.rows)
        gate = _sum(sums, b, at_gate + heads, heads < J).astype(dtype).astype(jnp.float32)
        halves = tile.rms_norm(tile.summed(sums, b, at_idx_q, dtype), weight, eps)
        halves = tile.hadamard(tile.rotate(halves, turn))
        weights = gate * I**-0.5
        if scale_ref is not None:
            halves, scale = quantise(halves)
            weights = weights * scale
        tile.store(idx_q_ref, halves, b)
        plt.store(weights_ref.at[jnp.full_like(heads, b), heads], weights, mask=heads < J)

    @pl.when(part == query_tiles + 2)
    def _() -> None:
        tile = _Tile(I // 2, max(MMA, I // 2), 0, MMA, 1)
        weight, bias = tile.vector(idx_k_norm, layer), tile.vector(idx_k_bias, layer)
        turn = tile.turn(idx_cos, idx_sin, b)
        halves = tile.layer_norm(tile.summed(sums, b, at_idx_k, dtype), weight, bias, eps)
        halves = tile.hadamard(tile.rotate(halves, turn))
        scale = None
        if scale_ref is not None:
            halves, scale = quantise(halves)
        # Only the tile's first row is a head. Taken out of it, so that no masked row stands at the same place.
        first = jnp.arange(tile.rows) == 0
        column = jnp.arange(tile.columns)
        at = tuple(jnp.full_like(column, i) for i in (layer, b, slot))

        @pl.when(slot < S)
        def _() -> None:
            for half, start in zip(halves, (0, tile.half), strict=True):
                row = jnp.sum(jnp.where(first[:, None], half.astype(jnp.float32), 0.0), axis=0)
                place = idx_k_ref.at[(*at, start + column)]
                plt.store(place, row.astype(idx_k_ref.dtype), mask=column < tile.half)
            if scale_ref is not None and scale is not None:
                scale_ref[layer, b, slot] = jnp.sum(jnp.where(first, scale, 0.0))


def _sum(sums: Any, b: jax.Array, column: jax.Array, mask: jax.Array) -> jax.Array:
    """Row b of the partial sums [P, B, N], added up at columns of any shape."""
    parts = jnp.arange(sums.shape[0]).reshape(-1, *[1] * column.ndim)
    shape = (sums.shape[0], *column.shape)
    places = sums.at[parts, jnp.full_like(parts, b), column[None]]
    return jnp.sum(plt.load(places, mask=jnp.broadcast_to(mask[None], shape), other=0.0), axis=0)


@dataclass(frozen=True)
class _Tile(Halved):
    """Heads first .. first + rows of `heads`; rows beyond them are zeros."""

    first: Any
    rows: int
    heads: int

    def summed(self, sums: Any, b: jax.Array, start: int, dtype: Any) -> Halves:
        """Halves of the projection whose columns begin at `start`."""
        head = self.first + jnp.arange(self.rows)[:, None]
        column = jnp.arange(self.columns)[None]
        mask = (head < self.heads) & (column < self.half)
        low = start + head * (2 * self.half) + column
        return _sum(sums, b, low, mask).astype(dtype), _sum(sums, b, low + self.half, mask).astype(dtype)

    def store(self, ref: Any, halves: Halves, *lead: Any) -> None:
        """Writes to ref[*lead] [heads, 2 * half]."""
        head = self.first + jnp.arange(self.rows)[:, None]
        column = jnp.arange(self.columns)[None]
        at = tuple(jnp.full_like(head, i) for i in lead)
        mask = (head < self.heads) & (column < self.half)
        for half, start in zip(halves, (0, self.half), strict=True):
            plt.store(ref.at[(*at, head, start + column)], half.astype(ref.dtype), mask=mask)
