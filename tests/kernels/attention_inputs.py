"""Random arguments of `decode_inputs` and `chunk_inputs`."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas.decode_inputs import Caches, Tables, Weights

FP8 = jnp.float8_e4m3fn
LAYERS, HIDDEN = 2, 64
SMALL, PUBLISHED = (8, 2, 32, 4, 16), (32, 4, 128, 16, 64)
"""H, G, K, J, I of a small model and of the published one."""

Arguments = tuple[jax.Array, Weights, Tables, Caches]


def projection_arguments(
    lead: tuple[int, ...], capacity: int, sizes: tuple[int, ...], dtype: Any, idx_dtype: Any
) -> Arguments:
    """Residual stream [*lead, HIDDEN], weights, tables of random angles, and filled caches.

    Args:
        lead: (B,) for a decode step, (B, C) for a chunk.
        capacity: of the caches.
    """
    rng = np.random.default_rng(0)
    H, G, K, J, I = sizes  # noqa: E741

    def normal(*shape: int, scale: float = 1.0, offset: float = 0.0, dtype: Any = dtype) -> jax.Array:
        return jnp.asarray(offset + scale * rng.standard_normal(shape), jnp.float32).astype(dtype)

    def matrix(*shape: int) -> jax.Array:
        return normal(LAYERS, HIDDEN, *shape, scale=HIDDEN**-0.5)

    def norm(width: int, dtype: Any = dtype) -> jax.Array:
        return normal(LAYERS, width, scale=0.1, offset=1.0, dtype=dtype)

    def table(width: int) -> tuple[jax.Array, jax.Array]:
        angles = rng.uniform(0, 7, (*lead, width // 2)).astype(np.float32)
        return jnp.cos(angles).astype(dtype), jnp.sin(angles).astype(dtype)

    f32 = jnp.float32
    matrices = (matrix(H, K), matrix(G, K), matrix(G, K), matrix(J, I), matrix(I), matrix(J))
    norms = (norm(K), norm(K), norm(I), norm(I, f32), normal(LAYERS, I, scale=0.1, dtype=f32))
    slots = (LAYERS, lead[0], capacity)
    scales = normal(*slots, dtype=f32) if idx_dtype == FP8 else None
    caches = Caches(normal(*slots, 2, G, K), normal(*slots, I, dtype=f32).astype(idx_dtype), scales)
    return normal(*lead, HIDDEN), Weights(norm(HIDDEN), *matrices, *norms), Tables(*table(K), *table(I)), caches
