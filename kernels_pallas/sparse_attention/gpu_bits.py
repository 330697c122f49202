"""attend_bits on NVIDIA GPUs: a chunk of queries attends over gathered keys.

Schedule. Neighbouring queries select many keys in common. `gpu_lists` lists the union of every 16 queries; where it is
worth it (`wide`) one block computes them all over that union (`gpu_shared`, Hopper). Elsewhere, and for shapes that
`gpu_shared` does not take, smaller blocks of 16 rows (2 queries x 8 heads) do, here: a program gathers the keys and
values of one KV head in tiles of 16, `stages` of them in flight, masks what a query did not select, and keeps a
streaming softmax. Both kernels run over the whole chunk and skip each other's blocks; nothing waits for the host.

Triton for the gather: its asynchronous copies of 16 bytes a lane move 8.7 TB/s out of the second-level cache (a bulk
copy for each row in Mosaic GPU: 5.7 TB/s).
"""

from dataclasses import dataclass, field
from functools import partial
from math import log2
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import MASKED
from kernels_pallas.sparse_attention import gpu_lists, gpu_shared
from kernels_pallas.sparse_attention.gpu_lists import PAD, SPAN, Lists

ROWS = 16
"""The least rows of a product on tensor cores; a block has as many queries as give them."""


@dataclass(frozen=True)
class Tuning:
    """Sizes that change the speed only."""

    keys: int = 16
    stages: int = 3
    warps: int = 1
    wide: float = 9.0
    """A union of 16 queries is shared if it is at most this many times what one of them selects. For 8,192 queries at
    128K: 8.2 times 3.2 ms shared, 3.8 not; 14 times 7.3, 4.3."""
    lists: gpu_lists.Tuning = field(default_factory=partial(gpu_lists.Tuning, steps=8, parts=1))
    shared_lists: gpu_lists.Tuning = field(default_factory=gpu_lists.Tuning)
    shared: gpu_shared.Tuning = field(default_factory=gpu_shared.Tuning)


def supports(q: jax.Array, kv: jax.Array) -> bool:
    """Whether `attend_bits` takes these shapes and dtypes."""
    H, K = q.shape[2:]
    group = H // kv.shape[4]
    return (
        q.dtype == kv.dtype
        and q.dtype in (jnp.bfloat16, jnp.float32)
        and K in (16, 32, 64, 128, 256)
        and group in (1, 2, 4, 8, 16, 32)
        and kv.size // K < 2**31
    )


