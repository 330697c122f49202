"""The GPU bodies of attend_bits, interpreted on the CPU, against the reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams

from kernels_pallas.common import MASKED, pack_bits
from kernels_pallas.sparse_attention import gpu_bits, gpu_lists, gpu_shared, reference

Inputs = tuple[jax.Array, jax.Array, jax.Array, jax.Array]

SMALL = gpu_lists.Tuning(words=8, steps=2, parts=1)
# float32: sums of at most 512 terms of size one; bfloat16: the result, about one, is rounded to 8 bits.
BOUNDS = {jnp.float32: 1e-5, jnp.bfloat16: 2e-2}


def inputs(seed: int, heads: int, kv_heads: int, width: int, mask: np.ndarray, dtype: Any) -> Inputs:
    B, C, S = mask.shape
    rng = np.random.default_rng(seed)
    q = jnp.asarray(rng.standard_normal((B, C, heads, width)), dtype)
    kv = jnp.asarray(rng.standard_normal((2, B, S, 2, kv_heads, width)), dtype)
    return q, kv, jnp.int32(1), pack_bits(jnp.asarray(mask))


def causal(start: np.ndarray, chunk: int, capacity: int) -> np.ndarray:
    return np.arange(capacity) <= start[:, None, None] + np.arange(chunk)[:, None]


def interpreted(*args: jax.Array, wide: float = 7.0, most: int | None = None) -> jax.Array:
    tuning = gpu_bits.Tuning(wide=wide, lists=SMALL, shared_lists=SMALL)
    return gpu_bits.attend_bits(*args, most=most, tuning=tuning, interpret=InterpretGPUParams())


compiled = jax.jit(interpreted)
listed_by_halves = jax.jit(partial(gpu_lists.list_halves, tuning=SMALL, interpret=True), static_argnames="half")


def assert_equals_reference(args: Inputs, start: np.ndarray, **kwargs: Any) -> None:
    # The interpreter of Mosaic kernels calls back from several threads at once: it deadlocks within a larger program.
    attend = interpreted if gpu_shared.supports(*args[:2]) else compiled
    actual = attend(*args, jnp.asarray(start), **kwargs)
    expected = reference.attend_bits(*args, jnp.asarray(start))
    assert actual.dtype == expected.dtype
    assert actual.shape == expected.shape
    bound = BOUNDS[args[0].dtype.type]
    np.testing.assert_allclose(actual.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=bound)


# Eight, four and one query heads a KV head: blocks of 2, 4 and 16 queries.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "dtype"),
    [(16, 2, 32, jnp.bfloat16), (8, 2, 32, jnp.float32), (2, 2, 16, jnp.float32)],
)
def test_small_blocks(heads: int, kv_heads: int, width: int, dtype: Any) -> None:
    """Sequences of different lengths, a chunk that fills no block, queries that see everything, one key or none."""
    start = np.array([0, 203], np.int32)
    mask = causal(start, 21, 256) & (np.random.default_rng(1).random((2, 21, 256)) < 0.2)
    mask[1, 3] = False
    mask[1, 5] = np.arange(256) == 77
    mask[1, 20] = causal(start, 21, 256)[1, 20]
    assert_equals_reference(inputs(0, heads, kv_heads, width, mask, dtype), start)


# The published model's heads too: parts are attended to in small blocks only.
@pytest.mark.parametrize(
    ("heads", "kv_heads", "width", "dtype", "size"),
    [
        (8, 1, 128, jnp.bfloat16, 1),
        (8, 2, 32, jnp.float32, 1),
        (2, 2, 16, jnp.float32, 1e6),
    ],
)
def test_parts_of_a_sequence(heads: int, kv_heads: int, width: int, dtype: Any, size: float) -> None:
    """Log-sum-exps, where this part of the keys ends before the chunk, lies in it, or holds nothing visible; queries
    that see one key or nothing of it."""
    start = np.array([300, -9, -100], np.int32)
    mask = causal(start, 21, 256) & (np.random.default_rng(3).random((3, 21, 256)) < 0.2)
    mask[0, 4] = False
    mask[0, 6] = np.arange(256) == 255
    mask[1, 9] = np.arange(256) == 0
    q, kv, layer, bits = inputs(7, heads, kv_heads, width, mask, dtype)
    args = q, kv.at[:, :, :, 0].multiply(size), layer, bits, jnp.asarray(start)
    out, lse = jax.jit(partial(gpu_bits.attend_bits_lse, tuning=gpu_bits.Tuning(lists=SMALL), interpret=True))(*args)
    expected, expected_lse = reference.attend_bits_lse(*args)
    assert out.dtype == lse.dtype == jnp.float32
    np.testing.assert_allclose(out, expected, rtol=0, atol=BOUNDS[dtype])
    # float32 sums of at most 256 exponentials, and scores, whose terms are as large as the keys.
    np.testing.assert_allclose(lse, expected_lse, rtol=0, atol=2e-5 + 2e-6 * size)
    seen = mask.any(-1)
    assert np.all(np.asarray(lse)[~seen] == np.float32(MASKED))
    assert not np.asarray(out)[~seen].any()


@pytest.mark.parametrize("size", [0.0, 1e6])
def test_equal_and_large_scores(size: float) -> None:
    """Equal scores are averaged; scores of a million make the softmax one-hot and do not overflow."""
    start = np.array([11, 230], np.int32)
    mask = causal(start, 21, 256)
    q, kv, layer, bits = inputs(2, 8, 2, 32, mask, jnp.float32)
    assert_equals_reference((q, kv.at[:, :, :, 0].multiply(size), layer, bits), start)


def test_shared_unions_and_small_blocks_side_by_side() -> None:
    """Of 35 queries, 16 agree over more tiles than there are buffers, 16 do not agree, 3 are left over. Some select
    one key or nothing."""
    start = np.array([347], np.int32)
    rng = np.random.default_rng(4)
    mask = np.zeros((1, 35, 384), bool)
    mask[0, :16, :340] = rng.random((16, 340)) < 0.9
    mask[0, 3] = False
    mask[0, 7] = np.arange(384) == 300
    mask[0, 16:32] = np.arange(384) % 16 == np.arange(16)[:, None]
    mask[0, 32:] = rng.random(384) < 0.3
    mask &= causal(start, 35, 384)
    args = inputs(5, 8, 1, 128, mask, jnp.bfloat16)
    assert_equals_reference(args, start, wide=4.0, most=400)


@pytest.mark.parametrize("queries", [2, 16])
def test_lists(queries: int) -> None:
    start = np.array([471, 9], np.int32)
    mask = causal(start, 21, 512) & (np.random.default_rng(6).random((2, 21, 512)) < 0.3)
    mask[0, 4:6] = False
    lists, own = gpu_lists.list_keys(
        pack_bits(jnp.asarray(mask)),
        jnp.asarray(start),
        None,
        queries=queries,
        capacity=512,
        tuning=SMALL,
        interpret=True,
    )
    n = -(-21 // queries)
    blocks = np.pad(mask, ((0, 0), (0, n * queries - 21), (0, 0))).reshape(2, n, queries, 512)
    np.testing.assert_array_equal(own, blocks[:, :, -1].sum(-1))
    for b, i in np.ndindex(2, n):
        keys = np.nonzero(blocks[b, i].any(0))[0]
        filled = max(-(-len(keys) // gpu_lists.PAD), 1) * gpu_lists.PAD
        ids, members = (np.asarray(x[b, i, :filled]) for x in lists[:2])
        assert lists.counts[b, i] == len(keys)
        np.testing.assert_array_equal(ids, np.pad(keys, (0, filled - len(keys))))
        bits = (blocks[b, i][:, keys] << np.arange(queries)[:, None]).sum(0)
        np.testing.assert_array_equal(members, np.pad(bits, (0, filled - len(keys))))


def test_lists_that_nobody_wants_are_empty() -> None:
    mask = causal(np.array([200]), 32, 256)
    lists, _ = gpu_lists.list_keys(
        pack_bits(jnp.asarray(mask)),
        jnp.array([200], jnp.int32),
        jnp.array([[False, True]]),
        queries=4,
        capacity=256,
        tuning=SMALL,
        interpret=True,
    )
    np.testing.assert_array_equal(lists.counts[0], [0] * 4 + [220, 224, 228, 232])


def test_lists_end_at_their_room() -> None:
    mask = causal(np.array([250]), 2, 256)
    lists, _ = gpu_lists.list_keys(
        pack_bits(jnp.asarray(mask)),
        jnp.array([250], jnp.int32),
        None,
        queries=2,
        capacity=128,
        tuning=SMALL,
        interpret=True,
    )
    assert lists.counts[0, 0] == 128
    np.testing.assert_array_equal(lists.ids[0, 0], np.arange(128))


def halves(mask: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The keys of a block [<= 16, S] that only its first half selects, both, only the second."""
    one, two = mask[:8].any(0), mask[8:].any(0)
    return np.nonzero(one & ~two)[0], np.nonzero(one & two)[0], np.nonzero(two & ~one)[0]


