"""select_ids on TPUs: index scores and exact top-k of one query per sequence, ids in ascending order.

Schedule of one program, one sequence:
  1. Keys come by DMA in tiles, three under way. All heads times a tile on the matrix units; the products pass through
     VMEM so that a register holds one head's products with 8 x 128 keys: relu, gate and sum, head after head in
     float32, as in `tpu_bits`. Sort keys of the whole context stay in VMEM, key 128 r + l in row r and lane l.
  2. `tpu_search` counts its way to the threshold; equal keys are cut at the lower index.
  3. Ids leave without a scatter. For 128 rows at a time (16,384 keys): products of the mask with triangles of ones give
     every row's number of selected keys up to each lane and in the rows above. A place of the result belongs to the row
     whose range of ranks holds it; a one-hot product fetches that row's ranks, and the lanes whose rank is not above
     the place's are as many as stand before its key. Of the 16 groups of 128 places, those that 128 rows touch are
     visited: at most 16 more than there are groups of rows. All counts are exact: bfloat16 up to 128, float32 sums.
Cost follows the visible keys; a sequence with at most topk of them is not scored.

HBM: visible keys x (I x itemsize + 4 for a scale), once. For 256K keys in fp8 (17.8 MB), counted from the compiler's
instruction bundles with 16 steps of the search, at 1.5, 1.75, 1.75 and 2.2 GHz; nothing was measured on a chip:

| | v5e | v6e | v5p (one core) | tpu7x |
|---|---|---|---|---|
| bundles of 4,096 keys' scores | 403 | 410 | 401 | 297 |
| bundles in all, thousands: scores / search / ids | 26 / 7 / 7 | 26 / 7 / 7 | 26 / 7 / 7 | 19 / 7 / 6 |
| time | 27 us | 23 us | 23 us | 15 us |
| floor, bytes at the datasheet's rate | 21.8 us | 10.9 us | 6.4 us | 4.8 us |

Only tpu7x unpacks e4m3 natively; the older chips' e4m3b11fnuz has the same bytes but for zero's sign, at a sixteenth.
So read (`tuned`), 403 bundles on a v5e are left of 706; tpu7x would take 3,565. A program whose chip is not known reads
e4m3.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuned
from kernels_pallas.index_select import tpu_stream
from kernels_pallas.index_select.sort_keys import LOWEST, sort_key
from kernels_pallas.index_select.tpu_search import cut, search
from kernels_pallas.index_select.tpu_stream import LANES, Stream

SUBLANES = 8
BLOCK = LANES * LANES
"""Keys whose ids are emitted together."""
_WHOLE_BYTES, _FNUZ_FACTOR = 32, 16
MAX_CAPACITY = 1 << 20
"""Sort keys of a context: 4 MiB of VMEM."""


@dataclass(frozen=True)
class Tuning:
    """Sizes; no effect on results."""

    tile: int = 4096
    """Keys copied at a time; divides BLOCK, a multiple of 1,024."""
    slots: int = 3
    """Tiles in VMEM."""
    vmem_bytes: int = 32 << 20
    fnuz: bool = False
    """Whether e4m3 bytes are read as e4m3b11fnuz, for chips that unpack only those natively."""


def supports(idx_q: jax.Array, idx_k: jax.Array) -> bool:
    """Whether `select_ids` takes these shapes and dtypes."""
    return tpu_stream.known(idx_q, idx_k) and idx_k.shape[2] <= MAX_CAPACITY


def select_ids(
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
    """See `kernels_pallas.index_select.select_ids`; for what `supports` accepts."""
    tuning = tuning or tuned.sizes("select_ids", Tuning())
    B, _, J, I = idx_q.shape  # noqa: E741
    S = idx_k.shape[2]
    wanted = min(topk, S)
    places = pl.cdiv(wanted, LANES)
    heads = pl.cdiv(J, SUBLANES) * SUBLANES
    # From one 128 keys' products to the next: an odd number of sublane tiles, so that a strided load is not split.
    pitch = heads if heads // SUBLANES % 2 else heads + SUBLANES
    # e4m3 values are exact in bfloat16.
    wide = jnp.bfloat16 if idx_q.dtype == jnp.float8_e4m3fn else idx_q.dtype
    q = jnp.pad(idx_q[:, 0].astype(wide), ((0, 0), (0, heads - J), (0, 0)))
    fnuz = tuning.fnuz and idx_k.dtype == jnp.float8_e4m3fn and I % _WHOLE_BYTES == 0
    if fnuz:
        q *= _FNUZ_FACTOR
    cache = tpu_stream.operands(idx_k, key_scale)
    tiles = [(I, tuning.tile, idx_k.dtype), (1, tuning.tile, jnp.float32)][: len(cache)]

    def body(layer: Any, start: Any, weights: Any, q: Any, *refs: Any) -> None:
        n, b = len(cache), pl.program_id(0)
        stream = Stream(tpu_stream.sources(list(refs[:n]), layer[0], b), list(refs[n + 1 : 2 * n + 1]), refs[-1])
        _row(start[b], weights.at[b], q, stream, refs[n], *refs[2 * n + 1 : -1], topk=topk, pitch=pitch, fnuz=fnuz)

    ids = pl.pallas_call(
        body,
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=2,
            grid=(B,),
            in_specs=[
                pl.BlockSpec(memory_space=pltpu.SMEM),
                pl.BlockSpec((None, heads, I), lambda b, *_: (b, 0, 0)),
                *[pl.BlockSpec(memory_space=pl.ANY)] * len(cache),
            ],
            out_specs=pl.BlockSpec((None, places, LANES), lambda b, *_: (b, 0, 0)),
            scratch_shapes=[
                *[pltpu.VMEM((tuning.slots, *shape), dtype) for *shape, dtype in tiles],
                pltpu.VMEM((pl.cdiv(S, BLOCK) * LANES, LANES), jnp.int32),
                pltpu.VMEM((tuning.tile // LANES * pitch, LANES), jnp.float32),
                pltpu.SemaphoreType.DMA((tuning.slots, len(cache))),
            ],
        ),
        out_shape=jax.ShapeDtypeStruct((B, places, LANES), jnp.int32),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",), vmem_limit_bytes=tuning.vmem_bytes),
        interpret=interpret,
        name="index_select_ids",
    )(jnp.asarray(layer, jnp.int32)[None], start, weights[:, 0], q, *cache)
    return ids.reshape(B, places * LANES)[:, :wanted]


def _row(
    start: jax.Array,
    weights: Any,
    q: Any,
    stream: Stream,
    out: Any,
    scores: Any,
    products: Any,
    *,
    topk: int,
    pitch: int,
    fnuz: bool,
) -> None:
    """One program: the ids of one query.

    Args:
        start: sequence index of the query.
        weights: [J] float32 in SMEM.
        q: [J, I], J padded to sublanes.
        stream: tiles of the sequence's keys and scales.
        out: [places, LANES] int32.
        scores: [rows, LANES] int32 sort keys.
        products: a tile's products, [tile / LANES * pitch, LANES] float32, head j of row r at r * pitch + j.
        pitch: at least q's rows.
        fnuz: as in `Tuning`.
    """
    capacity = stream.sources[0].shape[-1]
    last = jnp.minimum(start, capacity - 1)
    place = _indices(out.shape[0])

    @pl.when(last < topk)
    def _() -> None:
        out[...] = jnp.where(place <= last, place, -1)

    @pl.when(last >= topk)
    def _() -> None:
        blocks = lax.div(last, BLOCK) + 1
        _score(last, weights, q, stream, scores, products, pitch, fnuz)
        threshold, cutoff = _threshold(scores, blocks, topk, capacity)
        out[...] = jnp.zeros(out.shape, jnp.int32)
        _emit(scores, blocks, threshold, cutoff, out)
        out[...] = jnp.where(place < topk, out[...], -1)


def _score(
    last: jax.Array, weights: Any, q: Any, stream: Stream, scores: Any, products: Any, pitch: int, fnuz: bool
) -> None:
    """Sort keys of keys 0..last; LOWEST behind, to the end of the last block."""
    slots, width = stream.slots[0].shape[0], stream.slots[0].shape[-1]
    rows, tiles = width // LANES, lax.div(last, width) + 1
    last_block = pl.multiple_of(lax.div(last, BLOCK) * LANES, LANES)
    scores[pl.ds(last_block, LANES), :] = jnp.full((LANES, LANES), LOWEST, jnp.int32)
    key = _indices(SUBLANES)

    def start(t: jax.Array) -> None:
        pl.when(t < tiles)(lambda: stream.start(t))

    def score(t: jax.Array, _: Any) -> None:
        start(t + slots - 1)
        stream.wait(t)
        keys, *scales = (slot[lax.rem(t, slots)] for slot in stream.slots)
        product = lax.dot_general(
            q[...],
            (_as_fnuz(keys) if fnuz else keys).astype(q.dtype),
            (((1,), (0,)), ((), ())),
            precision=lax.Precision.HIGHEST if q.dtype == jnp.float32 else None,
            preferred_element_type=jnp.float32,
        )
        for scale in scales:
            product *= scale
        for r in range(rows):
            products[r * pitch : r * pitch + q.shape[0], :] = product[:, r * LANES : (r + 1) * LANES]
        for r in range(0, rows, SUBLANES):
            total = jnp.zeros(key.shape, jnp.float32)
            for j in range(weights.shape[0]):
                head = products[pl.ds(r * pitch + j, SUBLANES, stride=pitch), :]
                total += weights[j] * jnp.maximum(head, 0.0)
            first = pl.multiple_of(t * rows + r, SUBLANES)
            visible = key <= last - first * LANES
            scores[pl.ds(first, SUBLANES), :] = jnp.where(visible, sort_key(total), LOWEST)

    for t in range(slots - 1):
        start(jnp.int32(t))
    lax.fori_loop(0, tiles, score, None)


def _as_fnuz(keys: jax.Array) -> jax.Array:
    """The bytes of finite e4m3fn keys [I, T] as e4m3b11fnuz: a sixteenth of them, exactly."""
    words = pltpu.bitcast(keys, jnp.uint32)
    # Its only byte that is no number is our negative zero: a sign stays where the seven other bits are not all 0.
    magnitudes = jnp.uint32(0x7F7F7F7F)
    words &= ((words & magnitudes) + magnitudes) | magnitudes
    return pltpu.bitcast(words, jnp.float8_e4m3b11fnuz)


def _indices(rows: int) -> jax.Array:
    """[rows, LANES] int32: 128 r + l."""
    row, lane = (lax.broadcasted_iota(jnp.int32, (rows, LANES), axis) for axis in (0, 1))
    return row * LANES + lane


def _threshold(scores: Any, blocks: jax.Array, topk: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """The lowest selected sort key and the index below which keys equal to it are selected; [1, 1] int32."""
    tall = LANES // SUBLANES, SUBLANES, LANES
    key = _indices(LANES)

    def count(measure: Any) -> jax.Array:
        def block(i: jax.Array, total: jax.Array) -> jax.Array:
            chosen = measure(scores[pl.ds(pl.multiple_of(i * LANES, LANES), LANES), :], i)
            return total + jnp.sum(jnp.where(chosen, 1, 0).reshape(tall), axis=0)

        total = lax.fori_loop(0, blocks, block, jnp.zeros(tall[1:], jnp.int32))
        return jnp.sum(total.astype(jnp.float32), keepdims=True).astype(jnp.int32)

    def largest_of(i: jax.Array, largest: jax.Array) -> jax.Array:
        block = scores[pl.ds(pl.multiple_of(i * LANES, LANES), LANES), :]
        return jnp.maximum(largest, jnp.max(block.reshape(tall), axis=0))

    largest = lax.fori_loop(0, blocks, largest_of, jnp.full(tall[1:], LOWEST, jnp.int32))
    largest = jnp.max(largest, keepdims=True)
    low, enough = jnp.full((1, 1), LOWEST + 1, jnp.int32), jnp.full((1, 1), True)
    threshold, reach, above = search(lambda p: count(lambda x, _: x >= p), topk, low, largest + 1, enough)

    def below(index: jax.Array) -> jax.Array:
        return count(lambda x, i: (x == threshold) & (key < index - i * BLOCK))

    return threshold, cut(below, topk - above, reach > topk, capacity)


def _emit(scores: Any, blocks: jax.Array, threshold: jax.Array, cutoff: jax.Array, out: Any) -> None:
    """Adds each selected key's id to its place in `out` [places, LANES] int32; places of nothing stay."""
    square = LANES, LANES
    row, lane = (lax.broadcasted_iota(jnp.int32, square, axis) for axis in (0, 1))
    one, zero = jnp.ones(square, jnp.float32), jnp.zeros(square, jnp.float32)
    up_to, above = jnp.where(lane <= row, one, zero), jnp.where(lane < row, one, zero)

    def dot(a: jax.Array, b: jax.Array, transposed: bool = False) -> jax.Array:
        # Counts up to 128 are exact in bfloat16, their sums in float32.
        axes = (((1,), (int(transposed),)), ((), ()))
        return lax.dot_general(a.astype(jnp.bfloat16), b.astype(jnp.bfloat16), axes, preferred_element_type=jnp.float32)

    def block(i: jax.Array, base: jax.Array) -> jax.Array:
        sort_keys = scores[pl.ds(pl.multiple_of(i * LANES, LANES), LANES), :]
        index = (i * LANES + row) * LANES + lane
        chosen = (sort_keys > threshold) | ((sort_keys == threshold) & (index < cutoff))
        mask = jnp.where(chosen, one, zero)
        ranks = dot(up_to, mask, transposed=True)  # [lane, row]: how many of the row's keys are chosen up to the lane
        counts = dot(mask, one)  # [row, any]
        before = dot(above, counts)  # [row, any]: in rows above
        total = jnp.sum(counts[:, :1]).astype(jnp.int32)

        def place(p: jax.Array, _: None) -> None:
            local = (p * LANES + lane - base).astype(jnp.float32)  # [any, place]
            owner = (before <= local) & (local < before + counts)  # [row, place]
            rank = dot(ranks, jnp.where(owner, one, zero))  # [lane, place]
            skipped = jnp.sum(jnp.where(owner, before, 0.0), axis=0, keepdims=True)
            owner_row = jnp.sum(jnp.where(owner, row.astype(jnp.float32), 0.0), axis=0, keepdims=True)
            found = jnp.sum(jnp.where(owner, one, zero), axis=0, keepdims=True)
            owner_lane = jnp.sum(jnp.where(rank <= local - skipped, one, zero), axis=0, keepdims=True)
            ids = (i * LANES + owner_row.astype(jnp.int32)) * LANES + owner_lane.astype(jnp.int32)
            out[pl.ds(p, 1), :] += jnp.where(found > 0, ids, 0)

        lax.fori_loop(lax.div(base, LANES), lax.div(base + total + LANES - 1, LANES), place, None)
        return base + total

    lax.fori_loop(0, blocks, block, jnp.int32(0))
