"""The GPU bodies of select_bits, interpreted on the CPU.

Interpret mode cannot run the inline part of `gpu_score` that permutes and stores registers: there the kernel takes keys
in their own order and stores plainly. The benchmark on the GPU compares the whole with the reference before it times.
"""

from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # no public name in JAX 0.10.2

from kernels_pallas.common import pack_bits
from kernels_pallas.index_select import (
    gpu_bits,
    gpu_resident,
    gpu_score,
    gpu_threshold,
    gpu_topk,
    gpu_units,
    reference,
)

TOPK = gpu_threshold.Tuning(warps=1, groups=8, held=128, sample=64)
"""So small that a row of 2,048 keys takes every path: units listed or not, candidates that find room or do not."""
RESIDENT = gpu_resident.Tuning(warps=1, units=gpu_units.Tuning(warps=1))
TUNING = gpu_bits.Tuning(rows=128, score=gpu_score.Tuning(warpgroups=2, programs=1), resident=RESIDENT, topk=TOPK)
ROWS, S, K = 64, 2048, 24


topk_mask = jax.jit(reference.topk_mask, static_argnums=2)


@partial(jax.jit, static_argnums=(3, 4))
def select(
    scores: jax.Array, start: jax.Array, first: jax.Array, chunk: int, resident: bool
) -> tuple[jax.Array, jax.Array]:
    """Rows of scores → bits of `first`'s rows, [ROWS, S // 32], and which of them `gpu_resident` left, [ROWS]."""
    tops = scores.reshape(-1, S // 8, 8).max(2)
    maxima = tops[:, gpu_score.unit_at(jnp.arange(S // 8))]
    bits = jnp.full((start.shape[0] * chunk, S // 8), 0xA5, jnp.uint8)  # what was there before must go
    left = jnp.ones(ROWS, jnp.int32)
    if resident:
        bits, left = gpu_resident.select_rows(scores, maxima, bits, start, first, chunk, K, RESIDENT, interpret=True)
    bits = gpu_topk.select_rows(scores, maxima, bits, start, first, left, chunk, K, TOPK, interpret=True)
    words = jax.lax.bitcast_convert_type(bits.reshape(-1, S // 32, 4), jnp.uint32)
    return jax.lax.dynamic_slice_in_dim(words, first[0] * ROWS, ROWS), left


def rows_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    """[ROWS, S] scores."""
    normal = rng.normal(size=(ROWS, S))
    match kind:
        case "normal":
            return normal
        case "negative":
            return -np.abs(normal)
        case "equal":
            return np.full((ROWS, S), -3.5)
        case "zeros":
            return np.where(normal < 0, -0.0, 0.0)
        case "few values":
            return rng.integers(-1, 2, (ROWS, S))
        case "mostly one value":
            return np.where(rng.random((ROWS, S)) < 0.98, 0.0, normal)
        case "clustered":
            return np.repeat(rng.normal(size=(ROWS, S // 16)), 16, axis=1) + 1e-3 * normal
        case "rising":
            return np.arange(S) + 0 * normal
        case "falling":
            return -np.arange(S) + 0 * normal
        case "minus infinity":
            return np.where(rng.random((ROWS, S)) < 0.99, -np.inf, normal)
        case "one place":
            return normal + 10 * (np.abs(np.arange(S) - 700) < 90)
        case "huge":
            return rng.choice([3e38, -3e38, 2.0**-126, 0.0, 1.0], (ROWS, S))
    raise ValueError(kind)


KINDS = (
    "normal", "negative", "equal", "zeros", "few values", "mostly one value", "clustered", "rising", "falling",
    "minus infinity", "one place", "huge",
)  # fmt: skip


TIED = ("equal", "zeros", "few values", "mostly one value", "minus infinity", "huge")
"""Where more units tie with the k-th than a list has room for."""


@pytest.mark.parametrize("resident", [True, False])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 5, 100, 480, S - ROWS])
def test_rows(kind: str, start: int, resident: bool) -> None:
    """Ragged starts; rows that see at most topk keys, and rows that see nearly all or all of them. They are the second
    block of a batch of two sequences."""
    scores = jnp.asarray(rows_of(kind, np.random.default_rng(start)), jnp.float32)
    visible = jnp.arange(S) <= start + jnp.arange(ROWS)[:, None]
    expected = pack_bits(topk_mask(scores, visible, K))
    actual, left = select(scores, jnp.array([900, start], jnp.int32), jnp.ones(1, jnp.int32), ROWS, resident)
    np.testing.assert_array_equal(actual, expected)
    if resident and (kind not in TIED or start == 0):
        assert not left.any()


def test_rows_of_too_many_keys_are_left() -> None:
    """A lane holds so many maxima: what has more is marked for `gpu_topk`, and not touched."""
    few = gpu_resident.Tuning(warps=1, units=gpu_units.Tuning(warps=1, most=S // 8 // 32 - 1))
    bits = jnp.full((ROWS, S // 8), 0xA5, jnp.uint8)
    scores, maxima = jnp.zeros((ROWS, S)), jnp.zeros((ROWS, S // 8))
    zero = jnp.zeros(1, jnp.int32)
    actual, left = gpu_resident.select_rows(scores, maxima, bits, zero, zero, ROWS, K, few, interpret=True)
    np.testing.assert_array_equal(actual, bits)
    assert left.all()


def test_arranged_keys_and_units() -> None:
    """Thread q of a quad holds columns 8i + 2q and 8i + 2q + 1 of each tile: with its neighbour two whole units."""
    keys = jnp.arange(256, dtype=jnp.int32).reshape(1, 256, 1)
    columns = np.asarray(gpu_score.arrange(keys))[0, 0].reshape(2, 16, 4, 2)  # tile, i, q, b
    for tile, q, group, unit in np.ndindex(2, 4, 4, 2):
        held = columns[tile, 4 * group + 2 * unit : 4 * group + 2 * unit + 2, q].ravel()
        first = 128 * tile + 32 * group + 8 * (q // 2 * 2 + unit) + 4 * (q % 2)
        np.testing.assert_array_equal(held, first + np.arange(4))
        if unit == q % 2:  # the thread stores this unit's maximum as its `group`-th
            assert gpu_score.unit_at(jnp.int32(16 * tile + 4 * q + group)) == first // 8


@pytest.mark.parametrize(
    ("dtype", "B", "C", "J", "start"),
    [(jnp.float8_e4m3fn, 2, 7, 4, (120, 9)), (jnp.bfloat16, 1, 130, 3, (50,))],
    ids=["fp8, two sequences", "bf16, a last call that is not full"],
)
def test_whole(dtype: jnp.dtype, B: int, C: int, J: int, start: tuple[int, ...]) -> None:
    """Small integers, so that float32 sums are exact: padded chunks and heads, ragged starts, a layer that is not 0, an
    even and an odd number of heads."""
    rng = np.random.default_rng(0)
    I, L, capacity = 16, 2, 256  # noqa: E741

    def integers(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)

    idx_q, idx_k = integers(B, C, J, I).astype(dtype), integers(L, B, capacity, I).astype(dtype)
    scale = 2.0 ** integers(L, B, capacity) if dtype == jnp.float8_e4m3fn else None
    args = idx_q, integers(B, C, J), idx_k, scale, jnp.int32(1), jnp.array(start, jnp.int32)
    expected = reference.select_bits(*args, K)
    actual = gpu_bits.select_bits(*args, K, TUNING, InterpretGPUParams())
    np.testing.assert_array_equal(actual, expected)


def test_supports() -> None:
    def supports(dtype: str = "bfloat16", J: int = 16, I: int = 64, S: int = 4096, topk: int = 2048) -> bool:  # noqa: E741
        q = jnp.zeros((1, 1, J, I), dtype)
        return gpu_bits.supports(q, jnp.zeros((1, 1, S, I), dtype), topk)

    assert supports()
    assert supports("float8_e4m3fn", J=4, I=16)
    assert not supports("float32")
    assert not supports(J=32)
    assert not supports(I=128)
    assert not supports(S=4000)
    assert not supports(topk=4096)
    assert not supports(S=16384, topk=4096)  # more than a row's list holds
