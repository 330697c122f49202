"""The trained checkpoint's demo, with one that has learnt nothing."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.grounding_metrics import iou
from examples.train_tiny import checkpoint
from examples.train_tiny.demo import demo, write_question
from examples.train_tiny.objectives import initial_params
from runtime.spans import parse_span
from runtime.video import load_video


def test_the_question_is_about_the_clip_and_its_interval_is_the_answers(tmp_path: Path) -> None:
    question, truth = write_question(tmp_path / "clip.mp4", 0)
    assert question.event is not None
    answer = parse_span(question.answer)
    # The answer has one decimal.
    assert answer == pytest.approx(truth, abs=0.051)
    assert iou(answer, truth) > 0.7
    times = load_video(tmp_path / "clip.mp4").timestamps
    assert times is not None
    assert times[0] <= truth[0] <= truth[1] <= times[-1] + 1e-6


@pytest.mark.slow
def test_the_demo_answers_and_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "checkpoint"
    config = checkpoint.write_untrained(folder)
    checkpoint.write_trained(folder, config, initial_params(config, 1))
    picture = demo(folder, tmp_path / "made", max_new_tokens=6)
    with Image.open(picture) as image:
        assert image.width > 1000
    printed = capfd.readouterr().out
    for line in ("$ python -m convert", "Question:    When", "Thinking:", "True answer: From", "dsa/top-128/fp8-index"):
        assert line in printed
