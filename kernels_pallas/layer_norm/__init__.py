"""Layer normalisation of the vision tower's hidden states."""

from functools import partial

import jax

from kernels_pallas.dispatch import dispatch
from kernels_pallas.layer_norm import gpu, reference


def layer_norm(x: jax.Array, weight: jax.Array, bias: jax.Array, eps: float) -> jax.Array:
    """(x - mean) / sqrt(variance + eps) * weight + bias over the last axis, computed in float32 and rounded once.

    Args:
        x: [N, C].
        weight, bias: [C].

    Returns:
        [N, C], dtype of x.

    Raises:
        ValueError: shapes that do not fit together.
    """
    if x.ndim != 2 or weight.shape != x.shape[1:] or bias.shape != x.shape[1:]:
        raise ValueError(f"x {x.shape}, weight {weight.shape} and bias {bias.shape} do not fit")
    cuda = partial(gpu.layer_norm, eps=eps) if gpu.supports(x) else None
    return dispatch(partial(reference.layer_norm, eps=eps), x, weight, bias, cuda=cuda)
