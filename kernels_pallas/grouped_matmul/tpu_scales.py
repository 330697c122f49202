"""The scales of 8-bit expert matrices in TPU kernels: blocks of the rows of eight experts, of which a kernel takes one.

A block of one row breaks the tiles that arrays lie in, and another shape of the stack would be a copy of it.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.experimental.pallas as pl
from jax import lax

SUBLANES = 8


def scale_spec(experts: int, width: int, at: Callable[..., tuple[Any, Any, Any]]) -> pl.BlockSpec:
    """The block of scales [L, E, F] in which `scale_row` finds the row of an expert.

    Args:
        experts: E.
        width: columns of a block.
        at: what the grid and the prefetched values mean: layer, expert, and which `width` columns.
    """
    rows = min(experts, SUBLANES)

    def index(*step: Any) -> tuple[Any, Any, Any]:
        layer, expert, part = at(*step)
        return layer, lax.div(expert, rows), part

    return pl.BlockSpec((None, rows, width), index)


def scale_row(block: Any, expert: Any) -> jax.Array:
    """[1, width] of an expert."""
    return block[pl.ds(lax.rem(expert, block.shape[0]), 1), :]
