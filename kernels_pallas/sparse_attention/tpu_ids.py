"""attend_ids on TPUs: attention of one query per sequence over listed keys.

Schedule. A program takes the list of a sequence, or a part of it (`cores`). Ids become row numbers in vector registers
and move to scalar memory; from there one copy of 2 KB is started for each token, keys and values of all heads, 256
tokens ahead of what is computed on. A tile is multiplied as it lies: all query heads with all 2 G rows of its tokens,
of which a query head keeps those of its own key head; the probabilities, shifted by G rows, meet the values. So no row
is moved; the scalar unit, which starts the copies, is slower than the products that this wastes.

Cost. 2,048 ids x 2 KB = 4 MB a sequence: 5.1 us (v5e), 2.6 (v6e), 1.5 (v5p), 1.1 (tpu7x). Cycles that the compiler
schedules: 4.6 a token for its copy and 2.5 for its products, in all 14,900 (v5e), 13,200 (v6e, tpu7x), 13,600 (v5p): 10
us at 1.5 GHz. The two cores of a v5p share out sequences; of one alone they take half a list each, and merge.

Tried and lost: bounds checks, ids in two dimensions and rows of a two-dimensional cache (25.6 cycles a copy instead of
6.6); ids clamped by the scalar unit (6.6 instead of 4.9); 16 copies a step (4.9 instead of 4.6); copies unrolled among
the products (15% less in all, for 4,300 instructions and two buffers by name); merging splits by XLA (8,000 cycles).
"""

from dataclasses import dataclass
from functools import partial
from math import log2
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import tuned
from kernels_pallas.common import MASKED
from kernels_pallas.sparse_attention import tpu_shared
from kernels_pallas.sparse_attention.tpu_shared import LANES, SUBLANES

MOST_IDS = 1 << 16
"""Of a sequence: they lie in scalar memory, of which there is 1 MiB."""


@dataclass(frozen=True)
class Tuning:
    """Sizes that change the order of float32 sums and the speed.

    Attributes:
        tile: tokens that are fetched and computed on at once; a multiple of 128.
        unroll: copies that are started in one step of a loop; divides the tile.
        cores: of a device. Where there are more than sequences, they share a list's parts and a merge follows.
    """

    tile: int = 256
    unroll: int = 32
    cores: int = 1


def supports(q: jax.Array, kv: jax.Array, ids: jax.Array) -> bool:
    """Whether `attend_ids` takes these shapes and dtypes."""
    return tpu_shared.supports(q, kv) and ids.shape[1] <= MOST_IDS


def attend_ids(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    ids: jax.Array,
    *,
    tuning: Tuning | None = None,
    interpret: Any = False,
) -> jax.Array:
    """See `kernels_pallas.sparse_attention.attend_ids`."""
    return _attend(q, kv, layer, ids, q.dtype, tuning, interpret)[0]


