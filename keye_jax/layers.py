"""Dense layers: products accumulate in float32 and round once. And the one place where the parameters' dictionaries of
8-bit weights become `Quantized`."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from keye_jax.ops import Quantized, einsum_f32, scaled, values_of
from keye_jax.params import SCALE, VALUES


def weights_of(tree: Any) -> Any:
    """Parameters as the layers take them: `Quantized` for every dictionary of values and scale in a tree."""
    if not isinstance(tree, Mapping):
        return tree
    if tree.keys() == {VALUES, SCALE}:
        return Quantized(tree[VALUES], tree[SCALE])
    return {name: weights_of(node) for name, node in tree.items()}


def project(subscripts: str, x: jax.Array, weight: jax.Array | Quantized, bias: jax.Array | None = None) -> jax.Array:
    """Einsum of activations and a weight, plus bias, in float32, rounded once to the dtype of x. The output channels of
    8-bit weights are the last axes of the result."""
    y = scaled(einsum_f32(subscripts, x, values_of(weight, x.dtype)), weight)
    if bias is not None:
        y = y + bias.astype(jnp.float32)
    return y.astype(x.dtype)


def linear(x: jax.Array, params: Mapping[str, jax.Array]) -> jax.Array:
    """x [N, in] times params["weight"] [in, out] plus params["bias"] [out]."""
    return project("ni,io->no", x, params["weight"], params["bias"])
