"""grouped_matmul on GPUs for what the Hopper kernel does not take (float32, odd sizes): `lax.ragged_dot`.

The reference would be right there too, but the host watches each turn of its loop. This needs E times the work and a
copy of one layer's matrices, which is nothing for the small models that come this way.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from kernels_pallas.grouped_matmul.reference import swiglu
from kernels_pallas.quantized import Quantized, Weights, pick, values_of


def grouped_matmul(
    x: jax.Array,
    w: Weights,
    layer: jax.Array | int,
    group_sizes: jax.Array,
    row_scale: jax.Array | None = None,
    *,
    out_dtype: Any,
) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_matmul`."""
    precision = lax.Precision.HIGHEST if x.dtype == jnp.float32 else None
    own = pick(w, layer)
    values = values_of(own, x.dtype)
    product = lax.ragged_dot(x, values, group_sizes, precision=precision, preferred_element_type=jnp.float32)
    if isinstance(own, Quantized):
        product = product * jnp.repeat(own.scale, group_sizes, axis=0, total_repeat_length=x.shape[0])
    return (product if row_scale is None else product * row_scale[:, None]).astype(out_dtype)


def grouped_swiglu(x: jax.Array, w: Weights, layer: jax.Array | int, group_sizes: jax.Array) -> jax.Array:
    """See `kernels_pallas.grouped_matmul.grouped_swiglu`."""
    return swiglu(grouped_matmul(x, w, layer, group_sizes, out_dtype=x.dtype))
