"""Questions in plain English about a scene, with the thinking and the answer that the frames decide."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from examples.train_tiny.scenes import COLOUR_NAMES, NO_DIGIT, SHAPES, States

KINDS = ("what", "colour", "count", "when", "order", "digit", "describe")
MIXES = {
    # What a frame shows comes first: until the vision tower tells shapes and digits apart, times cannot be learned.
    "seeing": (0.35, 0.12, 0.05, 0.08, 0.0, 0.35, 0.05),
    "all": (0.14, 0.14, 0.08, 0.26, 0.1, 0.2, 0.08),
}
"""Shares of `KINDS` among the questions."""

GROUNDING_PROMPT = "When does this happen: {query}? Answer with the start and end in seconds."
"""What benchmarks.temporal_grounding asks by default; the model learns it beside shorter forms."""


@dataclass(frozen=True)
class Event:
    """Something that lasts: shape number `track` of the scene is visible, perhaps in a colour or with a digit."""

    track: int
    query: str
    """A sentence without full stop."""
    question: str
    colour: int | None = None
    digit: int | None = None

    def mask(self, seen: States) -> np.ndarray:
        """bool [F]: the moments at which it happens."""
        mask = seen.visible[:, self.track] > 0
        if self.colour is not None:
            mask = mask & (seen.colour[:, self.track] == self.colour)
        if self.digit is not None:
            mask = mask & (seen.digit[:, self.track] == self.digit)
        return mask

    def span(self, seen: States, times: np.ndarray) -> tuple[float, float]:
        """Seconds of the first and the last moment."""
        moments = times[self.mask(seen)]
        return float(moments[0]), float(moments[-1])


@dataclass(frozen=True)
class Question:
    kind: str
    text: str
    thinking: str
    answer: str
    event: Event | None = None
    """Of "when" questions."""


def sample_questions(
    rng: np.random.Generator, seen: States, times: np.ndarray, count: int, mix: str = "all"
) -> list[Question]:
    """Random questions that the frames `seen` at `times` [F] seconds answer; kinds are drawn from `MIXES[mix]`."""
    view, edges = _View(rng, seen, times), np.cumsum(MIXES[mix])
    questions: list[Question] = []
    while len(questions) < count:
        kind = KINDS[min(int(np.searchsorted(edges, rng.random(), side="right")), len(KINDS) - 1)]
        question = _ASKERS[kind](view)
        if question is not None:
            questions.append(question)
    return questions


def ask(kind: str, rng: np.random.Generator, seen: States, times: np.ndarray) -> Question | None:
    """A random question of one of `KINDS`; None where the scene has none."""
    return _ASKERS[kind](_View(rng, seen, times))


def seconds(time: float) -> str:
    """A time as frames are labelled: one decimal."""
    return f"{time:.1f}"


class _View:
    """The frames with what several questions need of them."""

    def __init__(self, rng: np.random.Generator, seen: States, times: np.ndarray):
        self.rng, self.seen, self.times = rng, seen, times
        self.frames = [np.flatnonzero(column) for column in seen.visible.T]
        self.shapes = [SHAPES[number] for number in seen.shape[0]]

    def pick(self, options: Any) -> Any:
        return options[int(self.rng.integers(len(options)))]

    def track(self) -> int:
        return int(self.rng.integers(len(self.shapes)))

    def colours(self, track: int) -> list[int]:
        """The colours a shape has in its frames, in order."""
        return list(dict.fromkeys(self.seen.colour[self.frames[track], track].tolist()))

    def digits(self, track: int) -> list[int]:
        return list(dict.fromkeys(self.seen.digit[self.frames[track], track].tolist()))

    def at(self, frame: int) -> list[int]:
        """Shapes visible in a frame, in the order of `SHAPES`."""
        tracks = np.flatnonzero(self.seen.visible[frame])
        return sorted(tracks.tolist(), key=lambda track: SHAPES.index(self.shapes[track]))

    def time(self, frame: int) -> str:
        return seconds(float(self.times[frame]))

    def coloured(self, track: int, frame: int) -> str:
        return f"{COLOUR_NAMES[self.seen.colour[frame, track]]} {self.shapes[track]}"

    def seen_at(self, track: int, frame: int) -> str:
        """A shape with all that is to be seen of it."""
        digit = self.seen.digit[frame, track]
        return f"a {self.coloured(track, frame)}" + ("" if digit == NO_DIGIT else f" with a {digit}")

    def by_appearance(self) -> list[int]:
        order = range(len(self.shapes))
        return sorted(order, key=lambda track: (self.frames[track][0], SHAPES.index(self.shapes[track])))


def _what(view: _View) -> Question | None:
    if view.rng.random() < 0.5:
        track = view.track()
        if len(view.colours(track)) > 1:
            return None
        colour, shape = COLOUR_NAMES[view.colours(track)[0]], view.shapes[track]
        text = view.pick((f"Which shape is {colour}?", f"What is the {colour} shape?"))
        return Question("what", text, f"The {colour} shape is a {shape}.", f"A {shape}.")
    frame = int(view.rng.integers(len(view.times)))
    names = [view.seen_at(track, frame) for track in view.at(frame)]
    text = f"What is visible at {view.time(frame)} seconds?"
    listed = " and ".join(names) or "nothing"
    return Question("what", text, f"At {view.time(frame)} seconds I see {listed}.", listed.capitalize() + ".")


def _colour(view: _View) -> Question | None:
    track = view.track()
    shape, colours = view.shapes[track], [COLOUR_NAMES[number] for number in view.colours(track)]
    if len(colours) > 1 and view.rng.random() < 0.5:
        thinking = f"The {shape} turns from {colours[0]} to {colours[1]}."
        return Question("colour", f"Which colour does the {shape} turn into?", thinking, f"{colours[1].capitalize()}.")
    if len(colours) == 1 and view.rng.random() < 0.4:
        text = f"Which colour is the {shape}?"
        return Question("colour", text, f"The {shape} is {colours[0]}.", f"{colours[0].capitalize()}.")
    frame = view.pick(view.frames[track])
    colour, time = COLOUR_NAMES[view.seen.colour[frame, track]], view.time(frame)
    text = f"Which colour is the {shape} at {time} seconds?"
    return Question("colour", text, f"At {time} seconds the {shape} is {colour}.", f"{colour.capitalize()}.")


def _count(view: _View) -> Question:
    if view.rng.random() < 0.5:
        shapes = [view.shapes[track] for track in view.by_appearance()]
        text = view.pick(("How many shapes appear in the video?", "How many shapes are there?"))
        return Question("count", text, f"I see {_series(shapes)}.", f"{len(shapes)}.")
    frame = int(view.rng.integers(len(view.times)))
    shapes, time = [view.shapes[track] for track in view.at(frame)], view.time(frame)
    text = f"How many shapes are visible at {time} seconds?"
    return Question("count", text, f"At {time} seconds I see {_series(shapes)}.", f"{len(shapes)}.")


def _series(shapes: list[str]) -> str:
    return " and ".join(f"a {shape}" for shape in shapes) or "nothing"


def _when(view: _View) -> Question | None:
    track = view.track()
    shape, colours, digits = view.shapes[track], view.colours(track), view.digits(track)
    chosen = view.rng.random()
    if chosen < 0.3 and len(colours) > 1:
        colour = view.pick(colours)
        name = COLOUR_NAMES[colour]
        event = Event(track, f"the {shape} is {name}", f"When is the {shape} {name}?", colour=colour)
    elif chosen < 0.5 and digits[0] != NO_DIGIT:
        digit = view.pick(digits)
        query = f"the {shape} shows the digit {digit}"
        event = Event(track, query, f"When does the {shape} show the digit {digit}?", digit=digit)
    else:
        colour = COLOUR_NAMES[colours[0]]
        options = [shape] if len(colours) > 1 else [shape, f"{colour} shape", f"{colour} {shape}"]
        name = view.pick(options)
        event = Event(track, f"the {name} is visible", f"When is the {name} visible?")
    if int(event.mask(view.seen).sum()) < 2:
        return None
    first, last = (seconds(time) for time in event.span(view.seen, view.times))
    text = event.question if view.rng.random() < 0.6 else GROUNDING_PROMPT.format(query=event.query)
    return Question("when", text, f"First seen at {first}, last seen at {last}.", when_answer(first, last), event)


def when_answer(first: str, last: str) -> str:
    return f"From {first} to {last} seconds."


def _order(view: _View) -> Question | None:
    if len(view.shapes) < 2:
        return None
    one, other = (int(track) for track in view.rng.choice(len(view.shapes), 2, replace=False))
    verb, which, end = view.pick((("appears", "first", 0), ("disappears", "last", -1)))
    frames = {track: int(view.frames[track][end]) for track in (one, other)}
    if frames[one] == frames[other]:
        return None
    text = f"Which {verb} {which}, the {view.shapes[one]} or the {view.shapes[other]}?"
    parts = [f"the {view.shapes[track]} {verb} at {view.time(frames[track])}" for track in (one, other)]
    winner = min(frames, key=lambda track: frames[track]) if end == 0 else max(frames, key=lambda track: frames[track])
    return Question("order", text, f"{parts[0]}, {parts[1]}.".capitalize(), f"The {view.shapes[winner]}.")


def _digit(view: _View) -> Question | None:
    track = view.track()
    shape, digits = view.shapes[track], view.digits(track)
    if digits[0] == NO_DIGIT:
        return None
    if len(digits) == 1 and view.rng.random() < 0.4:
        text = f"Which digit does the {shape} show?"
        return Question("digit", text, f"The {shape} shows {digits[0]}.", f"{digits[0]}.")
    frame = view.pick(view.frames[track])
    digit, time = int(view.seen.digit[frame, track]), view.time(frame)
    shown = (view.seen.visible[frame] > 0) & (view.seen.digit[frame] != NO_DIGIT)
    if shown.sum() == 1 and view.rng.random() < 0.3:
        text = f"Which digit is visible at {time} seconds?"
    else:
        text = f"Which digit does the {shape} show at {time} seconds?"
    return Question("digit", text, f"At {time} seconds the {shape} shows {digit}.", f"{digit}.")


def _describe(view: _View) -> Question:
    sentences = []
    for track in view.by_appearance():
        frames = view.frames[track]
        sentence = f"{view.seen_at(track, frames[0])} is visible from {view.time(frames[0])} to "
        sentences.append(f"{sentence.capitalize()}{view.time(frames[-1])} seconds.")
    thinking = f"I see {_series([view.shapes[track] for track in view.by_appearance()])}."
    text = view.pick(("What happens in this video?", "Describe the video."))
    return Question("describe", text, thinking, " ".join(sentences))


_ASKERS: dict[str, Callable[[_View], Question | None]] = {
    "what": _what,
    "colour": _colour,
    "count": _count,
    "when": _when,
    "order": _order,
    "digit": _digit,
    "describe": _describe,
}
