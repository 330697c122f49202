"""The GPU bodies of select_bits, interpreted on the CPU.

Interpret mode cannot run the inline parts of `gpu_filter` and `gpu_emit`: there plain twins take their place, with keys
in their own order. The benchmark on the GPU compares the whole with the reference before it times.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax._src.pallas.mosaic_gpu.interpret.params import InterpretGPUParams  # no public name in JAX 0.10.2

from kernels_pallas.common import pack_bits
from kernels_pallas.index_select import (
    gpu_bits,
    gpu_bound,
    gpu_emit,
    gpu_filter,
    gpu_kth,
    gpu_score,
    gpu_topk,
    reference,
)

KTH = gpu_kth.Tuning(warps=1)
SCORE = gpu_score.Tuning(programs=1, slots=128, spare=24)
"""So little room that a row of 400 equal scores is left."""
ROWS, S, K = 64, 2048, 24
LISTS, ROOM = 8, 64


topk_mask = jax.jit(reference.topk_mask, static_argnums=2)


def lists_of(scores: jax.Array, seen: jax.Array, bounds: jax.Array) -> tuple[jax.Array, jax.Array]:
    """What `gpu_score.candidates` leaves of rows of scores: quarters of tiles in turn."""
    hit = (jnp.arange(S) < seen[:, None]) & (scores >= bounds[:, None])
    hit = hit.reshape(-1, S // 256, LISTS, 32).swapaxes(1, 2).reshape(-1, LISTS, S // LISTS)
    keys = jnp.arange(S).reshape(S // 256, LISTS, 32).swapaxes(0, 1).reshape(LISTS, -1)
    keys = jnp.broadcast_to(keys, hit.shape)
    bits = jax.lax.bitcast_convert_type(jnp.take_along_axis(scores[:, None], keys, axis=2), jnp.int32)
    row, n, _ = jnp.indices(hit.shape)
    at = jnp.where(hit, jnp.cumsum(hit, axis=2) - 1, ROOM)
    # What lies behind a list has been there before.
    lists = jnp.full((scores.shape[0], LISTS, ROOM, 2), 0x7F000000, jnp.int32)
    lists = lists.at[row, n, at].set(jnp.stack([bits, keys], axis=-1), mode="drop")
    sizes = hit.sum(axis=2)
    return lists, jnp.where(sizes > ROOM, gpu_filter.FULL, sizes)


@partial(jax.jit, static_argnums=(2, 3))
def select(scores: jax.Array, start: jax.Array, chunk: int, whole: bool) -> tuple[jax.Array, jax.Array]:
    """Rows of scores, the second block of `start`'s → their bits, [ROWS, S // 32], and which of them the candidates
    left, [ROWS]. Only `whole` runs `gpu_emit`, which takes long in interpret mode."""
    first, total = jnp.ones(1, jnp.int32), start.shape[0] * chunk
    places, stride = gpu_bound.sample(start, chunk, S)
    sampled = scores[:, places[1]]  # the tests' rows are those of the second sequence
    bounds = gpu_bound.bounds(sampled, stride, start, first, total, chunk, S, K, interpret=True)
    seen = start[1] + jnp.arange(ROWS) + 1
    lists, sizes = lists_of(scores, seen, bounds)
    kth, cut = gpu_kth.thresholds(lists, sizes, start, first, total, chunk, S, K, KTH, True)
    if whole:
        part = gpu_emit.emit(lists, sizes, kth, cut, start, first, total, chunk, S, K, InterpretGPUParams())
    else:
        few, kth, cut = (seen <= K)[:, None], kth[:, None], cut[:, None]
        best = (scores > kth) | ((scores == kth) & (jnp.arange(S) < cut))
        part = pack_bits((jnp.arange(S) < seen[:, None]) & (few | best))
        cut = cut[:, 0]
    left = jnp.where(jnp.arange(total) < ROWS, 0, jnp.tile(cut == gpu_kth.LEFT, total // ROWS)).astype(jnp.int32)
    bits = jnp.full((total, S // 32), 0xA5, jnp.uint32).at[ROWS:].set(part)
    bits, _ = gpu_topk.select_rows(scores, bits, start, first, left, chunk, K, True)
    return bits[ROWS:], left[ROWS:]


@partial(jax.jit, static_argnums=4)
def count(
    scores: jax.Array, bits: jax.Array, start: jax.Array, wanted: jax.Array, chunk: int
) -> tuple[jax.Array, jax.Array]:
    return gpu_topk.select_rows(scores, bits, start, jnp.ones(1, jnp.int32), wanted, chunk, K, True)


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
"""Where more scores tie with the k-th than the lists have room for."""


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("start", [0, 5, 100, 480, S - ROWS])
def test_rows(kind: str, start: int) -> None:
    """Ragged starts; rows that see at most topk keys, and rows that see nearly all or all of them. They are the second
    block of a batch of two sequences."""
    scores = jnp.asarray(rows_of(kind, np.random.default_rng(start)), jnp.float32)
    visible = jnp.arange(S) <= start + jnp.arange(ROWS)[:, None]
    expected = pack_bits(topk_mask(scores, visible, K))
    actual, left = select(scores, jnp.array([900, start], jnp.int32), ROWS, (kind, start) == ("few values", 5))
    np.testing.assert_array_equal(actual, expected)
    if kind in TIED and start == S - ROWS:
        assert left.any()
    if kind not in TIED:
        assert not left.any()


@pytest.mark.parametrize("kind", KINDS)
def test_rows_that_are_left(kind: str) -> None:
    """Each third row is selected from its scores, the others keep what they have, and so do rows that see at most topk
    keys, which are never left."""
    scores = jnp.asarray(rows_of(kind, np.random.default_rng(1)), jnp.float32)
    wanted = jnp.arange(2 * ROWS) % 3 == 0
    before = jnp.full((2 * ROWS, S // 32), 0xA5, jnp.uint32)
    for start in (7, 1000):
        visible = jnp.arange(S) <= start + jnp.arange(ROWS)[:, None]
        expected = pack_bits(topk_mask(scores, visible, K))
        mine = wanted[ROWS:, None] & (visible.sum(axis=1, keepdims=True) > K)
        starts = jnp.array([900, start], jnp.int32)
        bits, following = count(scores, before, starts, wanted.astype(jnp.int32), ROWS)
        np.testing.assert_array_equal(bits, jnp.concatenate([before[:ROWS], jnp.where(mine, expected, before[ROWS:])]))
        assert following[0] == 2


def structured(kind: str, period: int, rng: np.random.Generator, n: int) -> np.ndarray:
    """[n] scores of the keys of one query."""
    i, noise = np.arange(n), rng.normal(size=n)
    match kind:
        case "periodic":  # a few residues hold the best
            return 0.1 * noise + 3.0 * (i % period < max(period // 20, 1))
        case "clustered":
            return np.repeat(rng.normal(size=-(-n // period)), period)[:n] + 1e-3 * noise
        case "sorted":
            return np.sort(noise) * rng.choice([-1, 1])
        case "one place":
            return noise + 5.0 * ((i >= 16 * period) & (i < 16 * period + 700))
    return noise


@settings(max_examples=40, deadline=None)
@given(
    kind=st.sampled_from(["periodic", "clustered", "sorted", "one place", "normal"]),
    period=st.sampled_from([2, 8, 24, 31, 32, 33, 64, 96, 256, 1000]),
    start=st.integers(0, 2**15 - 8),
    seed=st.integers(0, 2**32 - 1),
)
def test_bounds_keep_the_best(kind: str, period: int, start: int, seed: int) -> None:
    """Whatever repeats in step with the sample or lies together, at least topk scores reach the bound, and not many
    more: where the lists would not hold them, the whole row would be scored a second time."""
    capacity, chunk, topk = 2**15, 8, 512
    rng = np.random.default_rng(seed)
    scores = np.stack([structured(kind, period, rng, capacity) for _ in range(chunk)]).astype(np.float32)
    bounds = np.asarray(_bounds(jnp.asarray(scores), jnp.array([start], jnp.int32), chunk, topk))
    for row in range(chunk):
        seen = start + row + 1
        reached = (scores[row, :seen] >= bounds[row]).sum()
        if seen <= topk:
            assert reached == 0
        else:
            assert topk <= reached <= 4 * topk + period


@partial(jax.jit, static_argnums=(2, 3))
def _bounds(scores: jax.Array, start: jax.Array, chunk: int, topk: int) -> jax.Array:
    capacity, first = scores.shape[1], jnp.zeros(1, jnp.int32)
    places, stride = gpu_bound.sample(start, chunk, capacity)
    sampled = scores[:, places[0]]
    return gpu_bound.bounds(sampled, stride, start, first, chunk, chunk, capacity, topk, interpret=True)


@given(
    start=st.integers(0, 2**18),
    chunk=st.sampled_from([64, 512, 8192]),
    tiles=st.sampled_from([1, 8, 15, 16, 17, 255, 256, 257, 2048]),
)
@settings(max_examples=40, deadline=None)
def test_sampled_keys(start: int, chunk: int, tiles: int) -> None:
    """One key of each stride, as many as were said, at least 1,024 where there are as many, all of few."""
    capacity = 128 * tiles
    places, stride = (np.asarray(x) for x in gpu_bound.sample(jnp.array([start], jnp.int32), chunk, capacity))
    seen, n = min(start + chunk, capacity), places.shape[1]
    used = seen // stride[0]
    assert n % gpu_filter.TILE == 0
    assert min(seen, gpu_bound.FEWEST) <= used <= n
    np.testing.assert_array_equal(places[0, :used] // stride[0], np.arange(used))


def test_arranged_keys() -> None:
    """Thread q of a quad holds columns 8i + 2q and 8i + 2q + 1 of each tile: with its neighbour whole units."""
    keys = jnp.arange(512, dtype=jnp.int32).reshape(1, 512, 1)
    columns = np.asarray(gpu_filter.arrange(keys))[0, 0].reshape(4, 16, 4, 2)  # tile, i, q, b
    for tile, q, group, unit in np.ndindex(4, 4, 4, 2):
        held = columns[tile, 4 * group + 2 * unit : 4 * group + 2 * unit + 2, q].ravel()
        p = q ^ tile
        first = 128 * tile + 32 * group + 8 * (p // 2 * 2 + unit) + 4 * (p % 2)
        np.testing.assert_array_equal(held, first + np.arange(4))


@pytest.mark.parametrize(
    ("dtype", "B", "C", "J", "start"),
    [(jnp.float8_e4m3fn, 2, 7, 4, (490, 9)), (jnp.bfloat16, 1, 130, 3, (382,))],
    ids=["fp8, two sequences", "bf16, a last call that is not full"],
)
def test_whole(
    dtype: jnp.dtype, B: int, C: int, J: int, start: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Small integers, so that float32 sums are exact: padded chunks and heads, ragged starts, a layer that is not 0, an
    even and an odd number of heads. The scores of each fifth query are all zero, too many for its lists if it sees most
    keys: such rows are left, others of their blocks are not."""
    rng = np.random.default_rng(0)
    I, L, capacity = 16, 2, 512  # noqa: E741

    def integers(*shape: int) -> jax.Array:
        return jnp.asarray(rng.integers(-3, 4, shape), jnp.float32)

    idx_q, idx_k = integers(B, C, J, I).astype(dtype), integers(L, B, capacity, I).astype(dtype)
    weights = integers(B, C, J) * (jnp.arange(C) % 5 != 1)[:, None]
    scale = 2.0 ** integers(L, B, capacity) if dtype == jnp.float8_e4m3fn else None
    args = idx_q, weights, idx_k, scale, jnp.int32(1), jnp.array(start, jnp.int32)
    expected = reference.select_bits(*args, K)
    left = []
    select_rows = gpu_topk.select_rows

    def watched(*args: Any) -> Any:
        jax.debug.callback(lambda rows: left.append(np.asarray(rows)), args[4])
        return select_rows(*args)

    monkeypatch.setattr(gpu_topk, "select_rows", watched)
    tuning = gpu_bits.Tuning(128, 64 * capacity, SCORE, SCORE, KTH)
    select = jax.jit(partial(gpu_bits.select_bits, topk=K, tuning=tuning, interpret=InterpretGPUParams()))
    actual = select(*args)
    np.testing.assert_array_equal(actual, expected)
    jax.effects_barrier()
    marked = left[0].reshape(B, -1)[0, :C]
    assert marked[C - C % 5 - 4]
    assert not marked.all()


