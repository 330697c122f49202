"""Products of a few rows with large matrices, at the speed of reading the matrices: a decode step's projections."""

import math

import jax

from kernels_pallas.dispatch import dispatch
from kernels_pallas.skinny_matmul import gpu, reference


def project_add(x: jax.Array, w: jax.Array, layer: jax.Array | int, residual: jax.Array) -> jax.Array:
    """One projection and the residual connection around it.

    Args:
        x: [M, ...D] rows.
        w: [L, ...D, N] matrices of all layers, contracted over all of D.
        layer: which layer's, int32 scalar.
        residual: [M, N].

    Returns:
        [M, N]: residual + product, where the product is rounded first.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if w.shape[1:-1] != x.shape[1:] or residual.shape != (x.shape[0], w.shape[-1]):
        raise ValueError(f"x {x.shape}, w {w.shape} and residual {residual.shape} do not fit")
    flat = x.reshape(x.shape[0], -1), w.reshape(w.shape[0], math.prod(x.shape[1:]), -1)
    cuda = gpu.project_add if gpu.supports(*flat) else None
    return dispatch(reference.project_add, *flat, layer, residual, cuda=cuda)
