"""Held-out clips as files: what the runtime reads of them is what the questions are about."""

import json
from pathlib import Path

import numpy as np

from benchmarks.grounding_annotations import find_video, read_items
from examples.train_tiny.held_out import sample_clip, write_held_out
from examples.train_tiny.render import render
from examples.train_tiny.scenes import states
from runtime.video import load_video


def test_a_set_reads_as_annotations_and_its_clips_as_their_scenes(tmp_path: Path):
    count = write_held_out(tmp_path, 3, seed=1)
    items = read_items(tmp_path / "annotations.json")
    assert len(items) == count >= 9
    assert {"when"} < {item.kind for item in items}
    for number in range(3):
        scene, timeline, questions = sample_clip(1, number)
        path = find_video(tmp_path / "videos", f"clip-{number:04}")
        assert path is not None
        video = load_video(path)
        times = timeline.times
        assert video.timestamps is not None
        np.testing.assert_allclose(video.timestamps, times, atol=1e-6)
        drawn = render(states(scene, times), scene.background)
        # H.264 halves the resolution of colour: edges differ, surfaces do not.
        assert np.abs(video.frames.astype(int) - drawn).mean() < 3
        asked = [item for item in items if item.video == f"clip-{number:04}"]
        assert {item.answer for item in asked if item.span is None} == {q.answer for q in questions if q.event is None}
        for item in asked:
            if item.span is not None:
                start, end = item.span
                # The file may have more frames than are taken: its span is at least as long as the frames show.
                shown = next(
                    q.event.span(states(scene, times), times)
                    for q in questions
                    if q.event and q.event.query == item.text
                )
                assert start <= shown[0] + 1e-6
                assert end >= shown[1] - 1e-6
    written = (tmp_path / "annotations.json").read_text()
    assert json.loads(written)["clip-0000"]["queries"]
    write_held_out(tmp_path / "again", 3, seed=1)
    assert (tmp_path / "again" / "annotations.json").read_text() == written
