"""`make demo`: the shipped checkpoint, its question and its answer."""

import re
from pathlib import Path

import pytest
from PIL import Image

from benchmarks.grounding_metrics import iou
from examples.demo import TRAINED, demo, write_question
from examples.train_tiny import checkpoint
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


def test_the_shipped_checkpoint_is_small_and_has_the_files_that_training_writes(tmp_path: Path) -> None:
    assert sum(path.stat().st_size for path in TRAINED.iterdir()) < 20e6
    checkpoint.write_untrained(tmp_path)
    for path in tmp_path.iterdir():
        if path.name != "model.safetensors":
            assert (TRAINED / path.name).read_bytes() == path.read_bytes(), path.name


@pytest.mark.slow
@pytest.mark.usefixtures("optimising_compiler")
def test_the_demo_answers_rightly_and_draws(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    picture = demo(TRAINED, tmp_path, clip=2)
    with Image.open(picture) as image:
        assert image.width > 1000
    printed = capfd.readouterr().out
    for line in (
        "$ python -m convert",
        "Question:    When is the red shape visible?",
        "Thinking:",
        "dsa/top-128/fp8-index",
    ):
        assert line in printed
    answers = re.findall(r"^(?:A|True a)nswer: +(From .*)$", printed, re.MULTILINE)
    assert answers == ["From 1.0 to 7.0 seconds."] * 2