def test_lists_of_a_tile() -> None:
    """The twin of the inline filter: of each row the keys that it sees whose scores reach the bound, once each."""
    rng = np.random.default_rng(2)
    scores = jnp.asarray(rng.normal(size=(64, 128)), jnp.float32)
    bounds = jnp.asarray(rng.normal(size=64), jnp.float32).at[3].set(jnp.inf).at[4].set(-jnp.inf)
    sizes, lists = _Ref(jnp.zeros((64, 4), jnp.int32).at[:, 2].set(5)), _Ref(jnp.zeros((64, 4, 40, 2), jnp.int32))

    def append(key: jax.Array, *refs: _Ref) -> None:
        @jax.jit
        def run(*values: jax.Array) -> list[jax.Array]:
            inner = [_Ref(value) for value in values]
            gpu_filter.append_plainly(scores, key, jnp.int32(100), *inner)
            return [ref.value for ref in inner]

        for ref, value in zip(refs, run(*(ref.value for ref in refs)), strict=True):
            ref.value = value

    append(jnp.int32(256), _Ref(bounds), sizes, lists)
    expected = (scores >= bounds[:, None]) & (jnp.arange(128) < 100 + jnp.arange(64)[:, None])
    length, listed = np.asarray(sizes.value), np.asarray(lists.value)
    for row in range(64):
        pairs = np.concatenate([listed[row, q, (5 if q == 2 else 0) : length[row, q]] for q in range(4)])
        np.testing.assert_array_equal(pairs[:, 1], 256 + np.flatnonzero(expected[row]))
        np.testing.assert_array_equal(pairs[:, 0].view(np.float32), np.asarray(scores)[row, pairs[:, 1] - 256])
    sizes.value = sizes.value.at[:, 1].set(9)  # a tile might not find room behind these
    append(jnp.int32(384), _Ref(bounds), sizes, lists)
    assert (sizes.value[:, 1] == gpu_filter.FULL).all()


class _Ref:
    """A reference as a kernel sees it."""

    def __init__(self, value: jax.Array) -> None:
        self.value = value

    @property
    def shape(self) -> tuple[int, ...]:
        return self.value.shape

    def __getitem__(self, index: object) -> jax.Array:
        return self.value

    def __setitem__(self, index: object, value: jax.Array) -> None:
        self.value = value


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
    assert not supports(S=16384, topk=4096)  # more than a row's lists hold
