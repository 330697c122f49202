"""Prompts of tokens and patches through the programs: the golden cases, batches, growth, stopping, sampling."""

import numpy as np
import pytest

from benchmarks.portable import CASES, GoldenPrompt
from benchmarks.portable import golden_prompt as read_prompt
from runtime import buckets
from runtime.engine import Engine
from runtime.errors import GenerationError, InputError
from runtime.executor import Executor
from runtime.sampling import SamplingOptions

GREEDY = SamplingOptions()
Golden = dict[str, np.ndarray]


def golden_prompt(golden: Golden, case: str) -> GoldenPrompt:
    return read_prompt(golden, case, image_id=502, video_id=503)


@pytest.fixture
def short(golden: Golden) -> list[GoldenPrompt]:
    """Two rows, for what does not depend on their prompts: all golden prompts together take twenty times as long."""
    return [golden_prompt(golden, "text_short")] * 2


def generate(
    executor: Executor,
    prompts: list[GoldenPrompt],
    sampling: list[SamplingOptions] | None = None,
    new: list[int] | None = None,
    stop_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    sampling = sampling or [GREEDY] * len(prompts)
    rows: list[list[int]] = [[] for _ in prompts]
    run = executor.run(prompts, sampling, new or [16] * len(prompts), stop_ids)  # pyright: ignore[reportArgumentType]
    for step in run.steps:
        for row, tokens in zip(rows, step, strict=True):
            row += tokens
    return rows


@pytest.mark.slow
def test_a_batch_of_all_golden_prompts_gives_each_its_golden_tokens(golden: Golden, golden_engine: Engine) -> None:
    # Unequal lengths, text and images and video side by side: rows must not see each other.
    prompts = [golden_prompt(golden, case) for case in CASES]
    rows = generate(golden_engine.executor(), prompts)
    for case, row in zip(CASES, rows, strict=True):
        assert row == golden[f"{case}/fp8_on/decode_tokens"].tolist(), case


@pytest.mark.slow
def test_a_growing_cache_and_short_chunks_change_nothing(
    golden: Golden, golden_engine: Engine, monkeypatch: pytest.MonkeyPatch
) -> None:
    """From 128 slots, full at the sixteenth token, to 256."""
    # Two rows: programs that other tests use as well. No more tokens: a rounding decides the 28th.
    prompts = [golden_prompt(golden, case) for case in ("text_long", "text_short")]
    whole, _ = generate(golden_engine.executor(), prompts, new=[26] * 2)
    monkeypatch.setattr(buckets, "CONTEXTS", (128, 256))
    monkeypatch.setattr(buckets, "CHUNKS", (48,))
    assert generate(golden_engine.executor(), [golden_prompt(golden, "text_long")], new=[26]) == [whole]
    assert whole[:16] == golden["text_long/fp8_on/decode_tokens"].tolist()


def test_a_stop_token_ends_its_row_and_only_its_row(golden: Golden, golden_engine: Engine) -> None:
    prompts = [golden_prompt(golden, case) for case in CASES]
    expected = [golden[f"{case}/fp8_on/decode_tokens"].tolist() for case in CASES]
    stop = expected[1][3]
    rows = generate(golden_engine.executor(), prompts, stop_ids=(stop,))
    for row, full in zip(rows, expected, strict=True):
        assert row == (full[: full.index(stop) + 1] if stop in full else full)


def test_each_row_has_its_own_budget(golden: Golden, golden_engine: Engine) -> None:
    prompts = [golden_prompt(golden, case) for case in CASES]
    budgets = [1, 16, 3, 7, 2, 16]
    rows = generate(golden_engine.executor(), prompts, new=budgets)
    for case, row, budget in zip(CASES, rows, budgets, strict=True):
        assert row == golden[f"{case}/fp8_on/decode_tokens"].tolist()[:budget]


def test_sampling_depends_on_the_seed_and_not_on_the_batch(short: list[GoldenPrompt], golden_engine: Engine) -> None:
    def hot(seed: int) -> SamplingOptions:
        return SamplingOptions(temperature=3.0, top_p=0.95, top_k=50, seed=seed)

    # The same prompt twice: only the seed tells the rows apart.
    first = generate(golden_engine.executor(), short, [hot(1), hot(2)])
    assert first[0] != first[1]
    assert generate(golden_engine.executor(), short, [hot(1), hot(2)]) == first
    # The same seed, in another row or beside a neighbour who draws otherwise.
    assert generate(golden_engine.executor(), short, [hot(2), hot(1)]) == first[::-1]
    beside = generate(golden_engine.executor(), short, [hot(1), SamplingOptions(temperature=3.0, seed=90)])
    assert beside[0] == first[0]
    assert beside[1] != first[1]


def test_greedy_rows_stay_greedy_beside_sampled_ones(
    golden: Golden, short: list[GoldenPrompt], golden_engine: Engine
) -> None:
    mixed = [GREEDY, SamplingOptions(temperature=2.0, seed=7)]
    rows = generate(golden_engine.executor(), short, mixed)
    assert rows[0] == golden["text_short/fp8_on/decode_tokens"].tolist()
    assert rows[1] != rows[0]


def test_logits_that_are_not_finite_are_an_error_not_an_answer(
    short: list[GoldenPrompt], golden_engine: Engine
) -> None:
    good = golden_engine.executor()
    text = {**good._text, "norm": good._text["norm"].at[0].set(np.nan)}
    broken = Executor(good.programs, {"text": text, **good._vision}, good._facts)
    with pytest.raises(GenerationError, match="not finite"):
        generate(broken, short)


def test_a_prompt_beyond_the_models_context_is_refused_before_any_work(golden: Golden, golden_engine: Engine) -> None:
    prompt = golden_prompt(golden, "text_short")
    with pytest.raises(InputError, match="do not fit the model's context of 32768"):
        generate(golden_engine.executor(), [prompt], new=[32768])


def test_the_decode_loop_never_compiles_again(short: list[GoldenPrompt], golden_engine: Engine) -> None:
    executor = golden_engine.executor()
    generate(executor, short)
    before = dict(executor.programs._programs)
    generate(executor, short, new=[5, 9])
    assert executor.programs._programs == before
