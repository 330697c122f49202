"""Dense layers of the vision tower with everything that follows the product element by element."""

import jax

from kernels_pallas.dispatch import dispatch
from kernels_pallas.fused_linear import gpu, reference


def fused_linear(x: jax.Array, weight: jax.Array, bias: jax.Array, residual: jax.Array | None = None) -> jax.Array:
    """x @ weight + bias, and added to the residual if there is one.

    Args:
        x: [M, K].
        weight: [K, N].
        bias: [N].
        residual: [M, N].

    Returns:
        [M, N], dtype of x; products accumulate and the bias is added in float32.

    Raises:
        ValueError: shapes that do not fit together.
    """
    M, K = x.shape
    if weight.shape != (K, *bias.shape) or (residual is not None and residual.shape != (M, *bias.shape)):
        shape = None if residual is None else residual.shape
        raise ValueError(f"x {x.shape}, weight {weight.shape}, bias {bias.shape} and residual {shape} do not fit")
    args = (x, weight, bias) if residual is None else (x, weight, bias, residual)
    return dispatch(reference.fused_linear, *args, cuda=gpu.fused_linear if gpu.supports(x, weight) else None)


def gelu_mlp(
    x: jax.Array, fc1: tuple[jax.Array, jax.Array], fc2: tuple[jax.Array, jax.Array], residual: jax.Array
) -> jax.Array:
    """residual + fc2(gelu(fc1(x))) with the tanh form of GELU.

    Args:
        x, residual: [M, K].
        fc1: weight [K, F] and bias [F].
        fc2: weight [F, K] and bias [K].

    Returns:
        [M, K], dtype of x; products and GELU in float32, hidden activations rounded to the dtype of x.

    Raises:
        ValueError: shapes that do not fit together.
    """
    K, F = fc1[0].shape
    if (x.shape[1], F, K) != (K, *fc1[1].shape, *fc2[1].shape) or fc2[0].shape != (F, K) or x.shape != residual.shape:
        raise ValueError(
            f"x {x.shape}, residual {residual.shape}, fc1 {fc1[0].shape} and fc2 {fc2[0].shape} with biases "
            f"{fc1[1].shape} and {fc2[1].shape} do not fit"
        )
    cuda = gpu.gelu_mlp if gpu.supports(x, fc1[0], fc2[0]) else None
    return dispatch(reference.gelu_mlp, x, fc1, fc2, residual, cuda=cuda)
