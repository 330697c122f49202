"""Batches without end: each is a function of the seed and its number, made by processes beside the training."""

import multiprocessing
import signal
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, Self

import numpy as np

from examples.train_tiny.prompts import PADDING, Prompts
from examples.train_tiny.questions import KINDS, sample_questions
from examples.train_tiny.scenes import MAX_TRACKS, NO_DIGIT, States, sample_scene, states
from examples.train_tiny.timelines import sample_timeline

TOKENS_PER_FRAME = 64
LABEL_TOKENS = 5
"""Tokens of `<|frame|>` and a time below 100 seconds."""


@dataclass(frozen=True)
class Shape:
    """A batch: clips, frames of the longest and of the shortest clip, tokens for questions, and their kinds."""

    clips: int
    frames: int
    fewest: int = 4
    question_tokens: int = 320
    mix: str = "all"
    """Of questions, see `questions.MIXES`."""

    @property
    def tokens(self) -> int:
        return -(-(self.frames * (TOKENS_PER_FRAME + LABEL_TOKENS) + 8 + self.question_tokens) // 32) * 32


class Batch(NamedTuple):
    """Arrays of one batch, ready for the device; pixels are drawn there."""

    states: States  # int16 [B, F, O] each
    background: np.ndarray  # uint8 [B]
    tokens: np.ndarray  # int32 [B, T]
    positions: np.ndarray  # int32 [3, B, T]
    segment: np.ndarray  # int32 [B, T]
    learned: np.ndarray  # bool [B, T]
    kinds: np.ndarray  # int8 [B, Q]: index in KINDS of every question, -1 where there is none


MOST_QUESTIONS = 12


def empty_batch(shape: Shape) -> Batch:
    """A batch without clips: all padding."""
    B, T = shape.clips, shape.tokens
    seen = States(*np.zeros((6, B, shape.frames, MAX_TRACKS), np.int16))
    seen.digit[:] = NO_DIGIT
    return Batch(
        seen,
        background=np.zeros(B, np.uint8),
        tokens=np.zeros((B, T), np.int32),
        positions=np.zeros((3, B, T), np.int32),
        segment=np.full((B, T), PADDING, np.int32),
        learned=np.zeros((B, T), bool),
        kinds=np.full((B, MOST_QUESTIONS), -1, np.int8),
    )


def make_batch(prompts: Prompts, shape: Shape, seed: int, number: int) -> Batch:
    """Batch `number` of the stream `seed`."""
    rng = np.random.default_rng([seed, number])
    batch = empty_batch(shape)
    for b in range(shape.clips):
        timeline = sample_timeline(rng, shape.fewest, shape.frames)
        times = timeline.times
        scene = sample_scene(rng, times, timeline.duration)
        now = states(scene, times)
        questions = sample_questions(rng, now, times, MOST_QUESTIONS, shape.mix)
        sample, taken = prompts.sequence(times, questions, shape.tokens)
        count, length = len(times), len(sample.tokens)
        for whole, part in zip(batch.states, now, strict=True):
            whole[b, :count, : part.shape[1]] = part
        batch.background[b] = scene.background
        batch.tokens[b, :length], batch.learned[b, :length] = sample.tokens, sample.learned
        batch.positions[:, b, :length], batch.segment[b, :length] = sample.positions, sample.segment
        batch.kinds[b, :taken] = [KINDS.index(question.kind) for question in questions[:taken]]
    return batch


_prompts: Prompts | None = None


def _start(folder: Path) -> None:
    global _prompts
    # Ctrl-C reaches every process of a terminal; the training process alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    _prompts = Prompts(folder)


def _make(shape: Shape, seed: int, number: int) -> Batch:
    assert _prompts is not None
    return make_batch(_prompts, shape, seed, number)


class Stream:
    """Batches in order of their numbers, made ahead of time by `workers` processes."""

    def __init__(self, folder: Path, seed: int, workers: int):
        # Spawned, because a process that runs JAX's threads must not fork.
        context = multiprocessing.get_context("spawn")
        self._pool = ProcessPoolExecutor(workers, context, initializer=_start, initargs=(folder,))
        self._seed, self._ahead = seed, 3 * workers

    def batches(self, numbers: Iterator[tuple[int, Shape]]) -> Iterator[tuple[int, Batch]]:
        """(number, batch) for every (number, shape) asked for, in that order."""
        waiting: list[tuple[int, Future[Batch]]] = []
        for number, shape in numbers:
            waiting.append((number, self._pool.submit(_make, shape, self._seed, number)))
            if len(waiting) > self._ahead:
                first, made = waiting.pop(0)
                yield first, made.result()
        for first, made in waiting:
            yield first, made.result()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._pool.shutdown(cancel_futures=True)
