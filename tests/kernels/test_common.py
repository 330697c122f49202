"""The pieces that kernel references share."""

import jax.numpy as jnp
import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from kernels_pallas.common import SoftmaxState, einsum_f32


@settings(max_examples=20)
@given(tile=st.sampled_from([1, 8, 24]), seed=st.integers(0, 2**32 - 1), hidden=st.integers(0, 24))
def test_softmax_in_tiles_is_the_softmax(tile: int, seed: int, hidden: int) -> None:
    """Tiles of any width, those without a visible key included, give the same weighted mean."""
    rng = np.random.default_rng(seed)
    scores, values = 20 * rng.standard_normal((3, 24)), rng.standard_normal((24, 4))
    mask = np.ones((3, 24), bool)
    mask[0, :hidden] = False
    state = SoftmaxState.start((3,), 4)
    for first in range(0, 24, tile):
        keys = slice(first, first + tile)
        state = state.add(
            jnp.asarray(scores[:, keys], jnp.float32),
            jnp.asarray(mask[:, keys]),
            jnp.asarray(values[keys], jnp.float32),
            "qs,sk->qk",
        )
    for row in range(3):
        visible = mask[row]
        if not visible.any():
            expected = np.zeros(4)
        else:
            p = np.exp(scores[row, visible] - scores[row, visible].max())
            expected = p @ values[visible] / p.sum()
        np.testing.assert_allclose(state.result()[row], expected, rtol=0, atol=1e-5)


def test_products_of_bfloat16_accumulate_in_float32() -> None:
    """1 + 2**-10 sums exactly in float32; in bfloat16 the small terms would vanish one by one."""
    ones = jnp.ones((1, 1025), jnp.bfloat16)
    small = jnp.full((1025, 1), 2.0**-10, jnp.bfloat16).at[0].set(1.0)
    out = einsum_f32("ij,jk->ik", ones, small)
    assert out.dtype == jnp.float32
    assert float(out[0, 0]) == 2.0
