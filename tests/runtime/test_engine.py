"""Messages in, pieces and a result out."""

import numpy as np
import pytest

from runtime.engine import Engine
from runtime.errors import InputError
from runtime.sampling import SamplingOptions

QUESTION = [{"role": "user", "content": "Name a colour."}]
PICTURE = np.linspace(0, 255, 56 * 56 * 3).astype(np.uint8).reshape(56, 56, 3)


def test_the_pieces_join_to_the_result(tiny_engine: Engine) -> None:
    generation = tiny_engine.generate(QUESTION, max_new_tokens=24)
    pieces = list(generation)
    result = generation.result
    joined = {channel: "".join(p.text for p in pieces if p.channel == channel) for channel in ("thinking", "answer")}
    assert joined["answer"] == result.text
    assert joined["thinking"] == (result.thinking or "")
    assert len(result.token_ids) <= 24
    assert result.finish_reason == ("stop" if result.token_ids[-1] in result.options["stop_ids"] else "length")


def test_the_same_request_gives_the_same_answer(tiny_engine: Engine) -> None:
    sampling = SamplingOptions(temperature=1.0, seed=11)

    def answer() -> tuple[int, ...]:
        generation = tiny_engine.generate(QUESTION, max_new_tokens=12, sampling=sampling)
        list(generation)
        return generation.result.token_ids

    assert answer() == answer()


def test_an_image_changes_what_the_model_reads(tiny_engine: Engine) -> None:
    def logits_path(picture: np.ndarray) -> tuple[int, ...]:
        content = [{"type": "image", "image": picture}, {"type": "text", "text": "What is it?"}]
        generation = tiny_engine.generate([{"role": "user", "content": content}], max_new_tokens=16)
        list(generation)
        return generation.result.token_ids

    assert logits_path(PICTURE) != logits_path(255 - PICTURE)


def test_stopping_early_keeps_what_there_is(tiny_engine: Engine) -> None:
    generation = tiny_engine.generate(QUESTION, max_new_tokens=64)
    stream = iter(generation)
    first = next(stream)
    stream.close()  # pyright: ignore[reportAttributeAccessIssue]
    result = generation.result
    assert result.finish_reason == "interrupted"
    assert 0 < len(result.token_ids) < 64
    assert ((result.thinking or "") + (result.text or "")).startswith(first.text)


def test_frames_report_the_timestamps_used(tiny_engine: Engine) -> None:
    part = {"type": "video", "video": [PICTURE] * 4, "timestamps": [0.0, 0.4, 1.1, 2.0]}
    content = [part, {"type": "text", "text": "When?"}]
    generation = tiny_engine.generate([{"role": "user", "content": content}], max_new_tokens=1)
    list(generation)
    (frames,) = generation.result.frames
    assert set(frames["timestamps"]) <= {0.0, 0.4, 1.1, 2.0}
    assert frames["timestamps"] == sorted(frames["timestamps"])
    assert frames["height"] % 28 == 0


def test_the_result_says_which_attention_ran(tiny_engine: Engine) -> None:
    long = [{"role": "user", "content": "one two three four five six seven " * 20}]
    generation = tiny_engine.generate(long, max_new_tokens=1)
    list(generation)
    topk = tiny_engine.bundle.config["sa_config"]["topk"]
    assert generation.result.attention_path == f"dsa/top-{topk}/fp8-index/xla"


def test_unset_sampling_follows_the_checkpoints_generation_config(tiny_engine: Engine, golden_engine: Engine) -> None:
    assert tiny_engine.default_sampling().temperature > 0
    assert golden_engine.default_sampling() == SamplingOptions()  # it ships no generation_config.json


def test_text_without_a_tokenizer_is_refused_with_the_way_out(golden_engine: Engine) -> None:
    with pytest.raises(InputError, match=r"no tokenizer\.json.*--token-ids"):
        golden_engine.generate(QUESTION)


def test_more_new_tokens_than_the_context_has_left_are_refused(tiny_engine: Engine) -> None:
    with pytest.raises(InputError, match="do not fit the model's context"):
        tiny_engine.generate(QUESTION, max_new_tokens=1 << 20)


@pytest.mark.parametrize(
    "options", [{"temperature": -1.0}, {"top_p": 0.0}, {"top_p": 1.5}, {"top_k": -1}, {"seed": -1}, {"seed": 1 << 32}]
)
def test_sampling_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    with pytest.raises(InputError, match=next(iter(options))):
        SamplingOptions(**options)  # pyright: ignore[reportArgumentType]
