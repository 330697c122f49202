"""Intervals of time that a text names."""

import re
from collections.abc import Sequence

Span = tuple[float, float]
"""Start and end in seconds."""

# 83.5 or 1:23.5 or 0:01:23.5, with or without a unit.
_TIME = r"(?:(?:(\d+):)?(\d+):)?(\d+(?:\.\d+)?)\s*(?:s\b|secs?\b|seconds?\b)?"
_PAIR = re.compile(_TIME + r"\s*(?:-|–|—|~|\bto\b|\buntil\b|\btill\b|\band\b|,)\s*" + _TIME, re.IGNORECASE)
_ONE = re.compile(_TIME, re.IGNORECASE)
# What tells a time from a plain number: a unit, or hours and minutes.
_UNIT = re.compile(r"\d\s*(?:s|secs?|seconds?)\b|\d:\d", re.IGNORECASE)


def parse_span(text: str) -> Span | None:
    """The first pair of times in an answer, else its first two times, in order of time; None if it has fewer.

    Understood are seconds and h:mm:ss, joined by a dash, "to", "until", "and" or a comma. Any number may be a time: for
    answers to "when".
    """
    if (pair := _PAIR.search(text)) is not None:
        return _span(pair)
    found = [_seconds(match.groups()) for match in _ONE.finditer(text)][:2]
    return (min(found), max(found)) if len(found) == 2 else None


def named_spans(text: str) -> list[Span]:
    """All intervals in an answer of any kind: pairs of which at least one time has a unit or is written h:mm:ss; else
    the two times of an answer that has just two such."""
    pairs = [_span(pair) for pair in _PAIR.finditer(text) if _UNIT.search(pair.group())]
    times = [_seconds(match.groups()) for match in _ONE.finditer(text) if _UNIT.search(match.group())]
    return pairs or ([(min(times), max(times))] if len(times) == 2 else [])


def _span(pair: re.Match[str]) -> Span:
    found = (_seconds(pair.groups()[:3]), _seconds(pair.groups()[3:]))
    return min(found), max(found)


def _seconds(parts: Sequence[str | None]) -> float:
    hours, minutes, seconds = (float(part or 0) for part in parts)
    return 3600 * hours + 60 * minutes + seconds
