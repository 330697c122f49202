"""select_bits on Hopper GPUs: index scores of queries against all keys they see, and of each query's the exact top-k.

The scores are never stored: where they arise, those are listed that reach a bound that probably more than k, but not
many more, of a row reach. For 8,192 queries at a time:

1. `gpu_score.scores` (Mosaic GPU) scores one of every 32 keys, `gpu_bound` (Triton) finds each row's bound in them.
2. `gpu_score.candidates` scores all keys, and lists what reaches the bounds: some 3,000 of a row.
3. `gpu_kth` (Triton) finds the k-th best of each row's list, `gpu_emit` (Mosaic GPU) writes the bits of those as good.
4. Rows of which too few or too many were listed, as many equal scores make them, are left: their blocks' scores are
   stored in full, and `gpu_topk` (Triton) selects from them. Where no row is left, programs end at once: 3 us for each
   `scratch` of scores.

Whatever the bounds are, the result is the same. Of 8,192 rows that resemble the model's, or of independent scores,
none was left in any run (contexts 8K to 128K); in the last chunk of a real prompt of 128K none in 47 layers, and 204 in
one, where one of 16 lists overflowed. Of rows whose best keys all stand at the same 4 of 32 places none, at the same 40
of 512 places six of 8,192: a call at 128K takes 4.9 ms with these, 27 with all left.

One H200, ms of device time for 8,192 queries from `start`, capacity 128K, scores that resemble the model's, beside what
was before in the same run (all scores stored for blocks of 1,024 queries, and selected from):

| start | 0 | 8K | 16K | 32K | 64K | 120K |
|---|---|---|---|---|---|---|
| this | 0.68 | 0.90 | 1.00 | 1.43 | 2.26 | 3.73 |
| of it `candidates` | 0.36 | 0.52 | 0.63 | 1.01 | 1.81 | 3.24 |
| sample and bounds | 0.07 | 0.08 | 0.08 | 0.09 | 0.13 | 0.19 |
| `gpu_kth` | 0.12 | 0.16 | 0.14 | 0.17 | 0.16 | 0.14 |
| `gpu_emit` | 0.07 | 0.09 | 0.09 | 0.10 | 0.10 | 0.10 |
| before | 0.80 | 1.36 | 1.66 | 2.20 | 3.14 | 4.68 |

Since then tiles and places take turns among the lists (rows as above were all left before): 0.05 more in `arrange` when
that was a gather, and not timed alone as it is now; the whole call took 3.70 ms in the benchmark then. The floor of the
last column is 2.69 ms of products at 790 TFLOP/s. Tried and lost, ms at the end of 128K: 4,096 queries at a time 3.85;
one program a block 3.78; 512 programs, with 32 lists a row, 3.73; twice the `scratch`: no gain.

Keys are converted once a call: e4m3 times a power of two is exact in bfloat16. The lists of 8,192 queries take 448 MiB
at any context.
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
    """Scores of rows that are left that are stored at a time."""
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
