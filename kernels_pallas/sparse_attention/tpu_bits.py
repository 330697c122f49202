"""attend_bits on TPUs: blocks of queries over the pages of keys that any of them selected.

Schedule. A program takes 64 queries with all their heads. It unites their bits, finds for each page of 128 keys the
next one in which a bit is set, and moves that list to scalar memory. Then it walks the visited pages, four (v6e, tpu7x:
eight, `tuned`) at a time wherever they lie: a copy of 256 KB a page (keys and values of all heads) is under way while
those before it are computed on. Bits become a bias of 0 or MASKED for each query and key, once for all heads; strided
loads take the heads out of the tokens' rows. The rows of a product are the queries of one head after the other, so that
the bias fits each head as it is. Scores, streaming softmax in float32, probabilities rounded before the product with V.

Cost. A visited page takes 64 queries x 32 heads x 128 keys x 4 K = 134 MFLOP and 256 KB: 0.68 and 0.32 us (v5e), 0.15
and 0.16 (v6e), 0.29 and 0.09 (v5p), 0.12 and 0.07 (tpu7x). A block also reads its bits, 2 MB at 256K keys. If 512
queries agree on 2,048 keys in 16 pages that is 17 GFLOP: 87 us (v5e), 19 (v6e), 37 (v5p), 15 (tpu7x); at 256K 58 MB.
Cycles that the compiler schedules for four pages: 5,630 (v5e), 3,910 (v6e), 5,500 (v5p), 4,000 (tpu7x); for a block
beside that 3,000 (v6e, tpu7x: 1,800) and 21 for each 4,096 keys of capacity. At 1.5 GHz four pages of a v5e are 3.8 us
against 2.7.

Tried and lost, in cycles for four pages on a v5e: maxima and sums of a row in one lane (7,980; lanes are exchanged for
every use); keys by rows, so that maxima and sums stay within lanes (6,980; values and bias are transposed, and the
matrix unit is loaded with probabilities); pages one, two and eight at a time (8,900, 6,840, 5,720; four on a v6e 4,400,
on a tpu7x 4,340); the next rows' scores beside a row's softmax (no change); 32 queries a block (6,580 for 64). 128 take
5,000, but visit more pages. The list of pages by XLA: 180,000 cycles a call, here 1,500 a block.
"""

from dataclasses import dataclass
from functools import partial, reduce
from math import log2
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuned
from kernels_pallas.common import MASKED, WORD
from kernels_pallas.sparse_attention import tpu_shared
from kernels_pallas.sparse_attention.tpu_shared import LANES, SUBLANES

PAGE = 128
"""Keys that are fetched or skipped together."""
WORDS = PAGE // WORD
MOST_KEYS = 1 << 18
"""A block's bits lie in vector memory, twice."""


@dataclass(frozen=True)
class Tuning:
    """Sizes that change the order of float32 sums and the speed.

    Attributes:
        queries: of a block, a multiple of 16.
        pages: visited pages that are computed on at once.
        rows: of a product at most, queries times heads; at least the queries.
    """

    queries: int = 64
    pages: int = 4
    rows: int = 512


def supports(q: jax.Array, kv: jax.Array) -> bool:
    """Whether `attend_bits` takes these shapes and dtypes."""
    S = kv.shape[2]
    return tpu_shared.supports(q, kv) and S % PAGE == 0 and S <= MOST_KEYS


