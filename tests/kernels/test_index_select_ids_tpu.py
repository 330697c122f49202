"""The TPU body of select_ids, interpreted on the CPU with its copies and semaphores, against the reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.index_select import reference, tpu_ids

LAYERS, LAYER, TOPK = 2, 1, 300
TUNING = tpu_ids.Tuning(tile=1024)
CAPACITY = tpu_ids.BLOCK + 3 * 1024 + 128  # the last block and tile are not full
expected = jax.jit(reference.select_ids, static_argnums=6)


@partial(jax.jit, static_argnums=(6, 7))
def interpreted(*arguments: Any) -> jax.Array:
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return tpu_ids.select_ids(*arguments[:7], tuning=arguments[7], interpret=interpret)


def check(*arguments: Any, tuning: tpu_ids.Tuning = TUNING) -> None:
    actual = jax.block_until_ready(interpreted(*arguments, tuning))
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    np.testing.assert_array_equal(actual, expected(*arguments))


@pytest.mark.parametrize(
    ("heads", "size", "capacity", "dtype", "start", "topk"),
    [
        # Sequences of different lengths: to the last key, inside the first tile, at most topk keys.
        (16, 64, 5 * 1024 + 128, jnp.float8_e4m3fn, [5 * 1024 + 127, 600, 63], 64),
        # Heads that are no power of two; topk passed by one key.
        (5, 16, 256, jnp.bfloat16, [255, 120], 120),
        (1, 8, 128, jnp.float32, [127, 0], 1),
    ],
)
def test_ragged(heads: int, size: int, capacity: int, dtype: Any, start: list[int], topk: int) -> None:
    """Small integers and powers of two: float32 sums are exact, and equal scores are everywhere."""
    rng = np.random.default_rng(0)
    B = len(start)
    scale = None
    if dtype == jnp.float8_e4m3fn:
        scale = jnp.asarray(2.0 ** rng.integers(-2, 3, (LAYERS, B, capacity)), jnp.float32)
    arguments = (
        jnp.asarray(rng.integers(-3, 4, (B, 1, heads, size)), dtype),
        jnp.asarray(rng.integers(-2, 3, (B, 1, heads)), jnp.float32),
        jnp.asarray(rng.integers(-3, 4, (LAYERS, B, capacity, size)), dtype),
        scale,
        jnp.int32(LAYER),
    )
    check(*arguments, jnp.asarray(start, jnp.int32), topk)


def test_every_finite_byte_as_fnuz() -> None:
    """Chips that unpack e4m3b11fnuz only: subnormals, both zeros and the largest numbers count as what they are."""
    finite = np.array([byte for byte in range(256) if byte & 0x7F != 0x7F], np.uint8)
    rng = np.random.default_rng(0)
    keys = rng.choice(finite, (LAYERS, 1, 512, 32)).view(jnp.float8_e4m3fn)
    keys[:, :, 100:164, 0] = np.array(-0.0, jnp.float8_e4m3fn)
    q = np.zeros((1, 1, 2, 32))
    # One number of a key at a time, of either sign: scores are exact, and say which byte it was.
    q[0, 0, :, 0] = 1, -1
    weights, scale = jnp.asarray([[[1.0, -1.0]]]), jnp.ones((LAYERS, 1, 512), jnp.float32)
    arguments = jnp.asarray(q, jnp.float8_e4m3fn), weights, jnp.asarray(keys), scale, jnp.int32(LAYER)
    for topk in (60, 256, 300):
        check(*arguments, jnp.asarray([511], jnp.int32), topk, tuning=tpu_ids.Tuning(tile=1024, fnuz=True))


def scores_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    normal = rng.normal(size=CAPACITY)
    match kind:
        case "normal":
            return normal
        case "equal":
            return np.full(CAPACITY, -3.5)
        case "few values":
            return rng.integers(-1, 2, CAPACITY)
        case "mostly one value":
            return np.where(rng.random(CAPACITY) < 0.99, 0.0, normal)
        case "one run":
            return np.where(np.abs(np.arange(CAPACITY) - tpu_ids.BLOCK) < TOPK // 2 + 1, 1.0, -np.abs(normal))
        case "huge":
            return rng.choice([np.inf, -np.inf, 3e38, -3e38, 2.0**-126, 0.0, 1.0], CAPACITY)
    raise ValueError(kind)


@pytest.mark.parametrize(
    ("kinds", "start"),
    [
        (("normal", "huge"), [CAPACITY - 1, CAPACITY - 2]),
        (("few values", "equal"), [CAPACITY - 1, tpu_ids.BLOCK]),
        (("one run", "mostly one value"), [CAPACITY - 1, tpu_ids.BLOCK - 1]),
        (("normal", "normal"), [TOPK, TOPK - 1]),
    ],
)
def test_scores(kinds: tuple[str, str], start: list[int]) -> None:
    """Two heads of opposite sign give any score: x = max(0, x) - max(0, -x)."""
    rng = np.random.default_rng(0)
    keys = np.stack([scores_of(kind, rng) for kind in kinds])
    arguments = (
        jnp.broadcast_to(jnp.asarray([1.0, -1.0])[:, None], (2, 1, 2, 1)),
        jnp.broadcast_to(jnp.asarray([1.0, -1.0]), (2, 1, 2)),
        jnp.asarray(np.stack([keys, keys])[..., None], jnp.float32),
        None,
        jnp.int32(LAYER),
        jnp.asarray(start, jnp.int32),
        TOPK,
    )
    check(*arguments)


def test_supports() -> None:
    def supports(dtype: str = "bfloat16", keys: str = "", S: int = 4096, I: int = 64) -> bool:  # noqa: E741
        q = jnp.zeros((1, 1, 16, I), dtype)
        return tpu_ids.supports(q, jnp.zeros((1, 1, S, I), keys or dtype))

    assert supports()
    assert supports("float8_e4m3fn", S=262144)
    assert supports("float32", S=128, I=8)
    assert not supports(keys="float32")
    assert not supports("float16")
    assert not supports(S=4000)
    assert not supports(I=128)
