"""The TPU body of attend_ids, interpreted on the CPU with its copies and semaphores, against its reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import MASKED
from kernels_pallas.sparse_attention import reference, tpu_ids
from kernels_pallas.sparse_attention.tpu_ids import Tuning

LAYERS, LAYER, CAPACITY, K = 2, 1, 512, 128
TILE = Tuning(tile=128, unroll=4)
# float32: sums of at most 300 terms of size one; bfloat16: probabilities are rounded relative to another maximum.
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 1e-2}


# Log-sum-exps: float32 sums of at most 300 exponentials, and scores, whose terms are as large as the keys.
LSE_BOUND, LSE_BOUND_OF_SIZE = 2e-5, 2e-6


def check(
    ids: np.ndarray,
    heads: tuple[int, int],
    dtype: Any,
    tuning: Tuning = TILE,
    size: float = 1,
    partly: bool = False,
) -> None:
    """Compares for random queries of heads[0] and keys of heads[1], the keys times `size`; ids [B, k]. `partly`:
    attend_ids_lse."""
    B, rng = len(ids), np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((B, heads[0], K)), dtype)
    kv = jnp.asarray(rng.standard_normal((LAYERS, B, CAPACITY, 2, heads[1], K)), dtype)
    args = q, kv.at[:, :, :, 0].multiply(size), jnp.int32(LAYER), jnp.asarray(ids, jnp.int32)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    body = tpu_ids.attend_ids_lse if partly else tpu_ids.attend_ids
    actual: Any = jax.block_until_ready(body(*args, tuning=tuning, interpret=interpret))
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    expected: Any = (reference.attend_ids_lse if partly else reference.attend_ids)(*args)
    if partly:
        (actual, lse), (expected, expected_lse) = actual, expected
        assert lse.dtype == expected_lse.dtype == jnp.float32
        np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=LSE_BOUND + LSE_BOUND_OF_SIZE * size)
        seen = (ids >= 0).any(-1)
        assert np.all(np.asarray(lse)[~seen] == np.float32(MASKED))
        assert not np.asarray(actual)[~seen].any()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bound = BOUNDS[dtype]
    np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=bound)


def lists(slots: int, *used: int) -> np.ndarray:
    """Ascending ids of as many random tokens as are used, in rows of slots."""
    rng = np.random.default_rng(1)
    rows = [np.sort(rng.permutation(CAPACITY)[:n]) for n in used]
    return np.stack([np.pad(row, (0, slots - len(row)), constant_values=-1) for row in rows])


@pytest.mark.parametrize(
    ("heads", "dtype", "used", "tuning"),
    [
        ((8, 4), jnp.bfloat16, (300, 129), TILE),
        # Two parts of a list, of which one, or both in a sequence, have no keys.
        ((6, 2), jnp.bfloat16, (128, 0), Tuning(tile=128, unroll=4, cores=4)),
        ((8, 1), jnp.float32, (1, 20), TILE),
    ],
)
def test_lists_of_any_length(heads: tuple[int, int], dtype: Any, used: tuple[int, int], tuning: Tuning) -> None:
    check(lists(300, *used), heads, dtype, tuning)


@pytest.mark.parametrize(
    ("heads", "dtype", "tuning", "size"),
    [
        ((8, 4), jnp.bfloat16, TILE, 1),
        ((6, 2), jnp.bfloat16, Tuning(tile=128, unroll=4, cores=4), 1),  # two parts of each list
        ((8, 1), jnp.float32, TILE, 1e6),
    ],
)
def test_parts_of_a_list(heads: tuple[int, int], dtype: Any, tuning: Tuning, size: float) -> None:
    """Log-sum-exps, of many keys, of one, and of none."""
    check(lists(300, 290, 1, 0), heads, dtype, tuning, size, partly=True)


def test_unused_slots_between_ids() -> None:
    """Also a whole tile of them before the first id."""
    ids = lists(200, 200)
    ids[0, :140] = ids[0, 150::3] = -1
    check(ids, (4, 2), jnp.bfloat16)


@pytest.mark.parametrize("size", [0.0, 1e6])
def test_equal_and_large_scores(size: float) -> None:
    """Equal scores are averaged; scores of a million make the softmax one-hot and do not overflow."""
    check(lists(130, 130), (4, 1), jnp.float32, size=size)


@pytest.mark.parametrize(
    ("heads", "width", "slots", "dtype", "taken"),
    [
        ((32, 4), 128, 2048, jnp.bfloat16, True),
        ((8, 1), 128, 1, jnp.float32, True),
        ((32, 4), 128, 1 << 17, jnp.bfloat16, False),  # more than the scalar memory holds
        ((8, 4), 256, 64, jnp.bfloat16, False),
        ((8, 4), 128, 64, jnp.float16, False),
    ],
)
def test_supported_shapes(heads: tuple[int, int], width: int, slots: int, dtype: Any, taken: bool) -> None:
    q, kv = jax.ShapeDtypeStruct((2, heads[0], width), dtype), (LAYERS, 2, CAPACITY, 2, heads[1], width)
    ids = jax.ShapeDtypeStruct((2, slots), jnp.int32)
    assert tpu_ids.supports(q, jax.ShapeDtypeStruct(kv, dtype), ids) == taken  # pyright: ignore
