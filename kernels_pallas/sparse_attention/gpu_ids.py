"""attend_ids on NVIDIA GPUs (Ampere and newer): attention of one query per sequence over listed keys.

Schedule: a program takes a tile of the ids for one key/value head and all its query heads: gathers the keys and values
into registers, both in flight at once, multiplies on the tensor cores (8 query heads fill half of their 16 rows), and
writes its maximum, denominator and numerator. A second launch merges each head's tiles by log-sum-exp.

Cost: 2,048 ids x 2 KB = 4 MB a sequence, 1 microsecond at 4.3 TB/s; 1 MB of partial results is written and read. One
H200, JAX 0.11.2, batch 1, random ids: 5.7 to 5.9 microseconds a call in a chain over 8 layers, 17% of the floor, the
chain's loop included.

Tried at batch 1: tiles of 16, 64 and 128 ids (+0.4, +0.6, +0.8); one launch whose last program of a head merges, behind
a launch that clears its counter (+2.3). Larger batches were not timed.
Triton rather than Mosaic GPU: rows of 256 bytes are gathered by ordinary loads, and M = 16 is no wgmma.
"""

from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt

from kernels_pallas.common import MASKED


@dataclass(frozen=True)
class Tuning:
    """Sizes, powers of two; they change the order of float32 sums and the speed. tile: ids a program takes."""

    tile: int = 32
    warps: int = 4
    merge_warps: int = 4


def supports(q: jax.Array, kv: jax.Array) -> bool:
    """Whether `attend_ids` takes these shapes and dtypes."""
    H, K = q.shape[1:]
    return (
        q.dtype == kv.dtype
        and q.dtype in (jnp.bfloat16, jnp.float32)
        and 16 <= K <= 256
        and K & (K - 1) == 0
        and H // kv.shape[4] <= 64
    )


def attend_ids(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array | int,
    ids: jax.Array,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> jax.Array:
    """See `kernels_pallas.sparse_attention.attend_ids`."""
    return _attend_lists(q, kv, layer, ids, q.dtype, tuning, interpret)[0]


def attend_ids_lse(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array | int,
    ids: jax.Array,
    tuning: Tuning = Tuning(),
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `kernels_pallas.sparse_attention.attend_ids_lse`."""
    return _attend_lists(q, kv, layer, ids, jnp.float32, tuning, interpret)


def _attend_lists(
    q: jax.Array,
    kv: jax.Array,
    layer: jax.Array | int,
    ids: jax.Array,
    dtype: Any,
    tuning: Tuning,
    interpret: bool,
) -> tuple[jax.Array, jax.Array]:
    """The result in `dtype`, and its log-sum-exp."""
    B, H, K = q.shape
    G = kv.shape[4]
    splits = pl.cdiv(ids.shape[1], tuning.tile)
    part = jax.ShapeDtypeStruct((B, H, splits), jnp.float32)
    parts = pl.pallas_call(
        partial(_attend, tile=tuning.tile),
        out_shape=(jax.ShapeDtypeStruct((B, H, splits, K), jnp.float32), part, part),
        grid=(G, splits, B),
        compiler_params=plt.CompilerParams(num_warps=tuning.warps, num_stages=1),
        interpret=interpret,
        name="attend_ids",
    )(jnp.asarray(layer, jnp.int32).reshape(1), q, kv, ids)
    return pl.pallas_call(
        _merge,
        out_shape=(jax.ShapeDtypeStruct(q.shape, dtype), jax.ShapeDtypeStruct((B, H), jnp.float32)),
        grid=(H, B),
        compiler_params=plt.CompilerParams(num_warps=tuning.merge_warps, num_stages=1),
        interpret=interpret,
        name="merge_splits",
    )(*parts)


def _attend(
    layer_ref: Any, q_ref: Any, kv_ref: Any, ids_ref: Any, sum_ref: Any, max_ref: Any, den_ref: Any, *, tile: int
) -> None:
    """Softmax-weighted sum over one tile of ids, of the query heads of one key/value head."""
    g, split, b = pl.program_id(0), pl.program_id(1), pl.program_id(2)
    H, K = q_ref.shape[1:]
    heads = H // kv_ref.shape[4]
    rows = max(16, 1 << (heads - 1).bit_length())
    row = jnp.arange(rows)
    head = jnp.where(row < heads, g * heads + row, H)
    column = jnp.arange(K)
    precision = lax.Precision.HIGHEST if q_ref.dtype == jnp.float32 else None

    slot = split * tile + jnp.arange(tile)
    ids = plt.load(ids_ref.at[b, slot], mask=slot < ids_ref.shape[1], other=-1)
    used = jnp.broadcast_to((ids >= 0)[:, None], (tile, K))
    layer = layer_ref[0]
    # One load each: both are in flight before the first product waits.
    k = plt.load(kv_ref.at[layer, b, ids[:, None], 0, g, column[None]], mask=used, other=0.0)
    v = plt.load(kv_ref.at[layer, b, ids[:, None], 1, g, column[None]], mask=used, other=0.0)
    mask = jnp.broadcast_to((row < heads)[:, None], (rows, K))
    q = plt.load(q_ref.at[b, head[:, None], column[None]], mask=mask, other=0.0)

    dims = (((1,), (1,)), ((), ()))
    scores = lax.dot_general(q, k, dims, precision=precision, preferred_element_type=jnp.float32) * K**-0.5
    scores = jnp.where((ids >= 0)[None], scores, MASKED)
    maximum = jnp.max(scores, axis=1)
    p = jnp.where((ids >= 0)[None], jnp.exp(scores - maximum[:, None]), 0.0)
    dims = (((1,), (0,)), ((), ()))
    total = lax.dot_general(p.astype(v.dtype), v, dims, precision=precision, preferred_element_type=jnp.float32)
    plt.store(sum_ref.at[b, head[:, None], split, column[None]], total, mask=mask)
    plt.store(max_ref.at[b, head, split], maximum, mask=row < heads)
    plt.store(den_ref.at[b, head, split], jnp.sum(p, axis=1), mask=row < heads)


def _merge(sum_ref: Any, max_ref: Any, den_ref: Any, o_ref: Any, lse_ref: Any) -> None:
    """Log-sum-exp merge of one head's splits."""
    head, b = pl.program_id(0), pl.program_id(1)
    splits, K = sum_ref.shape[2:]
    padded = 1 << (splits - 1).bit_length()
    row = jnp.arange(padded)
    mask = jnp.broadcast_to((row < splits)[:, None], (padded, K))
    total = plt.load(sum_ref.at[b, head, row[:, None], jnp.arange(K)[None]], mask=mask, other=0.0)
    maximum = plt.load(max_ref.at[b, head, row], mask=row < splits, other=MASKED)
    denominator = plt.load(den_ref.at[b, head, row], mask=row < splits, other=0.0)
    largest = jnp.max(maximum)
    weight = jnp.exp(maximum - largest)
    denominator = jnp.sum(weight * denominator)
    numerator = jnp.sum(weight[:, None] * total, axis=0)
    # Where there is no key: the numerator is 0, and `largest` is MASKED, which no logarithm changes.
    denominator = jnp.where(denominator == 0, 1.0, denominator)
    o_ref[b, head, :] = (numerator / denominator).astype(o_ref.dtype)
    lse_ref[b, head] = largest + jnp.log(denominator)