def attend_bits(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    *,
    tuning: Tuning | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.sparse_attention.attend_bits`."""
    del start  # No bit is set behind the last visible key.
    return _attend(q, kv, layer, bits, False, tuning, interpret)[0]


def attend_bits_lse(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    *,
    tuning: Tuning | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.sparse_attention.attend_bits_lse`."""
    del start
    B, C, H, _ = q.shape
    out, lse = _attend(q, kv, layer, bits, True, tuning, interpret)
    return out, lse.swapaxes(2, 3).reshape(B, -1, H)[:, :C]


def _attend(
    q: jax.Array, kv: jax.Array, layer: jax.Array, bits: jax.Array, partly: bool, tuning: Tuning | None, interpret: Any
) -> list[jax.Array]:
    """The result in the dtype of q; or `partly`: in float32, and log-sum-exps [B, blocks, H, Q]."""
    tuning = tuning or tuned.sizes("attend_bits", Tuning())
    B, C, H, K = q.shape
    S, G = kv.shape[2], kv.shape[4]
    Q = min(tuning.queries, pl.cdiv(C, 16) * 16)
    T, R = min(tuning.pages * PAGE, S), Q * max(n for n in range(1, tuning.rows // Q + 1) if H // G % n == 0)
    blocks, width = pl.cdiv(C, Q), pl.cdiv(S // WORD, LANES) * LANES
    listed = pl.cdiv(width // LANES, SUBLANES) * SUBLANES
    bits = jnp.pad(bits, ((0, 0), (0, blocks * Q - C), (0, width - S // WORD)))
    q = jnp.pad(q, ((0, 0), (0, blocks * Q - C), (0, 0), (0, 0))).reshape(B, -1, K)
    heads = pl.BlockSpec((None, Q * H, K), lambda b, i, _: (b, i, 0))
    shapes, specs = [jax.ShapeDtypeStruct(q.shape, jnp.float32 if partly else q.dtype)], [heads]
    if partly:
        shapes.append(jax.ShapeDtypeStruct((B, blocks, H, Q), jnp.float32))
        specs.append(pl.BlockSpec((None, None, H, Q), lambda b, i, _: (b, i, 0, 0)))
    out, *lse = pl.pallas_call(
        partial(_attend_block, H=H, G=G, pages=S // PAGE),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, blocks),
            in_specs=[
                heads,
                pl.BlockSpec((None, Q, width), lambda b, i, _: (b, i, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=specs,
            scratch_shapes=_Scratch(
                union=pltpu.VMEM((listed, LANES), jnp.int32),
                following=pltpu.SMEM((listed, LANES), jnp.int32),
                tiles=pltpu.VMEM((2, T * 2 * G, K), kv.dtype),
                words=tpu_shared.words(max(T * 2 * G, Q * H), K, kv.dtype),
                q=pltpu.VMEM((H * Q, K), q.dtype),
                kv=pltpu.VMEM((2 * G, T, K), kv.dtype),
                bias=pltpu.VMEM((Q, T), jnp.float32),
                maximum=pltpu.VMEM((H * Q // R, R, LANES), jnp.float32),
                denominator=pltpu.VMEM((H * Q // R, R, LANES), jnp.float32),
                numerator=pltpu.VMEM((H * Q // R, R, K), jnp.float32),
                listed=pltpu.SemaphoreType.DMA,
                arrived=pltpu.SemaphoreType.DMA((2,)),
            ),
        ),
        out_shape=shapes,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), vmem_limit_bytes=32 * 2**20),
        interpret=interpret,
        name="attend_bits",
    )(layer.reshape(1), q, bits, tpu_shared.rows(kv))
    return [out.reshape(B, -1, H, K)[:, :C], *lse]


class _Scratch(NamedTuple):
    """What a program works on.

    Attributes:
        union, following: the list of pages, see `_list_pages`, in vector and in scalar memory.
        tiles: rows of visited pages as they come, two times.
        words: for `tpu_shared.split` and `merge`.
        q, kv: queries and a tile's keys and values, head after head.
        bias: 0 where a query selected a key of the tile, else MASKED.
        maximum, denominator, numerator: the softmax of R rows each; maxima in all lanes, denominators as the sum of
            their lanes.
        listed, arrived: semaphores of the list and of the tiles.
    """

    union: Any
    following: Any
    tiles: Any
    words: Any
    q: Any
    kv: Any
    bias: Any
    maximum: Any
    denominator: Any
    numerator: Any
    listed: Any
    arrived: Any


def _attend_block(
    layer_ref: Any,
    q_ref: Any,
    bits_ref: Any,
    kv_ref: Any,
    o_ref: Any,
    *refs: Any,
    H: int,
    G: int,
    pages: int,
) -> None:
    """refs: [H, Q] for the log-sum-exp of the scaled scores, MASKED where there is no key, if it is wanted; scratch."""
    s = _Scratch(*refs[-len(_Scratch._fields) :])
    lse_refs = refs[: -len(_Scratch._fields)]
    (Q, T), (parts, R, K), page_rows = s.bias.shape, s.numerator.shape, PAGE * 2 * G
    scale = K**-0.5 * log2(jnp.e)
    sequence = (layer_ref[0] * pl.num_programs(0) + pl.program_id(0)) * pages

    def after(page: jax.Array) -> jax.Array:
        word = jnp.minimum(page + 1, pages - 1) * WORDS
        return jnp.where(page + 1 < pages, s.following[word >> 7, word & (LANES - 1)], pages)

    def walk(page: jax.Array) -> list[jax.Array]:
        """The visited pages of a tile that begins with this one, and the first of the next tile."""
        found = [page]
        for _ in range(T // PAGE):
            found.append(after(found[-1]))
        return found

    def fetch(slot: jax.Array, page: jax.Array) -> None:
        for j, at in enumerate(walk(page)[:-1]):
            # What is missing in the last tile: page 0 is as finite as any other, and masked.
            row = pl.multiple_of((sequence + jnp.where(at < pages, at, 0)) * page_rows, page_rows)
            target = s.tiles.at[slot, pl.ds(j * page_rows, page_rows)]
            pltpu.make_async_copy(kv_ref.at[pl.ds(row, page_rows)], target, s.arrived.at[slot]).start()

    def expand(j: int, page: jax.Array) -> None:
        """Bits of the tile's j-th page → bias."""
        used, lane = page < pages, lax.broadcasted_iota(jnp.int32, (Q, PAGE), 1)
        word = jnp.where(used, page, 0) * WORDS
        window = pltpu.bitcast(bits_ref[:, pl.ds(pl.multiple_of(word & -LANES, LANES), LANES)], jnp.int32)
        place = (word & (LANES - 1)) + (lane >> 5)
        bit = jnp.take_along_axis(window, place, axis=1, mode="promise_in_bounds") >> (lane & (WORD - 1))
        s.bias[:, j * PAGE : (j + 1) * PAGE] = jnp.where((bit & used.astype(jnp.int32)) != 0, 0.0, MASKED)

    def add_tile(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        slot, page = state
        *here, then = walk(page)
        pl.when(then < pages)(lambda: fetch(1 - slot, then))
        for j, at in enumerate(here):
            expand(j, at)
        pltpu.make_async_copy(s.tiles.at[slot], s.tiles.at[slot], s.arrived.at[slot]).wait()
        for r, head in enumerate(tpu_shared.split(s.tiles[slot], s.words, 2 * G)):
            s.kv[r] = head
        lax.fori_loop(0, parts, add_rows, None)
        return 1 - slot, then

    def add_rows(i: jax.Array, _: None) -> None:
        g, q = lax.div(i, parts // G), s.q[pl.ds(pl.multiple_of(i * R, R), R)]
        scores = tpu_shared.dot(q, s.kv[g], 1).reshape(R // Q, Q, T) + s.bias[...]
        columns = [scores[:, :, at : at + LANES].reshape(R, LANES) for at in range(0, T, LANES)]
        old = s.maximum[i]
        new = jnp.maximum(old, jnp.max(reduce(jnp.maximum, columns), axis=1, keepdims=True))
        columns = [jnp.exp2((column - new) * scale) for column in columns]
        decay = jnp.exp2((old - new) * scale)
        s.maximum[i] = new
        s.denominator[i] = s.denominator[i] * decay + reduce(jnp.add, columns)
        p = jnp.concatenate(columns, axis=1).astype(s.kv.dtype)
        s.numerator[i] = s.numerator[i] * decay + tpu_shared.dot(p, s.kv[G + g], 0)

    _list_pages(bits_ref, s.union, pages)
    pltpu.async_copy(s.union, s.following, s.listed).wait()
    first = s.following[0, 0]
    pl.when(first < pages)(lambda: fetch(jnp.int32(0), first))
    for h, head in enumerate(tpu_shared.split(q_ref[...], s.words, H)):
        s.q[h * Q : (h + 1) * Q] = head
    # Above every masked score: where a row has seen no key, exp2(MASKED - maximum) is 0, not 1.
    s.maximum[...] = jnp.full(s.maximum.shape, MASKED / 2, jnp.float32)
    s.denominator[...] = jnp.zeros(s.denominator.shape, jnp.float32)
    s.numerator[...] = jnp.zeros(s.numerator.shape, jnp.float32)
    lax.while_loop(lambda state: state[1] < pages, add_tile, (jnp.int32(0), first))
    heads = []
    diagonal = lax.broadcasted_iota(jnp.int32, (Q, Q), 0) == lax.broadcasted_iota(jnp.int32, (Q, Q), 1)
    for i in range(parts):
        total = jnp.sum(s.denominator[i], axis=1, keepdims=True)
        out = s.numerator[i] * (1.0 / jnp.where(total == 0, 1.0, total))
        heads += [out[at : at + Q] for at in range(0, R, Q)]
        for lse_ref in lse_refs:
            lse = jnp.where(total == 0, MASKED, s.maximum[i, :, :1] * K**-0.5 + jnp.log(total))
            for at in range(0, R, Q):
                # A column becomes a row: of the square that repeats it the diagonal is left.
                row = jnp.sum(jnp.where(diagonal, lse[at : at + Q], 0.0), axis=0, keepdims=True)
                lse_ref[pl.ds((i * R + at) // Q, 1), :] = row
    tpu_shared.merge(heads, s.words, o_ref)


def _list_pages(bits_ref: Any, union: Any, pages: int) -> None:
    """For each word of the bits, row after row of `union` [n, 128] int32: the first page that any query selected a key
    in, from the word's own page on; `pages` where there is none."""
    Q, W = bits_ref.shape
    rows, lanes = (lax.broadcasted_iota(jnp.int32, union.shape, axis) for axis in (0, 1))

    def unite(w: jax.Array, _: None) -> None:
        words = pltpu.bitcast(bits_ref[:, pl.ds(pl.multiple_of(w * LANES, LANES), LANES)], jnp.int32)
        some = reduce(jnp.bitwise_or, [words[i : i + SUBLANES] for i in range(0, Q, SUBLANES)])
        for shift in (4, 2, 1):
            some |= pltpu.roll(some, shift, 0)
        union[pl.ds(w, 1)] = some[:1]

    def least_from_here(x: jax.Array, axis: int) -> jax.Array:
        """Minimum of each element and those behind it."""
        size, place = x.shape[axis], (rows, lanes)[axis]
        for shift in (1 << i for i in range((size - 1).bit_length())):
            x = jnp.minimum(x, jnp.where(place < size - shift, pltpu.roll(x, size - shift, axis), pages))
        return x

    union[...] = jnp.zeros(union.shape, jnp.int32)
    lax.fori_loop(0, W // LANES, unite, None)
    own = least_from_here(jnp.where(union[...] != 0, lax.div((rows << 7) + lanes, WORDS), pages), 1)
    below = least_from_here(jnp.broadcast_to(own[:, :1], own.shape), 0)
    last = union.shape[0] - 1
    union[...] = jnp.minimum(own, jnp.where(rows < last, pltpu.roll(below, last, 0), pages))
