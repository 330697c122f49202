"""Writes clips that training has not seen, as mp4, with questions about them in TimeLens-Bench's annotation format.

    python -m examples.train_tiny.held_out FOLDER [--clips 60] [--seed 1]

FOLDER gets `videos/clip-0000.mp4`, ... and `annotations.json`: for each clip two "when" queries with their spans and
three other questions (`questions`), where its scene has them. `python -m benchmarks.temporal_grounding` reads both.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np

from examples.train_tiny.questions import Question, ask
from examples.train_tiny.render import render
from examples.train_tiny.scenes import SIDE, Scene, sample_scene, states
from examples.train_tiny.timelines import Timeline, sample_timeline

HELD_OUT = 1 << 40
"""Added to the seed: no training stream comes here."""
FEWEST_FRAMES, MOST_FRAMES = 10, 16
QUERIES, QUESTIONS = 2, 3
OTHER_KINDS = ("what", "colour", "digit", "count", "order")
QUALITY = "18"
"""x264's constant rate factor: no visible loss."""


def write_clip(path: Path, scene: Scene, timeline: Timeline) -> None:
    """Encodes a scene as H.264 in the container that the suffix names."""
    import av

    frames = render(states(scene, timeline.file_times), scene.background)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=timeline.rate, options={"crf": QUALITY, "preset": "medium"})
        stream.width = stream.height = SIDE
        stream.pix_fmt = "yuv420p"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(frame, format="rgb24")))
        container.mux(stream.encode(None))


def sample_clip(seed: int, number: int) -> tuple[Scene, Timeline, list[Question]]:
    """Clip `number` of a held-out set and its questions, "when" first."""
    rng = np.random.default_rng([HELD_OUT + seed, number])
    timeline = sample_timeline(rng, FEWEST_FRAMES, MOST_FRAMES)
    while timeline.wanted is not None:  # a rate to look at is nothing that a file can say
        timeline = sample_timeline(rng, FEWEST_FRAMES, MOST_FRAMES)
    times = timeline.times
    scene = sample_scene(rng, times, timeline.duration)
    seen = states(scene, times)
    kinds = ["when"] * QUERIES + [str(kind) for kind in rng.permutation(OTHER_KINDS)[:QUESTIONS]]
    found: dict[str, Question] = {}
    for kind in kinds:
        question = next((q for _ in range(20) if (q := ask(kind, rng, seen, times)) and q.text not in found), None)
        if question is not None:
            found[question.text] = question
    return scene, timeline, list(found.values())


def annotation(scene: Scene, timeline: Timeline, questions: list[Question]) -> dict[str, Any]:
    """One clip's entry. Spans are exact in the file's frames, whatever a model is given of them."""
    times = timeline.file_times
    seen = states(scene, times)
    events = {question.event.query: question.event for question in questions if question.event is not None}
    spans = [event.span(seen, times) for event in events.values()]
    return {
        "duration": round(timeline.duration, 3),
        "queries": [f"{query}." for query in events],
        "spans": [[round(start, 3), round(end, 3)] for start, end in spans],
        "questions": [
            {"kind": question.kind, "question": question.text, "answer": question.answer}
            for question in questions
            if question.event is None
        ],
    }


def write_held_out(folder: Path, clips: int, seed: int) -> int:
    """Writes the set and returns how many items it has. The same arguments give the same questions."""
    videos = folder / "videos"
    videos.mkdir(parents=True, exist_ok=True)
    entries = {}
    for number in range(clips):
        scene, timeline, questions = sample_clip(seed, number)
        name = f"clip-{number:04}"
        write_clip(videos / f"{name}.mp4", scene, timeline)
        entries[name] = annotation(scene, timeline, questions)
    (folder / "annotations.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    return sum(len(entry["queries"]) + len(entry["questions"]) for entry in entries.values())


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="python -m examples.train_tiny.held_out", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", metavar="FOLDER", type=Path)
    parser.add_argument("--clips", type=int, default=60, help="number of clips (default 60: about 290 items)")
    parser.add_argument("--seed", type=int, default=1, help="another seed, other clips (default 1)")
    args = parser.parse_args()
    items = write_held_out(args.folder, args.clips, args.seed)
    print(f"{args.folder}: {args.clips} clips, {items} items")
    return 0


if __name__ == "__main__":
    sys.exit(main())
