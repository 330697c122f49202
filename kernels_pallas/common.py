"""What every kernel folder needs: float32 products, the selection's bit mask, the references' streaming softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30
"""Stands for minus infinity in running maxima: finite, so that a row that has seen no key yet gives no NaN."""

WORD = 32
"""Keys per word of a selection's bit mask: key s is bit s % 32 of word s // 32."""


MMA = 16
"""Smallest side of a tile that an NVIDIA GPU's tensor cores multiply."""


def einsum_f32(subscripts: str, a: jax.Array, b: jax.Array) -> jax.Array:
    """Einsum that accumulates and returns float32. float32 operands are multiplied as float32 on every platform
    (accelerators would otherwise round them to TF32 or bfloat16)."""
    precision = lax.Precision.HIGHEST if jnp.float32 in (a.dtype, b.dtype) else None
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


def pack_bits(mask: jax.Array) -> jax.Array:
    """[..., S] bool → [..., S // 32] uint32, key s at bit s % 32 of word s // 32."""
    words = mask.reshape(*mask.shape[:-1], mask.shape[-1] // WORD, WORD).astype(jnp.uint32)
    return jnp.sum(words << jnp.arange(WORD, dtype=jnp.uint32), axis=-1, dtype=jnp.uint32)


def unpack_bits(bits: jax.Array) -> jax.Array:
    """The inverse of `pack_bits`."""
    mask = (bits[..., None] >> jnp.arange(WORD, dtype=jnp.uint32)) & 1
    return mask.astype(bool).reshape(*bits.shape[:-1], bits.shape[-1] * WORD)


def write_slots(
    stack: jax.Array, new: jax.Array, layer: jax.Array | int, start: jax.Array, valid: jax.Array
) -> jax.Array:
    """Writes rows of consecutive slots of a cache of index keys or scales, in place where the stack is donated.

    One slice a row is read, mixed and written back: for a scatter of 8-bit floats XLA's TPU backend changes the layout
    of the whole stack.

    Args:
        stack: [L, B, S, ...].
        new: [B, C, ...].
        layer: int32 scalar.
        start: [B] int32, the slot of each row's first token; below zero or beyond S where the cache holds another part
            of the sequence: only slots that there are are written.
        valid: [B] int32, how many of the C tokens are written.
    """
    (B, C), S = new.shape[:2], stack.shape[2]
    width, rest = min(C, S), stack.shape[3:]

    def write_row(b: jax.Array | int, stack: jax.Array) -> jax.Array:
        first = jnp.clip(start[b], 0, S - width)
        shift = first - start[b]
        own = lax.dynamic_index_in_dim(new, b, keepdims=False)
        # So padded, it has a slice for every place that the chunk and the cache can have to one another and still meet.
        own = jnp.pad(own, ((width, width), *((0, 0) for _ in rest)))
        own = lax.dynamic_slice_in_dim(own, jnp.clip(shift + width, 0, C + width), width)
        token = shift + jnp.arange(width, dtype=jnp.int32)
        counts = ((token >= 0) & (token < valid[b])).reshape(1, 1, width, *(1 for _ in rest))
        place = (layer, b, first, *(0 for _ in rest))
        old = lax.dynamic_slice(stack, place, (1, 1, width, *rest))
        return lax.dynamic_update_slice(stack, jnp.where(counts, own[None, None], old), place)

    return write_row(0, stack) if B == 1 else lax.fori_loop(0, B, write_row, stack)


def scatter_slots(
    stack: jax.Array, new: jax.Array, layer: jax.Array | int, start: jax.Array, valid: jax.Array
) -> jax.Array:
    """`write_slots` for keys and values: for slices of them XLA's TPU backend changes the layout of the whole stack."""
    (B, C), S = new.shape[:2], stack.shape[2]
    step = jnp.arange(C, dtype=jnp.int32)
    slots = start[:, None] + step
    slots = jnp.where((step < valid[:, None]) & (slots >= 0), slots, S)
    return stack.at[layer, jnp.arange(B)[:, None], slots].set(new, mode="drop", unique_indices=True)


class SoftmaxState(NamedTuple):
    """A softmax-weighted sum in progress: running maximum and denominator [...], numerator [..., K]; float32."""

    maximum: jax.Array
    denominator: jax.Array
    numerator: jax.Array

    @classmethod
    def start(cls, rows: tuple[int, ...], width: int) -> "SoftmaxState":
        return cls(
            jnp.full(rows, MASKED, jnp.float32),
            jnp.zeros(rows, jnp.float32),
            jnp.zeros((*rows, width), jnp.float32),
        )

    def add(self, scores: jax.Array, mask: jax.Array, values: jax.Array, subscripts: str) -> "SoftmaxState":
        """Takes in one tile of keys (Milakov & Gimelshein 2018, online softmax).

        Args:
            scores: [..., s] float32, scaled.
            mask: [..., s] bool, broadcastable; False removes a key.
            values: in the layout that `subscripts` contracts with the [..., s] probabilities.
            subscripts: einsum of (probabilities, values) → [..., K].
        """
        scores = jnp.where(mask, scores, MASKED)
        maximum = jnp.maximum(self.maximum, scores.max(-1))
        decay = jnp.exp(self.maximum - maximum)
        # The mask again: in a row without any key so far, exp(MASKED - MASKED) is 1.
        p = jnp.where(mask, jnp.exp(scores - maximum[..., None]), 0.0)
        # Rounding before the product with V as the official kernels do; the denominator stays float32.
        weighted = einsum_f32(subscripts, p.astype(values.dtype), values)
        return SoftmaxState(maximum, self.denominator * decay + p.sum(-1), self.numerator * decay[..., None] + weighted)

    def result(self) -> jax.Array:
        """[..., K] float32; zero where no key was seen."""
        return self.numerator / jnp.where(self.denominator == 0, 1.0, self.denominator)[..., None]

    def log_sum_exp(self) -> jax.Array:
        """[...] float32; MASKED where no key was seen."""
        return jnp.where(self.denominator == 0, MASKED, self.maximum + jnp.log(self.denominator))