def attend_ids_lse(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array,
    ids: jax.Array,
    *,
    tuning: Tuning | None = None,
    interpret: Any = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.sparse_attention.attend_ids_lse`."""
    return _attend(q, kv, layer, ids, jnp.float32, tuning, interpret)


def _attend(
    q: jax.Array, kv: jax.Array, layer: jax.Array, ids: jax.Array, dtype: Any, tuning: Tuning | None, interpret: Any
) -> tuple[jax.Array, jax.Array]:
    """The result in `dtype`, and its log-sum-exp."""
    tuning = tuning or tuned.sizes("attend_ids", Tuning())
    B, H, K = q.shape
    S, G = kv.shape[2], kv.shape[4]
    T, splits = min(tuning.tile, pl.cdiv(ids.shape[1], LANES) * LANES), pl.cdiv(tuning.cores, B)
    width = pl.cdiv(ids.shape[1], splits * T) * T
    ids = jnp.pad(ids, ((0, 0), (0, splits * width - ids.shape[1])), constant_values=-1)
    part = pl.BlockSpec((None, None, H, LANES), lambda b, s, *_: (b, s, 0, 0))
    out, lse = pl.pallas_call(
        partial(_attend_split, S=S, unroll=tuning.unroll),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, splits),
            in_specs=[
                pl.BlockSpec((None, H, K), lambda b, s, *_: (b, 0, 0)),
                pl.BlockSpec((None, None, 1, width), lambda b, s, *_: (b, s, 0, 0)),
                pl.BlockSpec(memory_space=pl.ANY),
            ],
            out_specs=(part, part),
            scratch_shapes=[
                pltpu.VMEM((1, width), jnp.int32),
                pltpu.SMEM((1, width), jnp.int32),
                pltpu.SemaphoreType.DMA,
                pltpu.VMEM((2, T, 2 * G, K), kv.dtype),
                pltpu.SemaphoreType.DMA((2,)),
            ],
        ),
        out_shape=(
            jax.ShapeDtypeStruct((B, splits, H, K), dtype if splits == 1 else jnp.float32),
            jax.ShapeDtypeStruct((B, splits, H, LANES), jnp.float32),
        ),
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel", "parallel"), disable_bounds_checks=True),
        interpret=interpret,
        name="attend_ids",
    )(layer.reshape(1), q, ids.reshape(B, splits, 1, width), kv.reshape(-1, 2 * G, K))
    if splits == 1:
        return out[:, 0], lse[:, 0, :, 0]
    parts = pl.BlockSpec((None, splits, H, LANES), lambda b: (b, 0, 0, 0))
    whole = pl.BlockSpec((None, H, LANES), lambda b: (b, 0, 0))
    out, lse = pl.pallas_call(
        _merge,
        grid=(B,),
        in_specs=[parts, parts],
        out_specs=(whole, whole),
        out_shape=(jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, H, LANES), jnp.float32)),
        interpret=interpret,
        name="merge_splits",
    )(out, lse)
    return out, lse[:, :, 0]


def _attend_split(
    layer_ref: Any,
    q_ref: Any,
    ids_ref: Any,
    kv_ref: Any,
    o_ref: Any,
    lse_ref: Any,
    staged: Any,
    tokens: Any,
    staged_out: Any,
    tiles: Any,
    arrived: Any,
    *,
    S: int,
    unroll: int,
) -> None:
    """lse_ref gets the log-sum-exp of the scaled scores in all lanes, MASKED where there is no key."""
    (H, K), width = q_ref.shape, ids_ref.shape[1]
    _, T, rows, _ = tiles.shape
    scale = K**-0.5 * log2(jnp.e)
    ids = ids_ref[...]
    staged[...] = jnp.maximum(ids, 0) + (layer_ref[0] * pl.num_programs(0) + pl.program_id(0)) * S
    to_scalars = pltpu.make_async_copy(staged, tokens, staged_out)
    to_scalars.start()
    used = jnp.max(jnp.where(ids >= 0, lax.broadcasted_iota(jnp.int32, (1, width), 1) + 1, 0))

    def fetch(t: jax.Array) -> None:
        def start(i: jax.Array, _: None) -> None:
            first, target = t * T + i * unroll, tiles.at[t & 1, pl.ds(i * unroll, unroll)]
            for u in range(unroll):
                pltpu.make_async_copy(kv_ref.at[tokens[0, first + u]], target.at[u], arrived.at[t & 1]).start()

        lax.fori_loop(0, T // unroll, start, None)

    def ids_of_rows(t: jax.Array) -> jax.Array:
        """[1, T * rows] int32: the id of the token that each row of a tile is of."""
        lane, tokens_of = lax.broadcasted_iota(jnp.int32, (SUBLANES, LANES), 1) >> (rows.bit_length() - 1), []
        for at in range(0, T, LANES):
            ids = ids_ref[:, pl.ds(pl.multiple_of(t * T + at, LANES), LANES)]
            ids = jnp.broadcast_to(ids, (SUBLANES, LANES))
            for first in range(0, LANES, LANES // rows):
                tokens_of.append(jnp.take_along_axis(ids, first + lane, axis=1, mode="promise_in_bounds")[:1])
        return jnp.concatenate(tokens_of, axis=1)

    def add_tile(t: jax.Array, state: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, ...]:
        maximum, denominator, numerator = state
        pl.when((t + 1) * T < used)(lambda: fetch(t + 1))
        pltpu.make_async_copy(tiles.at[t & 1], tiles.at[t & 1], arrived.at[t & 1]).wait()
        kv = tiles[t & 1].reshape(T * rows, K)
        scores = jnp.where(own & (ids_of_rows(t) >= 0), tpu_shared.dot(q_ref[...], kv, 1), MASKED)
        new = jnp.maximum(maximum, jnp.max(scores, axis=1, keepdims=True))
        p = jnp.exp2((scores - new) * scale)
        decay = jnp.exp2((maximum - new) * scale)
        # A token's values lie behind its keys.
        weighted = tpu_shared.dot(pltpu.roll(p, rows // 2, 1).astype(kv.dtype), kv, 0)
        return new, denominator * decay + jnp.sum(p, axis=1, keepdims=True), numerator * decay + weighted

    head = lax.broadcasted_iota(jnp.int32, (H, T * rows), 0)
    row = lax.broadcasted_iota(jnp.int32, (H, T * rows), 1) & (rows - 1)
    group = 2 * H // rows
    own = (row * group <= head) & (head < (row + 1) * group)
    to_scalars.wait()
    pl.when(used > 0)(lambda: fetch(jnp.int32(0)))
    # Above every masked score: where there is no key yet, exp2(MASKED - maximum) is 0, not 1.
    none = jnp.full((H, 1), MASKED / 2, jnp.float32), jnp.zeros((H, 1), jnp.float32), jnp.zeros((H, K), jnp.float32)
    maximum, total, numerator = lax.fori_loop(0, lax.div(used + T - 1, T), add_tile, none)
    o_ref[...] = (numerator / jnp.where(total == 0, 1.0, total)).astype(o_ref.dtype)
    lse_ref[...] = jnp.broadcast_to(jnp.where(total == 0, MASKED, maximum * K**-0.5 + jnp.log(total)), lse_ref.shape)


def _merge(parts_ref: Any, lses_ref: Any, o_ref: Any, lse_ref: Any) -> None:
    largest = jnp.max(lses_ref[...], axis=0)
    weights = jnp.exp(lses_ref[...] - largest)
    total = jnp.sum(weights, axis=0)
    o_ref[...] = (jnp.sum(parts_ref[...] * weights, axis=0) / total).astype(o_ref.dtype)
    # MASKED stays what it is: it is too large for a logarithm to change.
    lse_ref[...] = largest + jnp.log(total)
