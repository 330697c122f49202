"""select_bits on TPUs: index scores of a block of queries stay in VMEM until their exact top-k has left as bits.

Schedule of one program, Q = 16..128 queries (as many as have their scores in 32 MiB, or in 64 where there are 128):
  1. Keys come by DMA in segments of 4,096, two under way. They are upcast, scaled (by powers of two: exact) and turned
     to [keys, I] in VMEM in the shadow of the products with the segment before.
  2. A tile is 128 keys that are 32 apart: all heads of the block times these keys on the matrix units; relu, gate and
     sum over heads in float32, head after head. Bit v of the segment's 128 words is then tile v: no word is ever put
     together from neighbouring lanes. Sort keys go to VMEM, and the largest of every 8.
  3. The k-th largest of those maxima is a lower bound of the threshold; `tpu_search` counts from there.
  4. Keys above the threshold, and of equal ones those of lower index, are written as words.
Segments behind the block's last query are not visited; a block whose queries see at most topk keys is not scored.

Per query and key 2,048 operations at a contraction of 64, which fills half of a matrix unit of 128 rows and a quarter
of one of 256. HBM: (C / Q) x live keys x (I x itemsize + 4 for a scale), and C x S / 8 for the words. For C = 512 at
the end of 256K (Q = 32; 285 + 17 MB; 44 MiB of VMEM), counted from the compiler's instruction bundles with 14 steps
of the search, at 1.5, 1.75, 1.75 and 2.2 GHz; nothing was measured on a chip:

| | v5e | v6e | v5p (2 cores) | tpu7x |
|---|---|---|---|---|
| bundles a segment: products / search / words | 4,680 / 1,820 / 263 | 3,320 / same | 4,680 / same | 3,070 / same |
| time | 4.7 ms | 3.2 ms | 2.0 ms | 2.5 ms |
| floor, products at the datasheet's rate | 1.40 ms | 0.30 ms | 0.60 ms | 0.24 ms |

v5e and v6e have room for Q = 64 (`tuned`), which turns the keys for twice as many: 143 + 17 MB, 8,100 / 2,770 / 519 and
5,170 / 2,770 / 519 bundles: 3.9 and 2.5 ms.

Lost, in bundles of the products: words' keys 32 rows apart in VMEM (every row its own load: +28%); one reference with
two slots for the turned keys (the compiler then orders their loads and stores: +35%); tiles of 256 keys for matrix
units of that width (no change); reading e4m3 bytes as e4m3b11fnuz, which older chips unpack faster (-1% on v5e, 3.5
times as many on tpu7x). Halving alone takes the search 27 steps instead of 14, by simulation.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuned
from kernels_pallas.common import WORD
from kernels_pallas.index_select import tpu_stream
from kernels_pallas.index_select.sort_keys import LOWEST, sort_key
from kernels_pallas.index_select.tpu_search import cut, search
from kernels_pallas.index_select.tpu_stream import LANES, Stream

SEGMENT = WORD * LANES
"""Keys whose bits fill one register's row of words."""
GROUP = 8
"""Tiles whose scores share a maximum."""
PITCH = 40
"""Rows from one word's keys to the next word's: two loads for 8 of them, where a pitch of 32 takes eight."""
MIN_ROWS = 16
"""Queries of a bfloat16 register."""


@dataclass(frozen=True)
class Tuning:
    """Sizes; no effect on results."""

    scores_bytes: int = 32 << 20
    """VMEM for the scores of a block of queries: half of what the smallest chips have."""
    rows: int = 128
    """Most queries of a block, a power of two."""
    vmem_bytes: int = 60 << 20


def supports(idx_q: jax.Array, idx_k: jax.Array, tuning: Tuning = Tuning()) -> bool:
    """Whether `select_bits` takes these shapes and dtypes."""
    return tpu_stream.known(idx_q, idx_k) and MIN_ROWS * _row_bytes(idx_k.shape[2]) <= tuning.scores_bytes


def _row_bytes(capacity: int) -> int:
    return pl.cdiv(capacity, SEGMENT) * SEGMENT * 4


