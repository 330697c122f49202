"""Annotation files of temporal grounding.

The format is that of TimeLens-Bench (charades-, activitynet- and qvhighlights-timelens.json): one JSON object, a video
a key, `queries` and `spans` of equal length in it. Videos lie beside as NAME.mp4.

    {"v_abc": {"duration": 30.9, "queries": ["A man opens a door."], "spans": [[3.0, 7.5]]}}

Files of TimeLens-100K are read too (JSON lines with `video_path` and `events` of `query` and `span`, a list of one
span). Our synthetic sets add `questions`, a list of {"kind", "question", "answer"}, which other readers ignore.
"""

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

VIDEO_SUFFIXES = (".mp4", ".mkv", ".webm", ".mov", ".avi")


class AnnotationError(ValueError):
    """The file is not in a known format; the message names the place."""


@dataclass(frozen=True)
class Item:
    """One thing to ask about one video: when a query happens, or a question with a known answer."""

    id: str
    video: str
    kind: str
    """ "when" for queries, else the question's own kind."""
    text: str
    """The query, or the whole question."""
    span: tuple[float, float] | None = None
    answer: str | None = None


def read_items(path: Path) -> list[Item]:
    """All items of an annotation file, in its order. Raises AnnotationError."""
    text = path.read_text(encoding="utf-8")
    try:
        if path.suffix == ".jsonl":
            return list(_events([json.loads(line) for line in text.splitlines() if line.strip()]))
        document = json.loads(text)
    except ValueError as error:
        raise AnnotationError(f"{path} is not JSON ({error})") from error
    if not isinstance(document, dict):
        raise AnnotationError(f"{path} holds a {type(document).__name__}, not an object with a key for each video")
    return [item for video, entry in document.items() for item in _video(video, entry)]


def find_video(folder: Path, name: str) -> Path | None:
    """The file of a video, whose name may come without its suffix; None if there is none."""
    candidates = (folder / name, *(folder / f"{name}{suffix}" for suffix in VIDEO_SUFFIXES))
    return next((path for path in candidates if path.is_file()), None)


def _video(name: str, entry: Any) -> Iterator[Item]:
    if not isinstance(entry, Mapping) or len(entry.get("queries", [])) != len(entry.get("spans", [])):
        raise AnnotationError(f"{name!r} must be an object with as many spans as queries")
    for number, (query, span) in enumerate(zip(entry.get("queries", []), entry.get("spans", []), strict=True)):
        yield Item(f"{name}#{number}", name, "when", _query(query, name), _span(span, name))
    for number, question in enumerate(entry.get("questions", [])):
        if not isinstance(question, Mapping) or not {"kind", "question", "answer"} <= question.keys():
            raise AnnotationError(f"{name!r}: question {number} must have kind, question and answer")
        yield Item(f"{name}?{number}", name, question["kind"], question["question"], answer=question["answer"])


def _events(lines: list[Any]) -> Iterator[Item]:
    for entry in lines:
        if not isinstance(entry, Mapping) or not {"video_path", "events"} <= entry.keys():
            raise AnnotationError(f"line {str(entry)[:60]!r} must have video_path and events")
        name = entry["video_path"]
        for number, event in enumerate(entry["events"]):
            spans = event["span"]
            if len(spans) != 1:
                raise AnnotationError(f"{name!r}: event {number} has {len(spans)} spans, expected one")
            yield Item(f"{name}#{number}", name, "when", _query(event["query"], name), _span(spans[0], name))


def _query(query: Any, name: str) -> str:
    """As the benchmark's own reader has it: single spaces, no full stop at the end."""
    if not isinstance(query, str):
        raise AnnotationError(f"{name!r}: query {query!r:.40} is no text")
    return re.sub(r"\s+", " ", query).strip().strip(".").strip()


def _span(span: Any, name: str) -> tuple[float, float]:
    numbers = isinstance(span, list) and len(span) == 2 and all(type(value) in (int, float) for value in span)
    if not numbers or not 0 <= span[0] <= span[1]:
        raise AnnotationError(f"{name!r}: span {span!r:.40} must be [start, end] in seconds")
    return float(span[0]), float(span[1])
