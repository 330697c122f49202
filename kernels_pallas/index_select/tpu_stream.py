"""A sequence's keys and scales, tile by tile from HBM to VMEM, and how XLA lays them out.

On TPUs XLA keeps [L, B, S, I] with the keys along lanes if I < 128: [L, B, I, S] in memory, nothing padded; a Pallas
operand of that shape is the stack itself. Any other order would be a copy of the whole stack before every call.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

LANES = 128


def known(idx_q: jax.Array, idx_k: jax.Array) -> bool:
    """Whether these dtypes and this cache can be taken as `operands`."""
    S, I = idx_k.shape[2:]  # noqa: E741
    dtypes = idx_q.dtype == idx_k.dtype and idx_q.dtype in (jnp.float8_e4m3fn, jnp.bfloat16, jnp.float32)
    return dtypes and I < LANES and S % LANES == 0


def operands(idx_k: jax.Array, key_scale: jax.Array | None) -> list[jax.Array]:
    """[L, B, I, S] keys and [L, B, S] or [B, L, S] scales, as they lie in memory."""
    L, B = idx_k.shape[:2]
    scales = [] if key_scale is None else [key_scale.swapaxes(0, 1) if _batch_first(L, B) else key_scale]
    return [idx_k.swapaxes(2, 3), *scales]


def sources(refs: list[Any], layer: Any, row: Any) -> list[Any]:
    """One sequence's [I, S] keys and [1, S] scales of references to `operands`."""
    keys, *scales = refs
    first, second = (row, layer) if _batch_first(*keys.shape[:2]) else (layer, row)
    return [keys.at[layer, row], *(scale.at[first, pl.ds(second, 1)] for scale in scales)]


def _batch_first(L: int, B: int) -> bool:
    """XLA puts that axis next to the keys which pads less: to 1, 2, 4 or a multiple of 8."""

    def padded(n: int) -> int:
        return next((size for size in (1, 2, 4) if n <= size), pl.cdiv(n, 8) * 8)

    return L * padded(B) > padded(L) * B


@dataclass(frozen=True)
class Stream:
    """Copies of `width` keys at a time, tile t into slot t % slots; inside a kernel.

    sources: references in HBM whose last axis is the keys'.
    slots: as many references in VMEM, [slots, ..., width].
    arrived: DMA semaphores [slots, sources].
    """

    sources: list[Any]
    slots: list[Any]
    arrived: Any

    def start(self, tile: jax.Array) -> None:
        self._each(tile, lambda copy: copy.start())

    def wait(self, tile: jax.Array) -> None:
        self._each(tile, lambda copy: copy.wait())

    def _each(self, tile: jax.Array, act: Callable[[Any], None]) -> None:
        capacity, width = self.sources[0].shape[-1], self.slots[0].shape[-1]
        slot, first = lax.rem(tile, self.slots[0].shape[0]), pl.multiple_of(tile * width, LANES)

        def copy(size: int) -> None:
            for i, (source, target) in enumerate(zip(self.sources, self.slots, strict=True)):
                part = source.at[:, pl.ds(first, size)], target.at[slot, :, pl.ds(0, size)]
                act(pltpu.make_async_copy(*part, self.arrived.at[slot, i]))

        whole = tile < capacity // width
        pl.when(whole)(lambda: copy(width))
        if capacity % width:
            pl.when(jnp.logical_not(whole))(lambda: copy(capacity % width))
