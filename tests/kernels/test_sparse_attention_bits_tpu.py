"""The TPU body of attend_bits, interpreted on the CPU with its copies and semaphores, against the reference."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.common import MASKED, pack_bits
from kernels_pallas.sparse_attention import reference, tpu_bits
from kernels_pallas.sparse_attention.tpu_bits import Tuning

K, LAYERS, LAYER = 128, 2, 1
# float32: sums of at most 640 terms of size one; bfloat16: the result, about one, is rounded to 8 bits.
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


# Log-sum-exps: of scores of size one, float32 sums of at most 640 exponentials, whose inputs are equal.
LSE_BOUND = 2e-5


def check(
    mask: np.ndarray,
    start: list[int],
    heads: tuple[int, int],
    dtype: Any,
    tuning: Tuning,
    size: float = 1,
    partly: bool = False,
) -> None:
    """Compares for random queries of heads[0] and keys of heads[1], the keys times `size`; mask [B, C, S]. `partly`:
    attend_bits_lse."""
    B, C, S = mask.shape
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((B, C, heads[0], K)), dtype)
    kv = jnp.asarray(rng.standard_normal((LAYERS, B, S, 2, heads[1], K)), dtype).at[:, :, :, 0].multiply(size)
    args = q, kv, jnp.int32(LAYER), pack_bits(jnp.asarray(mask)), jnp.asarray(start, jnp.int32)
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    body = tpu_bits.attend_bits_lse if partly else tpu_bits.attend_bits
    actual: Any = jax.block_until_ready(body(*args, tuning=tuning, interpret=interpret))
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    expected: Any = (reference.attend_bits_lse if partly else reference.attend_bits)(*args)
    if partly:
        (actual, lse), (expected, expected_lse) = actual, expected
        assert lse.dtype == expected_lse.dtype == jnp.float32
        np.testing.assert_allclose(lse, expected_lse, rtol=1e-6, atol=LSE_BOUND)
        seen = mask.any(-1)
        assert np.all(np.asarray(lse)[~seen] == np.float32(MASKED))
        assert not np.asarray(actual)[~seen].any()
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bound = BOUNDS[dtype]
    np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=bound)


def causal(start: list[int], chunk: int, capacity: int) -> np.ndarray:
    return np.arange(capacity) <= np.array(start)[:, None, None] + np.arange(chunk)[:, None]


@pytest.mark.parametrize(
    ("heads", "dtype", "tuning"),
    [
        ((8, 4), jnp.bfloat16, Tuning(queries=16, pages=2)),
        ((6, 2), jnp.bfloat16, Tuning(queries=32, pages=1, rows=32)),  # a head at a time
        ((2, 1), jnp.float32, Tuning(queries=64, pages=4)),  # more queries than the chunk has
    ],
)
def test_ragged_sequences(heads: tuple[int, int], dtype: Any, tuning: Tuning) -> None:
    """Sequences of different lengths, a chunk that fills no block, queries that see everything, one key or nothing, and
    pages that nobody in a block selected."""
    start = [0, 603]
    mask = causal(start, 37, 640) & (np.random.default_rng(1).random((2, 37, 640)) < 0.2)
    mask[1, :, 128:256] = False
    mask[1, 16:, 300:530] = False
    mask[1, 3] = False
    mask[1, 5] = np.arange(640) == 77
    mask[1, 36] = causal(start, 37, 640)[1, 36]
    check(mask, start, heads, dtype, tuning)


@pytest.mark.parametrize("size", [0.0, 1e6])
def test_equal_and_large_scores(size: float) -> None:
    """Equal scores are averaged; scores of a million make the softmax one-hot and do not overflow."""
    start = [11, 200]
    check(causal(start, 16, 256), start, (2, 1), jnp.float32, Tuning(pages=1), size)


@pytest.mark.parametrize(
    ("heads", "dtype", "tuning"),
    [
        ((8, 4), jnp.bfloat16, Tuning(queries=16, pages=2)),
        ((6, 2), jnp.bfloat16, Tuning(queries=32, pages=1, rows=32)),
        ((2, 1), jnp.float32, Tuning(queries=64, pages=4)),
    ],
)
def test_parts_of_a_sequence(heads: tuple[int, int], dtype: Any, tuning: Tuning) -> None:
    """Log-sum-exps, where this part of the keys ends before the chunk, lies in it, or holds nothing visible; queries
    that see one key or nothing of it."""
    start = [700, -21, -400]
    mask = causal(start, 37, 640) & (np.random.default_rng(2).random((3, 37, 640)) < 0.1)
    mask[0, 4] = False
    mask[0, 6] = np.arange(640) == 639
    mask[0, :, 128:384] = False
    mask[1, 21] = np.arange(640) == 0
    check(mask, start, heads, dtype, tuning, partly=True)


def test_log_sum_exps_of_large_scores() -> None:
    """In a cache that is shorter than a tile."""
    start = [11, 200]
    check(causal(start, 16, 256), start, (2, 1), jnp.float32, Tuning(), 1e6, partly=True)


def test_pages_far_apart() -> None:
    """The list of pages runs over windows of 4,096 keys, the last not full, of which some have no page; a block in
    which nobody selected anything stands between two others."""
    capacity, start = 9 * 4096 + 256, [9 * 4096 + 200]
    mask = np.zeros((1, 48, capacity), bool)
    for c, key in ((0, 0), (3, 4095), (3, 4096), (7, 20_000), (7, 20_001), (15, 9 * 4096 + 215), (40, 30_000)):
        mask[0, c, key] = True
    check(mask, start, (1, 1), jnp.float32, Tuning(queries=16, pages=2))


@pytest.mark.parametrize(
    ("heads", "width", "capacity", "dtype", "taken"),
    [
        ((32, 4), 128, 262144, jnp.bfloat16, True),
        ((8, 1), 128, 128, jnp.float32, True),
        ((8, 1), 128, 128, jnp.bfloat16, False),  # a row of 16 bits has no neighbour
        ((6, 3), 128, 128, jnp.float32, False),  # not as tiled as the cache
        ((8, 4), 64, 128, jnp.bfloat16, False),
        ((8, 4), 256, 128, jnp.bfloat16, False),
        ((8, 4), 128, 160, jnp.bfloat16, False),  # a part of a page
        ((8, 4), 128, 1 << 19, jnp.bfloat16, False),
        ((8, 4), 128, 128, jnp.float16, False),
        ((128, 4), 128, 128, jnp.bfloat16, False),  # too much for the scratch
    ],
)
def test_supported_shapes(heads: tuple[int, int], width: int, capacity: int, dtype: Any, taken: bool) -> None:
    q, kv = (1, 8, heads[0], width), (2, 1, capacity, 2, heads[1], width)
    assert tpu_bits.supports(jax.ShapeDtypeStruct(q, dtype), jax.ShapeDtypeStruct(kv, dtype)) == taken  # pyright: ignore