@given(seed=st.integers(0, 99), density=st.sampled_from([0.0, 0.01, 0.1, 0.5]))
@settings(max_examples=10, deadline=None)
@example(seed=0, density=0.1)
@example(seed=0, density=0.5)
def test_lists_by_halves(seed: int, density: float) -> None:
    """Each kind of keys at its place; of more keys than there is room for, no count leads outside."""
    rng, start, room = np.random.default_rng(seed), np.array([471, 9], np.int32), 384
    mask = causal(start, 37, 512) & (rng.random((2, 37, 512)) < density)
    mask[0, 16:24] = False
    lists, own = listed_by_halves(pack_bits(jnp.asarray(mask)), jnp.asarray(start), half=room)
    blocks = np.pad(mask, ((0, 0), (0, 48 - 37), (0, 0))).reshape(2, 3, 16, 512)
    np.testing.assert_array_equal(own, blocks[:, :, -1].sum(-1))
    for b, i in np.ndindex(2, 3):
        front, both, back = halves(blocks[b, i])
        found = np.asarray(lists.counts[b, i])
        if len(front) + len(both) > room or len(back) > room:
            assert min(found) >= 0
            assert found[0] + found[1] <= room
            assert found[2] <= room
            continue
        np.testing.assert_array_equal(found, [len(front), len(both), len(back)])
        keys = np.concatenate([front, both[::-1], back])
        used = np.r_[: len(front), room - len(both) : room + len(back)]
        np.testing.assert_array_equal(lists.ids[b, i][used], keys)
        members = (blocks[b, i][:, keys] << np.arange(16)[:, None]).sum(0)
        np.testing.assert_array_equal(lists.members[b, i][used], members)


