"""select_ids on NVIDIA GPUs (Ampere and newer): index scores and exact top-k of one query per sequence.

Schedule, three launches; each exits at once where a short context does not need it:
  1. `index_scores` multiplies tiles of keys with the 16 heads on the tensor cores, and writes a sort key (int32) of
     every visible score and the largest of each of up to 8,192 groups of keys that lie far apart.
  2. `index_candidates`: topk groups have a maximum of at least T, so topk keys do. Every program finds such a T and
     appends what reaches it in its share of the keys to one list: about 2,450 of 131,072 random keys for topk 2,048.
  3. `index_ids`: every program finds the exact threshold among the candidates, counts those selected before its share
     of the keys, and writes the ids of its share in order.
The list's order depends on which program comes first, but only counts are taken of it: results do not. Contexts of up
to 8,192 keys skip the second step, and begin the search where a normal distribution of their mean and deviation has its
quantile. More than 4,096 candidates (very many equal scores) are walked through in pieces.

Cost: 68 bytes a key, once (fp8 keys and their scale); sort keys and lists are meant to stay in the L2 cache. One H200,
JAX 0.11.2, batch 1, topk 2,048, random scores, microseconds a call in a chain over 8 layers, less 2.4 for the chain's
loop and the small operation between calls, one run each (floor at 4.3 TB/s):
  context 8K 10.7 (0.1), 32K 12.2 (0.5), 128K 16.5 (2.1), 256K 20.5 (4.2).
What was tried and lost: benchmarks/GPU_NOTES.md.

Triton rather than Mosaic GPU: M = 16 is no wgmma, and both its block-wide counts and its prefix sums are built in.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_search import (
    boundary,
    bounds,
    count_two,
    normal_quantile,
    search,
)
from kernels_pallas.index_select.gpu_words import factors, words
from kernels_pallas.index_select.sort_keys import HIGHEST, LOWEST, sort_key


@dataclass(frozen=True)
class Tuning:
    """Sizes, all powers of two; they change the speed only.

    score_tile, score_blocks, score_warps: keys scored at once by a program; programs in all; warps of each.
    slice, blocks: keys that a program of the other two kernels filters at once; programs in all.
    warps: of the other two kernels.
    whole: groups of keys, and longest context that is searched without pruning; at most 2 ** 14.
    held: candidates that a program keeps in registers.
    slack: groups more than topk that may pass: fewer steps of the search for more candidates.
    """

    score_tile: int = 64
    score_blocks: int = 1024
    score_warps: int = 2
    slice: int = 1024
    blocks: int = 128
    warps: int = 8
    whole: int = 8192
    held: int = 4096
    slack: int = 128


def supports(idx_q: jax.Array, idx_k: jax.Array) -> bool:
    """Whether `select_ids` takes these shapes and dtypes."""
    J, I = idx_q.shape[2:]  # noqa: E741
    if idx_q.dtype != idx_k.dtype or idx_q.dtype not in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32):
        return False
    # A tensor core multiplies 16 components at a time; fp8 ones are spread over four products.
    least = 64 if idx_k.dtype == jnp.float8_e4m3fn else 16
    return least <= I <= 128 and I & (I - 1) == 0 and J <= 64


def select_ids(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array | int,
    start: jax.Array,
    topk: int,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> jax.Array:
    """See `kernels_pallas.index_select.select_ids`."""
    layer = jnp.asarray(layer, jnp.int32).reshape(1)
    keys, best, count = score_keys(idx_q, weights, idx_k, key_scale, layer, start, topk, tuning, interpret)
    candidates = ()
    if keys.shape[1] > tuning.whole:
        candidates = list_candidates(start, keys, best, count, idx_k.shape[2], topk, tuning, interpret)
    return write_ids(start, keys, candidates, idx_k.shape[2], topk, tuning, interpret)


def score_keys(
    idx_q: jax.Array,
    weights: jax.Array,
    idx_k: jax.Array,
    key_scale: jax.Array | None,
    layer: jax.Array,
    start: jax.Array,
    topk: int,
    tuning: Tuning,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """First launch. Arguments as in `select_bits`, layer [1].

    Returns:
        keys: [B, S padded] int32 sort keys of the visible scores; the rest is not written.
        best: [B, whole] int32, the largest key of each group of keys.
        count: [B] int32 zeros: a counter for the next launch.
    """
    B, S = idx_q.shape[0], idx_k.shape[2]
    tile = tuning.score_tile
    # Rows of scratch arrays hold whole pieces of every size, so that none of their loads needs a mask.
    width = max(_power(S), tile, tuning.slice)
    blocks = pl.cdiv(S, tile)
    if width > tuning.whole:
        piece = max(tile, tuning.slice, tuning.held, tuning.whole)
        width = pl.cdiv(S, piece) * piece
        blocks = max(tuning.whole // tile, _power(tuning.score_blocks // B))
    if idx_k.dtype == jnp.float8_e4m3fn:
        idx_q, idx_k = words(idx_q), words(idx_k)
    scales = () if key_scale is None else (key_scale,)
    return pl.pallas_call(
        partial(_score_keys, topk=topk, blocks=blocks, tuning=tuning),
        out_shape=(
            jax.ShapeDtypeStruct((B, width), jnp.int32),
            jax.ShapeDtypeStruct((B, tuning.whole), jnp.int32),
            jax.ShapeDtypeStruct((B,), jnp.int32),
        ),
        grid=(blocks, B),
        compiler_params=plt.CompilerParams(num_warps=tuning.score_warps, num_stages=1),
        interpret=interpret,
        name="index_scores",
    )(layer, start, idx_q, weights, idx_k, *scales)


def list_candidates(
    start: jax.Array,
    keys: jax.Array,
    best: jax.Array,
    count: jax.Array,
    S: int,
    topk: int,
    tuning: Tuning,
    interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Second launch, for what `score_keys` returned for S keys a row.

    Returns:
        Keys and ids of candidates [B, S padded] int32, in any order, and how many they are [B] int32: all visible keys
        from a threshold on that topk of them reach at least. Nothing for contexts up to `whole`.
    """
    B, width = keys.shape
    listed = jax.ShapeDtypeStruct((B, width), jnp.int32)
    return pl.pallas_call(
        partial(_list_candidates, S=S, topk=topk, tuning=tuning),
        out_shape=(listed, listed, jax.ShapeDtypeStruct((B,), jnp.int32)),
        grid=(min(width // tuning.slice, max(1, tuning.blocks // B)), B),
        input_output_aliases={3: 2},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="index_candidates",
    )(start, keys, best, count)


def write_ids(
    start: jax.Array,
    keys: jax.Array,
    candidates: tuple[jax.Array, ...],
    S: int,
    topk: int,
    tuning: Tuning,
    interpret: bool,
) -> jax.Array:
    """Last launch: [B, min(topk, S)] int32 from what the others returned; no candidates if S is at most `whole`."""
    B, width = keys.shape
    return pl.pallas_call(
        partial(_write_ids, S=S, topk=topk, tuning=tuning),
        out_shape=jax.ShapeDtypeStruct((B, min(topk, S)), jnp.int32),
        grid=(min(width // tuning.slice, max(1, tuning.blocks // B)), B),
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="index_ids",
    )(start, keys, *candidates)


def _power(n: int) -> int:
    return 1 << max(n - 1, 0).bit_length()


def _visible(start_ref: Any, b: jax.Array, S: int) -> jax.Array:
    """How many keys row b sees. Its query may lie beyond the S keys: a device of several holds a part of them."""
    return jnp.minimum(start_ref[b] + 1, S)


def _score_keys(
    layer_ref: Any,
    start_ref: Any,
    q_ref: Any,
    w_ref: Any,
    k_ref: Any,
    *refs: Any,
    topk: int,
    blocks: int,
    tuning: Tuning,
) -> None:
    *scale_ref, keys_ref, best_ref, count_ref = refs
    tile, whole = tuning.score_tile, tuning.whole
    block, b = pl.program_id(0), pl.program_id(1)
    J, I = q_ref.shape[2:]  # noqa: E741
    layer = layer_ref[0]
    live = _visible(start_ref, b, k_ref.shape[2])
    tiles = pl.cdiv(live, tile)
    precision = lax.Precision.HIGHEST if k_ref.dtype == jnp.float32 else None
    rows = max(16, _power(J))
    row, lane, column = jnp.arange(rows), jnp.arange(tile), jnp.arange(I)[None]

    @pl.when(block == 0)
    def _() -> None:
        count_ref[b] = 0

    @pl.when(live > topk)
    def _() -> None:
        mask = jnp.broadcast_to((row < J)[:, None], (rows, I))
        q = factors(plt.load(q_ref.at[b, 0, row[:, None], column], mask=mask, other=0))
        weights = plt.load(w_ref.at[b, 0, row], mask=row < J, other=0.0)
        if k_ref.dtype == jnp.uint32:
            weights *= 2.0**16

        def load(i: jax.Array) -> tuple[jax.Array, ...]:
            index = (block + i * blocks) * tile + lane
            mask = index < live
            wide = jnp.broadcast_to(mask[:, None], (tile, I))
            k = plt.load(k_ref.at[layer, b, index[:, None], column], mask=wide, other=0)
            return k, *(plt.load(ref.at[layer, b, index], mask=mask, other=0.0) for ref in scale_ref)

        def step(i: jax.Array, carry: tuple) -> tuple:
            (k, *scale), best = carry
            following = load(i + 1)
            products = jnp.zeros((rows, tile), jnp.float32)
            for a, c in zip(q, factors(k), strict=True):
                dims = (((1,), (1,)), ((), ()))
                products += lax.dot_general(a, c, dims, precision=precision, preferred_element_type=jnp.float32)
            score = jnp.sum(weights[:, None] * jnp.maximum(products, 0.0), axis=0)
            for s in scale:
                score *= s
            first = (block + i * blocks) * tile
            key = jnp.where(first + lane < live, sort_key(score), LOWEST)
            keys_ref[b, pl.ds(first, tile)] = key
            return following, jnp.maximum(best, key)

        own = (tiles - block + blocks - 1) // blocks
        _, best = lax.fori_loop(0, own, step, (load(jnp.int32(0)), jnp.full((tile,), LOWEST, jnp.int32)))

        # Every program gives `groups` maxima, over keys that lie far apart: as many as fit for the programs in use,
        # so that there are about `whole` of them for any context. Only one of these conditions holds.
        groups = tile if keys_ref.shape[1] > whole else 0
        while groups and groups >= whole // blocks:
            least = whole // (2 * groups) if groups < tile else 0
            most = whole // groups if groups > whole // blocks else HIGHEST

            @pl.when((least < tiles) & (tiles <= most) & (block < whole // groups))
            def _(groups: int = groups) -> None:
                best_ref[b, pl.ds(block * groups, groups)] = jnp.max(best.reshape(tile // groups, groups), axis=0)

            groups //= 2


def _load(keys_ref: Any, b: jax.Array, first: Any, size: int, n: jax.Array) -> jax.Array:
    """`size` keys from the `first` on, hidden from the n-th on. `first` is a multiple of `size`; beyond the array's
    end it is moved back."""
    at = 0 if isinstance(first, int) else pl.multiple_of(jnp.minimum(first, keys_ref.shape[1] - size), size)
    return jnp.where(first + jnp.arange(size) < n, keys_ref[b, pl.ds(at, size)], LOWEST)


def _list_candidates(
    start_ref: Any,
    keys_ref: Any,
    best_ref: Any,
    _: Any,
    key_ref: Any,
    id_ref: Any,
    count_ref: Any,
    *,
    S: int,
    topk: int,
    tuning: Tuning,
) -> None:
    size, whole = tuning.slice, tuning.whole
    block, b = pl.program_id(0), pl.program_id(1)
    blocks = pl.num_programs(0)
    live = _visible(start_ref, b, S)
    own = (pl.cdiv(live, size) - block + blocks - 1) // blocks

    def load(i: jax.Array) -> jax.Array:
        return _load(keys_ref, b, (block + i * blocks) * size, size, live)

    # Before anything is known about them: a memory latency less.
    best, first = best_ref[b, :], load(jnp.int32(0))

    @pl.when((live > whole) & (own > 0))
    def _() -> None:
        # Every program searches for itself: that costs no more time than to wait for one that does.
        floor, reached, _ = search(partial(count_two, best), *bounds(best), jnp.int32(whole + 1), topk, tuning.slack)
        too_few = reached > whole

        def step(i: jax.Array, key: jax.Array) -> jax.Array:
            following = load(i + 1)
            mask = (key > LOWEST) & ((key >= floor) | too_few)
            rank = lax.cumsum(mask.astype(jnp.int32))
            slot = plt.atomic_add(count_ref, (b,), jnp.max(rank)) + rank - 1
            slot = jnp.where(mask, slot, key_ref.shape[1])
            plt.store(key_ref.at[b, slot], key, mask=mask)
            plt.store(id_ref.at[b, slot], (block + i * blocks) * size + jnp.arange(size), mask=mask)
            return following

        lax.fori_loop(0, own, step, first)


def _write_ids(start_ref: Any, keys_ref: Any, *refs: Any, S: int, topk: int, tuning: Tuning) -> None:
    *candidate_refs, ids_ref = refs
    size, whole, held = tuning.slice, tuning.whole, tuning.held
    block, b = pl.program_id(0), pl.program_id(1)
    width = ids_ref.shape[1]
    live = _visible(start_ref, b, S)
    spans = pl.cdiv(pl.cdiv(live, size), pl.num_programs(0))
    origin = block * spans * size

    @pl.when((live <= topk) & (block == 0))
    def _() -> None:
        slot = jnp.arange(_power(width))
        plt.store(ids_ref.at[b, slot], jnp.where(slot < live, slot, -1), mask=slot < width)

    def load(i: jax.Array) -> jax.Array:
        return _load(keys_ref, b, origin + i * size, size, live)

    @pl.when((live > topk) & (origin < live))
    def _() -> None:
        first = load(jnp.int32(0))

        def at_once(
            key: jax.Array, index: jax.Array, n: jax.Array, guess: Callable | None = None
        ) -> tuple[jax.Array, jax.Array, jax.Array]:
            return boundary(lambda measure, *_: measure(key, index), n, topk, origin, S, guess)

        def among_all() -> tuple[jax.Array, jax.Array, jax.Array]:
            extent = min(whole, keys_ref.shape[1])
            key = _load(keys_ref, b, 0, extent, live)
            return at_once(key, jnp.arange(extent), live, lambda: normal_quantile(key, live, topk))

        def among_candidates() -> tuple[jax.Array, jax.Array, jax.Array]:
            key_ref, id_ref, count_ref = candidate_refs
            n = count_ref[b]
            # Loaded before n is known, like the rest.
            key, index = _load(key_ref, b, 0, held, n), id_ref[b, :held]

            def fold(measure: Callable, combine: Callable, initial: tuple) -> tuple:
                def step(i: jax.Array, total: tuple) -> tuple:
                    at = pl.multiple_of(i * held, held)
                    return combine(total, measure(_load(key_ref, b, at, held, n), id_ref[b, pl.ds(at, held)]))

                return lax.fori_loop(0, pl.cdiv(n, held), step, initial)

            return lax.cond(
                n <= held,
                lambda: at_once(key, index, n),
                lambda: boundary(fold, n, topk, origin, S),
            )

        if candidate_refs:
            threshold, cutoff, base = lax.cond(live <= whole, among_all, among_candidates)
        else:
            threshold, cutoff, base = among_all()

        def step(i: jax.Array, carry: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            key, base = carry
            following = load(i + 1)
            index = origin + i * size + jnp.arange(size)
            mask = (key > threshold) | ((key == threshold) & (index < cutoff))
            rank = lax.cumsum(mask.astype(jnp.int32))
            plt.store(ids_ref.at[b, jnp.where(mask, base + rank - 1, width)], index, mask=mask)
            return following, base + jnp.max(rank)

        lax.fori_loop(0, spans, step, (first, base))
