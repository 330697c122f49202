"""Random matrices of 8-bit weights, and what they stand for."""

from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas.quantized import DTYPES, Quantized

NAMES = [jnp.dtype(dtype).name for dtype in DTYPES]


def random_weights(shape: tuple[int, ...], dtype: Any, *contracted: int, size: float = 1.0, seed: int = 0) -> Quantized:
    """Weights of about `size`, over the whole range of `dtype`, whose channels' scales differ by a factor of four."""
    rng = np.random.default_rng(seed)
    spread = 40.0 if dtype == jnp.int8 else 100.0
    values = np.clip(rng.standard_normal(shape) * spread, -127, 127)
    channels = [n for axis, n in enumerate(shape) if axis not in contracted]
    scale = size / spread * 2.0 ** rng.uniform(-1, 1, channels)
    rounded = np.round(values) if dtype == jnp.int8 else values
    return Quantized(jnp.asarray(rounded, jnp.float32).astype(dtype), jnp.asarray(scale, jnp.float32))


def dequantised(w: Quantized, *contracted: int) -> np.ndarray:
    """float64."""
    return np.asarray(w.values, np.float64) * np.expand_dims(np.asarray(w.scale, np.float64), contracted)
