"""Appending a chunk to the caches: exactly the slots that exist and count are written."""

import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import example, given
from hypothesis import strategies as st

from kernels_pallas.decode_inputs import Caches
from kernels_pallas.decode_inputs.reference import IndexInputs, append

L, B, S = 2, 3, 16

appended = jax.jit(append)


@given(
    chunk=st.sampled_from([1, 5, 16, 40]),
    start=st.tuples(*[st.integers(-60, 40)] * B),
    share=st.tuples(*[st.floats(0, 1)] * B),
    layer=st.integers(0, L - 1),
)
@example(
    chunk=40, start=(-24, 0, -39), share=(1.0, 1.0, 1.0), layer=1
)  # longer than the cache, which holds another part
@example(chunk=5, start=(14, 15, 16), share=(1.0, 1.0, 1.0), layer=0)  # over the end
def test_slots(chunk: int, start: tuple[int, ...], share: tuple[float, ...], layer: int) -> None:
    rng = np.random.default_rng(0)
    kv = rng.normal(size=(L, B, S, 2, 2, 4)).astype(np.float32)
    idx_k, scale = rng.normal(size=(L, B, S, 3)).astype(np.float32), rng.normal(size=(L, B, S)).astype(np.float32)
    k, v = rng.normal(size=(2, B, chunk, 2, 4)).astype(np.float32)
    new_idx, new_scale = rng.normal(size=(B, chunk, 3)).astype(np.float32), rng.normal(size=(B, chunk))
    valid = [round(part * chunk) for part in share]
    expected = (kv.copy(), idx_k.copy(), scale.copy())
    for b in range(B):
        for c in range(valid[b]):
            slot = start[b] + c
            if 0 <= slot < S:
                expected[0][layer, b, slot] = k[b, c], v[b, c]
                expected[1][layer, b, slot] = new_idx[b, c]
                expected[2][layer, b, slot] = new_scale[b, c]
    index = IndexInputs(jnp.zeros(1), jnp.zeros(1), jnp.asarray(new_idx), jnp.asarray(new_scale, jnp.float32))
    caches = Caches(jnp.asarray(kv), jnp.asarray(idx_k), jnp.asarray(scale))
    places = jnp.asarray(start, jnp.int32), jnp.asarray(valid, jnp.int32)
    after = appended(caches, jnp.int32(layer), *places, jnp.asarray(k), jnp.asarray(v), index)
    for one, other in zip(after, expected, strict=True):
        np.testing.assert_array_equal(one, other)
