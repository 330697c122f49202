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

from kernels_pallas.index_select import gpu_resident, gpu_score, gpu_threshold, gpu_topk
from kernels_pallas.index_select.gpu_score import QUERIES, TILE, UNIT, WIDTH

MAX_BLOCKS_UNROLLED = 32
MAX_HEADS = 16  # more queries do not fit the shared memory


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    rows: int = 1024
    """Queries scored at a time, a multiple of QUERIES: their scores are the scratch."""
    score: gpu_score.Tuning = field(default_factory=gpu_score.Tuning)
    resident: gpu_resident.Tuning = field(default_factory=gpu_resident.Tuning)
    topk: gpu_threshold.Tuning = field(default_factory=gpu_threshold.Tuning)


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
    keys = keys.transpose(0, 2, 1) if interpret else gpu_score.arrange(keys)
    spare = -C % QUERIES
    q = jnp.pad(idx_q.astype(jnp.bfloat16), ((0, 0), (0, spare), (0, 0), (0, WIDTH - I)))
    weights = jnp.pad(weights.transpose(0, 2, 1), ((0, 0), (0, 0), (0, spare)))
    start = start.astype(jnp.int32)

    total = B * (C + spare)
    rows = min(tuning.rows, total)
    blocks = -(-total // rows)

    @jax.jit  # one kernel for all blocks
    def select_block(i: jax.Array, bits: jax.Array) -> jax.Array:
        first = (i * (rows // QUERIES)).reshape(1)
        scored = gpu_score.scores(q, weights, keys, start, first, rows, topk, tuning.score, interpret)
        shape = (C + spare, topk)
        simulated = interpret is not None
        bits, left = gpu_resident.select_rows(*scored, bits, start, first, *shape, tuning.resident, simulated)
        return gpu_topk.select_rows(*scored, bits, start, first, left, *shape, tuning.topk, simulated)

    bits = lax.empty((total, S // UNIT), jnp.uint8)
    if blocks <= MAX_BLOCKS_UNROLLED:  # an iteration of a device loop costs 7-15 us
        for i in range(blocks):
            bits = select_block(jnp.int32(i), bits)
    else:
        bits = lax.fori_loop(0, blocks, select_block, bits)
    words = lax.bitcast_convert_type(bits.reshape(B, C + spare, S // 32, 4), jnp.uint32)
    return words[:, :C]
