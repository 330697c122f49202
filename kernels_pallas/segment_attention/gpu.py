"""segment_attention on NVIDIA GPUs (Triton): flash attention that visits only the keys of its queries' segments.

Schedule. One program takes 64 queries of one head and walks over tiles of 64 keys between the start of its first
query's segment and the end of its last one's: streaming softmax in float32, probabilities rounded before the product
with V. If all its queries are of one segment, only the tiles that stick out at the segment's two ends are masked; all
others skip the comparisons. A head of 72 is loaded and multiplied as 64 + 16 columns, of which 8 are zeros: padding it
to 128 would cost 1.6 times the products.

Floor for 65,536 tokens in segments of 256, 16 heads of 72: 77 GFLOP, 0.10 ms at 790 TFLOP/s, and 604 MB, 0.14 ms at
4.3 TB/s. Measured on an H200: 0.45 ms (cuDNN, whose custom call cannot be exported, 0.36 ms); one segment of 131,072
tokens 335 ms, 236 TFLOP/s; 65,536 segments of one token 0.27 ms. That last figure is what a program costs besides its
keys - latency of the first loads and of the store - and what holds the first one where it is.
Tried and lost: masks everywhere and the exact exp2 (0.61 ms), 128 queries or 8 warps a program, tiles of 32 or 128
keys. Triton because TMA cannot fetch 72 of 1,152 columns into a swizzled tile: 72 is no multiple of 64.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import MASKED
from kernels_pallas.pieces import column_pieces


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results beyond the order of float32 sums."""

    queries: int = 64
    keys: int = 64
    warps: int = 4
    stages: int = 2


DEFAULT = Tuning()
# Without tensor cores a tile of products lives in registers.
FLOAT32 = Tuning(queries=32, keys=32, warps=4, stages=1)


def supports(q: jax.Array) -> bool:
    """Whether the kernel takes these heads."""
    return q.dtype in (jnp.bfloat16, jnp.float32) and q.shape[2] <= 256


def segment_attention(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    spans: jax.Array,
    *,
    tuning: Tuning | None = None,
    interpret: bool = False,
) -> jax.Array:
    """See `kernels_pallas.segment_attention.segment_attention`."""
    N, H, _ = q.shape
    t = tuning or (DEFAULT if q.dtype == jnp.bfloat16 else FLOAT32)
    return pl.pallas_call(
        partial(_kernel, tuning=t, interpret=interpret),
        out_shape=jax.ShapeDtypeStruct(q.shape, q.dtype),
        # Heads vary fastest: neighbours read the same lines of memory.
        grid=(H, pl.cdiv(N, t.queries)),
        compiler_params=plt.CompilerParams(num_warps=t.warps, num_stages=t.stages),
        interpret=interpret,
        name="segment_attention",
    )(spans, q, k, v)


def _fast_exp2(x: jax.Array) -> jax.Array:
    """Without the scaling that keeps results below 2**-126 exact: three instructions less for each score."""
    return plt.elementwise_inline_asm(
        "ex2.approx.ftz.f32 $0, $1;",
        args=[x],
        constraints="=r,r",
        pack=1,
        result_shape_dtypes=[jax.ShapeDtypeStruct(x.shape, jnp.float32)],
    )[0]


