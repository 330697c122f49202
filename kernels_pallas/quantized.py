"""Matrices stored with 8 bits a weight and a scale for each output channel.

A product with one is `scale * (x @ values)`: the 8-bit values are exact in bfloat16, the sum is float32, and the scale
multiplies it before anything is rounded.
"""

from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp

DTYPES = (jnp.int8, jnp.float8_e4m3fn)


class Quantized(NamedTuple):
    """A matrix, or a stack of them; stands where an array of weights could.

    Attributes:
        values: of a dtype of `DTYPES`, in the layout of the weights it stands for.
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

    @property
    def dtype(self) -> Any:
        """As stored."""
        return self.values.dtype


Weights = jax.Array | Quantized
W = TypeVar("W", bound=Weights)


def check_scale(w: Weights, *contracted: int) -> None:
    """Raises ValueError for 8-bit weights of other dtypes, or with a scale that does not fit.

    Args:
        contracted: the axes of w that a product contracts.
    """
    if not isinstance(w, Quantized):
        return
    shape = tuple(size for axis, size in enumerate(w.shape) if axis not in contracted)
    if w.values.dtype not in DTYPES or w.scale.dtype != jnp.float32 or w.scale.shape != shape:
        raise ValueError(
            f"8-bit weights {w.shape} {w.values.dtype} with scale {w.scale.shape} {w.scale.dtype}: must be int8 or "
            f"float8_e4m3fn, and the scale {shape} float32"
        )


def multiplies(w: Weights, dtype: Any) -> bool:
    """Whether a product of operands of `dtype` takes w as it is stored."""
    return isinstance(w, Quantized) or w.dtype == dtype


def pick(w: W, *index: Any) -> W:
    """w[index], of the leading axes: one layer, or one matrix, of a stack."""
    return jax.tree.map(lambda array: array[index], w)


def values_of(w: Weights, dtype: Any) -> jax.Array:
    """What a product multiplies, in `dtype` where it is stored with 8 bits."""
    return w.values.astype(dtype) if isinstance(w, Quantized) else w


def scaled(product: jax.Array, w: Weights) -> jax.Array:
    """A float32 product [..., F] with `values_of(w)`, times the scales [F]."""
    return product * w.scale if isinstance(w, Quantized) else product