def _block_rows(chunk: int, capacity: int, tuning: Tuning) -> int:
    """Queries of a block: no more than the chunk needs, and than fit."""
    rows = tuning.rows
    while rows > MIN_ROWS and (rows // 2 >= chunk or rows * _row_bytes(capacity) > tuning.scores_bytes):
        rows //= 2
    return rows


def select_bits(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
    tuning: Tuning | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.index_select.select_bits`; for what `supports` accepts."""
    tuning = tuning or tuned.sizes("select_bits", Tuning())
    B, C, J, I = idx_q.shape  # noqa: E741
    S = idx_k.shape[2]
    Q = _block_rows(C, S, tuning)
    blocks, segments = pl.cdiv(C, Q), pl.cdiv(S, SEGMENT)
    padding = ((0, 0), (0, blocks * Q - C), (0, 0))
    # e4m3 values are exact in bfloat16. Head-major: the sum over heads is one of [Q, LANES] registers.
    wide = jnp.bfloat16 if idx_q.dtype == jnp.float8_e4m3fn else idx_q.dtype
    q = jnp.pad(idx_q.astype(wide), (*padding, (0, 0))).swapaxes(1, 2)
    cache = tpu_stream.operands(idx_k, key_scale)
    buffers = [pltpu.VMEM((2, I, SEGMENT), idx_k.dtype), pltpu.VMEM((2, 1, SEGMENT), jnp.float32)][: len(cache)]
    turned = pltpu.VMEM((LANES * PITCH, I), jnp.float32)
    scratch = [
        pltpu.VMEM((segments, WORD, Q, LANES), jnp.int32),
        pltpu.VMEM((segments, WORD // GROUP, Q, LANES), jnp.int32),
        pltpu.VMEM((J, Q, LANES), jnp.float32),
        turned,
        turned,
    ]

    def body(layer: Any, start: Any, q: Any, weights: Any, *refs: Any) -> None:
        n, b = len(cache), pl.program_id(0)
        stream = Stream(tpu_stream.sources(list(refs[:n]), layer[0], b), list(refs[n + 1 : 2 * n + 1]), refs[-1])
        first = start[b] + pl.program_id(1) * Q
        _block(first, q, weights, stream, refs[n], *refs[2 * n + 1 : -1], topk=topk)

    words = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B, blocks),
            in_specs=[
                pl.BlockSpec((None, J, Q, I), lambda b, i, *_: (b, 0, i, 0)),
                pl.BlockSpec((None, Q, J), lambda b, i, *_: (b, i, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(cache),
            ],
            out_specs=pl.BlockSpec((None, Q, segments * LANES), lambda b, i, *_: (b, i, 0)),
            scratch_shapes=[*buffers, *scratch, pltpu.SemaphoreType.DMA((2, len(cache)))],
        ),
        out_shape=jax.ShapeDtypeStruct((B, blocks * Q, segments * LANES), jnp.uint32),
        compiler_params=pltpu.CompilerParams(
            dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=tuning.vmem_bytes
        ),
        interpret=interpret,
        name="index_select_bits",
    )(jnp.asarray(layer, jnp.int32)[None], start, q, jnp.pad(weights, padding), *cache)
    return words[:, :C, : S // WORD]


def _block(
    first: jax.Array,
    q: Any,
    weights: Any,
    stream: Stream,
    out: Any,
    scores: Any,
    tops: Any,
    gates: Any,
    even: Any,
    odd: Any,
    *,
    topk: int,
) -> None:
    """One program: the words of queries first..first + Q - 1.

    Args:
        first: sequence index.
        q, weights: [J, Q, I] and [Q, J].
        stream: segments of the sequence's keys and scales.
        out: [Q, S // 32] uint32.
        scores, tops: [segments, 32, Q, LANES] and [segments, 32 / GROUP, Q, LANES] int32 sort keys, and maxima of them.
        gates: [J, Q, LANES] float32, the weights along lanes.
        even, odd: [LANES * PITCH, I] float32, turned keys of segments of either parity. Two references, so that the
            compiler knows that they do not overlap.
    """
    Q = q.shape[1]
    capacity = stream.sources[0].shape[-1]
    segments = lax.div(jnp.minimum(first + Q, capacity) - 1, SEGMENT) + 1
    last = jnp.minimum(first + lax.broadcasted_iota(jnp.int32, (Q, 1), 0), capacity - 1)
    lane_key = lax.broadcasted_iota(jnp.int32, (Q, LANES), 1) * WORD

    def write(selected: Callable[[jax.Array, jax.Array], jax.Array]) -> None:
        """Words of all live segments; selected: (sort keys, key indices) → bool, all [Q, LANES]."""

        def segment(s: jax.Array, _: Any) -> None:
            entries = scores[s]
            words = jnp.zeros((Q, LANES), jnp.uint32)
            for bit in range(WORD):
                chosen = selected(entries[bit], s * SEGMENT + lane_key + bit)
                words |= jnp.where(chosen, jnp.uint32(1 << bit), jnp.uint32(0))
            out[:, pl.ds(pl.multiple_of(s * LANES, LANES), LANES)] = words

        lax.fori_loop(0, segments, segment, None)

    def fold(ref: Any, take: Any, combine: Any, initial: int) -> jax.Array:
        """Combines take(entries, key indices) over all live segments; [Q, LANES] int32."""

        def segment(s: jax.Array, carry: jax.Array) -> jax.Array:
            entries = ref[s]
            for i in range(ref.shape[1]):
                carry = combine(carry, take(entries[i], s * SEGMENT + lane_key + i))
            return carry

        return lax.fori_loop(0, segments, segment, jnp.full((Q, LANES), initial, jnp.int32))

    def count(ref: Any, measure: Any) -> jax.Array:
        """[Q, 1] int32: how many of each row's entries have measure(entries, key indices)."""
        total = fold(ref, lambda x, key: jnp.where(measure(x, key), 1, 0), jnp.add, 0)
        # Exact in float32: below 2 ** 24.
        return jnp.sum(total.astype(jnp.float32), axis=1, keepdims=True).astype(jnp.int32)

    out[...] = jnp.zeros(out.shape, jnp.uint32)

    @pl.when(first + Q <= topk)
    def _() -> None:
        write(lambda _, key: key <= last)

    @pl.when(first + Q > topk)
    def _() -> None:
        for j in range(q.shape[0]):
            gates[j] = jnp.broadcast_to(weights[:, j : j + 1], (Q, LANES))
        _score(segments, last, q, stream, scores, tops, gates, even, odd)
        enough = last >= topk
        low = jnp.full((Q, 1), LOWEST + 1, jnp.int32)
        beyond = jnp.max(fold(tops, lambda x, _: x, jnp.maximum, LOWEST), axis=1, keepdims=True) + 1
        # topk maxima that reach a pivot are topk keys that do.
        low, _, _ = search(lambda p: count(tops, lambda x, _: x >= p), topk, low, beyond, enough)
        threshold, reach, above = search(lambda p: count(scores, lambda x, _: x >= p), topk, low, beyond, enough)

        def below(index: jax.Array) -> jax.Array:
            return count(scores, lambda x, key: (x == threshold) & (key < index))

        cutoff = cut(below, topk - above, enough & (reach > topk), capacity)
        write(lambda x, key: (x > threshold) | ((x == threshold) & (key < cutoff)))


def _score(
    segments: jax.Array,
    last: jax.Array,
    q: Any,
    stream: Stream,
    scores: Any,
    tops: Any,
    gates: Any,
    even: Any,
    odd: Any,
) -> None:
    """Fills `scores` and `tops` of all live segments. last: [Q, 1] int32, the last key that each query sees."""
    J, Q, I = q.shape  # noqa: E741
    precision = lax.Precision.HIGHEST if q.dtype == jnp.float32 else None
    lane_key = lax.broadcasted_iota(jnp.int32, (Q, LANES), 1) * WORD

    def turn(s: jax.Array, part: jax.Array, turned: Any) -> None:
        """Scales 128 neighbouring keys of segment s and brings them along sublanes, each word's 32 together."""
        slot, span = lax.rem(s, 2), pl.ds(pl.multiple_of(part * LANES, LANES), LANES)
        keys, *scales = stream.slots
        values = keys[slot, :, span].astype(jnp.float32)
        for scale in scales:
            values *= scale[slot, :, span]
        values = values.T
        for w in range(LANES // WORD):
            row = pl.multiple_of((part * (LANES // WORD) + w) * PITCH, 8)
            turned[pl.ds(row, WORD), :] = values[w * WORD : (w + 1) * WORD]

    def score(s: jax.Array, turned: Any, following: Any) -> None:
        pl.when(s + 1 < segments)(lambda: stream.wait(s + 1))
        pl.when(s + 2 < segments)(lambda: stream.start(s + 2))

        def group(g: jax.Array, _: Any) -> None:
            top = jnp.full((Q, LANES), LOWEST, jnp.int32)
            for i in range(GROUP):
                bit = g * GROUP + i
                keys = turned[pl.ds(bit, LANES, stride=PITCH), :].astype(q.dtype)
                products = lax.dot_general(
                    q[...].reshape(J * Q, I),
                    keys,
                    (((1,), (1,)), ((), ())),
                    precision=precision,
                    preferred_element_type=jnp.float32,
                )
                # Behind the last segment this turns what nobody reads: cheaper than a branch.
                turn(s + 1, bit, following)
                total = gates[0] * jnp.maximum(products[:Q], 0.0)
                for j in range(1, J):
                    total += gates[j] * jnp.maximum(products[j * Q : (j + 1) * Q], 0.0)
                key = jnp.where(s * SEGMENT + lane_key + bit <= last, sort_key(total), LOWEST)
                scores[s, bit] = key
                top = jnp.maximum(top, key)
            tops[s, g] = top

        lax.fori_loop(0, WORD // GROUP, group, None)

    def pair(p: jax.Array, _: Any) -> None:
        score(2 * p, even, odd)
        pl.when(2 * p + 1 < segments)(lambda: score(2 * p + 1, odd, even))

    stream.start(jnp.int32(0))
    pl.when(segments > 1)(lambda: stream.start(jnp.int32(1)))
    stream.wait(jnp.int32(0))
    lax.fori_loop(0, SEGMENT // LANES, lambda part, _: turn(jnp.int32(0), part, even), None)
    lax.fori_loop(0, lax.div(segments + 1, 2), pair, None)
