"""fused_linear against float64, and its Hopper body, interpreted, against its reference.

Operands are small integers where results must be equal.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from kernels_pallas.fused_linear import fused_linear, gelu_mlp, gpu, reference

SMALL = gpu.Tuning(rows=64, columns=128, stages=2, cluster=1, clusters=2)


def integers(seed: int, *shape: int, scale: float = 1.0, dtype: Any = jnp.bfloat16) -> jax.Array:
    return jnp.asarray(scale * np.random.default_rng(seed).integers(-2, 3, shape), dtype)


def wide(x: jax.Array) -> np.ndarray:
    return np.asarray(x.astype(jnp.float32), np.float64)


def test_linear_equals_the_definition() -> None:
    x, w, b, r = (integers(i, *shape, dtype=jnp.float32) for i, shape in enumerate([(5, 7), (7, 3), (3,), (5, 3)]))
    np.testing.assert_array_equal(fused_linear(x, w, b), wide(x) @ wide(w) + wide(b))
    np.testing.assert_array_equal(fused_linear(x, w, b, r), wide(x) @ wide(w) + wide(b) + wide(r))


def test_mlp_equals_the_definition() -> None:
    x, w1, b1, w2, b2 = (
        integers(i, *shape, scale=0.25, dtype=jnp.float32)
        for i, shape in enumerate([(5, 8), (8, 12), (12,), (12, 8), (8,)])
    )
    h = wide(x) @ wide(w1) + wide(b1)
    h = 0.5 * h * (1 + np.tanh(np.sqrt(2 / np.pi) * (h + 0.044715 * h**3)))
    np.testing.assert_allclose(gelu_mlp(x, (w1, b1), (w2, b2), x), wide(x) + h @ wide(w2) + wide(b2), rtol=1e-5)


def test_hopper_residual() -> None:
    """More tiles than both consumers of both blocks take in one turn, more steps than stages, a depth to be padded."""
    x, w, b, r = (integers(i, *shape) for i, shape in enumerate([(192, 136), (136, 256), (256,), (192, 256)]))
    out = gpu.fused_linear(x, w, b, r, tuning=SMALL, interpret=InterpretGPUParams())
    np.testing.assert_array_equal(out, reference.fused_linear(x, w, b, r))


@pytest.mark.slow
def test_hopper_mlp_of_a_ragged_width() -> None:
    x, r = integers(0, 64, 64, scale=0.25), integers(1, 64, 128, scale=0.25)
    fc1, fc2 = (integers(2, 64, 80, scale=0.25), integers(3, 80)), (integers(4, 80, 128, scale=0.25), integers(5, 128))
    out = gpu.gelu_mlp(x, fc1, fc2, r, tuning=SMALL, interpret=InterpretGPUParams())
    # One unit in the last place of a hidden activation moves a sum by up to 2**-9 of it; sums reach 30.
    np.testing.assert_allclose(wide(out), wide(reference.gelu_mlp(x, fc1, fc2, r)), rtol=0, atol=2**-3)


@pytest.mark.skipif(jax.__version_info__ < (0, 11), reason="the interpreter has no cluster barriers before JAX 0.11")
def test_hopper_clusters_share_weights() -> None:
    x, w, b = integers(0, 256, 192), integers(1, 192, 128), integers(2, 128)
    tuning = gpu.Tuning(rows=64, columns=128, stages=2, cluster=2, clusters=1)
    out = gpu.fused_linear(x, w, b, tuning=tuning, interpret=InterpretGPUParams())
    np.testing.assert_array_equal(out, reference.fused_linear(x, w, b))


def test_supported_shapes() -> None:
    def supports(M: int, N: int, dtype: Any = jnp.bfloat16) -> bool:
        return gpu.supports(jnp.zeros((M, 588), dtype), jnp.zeros((588, N), dtype))

    assert supports(256, 1152)
    assert not supports(255, 1152)
    assert not supports(256, 1152, jnp.float32)
    assert not supports(256, 1000)
    with pytest.raises(ValueError, match="whole tiles"):
        gpu.fused_linear(integers(0, 96, 64), integers(1, 64, 128), integers(2, 128), tuning=SMALL)


def test_wrong_shapes_are_refused() -> None:
    x, w, b = integers(0, 4, 8), integers(1, 8, 8), integers(2, 8)
    for call in (
        lambda: fused_linear(x, w[:7], b),
        lambda: fused_linear(x, w, b[:7]),
        lambda: fused_linear(x, w, b, x[:3]),
        lambda: gelu_mlp(x, (w, b), (w[:7], b), x),
        lambda: gelu_mlp(x, (w, b), (w, b), x[:3]),
    ):
        with pytest.raises(ValueError, match="do not fit"):
            call()
