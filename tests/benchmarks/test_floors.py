"""The floors against the table that they were first worked out in by hand (one H200, bf16 index keys)."""

import dataclasses

import pytest

from benchmarks.gpu import floors
from benchmarks.published import CONFIG
from keye_jax import KeyeConfig

PUBLISHED = KeyeConfig.from_hf(CONFIG, indexer_dtype="bf16")

TWO_DIGITS = 0.02
"""The table has no more."""


@pytest.mark.parametrize(("context", "seconds"), [(8192, 0.078), (32768, 0.37), (131072, 2.28), (262144, 6.7)])
def test_prefill(context: int, seconds: float) -> None:
    assert floors.prefill_seconds(PUBLISHED, context, floors.H200) == pytest.approx(seconds, rel=TWO_DIGITS)


@pytest.mark.parametrize(("context", "seconds"), [(8192, 0.033), (32768, 0.53), (131072, 8.6), (262144, 34)])
def test_dense_attention(context: int, seconds: float) -> None:
    work = floors.Work(PUBLISHED)
    flops = 48 * work.attention_flops(work.attended(0, context, dense=True))
    assert flops / floors.H200.flops == pytest.approx(seconds, rel=TWO_DIGITS)


@pytest.mark.parametrize(
    ("batch", "context", "sparse", "dense"),
    [
        (1, 8192, 1.52, 1.60),
        (1, 32768, 1.56, 2.16),
        (1, 131072, 1.70, 4.41),
        (1, 262144, 1.89, 7.41),
        (8, 8192, 6.5, 7.5),
        (8, 32768, 6.8, 12.0),
    ],
)
def test_decode(batch: int, context: int, sparse: float, dense: float) -> None:
    assert 1e3 * floors.decode_seconds(PUBLISHED, context, batch, floors.H200) == pytest.approx(sparse, rel=TWO_DIGITS)
    measured = 1e3 * floors.decode_seconds(PUBLISHED, context, batch, floors.H200, dense=True)
    assert measured == pytest.approx(dense, rel=TWO_DIGITS)


def test_vision_of_an_hour() -> None:
    assert floors.Work(PUBLISHED).vision_flops(2880, 256) / floors.H200.flops == pytest.approx(0.8, rel=0.1)


@pytest.mark.parametrize(("first", "tokens"), [(0, 1), (0, 100), (7, 9), (10, 30), (40, 5)])
def test_attended_pairs(first: int, tokens: int) -> None:
    config = dataclasses.replace(PUBLISHED, sparse=dataclasses.replace(PUBLISHED.sparse, topk=16))
    work = floors.Work(config)
    assert work.attended(first, tokens) == sum(min(t + 1, 16) for t in range(first, first + tokens))
    assert work.attended(first, tokens, dense=True) == sum(t + 1 for t in range(first, first + tokens))


def test_quantised_index_keys_are_read_faster() -> None:
    fp8 = dataclasses.replace(PUBLISHED, sparse=dataclasses.replace(PUBLISHED.sparse, indexer_dtype="fp8"))
    assert floors.Work(fp8).index_key_bytes == 68
    assert floors.decode_seconds(fp8, 131072, 1, floors.H200) < floors.decode_seconds(PUBLISHED, 131072, 1, floors.H200)
