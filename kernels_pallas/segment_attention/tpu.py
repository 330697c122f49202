"""segment_attention for TPUs: flash attention over [H, K, N] that visits only the keys of its queries' segments.

Schedule. Tokens lie along lanes: XLA keeps the vision tower's arrays that way around them too, since a head of 72 would
fill 128 lanes, and so the transposed operands are no copies. A grid step takes 256 queries and 256 keys of half of the
heads: scores [keys, queries] of each, whose maxima and sums over keys are plain additions of registers, streaming
softmax in float32, probabilities rounded before the product with V. The steps of one tile of queries run from the
start of its first segment to the end of its last one, up to the longest such run of all tiles, which the grid gets at
run time; steps behind a tile's own run fetch and compute nothing. Keys are masked only in tiles that a segment ends in.
The two halves of the heads are the two cores of a v5p.

Floor for 8,192 tokens in segments of 256, 16 heads of 72: 9.7 GFLOP and 75 MB: 49 and 92 us (v5e), 11 and 46 (v6e),
21 and 27 (v5p), 8 and 20 (tpu7x). The matrix unit works in squares of 128 (256 from v6e on), so that 72 is 1.8 (3.6)
times the work of the scores. The compiler schedules 2,180 cycles a step on a v5e, 140,000 in all, 93 us at 1.5 GHz;
1,380 on a v6e; 100 to 200 more where keys are masked.

Tried and lost, by the cycles that the compiler counts: one head after the other (2,870 on a v5e, 2,770 on a v6e; for
128 queries at a time 3,800 and 3,620), the next head's scores before this one's softmax (2,360, 1,780). In one block of
the tower on a v5e, operands as [H, N, K] or [N, H, K] cost 1.3 ms more than this in copies and in padded lanes;
[N, H * K] the same as this, but then heads begin inside of registers.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.tpu as pltpu
import jax.numpy as jnp
from jax import lax

from kernels_pallas.common import MASKED

MAX_TOKEN_BYTES = 8192
"""Of all heads of q: 256 tokens of eight buffers and the sums must fit VMEM."""


@dataclass(frozen=True)
class Tuning:
    """Queries and keys of a step; a multiple of 128."""

    tile: int = 256


def supports(q: jax.Array) -> bool:
    """Whether the kernel takes these heads."""
    N, H, K = q.shape
    return q.dtype in (jnp.bfloat16, jnp.float32) and N > 0 and H <= 32 and H * K * q.dtype.itemsize <= MAX_TOKEN_BYTES


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spans: jax.Array,
    *,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.segment_attention.segment_attention`."""
    N, H, K = q.shape
    tile = tuning.tile
    pad = -N % tile
    # Padding forms a segment of its own, behind all others.
    ends = jnp.concatenate([spans, jnp.broadcast_to(jnp.array([N, N + pad], spans.dtype), (pad, 2))]).T
    q, k, v = (jnp.pad(x, ((0, pad), (0, 0), (0, 0))).transpose(1, 2, 0) for x in (q, k, v))
    tiles = (N + pad) // tile
    first, last = ends[:, ::tile], ends[:, tile - 1 :: tile]
    begin = first[0] // tile
    run = (last[1] + tile - 1) // tile - begin
    # Between these two all keys belong to all of the tile's queries.
    inner = jnp.stack([last[0], first[1]])
    heads = H // 2 if H % 2 == 0 else H

    def keys(part: Any, i: Any, j: Any, begin: Any, run: Any, inner: Any) -> tuple[Any, ...]:
        # Behind the end of the run the last block is asked for again, which fetches nothing.
        return part, 0, begin[i] + jnp.minimum(j, run[i] - 1)

    queries_spec = pl.BlockSpec((heads, K, tile), lambda part, i, *_: (part, 0, i))
    keys_spec = pl.BlockSpec((heads, K, tile), keys)
    row = pltpu.VMEM((heads, 1, tile), jnp.float32)
    out = pl.pallas_call(
        partial(_kernel, tile=tile),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=3,
            grid=(H // heads, tiles, jnp.max(run)),
            in_specs=[pl.BlockSpec((2, tile), lambda part, i, *_: (0, i)), queries_spec, keys_spec, keys_spec],
            out_specs=queries_spec,
            scratch_shapes=[row, row, pltpu.VMEM((heads, K, tile), jnp.float32)],
        ),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "arbitrary", "arbitrary"), vmem_limit_bytes=32 * 2**20
        ),
        interpret=interpret,
        name="segment_attention",
    )(begin, run, inner, ends, q, k, v)
    return out.transpose(2, 0, 1)[:N]


def _kernel(
    begin: Any,
    run: Any,
    inner: Any,
    spans: Any,
    q: Any,
    k: Any,
    v: Any,
    out: Any,
    maximum: Any,
    denominator: Any,
    numerator: Any,
    *,
    tile: int,
) -> None:
    i, j = pl.program_id(1), pl.program_id(2)
    heads, K, _ = q.shape
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    # Powers of two instead of e: the factor goes into the scale.
    scale = K**-0.5 * math.log2(math.e)

    @pl.when(j == 0)
    def _() -> None:
        maximum[...] = jnp.full_like(maximum, MASKED)
        denominator[...] = jnp.zeros_like(denominator)
        numerator[...] = jnp.zeros_like(numerator)

    first = (begin[i] + j) * tile
    whole = (inner[0, i] <= first) & (first + tile <= inner[1, i])

    def add_keys(masked: bool) -> None:
        index = first + lax.broadcasted_iota(jnp.int32, (tile, 1), 0)
        seen = (spans[0:1] <= index) & (index < spans[1:2])

        def scores_of(h: int) -> jax.Array:
            products = lax.dot_general(
                k[h], q[h], (((0,), (0,)), ((), ())), precision=precision, preferred_element_type=jnp.float32
            )
            return jnp.where(seen, products * scale, MASKED) if masked else products * scale

        # Each stage for all heads before the next one: the compiler then overlaps heads, and products with softmax.
        scores = [scores_of(h) for h in range(heads)]
        probabilities, decays = [], []
        for h in range(heads):
            before = maximum[h]
            now = jnp.maximum(before, jnp.max(scores[h], axis=0, keepdims=True))
            decay = jnp.exp2(before - now)
            # A query without any key so far has the maximum MASKED; half of it makes its masked keys vanish too.
            p = jnp.exp2(scores[h] - (jnp.maximum(now, MASKED / 2) if masked else now))
            maximum[h] = now
            denominator[h] = denominator[h] * decay + jnp.sum(p, axis=0, keepdims=True)
            probabilities.append(p.astype(v.dtype))
            decays.append(decay)
        for h in range(heads):
            weighted = jnp.dot(v[h], probabilities[h], precision=precision, preferred_element_type=jnp.float32)
            numerator[h] = numerator[h] * decays[h] + weighted

    visited = j < run[i]
    pl.when(visited & whole)(partial(add_keys, masked=False))
    pl.when(visited & ~whole)(partial(add_keys, masked=True))

    @pl.when(j == run[i] - 1)
    def _() -> None:
        out[...] = (numerator[...] / denominator[...]).astype(out.dtype)
