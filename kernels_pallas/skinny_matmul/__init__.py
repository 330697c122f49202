"""Products of a few rows with large matrices, at the speed of reading the matrices: a decode step's projections."""

import jax

from kernels_pallas.dispatch import dispatch
from kernels_pallas.quantized import Quantized, Weights, check_scale
from kernels_pallas.skinny_matmul import gpu, reference


def project_add(x: jax.Array, w: Weights, layer: jax.Array | int, residual: jax.Array) -> jax.Array:
    """One projection and the residual connection around it.

    Args:
        x: [M, ...D] rows.
        w: [L, ...D, N] matrices of all layers, contracted over all of D. Stored with 8 bits, they have a scale [L, N].
        layer: which layer's, int32 scalar.
        residual: [M, N].

    Returns:
        [M, N]: residual + product, where the product is rounded first.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if w.shape[1:-1] != x.shape[1:] or residual.shape != (x.shape[0], w.shape[-1]):
        raise ValueError(f"x {x.shape}, w {w.shape} and residual {residual.shape} do not fit")
    check_scale(w, *range(1, w.ndim - 1))

    def flat(stack: jax.Array) -> jax.Array:
        return stack.reshape(stack.shape[0], -1, stack.shape[-1])

    rows = x.reshape(x.shape[0], -1)
    matrices = w._replace(values=flat(w.values)) if isinstance(w, Quantized) else flat(w)
    cuda = gpu.project_add if gpu.supports(rows, matrices) else None
    return dispatch(reference.project_add, rows, matrices, layer, residual, cuda=cuda)
