"""What every kernel folder needs: float32 products, the selection's bit mask, the references' streaming softmax."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

MASKED = -1e30
"""Stands for minus infinity in running maxima: finite, so that a row that has seen no key yet gives no NaN."""

WORD = 32
"""Keys per word of a selection's bit mask: key s is bit s % 32 of word s // 32."""


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
