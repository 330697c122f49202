"""The TPU body of select_bits, interpreted on the CPU with its copies and semaphores, against the reference."""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.pallas.mosaic.interpret import interpret_pallas_call as interpreter
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas.index_select import reference, tpu_bits

LAYERS, LAYER, TOPK = 2, 1, 600
CAPACITY = 2 * tpu_bits.SEGMENT + 128  # a last segment that is not full
expected = jax.jit(reference.select_bits, static_argnums=6)


@partial(jax.jit, static_argnums=(6,))
def interpreted(*arguments: Any) -> jax.Array:
    interpret = pltpu.InterpretParams(detect_races=True, uninitialized_memory="nan")
    return tpu_bits.select_bits(*arguments, interpret=interpret)


def check(*arguments: Any) -> None:
    actual = jax.block_until_ready(interpreted(*arguments))
    assert interpreter.races is not None
    assert not interpreter.races.races_found
    np.testing.assert_array_equal(actual, expected(*arguments))


def integers(B: int, C: int, J: int, I: int, S: int, dtype: Any) -> tuple[Any, ...]:  # noqa: E741
    """Queries, weights, keys, scales and layer, all small integers or powers of two: float32 sums are exact."""
    rng = np.random.default_rng(0)
    scale = None
    if dtype == jnp.float8_e4m3fn:
        scale = jnp.asarray(2.0 ** rng.integers(-2, 3, (LAYERS, B, S)), jnp.float32)
    return (
        jnp.asarray(rng.integers(-3, 4, (B, C, J, I)), dtype),
        jnp.asarray(rng.integers(-2, 3, (B, C, J)), jnp.float32),
        jnp.asarray(rng.integers(-3, 4, (LAYERS, B, S, I)), dtype),
        scale,
        jnp.int32(LAYER),
    )


@pytest.mark.parametrize(
    ("sizes", "dtype", "start", "topk"),
    [
        # Sequences of different lengths: one in its last segment, one in which nobody sees more than topk.
        ((2, 16, 2, 64, CAPACITY), jnp.float8_e4m3fn, [CAPACITY - 16, 30], 64),
        # More than a block of queries, padded; a chunk that ends behind the capacity; heads that are no power of two.
        ((1, 140, 5, 16, 256), jnp.bfloat16, [130], 1),
    ],
)
def test_ragged(sizes: tuple[int, int, int, int, int], dtype: Any, start: list[int], topk: int) -> None:
    check(*integers(*sizes, dtype), jnp.asarray(start, jnp.int32), topk)


def scores_of(kind: str, rng: np.random.Generator) -> np.ndarray:
    normal = rng.normal(size=CAPACITY)
    match kind:
        case "normal":
            return normal
        case "negative":
            return -np.abs(normal)
        case "equal":
            return np.full(CAPACITY, -3.5)
        case "few values":
            return rng.integers(-1, 2, CAPACITY)
        case "mostly one value":
            return np.where(rng.random(CAPACITY) < 0.98, 0.0, normal)
        case "clustered":
            return np.repeat(rng.normal(size=CAPACITY // 64), 64) + 1e-3 * normal
        case "huge":
            return rng.choice([np.inf, -np.inf, 3e38, -3e38, 2.0**-126, 0.0, 1.0], CAPACITY)
    raise ValueError(kind)


@pytest.mark.parametrize(
    "kinds", [("normal", "huge"), ("negative", "equal"), ("few values", "mostly one value"), ("clustered", "normal")]
)
def test_scores(kinds: tuple[str, str]) -> None:
    """Two heads of opposite sign give any score: x = max(0, x) - max(0, -x). The first queries of the second sequence
    see at most topk keys."""
    rng = np.random.default_rng(0)
    C = 16
    keys = np.stack([scores_of(kind, rng) for kind in kinds])
    arguments = (
        jnp.broadcast_to(jnp.asarray([1.0, -1.0])[:, None], (2, C, 2, 1)),
        jnp.broadcast_to(jnp.asarray([1.0, -1.0]), (2, C, 2)),
        jnp.asarray(np.stack([keys, keys])[..., None], jnp.float32),
        None,
        jnp.int32(LAYER),
        jnp.asarray([CAPACITY - C, TOPK - 5], jnp.int32),
        TOPK,
    )
    check(*arguments)


def test_supports() -> None:
    def supports(dtype: str = "bfloat16", keys: str = "", S: int = 4096, I: int = 64) -> bool:  # noqa: E741
        q = jnp.zeros((1, 1, 16, I), dtype)
        return tpu_bits.supports(q, jnp.zeros((1, 1, S, I), keys or dtype))

    assert supports()
    assert supports("float8_e4m3fn", S=262144)
    assert supports("float32", S=128, I=8)
    assert not supports(keys="float32")
    assert not supports("float16")
    assert not supports(S=4000)
    assert not supports(S=1 << 20, I=8)
    assert not supports(I=128)
