import pytest
from hypothesis import given
from hypothesis import strategies as st

from runtime import buckets
from runtime.errors import InputError

LIMIT = buckets.context_limit(1 << 20)


@given(st.integers(1, LIMIT), st.integers(1, LIMIT))
def test_a_context_holds_its_tokens_and_never_exceeds_the_models_by_more_than_rounding(a: int, b: int) -> None:
    tokens, limit = min(a, b), max(a, b)
    capacity = buckets.context(tokens, limit)
    assert tokens <= capacity < limit + 128
    assert capacity % 128 == 0


@given(st.integers(1, LIMIT))
def test_contexts_grow_with_their_tokens(tokens: int) -> None:
    assert buckets.context(tokens, LIMIT) <= buckets.context(min(tokens + 1, LIMIT), LIMIT)


def test_a_short_question_does_not_pay_for_the_longest_context() -> None:
    assert buckets.context(20, LIMIT) == 512
    assert buckets.chunk(20, (), buckets.CHUNKS) == 64


def test_long_prompts_take_long_chunks_where_the_gpu_kernels_run() -> None:
    assert buckets.chunk(100_000, (), buckets.chunks("cuda", plain=False)) == 8192
    assert buckets.chunk(600, (), buckets.chunks("cuda", plain=False)) == 2048
    for platform, plain in (("cuda", True), ("cpu", False), ("tpu", False)):
        assert buckets.chunk(100_000, (), buckets.chunks(platform, plain)) == 512


def test_every_prompt_finds_its_chunk_among_the_exported_shapes() -> None:
    for standard in (buckets.CHUNKS, buckets.GPU_CHUNKS):
        prefills = {shape[1:] for program, shape in buckets.all_shapes(LIMIT, standard) if program == "prefill"}
        for tokens in (1, 64, 65, 512, 513, 2048, 2049, 8192, 8193, 200_000):
            size = buckets.context(tokens, LIMIT)
            exported = sorted(chunk for chunk, context in prefills if context == size)
            assert (buckets.chunk(tokens, exported, standard), size) in prefills


def test_too_many_tokens_are_refused_with_the_numbers() -> None:
    with pytest.raises(InputError, match=r"1001 tokens do not fit the model's context of 1000"):
        buckets.context(1001, 1000)


@given(st.integers(1, 1 << 20))
def test_patch_buckets_at_most_double_the_work(count: int) -> None:
    size = buckets.patches(count)
    assert count <= size < max(257, 2 * count)
    assert size & (size - 1) == 0


@given(st.integers(1, 1 << 20), st.integers(1, 16))
def test_shares_fill_the_devices(total: int, devices: int) -> None:
    """One device takes what it did alone; several take it in one call as soon as that is possible, none too much."""
    most = buckets.BATCH_PATCHES
    share = buckets.share(total, devices, most)
    assert share <= most
    assert share == most or share * devices >= total
    assert share == buckets.patches(share)
    assert share == buckets.patches(1) or 2 * (-(-total // devices)) > share