@pytest.mark.slow
def test_shapes_of_a_union() -> None:
    """More of one half's keys than of the other's, in more units than there is room for at a time; nothing but whole
    tiles of either half; a block that is not full and has no keys."""
    start, S = np.array([512], np.int32), 640
    mask, rng = np.zeros((1, 35, S), bool), np.random.default_rng(11)
    kinds = [(300, 50, 150), (128, 0, 128), (0, 0, 0)]
    for block, (front, both, back) in enumerate(kinds):
        keys = np.split(rng.permutation(512), np.cumsum([front, both, back]))
        rows = mask[0, block * 16 : block * 16 + 16]
        for first, own in ((0, (keys[0], keys[1])), (8, (keys[1], keys[2]))):
            for query in rows[first : first + 8]:
                query[np.concatenate(own)] = rng.random(sum(map(len, own))) < 0.4
    mask[0, 3] = False
    q, kv, layer, bits = inputs(12, 8, 1, 128, mask, jnp.bfloat16)
    lists, _ = listed_by_halves(bits, jnp.asarray(start), half=S)
    skip = jnp.zeros((1, len(kinds)), bool)
    out = gpu_shared.attend(q, kv, layer, lists, skip, tuning=gpu_shared.Tuning(), interpret=InterpretGPUParams())
    expected = reference.attend_bits(q, kv, layer, bits, jnp.asarray(start))
    np.testing.assert_allclose(out.astype(jnp.float32), expected.astype(jnp.float32), rtol=0, atol=BOUNDS[jnp.bfloat16])


@pytest.mark.parametrize(
    ("q", "kv", "dtype", "taken"),
    [
        ((1, 8, 32, 128), (2, 1, 64, 2, 4, 128), jnp.bfloat16, True),
        ((1, 8, 32, 128), (2, 1, 64, 2, 4, 128), jnp.float16, False),
        ((1, 8, 32, 8), (2, 1, 64, 2, 4, 8), jnp.float32, False),  # too narrow for a product
        ((1, 8, 24, 128), (2, 1, 64, 2, 4, 128), jnp.bfloat16, False),  # 6 query heads a KV head
    ],
)
def test_supported_shapes(q: tuple[int, ...], kv: tuple[int, ...], dtype: Any, taken: bool) -> None:
    assert gpu_bits.supports(jax.ShapeDtypeStruct(q, dtype), jax.ShapeDtypeStruct(kv, dtype)) == taken  # pyright: ignore
