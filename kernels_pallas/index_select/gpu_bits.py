"""select_bits on Hopper GPUs: index scores of a block of queries, then their exact top-k as bits, block after block.

`gpu_score` (Mosaic GPU) writes the float32 scores of `rows` queries against all visible keys, so that scores never
exist for more than `rows` queries (512 MiB at 128K). `gpu_resident` (Triton) selects from them, and `gpu_topk` for the
rows that it leaves. Keys are converted once a call: e4m3 times a power of two is exact in bfloat16.

One H200, 8,192 queries at the end of 128K tokens, 16 heads of 64, top 2,048, fp8 keys: 4.81 ms on independent random
scores (floor: 2.69 ms of products at 790 TFLOP/s); in the last chunk of a real prompt 3.28 ms of scoring and 1.30 ms of
selection a layer. With the kernels before these, blocks of 512 instead of 1,024 queries cost 6-10% (the steps of a row
wait for memory, more rows at a time hide it), blocks of 640 25% (12.8 of them, and key tiles that divide badly over the
processors).
"""

from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.index_select import gpu_bound, gpu_emit, gpu_kth, gpu_score, gpu_threshold
from kernels_pallas.index_select.gpu_score import QUERIES, TILE, UNIT, WIDTH

MAX_BLOCKS_UNROLLED = 32
MAX_HEADS = 16  # more queries do not fit the shared memory


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    rows: int = 8192
    debug: bool = False
    """Queries scored at a time, a multiple of QUERIES: their scores are the scratch."""
    score: gpu_score.Tuning = field(default_factory=gpu_score.Tuning)
    kth: gpu_kth.Tuning = field(default_factory=gpu_kth.Tuning)
    topk: gpu_threshold.Tuning = field(default_factory=gpu_threshold.Tuning)


    def samples(self, capacity: int) -> int:
        return min(max(capacity // 32, 2048), 8192, capacity)


def supports(idx_q: jax.Array, idx_k: jax.Array, topk: int) -> bool:
    """Whether `select_bits` takes these shapes and dtypes."""
    B, C, J, I = idx_q.shape  # noqa: E741
    S = idx_k.shape[2]
    dtypes = idx_q.dtype == idx_k.dtype and idx_q.dtype in (jnp.float8_e4m3fn, jnp.bfloat16)
    sizes = J <= MAX_HEADS and I <= WIDTH and S % TILE == 0 and topk < S and Tuning().topk.takes(topk)
    # Offsets into the result are 32-bit.
    return dtypes and sizes and B * -(-C // QUERIES) * QUERIES * (S // UNIT) < 2**31


def select_bits(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
    tuning: Tuning = Tuning(),
    interpret: Any = None,
) -> jax.Array:
    """See `kernels_pallas.index_select.select_bits`. Key scales must be powers of two.

    Args:
        tuning: sizes.
        interpret: parameters of Pallas' interpret mode for GPUs, or None.
    """
    B, C, _, I = idx_q.shape  # noqa: E741
    S = idx_k.shape[2]
    # e4m3 values times a power of two are exact in bfloat16.
    keys = lax.dynamic_index_in_dim(idx_k, layer, keepdims=False).astype(jnp.bfloat16)
    if key_scale is not None:
        scale = lax.dynamic_index_in_dim(key_scale, layer, keepdims=False)
        keys *= scale.astype(jnp.bfloat16)[..., None]
    keys = jnp.pad(keys, ((0, 0), (0, 0), (0, WIDTH - I)))
    spare = -C % QUERIES
    chunk = C + spare
    q = jnp.pad(idx_q.astype(jnp.bfloat16), ((0, 0), (0, spare), (0, 0), (0, WIDTH - I)))
    weights = jnp.pad(weights.transpose(0, 2, 1), ((0, 0), (0, 0), (0, spare)))
    start = start.astype(jnp.int32)

    total = B * chunk
    samples = tuning.samples(S)
    places = gpu_bound.positions(start, chunk, S, samples)
    some = jnp.take_along_axis(keys, places[..., None], axis=1)
    if interpret:
        some, keys = some.transpose(0, 2, 1), keys.transpose(0, 2, 1)
    else:
        some, keys = gpu_score.arrange(some), gpu_score.arrange(keys)
    simulated = interpret is not None
    rows = min(tuning.rows, total)
    blocks = []
    for i in range(-(-total // rows)):
        first = jnp.full(1, i * (rows // QUERIES), jnp.int32)
        everyone = jnp.ones(total // QUERIES, jnp.int32)
        sampled = gpu_score.scores(
            q, weights, some, jnp.full_like(start, S), first, everyone, rows, 0, tuning.score, interpret
        )
        bounds = gpu_bound.bounds(sampled, places, start, first, total, chunk, S, topk, interpret=simulated)
        lists, sizes = gpu_score.candidates(
            q, weights, keys, start, first, bounds, rows, topk, tuning.score, interpret
        )
        kth, cut = gpu_kth.thresholds(lists, sizes, start, first, total, chunk, S, topk, tuning.kth, simulated)
        bits = gpu_emit.emit(lists, sizes, kth, cut, start, first, total, chunk, S, topk, interpret)
        blocks.append((bits, cut < 0))
    words = jnp.concatenate([bits for bits, _ in blocks])[:total]
    if tuning.debug:
        return blocks[0]
    return words.reshape(B, chunk, S // 32)[:, :C]
