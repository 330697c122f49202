"""Matrices stored with 8 bits a weight and a scale for each output channel.

A product with one is `scale * (x @ values)`: the 8-bit values are exact in bfloat16, the sum is float32, and the scale
multiplies it before anything is rounded.
"""

from typing import Any, NamedTuple

import jax


class Quantized(NamedTuple):
    """A matrix, or a stack of them; stands where an array of weights could.

    Attributes:
        values: int8 or float8_e4m3fn, in the layout of the weights it stands for.
        scale: float32, that layout without the axes that a product contracts: [..., F] for matrices [..., D, F].
    """

    values: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weights."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        return self.values.ndim


Weights = jax.Array | Quantized


def values_of(w: Weights, dtype: Any) -> jax.Array:
    """What a product multiplies, in `dtype` where it is stored with 8 bits."""
    return w.values.astype(dtype) if isinstance(w, Quantized) else w


def scaled(product: jax.Array, w: Weights, layer: jax.Array | int | None = None) -> jax.Array:
    """A float32 product [..., F] with `values_of(w)`, times the scales [F] (of the layer `layer` of a stack)."""
    if not isinstance(w, Quantized):
        return product
    return product * (w.scale if layer is None else w.scale[layer])