def attend_bits(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    *,
    most: int | None = None,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.sparse_attention.attend_bits`."""
    lists = partial(_lists, bits, start, capacity=kv.shape[2], most=most, interpret=bool(interpret))
    queries = _block_queries(q, kv)
    if not gpu_shared.supports(q, kv):
        return _attend(q, kv, layer, lists(queries, None, tuning.lists)[0], None, None, tuning, interpret)[0]
    room = _room(kv.shape[2], None if most is None else SPAN // 2 * most)
    unions, own = gpu_lists.list_halves(bits, start, half=room, tuning=tuning.shared_lists, interpret=bool(interpret))
    wide = jnp.sum(unions.counts, axis=-1).astype(jnp.float32) > tuning.wide * own.astype(jnp.float32)
    out = gpu_shared.attend(q, kv, layer, unions, wide, tuning=tuning.shared, interpret=interpret)
    return _attend(q, kv, layer, lists(queries, wide, tuning.lists)[0], wide, out, tuning, interpret)[0]


def attend_bits_lse(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    bits: jax.Array,
    start: jax.Array,
    *,
    most: int | None = None,
    tuning: Tuning = Tuning(),
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.sparse_attention.attend_bits_lse`. Small blocks only: `gpu_shared` has no room for results of
    32 bits."""
    made, _ = _lists(
        bits,
        start,
        _block_queries(q, kv),
        None,
        tuning.lists,
        capacity=kv.shape[2],
        most=most,
        interpret=bool(interpret),
    )
    out, lse = _attend(q, kv, layer, made, None, None, tuning, interpret, partly=True)
    return out, lse.reshape(q.shape[:3])


def _block_queries(q: jax.Array, kv: jax.Array) -> int:
    return max(1, ROWS * kv.shape[4] // q.shape[2])


def _lists(
    bits: jax.Array,
    start: jax.Array,
    queries: int,
    wanted: jax.Array | None,
    sizes: gpu_lists.Tuning,
    *,
    capacity: int,
    most: int | None,
    interpret: bool,
) -> tuple[Lists, jax.Array]:
    room = _room(capacity, None if most is None else queries * most)
    return gpu_lists.list_keys(bits, start, wanted, queries=queries, capacity=room, tuning=sizes, interpret=interpret)


def _room(capacity: int, most: int | None) -> int:
    return pl.cdiv(capacity if most is None else min(capacity, most), PAD) * PAD


def _attend(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    lists: Lists,
    wanted: jax.Array | None,
    out: jax.Array | None,
    tuning: Tuning,
    interpret: Any,
    partly: bool = False,
) -> list[jax.Array]:
    """Attends over lists. With `wanted` [B, ceil(C / SPAN)], replaces those queries in `out` only. The result in the
    dtype of q; or `partly`: in float32, and log-sum-exps [B * C * H]."""
    B, C, H, K = q.shape
    S, G = kv.shape[2], kv.shape[4]
    n = lists.counts.shape[1]
    old = () if wanted is None or out is None else (wanted.astype(jnp.int32), out.reshape(-1, K))
    shapes = [jax.ShapeDtypeStruct((B * C * H, K), jnp.float32 if partly else q.dtype)]
    if partly:
        shapes.append(jax.ShapeDtypeStruct((B * C * H,), jnp.float32))
    result, *lse = pl.pallas_call(
        partial(_attend_block, B=B, C=C, H=H, G=G, S=S, queries=_block_queries(q, kv), tile=tuning.keys, partly=partly),
        grid=(n, G, B),  # One KV head after the other: at 128K its keys and values just about fit the cache.
        out_shape=shapes,
        input_output_aliases={7: 0} if old else {},
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=tuning.stages),
        interpret=bool(interpret),
        name="attend_lists",
    )(layer.reshape(1), q.reshape(-1, K), kv.reshape(-1, K), *lists, *old)
    return [result.reshape(q.shape), *lse]


def _attend_block(
    layer_ref: Any,
    q_ref: Any,
    kv_ref: Any,
    ids_ref: Any,
    members_ref: Any,
    counts_ref: Any,
    *refs: Any,
    B: int,
    C: int,
    H: int,
    G: int,
    S: int,
    queries: int,
    tile: int,
    partly: bool,
) -> None:
    """refs: which blocks are wanted and the old output, or nothing; the output, and `partly` the log-sum-exps. q_ref
    and the output are [B * C * H, K], kv_ref [L * B * S * 2 * G, K]: rows, so that products of sizes that exceed 32
    bits are left to the address of a row."""
    outputs = refs[-1 - partly :]
    o_ref, K, group = outputs[0], q_ref.shape[1], H // G
    block, g, b = (pl.program_id(i) for i in range(3))
    M = queries * group
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None
    dot = partial(lax.dot_general, precision=precision, preferred_element_type=jnp.float32)

    def rows(ref: Any, index: jax.Array) -> Any:
        shape = (index.shape[0], K)
        return ref.at[jnp.broadcast_to(index[:, None], shape), lax.broadcasted_iota(jnp.int32, shape, 1)]

    query = lax.iota(jnp.int32, M) // group
    c = block * queries + query
    head = g * group + lax.iota(jnp.int32, M) % group
    q = plt.load(rows(q_ref, (b * C + jnp.minimum(c, C - 1)) * H + head))
    test = (1 << query)[:, None]
    lanes = lax.iota(jnp.int32, tile)
    first_row = (layer_ref[0] * B + b) * S
    scale = K**-0.5 * log2(jnp.e)

    def add_tile(i: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        maximum, denominator, numerator = state
        at = i * tile + lanes
        key = (first_row + plt.load(ids_ref.at[b, block, at])) * (2 * G) + g
        scores = dot(q, plt.load(rows(kv_ref, key)), (((1,), (1,)), ((), ())))
        scores = jnp.where((plt.load(members_ref.at[b, block, at])[None] & test) != 0, scores, MASKED)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1))
        # In a row without any key so far, exp2(MASKED - MASKED) would be 1.
        shift = jnp.where(new > MASKED, new, 0.0) * scale
        p = jnp.exp2(scores * scale - shift[:, None])
        decay = jnp.exp2(maximum * scale - shift)
        weighted = dot(p.astype(kv_ref.dtype), plt.load(rows(kv_ref, key + G)), (((1,), (0,)), ((), ())))
        return new, denominator * decay + jnp.sum(p, axis=1), numerator * decay[:, None] + weighted

    def attend() -> None:
        none = (jnp.full((M,), MASKED, jnp.float32), jnp.zeros((M,), jnp.float32), jnp.zeros((M, K), jnp.float32))
        maximum, denominator, numerator = lax.fori_loop(0, (counts_ref[b, block] + tile - 1) // tile, add_tile, none)
        some = jnp.where(denominator == 0, 1.0, denominator)
        out = numerator / some[:, None]
        # Rows behind the chunk point outside, so that interpretation, which writes every row, drops them too.
        row = jnp.where(c < C, (b * C + c) * H + head, B * C * H)
        mask = jnp.broadcast_to((c < C)[:, None], (M, K))
        plt.store(rows(o_ref, row), out.astype(o_ref.dtype), mask=mask)
        if partly:
            lse = jnp.where(denominator == 0, MASKED, maximum * K**-0.5 + jnp.log(some))
            plt.store(outputs[1].at[row], lse, mask=c < C)

    if len(refs) == len(outputs):
        attend()
    else:
        pl.when(refs[0][b, block * queries // SPAN] != 0)(attend)
