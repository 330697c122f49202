"""What the Triton bodies of `gpu_bits` share: rows and their keys, numbers held in registers."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas import triton as plt

from kernels_pallas.index_select.gpu_filter import QUERIES
from kernels_pallas.index_select.sort_keys import score_of


def ones(mask: jax.Array) -> jax.Array:
    """bool → int32."""
    return mask.astype(jnp.int32)


def iota(size: int) -> jax.Array:
    """0, 1, ..., size - 1."""
    return jnp.arange(size, dtype=jnp.int32)


def put(ref: Any, row: jax.Array, column: jax.Array, value: jax.Array, mask: jax.Array) -> None:
    """Stores where `mask`."""
    # In interpret mode masked-off elements write back what they read, unless they point past the end.
    plt.store(ref.at[row, jnp.where(mask, column, ref.shape[1])], value, mask=mask)


def put_one(ref: Any, row: jax.Array, value: jax.Array, lanes: int) -> None:
    """Stores one number of a program's row."""
    put(ref, row, iota(lanes), jnp.broadcast_to(value, (lanes,)), iota(lanes) == 0)


def place_of(start: Any, first: Any, r: jax.Array, rows: int, chunk: int, capacity: int) -> tuple[jax.Array, jax.Array]:
    """Row r of those that begin at block `first` → its number among all `rows`, and how many keys it sees.

    Of a row past the end, which only fills a block up: 0.
    """
    row = first[0] * QUERIES + r
    inside = jnp.minimum(row, rows - 1)
    # A chunk's last rows may lie past the end of the sequence.
    seen = jnp.minimum(start[lax.div(inside, chunk)] + lax.rem(inside, chunk) + 1, capacity)
    return row, jnp.where(row < rows, seen, 0)


def count_two(values: list[Any], interpret: bool, p: jax.Array, q: jax.Array) -> tuple[jax.Array, jax.Array]:
    """How many of less than 65,536 values (NaN: none) reach two bounds, as `gpu_search.search` wants it."""
    both = jnp.zeros(values[0].shape, jnp.int32)
    low, high = (jnp.broadcast_to(score_of(key), both.shape) for key in (p, q))
    for x in values:
        if interpret:
            both += jnp.where(x >= low, 1, 0) + jnp.where(x >= high, 1 << 16, 0)
        else:  # in this order: the compiler would rather have all conditions at a time, and half the rows a processor
            both = plt.elementwise_inline_asm(
                "{.reg .pred p, q; setp.ge.f32 p, $2, $3; setp.ge.f32 q, $2, $4;"
                " @p add.s32 $0, $0, 1; @q add.s32 $0, $0, 65536;}",
                args=(both, x, low, high),
                constraints="=r,0,f,f,f",
                pack=1,
                result_shape_dtypes=[jax.ShapeDtypeStruct(both.shape, both.dtype)],
            )[0]
    both = jnp.sum(both)
    return both & 0xFFFF, both >> 16


def tie_cut(
    equal_below: Callable[[jax.Array], jax.Array], reach: jax.Array, above: jax.Array, topk: int, capacity: int
) -> jax.Array:
    """The key below which scores equal to the k-th are selected: the largest with at most the wanted ones below it, as
    in the reference.

    Args:
        equal_below: a key → how many lower keys have a score equal to the k-th.
        reach: how many scores reach the k-th.
        above: how many exceed it, if `reach` is not topk.
        topk: how many are selected.
        capacity: keys.
    """

    def halve(state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = state
        middle = lax.div(low + high, 2)
        fits = equal_below(middle) <= topk - above
        return jnp.where(fits, middle, low), jnp.where(fits, high, middle)

    # Where all are wanted, there is nothing to find.
    low = jnp.where(reach != topk, jnp.int32(0), jnp.int32(capacity))
    return lax.while_loop(lambda state: state[1] - state[0] > 1, halve, (low, jnp.int32(capacity + 1)))[0]