def _kernel(
    spans_ref: Any, q_ref: Any, k_ref: Any, v_ref: Any, out_ref: Any, *, tuning: Tuning, interpret: bool
) -> None:
    N, _, K = q_ref.shape
    h, block = pl.program_id(0), pl.program_id(1)
    pieces = column_pieces(K)
    rows = block * tuning.queries + jnp.arange(tuning.queries, dtype=jnp.int32)
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    dot = partial(jnp.dot, precision=precision, preferred_element_type=jnp.float32)

    exp2 = jnp.exp2 if interpret else _fast_exp2

    def inside(index: jax.Array, tile: int) -> jax.Array | None:
        """Which of these tokens exist; None: all."""
        return None if N % tile == 0 else index < N

    def place(index: jax.Array, exists: jax.Array | None, offset: int, width: int) -> tuple[Any, jax.Array | None]:
        """Indices of [tile, width] elements and which of them exist."""
        columns = offset + jnp.arange(width, dtype=jnp.int32)
        mask = None if exists is None else jnp.broadcast_to(exists[:, None], (exists.size, width))
        if offset + width > K:
            whole = jnp.broadcast_to(columns[None] < K, (index.size, width))
            mask = whole if mask is None else mask & whole
        return (index[:, None], h, columns[None]), mask

    def load(ref: Any, index: jax.Array, exists: jax.Array | None) -> list[jax.Array]:
        places = [place(index, exists, *piece) for piece in pieces]
        return [plt.load(ref.at[at], mask=mask, other=None if mask is None else 0.0) for at, mask in places]

    queries = load(q_ref, rows, inside(rows, tuning.queries))
    clamped = rows if N % tuning.queries == 0 else jnp.minimum(rows, N - 1)
    own_start, own_end = (plt.load(spans_ref.at[clamped, side])[:, None] for side in (0, 1))
    # Powers of two instead of e: the factor goes into one multiply-add per score.
    scale = K**-0.5 * math.log2(math.e)

    def add_tile(j: jax.Array, state: Any, masked: bool) -> Any:
        maximum, denominator, numerator = state
        index = j * tuning.keys + jnp.arange(tuning.keys, dtype=jnp.int32)
        exists = inside(index, tuning.keys) if masked else None
        keys = load(k_ref, index, exists)
        products = [dot(a, b.T) for a, b in zip(queries, keys, strict=True)]
        scores = sum(products[1:], products[0])
        if masked:
            scores = jnp.where((own_start <= index) & (index < own_end), scores, MASKED)
        new = jnp.maximum(maximum, scores.max(1) * scale)
        decay = exp2(maximum - new)
        # A row without any key so far has the maximum MASKED * scale; half of MASKED makes its masked keys vanish too.
        p = exp2(scores * scale - jnp.maximum(new, MASKED * scale / 2)[:, None])
        values = load(v_ref, index, exists)
        rounded = p.astype(v_ref.dtype)
        numerator = [n * decay[:, None] + dot(rounded, x) for n, x in zip(numerator, values, strict=True)]
        return new, denominator * decay + p.sum(1), numerator

    state = (
        jnp.full((tuning.queries,), MASKED * scale, jnp.float32),
        jnp.zeros((tuning.queries,), jnp.float32),
        [jnp.zeros((tuning.queries, width), jnp.float32) for _, width in pieces],
    )
    last = jnp.minimum((block + 1) * tuning.queries, N) - 1
    first, end = spans_ref[block * tuning.queries, 0], spans_ref[last, 1]
    single = first == spans_ref[last, 0]
    begin, stop = first // tuning.keys, pl.cdiv(end, tuning.keys)
    # Where all queries are of one segment, only the tiles at its two ends need masks, and only if they stick out.
    head = first % tuning.keys != 0
    tail = (end % tuning.keys != 0) & ~(head & (stop - begin == 1))
    inner = jnp.where(single, begin + head, stop)
    outer = jnp.where(single, stop - tail, stop)
    masked = jnp.where(single, head.astype(jnp.int32) + tail, stop - begin)

    def add_masked(i: jax.Array, state: Any) -> Any:
        edge = jnp.where(head & (i == 0), begin, stop - 1)
        return add_tile(jnp.where(single, edge, begin + i), state, masked=True)

    state = lax.fori_loop(0, masked, add_masked, state)
    _, denominator, numerator = lax.fori_loop(inner, outer, partial(add_tile, masked=False), state)
    for (offset, width), part in zip(pieces, numerator, strict=True):
        at, mask = place(rows, inside(rows, tuning.queries), offset, width)
        # Rows behind the last token may have seen nothing; they are not stored.
        plt.store(out_ref.at[at], (part * (1 / denominator)[:, None]).astype(out_ref.dtype), mask=mask)
