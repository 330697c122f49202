"""Rotary embeddings against complex rotation in float64."""

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from keye_jax.ops import rotate
from keye_jax.rope import mrope_axis, mrope_tables, vision_tables
from tests.keye_jax import dense_numpy as dense


def test_published_sections() -> None:
    """16 time, 24 row, 24 column frequencies, one block after the other; and as Qwen3-VL interleaves them."""
    assert mrope_axis((16, 24, 24), False) == [0] * 16 + [1] * 24 + [2] * 24
    interleaved = mrope_axis((24, 20, 20), True)
    assert interleaved[:6] == [0, 1, 2, 0, 1, 2]
    assert interleaved[58:] == [1, 2, 0, 0, 0, 0]
    assert [interleaved.count(axis) for axis in range(3)] == [24, 20, 20]


@settings(max_examples=30)
@given(
    positions=st.lists(st.tuples(*[st.integers(0, 2000)] * 3), min_size=4, max_size=4),
    interleaved=st.booleans(),
    seed=st.integers(0, 2**32 - 1),
)
def test_mrope_equals_complex_rotation(positions: list[tuple[int, int, int]], interleaved: bool, seed: int) -> None:
    sections, theta = (4, 6, 6), 1e7
    x = np.random.default_rng(seed).standard_normal((1, 4, 2, 32)).astype(np.float32)
    table = jnp.asarray(np.array(positions).T[:, None], jnp.int32)
    cos, sin = mrope_tables(table, theta, sections, interleaved, jnp.dtype(jnp.float32))
    actual = np.asarray(rotate(jnp.asarray(x), cos, sin))
    for t, position in enumerate(positions):
        angles = dense.mrope_angles(np.array(position), sections, theta, interleaved)
        for head in range(2):
            # An angle of 2,000 radians is known to 1e-4 in float32.
            np.testing.assert_allclose(actual[0, t, head], dense.rotate(x[0, t, head], angles), rtol=0, atol=5e-4)


def test_scores_depend_on_distances_only() -> None:
    """What rotary embeddings are for; at the far end of the context too."""
    q, k = np.random.default_rng(0).standard_normal((2, 1, 1, 1, 32)).astype(np.float32)

    def score(query: int, key: int) -> float:
        tables = (
            mrope_tables(jnp.full((3, 1, 1), p, jnp.int32), 1e7, (4, 6, 6), False, jnp.dtype(jnp.float32))
            for p in (query, key)
        )
        a, b = (rotate(jnp.asarray(x), *table) for x, table in zip((q, k), tables, strict=True))
        return float(jnp.sum(a * b))

    near = score(7, 3)
    assert score(1007, 1003) == pytest.approx(near, abs=1e-2)
    assert score(262143, 262139) == pytest.approx(near, abs=0.3)  # angles there are known to 0.02


def test_distant_neighbours_differ_in_bfloat16() -> None:
    """Angles are computed in float32 whatever the tables' dtype: in bfloat16, positions 262,142 and 262,143 would be
    one."""
    positions = jnp.asarray([[262142, 262143]] * 3, jnp.int32)[:, None]
    cos, sin = mrope_tables(positions, 1e7, (4, 6, 6), False, jnp.dtype(jnp.bfloat16))
    assert cos.dtype == sin.dtype == jnp.bfloat16
    assert float(jnp.abs(cos[0, 0] - cos[0, 1]).max()) > 0.3


def test_vision_coordinates_turn_halves() -> None:
    """The first half of the frequencies follows the row, the second the column; the origin turns nothing."""
    rows, columns = jnp.array([0, 2, 0], jnp.int32), jnp.array([0, 0, 3], jnp.int32)
    cos, sin = vision_tables(rows, columns, 16, 10000.0)
    assert cos.shape == sin.shape == (3, 8)
    frequencies = 10000.0 ** (-np.arange(4) / 4)
    expected = np.zeros((3, 8))
    expected[1, :4], expected[2, 4:] = 2 * frequencies, 3 * frequencies
    np.testing.assert_allclose(cos, np.cos(expected), rtol=0, atol=1e-6)
    np.testing.assert_allclose(sin, np.sin(expected), rtol=0, atol=1e-6)


def test_rotation_keeps_the_dtype_of_x() -> None:
    """The vision tower rotates bfloat16 in float32 tables, the decoder in bfloat16 ones."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((5, 2, 8)), jnp.bfloat16)
    cos, sin = jnp.full((5, 4), 0.6), jnp.full((5, 4), 0.8)
    wide = rotate(x.astype(jnp.float32), cos, sin)
    np.testing.assert_array_equal(rotate(x, cos, sin), wide.astype(jnp.bfloat16))
    assert rotate(x, cos.astype(jnp.bfloat16), sin.astype(jnp.bfloat16)).dtype == jnp.bfloat16
