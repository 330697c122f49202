"""What both TPU kernels do: the cache as rows, rows in and out of the order of heads, products in float32.

A token's keys and values are 2 G rows of K numbers. XLA tiles the cache's last two axes, [G, K], as (4, 128) with pairs
of 16-bit rows interleaved. Rows of all tokens, tiled as (8, 128), are the same bytes, so `rows` is a bitcast in the
compiled program and a token is one piece of memory. [L, B, S, 2 G K] is not, nor are rows of more than 128 numbers:
those reshapes copy the whole cache.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES, SUBLANES = 128, 8


def supports(q: jax.Array, kv: jax.Array) -> bool:
    """Whether the cache [L, B, S, 2, G, K] can be read as rows in place, and the kernels' scratch fits."""
    G, K = kv.shape[4:]
    return (
        q.dtype == kv.dtype
        and q.dtype in (jnp.bfloat16, jnp.float32)
        and G in ((2, 4, 8) if q.dtype == jnp.bfloat16 else (1, 2, 4, 8))
        and K == LANES
        and q.shape[-2] <= 64
        and 2 * G * K * q.dtype.itemsize <= 4096
        and kv.size // K < 2**31
    )


def rows(kv: jax.Array) -> jax.Array:
    """[L, B, S, 2, G, K] → [L B S 2 G, K]: of each token the keys of all heads, then the values."""
    return kv.reshape(-1, kv.shape[5])


def words(rows: int, width: int, dtype: Any) -> Any:
    """The scratch that `split` and `merge` take for [rows, width] of a dtype."""
    wide = dtype == jnp.float32
    return pltpu.VMEM((rows if wide else rows // 2, width), jnp.float32 if wide else jnp.uint32)


def split(tile: jax.Array, words: Any, n: int) -> list[jax.Array]:
    """n arrays [T, K], of which the r-th has rows r, r + n, r + 2 n ... of a tile [n T, K].

    Strided loads move words of 32 bits, which hold the same column of two neighbouring rows of 16.
    """
    T, wide = tile.shape[0] // n, tile.dtype == jnp.float32
    step = n if wide else n // 2
    words[: step * T] = tile if wide else pltpu.bitcast(tile, jnp.uint32)
    strided = [words[pl.ds(r, T, stride=step), :] for r in range(step)]
    if wide:
        return strided
    halves = [half for pair in strided for half in (pair << 16, pair & jnp.uint32(0xFFFF0000))]
    return [pltpu.bitcast(half, jnp.float32).astype(tile.dtype) for half in halves]


def merge(parts: list[jax.Array], words: Any, out: Any) -> None:
    """The inverse of `split`: writes float32 parts [T, K] to rows r, r + n, r + 2 n ... of a reference [n T, K], whose
    dtype they are rounded to."""
    n, T = len(parts), parts[0].shape[0]
    if out.dtype == jnp.float32:
        for r, part in enumerate(parts):
            out[pl.ds(r, T, stride=n), :] = part
        return
    halves = [pltpu.bitcast(part.astype(out.dtype).astype(jnp.float32), jnp.uint32) for part in parts]
    for r in range(n // 2):
        words[pl.ds(r, T, stride=n // 2), :] = (halves[2 * r] >> 16) | halves[2 * r + 1]
    out[...] = pltpu.bitcast(words[: n // 2 * T], out.dtype)


def dot(a: jax.Array, b: jax.Array, axis: int) -> jax.Array:
    """float32 product of a [M, N] with b, contracted over the last axis of a and `axis` of b."""
    precision = lax.Precision.HIGHEST if a.dtype == jnp.float32 else None
    return lax.dot_general(a, b, (((1,), (axis,)), ((), ())), precision=precision, preferred_element_type=jnp.float32)
