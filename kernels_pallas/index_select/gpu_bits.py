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

from kernels_pallas.common import WORD
from kernels_pallas.index_select import gpu_bound, gpu_emit, gpu_filter, gpu_kth, gpu_score, gpu_topk
from kernels_pallas.index_select.gpu_filter import QUERIES, TILE
from kernels_pallas.index_select.gpu_score import WIDTH

MAX_BLOCKS_UNROLLED = 32
MAX_HEADS = 16  # more queries do not fit the shared memory


@dataclass(frozen=True)
class Tuning:
    """Measured choices; no effect on results."""

    rows: int = 8192
    """Queries whose candidates are listed at a time, a multiple of QUERIES: the lists are the scratch."""
    scratch: int = 1 << 27
    """Scores that the rows left may take at a time."""
    score: gpu_score.Tuning = field(default_factory=gpu_score.Tuning)
    sample: gpu_score.Tuning = field(default_factory=lambda: gpu_score.Tuning(programs=128))
    kth: gpu_kth.Tuning = field(default_factory=gpu_kth.Tuning)


def supports(idx_q: jax.Array, idx_k: jax.Array, topk: int) -> bool:
    """Whether `select_bits` takes these shapes and dtypes."""
    B, C, J, I = idx_q.shape  # noqa: E741
    S = idx_k.shape[2]
    dtypes = idx_q.dtype == idx_k.dtype and idx_q.dtype in (jnp.float8_e4m3fn, jnp.bfloat16)
    sizes = J <= MAX_HEADS and I <= WIDTH and S % TILE == 0 and topk < S and 2 * topk <= Tuning().score.slots
    # Offsets into the result are 32-bit.
    return dtypes and sizes and B * -(-C // QUERIES) * QUERIES * (S // WORD) < 2**31


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
    q = jnp.pad(idx_q.astype(jnp.bfloat16), ((0, 0), (0, spare), (0, 0), (0, WIDTH - I)))
    weights = jnp.pad(weights.transpose(0, 2, 1), ((0, 0), (0, 0), (0, spare)))
    bits = _Call(q, weights, keys, start.astype(jnp.int32), topk, tuning, interpret).select()
    return bits.reshape(B, C + spare, S // WORD)[:, :C]


@dataclass(frozen=True)
class _Call:
    """Arguments as the kernels take them: padded, keys [B, S, WIDTH]."""

    q: jax.Array
    weights: jax.Array
    keys: jax.Array
    start: jax.Array
    topk: int
    tuning: Tuning
    interpret: Any

    @property
    def chunk(self) -> int:
        return self.q.shape[1]

    @property
    def total(self) -> int:
        return self.q.shape[0] * self.chunk

    @property
    def capacity(self) -> int:
        return self.keys.shape[1]

    def select(self) -> jax.Array:
        """[B * chunk, S // 32] uint32."""
        places, stride = gpu_bound.sample(self.start, self.chunk, self.capacity)
        samples = self._arrange(jnp.take_along_axis(self.keys, places[..., None], axis=1))
        keys = self._arrange(self.keys)
        rows = min(self.tuning.rows, self.total)
        blocks = -(-self.total // rows)

        def from_candidates(i: jax.Array) -> tuple[jax.Array, jax.Array]:
            return self._from_candidates(self._first(i, rows), rows, keys, samples, stride)

        if blocks == 1:
            bits, left = from_candidates(jnp.int32(0))
        else:
            bits, left = lax.map(from_candidates, jnp.arange(blocks, dtype=jnp.int32))
        bits, left = bits.reshape(-1, bits.shape[-1])[: self.total], left.reshape(-1)[: self.total]
        return self._from_scores(bits, left, keys)

    def _arrange(self, keys: jax.Array) -> jax.Array:
        return gpu_filter.arrange(keys) if self.interpret is None else keys.transpose(0, 2, 1)

    def _first(self, i: jax.Array, rows: int) -> jax.Array:
        return (i * (rows // QUERIES)).reshape(1)

    def _from_candidates(
        self, first: jax.Array, rows: int, keys: jax.Array, samples: jax.Array, stride: jax.Array
    ) -> tuple[jax.Array, jax.Array]:
        """Bits of `rows` rows, and which of them are left, [rows] int32."""
        inputs, tuning, simulated = (self.q, self.weights), self.tuning.score, self.interpret is not None
        shape = self.total, self.chunk, self.capacity, self.topk
        anywhere, wanted = jnp.full_like(self.start, self.capacity), jnp.ones(self.total // QUERIES, jnp.int32)
        n = lax.div(jnp.minimum(self.start + self.chunk, self.capacity), stride)
        tiles = jnp.minimum(lax.div(n + TILE - 1, TILE), samples.shape[2] // TILE)
        sampled = gpu_score.scores(
            *inputs, samples, anywhere, first, wanted, tiles, rows, 0, self.tuning.sample, self.interpret
        )
        bounds = gpu_bound.bounds(sampled, stride, self.start, first, *shape, interpret=simulated)
        lists, sizes = gpu_score.candidates(
            *inputs, keys, self.start, first, bounds, rows, self.topk, tuning, self.interpret
        )
        kth, cut = gpu_kth.thresholds(lists, sizes, self.start, first, *shape, self.tuning.kth, simulated)
        bits = gpu_emit.emit(lists, sizes, kth, cut, self.start, first, *shape, self.interpret)
        return bits, (cut == gpu_kth.LEFT).astype(jnp.int32)

    def _from_scores(self, bits: jax.Array, left: jax.Array, keys: jax.Array) -> jax.Array:
        """Puts the rows that are left into `bits`. Where there are none, its programs end at once."""
        groups = left.reshape(-1, QUERIES).max(axis=1)
        rows = min(max(self.tuning.scratch // self.capacity // QUERIES, 1) * QUERIES, self.total)
        blocks = -(-self.total // rows)
        tiles = jnp.full_like(self.start, self.capacity // TILE)

        @jax.jit  # one kernel for all blocks
        def select_block(bits: jax.Array, first: jax.Array) -> tuple[jax.Array, jax.Array]:
            scores = gpu_score.scores(
                self.q,
                self.weights,
                keys,
                self.start,
                first,
                groups,
                tiles,
                rows,
                self.topk,
                self.tuning.score,
                self.interpret,
            )
            return gpu_topk.select_rows(
                scores, bits, self.start, first, left, self.chunk, self.topk, self.interpret is not None
            )

        first = jnp.zeros(1, jnp.int32)
        if blocks > MAX_BLOCKS_UNROLLED:
            return lax.fori_loop(0, blocks, lambda _, carry: select_block(*carry), (bits, first))[0]
        for _ in range(blocks):  # an iteration of a device loop costs 7-15 us
            bits, first = select_block(bits, first)
        return bits
