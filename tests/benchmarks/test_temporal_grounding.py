"""The grounding benchmark: spans in answers, figures, annotation files, and going on where it stopped."""

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest

from benchmarks import temporal_grounding
from benchmarks.grounding_annotations import AnnotationError, read_items
from benchmarks.grounding_metrics import interval, iou, same_answer
from examples.train_tiny.questions import GROUNDING_PROMPT
from runtime.spans import parse_span


@pytest.mark.parametrize(
    ("text", "span"),
    [
        ("From 3.0 to 7.5 seconds.", (3.0, 7.5)),
        ("The event happens in 12.3 - 15 seconds.", (12.3, 15.0)),
        ("It is there from 0:05 until 1:02.5", (5.0, 62.5)),
        ("1:00:05–1:00:07", (3605.0, 3607.0)),
        ("between 4s and 2s", (2.0, 4.0)),
        ("[3.2, 4.8]", (3.2, 4.8)),
        ("2 dogs appear; from 10.0 seconds to 12.0 seconds", (10.0, 12.0)),
        ("It starts at 4 seconds. It ends at 9 seconds.", (4.0, 9.0)),
        ("At 4 seconds.", None),
        ("never", None),
    ],
)
def test_spans_are_found_in_answers(text: str, span: tuple[float, float] | None):
    assert parse_span(text) == span


def test_overlap():
    assert iou((0, 4), (2, 6)) == pytest.approx(2 / 6)
    assert iou((0, 1), (2, 3)) == 0
    assert iou(None, (2, 3)) == 0
    assert iou((2, 2), (2, 2)) == 1
    assert iou((2, 3), (2, 3)) == 1


def test_answers_are_compared_by_their_words():
    assert same_answer(" a red Circle ", "A red circle.")
    assert not same_answer("A circle.", "A red circle.")


def test_the_interval_holds_the_mean_and_widens_where_items_share_videos():
    values = [1.0, 0.0] * 50
    alone = interval(values, [str(i) for i in range(100)])
    shared = interval(values, [str(i % 2) for i in range(100)])
    assert alone[0] == shared[0] == 0.5
    assert 0.38 < alone[1] < 0.45 < 0.55 < alone[2] < 0.62
    assert shared[1:] == (0.0, 1.0)
    assert alone == interval(values, [str(i) for i in range(100)])


def test_annotations_of_both_kinds(tmp_path: Path):
    bench = {
        "v_a": {"duration": 9.5, "queries": ["A  man\nwalks. ", "He stops."], "spans": [[0, 4.5], [5.0, 9.5]]},
        "v_b": {"queries": [], "spans": [], "questions": [{"kind": "x", "question": "q", "answer": "a"}]},
    }
    (tmp_path / "bench.json").write_text(json.dumps(bench))
    items = read_items(tmp_path / "bench.json")
    assert [(item.id, item.text, item.span, item.answer) for item in items] == [
        ("v_a#0", "A man walks", (0.0, 4.5), None),
        ("v_a#1", "He stops", (5.0, 9.5), None),
        ("v_b?0", "q", None, "a"),
    ]
    event = {"query": "A dog runs.", "span": [[1.0, 2.0]]}
    line = {"source": "x", "video_path": "x/1.mp4", "duration": 3.0, "events": [event]}
    (tmp_path / "train.jsonl").write_text(json.dumps(line) + "\n")
    assert read_items(tmp_path / "train.jsonl")[0].video == "x/1.mp4"


@pytest.mark.parametrize(
    "entry",
    [{"queries": ["a"], "spans": []}, {"queries": ["a"], "spans": [[3, 1]]}, {"queries": [1], "spans": [[1, 2]]}, []],
)
def test_other_files_are_refused(entry: Any, tmp_path: Path):
    (tmp_path / "bad.json").write_text(json.dumps({"v": entry}))
    with pytest.raises(AnnotationError, match="'v'"):
        read_items(tmp_path / "bad.json")


class FakeEngine:
    """Knows one answer; counts what it is asked."""

    asked: ClassVar[list[str]] = []

    @classmethod
    def load(cls, bundle: str) -> "FakeEngine":
        return cls()

    def generate(self, messages: Any, **options: Any) -> Any:
        text = messages[0]["content"][1]["text"]
        self.asked.append(text)
        answer = "From 1.0 to 3.0 seconds." if "happen" in text else "Red."
        facts = {"thinking": "", "finish_reason": "stop", "prompt_tokens": 9, "attention_path": "dsa/top-8"}

        class Generation(list):
            result = SimpleNamespace(text=answer, **facts)

        return Generation()


@pytest.fixture
def command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    import runtime.engine

    monkeypatch.setattr(runtime.engine, "Engine", FakeEngine)
    monkeypatch.setattr(FakeEngine, "asked", [])
    questions = [{"kind": "colour", "question": "Which colour?", "answer": "red"}]
    entry = {"duration": 4.0, "queries": ["It moves.", "It stops."], "spans": [[1, 3], [2, 4]]}
    annotations = {"a": entry, "b": {**entry, "questions": questions}, "gone": entry}
    (tmp_path / "annotations.json").write_text(json.dumps(annotations))
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    output = ["--videos", str(tmp_path), "--output", str(tmp_path / "results.jsonl")]
    return ["temporal_grounding", "bundle", str(tmp_path / "annotations.json"), *output]


def run(command: list[str], monkeypatch: pytest.MonkeyPatch) -> int:
    monkeypatch.setattr(sys, "argv", command)
    return temporal_grounding.main()


def test_a_run_answers_every_item_once_and_goes_on_where_it_stopped(
    command: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    summary = ["--summary", str(tmp_path / "summary.json")]
    assert run([*command, "--limit", "3"], monkeypatch) == 0
    assert len(FakeEngine.asked) == 3
    results = tmp_path / "results.jsonl"
    results.write_text(results.read_text() + '{"id": "b#1", "cut')
    assert run([*command, *summary], monkeypatch) == 0
    assert len(FakeEngine.asked) == 5
    assert run([*command, *summary], monkeypatch) == 0
    assert len(FakeEngine.asked) == 5
    figures = json.loads((tmp_path / "summary.json").read_text())
    assert figures["mIoU"]["mean"] == pytest.approx((1 + 1 / 3) / 2, abs=1e-3)
    assert figures["R@0.5"] == {"mean": 0.5, "low": 0.5, "high": 0.5, "n": 4}
    assert figures["accuracy, colour"]["mean"] == 1
    assert figures["missing videos"] == 1
    assert "mIoU" in capsys.readouterr().out
    assert run([*command, "--fps", "1"], monkeypatch) == 2
    assert "name another --output" in capsys.readouterr().err


def test_the_tiny_model_learns_the_question_that_the_benchmark_asks():
    assert temporal_grounding.PROMPT == GROUNDING_PROMPT
